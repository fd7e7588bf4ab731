"""linear: the weighted sum of the updates."""

import torch

from lorakern.merge.registry import Term, method
from lorakern.ops import truncate


@method("linear")
def linear(terms: list[Term], rank: int | float | None, generator: torch.Generator):
    """The weighted sum of the updates, or its best approximation at the wanted rank: ``sum_i w_i s_i B_i A_i``.

    With ``rank=None`` it is exact, at the rank that the sum has: at most the sum of the ranks, d_in and d_out. A share
    of the energy as the rank keeps the fewest ranks whose squared singular values make up that share.

    It has no options. Unlike PEFT's linear (here `peft_linear`) there are no cross terms B_i A_j, and ranks may differ.
    Task arithmetic: arXiv 2212.04089.

    >>> import torch, lorakern as lk
    >>> a = {"proj": (torch.ones(2, 8), torch.ones(6, 2), 0.5)}
    >>> b = {"proj": (torch.ones(3, 8), torch.ones(6, 3), 2.0)}
    >>> merged = lk.merge([a, b], method="linear", weights=[1.0, -1.0])["proj"]
    >>> merged.rank, round((merged.scale * merged.B @ merged.A)[0, 0].item(), 4)  # all updates are a multiple of one
    (1, -5.0)
    """
    A, B, _ = truncate([(term.A, term.B, term.factor) for term in terms], rank)
    return A, B
