"""delta_norm and delta_distance: Frobenius norms of low-rank updates from their factors alone."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from lorakern.ops import _checks as check
from lorakern.ops._terms import LowRankSum, collect, collect_modules, grams, norm


def delta_norm(
    A: torch.Tensor | Sequence[torch.Tensor], B: torch.Tensor | Sequence[torch.Tensor], scale: Any = 1.0
) -> float | torch.Tensor:
    """The Frobenius norm of an update, from its factors: ``||scale * B @ A||_F = |scale| sqrt(<A A^T, B^T B>)``.

    Sums are in float64. Where the product all but cancels, so that this formula would lose it, R factors of QR take
    its place; the result is within 1e-4 of itself or 1e-14 of ``|scale| sum_r ||b_r|| ||a_r||``, and usually 1e-15.

    Args:
        A: (r, d_in), float16, bfloat16, float32 or float64, any strides, on a CPU or GPU; or a sequence of such, one
            for each module, of any shapes: all are measured in one call.
        B: (d_out, r), likewise; as many as A.
        scale: a finite number; for sequences a number for all, or a sequence of numbers.

    Returns:
        A float; for sequences an (N,) float64 tensor on the CPU. No gradient is tracked.

    Raises:
        LorakernError: another shape or dtype, or a factor that holds NaN or infinity.

    Frobenius norms of products from Gram matrices are textbook material (Golub and Van Loan, Matrix Computations).

    >>> import torch, lorakern as lk
    >>> lk.delta_norm(torch.ones(2, 8), torch.ones(3, 2), 0.5)
    4.898979485566356
    >>> lk.delta_norm([torch.ones(1, 4), torch.ones(2, 9)], [torch.ones(9, 1), torch.ones(4, 2)]).tolist()
    [6.0, 12.0]
    """
    if isinstance(A, torch.Tensor):
        return _norms("delta_norm", [collect("delta_norm", "(A, B, scale)", [(A, B, scale)])])[0]
    for name, value in (("A", A), ("B", B)):
        if not isinstance(value, Sequence) or isinstance(value, str) or not value:
            check.fail("delta_norm", name, "be a matrix or a non-empty sequence of matrices", type(value).__name__)
    scales = list(scale) if isinstance(scale, Sequence | torch.Tensor) else [scale] * len(A)
    scales = [s.item() if isinstance(s, torch.Tensor) and s.numel() == 1 else s for s in scales]
    if not len(A) == len(B) == len(scales):
        got = f"{len(A)} of A, {len(B)} of B and {len(scales)} scales"
        check.fail("delta_norm", "A, B and scale", "be equally many", got)
    triples = enumerate(zip(A, B, scales, strict=True))
    sums = [collect("delta_norm", f"module {position}", [triple], str(position)) for position, triple in triples]
    return torch.tensor(_norms("delta_norm", sums), dtype=torch.float64)


def _norms(op: str, sums: Sequence[LowRankSum]) -> list[float]:
    return [norm(*one) for batch in grams(op, sums) for one in batch]


def delta_distance(left: Any, right: Any) -> float | dict[str, float]:
    """How far two sums of updates are apart: ``||sum left - sum right||_F / ||sum right||_F``, from the factors alone.

    With L and R in one sum, ``||L - R||^2 = <s s^T, (A A^T) * (B^T B)>`` over all their ranks, in float64, with an
    estimate of what rounding does to it; distances that this does not resolve (below about 1e-6) come from the R
    factors of QR instead, which resolve down to 1e-14. Both agree to 1e-4 of the distance or better.

    Args:
        left: terms, a non-empty list of (A, B, scale) as in `LoraFactors`: A (r, d_in), B (d_out, r), of any ranks and
            of float16, bfloat16, float32 or float64; or a mapping from module name to such a list.
        right: likewise, of the same d_in and d_out; a mapping of the same modules, if left is one.

    Returns:
        A float, or for mappings a dict from module name to float. 0 where both sums are zero, infinity where only the
        right one is. No gradient is tracked.

    Raises:
        LorakernError: other modules on the left than on the right, other shapes or dtypes, or a factor that holds NaN
            or infinity, named by its module.

    The concatenation = summation identity behind it is that of LoRA-LEGO (arXiv 2409.16167).

    >>> import torch, lorakern as lk
    >>> a, b = torch.ones(1, 4), torch.ones(3, 1)
    >>> lk.delta_distance([(a, b, 1.0), (a, b, 2.0)], [(a, b, 4.0)])
    0.25
    >>> lk.delta_distance({"q_proj": [(a, b, 0.5)]}, {"q_proj": [(a, 2 * b, 0.5)]})
    {'q_proj': 0.5}
    """
    op = "delta_distance"
    if isinstance(left, Mapping) != isinstance(right, Mapping):
        check.fail(op, "left and right", "both be lists of terms, or both be mappings", "one of each")
    if not isinstance(left, Mapping):
        return _distances(op, [(collect(op, "left", left), collect(op, "right", right))])[0]
    if left.keys() != right.keys():
        other = min(left.keys() ^ right.keys(), key=str)
        check.fail(op, "left and right", "name the same modules", f"{other!r} in one of them only")
    lefts = collect_modules(op, "left", left)
    rights = collect_modules(op, "right", {name: right[name] for name in left})
    return dict(zip(left, _distances(op, list(zip(lefts, rights, strict=True))), strict=True))


def _distances(op: str, pairs: Sequence[tuple[LowRankSum, LowRankSum]]) -> list[float]:
    differences = []
    for left, right in pairs:
        # The checks of `collect` once more: both sides must fit each other.
        terms = [*zip(left.A, left.B, left.scales, strict=True)]
        terms += [(a, b, -scale) for a, b, scale in zip(right.A, right.B, right.scales, strict=True)]
        differences.append(collect(op, "left and right", terms, left.name))
    out = []
    measured = (one for batch in grams(op, differences) for one in batch)
    for (left, right), (difference, gram_a, gram_b) in zip(pairs, measured, strict=True):
        first = left.rank
        apart, size = norm(difference, gram_a, gram_b), norm(right, gram_a[first:, first:], gram_b[first:, first:])
        out.append(apart / size if size else 0.0 if apart == 0 else float("inf"))
    return out
