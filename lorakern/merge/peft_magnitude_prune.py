"""peft_magnitude_prune: PEFT's "magnitude_prune", which merges A and B apart from each other."""

import torch

from lorakern.merge._factorwise import factorwise
from lorakern.merge._sparsify import keep_largest, weighted_sum
from lorakern.merge.options import Densities
from lorakern.merge.registry import Term, method


@method("peft_magnitude_prune")
def peft_magnitude_prune(
    terms: list[Term], rank: int | float | None, generator: torch.Generator, *, density: Densities = 0.5
):
    """PEFT's "magnitude_prune": `peft_linear` of factors of which each keeps its largest entries.

    The update B A has cross terms; `magnitude_prune` works on the updates. Where ranks are equal the bits are PEFT
    0.21's; smaller ranks are trimmed at their own rank and padded with zeros, where PEFT raises.

    Args:
        density: the share of entries that each factor keeps, those of largest magnitude, in (0, 1].
            A list has one for each adapter.

    A rank below the largest of the adapters' truncates the result. PEFT: combination_type="magnitude_prune".

    >>> import torch, lorakern as lk
    >>> a = {"proj": (torch.arange(8.0)[None], torch.tensor([[1.0], [2.0]]), 1.0)}
    >>> merged = lk.merge([a], method="peft_magnitude_prune", density=0.5)["proj"]
    >>> (merged.scale * merged.B @ merged.A).tolist()[1]
    [0.0, 0.0, 0.0, 0.0, 8.0, 10.0, 12.0, 14.0]
    """
    return factorwise(terms, rank, keep_largest, weighted_sum, density)
