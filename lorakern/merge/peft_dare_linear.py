"""peft_dare_linear: PEFT's "dare_linear", which merges A and B apart from each other."""

from functools import partial

import torch

from lorakern.merge._factorwise import factorwise
from lorakern.merge._sparsify import keep_random, weighted_sum
from lorakern.merge.options import Densities
from lorakern.merge.registry import Term, method


@method("peft_dare_linear")
def peft_dare_linear(
    terms: list[Term], rank: int | float | None, generator: torch.Generator, *, density: Densities = 0.5
):
    """PEFT's "dare_linear": `peft_linear` of factors with entries dropped at random, the others over ``density``.

    The update B A has cross terms; `dare_linear` works on the updates. Where ranks are equal the bits are PEFT
    0.21's if torch's global generator is in the state of ours, which is seeded from (seed, module); smaller ranks are
    padded with zeros, where PEFT raises.

    Args:
        density: the probability with which an entry is kept, in (0, 1]; DARE's drop rate is 1 - density.
            A list has one for each adapter.

    A rank below the largest of the adapters' truncates the result. PEFT: combination_type="dare_linear".

    >>> import torch, lorakern as lk
    >>> a = {"proj": (torch.ones(1, 8), torch.ones(6, 1), 1.0)}
    >>> merged = lk.merge([a], method="peft_dare_linear", density=0.5, seed=1)["proj"]
    >>> sorted(set(merged.A.flatten().tolist()))
    [0.0, 2.0]
    """
    return factorwise(terms, rank, partial(keep_random, generator=generator), weighted_sum, density)
