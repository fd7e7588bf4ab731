"""dare_ties: entries of the true updates dropped at random, then sign election and disjoint mean."""

import torch

from lorakern.merge._sparsify import disjoint_mean, per_term
from lorakern.merge._streamed import StreamedUpdate, drop
from lorakern.merge.options import Densities, SignMethod
from lorakern.merge.registry import Term, method


@method("dare_ties")
def dare_ties(
    terms: list[Term],
    rank: int | float | None,
    generator: torch.Generator,
    *,
    density: Densities = 0.5,
    majority_sign_method: SignMethod = "total",
):
    """DARE, then TIES' election and mean, on the true updates: `ties` of ``M_i D_i / density`` in place of trim(D_i).

    ``D_i = s_i B_i A_i``; the entries of ``M_i`` are 1 with probability ``density``, else 0, as in `dare_linear`.

    Args:
        density: the probability with which an entry is kept, in (0, 1]; DARE's drop rate is 1 - density.
            A list has one for each adapter.
        majority_sign_method: "total" elects by the sum of the values left, "frequency" by the number of signs.

    ``rank=None`` takes the largest rank among the adapters; a share of the energy is refused. Computed in float32.
    DARE: arXiv 2311.03099, TIES: arXiv 2306.01708; in distribution equal to PEFT's "dare_ties_svd".

    >>> import torch, lorakern as lk
    >>> a, b = ({"proj": (torch.ones(1, 8), torch.full((6, 1), value), 1.0)} for value in (3.0, -1.0))
    >>> merged = lk.merge([a, b], method="dare_ties", density=0.5, rank=6)["proj"]
    >>> sorted(set((merged.scale * merged.B @ merged.A).round(decimals=4).add(0.0).flatten().tolist()))
    [-2.0, 0.0, 6.0]
    """
    return update(terms, generator, density, majority_sign_method).low_rank(rank, generator)


def update(
    terms: list[Term], generator: torch.Generator, density: float | list[float], majority_sign_method: str
) -> StreamedUpdate:
    """The mean of `dare_ties`, before it is truncated."""
    dropped = drop(terms, density, generator)
    shares = [term.weight / p for term, p in zip(terms, per_term(density, terms), strict=True)]
    weights = torch.tensor(shares, device=terms[0].A.device)
    return StreamedUpdate(
        terms, lambda stack, start: disjoint_mean(dropped(stack, start), weights, majority_sign_method)
    )
