"""A merged update that is no low-rank matrix and is never stored: its rows are computed when they are needed.

A tile is a few rows of every adapter's scale * B @ A, one GEMM each. The k-th largest magnitude is found exactly by a
radix select over the bits of the float32 values, in two passes over the tiles; the best low-rank factors come from a
randomised block Krylov iteration (arXiv 1504.05477), each step of which is one pass.
"""

import math
from collections.abc import Callable, Iterator, Sequence

import torch

from lorakern.errors import LorakernError
from lorakern.merge._sparsify import CounterMask, per_term
from lorakern.merge.registry import Term
from lorakern.ops import truncate

TILE_NUMEL = 1 << 19  # of all adapters together: what stays in a cache
LEAST_ROWS = 16
DENSE_NUMEL = 1 << 18  # below, the singular value decomposition of the whole matrix takes less than the passes
OVERSAMPLING = 16
STEPS = 3
_LOW_BITS = 16


class StreamedUpdate:
    """``merge_rows`` of the adapters' updates, rows at a time.

    Args:
        terms: the adapters' updates; the tiles hold scale * B @ A in float32, without the weights.
        merge_rows: (stack (T, rows, d_in), index of its first row) -> the merged rows (rows, d_in).
    """

    def __init__(self, terms: Sequence[Term], merge_rows: Callable[[torch.Tensor, int], torch.Tensor]):
        self._factors = _scaled(terms)
        self._merge_rows = merge_rows
        self.shape = (terms[0].B.shape[0], terms[0].A.shape[1])

    def tiles(self) -> Iterator[tuple[int, torch.Tensor]]:
        """(index of the first row, rows (n, d_in) float32) from the first row to the last."""
        for start, stack in _stacks(self._factors):
            yield start, self._merge_rows(stack, start)

    def dense(self) -> torch.Tensor:
        """The whole matrix, for small ones."""
        return torch.cat([rows for _, rows in self.tiles()])

    def low_rank(self, rank: int | float | None, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """(A, B) of rank at most `rank`, or the largest of the adapters'.

        Exact for matrices of up to `DENSE_NUMEL` entries. Beyond, the best approximation whose rows lie in the span of
        X, W^T W X, .., (W^T W)^STEPS X for a random X with ``OVERSAMPLING`` more columns than ranks. Its error is the
        optimal one times 1 + e: e is below 1e-3 for all but the flattest spectra and was below 3e-3 for those (four
        adapters of random factors, a tenth of their entries kept, 64 of 1000 ranks).
        """
        if isinstance(rank, float):
            raise LorakernError(
                f"rank must be a positive integer or None for a method that makes the updates sparse, got {rank}: "
                "they have full rank, so a share of their energy would take most of it; give an integer"
            )
        rank = rank or max(A.shape[0] for A, _ in self._factors)
        d_out, d_in = self.shape
        if d_out * d_in <= DENSE_NUMEL:
            U, S, Vh = torch.linalg.svd(self.dense().double(), full_matrices=False)
            keep = min(rank, int((S > 0).sum()))
            root = S[:keep].sqrt()
            return root[:, None] * Vh[:keep], U[:, :keep] * root
        random = torch.randn(d_in, min(rank + OVERSAMPLING, d_in), generator=generator)
        blocks, images = [_orthogonal([], random.to(self._factors[0][0].device))], []
        for _ in range(STEPS):
            image, back = self._product(blocks[-1])
            images.append(image)
            blocks.append(_orthogonal(blocks, back))
        images.append(self._product(blocks[-1])[0])
        A, B, _ = truncate([(torch.cat(blocks, dim=1).T, torch.cat(images, dim=1), 1.0)], rank)
        return A, B

    def _product(self, basis: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(W X, W^T W X) for the matrix W and a basis X, in one pass."""
        # made before the tiles: small pieces that stay, allocated among large ones that go, would fragment the heap
        image, back = basis.new_empty(self.shape[0], basis.shape[1]), torch.zeros_like(basis)
        for start, rows in self.tiles():
            part = torch.mm(rows, basis, out=image[start : start + len(rows)])
            back.addmm_(rows.T, part)
        return image, back


def thresholds(terms: Sequence[Term], density: float | list[float]) -> list[float]:
    """For each update the int(density * numel)-th largest magnitude of scale * B @ A in float32, exactly.

    Keeping what is at least that keeps the density asked for; entries that equal the last one kept are kept too.
    It is infinite where nothing is to be kept.
    """
    densities = per_term(density, terms)
    if all(density == 1 for density in densities):
        return [0.0] * len(terms)
    factors = _scaled(terms)
    numel = terms[0].B.shape[0] * terms[0].A.shape[1]
    counts = [int(density * numel) for density in densities]
    wanted = torch.tensor(counts)
    high = torch.zeros(len(terms), 1 << 15, dtype=torch.long)
    for _, stack in _stacks(factors):
        for i, bits in enumerate(_magnitude_bits(stack)):
            high[i] += torch.bincount(bits >> _LOW_BITS, minlength=high.shape[1]).cpu()
    prefix, wanted = _descend(high, wanted)
    low = torch.zeros(len(terms), 1 << _LOW_BITS, dtype=torch.long)
    for _, stack in _stacks(factors):
        for i, bits in enumerate(_magnitude_bits(stack)):
            same = bits[(bits >> _LOW_BITS) == prefix[i]] & 0xFFFF
            low[i] += torch.bincount(same, minlength=low.shape[1]).cpu()
    suffix, _ = _descend(low, wanted)
    limits = ((prefix << _LOW_BITS) | suffix).to(torch.int32).view(torch.float32).tolist()
    return [
        0.0 if density == 1 else limit if count else math.inf
        for density, count, limit in zip(densities, counts, limits, strict=True)
    ]


def trim(stack: torch.Tensor, limits: Sequence[float]) -> torch.Tensor:
    """Zero, in place, what is below each update's threshold."""
    for rows, limit in zip(stack, limits, strict=True):
        rows *= torch.ge(rows.abs(), limit, out=torch.empty_like(rows))
    return stack


def drop(
    terms: Sequence[Term], density: float | list[float], generator: torch.Generator
) -> Callable[[torch.Tensor, int], torch.Tensor]:
    """(stack, first row) -> the stack, in place, with each entry zeroed with probability 1 - density."""
    shape = (terms[0].B.shape[0], terms[0].A.shape[1])
    masks = [
        None if density == 1 else CounterMask(shape, density, generator, term.A.device)
        for term, density in zip(terms, per_term(density, terms), strict=True)
    ]

    def dropped(stack: torch.Tensor, start: int) -> torch.Tensor:
        for rows, mask in zip(stack, masks, strict=True):
            if mask is not None:
                rows *= mask.rows(start, start + len(rows))
        return stack

    return dropped


def _scaled(terms: Sequence[Term]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(term.A.float().contiguous(), (term.B.double() * term.scale).float()) for term in terms]


def _stacks(factors: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> Iterator[tuple[int, torch.Tensor]]:
    """(first row, (T, rows, d_in)) tiles; each one is in the memory of the one before."""
    d_out, d_in = factors[0][1].shape[0], factors[0][0].shape[1]
    height = max(LEAST_ROWS, TILE_NUMEL // (len(factors) * d_in))
    buffer = factors[0][0].new_empty(len(factors), min(height, d_out), d_in)
    for start in range(0, d_out, height):
        stack = buffer[:, : d_out - start]
        for rows, (A, B) in zip(stack, factors, strict=True):
            torch.mm(B[start : start + height], A, out=rows)
        yield start, stack


def _magnitude_bits(stack: torch.Tensor) -> Iterator[torch.Tensor]:
    """The float32 patterns of the magnitudes, which are ordered as the magnitudes are."""
    for rows in stack:
        yield rows.flatten().view(torch.int32) & 0x7FFFFFFF


def _descend(counts: torch.Tensor, wanted: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Per row, the bin that holds the wanted-th largest value, and how many of that bin are wanted."""
    from_top = counts.flip(1).cumsum(1)
    place = (from_top < wanted[:, None]).sum(1).clamp(max=counts.shape[1] - 1)
    above = from_top.gather(1, (place - 1).clamp(min=0)[:, None])[:, 0] * (place > 0)
    return counts.shape[1] - 1 - place, wanted - above


def _orthogonal(blocks: Sequence[torch.Tensor], columns: torch.Tensor) -> torch.Tensor:
    """Orthonormal columns, as many as there is room for, that with those of the blocks span `columns` too."""
    # float64, as little may be left of the columns once the blocks' part is taken out of them
    together = torch.linalg.qr(torch.cat([*blocks, columns], dim=1).double())[0].float()
    return together[:, sum(block.shape[1] for block in blocks) :]
