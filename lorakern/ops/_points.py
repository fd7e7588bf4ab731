"""Points as the clustering ops take them: a matrix, parts side by side, or a list of such problems."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from lorakern.errors import LorakernError
from lorakern.ops import _checks as check

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class Points(NamedTuple):
    """N points of one problem; messages call it `name`."""

    name: str
    parts: list[list[torch.Tensor]]  # of each part its row blocks, (n, columns of the part) each, N rows in all
    is_tuple: bool  # given as a tuple of parts: so are centroids
    scales: torch.Tensor  # (parts, N) float32, or no element
    weights: torch.Tensor  # (N,) float64

    @property
    def count(self) -> int:
        return sum(block.shape[0] for block in self.parts[0])

    @property
    def columns(self) -> list[int]:
        """Of each part."""
        return [part[0].shape[1] for part in self.parts]

    @property
    def device(self) -> torch.device:
        return self.parts[0][0].device

    @property
    def dtype(self) -> torch.dtype:
        """Of centroids and distances."""
        return torch.float64 if self.parts[0][0].dtype == torch.float64 else torch.float32

    def rows(self, indices: torch.Tensor) -> torch.Tensor:
        """The points of these indices, (n, columns of all parts), scaled."""
        out = []
        for p, part in enumerate(self.parts):
            rows = torch.empty(len(indices), part[0].shape[1], dtype=self.dtype, device=self.device)
            first = 0
            for block in part:
                here = (indices >= first) & (indices < first + block.shape[0])
                rows[here] = block.detach()[indices[here] - first].to(self.dtype)
                first += block.shape[0]
            out.append(rows * self.scales[p, indices, None] if len(self.scales) else rows)
        return torch.cat(out, dim=1)


def flat(problems: Sequence[Points]) -> tuple[list[torch.Tensor], list[int], list[int], list[torch.Tensor]]:
    """The first arguments of the clustering ops: matrices, matrices of each part, parts of each problem, scales."""
    parts = [part for p in problems for part in p.parts]
    rows = [block.detach() for part in parts for block in part]
    return rows, [len(part) for part in parts], [len(p.parts) for p in problems], [p.scales for p in problems]


def each(op: str, argument: str, value: Any, problems: int, is_list: bool) -> list:
    """An option that is one for all problems, or a list of one for each of a list of them."""
    if not isinstance(value, list):
        return [value] * problems
    if not is_list or len(value) != problems:
        takes = f"be one for all, or a list of {problems} like points" if is_list else "be no list where points is none"
        check.fail(op, argument, takes, f"a list of {len(value)}")
    return value


def collect(op: str, points: Any, weights: Any, scales: Any) -> tuple[list[Points], bool]:
    """The problems of `points`, and whether it is a list of them; raises `LorakernError` for what is none."""
    is_list = isinstance(points, list)
    given = points if is_list else [points]
    if not given:
        check.fail(op, "points", "hold at least one problem", "an empty list")
    names = [f"points[{i}]" if is_list else "points" for i in range(len(given))]
    options = [
        each(op, label, value, len(given), is_list) for label, value in (("weights", weights), ("scales", scales))
    ]
    problems = [_problem(op, *of_one) for of_one in zip(names, given, *options, strict=True)]
    device, dtype = problems[0].device, problems[0].dtype
    for p in problems:
        if p.device != device or p.dtype != dtype:
            kind = "float64" if dtype == torch.float64 else "16 or 32 bits"
            check.fail(
                op, p.name, f"be on {device} and of {kind} like the problems before it", check.describe(p.parts[0][0])
            )
    return problems, is_list


def _problem(op, name, points, weights, scales):
    is_tuple = isinstance(points, tuple)
    parts = []
    for i, part in enumerate(points if is_tuple else [points]):
        label = f"{name}, part {i}," if is_tuple else name
        blocks = part if isinstance(part, list) else [part]
        if not blocks:
            check.fail(op, label, "be a matrix, or a list of the matrices whose rows it has", "an empty list")
        for block in blocks:
            if not isinstance(block, torch.Tensor) or block.dim() != 2 or block.dtype not in DTYPES:
                takes = "be (N, D) of float16, bfloat16, float32 or float64, or a tuple of such parts"
                check.fail(op, label, takes, check.describe(block))
            if block.is_meta:
                check.fail(op, label, "have data", "a tensor on the meta device")
            first = parts[0][0] if parts else blocks[0]
            if block.device != first.device or (block.dtype == torch.float64) != (first.dtype == torch.float64):
                check.fail(
                    op,
                    label,
                    f"lie on one device, float64 throughout or nowhere ({check.describe(first)})",
                    check.describe(block),
                )
            if block.shape[1] != blocks[0].shape[1] or not block.shape[1]:
                check.fail(op, label, "have rows of one length, not 0", check.describe(block))
        parts.append(blocks)
    if not parts:
        check.fail(op, name, "have at least one part", "an empty tuple")
    counts = [sum(block.shape[0] for block in blocks) for blocks in parts]
    if counts[0] == 0 or any(count != counts[0] for count in counts):
        check.fail(op, name, "have at least one point, and a row for each in every part", f"{counts} rows")
    device, count = parts[0][0].device, counts[0]
    dtype = torch.float64 if parts[0][0].dtype == torch.float64 else torch.float32
    return Points(
        name,
        parts,
        is_tuple,
        _scales(op, name, scales, len(parts), count, dtype, device),
        _weights(op, name, weights, count, device),
    )


def _weights(op, name, weights, count, device):
    if weights is None:
        return torch.ones(count, dtype=torch.float64, device=device)
    if (
        not isinstance(weights, torch.Tensor)
        or weights.shape != (count,)
        or weights.device != device
        or weights.is_complex()
    ):
        check.fail(op, f"weights of {name}", f"be a tensor of shape ({count},) on {device}", check.describe(weights))
    weights = weights.detach().double().contiguous()
    if not bool((weights.isfinite() & (weights >= 0)).all()) or not bool((weights > 0).any()):
        check.fail(op, f"weights of {name}", "be finite, not negative, and not all 0", "other values")
    return weights


def _scales(op, name, scales, parts, count, dtype, device):
    if scales is None:
        return torch.empty(0, 0, dtype=dtype, device=device)
    if (
        not isinstance(scales, torch.Tensor)
        or scales.shape not in ((count,), (parts, count))
        or scales.device != device
    ):
        takes = f"be a tensor of shape ({count},) or ({parts}, {count}) on {device}"
        check.fail(op, f"scales of {name}", takes, check.describe(scales))
    if not bool(scales.isfinite().all()):
        check.fail(op, f"scales of {name}", "be finite", "NaN or infinity")
    return scales.detach().to(dtype).expand(parts, count).contiguous()


def check_finite(op: str, problems: Sequence[Points], results: Sequence[torch.Tensor], hint: str) -> None:
    """Raise where a result is not finite: for NaN or infinity among its points, or because squares overflow."""
    if results[0].device.type != "cpu" and not check.DEBUG and op != "kmeans":
        return
    for p, result in zip(problems, results, strict=True):
        if all(math.isfinite(extreme) for extreme in result.aminmax()):  # NaN is an extreme; faster than isfinite
            continue
        for i, part in enumerate(p.parts):
            for block in part:
                if bad := int((~block.isfinite()).sum()):
                    where = f"{p.name}, part {i}," if p.is_tuple else p.name
                    raise LorakernError(f"{op}: {where} must be finite; got {bad} values that are NaN or infinite")
        raise LorakernError(f"{op}: {p.name} is too large: {hint} overflow float32; divide the points by a number")
