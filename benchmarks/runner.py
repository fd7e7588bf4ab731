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
from benchmarks.timing import Effort

# RMS error over RMS of the exact values. Rivals may round h and y as often as their dtype makes them.
TOLERANCES = {"float32": 1e-5, "float16": 4e-3, "bfloat16": 2e-2}
BANDWIDTH, PRODUCT = "bandwidth", "torch.mm"

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


class Rotating:
    """The call on the next copy of the weights each time."""

    def __init__(self, call: Call, copies: int):
        self.call, self.copies, self.turn = call, copies, 0

    def __call__(self) -> object:
        self.turn = (self.turn + 1) % self.copies
        return self.call(self.turn)


def floor_of(inputs: Inputs, mm_flops: float, bandwidth: float, kind: str = "read", cache: int | None = None) -> dict:
    """The least time that the machine allows, by operations and, where bytes must come from memory, by bytes.

    They must in a cold case, and in a warm one if a `cache` is given that cannot hold them.
    """
    from_memory = inputs.case.cold or (cache is not None and inputs.bytes > cache)
    by_operations = inputs.operations / mm_flops
    by_bytes = inputs.bytes / bandwidth if from_memory else 0.0
    return {
        "bytes": inputs.bytes,
        "operations": inputs.operations,
        f"{kind}_bandwidth": bandwidth,
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
    probe: floor.ReadProbe | floor.CopyProbe,
    effort: Effort,
    rivals: Makers = RIVALS,
    mine: Makers | None = None,
) -> dict:
    """One line of the results: the case, its floor, and a run for each contender.

    A run has its error and either times and rates, or a "note" that says why there are none: a contender that does not
    fit the case, one that fails, or one whose result is wrong. No speed is reported for a wrong result.

    Args:
        case: what to measure.
        floors: what `floors.measure` returned.
        probe: what the bandwidth is measured by; it takes turns with the contenders of a cold case.
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
        except Exception as error:  # a rival, or a backend of ours, that breaks must not end the run of the others
            runs[name] = {"note": f"failed: {type(error).__name__}: {' '.join(str(error).split())[:200]}"}
            continue
        runs[name] = {"error": error if math.isfinite(error) else None}
        if error <= TOLERANCES[case.dtype]:
            functions[name] = Rotating(call, inputs.copies)
        else:
            runs[name]["note"] = f"wrong (error ratio {error:.1e}): not timed"
    if case in COMPANIONS and next(iter(mine)) in functions:
        label, other, by = COMPANIONS[case]
        beside = case_inputs.make(other, device, floor.cache_bytes(device))
        make = next(iter(mine.values())) if by is None else RIVALS[by]
        functions[label] = Rotating(make(beside), beside.copies)
        runs[label] = {"companion": other.name}
    if case.cold:
        functions[BANDWIDTH] = probe
    if beside_mm := any(target.case == case and target.metric == "mm_flops" for target in TARGETS):
        functions[PRODUCT] = floor.mm_product(device, case.dtype)
    timed = floor.take_turns(device, functions, effort)
    kind = probe.kind
    bandwidth = probe.bytes / timed.pop(BANDWIDTH)["seconds"] if case.cold else floors[f"{kind}_bandwidth"]
    peak = floor.mm_flops(floors, case.dtype)
    if beside_mm:
        peak = floor.mm_operations(device) / timed.pop(PRODUCT)["seconds"]
    least = floor_of(inputs, peak, bandwidth, kind, floor.cache_bytes(device) if device == "cuda" else None)
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
