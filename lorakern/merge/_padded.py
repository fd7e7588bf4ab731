"""Factors of different ranks side by side: padded with ranks of zeros, which change no update."""

from collections.abc import Sequence

import torch
from torch.nn.functional import pad

from lorakern.ops import truncate


def stacked_A(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """(T, r, d_in) of T tensors (r_i, d_in), r the largest."""
    r = max(tensor.shape[0] for tensor in tensors)
    return torch.stack([pad(tensor, (0, 0, 0, r - tensor.shape[0])) for tensor in tensors])


def stacked_B(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """(T, d_out, r) of T tensors (d_out, r_i), r the largest."""
    r = max(tensor.shape[1] for tensor in tensors)
    return torch.stack([pad(tensor, (0, r - tensor.shape[1])) for tensor in tensors])


def at_rank(A: torch.Tensor, B: torch.Tensor, scale: float, rank: int | float | None):
    """(A, B, scale) as they are if they have that rank at most, else the best factors that have it."""
    if rank is None or A.shape[0] == 0 or (isinstance(rank, int) and A.shape[0] <= rank):
        return A, B, scale
    A, B, _ = truncate([(A, B, scale)], rank)
    return A, B, 1.0
