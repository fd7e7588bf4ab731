"""From the times of tokens to the figures of a repetition, of a cell, and to the verdicts."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

from benchmarks.serving.workers import OURS, PLAIN, THEIRS


def quantile(values: Iterable[float], share: float) -> float:
    """The smallest value that at least this share of them does not exceed.

    >>> quantile([3, 1, 2, 4], 0.5), quantile(range(1, 101), 0.95)
    (2, 95)
    """
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def figures(times: list[list[float]], prompt_tokens: int) -> dict[str, float]:
    """Of one repetition, in seconds and tokens a second.

    Args:
        times: of each request, the seconds from the common start to each of its tokens.
        prompt_tokens: of all requests together.
    """
    first = [of[0] for of in times]
    between = [later - sooner for of in times for sooner, later in pairwise(of)]
    seconds, generated = max(of[-1] for of in times), sum(map(len, times))
    return {
        "seconds": seconds,
        "tokens_s": (prompt_tokens + generated) / seconds,
        "generated_s": generated / seconds,
        "first_mean": statistics.fmean(first),
        "first_p50": quantile(first, 0.5),
        "first_p95": quantile(first, 0.95),
        "token_mean": statistics.fmean(between),
        "token_p50": quantile(between, 0.5),
        "token_p95": quantile(between, 0.95),
    }


def medians(repetitions: list[dict[str, float]]) -> dict[str, float]:
    """Of each figure by itself."""
    return {name: statistics.median(of[name] for of in repetitions) for name in repetitions[0]}


def median_of(record: dict, name: str) -> dict | None:
    """The figures of a contender, or None where it has no times."""
    return record["runs"].get(name, {}).get("median")


def ratio(record: dict, other: str) -> float | None:
    """Throughput of lorakern's LoRA over that of another contender."""
    ours, theirs = median_of(record, OURS), median_of(record, other)
    return ours["tokens_s"] / theirs["tokens_s"] if ours and theirs else None


def spread(record: dict, other: str) -> tuple[float, float] | None:
    """The lowest and the highest ratio of two repetitions that came one after the other."""
    if ratio(record, other) is None:
        return None
    pairs = zip(record["runs"][OURS]["repetitions"], record["runs"][other]["repetitions"], strict=False)
    of_turns = [ours["tokens_s"] / theirs["tokens_s"] for ours, theirs in pairs]
    return min(of_turns), max(of_turns)


@dataclass(frozen=True)
class Extra:
    """Seconds that LoRA adds, as measured and at the least; the measured ones are None where a contender is missing."""

    step: float | None
    step_floor: float
    first: float | None
    first_floor: float
    best_ratio: float | None  # throughput over no LoRA, if LoRA cost no more than the floors


def extra(record: dict) -> Extra:
    """What LoRA adds to a decode step and to the time to the first token, beside the floors.

    A step must read the adapters in use once; the first token takes those bytes or the prompts' operations, whichever
    takes longer.
    """
    least, ours, plain = record["least"], median_of(record, OURS), median_of(record, PLAIN)
    step_floor = least["step_bytes"] / record["read_bandwidth"]
    first_floor = max(step_floor, least["prompt_operations"] / record["mm_flops"])
    steps = record["new_tokens"] // record["requests"] - 1
    best = plain and plain["seconds"] / (plain["seconds"] + first_floor + steps * step_floor)
    both = ours and plain
    return Extra(
        step=ours["token_p50"] - plain["token_p50"] if both else None,
        step_floor=step_floor,
        first=ours["first_p50"] - plain["first_p50"] if both else None,
        first_floor=first_floor,
        best_ratio=best,
    )


@dataclass(frozen=True)
class Target:
    """`bound` is the least ratio of throughputs in the cells of `kind`, or in all of them."""

    other: str
    bound: float
    kind: str | None = None


TARGETS = (Target(PLAIN, 0.85), Target(THEIRS, 25.0, "prefill"))


def verdicts(record: dict) -> list[tuple[Target, float | None, str]]:
    """(target, ratio, the verdict in words) of the targets that hold for a cell."""
    out = []
    for target in TARGETS:
        if target.kind in (None, record["cell"]["kind"]):
            value = ratio(record, target.other)
            word = "not measured" if value is None else "met" if value >= target.bound else "falls short"
            out.append((target, value, word))
    return out
