"""What `check_concat_sum` reports."""

import json
import math
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class ModuleCheck:
    """One module: is the merged update the weighted sum of the adapters' updates?

    Attributes:
        module: its name.
        error: ``||merged - sum||_F / ||sum||_F``; relative to the size of the terms where these cancel in the sum;
            infinite where a factor is not finite.
        bound: how large `error` may be: what rounding the merged factors to their dtype explains, or rtol.
        exact: whether `error` was computed exactly, as it is where it comes near its bound or exceeds it; else it is an
            estimate from random vectors, with a standard deviation of at most 18 % of it.
        rows: the error of the worst output row over what rounding explains there: more than 1 fails. None with rtol.
        columns: the same of the worst input column.
        outliers: how many weights of merged factors that are otherwise multiples of the adapters' are off by more than
            a quarter: any fails. None with rtol.
        probe: the error, relative like `error`, of what `bgmv` computes from random x; None without probes.
        probe_bound: how large `probe` may be.
        passed: whether all of these stay within their bounds.
        note: where the module fails, why.
    """

    module: str
    error: float
    bound: float
    exact: bool = False
    rows: float | None = None
    columns: float | None = None
    outliers: int | None = None
    probe: float | None = None
    probe_bound: float | None = None
    passed: bool = False
    note: str = ""

    @property
    def excess(self) -> float:
        """The largest share that the module takes of one of its bounds; above 1 it fails."""
        ratios = [self.error / self.bound if self.bound else math.inf if self.error else 0.0]
        ratios += [value for value in (self.rows, self.columns) if value is not None]
        ratios += [math.inf] if self.outliers else []
        if self.probe is not None:
            ratios.append(self.probe / self.probe_bound if self.probe_bound else math.inf)
        return max(math.inf if math.isnan(ratio) else ratio for ratio in ratios)


@dataclass(frozen=True)
class EquivalenceReport:
    """The outcome of `check_concat_sum`: a `ModuleCheck` for each module, and modules that only one side has.

    Attributes:
        modules: module name to `ModuleCheck`, of what both sides have.
        missing: modules of an adapter (with a weight other than 0) that the merged adapter has not.
        extra: modules of the merged adapter that no adapter has.

    >>> report = EquivalenceReport({"q": ModuleCheck("q", 1e-8, 2e-7, passed=True)}, missing=("v",))
    >>> report.passed, report.worst.module
    (False, 'q')
    >>> print(report)
    FAIL: 0 of 1 modules differ, 1 missing, 0 extra
      worst: q: error 1.0e-08 (bound 2.0e-07)
      missing: v
    """

    modules: dict[str, ModuleCheck]
    missing: tuple[str, ...] = ()
    extra: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether every module passes and none is missing or extra."""
        return not self.missing and not self.extra and not self.failed

    @property
    def failed(self) -> tuple[ModuleCheck, ...]:
        """The modules that do not pass, worst first."""
        return tuple(module for module in self.ranked() if not module.passed)

    @property
    def worst(self) -> ModuleCheck | None:
        """The module that exceeds its bounds most, or comes nearest to them; None if there is no module."""
        return next(iter(self.ranked()), None)

    def ranked(self) -> list[ModuleCheck]:
        """All modules, worst first: those that fail, and within both kinds by how much of their bounds they take."""
        return sorted(self.modules.values(), key=lambda module: (not module.passed, module.excess), reverse=True)

    def __str__(self) -> str:
        failed = self.failed
        counts = f"{len(failed)} of {len(self.modules)} modules differ, {len(self.missing)} missing"
        lines = [f"{'PASS' if self.passed else 'FAIL'}: {counts}, {len(self.extra)} extra"]
        if failed:
            lines += [f"  {_line(m)}" for m in failed[:_SHOWN]]
            lines += [f"  and {len(failed) - _SHOWN} more"] if len(failed) > _SHOWN else []
        elif self.worst:
            lines.append(f"  worst: {_line(self.worst)}")
        for label, names in (("missing", self.missing), ("extra", self.extra)):
            more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
            lines += [f"  {label}: {', '.join(names[:_SHOWN])}{more}"] if names else []
        return "\n".join(lines)

    def to_json(self) -> str:
        """The report as one JSON object; numbers that are infinite or NaN become null."""

        def plain(value):
            return None if isinstance(value, float) and not math.isfinite(value) else value

        modules = [{name: plain(value) for name, value in asdict(m).items()} for m in self.modules.values()]
        whole = {"passed": self.passed, "modules": modules, "missing": self.missing, "extra": self.extra}
        return json.dumps(whole, allow_nan=False)


_SHOWN = 10  # modules that a printed report names


def _line(module: ModuleCheck) -> str:
    note = f"; {module.note}" if module.note else ""
    return f"{module.module}: error {module.error:.1e} (bound {module.bound:.1e}){note}"
