"""ties: trim, elect sign, disjoint mean, on the true updates."""

import torch

from lorakern.merge._sparsify import disjoint_mean
from lorakern.merge._streamed import StreamedUpdate, thresholds, trim
from lorakern.merge.options import Densities, SignMethod
from lorakern.merge.registry import Term, method


@method("ties")
def ties(
    terms: list[Term],
    rank: int | float | None,
    generator: torch.Generator,
    *,
    density: Densities = 0.5,
    majority_sign_method: SignMethod = "total",
):
    """TIES on the true updates: the mean, entry by entry, of the trimmed updates that have the elected sign.

    ``D_i = s_i B_i A_i`` keeps its ``int(density * numel)`` largest magnitudes; ``sign = sign(sum_i D_i)``, or of
    ``sum_i sign(D_i)``, + where that is 0; ``W = sum_{i: sign(D_i) = sign} w_i D_i / #{i: sign(D_i) = sign}``; the
    result is the best rank-r approximation of W. No D_i and no W is ever stored: see `lorakern.merge._streamed`.

    Args:
        density: the share of entries that each update keeps, in (0, 1]; the paper takes 0.2.
            A list has one for each adapter.
        majority_sign_method: "total" elects by the sum of the trimmed values, "frequency" by the number of signs.

    ``rank=None`` takes the largest rank among the adapters; a share of the energy is refused. Computed in float32.
    TIES-Merging: arXiv 2306.01708; equal to PEFT's "ties_svd".

    >>> import torch, lorakern as lk
    >>> a, b = ({"proj": (torch.ones(1, 8), torch.full((6, 1), value), 1.0)} for value in (3.0, -1.0))
    >>> merged = lk.merge([a, b], method="ties", density=1.0)["proj"]
    >>> round((merged.scale * merged.B @ merged.A)[0, 0].item(), 4)  # b is outvoted
    3.0
    """
    return update(terms, density, majority_sign_method).low_rank(rank, generator)


def update(terms: list[Term], density: float | list[float], majority_sign_method: str) -> StreamedUpdate:
    """W of `ties`, before it is truncated."""
    limits = thresholds(terms, density)
    weights = torch.tensor([term.weight for term in terms], device=terms[0].A.device)
    return StreamedUpdate(terms, lambda stack, _: disjoint_mean(trim(stack, limits), weights, majority_sign_method))
