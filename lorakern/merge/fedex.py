"""fedex: the mean of the factors, and beside it exactly what that leaves out."""

import torch

from lorakern.errors import LorakernError
from lorakern.merge._padded import stacked_A, stacked_B
from lorakern.merge.registry import Term, method
from lorakern.ops import truncate


@method("fedex")
def fedex(terms: list[Term], rank: int | float | None, generator: torch.Generator):
    """Federated exact aggregation: the mean factors as the first ranks, then the residual, so that the sum is exact.

    With ``W = sum_i w_i``, ``p_i = w_i / W``, ``A = sum_i p_i A_i`` and ``B = sum_i p_i s_i B_i`` (of r ranks, the
    largest among the adapters, smaller ones padded with zeros), the merged update is

    ``sum_i w_i s_i B_i A_i = W B A + W sum_{i < N} p_i (s_i B_i - s_N B_N) (A_i - A)``,

    the first product in ranks 1 to r, the residual in the (N - 1) r after them. A rank between them keeps the means
    and the best approximation of the residual. FedEx-LoRA adds the residual to the base weight instead; its mean over
    clients is ``normalize=True``.

    It has no options. Raises `LorakernError` for weights that sum to zero, as they have no mean, for a rank below r,
    and for a share of the energy. FedEx-LoRA: arXiv 2410.09432.

    >>> import torch, lorakern as lk
    >>> a, b = ({"proj": (torch.full((1, 8), value), torch.full((6, 1), value), 1.0)} for value in (1.0, 3.0))
    >>> A, B, scale = lk.merge([a, b], method="fedex", normalize=True)["proj"]
    >>> A[0, 0].item(), (scale * B @ A)[0, 0].item()  # the mean of 1 and 3, and of 1 * 1 and 3 * 3
    (2.0, 5.0)
    """
    total = sum(term.weight for term in terms)
    if abs(total) <= 1e-12 * sum(abs(term.weight) for term in terms):
        raise LorakernError(
            f"fedex: weights must not sum to zero, got {[term.weight for term in terms]}: there is no mean then; "
            "change them, or use method='cat'"
        )
    r = max(term.rank for term in terms)
    if isinstance(rank, float) or (rank is not None and rank < r):
        raise LorakernError(
            f"fedex: rank must be None or an integer of at least {r}, got {rank}: the mean factors are kept whole; "
            "use method='svd' for fewer ranks"
        )
    A = stacked_A([term.A.double() for term in terms])
    B = stacked_B([term.B.double() * term.scale for term in terms])
    shares = torch.tensor([term.weight / total for term in terms], dtype=A.dtype, device=A.device)
    mean_A, mean_B = torch.tensordot(shares, A, 1), torch.tensordot(shares, B, 1)
    residual = [(A[i] - mean_A, B[i] - B[-1], total * float(share)) for i, share in enumerate(shares[:-1])]
    if rank is not None and r < rank < len(terms) * r:
        A, B, _ = truncate(residual, rank - r)
        residual = [(A, B, 1.0)]
    elif rank == r:
        residual = []
    merged_A = torch.cat([mean_A, *(A for A, _, _ in residual)])
    return merged_A, torch.cat([mean_B * total, *(B * factor for _, B, factor in residual)], dim=1)
