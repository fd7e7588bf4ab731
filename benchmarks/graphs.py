"""Device time of several functions that take turns: CUDA events around replays of captured graphs.

A graph holds many calls, one after the other, and goes through all copies of a cold case's weights. What cannot be
captured is timed as Python launches it, between the same events, and says so in a note.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping

import torch

from benchmarks.timing import Effort, summary

CALLS = 100  # calls in a graph, so that what a replay costs by itself does not count
REPLAY = 1e-2  # seconds; slower calls are fewer in a graph, but go through all copies
GPU_EFFORT = Effort(0.1, 5, 25)


def calls_in_a_graph(seconds: float, copies: int) -> int:
    """How many calls to capture: whole rounds through the copies.

    >>> calls_in_a_graph(3e-6, 1), calls_in_a_graph(3e-6, 900), calls_in_a_graph(2e-3, 1), calls_in_a_graph(1e-4, 4)
    (100, 900, 5, 100)
    """
    rounds = min(math.ceil(CALLS / copies), math.ceil(REPLAY / (seconds * copies)))
    return copies * max(1, rounds)


def in_turns(functions: Mapping[str, Callable[[], object]], effort: Effort = GPU_EFFORT) -> dict[str, dict]:
    """Time each function on the current stream, which must not be the default one: name to `summary`.

    Every sample is preceded by an untimed replay of the same graph. It brings the weights of a warm case into the
    caches, and while it runs the timed one is sent to the device, so that the host's work is not in the time.
    """
    prepared = {name: _prepare(function) for name, function in functions.items()}
    wanted, samples = {}, {name: [] for name in functions}
    for name, (launch, calls, _) in prepared.items():
        once = _timed(launch)
        wanted[name] = int(min(effort.most, max(effort.fewest, effort.seconds / (2 * max(once, 1e-9)))))
        samples[name].append(once / calls)
    rounds = max(wanted.values(), default=0)
    for turn in range(rounds):
        for name, (launch, calls, _) in prepared.items():
            if (turn + 1) * wanted[name] // rounds > turn * wanted[name] // rounds:
                samples[name].append(_timed(launch) / calls)
    notes = {name: {"note": note} if note else {} for name, (_, _, note) in prepared.items()}
    # The first sample chose how many there are; it ran before all was warm.
    return {name: summary(taken[1:], prepared[name][1]) | notes[name] for name, taken in samples.items()}


def _timed(launch: Callable[[], None]) -> float:
    """Seconds between the events around one of two launches in a row, the second."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    launch()
    start.record()
    launch()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e-3


def _prepare(function: Callable[[], object]) -> tuple[Callable[[], None], int, str | None]:
    """(what launches, calls in one launch, a note or None)."""
    copies = getattr(function, "copies", 1)
    for _ in range(copies):  # compiles, and fills whatever tables a contender keeps of its weights
        function()
    torch.cuda.synchronize()

    def several(calls):
        for _ in range(calls):
            function()

    calls = calls_in_a_graph(_timed(function), copies)
    if (reason := _waits(function)) is None:
        try:
            return _capture(lambda: several(calls)).replay, calls, None
        except RuntimeError as error:
            reason = f"it cannot be captured ({_first_line(error)})"
    calls = calls_in_a_graph(max(_timed(function), 1e-4), copies)
    return lambda: several(calls), calls, f"timed as Python launches it: {reason}"


def _waits(function: Callable[[], object]) -> str | None:
    """Why a call cannot be in a graph, as far as one outside of a graph tells: it makes the host wait."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        function()
    except RuntimeError as error:
        return f"the host waits for the device ({_first_line(error)})"
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return None


def _capture(function: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """Without torch.cuda.graph, which collects garbage and empties torch's cache of memory each time.

    On the stream that is current: autograd runs a backward on the stream of its forward, and that must be this one.
    """
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    graph.capture_begin()
    try:
        function()
    except BaseException:
        with contextlib.suppress(RuntimeError):  # it says only that the capture failed; the reason is on its way
            graph.capture_end()
        raise
    graph.capture_end()
    torch.cuda.synchronize()
    return graph


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [repr(error)])[0][:120]
