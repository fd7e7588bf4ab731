"""peft_linear: PEFT's "linear", which merges A and B apart from each other."""

import torch

from lorakern.merge._factorwise import factorwise
from lorakern.merge._sparsify import keep_largest, weighted_sum
from lorakern.merge.registry import Term, method


@method("peft_linear")
def peft_linear(terms: list[Term], rank: int | float | None, generator: torch.Generator):
    """PEFT's "linear": ``A = sum_i sgn(f_i) sqrt|f_i| A_i``, ``B = sum_i sqrt|f_i| B_i``, ``f_i = w_i s_i``.

    The update B A has the cross terms B_i A_j and is not the sum of the updates, for which there is `linear`. Where
    ranks are equal the bits are PEFT 0.21's; smaller ranks are padded with zeros, where PEFT raises. With rsLoRA
    PEFT's own result is too large by sqrt(r); this one is not.

    It has no options. A rank below the largest of the adapters' truncates the result.
    PEFT: combination_type="linear".

    >>> import torch, lorakern as lk
    >>> a, b = ({"proj": (torch.full((1, 8), value), torch.ones(6, 1), 1.0)} for value in (1.0, 3.0))
    >>> merged = lk.merge([a, b], method="peft_linear")["proj"]
    >>> (merged.scale * merged.B @ merged.A)[0, 0].item()  # (1 + 3) * (1 + 1), not 1 + 3
    8.0
    """
    return factorwise(terms, rank, keep_largest, weighted_sum)
