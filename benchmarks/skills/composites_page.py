"""The page and the plot of the composite tasks."""

from __future__ import annotations

import itertools
import random
import statistics
from collections.abc import Iterable
from pathlib import Path

from benchmarks.skills.composites import composite
from benchmarks.skills.composites_learn import LEARNED
from benchmarks.skills.composites_run import FIRST, KINDS, SECOND, STATIC, WAYS, Results
from benchmarks.skills.results import Spread, chain, spread, table, told, write_page

HOW = """\
Exact match of greedy answers of SmolLM2-135M-Instruct to held-out questions that take two of its skill adapters at
once, in bfloat16, on a CPU. A composite asks for what the second skill makes of the first one's answer. One rule writes
the prompts: what the second skill is asked with, a colon, and the first skill's own question with a small first letter.
{count} questions a composite, and {own} of each of its skills alone (`first`, `second`) to see what is kept. A seed
draws other questions, other examples, and what a method draws; numbers are means with the standard deviation over the
seeds.

No data: **uniform mixture** is the mean of the updates; **linear** is PEFT's, which merges A and B apart from each
other and so has cross terms; **task arithmetic** adds the updates with the weight named. TIES and DARE of PEFT have
density 0.75 and weights 1, as in the LoRA Soups paper; those below them work on the true updates at twice the larger
rank, with density 0.2 and weights 1, and with density 0.5 and weights 0.4.

Learned: **LoraHub** searches one weight for each adapter by {optimizer} on {shots} questions of the composite:
{candidates} candidates, bounds 1.5, L1 0.05. **CAT** learns a weight for each adapter and module: softmax from the mean
of the adapters, free from weights 1; {cat_epochs} passes over {examples} examples in batches of 8 at a rate of
{cat_rate}; the examples are questions of the skills alone, half of each, or of the composite. **data-mix LoRA** is one
new LoRA with the modules of both and the sum of their ranks, trained on new questions of the skills alone, at most
{mix_steps} batches of 8, half of each; the **LoRA on the composite examples** is such a one on the composite examples
of CAT, {lora_epochs} passes. Both have the rate of the skill adapters, 2e-3, and end when 20 batches in a row average
98 % right."""
LEARNED_TEXT = """\
Means over composites and seeds. Weights: of the first and of the second adapter, for CAT the mean over the modules that
an adapter has; softmax gives 1 to a module that one adapter alone has. Losses: of LoraHub the objective without any
adapter and of its best candidate, else of the first and of the last batch."""
PAPER = "the better single skill", "the best merge without data", "data-mix LoRA"
CATS = "CAT softmax, skills' data", "CAT free, skills' data"
SHORT = {"composite": "composite", FIRST: "first", SECOND: "second"}
COLORS = {"CAT": "#2f6db5", "Lora": "#3f9b76", "data": "#c98a2b", "LoRA": "#c98a2b"}
PLAIN = "#9aa0a6"
MARKERS = "osD^vP"


def write(folder: Path, results: Results) -> Path:
    """Write `composites.md` and `composites.png` into a folder; `composites_notes.md` there ends the page."""
    return write_page(folder, "composites", results, page, plot(results))


def page(results: Results, notes: str = "") -> str:
    wanted, names = results.settings, measured(results)
    values = {"count": wanted.count, "own": wanted.own, "optimizer": results.said["optimizer"]}
    out = ["# Composite tasks", "", HOW.format(**values, **results.said["budget"]), ""]
    missing = len(results.missing())
    if missing:
        done = f"{len(results.records)} of {len(wanted.parts())} composites and seeds are measured"
        out += [f"**Unfinished: {done}; the numbers are of those.**", ""]
    rows = []
    for name in wanted.composites:
        prompt, answer = composite(name).draw(random.Random(0))
        rows.append([name, prompt, f"`{answer}`"])
    out += [*table(["composite", "a question", "its answer"], rows), ""]
    rows = []
    for way in WAYS:
        of_each = (of(results, way, "composite", [name]) for name in names)
        kept = (of(results, way, kind, names) for kind in KINDS)
        rows.append([way, *map(told, of_each), *map(told, kept)])
    out += table(["way", *names, "mean", *(SHORT[kind] for kind in KINDS[1:])], rows)
    out += ["", *_order(results), "", "![exact match of every way](composites.png)", ""]
    out += ["## What was learned", "", LEARNED_TEXT]
    out += [
        "",
        *table(["way", "weights", "first loss", "last loss", "steps"], [_facts(results, way) for way in LEARNED]),
    ]
    return "\n".join([*out, ""]) + (f"\n{notes}" if notes else "")


def measured(results: Results) -> list[str]:
    """The composites of which anything is measured, in their order."""
    known = {record["composite"] for record in results.records}
    return [name for name in results.settings.composites if name in known]


def of(results: Results, way: str, kind: str, names: Iterable[str]) -> Spread | None:
    """Mean over composites, and its standard deviation over the seeds for which all are measured, None for one seed."""
    by_part = {(r["composite"], r["seed"]): r["scores"][way][kind] for r in results.records}
    seeds = [s for s in range(results.settings.seeds) if all((name, s) in by_part for name in names)]
    if not names or not seeds:
        return None
    means = [statistics.mean(by_part[name, seed] for name in names) for seed in seeds]
    return spread(means)


def _order(results: Results) -> list[str]:
    """Whether the order of the LoRA Soups paper comes out, for either form of CAT."""
    names = measured(results)
    means = {way: mean[0] for way in WAYS if (mean := of(results, way, "composite", names)) is not None}
    if not means:
        return []
    lines = []
    for cat in CATS:
        expected = *PAPER, cat
        best = max(means[way] for way in (FIRST, SECOND)), max(means[way.name] for way in STATIC)
        # the printed digits decide what is equal
        shown = [round(value, 3) for value in (*best, means[PAPER[-1]], means[cat])]
        places = sorted(range(4), key=shown.__getitem__)
        same = all(lower < higher for lower, higher in itertools.pairwise(shown))
        order = chain({expected[place]: shown[place] for place in places})
        lines.append(f"- Order: {order}; {'as in' if same else 'not that of'} the paper.")
    return [*lines, f"- The paper's order: {' < '.join(PAPER)} < CAT."]


def _facts(results: Results, way: str) -> list[str]:
    facts = [record["learned"][way] for record in results.records]
    weights = [fact["weights"] for fact in facts if "weights" in fact]
    pair = ", ".join(f"{statistics.mean(column):.2f}" for column in zip(*weights, strict=True)) if weights else "-"
    told = [way, pair]
    for key, form in (("first loss", ".2f"), ("loss", ".2f"), ("steps", ".0f")):
        known = [fact[key] for fact in facts if key in fact]
        told.append(format(statistics.mean(known), form) if known else "-")
    return told


def plot(results: Results):
    """Bars of every way: on the composites, with a mark for each, and on the questions of the skills alone."""
    from matplotlib.figure import Figure

    names = measured(results)
    figure = Figure(figsize=(11, 1.6 + 0.3 * len(WAYS)), layout="constrained", dpi=150)
    grid = figure.subplots(1, 3, sharey=True, width_ratios=(2, 1, 1))
    for axes, kind, title in zip(grid, KINDS, ("composites", "first skill alone", "second skill alone"), strict=True):
        for y, way in enumerate(WAYS):
            bar = of(results, way, kind, names)
            if bar is not None:
                color = COLORS.get(way[:4].strip(), PLAIN)
                axes.barh(y, bar[0], 0.72, xerr=bar[1] or 0.0, color=color, error_kw={"elinewidth": 1})
        axes.set_title(title, fontsize=10)
        axes.set_xlim(0, 1.04)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        axes.spines[["top", "right"]].set_visible(False)
    for name, marker in zip(names, itertools.cycle(MARKERS)):
        at = [of(results, way, "composite", [name])[0] for way in WAYS]
        places = range(len(WAYS))
        grid[0].plot(at, places, marker, markersize=4, color="#222222", fillstyle="none", label=name, clip_on=False)
    grid[0].set_yticks(range(len(WAYS)), WAYS, fontsize=8)
    grid[0].set_ylim(len(WAYS) - 0.4, -0.6)
    figure.supxlabel("exact match; bars: mean over composites, and its standard deviation over seeds", fontsize=9)
    if names:
        figure.legend(loc="outside upper right", ncols=4, frameon=False, fontsize=8)
    return figure
