"""dare_linear: the weighted sum of the true updates with entries dropped at random."""

import torch

from lorakern.merge._sparsify import per_term, weighted_sum
from lorakern.merge._streamed import StreamedUpdate, drop
from lorakern.merge.options import Densities
from lorakern.merge.registry import Term, method


@method("dare_linear")
def dare_linear(terms: list[Term], rank: int | float | None, generator: torch.Generator, *, density: Densities = 0.5):
    """The weighted sum of the true updates, entries dropped at random, the others scaled up: ``sum_i w_i M_i D_i / p``.

    ``D_i = s_i B_i A_i``; the entries of ``M_i`` are 1 with probability ``p = density``, else 0; the result is the best
    rank-r approximation. M_i is a hash of (seed, module, place of the adapter, row, column), made where it is needed;
    nothing dense is ever stored: see `lorakern.merge._streamed`.

    Args:
        density: the probability with which an entry is kept, in (0, 1]; DARE's drop rate is 1 - density.
            A list has one for each adapter.

    ``rank=None`` takes the largest rank among the adapters; a share of the energy is refused. Computed in float32.
    DARE: arXiv 2311.03099; in distribution equal to PEFT's "dare_linear_svd".

    >>> import torch, lorakern as lk
    >>> a = {"proj": (torch.ones(1, 8), torch.ones(6, 1), 1.0)}
    >>> merged = lk.merge([a], method="dare_linear", density=0.5, rank=6, seed=7)["proj"]
    >>> sorted(set((merged.scale * merged.B @ merged.A).abs().round(decimals=4).flatten().tolist()))
    [0.0, 2.0]
    """
    return update(terms, generator, density).low_rank(rank, generator)


def update(terms: list[Term], generator: torch.Generator, density: float | list[float]) -> StreamedUpdate:
    """The sum of `dare_linear`, before it is truncated."""
    dropped = drop(terms, density, generator)
    shares = [term.weight / p for term, p in zip(terms, per_term(density, terms), strict=True)]
    weights = torch.tensor(shares, device=terms[0].A.device)
    return StreamedUpdate(terms, lambda stack, start: weighted_sum(dropped(stack, start), weights))
