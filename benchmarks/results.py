"""The results page: a run as markdown, with its plots and, where they exist, hand-written notes at the end."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from benchmarks import machine, plots, records, registry, report
from benchmarks.records import Results, first_run
from benchmarks.registry import Sweep

HOW = """\
Times are medians over the repetitions of one run, all contenders in turns in one process; the spread is the middle
half. "Cold" rotates the weights over copies that exceed four times the last-level cache, so that they come from memory;
"warm" repeats one copy. A cold case's floor is the larger of its bytes over the read bandwidth, measured in turns with
that very case, and its operations over torch.mm's FLOP/s; a warm case's is the latter alone. Bytes: the weights in use
at their true ranks and x once, y read and written once. Every result was checked against the float64 reference before
it was timed, at most 128 rows of it in large cases; no speed is given for a wrong result. The grouping of rows by
adapter (`lk.plan` here, index lists for the mm loop) is made outside of the timed calls, except in the dispatch cases.
The backward is timed without the forward before it."""
HOW_ON_A_GPU = """\
Times are medians over replays of captured CUDA graphs of many calls, between CUDA events, all contenders in turns in
one process; the spread is the middle half. A contender that cannot be captured is timed as Python launches it, and
named below. "Cold" rotates the weights over copies that exceed four times the L2, so that they come from memory; "warm"
repeats one copy. The floor is the larger of the bytes over the copy bandwidth (read and written), measured in turns
with a cold case, and of the operations over torch.mm's FLOP/s; where all bytes fit in the L2 and the case is warm, the
latter alone. Bytes: the weights in use at their true ranks and x once, y read and written once. Every result was
checked against the float64 reference before it was timed, at most 128 rows of it in large cases; no speed is given for
a wrong result. What depends on the routing alone (`lk.plan`, index lists, vLLM's metadata) is made outside of the timed
calls. The backward is timed without the forward before it. "lorakern" is the backend that it chooses by itself."""


def write(folder: Path, results: Results) -> Path:
    """Write `<name>.md`, `<name>.jsonl` and, with matplotlib, the plots; `<name>_notes.md` there ends the page.

    The name is `machine.file_name`: "cpu", or "gpu-" and the device's name.
    """
    folder.mkdir(exist_ok=True)
    stem = machine.file_name(results.machine)
    records.write(folder / f"{stem}.jsonl", results)
    if importlib.util.find_spec("matplotlib") is None:
        print("no plots: matplotlib is not installed")
        images = []
    else:
        images = plots.write(folder, results)
    notes = folder / f"{stem}_notes.md"
    path = folder / f"{stem}.md"
    records.write_beside(path, page(results, images, notes.read_text(encoding="utf-8") if notes.is_file() else ""))
    return path


def page(results: Results, images: list[Path] = (), notes: str = "") -> str:
    """The page as markdown."""
    quick = ["A quick run: few repetitions, and some of the cases only.", ""] if results.quick else []
    on_cpu = results.machine["device"] == "cpu"
    title = "this CPU" if on_cpu else results.machine["device_name"]
    how = HOW if on_cpu else HOW_ON_A_GPU
    out = [f"# lorakern on {title}", "", *quick, how, "", "## Machine and floors", ""]
    out += [f"- {line}" for line in machine.lines(results.machine)]
    out += ["", *_table(["floor", "at the start", "at the end"], _floors(results)), ""]
    out += ["## Targets", "", *_table(["case", "target", "measured", "time", "verdict"], _targets(results)), ""]
    out += _dispatch(results)
    out += _crossovers(results)
    if images:
        out += ["## Plots", "", *(f"![{image.stem.replace('_', ' ')}]({image.name})" for image in images), ""]
    out += ["## Sweeps", "", "Times of the rivals are multiples of ours.", ""]
    for sweep in registry.SWEEPS:
        out += _sweep(sweep, results)
    out += _others(results)
    return "\n".join(out).rstrip() + "\n" + (f"\n{notes.strip()}\n" if notes.strip() else "")


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)]


def _floors(results: Results) -> list[list[str]]:
    """A row for each floor, at the start and at the end of the run."""
    lines = [[line.split("  ") for line in report.floor_lines(f)] for f in (results.floors, results.floors_after) if f]
    rows = [[first[0].strip(), first[-1].strip()] for first in lines[0]]
    return [[*row, lines[1][i][-1].strip() if len(lines) > 1 else ""] for i, row in enumerate(rows)]


def _targets(results: Results) -> list[list[str]]:
    rows = []
    for target, measured, word in report.target_rows(results):
        run = first_run(results.records[target.case.name])[1]
        kind = f" ({'cold' if target.case.cold else 'warm'})" if "cold" not in target.row and target.against else ""
        time = report.duration(run["seconds"]) if "seconds" in run else ""
        rows.append([target.row + kind, target.text, measured, time, f"**{word}**" if target.judged else word])
    return rows


def _dispatch(results: Results) -> list[str]:
    """A column for each layer of the way from Python to the kernel."""
    found = [results.records[case.name] for case in registry.SUITES["dispatch"] if case.name in results.records]
    if not found:
        return []
    names = list(dict.fromkeys(n for record in found for n, run in record["runs"].items() if "seconds" in run))
    rows = [[f"`{record['name']}`", *(_time(record["runs"].get(name, {})) for name in names)] for record in found]
    text = (
        'Medians of one call without a plan. "lorakern" is the whole of `lk.bgmv`; the C++ call is the last part of it.'
    )
    return ["## Dispatch", "", text, "", *_table(["case", *names], rows), ""]


def _crossovers(results: Results) -> list[str]:
    rows = [[f"`{name}`", f"{ratio:.2f}"] for name, ratio in report.crossovers(results)]
    text = "Time of the Triton kernels over that of the CUDA kernels. Under 1, Triton is faster."
    return ["## CUDA or Triton", "", text, "", *_table(["case", "Triton / CUDA"], rows), ""] if rows else []


def _time(run: dict) -> str:
    return report.duration(run["seconds"]) if "seconds" in run else ""


def _cells(record: dict, rivals: list[str]) -> list[str]:
    run = first_run(record)[1]
    spread = f"{report.duration(run['p25'])} .. {report.duration(run['p75'])}"
    ratios = [record["runs"].get(name, {}).get("ratio") for name in rivals]
    return [
        report.duration(run["seconds"]),
        spread,
        f"{run['gb_s']:.1f}",
        f"{run['gflop_s']:.0f}",
        f"{run['of_floor']:.0%}",
        f"{run['error']:.0e}",
        *("" if ratio is None else f"{ratio:.1f} x" for ratio in ratios),
    ]


HEAD = ["lorakern", "spread", "GB/s", "GFLOP/s", "of the floor", "error"]


def _rivals(found: list[dict]) -> list[str]:
    runs = [item for record in found for item in record["runs"].items()]
    return list(
        dict.fromkeys(n for n, run in runs if not run.get("ours") and "ratio" in run and "companion" not in run)
    )


def _sweep(sweep: Sweep, results: Results) -> list[str]:
    points = plots.measured(sweep, results)
    if not points:
        return []
    rivals = _rivals([record for _, record in points])
    rows = [[str(point), *_cells(record, rivals)] for point, record in points]
    return [f"### {sweep.title}", "", *_table([sweep.axis, *HEAD, *rivals], rows), ""]


def _others(results: Results) -> list[str]:
    """Cases that no sweep shows, and those that have no time."""
    sweeps = [sweep for sweep in registry.SWEEPS if sweep.device == results.machine["device"]]
    shown = {case.name for sweep in sweeps for _, case in sweep.points}
    shown |= {case.name for case in registry.SUITES["dispatch"]}
    left = [record for name, record in results.records.items() if name not in shown]
    timed = [record for record in left if "seconds" in first_run(record)[1]]
    rivals = _rivals(timed)
    out = []
    if timed:
        rows = [[f"`{record['name']}`", *_cells(record, rivals)] for record in timed]
        out += ["### Other cases", "", *_table(["case", *HEAD, *rivals], rows), ""]
    notes = [f"- `{name}`: {why}" for name, why in results.failed.items()]
    for name, record in results.records.items():
        for contender, run in record["runs"].items():
            if "seconds" not in run and (run.get("ours") or run["note"].startswith(("wrong", "failed"))):
                notes.append(f"- `{name}`: {contender}: {run['note']}")
    out += ["### Without a time", "", *notes, ""] if notes else []
    return out + _uncaptured(results)


def _uncaptured(results: Results) -> list[str]:
    """The contenders whose times hold what Python costs, with the reasons and in how many cases."""
    found: dict[tuple[str, str], int] = {}
    for record in results.records.values():
        for contender, run in record["runs"].items():
            if "seconds" in run and "note" in run:
                found[contender, run["note"]] = found.get((contender, run["note"]), 0) + 1
    lines = [f"- {contender}, {count} cases: {note}" for (contender, note), count in found.items()]
    return ["### Outside of a graph", "", *lines, ""] if lines else []
