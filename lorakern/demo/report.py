"""What the demo says: tables on the console, a JSON file, a bar chart."""

import json
import re
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from lorakern.errors import LorakernError

LABELS = {"base": "base model alone", "peft": "PEFT, mixed batch", "lorakern": "lorakern, mixed batch"}
COLORS = {"base": "#9aa0a6", "peft": "#e08e45", "lorakern": "#2f6db5"}


def check_target(option: str, path: Path | None) -> None:
    """Fail before minutes of work rather than after: the file's directory must exist.

    Raises:
        LorakernError: it does not, or `path` is a directory.
    """
    if path is not None and (path.is_dir() or not path.absolute().parent.is_dir()):
        raise LorakernError(f"demo: {option} {path} must be a file in a directory that exists")


def print_answers(console: Console, rows: list[dict]) -> None:
    table = Table("row", "adapter", "prompt", "answer", "expected", "PEFT alone", title="One batch, greedy, float32")
    for column in table.columns:
        column.overflow = "fold"
    for number, row in enumerate(rows):
        right = Text("yes", "green") if row["as_expected"] else Text(f"no: {row['expected']}", "yellow")
        same = Text("equal", "green") if row["equals_peft"] else Text(f"DIFFERS: {row['peft_answer']}", "bold red")
        prompt, answer = Text(plain(row["prompt"])), Text(" ".join(row["answer"].split()))
        table.add_row(str(number), Text(row["adapter"] or "none (base)"), prompt, answer, right, same)
    console.print(table)


def print_speed(console: Console, speed: dict[str, dict]) -> None:
    table = Table("", "dtype", "tokens/s", "of base", "logit error", title="32 new tokens a row, median of the runs")
    for dtype, engines in speed.items():
        for engine, measured in engines.items():
            error = "" if measured["logit_error"] is None else f"{measured['logit_error']:.1e}"
            numbers = f"{measured['tokens_per_s']:.1f}", f"{measured['ratio_to_base']:.2f}", error
            table.add_row(LABELS[engine], dtype, *numbers)
    console.print(table)


def plain(prompt: str) -> str:
    """The user's words in a chat-formatted prompt, or the prompt itself.

    >>> plain("<|im_start|>user\\nHi<|im_end|>\\n<|im_start|>assistant\\n")
    'Hi'
    """
    turns = re.findall(r"<\|im_start\|>user\n(.*?)<\|im_end\|>", prompt, re.DOTALL)
    return turns[-1] if turns else prompt


def write_json(path: Path, result: dict) -> None:
    _write_beside(path, lambda file: file.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8"))


def write_plot(path: Path, result: dict) -> None:
    """A bar chart of tokens a second, one group a dtype."""
    from matplotlib.figure import Figure

    speed = result["speed"]
    figure = Figure(figsize=(2.4 + 3.0 * len(speed), 4.4), layout="constrained", dpi=160)
    axes = figure.subplots()
    for place, engine in enumerate(LABELS):
        for group, measured in enumerate(speed.values()):
            rate, ratio = measured[engine]["tokens_per_s"], measured[engine]["ratio_to_base"]
            x = group + (place - 1) * 0.27
            axes.bar(x, rate, 0.25, color=COLORS[engine], label=LABELS[engine] if group == 0 else None)
            note = f"{rate:.0f}" if engine == "base" else f"{rate:.0f}\n{ratio:.2f} of base"
            axes.annotate(note, (x, rate), (0, 3), textcoords="offset points", ha="center", fontsize=9)
    axes.set_xticks(range(len(speed)), list(speed))
    axes.set_ylabel("tokens/s")
    axes.margins(y=0.18)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.08), ncols=3, fontsize=8.5)
    batch, machine = result["batch"], result["machine"]
    axes.set_title(
        f"SmolLM2-135M, {batch['rows']} rows, {batch['adapters']} adapters in one batch, "
        f"{batch['new_tokens']} new tokens\n{machine['cpu']}, {machine['threads']} threads, interleaved runs",
        fontsize=9.5,
    )
    _write_beside(path, lambda file: figure.savefig(file, format=path.suffix.lstrip(".") or "png"))


def _write_beside(path: Path, write: Callable[[Path], object]) -> None:
    """Write under another name in the same directory, then rename: never half a file."""
    temporary = path.with_name(f".{path.name}.part")
    try:
        write(temporary)
        temporary.replace(path)
    except OSError as error:
        raise LorakernError(f"demo: {path} cannot be written ({error.strerror or error})") from None
    finally:
        temporary.unlink(missing_ok=True)
