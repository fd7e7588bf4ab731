"""One run of the benchmarks, from options to files: what `python -m benchmarks` and `lorakern bench` both call."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks import cases, contenders, floors, machine, records, registry, report, runner  # noqa: F401
from benchmarks.gpu_rivals import rivals_on
from benchmarks.graphs import GPU_EFFORT
from benchmarks.records import Results
from benchmarks.timing import QUICK, Effort
from lorakern.errors import LorakernError

# --quick begins no further case after so many seconds: it ends in under 90 on a busy machine too.
QUICK_SECONDS = 65


@dataclass(frozen=True)
class Options:
    """What the command line says; the command lines document each."""

    suites: tuple[str, ...] = ()
    only: str | None = None
    quick: bool = False
    device: str = "cpu"
    rivals: bool = True  # time them too
    json: Path | None = None
    plots: Path | None = None
    results: Path | None = None
    compare: Path | None = None
    source: Path | None = None
    list: bool = False
    seconds: float | None = None  # begin no further case after so long


def run(options: Options) -> None:
    """List, measure or read results; print them and write what the options name.

    Raises:
        LorakernError: an option cannot be met: nothing has been measured then. Or a case failed, after all is written.
    """
    chosen = _chosen(options)
    if options.list:
        for case in chosen:
            print(f"{case.name}  ({', '.join(registry.suites_of(case))})")
        return
    records.check_target("--json", options.json)
    for option, folder in (("--plots", options.plots), ("--results", options.results)):
        records.check_target(option, folder, folder=True)
    if options.plots is not None and importlib.util.find_spec("matplotlib") is None:
        raise LorakernError("bench: --plots needs the package matplotlib; run `pip install 'lorakern[bench]'`")
    old = records.read(options.compare, "--compare") if options.compare else None
    if options.source:
        results = records.read(options.source, "--from")
        for record in results.records.values():
            print(*report.case_lines(record), sep="\n")
    else:
        results = measure(chosen, options)
    print(*report.target_lines(results), sep="\n")
    if old is not None:
        print(*report.compare_lines(old, results), sep="\n")
    if options.json:
        records.write(options.json, results)
    if options.plots:
        from benchmarks import plots

        plots.write(options.plots, results)
    if options.results:
        from benchmarks import results as page

        page.write(options.results, results)
    if results.failed and not options.source:
        raise LorakernError(f"bench: {len(results.failed)} cases failed, among them {next(iter(results.failed))}")


def _chosen(options: Options) -> list[registry.Case]:
    if unknown := [suite for suite in options.suites if suite not in registry.SUITES]:
        raise LorakernError(f"bench: --suite must be one of {', '.join(registry.SUITES)}; got {unknown[0]!r}")
    if options.device not in ("cpu", "cuda"):
        raise LorakernError(f"bench: --device must be cpu or cuda; got {options.device!r}")
    if options.device == "cuda" and not torch.cuda.is_available() and not options.list:
        raise LorakernError("bench: --device cuda needs a CUDA device, and torch sees none; use --device cpu")
    if options.device == "cuda" and not options.list:
        contenders.ours("cuda")
    chosen = registry.select(list(options.suites), options.only, options.quick, options.device)
    if not chosen and not options.source:
        raise LorakernError(f"bench: no case is left by --suite and --only {options.only!r}; --list shows all names")
    return chosen


def measure(chosen: list[registry.Case], options: Options) -> Results:
    """Measure the cases, printing each as it is done."""
    if options.device == "cpu":
        return _measure(chosen, options, QUICK if options.quick else Effort())
    # Graphs cannot be captured on the default stream, and a backward runs on the stream of its forward.
    with torch.cuda.stream(torch.cuda.Stream()):
        return _measure(chosen, options, GPU_EFFORT)


def _measure(chosen: list[registry.Case], options: Options, effort: Effort) -> Results:
    torch.manual_seed(0)
    start = time.monotonic()
    probe = floors.bandwidth_probe(options.device)
    results = Results(
        machine.describe(options.device), floors.measure(options.device, probe, effort), quick=options.quick
    )
    rivals = rivals_on(options.device) if options.rivals else {}
    seconds = options.seconds or (QUICK_SECONDS if options.quick else float("inf"))
    with _progress(len(chosen)) as (say, step):
        for line in report.header_lines(results):
            say(line)
        for place, case in enumerate(chosen):
            if time.monotonic() - start > seconds:
                say(f"\n{seconds:g} seconds are over: {len(chosen) - place} of {len(chosen)} cases are left out")
                break
            step(case.name, 0)
            try:
                record = runner.measure(case, results.floors, probe, effort, rivals)
            except Exception as error:  # what the other cases gave is not to be lost
                results.failed[case.name] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
                say(f"\n{case.name}\n  failed: {results.failed[case.name]}")
                continue
            results.records[case.name] = record
            for line in report.case_lines(record):
                say(line)
            if options.json:  # each time, so that a run that is cut off leaves what it has
                records.write(options.json, results)
            step(case.name, 1)
        results.floors_after = floors.measure(options.device, probe, effort)
        say("")
        say("at the end: " + "; ".join(report.floor_lines(results.floors_after)))
    return results


@contextmanager
def _progress(total: int) -> Iterator[tuple[Callable[[str], None], Callable[[str, int], None]]]:
    """say(line) and step(name, advance): a bar of rich under the lines on a terminal, else the lines alone."""
    try:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
    except ImportError:
        Console = None
    console = Console(highlight=False, soft_wrap=True) if Console else None
    if console is None or not console.is_terminal:
        yield lambda line: print(line, flush=True), lambda name, advance: None
        return
    columns = BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}")
    # Drawn only between cases: a thread that redraws would take time from what is being measured.
    with Progress(*columns, console=console, auto_refresh=False) as bar:
        task = bar.add_task("", total=total)

        def step(name, advance):
            bar.update(task, description=name, advance=advance, refresh=True)

        yield lambda line: console.print(line, markup=False), step
