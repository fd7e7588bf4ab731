"""gram: the inner products of rows, in float64, on which the low-rank algebra stands."""

from itertools import accumulate, pairwise

import torch

from lorakern.ops._library import backend_for, define


def _problems(rows, sizes):
    return [rows[first:last] for first, last in pairwise(accumulate(sizes, initial=0))]


def _fake_gram(rows, sizes):
    counts = [sum(r.shape[0] for r in problem) for problem in _problems(rows, sizes)]
    return [rows[0].new_empty(count, count, dtype=torch.float64) for count in counts]


@define("gram(Tensor[] rows, int[] sizes) -> Tensor[]", _fake_gram)
def _gram(rows, sizes):
    return backend_for("gram", rows[0]).gram(rows, sizes)


def gram(problems: list[list[torch.Tensor]]) -> list[torch.Tensor]:
    """Multiply rows by each other: ``G = X X^T`` in float64, for every problem of a ragged batch in one call.

    X is never put together, and is read once. Products of float32 are exact in float64, so only the sums round: of n
    columns to at most (136 + n / 1024) 2^-53 sum_k |x_ik x_jk| on the CPU.

    Args:
        problems: at least one; each a list of matrices (r_i, columns) whose rows are the rows of X, in float16,
            bfloat16, float32 or float64 and of any strides: a factor B (d_out, r) is passed as the view ``B.T``.

    Returns:
        (R, R) float64 for each problem, R = sum r_i. No gradient is tracked.

    Raises:
        LorakernError: no backend for the device of the tensors.

    >>> import torch
    >>> from lorakern.ops.gram import gram
    >>> (G,) = gram([[torch.tensor([[3.0, 4.0]]), torch.tensor([[1.0], [0.0]]).T]])
    >>> G.tolist()
    [[25.0, 3.0], [3.0, 1.0]]
    """
    return _gram([rows.detach() for problem in problems for rows in problem], [len(problem) for problem in problems])
