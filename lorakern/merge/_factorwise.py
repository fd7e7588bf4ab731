"""PEFT's factor-wise merging: A and B are merged apart from each other, as if each were a weight of its own."""

import math
from collections.abc import Callable

import torch

from lorakern.merge._padded import at_rank, stacked_A, stacked_B
from lorakern.merge._sparsify import per_term
from lorakern.merge.registry import Term

Sparsify = Callable[[torch.Tensor, float], torch.Tensor]
Combine = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def factorwise(
    terms: list[Term],
    rank: int | float | None,
    sparsify: Sparsify,
    combine: Combine,
    density: float | list[float] = 1.0,
):
    """(A, B, 1) with A and B merged apart, under the weights sgn(f) sqrt|f| for A and sqrt|f| for B, f = w_i s_i.

    Factors are made sparse, to one density or each adapter's own, at their own rank and then padded, so ranks may
    differ, which PEFT refuses.
    """
    roots = [math.sqrt(abs(term.factor)) for term in terms]
    signed = [-root if term.factor < 0 else root for root, term in zip(roots, terms, strict=True)]
    device = terms[0].A.device
    sparse = list(zip(terms, per_term(density, terms), strict=True))
    A = combine(stacked_A([sparsify(term.A, density) for term, density in sparse]), torch.tensor(signed, device=device))
    B = combine(stacked_B([sparsify(term.B, density) for term, density in sparse]), torch.tensor(roots, device=device))
    return at_rank(A, B, 1.0, rank)
