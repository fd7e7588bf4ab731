"""Exact search: a first pass over a float16 copy, whose rounding is bounded, leaves few rows to score exactly."""

import math

import torch

from lorakern.ops import shrink

BLOCK = 1024
_FLOAT32 = 2.0**-24
# of the exact scores themselves, which are float64 sums
_FLOAT64 = 2.0**-45
# rounding of the bound itself, which is computed in float64
_SAFETY = 1 + 2.0**-20


class ExactIndex:
    """A float16 copy of rows ``w = v / 2^e``, all of norm at most 1, that proposes the candidates of the best k.

    With ``p = q / 2^f`` of norm at most 1, and hats for what float16 makes of them,

        |p.w - h| <= |p - p^| |w| + |p^| |w - w^| + gamma_d |p^| |w^| <= slack

    where h is the float32 sum of ``p^ . w^`` in any order and gamma_d = d 2^-24 / (1 - d 2^-24). The residuals
    |w - w^| and |p - p^| are measured, not estimated, so the bound holds for subnormal numbers too. At least k rows
    have a score of at least (the k-th largest h) - slack, and a row with h below that minus another slack has less:
    every row of the best k, with all its ties, is among the rows with ``h >= kth - 2 slack``.

    Rows are only ever added behind those that are there, so a search of the first `count` rows needs no lock.
    """

    def __init__(self, dim: int, exponent: int = 1) -> None:
        self._exponent = exponent
        self._blocks = torch.empty(1, BLOCK, dim, dtype=torch.float16)
        self._residual = 0.0

    def append(self, vectors: torch.Tensor, first: int) -> "ExactIndex":
        """The index with rows `first` and on of `vectors` (n, d) float32 added: itself, or one of a larger scale."""
        exponent = _exponent(vectors[first:])
        if exponent > self._exponent:
            return ExactIndex(vectors.shape[1], exponent).append(vectors, 0)
        blocks, (count, dim) = self._blocks, vectors.shape
        if count > blocks.shape[0] * BLOCK:
            blocks = torch.empty(max(-(-count // BLOCK), 2 * blocks.shape[0]), BLOCK, dim, dtype=torch.float16)
            blocks.view(-1, dim)[:first] = self._blocks.view(-1, dim)[:first]
        for start in range(first, count, BLOCK):
            scaled = torch.ldexp(vectors[start : start + BLOCK].double(), torch.tensor(-self._exponent))
            rounded = scaled.half()
            blocks.view(-1, dim)[start : start + BLOCK][: len(rounded)] = rounded
            self._residual = max(self._residual, (scaled - rounded.double()).norm(dim=1).max().item())
        self._blocks = blocks
        return self

    def candidates(self, queries: torch.Tensor, k: int, count: int, dead: torch.Tensor) -> list[torch.Tensor]:
        """For each of the queries (T, d) float32, the positions, in order, that hold its best k of the living rows."""
        used, dim = -(-count // BLOCK), queries.shape[1]
        scaled = torch.stack([torch.ldexp(q.double(), torch.tensor(-_exponent(q[None]))) for q in queries])
        rounded = scaled.half()
        lengths = rounded.double().norm(dim=1)
        gamma = dim * _FLOAT32 / (1 - dim * _FLOAT32)
        slack = (
            (scaled - rounded.double()).norm(dim=1)
            + lengths * (self._residual + gamma * (1 + self._residual))
            + _FLOAT64
        )
        ranks = torch.full((used,), BLOCK)
        ranks[-1] = count - (used - 1) * BLOCK
        indices = torch.arange(used).expand(len(queries), used).contiguous()
        h = shrink(rounded, self._blocks[:used], indices, ranks=ranks).view(len(queries), -1)[:, :count]
        h[:, dead] = -math.inf
        kth = h.topk(min(k, count - len(dead)), dim=1).values[:, -1].double()
        # a float32 not above the float64 threshold, which the comparison would round
        least = (kth - 2 * _SAFETY * slack).float().nextafter(torch.tensor(-math.inf))
        return [(row >= bound).nonzero()[:, 0] for row, bound in zip(h, least, strict=True)]


def _exponent(vectors: torch.Tensor) -> int:
    """The smallest e with all norms below 2^e."""
    largest = vectors.double().norm(dim=1).max().item() if len(vectors) else 0.0
    return math.frexp(largest * _SAFETY)[1]
