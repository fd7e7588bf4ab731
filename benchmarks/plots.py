"""PNG plots of a run: time along each sweep with the rivals and the floor, and how near to its floor each case is."""

from __future__ import annotations

import io
from pathlib import Path

from benchmarks import machine, registry
from benchmarks.records import Results, first_run, write_beside
from benchmarks.registry import Sweep

COLORS = {
    "mm loop": "#e08e45",
    "mm loop on runs": "#c9b037",
    "gather + einsum": "#8f6bb3",
    "peft mixed batch": "#d05f6f",
    "vllm cpu": "#5b9a68",
    "vllm triton": "#5b9a68",
    "sglang chunked": "#3d8b8b",
    "punica bgmv": "#a0522d",
}
OURS = "#2f6db5"
BACKENDS = {"lorakern cuda": "#7fb2e5", "lorakern triton": "#12355b"}
# File name to the axis of the sweeps that it shows.
LINES = {"time_batch.png": "tokens", "time_rank.png": "rank", "time_adapters.png": "adapters"}
LABELS = {"tokens": "tokens in the batch", "rank": "rank", "adapters": "distinct adapters in the batch"}


def write(folder: Path, results: Results) -> list[Path]:
    """Write the plots that the measured cases allow into `folder`, and return their paths."""
    folder.mkdir(exist_ok=True)
    written, device = [], results.machine["device"]
    before = "" if device == "cpu" else f"{machine.file_name(results.machine)}-"
    for name, axis in LINES.items():
        sweeps = [s for s in registry.SWEEPS if s.axis == axis and len(measured(s, results)) > 1]
        if sweeps:
            written.append(_save(_sweeps(sweeps, results), folder / f"{before}{name}"))
    if any("seconds" in first_run(record)[1] for record in results.records.values()):
        written.append(_save(_fractions(results), folder / f"{before}floors.png"))
    return written


def measured(sweep: Sweep, results: Results) -> list[tuple[object, dict]]:
    """(point, record) of the points of a sweep that were measured; none if it is for another device."""
    if sweep.device != results.machine["device"]:
        return []
    found = [(point, results.records.get(case.name)) for point, case in sweep.points]
    return [(point, record) for point, record in found if record and "seconds" in first_run(record)[1]]


def _figure(width: float, height: float):
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained", dpi=130)


def _save(figure, path: Path) -> Path:
    image = io.BytesIO()
    figure.savefig(image, format="png")
    write_beside(path, image.getvalue())
    return path


def _sweeps(sweeps: list[Sweep], results: Results):
    columns = 2 if len(sweeps) in (2, 4) else min(3, len(sweeps))
    rows = -(-len(sweeps) // columns)
    figure = _figure(5.2 * columns, 4.2 * rows + 0.6)
    grid = figure.subplots(rows, columns, squeeze=False).flatten()
    legend = {}
    for axes, sweep in zip(grid, sweeps, strict=False):
        _draw(axes, sweep, measured(sweep, results))
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            legend.setdefault(label, handle)
    for axes in grid[len(sweeps) :]:
        axes.set_visible(False)
    figure.legend(
        legend.values(),
        legend.keys(),
        loc="outside lower center",
        ncols=7 if columns > 1 else 3,
        frameon=False,
        fontsize=9,
    )
    return figure


def _draw(axes, sweep: Sweep, points: list[tuple[object, dict]]) -> None:
    names = list(dict.fromkeys(name for _, record in points for name in record["runs"]))
    for name in names:
        runs = [(point, record["runs"].get(name, {})) for point, record in points]
        runs = [(point, run) for point, run in runs if "seconds" in run and "companion" not in run]
        if not runs:
            continue
        xs, ys = [point for point, _ in runs], [run["seconds"] * 1e6 for _, run in runs]
        mine = runs[0][1]["ours"]
        color = BACKENDS.get(name, OURS) if mine else COLORS.get(name, "#777777")
        style = {"linewidth": 2.4, "zorder": 5} if mine and name not in BACKENDS else {"linewidth": 1.3}
        axes.plot(xs, ys, marker="o", markersize=4.5, color=color, label=name, **style)
        low, high = ([run[key] * 1e6 for _, run in runs] for key in ("p25", "p75"))
        axes.fill_between(xs, low, high, color=color, alpha=0.15, linewidth=0)
    floors = [record["floor"]["seconds"] * 1e6 for _, record in points]
    axes.plot([p for p, _ in points], floors, linestyle="--", color="#444444", linewidth=1.3, label="floor")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    ticks = [point for point, _ in points]
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()
    axes.yaxis.set_major_formatter(lambda value, _: _round_duration(value * 1e-6))
    axes.set_xlabel(LABELS[sweep.axis])
    axes.set_title(sweep.title, fontsize=10)
    axes.grid(True, axis="y", color="#e4e4e4", linewidth=0.7)
    axes.spines[["top", "right"]].set_visible(False)


def _round_duration(seconds: float) -> str:
    unit, name = next(pair for pair in ((1, "s"), (1e-3, "ms"), (0, "us")) if seconds >= pair[0] * 0.999)
    return f"{seconds / (unit or 1e-6):.3g} {name}"


def _fractions(results: Results):
    """A bar a case, in groups of a suite, as far as the floor is the bar's full length."""
    bars = []
    for suite, cases in registry.SUITES.items():
        for case in cases:
            record = results.records.get(case.name)
            first_suite = record and registry.suites_of(case)[0] == suite
            if first_suite and case.op != "dispatch" and "seconds" in (run := first_run(record)[1]):
                bars.append((case.name, run["of_floor"], record["floor"]["bound"]))
    figure = _figure(9.5, 1.6 + 0.2 * len(bars))
    axes = figure.subplots()
    colors = {"bytes": OURS, "operations": "#7fb2e5"}
    for place, (_, fraction, bound) in enumerate(bars):
        axes.barh(place, min(fraction, 1.25), 0.72, color=colors[bound])
        axes.annotate(
            f"{fraction:.0%}", (min(fraction, 1.25), place), (3, 0), textcoords="offset points", va="center", fontsize=7
        )
    axes.axvline(1.0, color="#444444", linestyle="--", linewidth=1.2)
    axes.set_yticks(range(len(bars)), [name for name, _, _ in bars], fontsize=7)
    axes.set_ylim(len(bars) - 0.4, -0.6)
    axes.set_xlim(0, 1.32)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.set_xlabel("fraction of the floor reached (1 = the machine's limit)")
    handles = [axes.barh(0, 0, color=color) for color in colors.values()]
    labels = ["floor: bytes over the bandwidth", "floor: operations over torch.mm's FLOP/s"]
    figure.legend(handles, labels, loc="outside upper center", ncols=2, frameon=False, fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    return figure
