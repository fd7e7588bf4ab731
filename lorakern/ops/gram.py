"""gram, sketch and lines: inner products of rows in float64, on which the low-rank algebra stands.

All take a ragged batch of problems: each is a list of matrices (r_i, columns) of float16, bfloat16, float32 or float64
and any strides on one device, whose rows are the rows of its X; a factor B (d_out, r) is passed as the view ``B.T``.
X is never put together. Products of float32 are exact in float64, so only the sums round: of n columns to at most
(136 + n / 1024) 2^-53 sum_k |x_ik x_jk| on the CPU. No gradient is tracked.
"""

from itertools import accumulate, pairwise

import torch

from lorakern.backends.cpu import PROBES
from lorakern.ops._library import backend_for, define

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


def _fake_lines(rows, sizes, products, firsts, factors, allowed):
    return rows[0].new_empty(len(sizes), 4, dtype=torch.float64)


@define("gram(Tensor[] rows, int[] sizes) -> Tensor[]", _fake_gram)
def _gram(rows, sizes):
    return backend_for("gram", rows[0]).gram(rows, sizes)


@define("sketch(Tensor[] rows, int[] sizes, Tensor[] probes) -> Tensor[]", _fake_sketch)
def _sketch(rows, sizes, probes):
    return backend_for("sketch", rows[0]).sketch(rows, sizes, probes)


@define(
    "lines(Tensor[] rows, int[] sizes, Tensor[] products, int[] firsts, Tensor[] factors, float[] allowed) -> Tensor",
    _fake_lines,
)
def _lines(rows, sizes, products, firsts, factors, allowed):
    return backend_for("lines", rows[0]).lines(rows, sizes, products, firsts, factors, allowed)


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


def lines(
    problems: Problems,
    products: list[torch.Tensor],
    firsts: list[int],
    factors: list[torch.Tensor],
    allowed: list[float],
) -> list[list[float]]:
    """Norms of ``L = X^T Q``, (columns, PROBES), and which of its lines is the worst; L is not kept.

    Args:
        products: Q, (R, PROBES) float64, for each problem.
        firsts: how many of the problem's rows form a part that is also measured by itself.
        factors, allowed: (R,) float64 and a number; the mean square of line k should be at most
            ``allowed + sum_r factors[r] X[r, k]^2`` over the rows from the first on.

    Returns:
        For each problem ``[||L||^2 / PROBES, the same of the part, mean square over what is allowed in the worst line,
        the number of that line]``.

    >>> import torch
    >>> from lorakern.ops.gram import PROBES, lines
    >>> one = torch.ones(1, PROBES, dtype=torch.float64)
    >>> lines([[torch.tensor([[3.0, 4.0]])]], [one], [0], [one[0, :1]], [0.0])
    [[25.0, 0.0, 1.0, 0.0]]
    """
    products, factors = [p.contiguous() for p in products], [f.contiguous() for f in factors]
    return _lines(*_flat(problems), products, firsts, factors, allowed).tolist()
