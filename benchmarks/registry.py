"""The one registry of cases, the sweeps that plots and tables draw through them, and the targets they must meet."""

from __future__ import annotations

from dataclasses import dataclass, replace

POPULARITIES = ("identical", "distinct", "uniform", "zipf", "skewed")
# The device that a suite is for, and its sweeps and targets with it: "cpu" unless it is named here.
DEVICES = {"gpu": "cuda"}
DTYPES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}


@dataclass(frozen=True)
class Case:
    """One call to time; equal cases are one case, whatever suites and sweeps name them.

    Attributes:
        tokens, adapters: rows of x, and slots of the weights.
        ranks: true ranks, which the slots take in turn; the weights are as wide as the widest.
        d_in, d_outs: columns of x, and of each slice of y.
        choices: K, adapters a token mixes by gates.
        popularity: how tokens pick slots; "distinct" deals them out in turn.
        runs: tokens of a slot come side by side, as in prefill; else in the order in which they pick.
        op: "forward", "backward" (from dy to all gradients) or "dispatch" (forward, with what its layers cost).
        cold: the weights come from memory at every call; else from the caches, as far as they fit.
    """

    tokens: int
    adapters: int
    ranks: tuple[int, ...] = (16,)
    d_in: int = 4096
    d_outs: tuple[int, ...] = (4096,)
    choices: int = 1
    popularity: str = "distinct"
    runs: bool = False
    dtype: str = "bfloat16"
    op: str = "forward"
    cold: bool = False

    @property
    def name(self) -> str:
        """What identifies the case in files and on the command line: all fields, the usual ones left out."""
        parts = ["" if self.op == "forward" else self.op, DTYPES[self.dtype], f"{self.tokens}tok", f"{self.adapters}ad"]
        parts += ["r" + "+".join(map(str, self.ranks)), f"{self.d_in}x" + "+".join(map(str, self.d_outs))]
        parts += [f"K{self.choices}" if self.choices > 1 else ""]
        parts += ["" if self.popularity == "distinct" else self.popularity, "runs" if self.runs else ""]
        parts += ["cold" if self.cold else "warm"]
        return "-".join(filter(None, parts))

    @property
    def r_max(self) -> int:
        return max(self.ranks)

    def but(self, **changes) -> Case:
        """The same case with some fields changed."""
        return replace(self, **changes)


@dataclass(frozen=True)
class Sweep:
    """Cases that differ in one thing, `axis`: a line in a plot, a table on the results page."""

    title: str
    axis: str  # "tokens", "rank", "adapters", or a label for what has no numeric axis
    points: tuple[tuple[object, Case], ...]
    device: str = "cpu"


@dataclass(frozen=True)
class Target:
    """One promise: `metric` of the case's measurement compared with `bound`. The metrics are in targets.py.

    Attributes:
        row: which row of the table it belongs to.
        text: the promise in words.
        against: the rival that the metric "speedup" divides by.
        judged: False for a measurement that is shown beside the promise but does not decide it.
        device: the kind of device that it is a promise for; `target` sets it by the suite.
    """

    row: str
    text: str
    case: Case
    metric: str
    bound: float
    against: str | None = None
    judged: bool = True
    device: str = "cpu"


SUITES: dict[str, list[Case]] = {}
SWEEPS: list[Sweep] = []
TARGETS: list[Target] = []
QUICK: set[tuple[str, Case]] = set()  # (device, case) of what --quick measures
# A case that is timed in turn with another, so that drift hits both: case -> (label, the other case, who runs it:
# a rival, or lorakern if None).
COMPANIONS: dict[Case, tuple[str, Case, str | None]] = {}


def device_of(suite: str) -> str:
    return DEVICES.get(suite, "cpu")


def add(suite: str, *cases: Case, quick: bool = False) -> None:
    """Register cases under a suite."""
    known = SUITES.setdefault(suite, [])
    known += [case for case in dict.fromkeys(cases) if case not in known]
    if quick:
        QUICK.update((device_of(suite), case) for case in cases)


def sweep(suite: str, title: str, axis: str, points: dict[object, Case], quick: tuple = ()) -> None:
    """Register cases and the line through them; `quick` lists the points that --quick measures too."""
    add(suite, *points.values())
    QUICK.update((device_of(suite), points[point]) for point in quick)
    SWEEPS.append(Sweep(title, axis, tuple(points.items()), device_of(suite)))


def target(suite: str, *targets: Target) -> None:
    """Register promises and their cases."""
    for promise in targets:
        add(suite, promise.case, quick=promise.judged)
        TARGETS.append(replace(promise, device=device_of(suite)))


def companion(case: Case, label: str, other: Case, by: str | None = None) -> None:
    """Time `other` in turn with `case`, computed by a rival if one is named."""
    COMPANIONS[case] = (label, other, by)


def suites_of(case: Case) -> list[str]:
    return [suite for suite, cases in SUITES.items() if case in cases]


def select(
    suites: list[str] | None = None, only: str | None = None, quick: bool = False, device: str = "cpu"
) -> list[Case]:
    """Cases of the suites whose name contains `only`, each once, in order of registration.

    If no suite is named: of all suites that are for the device.
    """
    suites = suites or [suite for suite in SUITES if device_of(suite) == device]
    cases = dict.fromkeys(case for suite in suites for case in SUITES[suite])
    return [case for case in cases if (not quick or (device, case) in QUICK) and (only is None or only in case.name)]
