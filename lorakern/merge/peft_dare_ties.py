"""peft_dare_ties: PEFT's "dare_ties", which merges A and B apart from each other."""

from functools import partial

import torch

from lorakern.merge._factorwise import factorwise
from lorakern.merge._sparsify import disjoint_mean, keep_random
from lorakern.merge.options import Densities, SignMethod
from lorakern.merge.registry import Term, method


@method("peft_dare_ties")
def peft_dare_ties(
    terms: list[Term],
    rank: int | float | None,
    generator: torch.Generator,
    *,
    density: Densities = 0.5,
    majority_sign_method: SignMethod = "total",
):
    """PEFT's "dare_ties": `peft_ties` of factors with entries dropped at random, the others over ``density``.

    The update B A has cross terms; `dare_ties` works on the updates. Where ranks are equal the bits are PEFT 0.21's
    if torch's global generator is in the state of ours, which is seeded from (seed, module); smaller ranks are padded
    with zeros, where PEFT raises.

    Args:
        density: the probability with which an entry is kept, in (0, 1]; DARE's drop rate is 1 - density.
            A list has one for each adapter.
        majority_sign_method: "total" elects signs by the sum of the values left, "frequency" by their number.

    A rank below the largest of the adapters' truncates the result. PEFT: combination_type="dare_ties".

    >>> import torch, lorakern as lk
    >>> a, b = ({"proj": (torch.full((1, 8), value), torch.ones(6, 1), 1.0)} for value in (3.0, -1.0))
    >>> merged = lk.merge([a, b], method="peft_dare_ties", density=0.5)["proj"]
    >>> set(merged.A.flatten().tolist()) <= {6.0, -2.0, 0.0}
    True
    """
    combine = partial(disjoint_mean, majority_sign_method=majority_sign_method)
    return factorwise(terms, rank, partial(keep_random, generator=generator), combine, density)
