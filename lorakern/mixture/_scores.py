"""The score that decides: the dot product of float32 vectors in float64, the same bits alone and in any batch."""

import torch

_ROWS = 4096


def exact_scores(query: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """``rows @ query`` as (n,) float64 from (n, d) and (d,) float32, summed in an order that depends on d alone.

    The products are exact in float64; halves are added to halves, so the error is at most ceil(log2 d) 2^-53 of the
    sum of the products' magnitudes, and equal rows have equal scores.
    """
    return torch.cat([_sums(part.double() * query.double()) for part in rows.split(_ROWS)])


def _sums(terms: torch.Tensor) -> torch.Tensor:
    while (width := terms.shape[1]) > 1:
        half = (width + 1) // 2
        folded = terms[:, :half].clone()
        folded[:, : width - half] += terms[:, half:]
        terms = folded
    return terms[:, 0]


def best(scores: torch.Tensor, positions: torch.Tensor, k: int) -> list[tuple[int, float]]:
    """The k highest scores with their positions, equal ones in the order of their positions."""
    found = sorted(zip(positions.tolist(), scores.tolist(), strict=True), key=lambda pair: (-pair[1], pair[0]))
    return found[:k]
