"""cat: concatenation of the factors, which is the exact sum of the updates."""

import torch

from lorakern.errors import LorakernError
from lorakern.merge.registry import Term, method


@method("cat")
def cat(terms: list[Term], rank: int | float | None, generator: torch.Generator):
    """The exact sum of the weighted updates, at the sum of the ranks: ``[B_1 .. B_N] [A_1; ..; A_N] = sum_i B_i A_i``.

    ``A = [A_1; ..; A_N]``, ``B = [f_1 B_1 .. f_N B_N]``, ``scale = c``, with ``c = max_i |w_i s_i|`` and
    ``f_i = w_i s_i / c``: A keeps its bits, and so do the columns of B whose ``|w_i s_i|`` is the largest; negative
    weights need no square root.

    It has no options. Raises `LorakernError` for a rank below the sum of the ranks. PEFT calls it cat too; LoRA Soups
    (arXiv 2410.13025) learns the weights.

    >>> import torch, lorakern as lk
    >>> a = {"proj": (torch.ones(2, 8), torch.ones(6, 2), 0.5)}
    >>> b = {"proj": (torch.ones(3, 8), torch.ones(6, 3), 2.0)}
    >>> merged = lk.merge([a, b], method="cat", weights=[1.0, -1.0])["proj"]
    >>> merged.rank, (merged.scale * merged.B @ merged.A)[0, 0].item()  # 0.5 * 2 - 2 * 3
    (5, -5.0)
    """
    total = sum(term.rank for term in terms)
    if rank is not None and (isinstance(rank, float) or rank < total):
        raise LorakernError(
            f"cat: rank must be None or at least the sum of the ranks, {total}, as cat is exact, got {rank}; "
            "use method='svd' for the best approximation at that rank"
        )
    scale = max(abs(term.factor) for term in terms) or 1.0
    B = torch.cat([term.B * (term.factor / scale) for term in terms], dim=1)
    return torch.cat([term.A for term in terms]), B, scale
