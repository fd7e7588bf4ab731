"""What a run prints: the machine, the engines and checks, a block a cell, the table and the verdicts."""

from __future__ import annotations

from benchmarks import machine
from benchmarks.report import duration, floor_lines
from benchmarks.serving.figures import Extra, extra, median_of, ratio, spread, verdicts
from benchmarks.serving.records import Results
from benchmarks.serving.workers import CONTENDERS, PLAIN, THEIRS

QUIET = 0.2  # cores


def engine_lines(results: Results) -> list[str]:
    """One for each engine: compiled or eager, whose kernels, threads."""
    out = []
    for name, found in results.engines.items():
        mode = "eager" if found["mode"] == "NONE" else f"torch.compile ({found['mode']})"
        kernels = f", LoRA kernels {found['wrapper']}" if found["wrapper"] else ""
        out.append(f"{name}: {mode}{kernels}, {found['threads']} threads, started in {found['start_seconds']:.0f} s")
    return out


def setting_lines(results: Results) -> list[str]:
    settings = results.settings
    options = ", ".join(f"{key} {value}" for key, value in (settings["engine"] | settings["lora"]).items())
    ranks = ", ".join(map(str, settings["ranks"]))
    return [
        f"{settings['model']}, {settings['adapters']} random adapters of all linear layers, ranks {ranks} in turns",
        options,
        f"{settings['repeats']} repetitions a cell after one untimed, of vLLM's LoRA one",
    ]


def check_line(check: dict) -> str:
    """The comparison of the answers."""
    line = f"LoRA changes log-probabilities by {check['effect']:.3g} (RMS)"
    if "error" not in check:
        return f"{line}; not compared with vLLM's LoRA"
    agreement = f"{check['first']:.0%} of the first greedy tokens agree, {check['until_differing']:.0%} of all"
    return (
        f"{line}; the two LoRA paths differ by {check['difference']:.3g}, {check['error']:.0%} of that, "
        f"{check['worst']:.0%} in the worst request; "
        f"{agreement} until one differs"
    )


def busy_line(results: Results) -> str:
    busy = results.busy
    line = (
        f"while an engine served, the sleeping ones kept {busy['idle_engines']:.3f} cores busy, "
        f"and everything else on the machine {busy['elsewhere']:.2f}"
    )
    return line if max(busy.values()) <= QUIET else f"{line}: NOT A QUIET MACHINE, the times mean little"


def show_header(results: Results) -> None:
    lines = machine.lines(results.machine) + floor_lines(results.floors) + setting_lines(results)
    print(*lines, *engine_lines(results), sep="\n", flush=True)


HEAD = ["contender", "tokens/s", "generated/s", "first token", "its p95", "ms/token", "its p95", "repetitions"]


def run_cells(name: str, record: dict) -> list[str]:
    """A row under HEAD."""
    run = record["runs"][name]
    if "median" not in run:
        return [name, run["note"], *[""] * (len(HEAD) - 2)]
    median = run["median"]
    return [
        name,
        f"{median['tokens_s']:.1f}",
        f"{median['generated_s']:.1f}",
        duration(median["first_p50"]),
        duration(median["first_p95"]),
        f"{median['token_mean'] * 1e3:.2f}",
        f"{median['token_p95'] * 1e3:.2f}",
        str(len(run["repetitions"])) + ("" if run["same_tokens"] else " (tokens differ)"),
    ]


def ratio_text(record: dict, other: str) -> str:
    """The ratio of throughputs, and its range over the turns where there are several."""
    value = ratio(record, other)
    if value is None:
        return ""
    low, high = spread(record, other)
    span = "" if CONTENDERS[other].once or low == high else f" ({low:.3g} .. {high:.3g})"
    return f"{value:.3g}{span}"


def signed(seconds: float | None) -> str:
    """
    >>> signed(0.0123), signed(-0.0123), signed(None)
    ('12.30 ms', '-12.30 ms', '')
    """
    if seconds is None:
        return ""
    return ("-" if seconds < 0 else "") + duration(abs(seconds))


def ranks_text(ranks: list[int]) -> str:
    """
    >>> ranks_text([64, 64, 8])
    '2 x 64, 1 x 8'
    """
    return ", ".join(f"{ranks.count(rank)} x {rank}" for rank in dict.fromkeys(ranks))


def extra_texts(found: Extra) -> list[str]:
    """What LoRA adds: a step and its floor, the first token and its floor."""
    return [signed(found.step), duration(found.step_floor), signed(found.first), duration(found.first_floor)]


def cell_lines(record: dict) -> list[str]:
    least = record["least"]
    rows = [HEAD, *(run_cells(name, record) for name in record["runs"])]
    widths = [max(len(row[i]) for row in rows if len(row[1]) < 20) for i in range(len(HEAD))]
    widths[0] = max(len(row[0]) for row in rows)
    step, step_floor, first, first_floor = extra_texts(extra(record))
    out = [
        "",
        f"{record['name']}: {record['requests']} requests, {record['prompt_tokens']} + {record['new_tokens']} tokens, "
        f"in use {ranks_text(least['ranks'])}, "
        f"{least['step_bytes'] / 1e6:.1f} MB a step at {record['read_bandwidth'] / 1e9:.1f} GB/s",
        *(
            "  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in rows
        ),
        f"  LoRA adds {step or '?'} to a step (floor {step_floor}), {first or '?'} to the first token "
        f"(floor {first_floor})",
    ]
    if "agreement" in record:
        out.append(
            f"  {record['agreement']['until_differing']:.0%} of the tokens agree until one differs, lorakern and vLLM"
        )
    for target, _, word in verdicts(record):
        out.append(f"  {word}: {ratio_text(record, target.other) or '?'} x {target.other} (at least {target.bound:g})")
    return out


TABLE = ["cell", "no LoRA", "vLLM's LoRA", "lorakern's LoRA", f"of {PLAIN}", f"x {THEIRS}", "verdict"]


def table_rows(results: Results) -> list[list[str]]:
    """Throughputs in tokens a second, ratios and verdicts: a row a cell, under TABLE."""
    rows = []
    for record in results.records.values():
        medians = [median_of(record, name) for name in CONTENDERS]
        speeds = ["" if of is None else f"{of['tokens_s']:.1f}" for of in medians]
        words = ", ".join(f"{target.bound:g}: {word}" for target, _, word in verdicts(record))
        rows.append([record["name"], *speeds, ratio_text(record, PLAIN), ratio_text(record, THEIRS), words])
    return rows


def show(results: Results) -> None:
    """The table of all cells, by rich where it is installed."""
    rows = table_rows(results)
    print()
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        widths = [max(len(row[i]) for row in [TABLE, *rows]) for i in range(len(TABLE))]
        for row in [TABLE, *rows]:
            print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    else:
        table = Table(*TABLE, title="prompt and generated tokens a second")
        for row in rows:
            table.add_row(*row)
        console = Console(highlight=False)
        console = console if console.is_terminal else Console(highlight=False, width=160)
        console.print(table, markup=False)
    if results.busy:
        print(busy_line(results))
