"""The page and the plot of retrieval and composition on the skills."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.skills.ramole import BASE, CURVES, ENCODERS, INSIDE, KS, MODES, ORACLE, OUTSIDE, REFERENCES, K, Results
from benchmarks.skills.results import chain, spread, table, told, write_page

HOW = """\
Exact match of greedy answers of SmolLM2-135M-Instruct in bfloat16 to held-out questions of {skills} skills, a pool of
as many adapters, by `MixtureModel`: nothing but the words of a question says which adapter it needs. The k = {k}
adapters most like it are retrieved by MiniLM (each the mean embedding of {samples} sample questions) and composed.
{count} questions a skill and seed. A seed also draws the {trained} skills (40 %) on which the encoder is fine-tuned
({encoder_steps} steps of InfoNCE) and the router of RAMoLE is trained ({router_steps} steps of 8 questions, all
{trained} adapters and {router_empty} empty ones in every row, rate {router_rate}, rank {router_rank}, dropout of
adapters {router_dropout:g}); the others are unseen by both. In-distribution the pool has every skill's own adapter;
out-of-distribution the own adapter is not retrieved, though another one may do the same task asked in other words. The
oracle is always given a question's own adapter. Means with the standard deviation over {seeds} seeds."""
OWN = """\
The gate that the router gives to a question's own adapter, over the tokens of the question and all layers, is {0} for
the skills it is trained on and {1} for the others; gates that are all alike are 1/{k}."""
EXPECTED = (ORACLE, "ramole", "mixture", "selection", "fusion")
COLORS = {"selection": "#9aa0a6", "fusion": "#c98a2b", "mixture": "#3f9b76", "ramole": "#2f6db5", "arrow": "#8a5fb0"}


def write(folder: Path, results: Results) -> Path:
    """Write `ramole.md` and `ramole.png` into a folder; `ramole_notes.md` there ends the page."""
    return write_page(folder, "ramole", results, page, plot(results))


def page(results: Results, notes: str = "") -> str:
    wanted, runs = results.settings, results.runs
    values = vars(wanted) | {
        "skills": len(wanted.skills),
        "k": K,
        "samples": results.said["samples"],
        "seeds": len(runs),
    }
    out = ["# Retrieve and mix", "", HOW.format(**values, trained=len(runs[0]["trained"])), ""]
    if results.missing():
        out += [f"**Unfinished: {len(runs)} of {wanted.seeds} seeds are measured; the numbers are of those.**", ""]
    rows = []
    for way in (ORACLE, *MODES, BASE):
        cells = [
            told(_mean(results, way, where, group)) for where in (INSIDE, OUTSIDE) for group in (None, True, False)
        ]
        rows.append([way, *cells])
    head = [
        f"{where}{group}"
        for where in ("in-distribution", "out-of-distribution")
        for group in ("", ", trained", ", unseen")
    ]
    out += [*table(["way", *head], rows), ""]
    for where in (INSIDE, OUTSIDE):
        means = {way: mean[0] for way in reversed(EXPECTED) if (mean := _mean(results, way, where, None))}
        out.append(f"- {where}, in the order expected: {chain(means)}")
    gates = [told(_mean_of(results, [run["own"] for run in runs], group)) for group in (True, False)]
    out += ["", OWN.format(*gates, k=K), ""]
    out += _learning(results)
    out += ["## Retrieval", "", "How often a question's own adapter is the first, or among the first three.", ""]
    rows = [
        [state, group, *(told(spread([run["retrieval"][state][group][str(k)] for run in runs])) for k in KS)]
        for state in ENCODERS
        for group in ("trained", "unseen")
    ]
    out += [*table(["encoder", "questions of skills", "top-1", "top-3"], rows), ""]
    out += ["## As the pool grows", "", "Own adapters in the pool; the questions are those of its skills.", ""]
    rows = [
        [size, *(told(spread([run["pools"][size][mode] for run in runs])) for mode in CURVES)]
        for size in runs[0]["pools"]
    ]
    out += [*table(["adapters", *CURVES], rows), "", "![exact match and pool size](ramole.png)", ""]
    return "\n".join(out) + (f"\n{notes}" if notes else "")


def plot(results: Results):
    """Bars of every way, and curves over the size of the pool."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.6, 3.8), layout="constrained", dpi=150)
    bars, curves = figure.subplots(1, 2)
    ways = (ORACLE, *MODES)
    for shift, (where, alpha) in enumerate(((INSIDE, 1.0), (OUTSIDE, 0.45))):
        for i, way in enumerate(ways):
            if mean := _mean(results, way, where, None):
                bars.bar(
                    i + 0.38 * shift - 0.19, 100 * mean[0], 0.36, yerr=100 * (mean[1] or 0), capsize=2, alpha=alpha,
                    color=COLORS.get(way, "#333333"),
                )  # fmt: skip
    bars.set_xticks(range(len(ways)), ways, rotation=20)
    bars.set_ylabel("exact match, %")
    bars.set_title("solid: in-distribution, pale: own adapter removed", fontsize=9)
    sizes = list(results.runs[0]["pools"])
    for mode in CURVES:
        means = [100 * statistics.mean(run["pools"][size][mode] for run in results.runs) for size in sizes]
        curves.plot([int(size) for size in sizes], means, marker="o", color=COLORS[mode], label=mode)
    curves.set_xlabel("adapters in the pool")
    curves.set_ylim(0)
    curves.legend(frameon=False, fontsize=8)
    for axes in (bars, curves):
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def _mean(results: Results, way: str, where: str, trained: bool | None):
    """Over the skills, and spread over the seeds; `trained` picks those trained on, or those not."""
    scores = [run["exact"][way].get(where) for run in results.runs]
    return _mean_of(results, scores, trained) if all(scores) else None


def _mean_of(results: Results, values: Sequence[Mapping[str, float]], trained: bool | None):
    """The same of a value for each seed and skill."""
    means = []
    for run, by_skill in zip(results.runs, values, strict=True):
        means.append(statistics.mean(v for n, v in by_skill.items() if trained in (None, n in run["trained"])))
    return spread(means)


def _learning(results: Results) -> list[str]:
    """How the loss of the router fell, beside what it would be with other gates."""
    quarter = max(1, results.settings.router_steps // 4)
    head = [f"steps {i * quarter + 1} to {(i + 1) * quarter}" for i in range(4)]
    rows = []
    for run in results.runs:
        parts = [statistics.mean(run["losses"][i * quarter : (i + 1) * quarter]) for i in range(4)]
        known = [run["references"][way] for way in REFERENCES]
        rows.append([str(run["seed"]), *(f"{value:.3f}" for value in (*known, *parts))])
    said = "Loss of the router in training, and of some of its questions with all adapters alike, or the own one alone:"
    return ["## Training", "", said, "", *table(["seed", *REFERENCES, *head], rows), ""]
