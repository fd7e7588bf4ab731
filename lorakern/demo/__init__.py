"""`lorakern demo`: one batch on a real model, every row its own adapter, checked against PEFT and timed beside it."""

import copy
import importlib
import os
import platform
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from lorakern.demo import report
from lorakern.demo.engines import NEW_TOKENS, Engines
from lorakern.demo.requests import ASKED, Request, load_adapters, load_prompts, mixed_batch, shipped_adapters
from lorakern.errors import LorakernError
from lorakern.info import info

DTYPES = ("float32", "bfloat16", "float16")


def run(
    folder: Path | None = None,
    *,
    rows: int = 16,
    repeats: int = 5,
    dtypes: Sequence[str] = DTYPES[:2],
    json_file: Path | None = None,
    plot_file: Path | None = None,
    console: Console | None = None,
) -> bool:
    """Answer a mixed batch, compare every row with PEFT running its adapter alone, and time base, PEFT and lorakern.

    Args:
        folder: PEFT adapters of SmolLM2-135M-Instruct and their prompts.json; if None, ten of those of the checkout.
        rows: the size of the batch; it is raised to one row an adapter and one without.
        repeats: timed runs of each engine and dtype, in turns.
        dtypes: what to time; the comparison is always float32.
        json_file, plot_file: where to write the result and its bar chart.
        console: where to print.

    Returns:
        Whether every row's greedy tokens equal PEFT's. If not, nothing is timed.

    Raises:
        LorakernError: adapters, prompts or the model are missing or do not fit, or the logits in one of `dtypes` are
            further from PEFT's in float32 than rounding explains.
    """
    from lorakern.integrations import smollm2

    console = console or _console()
    for package in ("peft", *(["matplotlib"] if plot_file else [])):
        importlib.import_module(package)  # what is missing is said now, not after minutes
    if unknown := [name for name in dtypes if name not in DTYPES]:
        raise LorakernError(f"demo: dtype must be one of {', '.join(DTYPES)}; got {unknown[0]!r}")
    report.check_target("--json", json_file)
    report.check_target("--plot", plot_file)
    names = ASKED if folder is None else None
    folder = shipped_adapters() if folder is None else Path(folder)
    adapters = load_adapters(folder, names)
    requests = mixed_batch(load_prompts(folder, list(adapters)), max(rows, len(adapters) + 1))

    with _progress() as progress:
        with _step(progress, "loading SmolLM2-135M-Instruct"):
            model, tokenizer = smollm2.load(torch.float32)
        with _step(progress, "attaching the adapters"):
            engines = Engines(model, tokenizer, adapters, folder, requests)
        with _step(progress, "one mixed batch"):
            answers = engines.answers()
        with _step(progress, "PEFT, each row alone", len(requests)) as step:
            checked = [_checked(engines, *pair, step) for pair in zip(requests, answers, strict=True)]
    report.print_answers(console, checked)
    equal = all(row["equals_peft"] for row in checked)
    right = sum(row["as_expected"] for row in checked if row["adapter"])
    served = sum(1 for row in checked if row["adapter"])
    same = sum(row["equals_peft"] for row in checked)
    console.print(f"{right} of {served} answers with an adapter are the expected ones.")
    console.print(
        f"{same} of {len(checked)} rows equal PEFT running the row alone (float32, batch of one, unpadded, its adapter "
        "the only active one): token ids up to and with the end of turn."
    )
    result = {
        "machine": _machine(),
        "batch": {"rows": len(requests), "adapters": len(adapters), "new_tokens": NEW_TOKENS, "folder": folder.name},
        "all_rows_equal_peft": equal,
        "rows": checked,
        "speed": _speeds(engines, model, adapters, folder, dtypes, repeats) if equal and repeats else {},
    }
    if result["speed"]:
        report.print_speed(console, result["speed"])
    if not equal:
        console.print("Rows differ from PEFT's: no speed is measured for a wrong result.", style="bold red")
    if json_file is not None:
        report.write_json(json_file, result)
    if plot_file is not None and result["speed"]:
        report.write_plot(plot_file, result)
    return equal


def _checked(engines: Engines, request: Request, tokens: list[int], step) -> dict:
    """One row of the result: lorakern's answer from the mixed batch beside PEFT's alone."""
    alone = engines.answer_alone(request)
    step()
    decode = engines.tokenizer.decode
    answer, other = (decode(ids, skip_special_tokens=True).strip() for ids in (tokens, alone))
    return {
        "adapter": request.adapter,
        "prompt": request.prompt,
        "expected": request.expected,
        "answer": answer,
        "as_expected": answer == request.expected.strip(),
        "equals_peft": tokens == alone,
        "tokens": tokens,
        "peft_answer": other,
        "peft_tokens": alone,
    }


def _speeds(engines, model, adapters, folder, dtypes, repeats) -> dict[str, dict]:
    """Per dtype and engine: tokens/s, ratio to the base, and the error of the first logits over PEFT's in float32."""
    speeds = {}
    with _progress() as progress:
        with _step(progress, "reference logits"):
            exact = engines.run("peft", "logits")
        for name in dtypes:
            timed, errors = engines, {"base": None}
            with _step(progress, f"logits in {name}"):
                if name != "float32":
                    cast = copy.deepcopy(model).to(getattr(torch, name))
                    timed = Engines(cast, engines.tokenizer, adapters, folder, engines.requests)
                for engine in ("peft", "lorakern"):
                    difference = timed.run(engine, "logits") - exact
                    errors[engine] = (difference.square().mean().sqrt() / exact.square().mean().sqrt()).item()
            if errors["lorakern"] > 2 * max(errors["peft"], 1e-5):
                off = f"{errors['lorakern']:.1e} off PEFT's float32 ones, PEFT's own {errors['peft']:.1e}"
                raise LorakernError(f"demo: lorakern's logits in {name} are {off}; a wrong result is not timed")
            with _step(progress, f"timing in {name}", 3 * (repeats + 1)) as step:
                measured = timed.speed(timed.times(repeats, step))
            speeds[name] = {engine: entry | {"logit_error": errors[engine]} for engine, entry in measured.items()}
    return speeds


def _machine() -> dict:
    known = info()
    cpu = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else ():
        if line.startswith("model name"):
            cpu = line.partition(":")[2].strip()
            break
    isa = known["isa"] and known["isa"]["current"]
    return {"cpu": cpu, "cores": os.cpu_count(), "threads": torch.get_num_threads(), "isa": isa} | known["versions"]


def _console() -> Console:
    console = Console()
    return console if console.is_terminal else Console(width=140)  # a log has no width of its own


def _progress() -> Progress:
    """Bars on stderr where that is a terminal. Two refreshes a second: more would slow what is being timed."""
    console = Console(stderr=True)
    columns = TextColumn("{task.description:30}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    return Progress(*columns, console=console, refresh_per_second=2, disable=not console.is_terminal)


@contextmanager
def _step(progress: Progress, description: str, total: int = 1) -> Iterator:
    """A bar of its own; a step of one part pulses until it is done."""
    task = progress.add_task(description, total=None if total == 1 else total)
    yield lambda: progress.advance(task)
    progress.update(task, total=total, completed=total)
