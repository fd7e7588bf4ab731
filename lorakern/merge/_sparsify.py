"""Trimming, dropping, sign election and disjoint mean, on stacks (T, ...) of one tensor per adapter, made for them.

The formulas are those of TIES (arXiv 2306.01708) and DARE (arXiv 2311.03099), with PEFT's conventions: signs are
elected before the weights are applied, a sum of zero elects +, and a zero takes part in neither the vote nor the mean.
"""

from collections.abc import Sequence

import torch


def per_term(density: float | list[float], terms: Sequence) -> list[float]:
    """A density for each term."""
    return density if isinstance(density, list) else [density] * len(terms)


def keep_largest(tensor: torch.Tensor, density: float) -> torch.Tensor:
    """The int(density * numel) entries of largest magnitude; zero elsewhere."""
    if density == 1:
        return tensor
    flat = tensor.flatten()
    kept = flat.abs().topk(int(density * flat.numel())).indices
    return torch.zeros_like(flat).index_copy_(0, kept, flat[kept]).view_as(tensor)


def keep_random(tensor: torch.Tensor, density: float, generator: torch.Generator) -> torch.Tensor:
    """Each entry with probability `density`, divided by it; zero elsewhere."""
    if density == 1:
        return tensor
    mask = torch.bernoulli(torch.full_like(tensor, density, device="cpu"), generator=generator)
    return tensor * mask.to(tensor.device) / density


def weighted_sum(stack: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """sum_i w_i x_i; the stack is overwritten."""
    return stack.mul_(_column(weights, stack)).sum(0)


def disjoint_mean(stack: torch.Tensor, weights: torch.Tensor, majority_sign_method: str) -> torch.Tensor:
    """The mean of w_i x_i over those i whose x_i has the elected sign: that of sum_i x_i, or of sum_i sign(x_i).

    The stack is overwritten.
    """
    sign = stack.sign()
    votes = (stack if majority_sign_method == "total" else sign).sum(0)
    elected = (votes >= 0).to(stack.dtype).mul_(2).sub_(1)
    # as numbers rather than bools: products of floats with bools are several times slower on a CPU
    agrees = torch.eq(sign, elected, out=sign)
    return stack.mul_(_column(weights, stack)).mul_(agrees).sum(0) / agrees.sum(0).clamp_(min=1)


def _column(weights: torch.Tensor, stack: torch.Tensor) -> torch.Tensor:
    return weights.view(-1, *[1] * (stack.ndim - 1))


class CounterMask:
    """Random rows of a mask (d_out, d_in) of ones with probability `density`: a hash of the row's and column's keys.

    Entry (i, j) is a function of (key, i, j) alone, so rows can be made anew in every pass and in tiles of any height.
    """

    def __init__(self, shape: tuple[int, int], density: float, generator: torch.Generator, device: torch.device):
        rows, columns = shape
        keys = torch.randint(-(2**31), 2**31, (rows + columns,), generator=generator).to(torch.int32).to(device)
        self._rows, self._columns = keys[:rows, None], keys[None, rows:]
        self._below = min(int(density * 2**32), 2**32 - 1) - 2**31

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """(stop - start, d_in) float32 zeros and ones."""
        # the finalizer of MurmurHash3 without its last shift, which leaves the high bits alone
        bits = self._rows[start:stop] + self._columns
        bits ^= (bits >> 16) & 0xFFFF
        bits *= -2048144789
        bits ^= (bits >> 13) & 0x7FFFF
        bits *= -1028477387
        return torch.lt(bits, self._below, out=torch.empty(bits.shape, device=bits.device))
