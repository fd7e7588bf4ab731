"""truncate: the best factors of a given rank for a sum of updates, without forming the sum."""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch.nn.functional import pad

from lorakern.errors import LorakernError
from lorakern.ops import _checks as check
from lorakern.ops._terms import DTYPES, UNIT, collect, collect_modules, grams
from lorakern.ops.gram import combine

_TRUSTED = 1e-8  # relative error of singular values that Gram matrices may cause; beyond it QR is used
_NULL = 1e-14  # of the magnitude of the terms: smaller singular values are rounding errors of float64


class Truncated(NamedTuple):
    """What `truncate` returns: B @ A is the best approximation of its rank, and the singular values are B @ A's own."""

    A: torch.Tensor
    B: torch.Tensor
    singular_values: torch.Tensor


def truncate(terms: Any, rank: int | float | None, *, dtype: torch.dtype | None = None) -> Any:
    """The best factors of a given rank for a sum of updates: ``B @ A = argmin ||sum_i scale_i B_i A_i - M||_F``.

    With the concatenated factors orthonormalised, ``[B_1 ...] = Q_B R_B`` and ``[A_1; ...] = R_A^T Q_A^T``, the sum is
    ``Q_B (R_B S R_A^T) Q_A^T``, and the singular value decomposition of the R x R core is that of the sum:
    ``A = Sigma^1/2 V^T Q_A^T`` and ``B = Q_B U Sigma^1/2``. Each factor thus gets the root of the singular values. The
    triangles are Cholesky factors of float64 Gram matrices, unless these are so ill-conditioned that a singular value
    might be off by 1e-8 of itself; then they are those of a float64 QR. All is computed in float64 and rounded once.

    Args:
        terms: a non-empty list of (A, B, scale) as in `LoraFactors`: A (r, d_in), B (d_out, r), of any ranks and of
            float16, bfloat16, float32 or float64, on a CPU or GPU; or a mapping from module name to such a list.
        rank: how many ranks to keep, at most the sum of the terms' ranks, d_in and d_out (a larger number is lowered
            to that, and what the sum has no rank for is zero); a share of the energy sum sigma^2, between 0 and 1
            exclusive, of which the fewest ranks that hold it are kept; or None for the numerical rank, which loses
            nothing.
        dtype: of the factors returned; by default the dtype to which those of the terms promote.

    Returns:
        `Truncated`: A (k, d_in), B (d_out, k), singular_values (k,) float64, descending, all on the device of the
        terms; k is at least 1. For a mapping, a dict from module name to `Truncated`. No gradient is tracked.

    Raises:
        LorakernError: no terms, terms of different shapes, a rank that is none, a factor that holds NaN or infinity
            (named by its module), or a result that `dtype` cannot hold.

    The approximation is that of Eckart and Young (1936); PEFT's ``combination_type="svd"`` is the dense form.

    >>> import torch, lorakern as lk
    >>> a, b = torch.eye(2, 4), torch.eye(3, 2)
    >>> A, B, sigma = lk.truncate([(a, b, 3.0), (a[:1], b[:, :1], 1.0)], 1)
    >>> sigma.tolist(), (B @ A)[0].tolist()
    ([4.0], [4.0, 0.0, 0.0, 0.0])
    >>> {name: t.A.shape[0] for name, t in lk.truncate({"q_proj": [(a, b, 3.0), (a, b, 1.0)]}, None).items()}
    {'q_proj': 2}
    """
    op = "truncate"
    if isinstance(rank, bool) or not (
        rank is None or (isinstance(rank, int) and rank >= 1) or (isinstance(rank, float) and 0 < rank < 1)
    ):
        check.fail(op, "rank", "be a positive integer, a share between 0 and 1, or None", repr(rank))
    if dtype is not None and dtype not in DTYPES:
        check.fail(op, "dtype", "be float16, bfloat16, float32, float64 or None", repr(dtype))
    if not isinstance(terms, Mapping):
        return next(_truncated(op, [collect(op, "terms", terms)], rank, dtype))
    sums = collect_modules(op, "terms", terms)
    return dict(zip(terms, _truncated(op, sums, rank, dtype), strict=True))


def _truncated(op, sums, rank, dtype):
    for batch in grams(op, sums):
        out, problems, factors = [], [], []
        for s, gram_a, gram_b in batch:
            sigma, *sides = _factored(s, gram_a, gram_b, rank)
            own = dtype or functools.reduce(torch.promote_types, (t.dtype for t in [*s.A, *s.B]))
            A, B = sigma.new_empty(len(sigma), s.d_in, dtype=own), sigma.new_empty(s.d_out, len(sigma), dtype=own)
            out.append(Truncated(A, B, sigma))
            for rows, factor in sides:
                problems.append(rows)
                factors.append(factor)
        combine([y for t in out for y in (t.A, t.B.T)], problems, factors)
        for (s, _, _), truncated in zip(batch, out, strict=True):
            _check_range(op, s, truncated)
            yield truncated


def _factored(s, gram_a, gram_b, rank):
    """(singular values, (rows, M) for A, (rows, M) for B): A is M @ rows, and B^T likewise."""
    weights, sizes = s.weights(), (gram_a.diagonal() * gram_b.diagonal()).sqrt()
    magnitudes = weights.abs() * sizes
    alive = magnitudes.nonzero().squeeze(1)
    root_a, basis_a, rows_a = _orthonormal(s.A, gram_a, alive)
    root_b, basis_b, rows_b = _orthonormal([b.T for b in s.B], gram_b, alive)
    U, sigma, Vt = torch.linalg.svd((root_b.T * weights[alive]) @ root_a, full_matrices=False)
    kept = _kept(sigma, rank, float(magnitudes.sum()), min(s.rank, s.d_in, s.d_out))
    sigma = sigma[:kept]
    root = sigma.sqrt()[:, None]
    factors = (root * Vt[:kept]) @ basis_a, (root * U.T[:kept]) @ basis_b
    padding = kept - len(sigma)
    of_a, of_b = (pad(factor, (0, 0, 0, padding)) for factor in factors)
    return pad(sigma, (0, padding)), (rows_a, of_a), (rows_b, of_b)


def _orthonormal(rows, gram, alive):
    """(root, basis, rows): the rows that are alive equal root @ Q, with Q = basis @ rows orthonormal."""
    count = len(gram)
    gram = gram[alive][:, alive]
    # With rows of length one, rows that are merely small do not count as ill-conditioned.
    size = gram.diagonal().sqrt()
    triangle, failed = torch.linalg.cholesky_ex(gram / size / size[:, None])
    one = torch.eye(len(alive), dtype=gram.dtype, device=gram.device)
    inverse = torch.linalg.solve_triangular(triangle, one, upper=False)
    # An error E of the Gram matrix changes every singular value by up to ||inverse E inverse^T|| of itself (Ostrowski).
    if not failed and len(alive) * UNIT * float(inverse.square().sum()) < _TRUSTED:
        basis = gram.new_zeros(len(alive), count)
        basis[:, alive] = inverse / size
        return size[:, None] * triangle, basis, rows
    Q, R = torch.linalg.qr(torch.cat([r.detach().double() for r in rows])[alive].T)
    return R.T, torch.eye(len(R), dtype=R.dtype, device=R.device), [Q.T]


def _kept(sigma, rank, magnitude, most):
    """How many ranks to keep; `magnitude` bounds the sum's norm."""
    if isinstance(rank, int):
        return min(rank, most)
    if rank is None:
        return max(1, int((sigma > _NULL * magnitude).sum()))
    energy = sigma.square().cumsum(0)
    return min(int((energy < rank * energy[-1:]).sum()) + 1, max(1, len(sigma)))


def _check_range(op, s, truncated):
    A, B, sigma = truncated
    # No element exceeds the root of its singular value.
    if float(sigma[0]) ** 0.5 < torch.finfo(A.dtype).max or (A.isfinite().all() and B.isfinite().all()):
        return
    raise LorakernError(
        f"{op}: {f'module {s.name!r}: ' if s.name else ''}the factors reach up to {float(sigma[0]) ** 0.5:.1e}, which "
        f"dtype = {A.dtype} cannot hold; ask for bfloat16 or float32"
    )
