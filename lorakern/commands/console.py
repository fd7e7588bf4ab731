"""What a command says: its result as JSON or as text, and a progress bar beside."""

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

Progress = Callable[[int, int, str], None]
PLAIN_WIDTH = 200  # a log has no width of its own


@dataclass(frozen=True)
class Console:
    """Where a command reports: `json` prints one JSON object on stdout in place of text, `quiet` prints nothing."""

    json: bool = False
    quiet: bool = False

    def report(self, result: dict[str, Any], *parts: Any) -> None:
        """Print `result` as JSON, or `parts`, which are strings and rich renderables."""
        if self.json:
            print(json.dumps(result, allow_nan=False))
        elif not self.quiet:
            from rich.console import Console as RichConsole

            console = RichConsole(soft_wrap=False)
            if not console.is_terminal:
                console = RichConsole(width=PLAIN_WIDTH)
            for part in parts:
                for column in getattr(part, "columns", ()):
                    column.overflow = "fold"
                console.print(part, markup=False, highlight=False, soft_wrap=isinstance(part, str))

    @contextmanager
    def progress(self, description: str) -> Iterator[Progress]:
        """A bar on stderr, moved by (done, total, module); none where stderr is no terminal, with `json` or `quiet`."""
        from rich.console import Console as RichConsole
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        console = RichConsole(stderr=True)
        columns = TextColumn("{task.description:10}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
        off = self.json or self.quiet or not console.is_terminal
        with Progress(*columns, TextColumn("{task.fields[module]}", markup=False), console=console, disable=off) as bar:
            task = bar.add_task(description, total=None, module="")
            yield lambda done, total, module: bar.update(task, completed=done, total=total, module=module)


def kind(module: str) -> str:
    """A module's path with * for its numbers, which modules of other layers share.

    >>> kind("model.layers.12.self_attn.q_proj")
    'model.layers.*.self_attn.q_proj'
    """
    return re.sub(r"(?<![^._])\d+(?![^._])", "*", module)


def span(values: list[Any], form: str = "{}") -> str:
    """The least and the largest value, or the one there is.

    >>> span([4, 16, 8]), span([0.5, 0.5], "{:.2f}")
    ('4 to 16', '0.50')
    """
    low, high = form.format(min(values)), form.format(max(values))
    return low if low == high else f"{low} to {high}"


def size(count: float) -> str:
    """Bytes for a reader.

    >>> size(999), size(83_886_080)
    ('999 bytes', '83.9 MB')
    """
    for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count >= unit:
            return f"{count / unit:.1f} {name}"
    return f"{count:.0f} bytes"
