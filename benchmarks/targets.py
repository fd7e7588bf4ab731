"""Is a promise kept? One function, from the measurements alone."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.records import Results, bandwidth, first_run
from benchmarks.registry import Target


@dataclass(frozen=True)
class Verdict:
    """`met` is None where the measurement is missing; `measured` then says why."""

    met: bool | None
    value: float | None
    measured: str


def _mean(numbers: list[int]) -> float:
    return sum(numbers) / len(numbers)


def evaluate(target: Target, results: Results) -> Verdict:
    """Compare a target's metric with its bound.

    The metrics: "bandwidth" (bytes a second over the bandwidth that took turns with the case), "mm_flops"
    (FLOP/s over torch.mm's, likewise),
    "speedup" (time of `target.against` over ours), all at least the bound; "proportional" (our time over that of the
    padded companion, over the ratio of their ranks), "per_choice" (our time over K times the companion's), "companion"
    (our time over the companion's), "seconds", all at most the bound.
    """
    record = results.records.get(target.case.name)
    if record is None:
        return Verdict(None, None, "not measured")
    _, run = first_run(record)
    if "seconds" not in run:
        return Verdict(None, None, run["note"])
    if target.metric == "bandwidth":
        rate, peak = record["floor"]["bytes"] / run["seconds"], bandwidth(record["floor"])[1]
        value = rate / peak
        return Verdict(value >= target.bound, value, f"{value:.1%} ({rate / 1e9:.1f} of {peak / 1e9:.1f} GB/s)")
    if target.metric == "mm_flops":
        rate, peak = record["floor"]["operations"] / run["seconds"], record["floor"]["mm_flops"]
        value = rate / peak
        return Verdict(value >= target.bound, value, f"{value:.1%} ({rate / 1e9:.0f} of {peak / 1e9:.0f} GFLOP/s)")
    if target.metric == "speedup":
        rival = record["runs"].get(target.against, {"note": f"{target.against} did not run"})
        if "seconds" not in rival:
            return Verdict(None, None, f"{target.against}: {rival['note']}")
        value = rival["seconds"] / run["seconds"]
        return Verdict(value >= target.bound, value, f"{value:.2f} x")
    if target.metric == "seconds":
        value = run["seconds"]
        return Verdict(value < target.bound, value, f"{value * 1e6:.2f} us")
    if target.metric not in ("proportional", "per_choice", "companion"):
        raise ValueError(f"target {target.row!r} has the unknown metric {target.metric!r}")
    companion = next((run for run in record["runs"].values() if "companion" in run), None)
    if companion is None:
        return Verdict(None, None, "the companion did not run")
    ratio = run["seconds"] / companion["seconds"]
    if target.metric == "proportional":
        slots = [target.case.ranks[slot % len(target.case.ranks)] for slot in range(target.case.adapters)]
        share = _mean(slots) / target.case.r_max
        value = ratio / share
        return Verdict(
            value <= target.bound, value, f"{value:.2f} ({ratio:.0%} of the time for {share:.0%} of the ranks)"
        )
    value = ratio / target.case.choices if target.metric == "per_choice" else ratio
    return Verdict(value <= target.bound, value, f"{value:.2f} x")
