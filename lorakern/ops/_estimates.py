"""How far a merged adapter is from a weighted sum: by random signs from both sides, and exactly."""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from lorakern.ops._terms import LowRankSum, norm, norm_by_qr, squared_norm, unusable
from lorakern.ops.gram import PROBES, Lines, LinesFound, gram, lines, sketch

# How many times u of its root mean square an error may have. Rounding to nearest makes that 0.6; estimated from 8
# vectors, the worst of a million lines has 2.4 times its own.
SLACK = 4
_ALIKE = 0.1  # rows whose products with signs differ by less are multiples of each other, but for single elements
_RESOLVED = 1e-14  # of the magnitude of the terms, by sums in float64


class Module(NamedTuple):
    """A module's difference, sum_i w_i delta_i - merged: the merged adapter is the last term."""

    difference: LowRankSum
    labels: list[str]
    weights: list[float]  # of the adapters that have the module
    scales: list[float]  # theirs, then that of the merged adapter

    @property
    def name(self) -> str:
        return self.difference.name

    @property
    def first(self) -> int:
        """The first rank of the merged adapter."""
        return self.difference.rank - self.difference.A[-1].shape[0]

    @property
    def sides(self) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """The rows of A and of B^T."""
        return self.difference.A, [b.T for b in self.difference.B]

    @property
    def units(self) -> tuple[float, float]:
        """(unit roundoff, half the least step) of the coarser dtype of the merged factors."""
        known = [torch.finfo(factor.dtype) for factor in (self.difference.A[-1], self.difference.B[-1])]
        return max(f.eps for f in known) / 2, max(f.smallest_normal * f.eps for f in known) / 2

    @property
    def sources(self) -> LowRankSum:
        s = self.difference
        return LowRankSum(s.name, s.A[:-1], s.B[:-1], s.scales[:-1])


class Random:
    """Seeded random matrices; those of one size are made once."""

    def __init__(self, seed: int):
        self.seed, self.made = seed, {}

    def _made(self, kind, device, *shape):
        key = kind, device, *shape
        if key not in self.made:
            generator = torch.Generator().manual_seed(self.seed + kind)
            self.made[key] = torch.randn(*shape, generator=generator).to(device)
        return self.made[key]

    def signs(self, side, columns, device):
        """(columns, PROBES) float64 of +1 and -1, others for each of two sides."""
        key = "signs", side, columns, device
        if key not in self.made:
            self.made[key] = torch.where(self._made(side, device, columns, PROBES) < 0, -1.0, 1.0).double()
        return self.made[key]

    def normal(self, rows, columns, device):
        """(rows, columns) float32 of the standard normal distribution."""
        return self._made(2, device, rows, columns)


class Estimate(NamedTuple):
    """What the sketches say of a module; norms are Frobenius norms."""

    unusable: str | None
    total: float = 0.0  # sqrt of the sum of the squared norms of all ranks' updates
    magnitude: float = 0.0  # the sum of these norms
    rounding: float = 0.0  # what the merged factors' rounding may make of the whole
    apart: float = 0.0  # ||merged - sum||
    size: float = 0.0  # ||sum||
    column: LinesFound | None = None  # of the rows of A, whose lines are the columns of the update
    row: LinesFound | None = None  # of the rows of B^T


def estimates(modules: Sequence[Module], random: Random) -> Iterator[tuple[Module, Estimate]]:
    """Each module with its `Estimate`: one pass over all factors for the products with signs, one for the lines."""
    sides = [side for module in modules for side in module.sides]
    signs = [random.signs(i % 2, side[0].shape[1], side[0].device) for i, side in enumerate(sides)]
    sketches = sketch(sides, signs)
    found, problems = [], []
    for module, of_a, of_b in zip(modules, sketches[::2], sketches[1::2], strict=True):
        estimate = _sizes(module, of_a[1], of_b[1])
        found.append(estimate)
        if not estimate.unusable:
            problems += _lines(module, estimate, *of_a, *of_b)
    measured = lines(problems) if problems else []
    pairs = zip(measured[::2], measured[1::2], strict=True)
    for module, estimate in zip(modules, found, strict=True):
        if not estimate.unusable:
            column, row = next(pairs)
            apart, size = math.sqrt((column.whole + row.whole) / 2), math.sqrt((column.part + row.part) / 2)
            estimate = estimate._replace(apart=apart, size=size, column=column, row=row)
        yield module, estimate


def _sizes(module: Module, a: torch.Tensor, b: torch.Tensor) -> Estimate:
    """From the squares ||a_r||^2 and ||b_r||^2: how large the terms are, and what rounding may change."""
    s, first = module.difference, module.first
    if reason := unusable(s, a, b, module.labels):
        return Estimate(reason)
    terms = s.weights().square() * a * b
    unit, step = module.units
    rounding = (unit**2 * a * b + step**2 * (s.d_in * b + s.d_out * a))[first:]
    total, magnitude, squares = torch.stack([terms.sum(), terms.sqrt().sum(), rounding.sum()]).tolist()
    rounding = SLACK * abs(s.scales[-1]) * math.sqrt(squares) + _RESOLVED * magnitude
    return Estimate(None, math.sqrt(total), magnitude, rounding)


def _lines(module: Module, estimate: Estimate, by_a, a, by_b, b) -> list[Lines]:
    """The problems whose lines are the columns (of the rows of A) and the rows (of those of B^T) of the difference.

    `by_a` and `by_b` are the factors' products with signs, `a` and `b` their squared norms.
    """
    s, first, (unit, step) = module.difference, module.first, module.units
    weights, share = s.weights()[:, None], (SLACK * s.scales[-1]) ** 2
    problems = []
    # What a factor is multiplied by comes from the other one.
    of_sides = zip(module.sides, (by_b, by_a), (b, a), (s.d_out, s.d_in), _ratios(module, by_a, by_b), strict=True)
    for rows, products, squares, other, ratios in of_sides:
        factors = share * (unit**2 * squares + step**2 * other)
        allowed = share * step**2 * float(squares[first:].sum())
        allowed += (_RESOLVED * estimate.magnitude) ** 2 / rows[0].shape[1]
        problems.append(Lines(rows, weights * products, first, factors, allowed, ratios, 4 * step))
    return problems


def _ratios(module: Module, by_a, by_b):
    """The ratios of the merged factors' ranks to the adapters', for A and B, as their products with signs tell them.

    None at all where not every merged rank is, about, the update of an adapter's rank in that place.
    """
    first, none = module.first, by_a.new_empty(0)
    if module.difference.rank != 2 * first:
        return none, none
    ratios, alike = [], True
    for products in (by_a, by_b):
        source, merged = products[:first], products[first:]
        ratio = ((merged * source).sum(dim=1) / source.square().sum(dim=1)).nan_to_num(0.0)
        alike &= (merged - ratio[:, None] * source).norm(dim=1) <= _ALIKE * merged.norm(dim=1)
        ratios.append(ratio)
    weights, product = module.difference.weights(), ratios[0] * ratios[1]
    off = (product * weights[first:] + weights[:first]).abs()
    alike &= (off <= _ALIKE * weights[:first].abs()) | (product == 0)
    return ratios if alike.all() else (none, none)


def exact_norms(module: Module, estimate: Estimate) -> Estimate:
    """The estimate with its norms computed from Gram matrices or QR."""
    s, first = module.difference, module.first
    gram_a, gram_b = gram(list(module.sides))
    squared, noise = squared_norm(gram_a, gram_b, s.weights())
    apart = math.sqrt(squared) if squared > 1e4 * noise else norm_by_qr(s)
    return estimate._replace(apart=apart, size=norm(module.sources, gram_a[:first, :first], gram_b[:first, :first]))
