"""peft_ties: PEFT's "ties", which merges A and B apart from each other."""

from functools import partial

import torch

from lorakern.merge._factorwise import factorwise
from lorakern.merge._sparsify import disjoint_mean, keep_largest
from lorakern.merge.options import Densities, SignMethod
from lorakern.merge.registry import Term, method


@method("peft_ties")
def peft_ties(
    terms: list[Term],
    rank: int | float | None,
    generator: torch.Generator,
    *,
    density: Densities = 0.5,
    majority_sign_method: SignMethod = "total",
):
    """PEFT's "ties": TIES of the A_i and, apart from it, of the B_i, weighted as in `peft_linear`.

    The update B A is not TIES of the updates, for which there is `ties`. Where ranks are equal the bits are PEFT
    0.21's; smaller ranks are trimmed at their own rank and padded with zeros, where PEFT raises.

    Args:
        density: the share of entries that each factor keeps, those of largest magnitude, in (0, 1].
            A list has one for each adapter.
        majority_sign_method: "total" elects signs by the sum of the trimmed values, "frequency" by their number.

    A rank below the largest of the adapters' truncates the result. PEFT: combination_type="ties".

    >>> import torch, lorakern as lk
    >>> a, b = ({"proj": (torch.full((1, 8), value), torch.ones(6, 1), 1.0)} for value in (3.0, -1.0))
    >>> merged = lk.merge([a, b], method="peft_ties", density=1.0)["proj"]
    >>> (merged.scale * merged.B @ merged.A)[0, 0].item()
    3.0
    """
    combine = partial(disjoint_mean, majority_sign_method=majority_sign_method)
    return factorwise(terms, rank, keep_largest, combine, density)
