"""Commands about this machine: info, demo and bench."""

from __future__ import annotations

import json as json_format
import sys
from pathlib import Path
from typing import Annotated

import typer

import lorakern
from lorakern.errors import LorakernError

DTYPES = ["float32", "bfloat16"]  # of `demo`


def info(json: Annotated[bool, typer.Option("--json", help="Print plain JSON.")] = False) -> None:
    """Show backends (and why one is missing), instruction sets, threads, devices and versions."""
    known = lorakern.info()
    if json:
        print(json_format.dumps(known, indent=2))
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(show_header=False)
    for name, reason in known["backends"].items():
        table.add_row(f"backend {name}", Text("available", "green") if reason is None else Text(f"missing: {reason}"))
    isa = known["isa"]
    table.add_row("CPU kernels", f"{isa['current']} (usable: {', '.join(isa['usable'])})" if isa else "not built")
    pool = "shared with torch" if known["threads"]["shared_pool"] else "none: the kernels run on one thread"
    table.add_row("threads", f"{known['threads']['torch']}, pool {pool}")
    for device in known["devices"]:
        table.add_row("device", Text(device))
    for package, version in known["versions"].items():
        table.add_row(package, version or "not installed")
    Console().print(table)


def demo(
    adapters: Annotated[Path | None, typer.Option(help="PEFT adapters and prompts.json; ten of the checkout.")] = None,
    rows: Annotated[int, typer.Option(min=2, help="Rows of the batch.")] = 16,
    repeats: Annotated[int, typer.Option(min=0, help="Timed runs of each engine; 0 times nothing.")] = 5,
    dtype: Annotated[list[str], typer.Option(help="What to time: float32, bfloat16; repeat for both.")] = DTYPES,
    json: Annotated[Path | None, typer.Option(help="Write the result as JSON.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Write a bar chart of the speeds (PNG).")] = None,
) -> None:
    """Serve a batch whose rows have their own adapters; check it against PEFT (exit 1 if a row differs) and time it."""
    from lorakern.demo import run

    if not run(adapters, rows=rows, repeats=repeats, dtypes=dtype, json_file=json, plot_file=plot):
        raise typer.Exit(1)


def bench(
    suite: Annotated[list[str] | None, typer.Option(help="Only this suite of cases; repeat for several.")] = None,
    only: Annotated[str | None, typer.Option(help="Only cases whose name contains this.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Few cases and repetitions: under 90 seconds.")] = False,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    rivals: Annotated[bool, typer.Option(help="Time the rivals that are installed too.")] = True,
    json: Annotated[Path | None, typer.Option(help="Write the measurements as JSON lines.")] = None,
    plots: Annotated[Path | None, typer.Option(help="Directory for PNG plots.")] = None,
    results: Annotated[Path | None, typer.Option(help="Directory for the results page and its plots.")] = None,
    compare: Annotated[Path | None, typer.Option(help="Print ratios to an earlier run's --json.")] = None,
    source: Annotated[Path | None, typer.Option("--from", help="Measure nothing: show what --json wrote.")] = None,
    list: Annotated[bool, typer.Option("--list", help="List the cases and measure nothing.")] = False,
) -> None:
    """Time the kernels beside their rivals and the machine's limits; the cases are in the source checkout."""
    root = Path(lorakern.__file__).resolve().parents[1]
    if not (root / "benchmarks" / "session.py").is_file():
        raise LorakernError("bench: the benchmarks are not installed; run it in a source checkout: pip install -e .")
    sys.path.insert(0, str(root))
    from benchmarks.session import Options, run

    files = {"json": json, "plots": plots, "results": results, "compare": compare, "source": source}
    run(Options(tuple(suite or ()), only, quick, device, rivals, list=list, **files))
