"""What a merge by features gives: dense updates, how well they fit, and the ways to use them."""

from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from lorakern.adapters import LoraAdapter
from lorakern.adapters.json_file import show
from lorakern.errors import LorakernError


class Truncation(NamedTuple):
    """An adapter of low rank, and the share of every dense update's energy (squared singular values) that it keeps."""

    adapter: LoraAdapter
    energy: dict[str, float]


@dataclass(frozen=True)
class Solution:
    """The merged updates of `solve` and `regmean`.

    Attributes:
        updates: module path in the model to the dense update (d_out, d_in), float32, on the CPU; also for layers that
            store their weight transposed.
        module_objectives: for the merged model after each sweep, module path to
            ``sum_i c_i lambda_i ||X_i W_i^T - X~_i W^T||_F^2`` with X~ the features in that very model, to some
            1e-7 of ``sum_i c_i lambda_i ||X_i W_i^T||_F^2``.
        lambdas: module path to lambda of each adapter.
        undetermined: module path to how many input directions the samples left open in the last sweep, where alpha
            is zero, or too small to tell them from rounding: the update is zero in them. Empty if there are none.
        fan_in_fan_out: whether the model's layers store their weights as (d_in, d_out).
    """

    updates: dict[str, torch.Tensor]
    module_objectives: list[dict[str, float]]
    lambdas: dict[str, list[float]]
    undetermined: dict[str, int] = field(default_factory=dict)
    fan_in_fan_out: bool = False

    @property
    def objectives(self) -> list[float]:
        """The objective of the merged model after each sweep, summed over the modules."""
        return [sum(modules.values()) for modules in self.module_objectives]

    def fold(self, model: torch.nn.Module) -> torch.nn.Module:
        """Add the updates to the model's own weights, in place: ``W0 <- W0 + W``, rounded once to the weight's dtype.

        Args:
            model: the base model, or a `copy.deepcopy` of it where the base is still needed.

        Returns:
            The same model.

        Raises:
            LorakernError: a layer is missing, has another shape, or shares its weight with another module, which
                would change too; nothing has changed then.
        """
        parameters = dict(model.named_parameters(remove_duplicate=False))
        owners: dict[int, list[str]] = {}
        for name, parameter in parameters.items():
            owners.setdefault(parameter.data_ptr(), []).append(name)
        for module, update in self.updates.items():
            weight = parameters.get(f"{module}.weight")
            shape = tuple(reversed(update.shape)) if self.fan_in_fan_out else tuple(update.shape)
            if weight is None or tuple(weight.shape) != shape:
                got = "no such weight" if weight is None else f"a weight {tuple(weight.shape)}"
                raise LorakernError(
                    f"fold: module {module!r}: the {type(model).__name__} has {got}, the update takes {shape}; "
                    "give the model that the adapters were merged for"
                )
            if len(shared := owners[weight.data_ptr()]) > 1:
                raise LorakernError(
                    f"fold: module {module!r}: its weight is that of {', '.join(shared)}; untie them first, or take "
                    "the update as an adapter"
                )
        with torch.no_grad():
            for module, update in self.updates.items():
                weight = parameters[f"{module}.weight"]
                wide = torch.promote_types(weight.dtype, torch.float32)
                update = (update.T if self.fan_in_fan_out else update).to(weight.device)
                weight.copy_(weight.to(wide) + update)
        return model

    def adapter(self, rank: int | float, *, base_model_name_or_path: str | None = None) -> Truncation:
        """The best adapter of a rank, ``argmin ||B A - W||_F`` per module, by singular values.

        Args:
            rank: an integer, at most the smaller side of a layer (a larger one is lowered to that), or a share of
                the energy in (0, 1) to keep with the fewest ranks.
            base_model_name_or_path: the model that the adapter is for, as it is to be written to the config.

        Returns:
            `Truncation`: the `LoraAdapter` (float32, scale 1) and module path to the share of energy kept.

        Raises:
            LorakernError: a rank that is neither.

        >>> import torch
        >>> from lorakern.merge.iteris import Solution
        >>> solution = Solution({"proj": torch.diag(torch.tensor([3.0, 1.0]))}, [{}], {"proj": [1.0]})
        >>> adapter, energy = solution.adapter(1)
        >>> adapter["proj"].rank, round(energy["proj"], 3)
        (1, 0.9)
        """
        whole = isinstance(rank, int) and not isinstance(rank, bool) and rank >= 1
        if not whole and not (isinstance(rank, float) and 0 < rank < 1):
            raise LorakernError(f"adapter: rank must be a positive integer or a share in (0, 1); got {show(rank)}")
        factors, shares = {}, {}
        for module, update in self.updates.items():
            U, sigma, Vt = torch.linalg.svd(update, full_matrices=False)
            energy = sigma.double().square().cumsum(0)
            kept = min(rank, len(sigma)) if whole else min(int((energy < rank * energy[-1]).sum()) + 1, len(sigma))
            root = sigma[:kept].sqrt()
            factors[module] = (root[:, None] * Vt[:kept], U[:, :kept] * root, 1.0)
            shares[module] = float(energy[kept - 1] / energy[-1]) if energy[-1] > 0 else 1.0
        options = {"base_model_name_or_path": base_model_name_or_path, "fan_in_fan_out": self.fan_in_fan_out}
        return Truncation(LoraAdapter(factors, **options), shares)
