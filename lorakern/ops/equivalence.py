"""check_concat_sum: is a merged adapter the weighted sum of others, as the concatenation = summation identity says?"""

import math
import numbers
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from lorakern.ops import _checks as check
from lorakern.ops._terms import LowRankSum, batches, collect, norm, norm_by_qr, squared_norm, unusable
from lorakern.ops.bgmv import bgmv
from lorakern.ops.equivalence_report import EquivalenceReport, ModuleCheck
from lorakern.ops.gram import gram

_OP = "check_concat_sum"
_SIGNS = 8  # random vectors by which the error of each row and column is estimated
_TOKENS = 8  # of a probe
# Away from the seeds that random factors may come from: signs that are those of a factor would not be random to it.
_STREAM = 0x10CA_5EED
# How many times its root mean square an error may have: rounding makes it 0.6, and estimates from 8 vectors stay below
# 2.5 times their mean in a million rows.
_SLACK = 4


class _Module(NamedTuple):
    """A module's difference, sum_i w_i delta_i - merged: the merged adapter is the last term."""

    difference: LowRankSum
    labels: list[str]
    weights: list[float]  # of the adapters that have the module
    scales: list[float]  # theirs, then that of the merged adapter

    @property
    def sources(self) -> LowRankSum:
        s = self.difference
        return LowRankSum(s.name, s.A[:-1], s.B[:-1], s.scales[:-1])


def check_concat_sum(
    adapters: Sequence[Mapping[str, Any]],
    merged: Mapping[str, Any],
    *,
    weights: Sequence[float] | None = None,
    rtol: float | None = None,
    probe: bool = False,
    seed: int = 0,
) -> EquivalenceReport:
    """Check module by module that a merged adapter is a weighted sum: ``s B A = sum_i w_i s_i B_i A_i``.

    Nothing dense is formed. One pass over the factors gives ``||merged - sum||_F`` from Gram matrices in float64 (from
    QR, where these do not resolve it), and the products of the factors with a few random sign vectors, from which the
    error of each row and column of the update follows: a single changed weight shows in its row or column even where
    it drowns in the rounding of the whole. What is allowed, for merged factors that are right but for rounding to
    their dtype of unit roundoff u, is four times ``u |s| sqrt(sum_r ||b_r||^2 ||a_r||^2)``, and its part in each row
    and column.

    Args:
        adapters: at least one `LoraAdapter`, or mapping from module name to (A, B, scale); modules, ranks and dtypes
            may differ.
        merged: likewise; the adapter to check, of any rank.
        weights: w_i, a finite number for each adapter; None for 1.
        rtol: the relative Frobenius error to allow instead; rows and columns are then not checked. For merges that
            are approximate, such as truncated ones.
        probe: also send random x through `bgmv`, with all adapters as slots that the weights mix, and through the
            merged adapter as one slot, and compare: this checks the kernels that serve them.
        seed: an integer, of the random vectors.

    Returns:
        An `EquivalenceReport`: ``passed``, ``worst``, ``modules``, ``missing``, ``extra``, ``str()``, ``to_json()``.
        A module whose factors hold NaN or infinity fails, and its note says where.

    Raises:
        LorakernError: no adapters, another number of weights, or factors whose shapes do not fit each other.

    The identity is that of LoRA-LEGO (arXiv 2409.16167) and LoRA Soups (arXiv 2410.13025).

    >>> import torch, lorakern as lk
    >>> a = {"q_proj": (torch.ones(1, 4), torch.ones(3, 1), 1.0)}
    >>> b = {"q_proj": (torch.eye(2, 4), torch.ones(3, 2), 0.5)}
    >>> merged = {"q_proj": (torch.cat([torch.ones(1, 4), torch.eye(2, 4)]), torch.ones(3, 3), 0.5)}
    >>> lk.check_concat_sum([a, b], merged, weights=[0.5, 1.0]).passed
    True
    >>> lk.check_concat_sum([a, b], merged).worst.note[:37]
    'the update differs by 0.39 of the sum'
    """
    modules, missing, extra = _collect(adapters, merged, weights)
    if rtol is not None and (not isinstance(rtol, numbers.Real) or isinstance(rtol, bool) or not rtol >= 0):
        check.fail(_OP, "rtol", "be a number that is not negative, or None", repr(rtol))
    signs = _Random(seed) if rtol is None else None
    found = {}
    by_name = {module.difference.name: module for module in modules}
    for batch in batches(_OP, [module.difference for module in modules], _SIGNS):
        problems = [side for s in batch for side in (s.A, [b.T for b in s.B])]
        if signs:
            problems = [[*side, signs(_SIGNS, side[0].shape[1], side[0].device)] for side in problems]
        flat = gram(problems)
        for s, gram_a, gram_b in zip(batch, flat[::2], flat[1::2], strict=True):
            found[s.name] = _check(by_name[s.name], gram_a, gram_b, rtol, _Random(seed + 1) if probe else None)
    return EquivalenceReport(found, missing, extra)


class _Random:
    """Seeded random matrices: signs (+1 or -1) or normal numbers; those of one size are made once."""

    def __init__(self, seed: int):
        self.seed, self.made = seed, {}

    def __call__(self, rows, columns, device, normal=False):
        key = rows, columns, normal
        if key not in self.made:
            generator = torch.Generator().manual_seed(_STREAM + self.seed)
            x = torch.randn(rows, columns, generator=generator)
            self.made[key] = (x if normal else torch.where(x < 0, -1.0, 1.0)).to(device)
        return self.made[key]


def _collect(adapters, merged, weights):
    """(modules of both sides, names missing, names extra)."""
    if not isinstance(adapters, Sequence) or not adapters or not all(isinstance(a, Mapping) for a in adapters):
        check.fail(_OP, "adapters", "be a non-empty list of adapters", check.describe(adapters))
    if not isinstance(merged, Mapping):
        check.fail(_OP, "merged", "be an adapter", check.describe(merged))
    weights = [1.0] * len(adapters) if weights is None else list(weights)
    numbers_all = all(isinstance(w, numbers.Real) and math.isfinite(w) for w in weights)
    if len(weights) != len(adapters) or not numbers_all:
        check.fail(_OP, "weights", f"be {len(adapters)} finite numbers, one for each adapter", repr(weights))
    modules = []
    for name in merged:
        holders = [i for i, adapter in enumerate(adapters) if name in adapter]
        if holders:
            terms = [tuple(adapters[i][name]) for i in holders] + [tuple(merged[name])]
            raw = collect(_OP, "the factors", terms, str(name))
            scales = [weights[i] * scale for i, scale in zip(holders, raw.scales[:-1], strict=True)]
            difference = raw._replace(scales=[*scales, -raw.scales[-1]])
            labels = [f"adapter {i}" for i in holders] + ["the merged adapter"]
            modules.append(_Module(difference, labels, [weights[i] for i in holders], raw.scales))
    wanted = dict.fromkeys(n for adapter, w in zip(adapters, weights, strict=True) if w for n in adapter)
    extra = tuple(str(name) for name in merged if not any(name in adapter for adapter in adapters))
    return modules, tuple(str(name) for name in wanted if name not in merged), extra


def _check(module: _Module, gram_a, gram_b, rtol, normal) -> ModuleCheck:
    s, rank = module.difference, module.difference.rank
    products_a, products_b = gram_a[:rank, rank:], gram_b[:rank, rank:]
    gram_a, gram_b = gram_a[:rank, :rank], gram_b[:rank, :rank]
    if reason := unusable(s, gram_a, gram_b, module.labels):
        return ModuleCheck(s.name, math.inf, 0.0, note=reason)
    weights, first = s.weights(), rank - s.A[-1].shape[0]
    a, b = gram_a.diagonal(), gram_b.diagonal()
    terms = weights.square() * a * b
    total, magnitude = math.sqrt(float(terms.sum())), float(terms.sqrt().sum())
    size = norm(module.sources, gram_a[:first, :first], gram_b[:first, :first])
    size = size if size > 1e-14 * magnitude else total or 1.0
    rounding = _Rounding.of(s.A[-1], s.B[-1], a[first:], b[first:], s.scales[-1])
    allowed = rounding.whole() + 1e-14 * magnitude if rtol is None else rtol * size
    squared, noise = squared_norm(gram_a, gram_b, weights)
    apart = math.sqrt(max(squared, noise)) if noise < allowed**2 / 4 else norm_by_qr(s)
    notes, rows, columns = [], None, None
    if not apart <= allowed:
        notes.append(f"the update differs by {apart / size:.2g} of the sum, {allowed / size:.2g} is allowed")
    if rtol is None:
        work = torch.float64 if any(t.dtype == torch.float64 for t in [*s.A, *s.B]) else torch.float32
        row, rows = _worst(s.B, weights[:, None] * products_a, rounding.rows(work), total, work)
        column, columns = _worst([m.T for m in s.A], weights[:, None] * products_b, rounding.columns(work), total, work)
        notes += [f"row {row} differs by {rows:.2g} times what rounding explains"] if not rows <= 1 else []
        notes += [f"column {column} differs by {columns:.2g} times what rounding explains"] if not columns <= 1 else []
    probed, probe_bound = _probe(module, total, size, allowed, normal) if normal else (None, None)
    if normal and not probed <= probe_bound:
        notes.append(f"bgmv differs by {probed:.2g}, {probe_bound:.2g} is allowed")
    return ModuleCheck(
        s.name, apart / size, allowed / size, rows, columns, probed, probe_bound, not notes, "; ".join(notes)
    )


class _Rounding(NamedTuple):
    """What rounding to the dtype of A and B changes in scale * B A: errors of u of an element, or of the least step."""

    A: torch.Tensor
    B: torch.Tensor
    a: torch.Tensor  # ||a_r||^2
    b: torch.Tensor  # ||b_r||^2
    scale: float
    unit: float
    step: float

    @classmethod
    def of(cls, A, B, a, b, scale):
        known = [torch.finfo(A.dtype), torch.finfo(B.dtype)]
        unit = max(f.eps for f in known) / 2
        return cls(A, B, a, b, scale, unit, max(f.smallest_normal * f.eps for f in known) / 2)

    def whole(self) -> float:
        """The largest Frobenius norm that passes."""
        d_in, d_out = self.A.shape[1], self.B.shape[0]
        squares = self.unit**2 * self.a * self.b + self.step**2 * (d_in * self.b + d_out * self.a)
        return _SLACK * abs(self.scale) * math.sqrt(float(squares.sum()))

    def rows(self, work) -> torch.Tensor:
        """(d_out,) float64: the square of the largest norm of a row that passes."""
        return self._lines(self.B, self.a, self.A.shape[1], work)

    def columns(self, work) -> torch.Tensor:
        """(d_in,) float64: likewise of a column."""
        return self._lines(self.A.T, self.b, self.B.shape[0], work)

    def _lines(self, elements, squares, length, work):
        factors = self.unit**2 * squares + self.step**2 * length
        largest = factors.max()
        sums = elements.to(work).square() @ (factors / largest).to(work)
        return (_SLACK * self.scale) ** 2 * (sums.double() * largest + self.step**2 * squares.sum())


def _worst(matrices, products, allowed, total, work):
    """(index, error over what is allowed) of the worst row of sum_i matrices[i] @ products_i, products being signs'."""
    error, start = 0, 0
    for matrix in matrices:
        part = products[start : start + matrix.shape[1]].to(work)
        error = error + matrix.to(work) @ part
        start += matrix.shape[1]
    squares = error.double().square().mean(dim=1)
    # The products above are themselves rounded to the working precision.
    floor = (16 * torch.finfo(work).eps / 2 * total) ** 2 / len(squares)
    ratios = torch.where(squares == 0, 0.0, squares / (allowed + floor))
    ratio, index = ratios.nan_to_num(nan=math.inf).max(dim=0)
    return int(index), math.sqrt(float(ratio))


def _probe(module: _Module, total: float, size: float, allowed: float, normal: _Random) -> tuple[float, float]:
    """(error, bound) of bgmv's answers to random x: all adapters mixed, against the merged adapter alone."""
    s, count = module.difference, len(module.weights)
    dtype = s.A[0].dtype
    for tensor in [*s.A, *s.B]:
        dtype = torch.promote_types(dtype, tensor.dtype)
    dtype = torch.float32 if dtype == torch.float64 else dtype
    device, ranks = s.A[0].device, [a.shape[0] for a in s.A[:-1]]
    A = torch.zeros(count, max(ranks), s.d_in, dtype=dtype, device=device)
    B = torch.zeros(count, s.d_out, max(ranks), dtype=dtype, device=device)
    for slot, rank in enumerate(ranks):
        A[slot, :rank], B[slot, :, :rank] = s.A[slot], s.B[slot]
    x = normal(_TOKENS, s.d_in, device, normal=True).to(dtype)
    slots = torch.arange(count, device=device).expand(_TOKENS, count)
    gates = torch.tensor(module.weights, device=device).expand(_TOKENS, count)
    scale = torch.tensor(module.scales[:-1], device=device)
    ranks = torch.tensor(ranks, device=device)
    zeros = torch.zeros(_TOKENS, s.d_out, dtype=dtype, device=device)
    mixed = bgmv(zeros.clone(), x, A, B, slots, scale=scale, ranks=ranks, gates=gates)
    last = (s.A[-1].to(dtype).contiguous()[None], s.B[-1].to(dtype).contiguous()[None])
    alone = bgmv(zeros.clone(), x, *last, slots[:, 0] * 0, scale=module.scales[-1])
    apart = float(torch.linalg.matrix_norm(mixed.double() - alone.double())) / math.sqrt(_TOKENS)
    # The kernels round h and y to their dtype, and their sums to float32.
    unit = _SLACK * torch.finfo(dtype).eps / 2 + 32 * torch.finfo(torch.float32).eps / 2
    return apart / size, (allowed + unit * total) / size
