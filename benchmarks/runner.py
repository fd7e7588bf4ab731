"""Measure a case: check every contender against the reference, then time in turns those that are right."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict

import torch

from benchmarks import floors as floor
from benchmarks import inputs as case_inputs
from benchmarks.contenders import PARTS, Call, Skipped, ours
from benchmarks.inputs import Inputs
from benchmarks.registry import COMPANIONS, TARGETS, Case, suites_of
from benchmarks.rivals import RIVALS
from benchmarks.timing import Effort, in_turns

# RMS error over RMS of the exact values. Rivals may round h and y as often as their dtype makes them.
TOLERANCES = {"float32": 1e-5, "float16": 4e-3, "bfloat16": 2e-2}
READ, PRODUCT = "read bandwidth", "torch.mm"

Makers = Mapping[str, Callable[[Inputs], Call]]


def error_of(call: Call, inputs: Inputs, rows: torch.Tensor, wanted: list[torch.Tensor]) -> float:
    """The error ratio of the worst result of one call; a result that is not finite is infinitely wrong."""
    inputs.y.zero_()
    result = call(0)
    stacked = getattr(call, "stacked", lambda same: same)
    results = stacked(result) if inputs.case.op == "backward" else [inputs.y[rows]]
    if not all(torch.isfinite(got).all() for got in results):
        return float("inf")
    return max(case_inputs.error_ratio(got, exact) for got, exact in zip(results, wanted, strict=True))


def rotating(call: Call, copies: int) -> Callable[[], object]:
    """The call on the next copy of the weights each time."""
    turn = iter(range(1, 1 << 62))
    return (lambda: call(0)) if copies == 1 else (lambda: call(next(turn) % copies))


def floor_of(inputs: Inputs, mm_flops: float, read_bandwidth: float) -> dict:
    """The least time that the machine allows: by bytes from memory where the case is cold, and by operations."""
    by_operations = inputs.operations / mm_flops
    by_bytes = inputs.bytes / read_bandwidth if inputs.case.cold else 0.0
    return {
        "bytes": inputs.bytes,
        "operations": inputs.operations,
        "read_bandwidth": read_bandwidth,
        "mm_flops": mm_flops,
        "seconds": max(by_bytes, by_operations),
        "bound": "bytes" if by_bytes > by_operations else "operations",
    }


def _rates(run: dict, inputs: Inputs, least: float) -> dict:
    seconds = run["seconds"]
    return run | {
        "gb_s": inputs.bytes / seconds / 1e9,
        "gflop_s": inputs.operations / seconds / 1e9,
        "of_floor": least / seconds,
    }


def measure(
    case: Case,
    floors: dict,
    probe: floor.ReadProbe,
    effort: Effort,
    rivals: Makers = RIVALS,
    mine: Makers | None = None,
) -> dict:
    """One line of the results: the case, its floor, and a run for each contender.

    A run has its error and either times and rates, or a "note" that says why there are none: a contender that does not
    fit the case, or one whose result is wrong. No speed is reported for a wrong result.

    Args:
        case: what to measure.
        floors: what `floors.measure` returned.
        probe: reads the buffer of the bandwidth floor; it takes turns with the contenders of a cold case.
            So does torch.mm's product where a target is set by it.
        effort: how long to measure.
        rivals, mine: makers of the contenders; lorakern's backends of the probe's device if `mine` is None.
    """
    device = probe.device
    inputs = case_inputs.make(case, device, floor.cache_bytes(device))
    mine = ours(device) if mine is None else mine
    makers = dict(mine) | dict(PARTS if case.op == "dispatch" and device == "cpu" else {}) | dict(rivals)
    rows, wanted = case_inputs.exact(inputs)
    runs, functions = {}, {}
    for name, make in makers.items():
        try:
            call = make(inputs)
            error = error_of(call, inputs, rows, wanted)
        except Skipped as reason:
            runs[name] = {"note": str(reason)}
            continue
        runs[name] = {"error": error if math.isfinite(error) else None}
        if error <= TOLERANCES[case.dtype]:
            functions[name] = rotating(call, inputs.copies)
        else:
            runs[name]["note"] = f"wrong (error ratio {error:.1e}): not timed"
    if case in COMPANIONS and next(iter(mine)) in functions:
        label, other = COMPANIONS[case]
        beside = case_inputs.make(other, device, floor.cache_bytes(device))
        functions[label] = rotating(next(iter(mine.values()))(beside), beside.copies)
        runs[label] = {"companion": other.name}
    if case.cold:
        functions[READ] = probe
    if beside_mm := any(target.case == case and target.metric == "mm_flops" for target in TARGETS):
        functions[PRODUCT] = floor.mm_product(device, case.dtype)
    timed = in_turns(functions, effort, floor.synchronizer(device))
    bandwidth = probe.bytes / timed.pop(READ)["seconds"] if case.cold else floors["read_bandwidth"]
    peak = floor.mm_flops(floors, case.dtype)
    if beside_mm:
        peak = floor.MM_OPERATIONS / timed.pop(PRODUCT)["seconds"]
    least = floor_of(inputs, peak, bandwidth)
    for name, times in timed.items():
        same = "companion" not in runs[name]
        runs[name] |= _rates(times, inputs, least["seconds"]) if same else times
    first = runs[next(iter(mine))]
    for name, run in runs.items():
        if "seconds" in run and "seconds" in first:
            run["ratio"] = run["seconds"] / first["seconds"]
        run["ours"] = name in mine
    return {
        "name": case.name,
        "suites": suites_of(case),
        "case": asdict(case),
        "rows_checked": len(rows),
        "copies": inputs.copies,
        "floor": least,
        "runs": runs,
    }
