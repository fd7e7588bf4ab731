"""`lorakern check`: is an adapter the weighted sum of others?"""

import json
import math
from collections.abc import Sequence

import torch

from lorakern.adapters import AdapterFile
from lorakern.commands.console import Console
from lorakern.commands.sources import on_device, opened, sources
from lorakern.ops import EquivalenceReport, ModuleCheck, check_concat_sum

SHOWN = 10
_MODULES = 32  # held in memory at a time


def run(
    names: Sequence[str],
    merged: str,
    *,
    weights: list[float] | None = None,
    rtol: float | None = None,
    probe: bool = False,
    seed: int = 0,
    device: torch.device | None = None,
    every: bool = False,
    console: Console,
) -> bool:
    """`lorakern.check_concat_sum` of adapters in their files, some modules at a time; whether `merged` passes.

    Raises `LorakernError` for an adapter that cannot be read, shapes that do not fit, or another number of weights.
    NaN and infinity are no errors here: the module that holds them fails.
    """
    with opened(sources([*names, merged]), check_finite=False) as (*adapters, result):
        report = _report(adapters, result, device, console, weights=weights, rtol=rtol, probe=probe, seed=seed)
    ranked = report.ranked()
    shown = ranked if every else ranked[:SHOWN]
    verdict, *rest = str(report).splitlines()
    told = [line.strip() for line in rest if line.lstrip().startswith(("missing", "extra"))]
    more = [f"{len(ranked) - len(shown)} more modules; --all shows them"] if len(shown) < len(ranked) else []
    console.report(json.loads(report.to_json()), *([_table(shown, probe)] if shown else []), *more, *told, verdict)
    return report.passed


def _report(
    adapters: Sequence[AdapterFile], merged: AdapterFile, device: torch.device | None, console: Console, **options
) -> EquivalenceReport:
    modules = list(dict.fromkeys(module for adapter in (*adapters, merged) for module in adapter))
    found: dict[str, ModuleCheck] = {}
    missing: list[str] = []
    extra: list[str] = []
    with console.progress("checking") as progress:
        for start in range(0, len(modules), _MODULES):
            part = modules[start : start + _MODULES]
            *held, result = (
                {module: on_device(adapter[module], device) for module in part if module in adapter}
                for adapter in (*adapters, merged)
            )
            report = check_concat_sum(held, result, **options)
            found |= report.modules
            missing += report.missing
            extra += report.extra
            progress(start + len(part), len(modules), part[-1])
    return EquivalenceReport(found, tuple(missing), tuple(extra))


def _table(checks: Sequence[ModuleCheck], probe: bool):
    from rich.table import Table
    from rich.text import Text

    table = Table("module", "error", "allowed", "row", "column", *(["probe"] if probe else []), "", title="Worst first")
    for check in checks:
        lines = [_number(value) for value in (check.rows, check.columns)]
        probed = [_number(check.probe)] if probe else []
        verdict = Text("pass", "green") if check.passed else Text(check.note.partition("; ")[0], "bold red")
        table.add_row(Text(check.module), _number(check.error), _number(check.bound), *lines, *probed, verdict)
    return table


def _number(value: float | None) -> str:
    return "-" if value is None else "infinite" if math.isinf(value) else f"{value:.1e}"
