"""The page and the plot of IterIS on the skill adapters."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from pathlib import Path

from benchmarks.skills.iteris import ALPHA, BASE, LAST, LORA, OWN, REGMEAN, SWEEPS, WAYS, Results
from benchmarks.skills.results import chain, spread, table, told, write_page

HOW = """\
Four skill adapters in one model, merged from {samples} questions of each with their answers, from the training split.
Exact match of greedy answers on {count} held-out questions a skill and seed, in bfloat16, every merge folded into the
weights and rounded once; the merges themselves are computed in float32. A seed draws the samples and the questions.
Numbers are means over {runs} runs with the standard deviation over the seeds.

Weight average: A and B averaged apart from each other. Mean of the updates: cat with weights 1/4. Task arithmetic:
cat with weights 0.4. TIES: density 0.2, weights 1, in each module the largest rank among the four adapters. RegMean:
one sweep, lambda = 1. IterIS: lambda of the full weights; alpha {alpha:g} for both (the default). The LoRA has one
rank in all modules, the largest of any module of the four adapters. The objective is that of IterIS, of the merged
model in its own features, also for RegMean, which does not minimise it."""
ORDER = ("mean of the updates", REGMEAN, LAST)


def write(folder: Path, results: Results) -> Path:
    """Write `iteris.md` and `iteris.png` into a folder; `iteris_notes.md` there ends the page."""
    return write_page(folder, "iteris", results, page, plot(results))


def page(results: Results, notes: str = "") -> str:
    wanted, runs = results.settings, results.runs
    how = HOW.format(samples=wanted.samples, count=wanted.count, runs=len(runs), alpha=ALPHA)
    out = ["# Skill adapters merged by IterIS", "", how, ""]
    if unfinished := len(list(results.missing())):
        out += [f"**Unfinished: {unfinished} of {len(runs) + unfinished} runs are not measured yet.**", ""]
    if not runs:
        return "\n".join(out)
    rows = []
    for way in (*WAYS, OWN, BASE):
        values = [objective for run in runs if (objective := objective_of(run, way)) is not None]
        rows.append([way, told(spread(exact(results, way))), f"{statistics.mean(values):.3g}" if values else ""])
    out += table(["merge", "exact match", "objective"], rows)
    out += ["", f"The LoRA keeps {statistics.mean(run['energy'] for run in runs):.0%} of the energy.", ""]
    out += [*_orders(results), "", "![exact match and objective](iteris.png)", "", "## Set by set, skill by skill", ""]
    for skills in wanted.sets:
        of_set = [run for run in runs if tuple(run["skills"]) == skills]
        if of_set:
            rows = [
                [way, *(f"{_mean(run['exact'][way][skill] for run in of_set):.0%}" for skill in skills)] for way in WAYS
            ]
            out += [*table(["merge", *skills], rows), ""]
    return "\n".join(out) + (f"\n{notes}" if notes else "")


def objective_of(run: dict, way: str) -> float | None:
    """Of a merge, where it was measured."""
    if way == REGMEAN:
        return run["objectives"][REGMEAN]
    if way.startswith("IterIS") and way != LORA:
        return run["objectives"]["IterIS"][int(way.split()[1]) - 1]
    return None


def exact(results: Results, way: str) -> list[float]:
    """Mean over sets and skills, seed by seed."""
    seeds = sorted({run["seed"] for run in results.runs})
    return [_mean(_mean(r["exact"][way].values()) for r in results.runs if r["seed"] == seed) for seed in seeds]


def _mean(values: Iterable[float]) -> float:
    return statistics.mean(list(values))


def _orders(results: Results) -> list[str]:
    """Whether the objective falls below RegMean's, and whether the order of exact match is the paper's."""
    runs = results.runs
    below = sum(objective_of(run, LAST) < objective_of(run, REGMEAN) for run in runs)
    order = chain({way: _mean(exact(results, way)) for way in ORDER})
    return [
        f"- The objective after {SWEEPS[-1]} sweeps is below RegMean's in {below} of {len(runs)} runs.",
        f"- Exact match: {order}. In the paper: linear < RegMean < IterIS.",
    ]


def plot(results: Results):
    """Exact match of every merge as bars; the objective sweep by sweep beside it, a line a run."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.5, 4.2), layout="constrained", dpi=150)
    bars, lines = figure.subplots(1, 2, width_ratios=(1.25, 1))
    for y, way in enumerate(WAYS if results.runs else ()):
        values = exact(results, way)
        deviation = statistics.stdev(values) if len(values) > 1 else 0.0
        color = "#2f6db5" if way.startswith("IterIS") else "#9aa0a6"
        bars.barh(y, _mean(values), 0.74, xerr=deviation, color=color, error_kw={"elinewidth": 1, "ecolor": "#222222"})
        end = _mean(values) + deviation, y
        bars.annotate(f"{_mean(values):.0%}", end, (4, 0), textcoords="offset points", va="center", fontsize=8)
    if results.runs:
        bars.axvline(_mean(exact(results, OWN)), color="#444444", linestyle="--", linewidth=1.1, label=OWN)
        bars.legend(frameon=False, fontsize=8, loc="lower right")
    bars.set_yticks(range(len(WAYS)), WAYS, fontsize=8)
    bars.set_ylim(len(WAYS) - 0.4, -0.6)
    bars.set_xlim(0, 1.08)
    bars.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    bars.set_xlabel("exact match; bars: standard deviation over seeds", fontsize=9)
    for run in results.runs:
        values = run["objectives"]["IterIS"]
        lines.plot(range(1, len(values) + 1), values, color="#2f6db5", linewidth=1.1, marker="o", markersize=3)
        lines.plot(0.6, run["objectives"][REGMEAN], color="#c8553d", marker="s", markersize=4, linestyle="")
    if results.runs:
        lines.plot([], [], color="#2f6db5", marker="o", markersize=3, label="IterIS, a line a run")
        lines.plot([], [], color="#c8553d", marker="s", markersize=4, linestyle="", label=REGMEAN)
        lines.set_yscale("log")
        lines.legend(frameon=False, fontsize=8)
    lines.set_xticks(range(1, SWEEPS[-1] + 1))
    lines.set_xlabel("sweep", fontsize=9)
    lines.set_ylabel("objective in the merged model", fontsize=9)
    for axes in (bars, lines):
        axes.spines[["top", "right"]].set_visible(False)
    return figure
