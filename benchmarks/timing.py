"""Wall time of several functions that take turns, so that a machine that drifts drifts for all of them alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

SLOW = 0.1  # seconds; a call that takes longer is not helped by an untimed one just before it
SAMPLE = 1e-3  # seconds; shorter calls are timed several in a row


@dataclass(frozen=True)
class Effort:
    """How much to spend on one case: seconds for each function, and the bounds on its samples."""

    seconds: float = 0.6
    fewest: int = 3
    most: int = 25


QUICK = Effort(0.06, 3, 7)


def summary(samples: list[float], calls: int) -> dict:
    """Median and spread, in seconds a call."""
    ordered = sorted(samples)
    quartile = len(ordered) // 4
    return {
        "seconds": statistics.median(ordered),
        "min": ordered[0],
        "p25": ordered[quartile],
        "p75": ordered[-1 - quartile],
        "max": ordered[-1],
        "samples": len(ordered),
        "calls": calls,
    }


def in_turns(
    functions: Mapping[str, Callable[[], object]], effort: Effort, synchronize: Callable[[], None] | None = None
) -> dict[str, dict]:
    """Time each function: name to `summary`.

    Every sample is preceded by an untimed call, which wakes the threads and, where the weights stay the same, brings
    them into the caches after whatever ran before. Slow functions get fewer samples, spread over the whole time.
    """
    synchronize = synchronize or (lambda: None)

    def timed(function, calls):
        synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            function()
        synchronize()
        return (time.perf_counter() - start) / calls

    calls, wanted, warm = {}, {}, {}
    for name, function in functions.items():
        taken = timed(function, 1)
        if taken < SLOW:
            taken = min(taken, timed(function, 1), timed(function, 1))
        warm[name] = taken < SLOW
        calls[name] = max(1, round(SAMPLE / taken))
        wanted[name] = int(min(effort.most, max(effort.fewest, effort.seconds / (taken * (calls[name] + 1)))))
    rounds = max(wanted.values(), default=0)
    samples = {name: [] for name in functions}
    for turn in range(rounds):
        for name, function in functions.items():
            if (turn + 1) * wanted[name] // rounds > turn * wanted[name] // rounds:
                if warm[name]:
                    function()
                samples[name].append(timed(function, calls[name]))
    return {name: summary(samples[name], calls[name]) for name in functions}
