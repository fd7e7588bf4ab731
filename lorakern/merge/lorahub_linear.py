"""lorahub_linear: LoraHub's combination, the weights on A and on B."""

import torch

from lorakern.merge._padded import at_rank, stacked_A, stacked_B
from lorakern.merge._sparsify import weighted_sum
from lorakern.merge.registry import Term, method


@method("lorahub_linear")
def lorahub_linear(terms: list[Term], rank: int | float | None, generator: torch.Generator):
    """LoraHub's combination: ``A = sum_i w_i A_i``, ``B = sum_i w_i (s_i / s) B_i``, ``scale = s = max_i |s_i|``.

    The update has the weights squared, and cross terms w_i w_j B_i A_j: the weights are meant to be searched for, as
    LoraHub does. Where the scales are equal this is LoraHub's formula to the letter; it takes the first adapter's
    scale for all where they differ, this does not. Smaller ranks are padded with zeros.

    It has no options. A rank below the largest of the adapters' truncates the result. LoraHub: arXiv 2307.13269.

    >>> import torch, lorakern as lk
    >>> a = {"proj": (torch.ones(1, 8), torch.ones(6, 1), 1.0)}
    >>> merged = lk.merge([a, a], method="lorahub_linear", weights=[0.5, 1.0])["proj"]
    >>> (merged.scale * merged.B @ merged.A)[0, 0].item()  # 1.5 squared
    2.25
    """
    scale = max(abs(term.scale) for term in terms) or 1.0
    weights = torch.tensor([term.weight for term in terms], dtype=terms[0].A.dtype, device=terms[0].A.device)
    A = weighted_sum(stacked_A([term.A for term in terms]), weights)
    B = weighted_sum(stacked_B([term.B * (term.scale / scale) for term in terms]), weights)
    return at_rank(A, B, scale, rank)
