"""The results page of the serving benchmark: markdown, JSON lines and a plot."""

from __future__ import annotations

import importlib.util
import io
from pathlib import Path

from benchmarks import machine
from benchmarks.records import write_beside
from benchmarks.report import floor_lines
from benchmarks.serving import records, report
from benchmarks.serving.figures import extra, median_of, verdicts
from benchmarks.serving.records import Results
from benchmarks.serving.workers import CONTENDERS, OURS, PLAIN, THEIRS

HOW = """\
Three engines of vLLM in processes of their own, alive at the same time: without LoRA as vLLM sets it up by default,
with vLLM's own LoRA kernels (`LORAKERN_VLLM=0`), and with lorakern's, as installed. They take turns cell by cell and
repetition by repetition, so that a machine that drifts drifts for all of them; the others sleep meanwhile. The numbers
are medians over the repetitions; a range in brackets is that of the repetitions that came one after the other. vLLM's
LoRA is so slow that it gets one repetition a cell, and no untimed one before.

All requests of a cell are handed over at once; a token's time is when the engine's caller sees it. "Tokens/s" counts
prompt and generated tokens, "first token" is the median request's time to it, "ms/token" the mean time between a
request's tokens. Prompts are random tokens, the same for all engines, as are lengths and adapters; every request has an
adapter, drawn by the popularity. Greedy, no prefix caching. Adapters are in their slots before anything is timed.

The floor of a step is the bytes of the adapters in use, each once at its true rank in bfloat16, over the read bandwidth
measured just before the cell. That of the first token is the same, or the adapters' multiply-adds for all prompts over
torch.mm's FLOP/s where those take longer. What LoRA adds is the median of lorakern's LoRA less that of no LoRA. "Best
possible" is the ratio to no LoRA if LoRA added no more than the floors. "Agreement" is the share of greedy tokens that
are those of vLLM's LoRA, each request's up to its first other one: in bfloat16 rounding decides between near ties, and
all that follows then differs. What is judged, before anything is timed, are log-probabilities: in each adapter's
request the two LoRA paths may differ by half of what that adapter changes (rounding makes it a fifth). `make test-vllm`
compares the answers in float32, token by token."""
COLORS = {PLAIN: "#9a9a9a", THEIRS: "#5b9a68", OURS: "#2f6db5"}
TITLES = {
    "prefill": "Prefill-heavy: 16 requests, 96 to 124 prompt tokens, 4 new ones",
    "decode": "Decode-heavy: 16 requests, 16 prompt tokens, 32 new ones",
}


def write(folder: Path, results: Results) -> Path:
    """Write `serving.md`, `serving.jsonl` and, with matplotlib, `serving.png`; `serving_notes.md` ends the page."""
    folder.mkdir(exist_ok=True, parents=True)
    records.write(folder / "serving.jsonl", results)
    plotted = importlib.util.find_spec("matplotlib") is not None
    if plotted:
        image = io.BytesIO()
        plot(results).savefig(image, format="png")
        write_beside(folder / "serving.png", image.getvalue())
    else:
        print("no plot: matplotlib is not installed")
    notes = folder / "serving_notes.md"
    path = folder / "serving.md"
    write_beside(path, page(results, plotted, notes.read_text(encoding="utf-8") if notes.is_file() else ""))
    return path


def page(results: Results, plotted: bool, notes: str = "") -> str:
    """The page as markdown."""
    quick = ["A quick run: two cells, few repetitions, vLLM's LoRA not timed.", ""] if results.quick else []
    took = f" The run took {results.seconds / 60:.0f} minutes." if results.seconds else ""
    out = ["# lorakern inside vLLM", "", *quick, HOW + took, "", "## Machine, engines and checks", ""]
    lines = machine.lines(results.machine) + report.setting_lines(results) + report.engine_lines(results)
    lines += [report.check_line(results.check)] if results.check else []
    lines += [report.busy_line(results)] if results.busy else []
    out += [f"- {line}" for line in lines]
    out += ["", *_table(["floor", "at the start", "at the end"], _floors(results)), ""]
    out += [
        "## Targets",
        "",
        *_table(["cell", "target", "measured", "best possible", "verdict"], _targets(results)),
        "",
    ]
    out += ["## Plot", "", "![throughput and time per token](serving.png)", ""] if plotted else []
    for kind, title in TITLES.items():
        found = [record for record in results.records.values() if record["cell"]["kind"] == kind]
        if found:
            out += [f"## {title}", "", *_table(["cell", *report.HEAD], _runs(found)), ""]
            out += ["What LoRA adds, and the floors:", "", *_table(ADDED, [_added(record) for record in found]), ""]
    return "\n".join(out).rstrip() + "\n" + (f"\n{notes.strip()}\n" if notes.strip() else "")


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)]


def _floors(results: Results) -> list[list[str]]:
    start = floor_lines(results.floors)
    end = floor_lines(results.floors_after) if results.floors_after else [""] * len(start)
    return [
        [*(part.strip() for part in a.split("  ", 1)), b.rpartition("  ")[2]] for a, b in zip(start, end, strict=True)
    ]


def _targets(results: Results) -> list[list[str]]:
    rows = []
    for record in results.records.values():
        best = extra(record).best_ratio
        for target, _, word in verdicts(record):
            against_plain = target.other == PLAIN
            text = f"at least {target.bound:g} of the throughput without LoRA"
            text = text if against_plain else f"at least {target.bound:g} times {target.other}"
            possible = f"{best:.2f}" if best and against_plain else ""
            measured = report.ratio_text(record, target.other)
            rows.append([f"`{record['name']}`", text, measured, possible, f"**{word}**"])
    return rows


def _runs(found: list[dict]) -> list[list[str]]:
    rows = []
    for record in found:
        cells = [report.run_cells(name, record) for name in record["runs"]]
        rows += [[f"`{record['name']}`" if place == 0 else "", *row] for place, row in enumerate(cells)]
    return rows


ADDED = ["cell", "adapters in use", "MB a step", "GB/s", "a step", "floor", "first token", "floor", "agreement"]


def _added(record: dict) -> list[str]:
    least = record["least"]
    return [
        f"`{record['name']}`",
        report.ranks_text(least["ranks"]),
        f"{least['step_bytes'] / 1e6:.1f}",
        f"{record['read_bandwidth'] / 1e9:.1f}",
        *report.extra_texts(extra(record)),
        f"{record['agreement']['until_differing']:.0%}" if "agreement" in record else "",
    ]


PANELS = {"tokens_s": "prompt + generated tokens a second", "token_mean": "time per token"}


def _round(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds > 0.999 else f"{seconds * 1e3:.3g} ms"


def plot(results: Results):
    """Throughput and time per token of every cell, on logarithmic scales, in bars side by side."""
    from matplotlib.figure import Figure

    found = list(results.records.values())
    figure = Figure(figsize=(max(7.0, 1.25 * len(found) + 1.5), 8.0), layout="constrained", dpi=130)
    for axes, (key, title) in zip(figure.subplots(2, 1), PANELS.items(), strict=True):
        values = [of[key] for record in found for name in CONTENDERS if (of := median_of(record, name))]
        for place, name in enumerate(CONTENDERS):
            for x, record in enumerate(found):
                if (of := median_of(record, name)) is None:
                    continue
                text = f"{of[key]:.0f}" if key == "tokens_s" else _round(of[key]).replace(" ", "\n")
                at = x + (place - 1) * 0.28
                axes.bar(at, of[key], 0.26, color=COLORS[name])
                axes.annotate(
                    text, (at, of[key]), (0, 2), textcoords="offset points", ha="center", va="bottom", fontsize=6.5
                )
        axes.set_yscale("log")
        if values:
            axes.set_ylim(min(values) / 2, max(values) * 3)
        axes.set_xticks(range(len(found)), [record["name"].replace("-", "\n") for record in found], fontsize=8)
        axes.set_title(title, fontsize=10)
        if key == "token_mean":
            axes.yaxis.set_major_formatter(lambda value, _: _round(value))
        axes.minorticks_off()
        axes.grid(True, axis="y", color="#e4e4e4", linewidth=0.7)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    handles = [axes.barh(0, 0, color=color) for color in COLORS.values()]
    figure.legend(handles, list(COLORS), loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    return figure
