"""check_concat_sum: is a merged adapter the weighted sum of others, as the concatenation = summation identity says?"""

import math
import numbers
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from lorakern.ops import _checks as check
from lorakern.ops._estimates import SLACK, Estimate, Module, Random, estimates, exact_norms
from lorakern.ops._terms import check_one_device, collect
from lorakern.ops.bgmv import bgmv
from lorakern.ops.equivalence_report import EquivalenceReport, ModuleCheck

_OP = "check_concat_sum"
_TOKENS = 8  # of a probe
_BATCH = 256  # modules at a time
# Estimates below this share of what is allowed are not computed exactly: that they are four times too small has a
# chance below 1e-7.
_CLOSE = 0.25
# Away from the seeds that random factors may come from: signs that are those of a factor would not be random to it.
_STREAM = 0x10CA_5EED


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
    follows from 8 random vectors, and that of the whole from all of them. Rows and columns are judged by themselves,
    because a single changed weight shows there even where it drowns in the rounding of the whole. Where the error of
    the whole comes near what is allowed, it is computed exactly, from Gram matrices in float64 or, where these do not
    resolve it, from QR.

    What is allowed, for merged factors that are right but for rounding to their dtype of unit roundoff u, is
    ``4 u |s| sqrt(sum_r ||b_r||^2 ||a_r||^2)`` as a whole, and ``4 u |s| sqrt(sum_r b_or^2 ||a_r||^2)`` in row o. One
    flipped bit in the exponent of a float32 weight exceeds that by far. In a 16-bit dtype it may not; but where the
    merged factors are the adapters' own, one below the other, each rank up to a factor, a weight that is off by more
    than a quarter where the rest of its rank is not fails the module too.

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
    random, found = Random(_STREAM + seed), {}
    for start in range(0, len(modules), _BATCH):
        for module, estimate in estimates(modules[start : start + _BATCH], random):
            found[module.name] = _judge(module, estimate, rtol, random if probe else None)
    return EquivalenceReport(found, missing, extra)


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
            modules.append(Module(difference, labels, [weights[i] for i in holders], raw.scales))
    wanted = dict.fromkeys(n for adapter, w in zip(adapters, weights, strict=True) if w for n in adapter)
    extra = tuple(str(name) for name in merged if not any(name in adapter for adapter in adapters))
    return modules, tuple(str(name) for name in wanted if name not in merged), extra


def _judge(module: Module, estimate: Estimate, rtol, random) -> ModuleCheck:
    if estimate.unusable:
        return ModuleCheck(module.name, math.inf, 0.0, note=estimate.unusable)
    exact = not estimate.apart < _CLOSE * (estimate.rounding if rtol is None else rtol * estimate.size)
    estimate = exact_norms(module, estimate) if exact else estimate
    # Where the adapters cancel, their sum is no measure.
    size = estimate.size if estimate.size > 1e-12 * estimate.magnitude else estimate.total or 1.0
    error, bound = estimate.apart / size, estimate.rounding / size if rtol is None else rtol
    notes = [] if error <= bound else [f"the update differs by {error:.2g} of the sum, {bound:.2g} is allowed"]
    rows = columns = outliers = None
    if rtol is None:
        for name, found in (("row", estimate.row), ("column", estimate.column)):
            if not found.excess <= 1:
                notes.append(
                    f"{name} {found.line:.0f} differs by {math.sqrt(found.excess):.2g} times what rounding explains"
                )
        notes += _outliers(module, estimate)
        rows, columns = math.sqrt(estimate.row.excess), math.sqrt(estimate.column.excess)
        outliers = int(estimate.row.outliers + estimate.column.outliers)
    probed = probe_bound = None
    if random:
        probed, unit = _probe(module, random)
        probed, probe_bound = probed / size, bound + unit * estimate.total / size
        notes += [] if probed <= probe_bound else [f"bgmv differs by {probed:.2g}, {probe_bound:.2g} is allowed"]
    found = error, bound, exact, rows, columns, outliers, probed, probe_bound
    return ModuleCheck(module.name, *found, passed=not notes, note="; ".join(notes))


def _outliers(module: Module, estimate: Estimate) -> list[str]:
    """In words, single weights of the merged factors that do not fit the others of their rank."""
    notes = []
    for letter, found in (("A", estimate.column), ("B", estimate.row)):
        if found.outliers:
            index, rank = divmod(int(found.where), module.first)
            place = (rank, index) if letter == "A" else (index, rank)
            notes.append(f"{letter}{list(place)} does not fit its rank ({found.outliers:.0f} such weights)")
    return notes


def _probe(module: Module, random: Random) -> tuple[float, float]:
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
    unit = SLACK * torch.finfo(dtype).eps / 2 + 32 * torch.finfo(torch.float32).eps / 2
    return apart, unit
