"""svd: the best approximation of the weighted sum at one rank."""

import torch

from lorakern.merge.registry import Term, method
from lorakern.ops import truncate


@method("svd")
def svd(terms: list[Term], rank: int | float | None, generator: torch.Generator):
    """The best rank-r approximation of the weighted sum: the r largest singular triples of ``sum_i w_i s_i B_i A_i``.

    With ``rank=None`` r is the largest rank among the adapters, as in PEFT's svd, whose update this equals; the
    factors come from a QR of the concatenated ones, and no dense update is formed. It differs from `linear` in that
    default alone.

    It has no options. Eckart and Young, 1936; PEFT's combination_type="svd".

    >>> import torch, lorakern as lk
    >>> a = {"proj": (torch.eye(4)[:2], torch.eye(4)[:, :2], 1.0)}
    >>> b = {"proj": (torch.eye(4)[2:], torch.eye(4)[:, 2:], 3.0)}
    >>> merged = lk.merge([a, b], method="svd")["proj"]
    >>> (merged.scale * merged.B @ merged.A).diagonal().abs().round(decimals=4).tolist()
    [0.0, 0.0, 3.0, 3.0]
    """
    largest = max(term.rank for term in terms)
    A, B, _ = truncate([(term.A, term.B, term.factor) for term in terms], largest if rank is None else rank)
    return A, B
