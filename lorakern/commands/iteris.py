"""`lorakern iteris`: adapters merged by IterIS or RegMean on samples of their tasks, into an adapter or a model."""

import io
import shutil
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lorakern.adapters.json_file import show
from lorakern.commands.console import size
from lorakern.commands.learned import Clock, Run, told
from lorakern.commands.plots import check_plot, write_plot
from lorakern.errors import LorakernError
from lorakern.merge import iteris
from lorakern.merge.iteris.solution import Solution

WHAT = "In every layer the update that does, in the merged model, what each adapter does in its own on its samples."
_UNITS = {"KB": 1e3, "MB": 1e6, "GB": 1e9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "B": 1, "": 1}


def run(
    run: Run, options: dict[str, Any], *, regmean: bool, rank: int | float | None, fold: bool, plot: Path | None
) -> None:
    """Solve, and write an adapter of that rank or, with `fold`, the whole model.

    Raises:
        LorakernError: not one file of data for each adapter, neither or both of `rank` and `fold`, and as
            `lorakern.merge.iteris.solve`. OUT is as it was then, and the state has its last whole sweep.
    """
    if len(run.data) != len(run.adapters):
        raise LorakernError(
            f"--data names {len(run.data)} files for {len(run.adapters)} adapters; give a JSONL file for each, in "
            "their order"
        )
    if fold == (rank is not None):
        raise LorakernError("give --rank R to write an adapter of that rank, or --fold to write the whole model")
    check_plot(plot)
    clock = Clock()
    model, tokenizer, adapters, inputs, base = run.load()
    solve = iteris.regmean if regmean else iteris.solve
    with run.console.progress("solving") as progress:
        samples = [str(path) for path in run.data]
        solution = solve(model, adapters, samples, tokenizer=tokenizer, progress=progress, **options)
    result: dict[str, Any] = {"method": "regmean" if regmean else "iteris", "options": options}
    if fold:
        solution.fold(model)
        written = save_model(model, tokenizer, run.out)
        result |= {"output": str(run.out), "bytes": written}
        line = f"{run.out}: the model with {len(solution.updates)} layers updated, {size(written)}"
    else:
        adapter, energy = solution.adapter(rank, base_model_name_or_path=base)
        mean = statistics.mean(energy.values())
        told_of = {"model": run.model, "data": ", ".join(map(str, run.data)), "rank": rank, **options}
        title = f"LoRA adapters merged by {'RegMean' if regmean else 'IterIS'}"
        result |= run.write(adapter, title, WHAT, inputs, told_of | {"mean energy kept": f"{mean:.4f}"}, run.out)
        result |= {"energy": energy}
        least = min(energy, key=energy.__getitem__)
        line = f"{told(result)}; energy kept: {mean:.2%} on average, least {energy[least]:.2%} in {least}"
    if plot is not None:
        write_plot(plot, convergence_png(solution))
    result |= {"objectives": solution.objectives, "module_objectives": solution.module_objectives}
    result |= {"undetermined": solution.undetermined, "inputs": [vars(source) for source in inputs]}
    result |= {"seconds": clock.seconds}
    sweeps = "objective by sweep: " + ", ".join(f"{value:.4g}" for value in solution.objectives)
    run.console.report(result, f"{sweeps}; {clock.seconds:.1f} s", line)


def save_model(model, tokenizer, out: Path) -> int:
    """Save a model and its tokenizer in the format of transformers, beside and renamed; the bytes of it."""
    from lorakern.integrations.smollm2 import quiet_transformers

    beside = out.with_name(f".{out.name}.part")
    old = out.with_name(f".{out.name}.old")
    shutil.rmtree(beside, ignore_errors=True)
    try:
        with quiet_transformers():
            model.save_pretrained(beside)
            tokenizer.save_pretrained(beside)
        if out.exists():
            out.rename(old)
        beside.rename(out)
    except OSError as error:
        if old.exists() and not out.exists():
            old.rename(out)
        raise LorakernError(f"{out}: --output cannot be written ({error}); give another directory") from None
    finally:
        shutil.rmtree(beside, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
    return sum(path.stat().st_size for path in out.rglob("*") if path.is_file())


def read_size(text: str | None) -> int | None:
    """Bytes, as a number with or without a unit.

    >>> read_size("2GB"), read_size("512 MiB"), read_size("1000"), read_size(None)
    (2000000000, 536870912, 1000, None)
    """
    if text is None:
        return None
    number = text.rstrip("bBkKmMgGiI ")
    unit = text[len(number) :].strip().upper()
    try:
        count = int(float(number) * _UNITS[unit])
    except (KeyError, ValueError, OverflowError):
        count = 0
    if count < 1:
        raise LorakernError(f"--max-memory must be bytes, such as 2GB or 500MB, got {show(text)}")
    return count


def convergence_png(solution: Solution) -> bytes:
    """The objective of the merged model after each sweep: the whole, and every layer's."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.0), layout="constrained", dpi=150)
    axes = figure.subplots()
    sweeps = range(1, len(solution.objectives) + 1)
    for module in solution.updates:
        _line(axes, sweeps, [objectives[module] for objectives in solution.module_objectives], "#b9c4d0", 0.6)
    _line(axes, sweeps, solution.objectives, "#2f6db5", 2.0, marker="o", markersize=4, label="all layers")
    axes.plot([], [], color="#b9c4d0", linewidth=0.8, label="each layer")
    axes.set_yscale("log")
    axes.set_xticks(list(sweeps))
    axes.set_xlabel("sweep")
    axes.set_ylabel("objective in the merged model")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    image = io.BytesIO()
    figure.savefig(image, format="png")
    return image.getvalue()


def _line(axes, sweeps: Sequence[int], values: Sequence[float], color: str, width: float, **style: Any) -> None:
    # an exact fit is zero, which a log axis does not have
    axes.plot(sweeps, [value if value > 0 else float("nan") for value in values], color=color, linewidth=width, **style)
