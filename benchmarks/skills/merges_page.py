"""The page and the plot of the merged skill adapters."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Iterable
from pathlib import Path

from benchmarks.skills.merges import BASE, OWN, WAYS, Results, Way
from benchmarks.skills.results import Spread, chain, spread, table, told, write_page

HOW = """\
Exact match of greedy answers on held-out questions, in bfloat16. Pairs of the skill adapters are merged, and all of
them into one; a merged adapter is asked the questions of each skill in it. No skill's data are used, nothing is tuned.
A seed draws other questions, and what LEGO and DARE draw; numbers are means with the standard deviation over the
{seeds} seeds, of {count} questions a skill and seed. r is, module by module, the largest rank among the adapters; rows
without a rank have what their method gives: r for the weight average, the sum of the ranks for the other three.

Weight average: A and B averaged apart from each other. Mean of the updates: cat with weights 1/N. Task arithmetic: cat
with weights 0.4. TIES: density 0.2, weights 1. (0.4, and 0.2 with 1, are what TIES-Merging takes where nothing can be
tuned.) DARE: half of the entries of the true updates dropped, weights 0.4. svd: the sum, at its best approximation.
LEGO: k-means++, 10 starts, rank as the number of clusters."""
EXPECTED = ("weight average", "task arithmetic", "TIES, r", "LEGO, r")
COLORS = {"lego": "#2f6db5", "other": "#9aa0a6"}


def write(folder: Path, results: Results) -> Path:
    """Write `merges.md` and `merges.png` into a folder; `merges_notes.md` there ends the page."""
    return write_page(folder, "merges", results, page, plot(results))


def page(results: Results, notes: str = "") -> str:
    wanted = results.settings
    pairs, whole = pair_sets(results), whole_set(results)
    unfinished = len(list(results.missing()))
    out = ["# Merged skill adapters", "", HOW.format(seeds=wanted.seeds, count=wanted.count), ""]
    if unfinished:
        out += [f"**Unfinished: {unfinished} of {len(wanted.sets)} sets are not measured yet.**", ""]
    rows = [[way.name, *(told(of(results, way.name)) for of in (of_pairs, weaker_of_pairs, of_all))] for way in WAYS]
    for name in (OWN, BASE):
        rows.append([name, told(alone(results, name, pairs)), "", told(alone(results, name, [whole] if whole else []))])
    out += table(["merge", f"{len(pairs)} pairs", "weaker skill of a pair", f"all {len(wanted.skills)}"], rows)
    out += ["", *_order(results), "", "![exact match of every merge](merges.png)", ""]
    if whole:
        out += [f"## All {len(wanted.skills)} skills in one adapter, skill by skill", ""]
        rows = [
            [way.name, *(f"{statistics.mean(whole['scores'][way.name][s]):.0%}" for s in wanted.skills)] for way in WAYS
        ]
        rows.append([OWN, *(f"{statistics.mean(results.alone[s][OWN]):.0%}" for s in wanted.skills)])
        out += [*table(["merge", *wanted.skills], rows), ""]
    return "\n".join(out) + (f"\n{notes}" if notes else "")


def pair_sets(results: Results) -> list[dict]:
    return [record for record in results.sets if len(record["skills"]) == 2]


def whole_set(results: Results) -> dict | None:
    return next((record for record in results.sets if len(record["skills"]) > 2), None)


def of_pairs(results: Results, way: str) -> Spread | None:
    """Mean over pairs and their skills."""
    return _over_seeds(results, pair_sets(results), way, statistics.mean)


def weaker_of_pairs(results: Results, way: str) -> Spread | None:
    """Mean over pairs of the skill that is answered worse."""
    return _over_seeds(results, pair_sets(results), way, min)


def of_all(results: Results, way: str) -> Spread | None:
    """Mean over the skills of the one adapter of all."""
    whole = whole_set(results)
    return _over_seeds(results, [whole] if whole else [], way, statistics.mean)


def alone(results: Results, name: str, records: Iterable[dict]) -> Spread | None:
    """What the skills of these sets reach by their own adapters, or without any."""
    skills = [skill for record in records for skill in record["skills"]]
    if not skills:
        return None
    return spread([statistics.mean(results.alone[skill][name][i] for skill in skills) for i in _seeds(results)])


def _seeds(results: Results) -> range:
    return range(results.settings.seeds)


def _over_seeds(
    results: Results, records: list[dict], way: str, of_skills: Callable[[list[float]], float]
) -> Spread | None:
    if not records:
        return None
    scores = [list(record["scores"][way].values()) for record in records]
    return spread([statistics.mean(of_skills([s[i] for s in skills]) for skills in scores) for i in _seeds(results)])


def _order(results: Results) -> list[str]:
    """Whether the order of the LoRA-LEGO paper comes out."""
    lines = []
    for title, of in (("pairs", of_pairs), ("all skills", of_all)):
        spreads = {way: of(results, way) for way in EXPECTED}
        if None in spreads.values():
            continue
        means = {way: round(measured[0], 3) for way, measured in spreads.items()}
        order = sorted(EXPECTED, key=means.__getitem__)
        same = all(means[lower] < means[higher] for lower, higher in itertools.pairwise(EXPECTED))
        order = chain({way: means[way] for way in order})
        lines.append(f"- Order on {title}: {order}; {'as in' if same else 'not that of'} the paper.")
    return [*lines, f"- The paper's order: {' < '.join(EXPECTED)}."] if lines else []


def plot(results: Results):
    """Bars of every merge, for pairs and for all skills."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.5, 1.6 + 0.27 * len(WAYS)), layout="constrained", dpi=150)
    whole = whole_set(results)
    panels = [(f"{len(pair_sets(results))} pairs", of_pairs, pair_sets(results))]
    panels += [(f"all {len(results.settings.skills)} skills in one", of_all, [whole])] if whole else []
    grid = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axes, (title, of, records) in zip(grid, panels, strict=True):
        for y, way in enumerate(WAYS):
            _bar(axes, y, way, of(results, way.name))
        for name, style in ((OWN, "--"), (BASE, ":")):
            level = alone(results, name, records)
            if level is not None:
                axes.axvline(level[0], color="#444444", linestyle=style, linewidth=1.1, label=name)
        axes.set_title(title, fontsize=10)
        axes.set_xlim(0, 1.08)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        axes.spines[["top", "right"]].set_visible(False)
    grid[0].set_yticks(range(len(WAYS)), [way.name for way in WAYS], fontsize=8)
    grid[0].set_ylim(len(WAYS) - 0.4, -0.6)
    figure.supxlabel("exact match; bars: standard deviation over seeds", fontsize=9)
    figure.legend(*grid[0].get_legend_handles_labels(), loc="outside upper right", ncols=2, frameon=False, fontsize=8)
    return figure


def _bar(axes, y: int, way: Way, measured: Spread | None) -> None:
    if measured is None:
        return
    color = COLORS.get(way.method, COLORS["other"])
    axes.barh(
        y, measured[0], 0.74, xerr=measured[1] or 0.0, color=color, error_kw={"elinewidth": 1, "ecolor": "#222222"}
    )
    end = measured[0] + (measured[1] or 0.0), y
    axes.annotate(f"{measured[0]:.0%}", end, (4, 0), textcoords="offset points", va="center", fontsize=7)
