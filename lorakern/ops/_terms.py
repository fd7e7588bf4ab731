"""Sums of low-rank updates, sum_i scale_i B_i A_i, as the algebra ops take them, and their Gram matrices."""

import math
import numbers
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from lorakern.errors import LorakernError
from lorakern.ops import _checks as check
from lorakern.ops.gram import gram

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
UNIT = 2.0**-53  # the unit roundoff of float64
_BATCH = 32  # modules whose Gram matrices are kept at a time


class LowRankSum(NamedTuple):
    """One module's sum; all terms have its d_in and d_out and lie on one device."""

    name: str  # how messages name the module, "" if it has no name
    A: list[torch.Tensor]
    B: list[torch.Tensor]
    scales: list[float]

    @property
    def rank(self) -> int:
        """Of all terms together."""
        return sum(a.shape[0] for a in self.A)

    @property
    def d_in(self) -> int:
        return self.A[0].shape[1]

    @property
    def d_out(self) -> int:
        return self.B[0].shape[0]

    def weights(self) -> torch.Tensor:
        """(R,) float64: the scale of each rank."""
        scales = [scale for a, scale in zip(self.A, self.scales, strict=True) for _ in range(a.shape[0])]
        return torch.tensor(scales, dtype=torch.float64, device=self.A[0].device)

    def rows(self) -> torch.Tensor:
        """[A_1; A_2; ...] (R, d_in) float64."""
        return torch.cat([a.detach().double() for a in self.A])

    def columns(self) -> torch.Tensor:
        """[B_1, B_2, ...] (d_out, R) float64, without the scales."""
        return torch.cat([b.detach().double() for b in self.B], dim=1)


def collect(op: str, argument: str, terms: Any, name: str = "") -> LowRankSum:
    """`terms`, a sequence of (A, B, scale), as a `LowRankSum`; raises `LorakernError` for what is none."""
    label = f"{argument} of module {name!r}" if name else argument
    is_sequence = isinstance(terms, Sequence) and not isinstance(terms, (str, bytes))
    if not is_sequence or not terms or any(isinstance(part, torch.Tensor) for part in terms):
        takes = "be a non-empty list of terms (A, B, scale)"
        check.fail(op, label, takes, "an empty list" if is_sequence and not terms else _describe(terms))
    A, B, scales = [], [], []
    for position, term in enumerate(terms):
        at = f"{label}, term {position},"
        if not isinstance(term, tuple | list) or len(term) != 3:
            check.fail(op, at, "be a tuple (A, B, scale)", _describe(term))
        a, b, scale = term
        for letter, tensor, shape in (("A", a, "(r, d_in)"), ("B", b, "(d_out, r)")):
            if (
                not isinstance(tensor, torch.Tensor)
                or tensor.dim() != 2
                or tensor.dtype not in DTYPES
                or 0 in tensor.shape
            ):
                takes = f"have {letter} {shape} of float16, bfloat16, float32 or float64, not empty"
                check.fail(op, at, takes, check.describe(tensor))
        if a.shape[0] != b.shape[1]:
            got = f"A {tuple(a.shape)} and B {tuple(b.shape)}"
            check.fail(op, at, "have one rank r in A (r, d_in) and B (d_out, r)", got)
        if A and (a.shape[1], b.shape[0]) != (A[0].shape[1], B[0].shape[0]):
            takes = f"update a {B[0].shape[0]} x {A[0].shape[1]} matrix like the terms before it"
            check.fail(op, at, takes, f"{b.shape[0]} x {a.shape[1]}")
        if a.is_meta or b.is_meta:
            check.fail(op, at, "have data", "a factor on the meta device")
        if a.device != b.device or (A and a.device != A[0].device):
            check.fail(op, at, "be on one device with the other terms", f"A on {a.device} and B on {b.device}")
        if not isinstance(scale, numbers.Real) or not math.isfinite(scale):
            check.fail(op, at, "have a finite number as its scale", _describe(scale))
        A.append(a)
        B.append(b)
        scales.append(float(scale))
    return LowRankSum(name, A, B, scales)


def collect_modules(op: str, argument: str, modules: Mapping[str, Any]) -> list[LowRankSum]:
    """`collect` of each module of a mapping from module name to terms."""
    if not modules:
        check.fail(op, argument, "name at least one module", "an empty mapping")
    return [collect(op, argument, terms, str(name)) for name, terms in modules.items()]


def not_finite(tensor: torch.Tensor) -> str | None:
    """How many values are NaN or infinite, in words; None if none is."""
    bad = tensor.numel() - int(tensor.isfinite().sum())
    return f"has {bad} {'value that is' if bad == 1 else 'values that are'} NaN or infinite" if bad else None


def grams(op: str, sums: Sequence[LowRankSum]) -> Iterator[list[tuple[LowRankSum, torch.Tensor, torch.Tensor]]]:
    """(sum, A A^T, B^T B) of the sums, A and B their concatenated factors, some sums at a time.

    Raises `LorakernError` where a factor is not finite.
    """
    check_one_device(op, sums)
    for first in range(0, len(sums), _BATCH):
        batch = sums[first : first + _BATCH]
        flat = gram([matrices for s in batch for matrices in (s.A, [b.T for b in s.B])])
        found = list(zip(batch, flat[::2], flat[1::2], strict=True))
        for s, gram_a, gram_b in found:
            check_finite(op, s, gram_a, gram_b)
        yield found


def check_one_device(op: str, sums: Sequence[LowRankSum]) -> None:
    """Raise `LorakernError` unless all modules lie on one device."""
    for s in sums:
        if s.A[0].device != sums[0].A[0].device:
            got = f"{s.A[0].device} for module {s.name!r}"
            check.fail(op, "the modules", f"all be on one device ({sums[0].A[0].device})", got)


def unusable(s: LowRankSum, a: torch.Tensor, b: torch.Tensor, labels: Sequence[str]) -> str | None:
    """What of the factors (terms are called `labels`) makes a norm of `a` or `b` infinite or NaN; None if none is."""
    if math.isfinite(float(a.sum() + b.sum())):
        return None
    for label, *factors in zip(labels, s.A, s.B, strict=True):
        for letter, tensor in zip("AB", factors, strict=True):
            if how := not_finite(tensor):
                return f"{letter} of {label} {how}"
    return "the squares of its float64 factors overflow"


def check_finite(op: str, s: LowRankSum, gram_a: torch.Tensor, gram_b: torch.Tensor) -> None:
    """Raise `LorakernError` if a factor holds NaN or infinity, or its squares overflow float64."""
    labels = [f"term {position}" for position in range(len(s.A))]
    if reason := unusable(s, gram_a.diagonal(), gram_b.diagonal(), labels):
        where = f"module {s.name!r}: " if s.name else ""
        raise LorakernError(f"{op}: {where}{reason}; take it out, or train it again")


def squared_norm(gram_a: torch.Tensor, gram_b: torch.Tensor, weights: torch.Tensor) -> tuple[float, float]:
    """||sum_r weights_r b_r a_r||_F^2 = <w w^T, G_A * G_B>, and how far its rounding errors may have moved it.

    An element of G_A is off by up to about u ||a_i|| ||a_j||, u = 2^-53, at random; the errors of all elements add up
    like a root of squares, of which eight times is taken.
    """
    a, b = weights[:, None] * gram_a * weights, gram_b
    size_a, size_b = a.diagonal(), b.diagonal()
    noise = size_a @ b.square() @ size_a + size_b @ a.square() @ size_b
    value, noise = torch.stack([(a * b).sum(), noise]).tolist()
    return value, 8 * UNIT * math.sqrt(noise)


def norm_by_qr(s: LowRankSum) -> float:
    """||sum||_F = ||R_B W R_A^T||_F by QR of both factors: nothing is squared, so sums that all but cancel resolve."""
    r_a = torch.linalg.qr(s.rows().T, mode="r").R
    r_b = torch.linalg.qr(s.columns() * s.weights(), mode="r").R
    return float(torch.linalg.matrix_norm(r_b @ r_a.T))


def norm(s: LowRankSum, gram_a: torch.Tensor, gram_b: torch.Tensor) -> float:
    """||sum||_F to within 1e-4 of itself or 1e-14 of its terms: by the Gram matrices, where these resolve it."""
    value, noise = squared_norm(gram_a, gram_b, s.weights())
    return math.sqrt(value) if value > 1e4 * noise else norm_by_qr(s)


def _describe(value: Any) -> str:
    return check.describe(value) if not isinstance(value, Sequence) else f"{type(value).__name__} of {len(value)}"
