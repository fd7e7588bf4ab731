"""gram, sketch, lines and combine: products and sums of rows in float64, on which the low-rank algebra stands.

All take a ragged batch of problems: each is a list of matrices (r_i, columns) of float16, bfloat16, float32 or float64
and any strides on one device, whose rows are the rows of its X; a factor B (d_out, r) is passed as the view ``B.T``.
X is never put together. Products of float32 are exact in float64, so only the sums round: of n columns to at most
(136 + n / 1024) 2^-53 sum_k |x_ik x_jk| on the CPU. No gradient is tracked.
"""

from itertools import accumulate, pairwise
from typing import NamedTuple

import torch

from lorakern.backends.cpu import PROBES
from lorakern.ops._library import backend_for, define, mark_written

Problems = list[list[torch.Tensor]]


def _flat(problems):
    return [rows.detach() for problem in problems for rows in problem], [len(problem) for problem in problems]


def _counts(rows, sizes):
    firsts = pairwise(accumulate(sizes, initial=0))
    return [sum(r.shape[0] for r in rows[first:last]) for first, last in firsts]


def _fake_gram(rows, sizes):
    return [rows[0].new_empty(count, count, dtype=torch.float64) for count in _counts(rows, sizes)]


def _fake_sketch(rows, sizes, probes):
    return [rows[0].new_empty(count, PROBES + 1, dtype=torch.float64) for count in _counts(rows, sizes)]


def _fake_lines(rows, sizes, *_):
    return rows[0].new_empty(len(sizes), 6, dtype=torch.float64)


@define("gram(Tensor[] rows, int[] sizes) -> Tensor[]", _fake_gram)
def _gram(rows, sizes):
    return backend_for("gram", rows[0]).gram(rows, sizes)


@define("sketch(Tensor[] rows, int[] sizes, Tensor[] probes) -> Tensor[]", _fake_sketch)
def _sketch(rows, sizes, probes):
    return backend_for("sketch", rows[0]).sketch(rows, sizes, probes)


@define(
    "lines(Tensor[] rows, int[] sizes, Tensor[] products, int[] firsts, Tensor[] factors, float[] allowed,"
    " Tensor[] ratios, float[] steps) -> Tensor",
    _fake_lines,
)
def _lines(rows, sizes, *arguments):
    return backend_for("lines", rows[0]).lines(rows, sizes, *arguments)


@define("combine_(Tensor(a!)[] out, Tensor[] rows, int[] sizes, Tensor[] factors) -> ()", lambda *_: None)
def _combine(out, rows, sizes, factors):
    backend_for("combine", rows[0]).combine(out, rows, sizes, factors)
    for tensor in out:
        mark_written(tensor)


def gram(problems: Problems) -> list[torch.Tensor]:
    """``X X^T`` of each problem, (R, R) float64 with R its rows.

    >>> import torch
    >>> from lorakern.ops.gram import gram
    >>> (G,) = gram([[torch.tensor([[3.0, 4.0]]), torch.tensor([[1.0], [0.0]]).T]])
    >>> G.tolist()
    [[25.0, 3.0], [3.0, 1.0]]
    """
    return _gram(*_flat(problems))


def sketch(problems: Problems, probes: list[torch.Tensor]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(``X P``, ``||X_r||^2``) of each problem: (R, PROBES) and (R,) float64, P its (columns, PROBES) float64 probes.

    >>> import torch
    >>> from lorakern.ops.gram import PROBES, sketch
    >>> ((products, squares),) = sketch([[torch.tensor([[3.0, 4.0]])]], [torch.ones(2, PROBES, dtype=torch.float64)])
    >>> products[0, 0].item(), squares.item()
    (7.0, 25.0)
    """
    return [(out[:, :PROBES], out[:, PROBES]) for out in _sketch(*_flat(problems), probes)]


class Lines(NamedTuple):
    """A problem of `lines`: X, Q, and what L = X^T Q, (columns, PROBES), and the rows of X should be.

    Attributes:
        rows: X, as a list of matrices.
        products: Q, (R, PROBES) float64.
        first: how many rows form the first part of X.
        factors, allowed: (R,) float64 and a number; the mean square of line k of L should be at most
            ``allowed + sum_r factors[r] X[r, k]^2``, over the rows r of the second part.
        ratios: (first,) float64, where the second part has as many rows as the first: row first + r of X should be
            ratios[r] times row r; NaN where that is not to be looked at, and no element at all to look at none.
        step: an element may be off by this, or by a quarter of what it should be.
    """

    rows: list[torch.Tensor]
    products: torch.Tensor
    first: int
    factors: torch.Tensor
    allowed: float
    ratios: torch.Tensor
    step: float


class LinesFound(NamedTuple):
    """What `lines` returns of a problem.

    Attributes:
        whole, part: ``||L||^2 / PROBES``, and the same for the first part of X alone.
        excess, line: the largest mean square of a line over what it should be at most, and which line that is.
        outliers, where: how many elements of the second part are off, and column * first + r of the first of them.
    """

    whole: float
    part: float
    excess: float
    line: float
    outliers: float
    where: float


def lines(problems: list[Lines]) -> list[LinesFound]:
    """Norms of ``L = X^T Q`` for each problem, the worst of its lines, and outliers of X; L is not kept.

    >>> import torch
    >>> from lorakern.ops.gram import PROBES, Lines, lines
    >>> X, Q = torch.tensor([[3.0, 4.0], [6.0, 4.0]]), torch.ones(2, PROBES, dtype=torch.float64)
    >>> ratios = torch.tensor([2.0], dtype=torch.float64)
    >>> lines([Lines([X], Q, 1, Q[:, 0], 0.0, ratios, 0.0)])
    [LinesFound(whole=145.0, part=25.0, excess=4.0, line=1.0, outliers=1.0, where=1.0)]
    """
    rows, products, firsts, factors, allowed, ratios, steps = map(list, zip(*problems, strict=True))
    products, factors, ratios = ([t.contiguous() for t in ts] for ts in (products, factors, ratios))
    found = _lines(*_flat(rows), products, firsts, factors, allowed, ratios, steps)
    return [LinesFound(*numbers) for numbers in found.tolist()]


def combine(out: list[torch.Tensor], problems: Problems, factors: list[torch.Tensor]) -> None:
    """``Y = M X`` for each problem, written to its Y (n, columns) of any dtype and strides; M is (n, R) float64.

    A factor B (d_out, n) is written as the view ``B.T``. Sums are in float64 and rounded once.

    >>> import torch
    >>> from lorakern.ops.gram import combine
    >>> Y, M = torch.empty(1, 2), torch.tensor([[10.0, 1.0]], dtype=torch.float64)
    >>> combine([Y], [[torch.eye(2)]], [M])
    >>> Y.tolist()
    [[10.0, 1.0]]
    """
    _combine(out, *_flat(problems), [m.contiguous() for m in factors])
