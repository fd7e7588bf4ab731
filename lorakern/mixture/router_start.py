"""What the router of RAMoLE reads before it is trained: the directions in which the inputs of examples differ."""

from collections.abc import Iterable

import torch

from lorakern.merge._batches import Batch
from lorakern.mixture.routers import Routers, linear_layers


@torch.no_grad()
def read_differences(model: torch.nn.Module, routers: Routers, batches: Iterable[Batch]) -> None:
    """Replace the rows of every router's A (r_r, d_in) by principal directions of the inputs of that layer.

    Most of an input x is the same whatever the task, and a random A reads little else: its queries then tell adapters
    apart but not the questions, and one adapter is favoured for all. With x_e the mean input over the tokens of example
    e, in the base model, the rows are the first right singular vectors of the matrix of all ``x_e - mean_e x_e``,
    without their part along that mean, scaled so that their products with its rows have a mean square of 1. Rows beyond
    the number of examples less one stay as they were drawn.

    Args:
        model: the base model, no mixture active.
        routers: of mode "ramole"; changed in place.
        batches: examples of the tasks.
    """
    means: dict[str, list[torch.Tensor]] = {path: [] for path in routers.layers}
    mask = torch.ones(0)

    def watch(path: str):
        def hook(module, inputs, named, _):
            (x,) = inputs or named.values()
            weight = mask.to(x.device)[..., None]
            sums = (x.float().reshape(*mask.shape, -1) * weight).sum(1)
            means[path].append((sums / weight.sum(1).clamp(min=1)).cpu())

        return hook

    layers = linear_layers(model)
    hooks = [layers[path][1].register_forward_hook(watch(path), with_kwargs=True) for path in means]
    was_training = model.training
    model.eval()
    try:
        for batch in batches:
            mask = batch["attention_mask"].float()
            inputs = {name: batch[name].to(model.device) for name in ("input_ids", "attention_mask")}
            model(**inputs, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
        model.train(was_training)
    for path, found in means.items():
        routers.layers[path]["A"] = _directions(torch.cat(found), routers.layers[path]["A"])


def _directions(x: torch.Tensor, drawn: torch.Tensor) -> torch.Tensor:
    """The rows for examples x (E, d_in), in place of those `drawn` (r_r, d_in)."""
    mean = x.mean(0)
    apart = x - mean
    rank = min(len(drawn), len(x) - 1)
    rows = torch.linalg.svd(apart, full_matrices=False).Vh[:rank]
    along = torch.nn.functional.normalize(mean, dim=0)
    rows = rows - (rows @ along)[:, None] * along
    size = (apart @ rows.T).square().mean(0).sqrt()
    # examples that are all alike have no directions
    usable = size > 1e-6 * mean.norm()
    out = drawn.clone()
    out[:rank][usable] = (rows / size.clamp(min=torch.finfo(size.dtype).tiny)[:, None])[usable]
    return out
