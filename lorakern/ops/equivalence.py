"""check_concat_sum: is a merged adapter the weighted sum of others, as the concatenation = summation identity says?"""

import math
import numbers
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from lorakern.ops import _checks as check
from lorakern.ops._terms import LowRankSum, check_one_device, collect, norm, norm_by_qr, squared_norm, unusable
from lorakern.ops.bgmv import bgmv
from lorakern.ops.equivalence_report import EquivalenceReport, ModuleCheck
from lorakern.ops.gram import PROBES, gram, lines, sketch

_OP = "check_concat_sum"
_TOKENS = 8  # of a probe
# How many times u of its root mean square an error may have. Rounding to nearest makes that 0.6; estimated from 16
# vectors, the worst of a million lines has 1.9 times its own.
_SLACK, _LINE_SLACK = 4, 3
# Estimates below this share of what is allowed are not computed exactly: that they are four times too small has a
# chance below 1e-9.
_CLOSE = 0.25
_BATCH = 256  # modules at a time
# Away from the seeds that random factors may come from: signs that are those of a factor would not be random to it.
_STREAM = 0x10CA_5EED


class _Module(NamedTuple):
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

    Nothing dense is formed. One pass over A multiplies it by random signs, one over B applies that to these products,
    and two more do the same from the other side, all in float64: the error of every row and column of the update
    follows from 16 random vectors, and that of the whole from all of them. Rows and columns are judged by themselves,
    because a single changed weight shows there even where it drowns in the rounding of the whole. Where the error of
    the whole comes near what is allowed, it is computed exactly, from Gram matrices in float64 or, where these do not
    resolve it, from QR.

    What is allowed, for merged factors that are right but for rounding to their dtype of unit roundoff u, is
    ``4 u |s| sqrt(sum_r ||b_r||^2 ||a_r||^2)`` as a whole, and ``3 u |s| sqrt(sum_r b_or^2 ||a_r||^2)`` in row o. One
    flipped bit in the exponent of a float32 weight exceeds that by far; in bfloat16, with rank 64, it does if the
    weight changes by more than about a tenth of its row's or column's root mean square.

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
    if not isinstance(seed, int):
        check.fail(_OP, "seed", "be an integer", repr(seed))
    check_one_device(_OP, [module.difference for module in modules])
    random, found = _Random(_STREAM + seed), {}
    for start in range(0, len(modules), _BATCH):
        for module, estimate in _estimates(modules[start : start + _BATCH], rtol, random):
            found[module.name] = _judge(module, estimate, rtol, random if probe else None)
    return EquivalenceReport(found, missing, extra)


class _Random:
    """Seeded random matrices; those of one size are made once."""

    def __init__(self, seed: int):
        self.seed, self.made = seed, {}

    def _make(self, rows, columns, device, change):
        key = rows, columns, change
        if key not in self.made:
            generator = torch.Generator().manual_seed(self.seed)
            self.made[key] = change(torch.randn(rows, columns, generator=generator)).to(device)
        return self.made[key]

    def signs(self, rows, columns, device):
        """float64, +1 and -1."""
        return self._make(rows, columns, device, _signs)

    def normal(self, rows, columns, device):
        """float32, of the standard normal distribution."""
        return self._make(rows, columns, device, torch.Tensor.float)


def _signs(x):
    return torch.where(x < 0, -1.0, 1.0).double()


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


class _Estimate(NamedTuple):
    """What the sketches say of a module; norms are Frobenius norms."""

    unusable: str | None
    total: float = 0.0  # sqrt of the sum of the squared norms of all ranks' updates
    magnitude: float = 0.0  # the sum of these norms
    rounding: float = 0.0  # what the merged factors' rounding may make of the whole
    apart: float = 0.0  # ||merged - sum||
    size: float = 0.0  # ||sum||
    lines: tuple[tuple[float, int], tuple[float, int]] = ((0.0, 0), (0.0, 0))  # worst row and column: error, which


def _estimates(modules, rtol, random):
    """(module, its `_Estimate`) of each."""
    sides = [side for module in modules for side in module.sides]
    device = sides[0][0].device
    products = sketch(sides, [random.signs(side[0].shape[1], PROBES, device) for side in sides])
    problems, estimates = [], []
    for module, (by_a, a), (by_b, b) in zip(modules, products[::2], products[1::2], strict=True):
        s, first = module.difference, module.first
        reason = unusable(s, a, b, module.labels)
        estimates.append(_Estimate(reason))
        if reason:
            continue
        weights = s.weights()
        terms = weights.square() * a * b
        unit, step = _units(s.A[-1], s.B[-1])
        squares = unit**2 * a * b + step**2 * (s.d_in * b + s.d_out * a)
        total, magnitude, squares = torch.stack([terms.sum(), terms.sqrt().sum(), squares[first:].sum()]).tolist()
        rounding = _SLACK * abs(s.scales[-1]) * math.sqrt(squares) + 1e-14 * magnitude
        estimates[-1] = _Estimate(None, math.sqrt(total), magnitude, rounding)
        # Rows of the update are lines of B^T's problem, and columns of A's.
        share = (_LINE_SLACK * s.scales[-1]) ** 2
        for side, own, x, length, width in (
            (s.A, by_b, b, s.d_out, s.d_in),
            ([m.T for m in s.B], by_a, a, s.d_in, s.d_out),
        ):
            factors = share * (unit**2 * x + step**2 * length)
            allowed = share * step**2 * float(x[first:].sum()) + (1e-14 * magnitude) ** 2 / width
            problems.append((side, weights[:, None] * own, first, factors, allowed))
    columns = iter(zip(*[iter(lines(*map(list, zip(*problems, strict=True))) if problems else ())] * 2, strict=True))
    for module, estimate in zip(modules, estimates, strict=True):
        if estimate.unusable is None:
            column, row = next(columns)
            apart, size = ((x + y) / 2 for x, y in zip(column[:2], row[:2], strict=True))
            worst = tuple((math.sqrt(side[2]), int(side[3])) for side in (row, column))
            estimate = estimate._replace(apart=math.sqrt(apart), size=math.sqrt(size), lines=worst)
        yield module, estimate


def _units(*tensors):
    """(unit roundoff, half the least step) of the coarsest dtype."""
    known = [torch.finfo(t.dtype) for t in tensors]
    return max(f.eps for f in known) / 2, max(f.smallest_normal * f.eps for f in known) / 2


def _exact(module, estimate):
    """The norms of the estimate, from Gram matrices or QR."""
    s, first = module.difference, module.first
    gram_a, gram_b = gram(list(module.sides))
    squared, noise = squared_norm(gram_a, gram_b, s.weights())
    apart = math.sqrt(squared) if squared > 1e4 * noise else norm_by_qr(s)
    return estimate._replace(apart=apart, size=norm(module.sources, gram_a[:first, :first], gram_b[:first, :first]))


def _judge(module: _Module, estimate: _Estimate, rtol, random) -> ModuleCheck:
    if estimate.unusable:
        return ModuleCheck(module.name, math.inf, 0.0, note=estimate.unusable)
    exact = not estimate.apart < _CLOSE * (estimate.rounding if rtol is None else rtol * estimate.size)
    estimate = _exact(module, estimate) if exact else estimate
    # Where the adapters cancel, their sum is no measure.
    size = estimate.size if estimate.size > 1e-12 * estimate.magnitude else estimate.total or 1.0
    error, bound = estimate.apart / size, estimate.rounding / size if rtol is None else rtol
    notes = [] if error <= bound else [f"the update differs by {error:.2g} of the sum, {bound:.2g} is allowed"]
    if rtol is None:
        for name, (excess, index) in zip(("row", "column"), estimate.lines, strict=True):
            notes += [] if excess <= 1 else [f"{name} {index} differs by {excess:.2g} times what rounding explains"]
    rows, columns = (excess if rtol is None else None for excess, _ in estimate.lines)
    probed = probe_bound = None
    if random:
        probed, unit = _probe(module, random)
        probed, probe_bound = probed / size, bound + unit * estimate.total / size
        notes += [] if probed <= probe_bound else [f"bgmv differs by {probed:.2g}, {probe_bound:.2g} is allowed"]
    found = error, bound, exact, rows, columns, probed, probe_bound
    return ModuleCheck(module.name, *found, passed=not notes, note="; ".join(notes))


def _probe(module: _Module, random: _Random) -> tuple[float, float]:
    """(error, unit) of bgmv's answers to random x: all adapters mixed, against the merged adapter alone."""
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
    x = random.normal(_TOKENS, s.d_in, device).to(dtype)
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
    return apart, unit
