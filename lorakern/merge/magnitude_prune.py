"""magnitude_prune: the weighted sum of the trimmed true updates."""

import torch

from lorakern.merge._sparsify import weighted_sum
from lorakern.merge._streamed import StreamedUpdate, thresholds, trim
from lorakern.merge.options import Densities
from lorakern.merge.registry import Term, method


@method("magnitude_prune")
def magnitude_prune(
    terms: list[Term], rank: int | float | None, generator: torch.Generator, *, density: Densities = 0.5
):
    """The weighted sum of the true updates, of which each keeps its largest entries: ``W = sum_i w_i trim(D_i)``.

    ``D_i = s_i B_i A_i`` keeps its ``int(density * numel)`` largest magnitudes; the result is the best rank-r
    approximation of W. Neither is ever stored: see `lorakern.merge._streamed`.

    Args:
        density: the share of entries that each update keeps, in (0, 1].
            A list has one for each adapter.

    ``rank=None`` takes the largest rank among the adapters; a share of the energy is refused. Computed in float32.
    Equal to PEFT's "magnitude_prune_svd".

    >>> import torch, lorakern as lk
    >>> a = {"proj": (torch.ones(1, 8), torch.tensor([[1.0], [2.0]]), 1.0)}
    >>> merged = lk.merge([a], method="magnitude_prune", density=0.5)["proj"]
    >>> (merged.scale * merged.B @ merged.A)[:, 0].abs().round(decimals=4).tolist()
    [0.0, 2.0]
    """
    return update(terms, density).low_rank(rank, generator)


def update(terms: list[Term], density: float | list[float]) -> StreamedUpdate:
    """W of `magnitude_prune`, before it is truncated."""
    limits = thresholds(terms, density)
    weights = torch.tensor([term.weight for term in terms], device=terms[0].A.device)
    return StreamedUpdate(terms, lambda stack, _: weighted_sum(trim(stack, limits), weights))
