"""What a run on the skills has measured so far, in a file, and the pages that are made of it."""

from __future__ import annotations

import io
import itertools
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from benchmarks.records import write_beside
from lorakern.errors import LorakernError

# A mean and its standard deviation over the seeds, None for one seed.
Spread = tuple[float, float | None]


class Stored:
    """Measurements in a JSON file that `save` writes: a run that was stopped goes on there.

    Attributes:
        kept: what a subclass measures, attribute to the type of an empty one.
        settings: what is to be measured; its as_json() must be that of the file.

    Raises:
        LorakernError: the file is of other settings.
    """

    kept: ClassVar[Mapping[str, type]] = {}

    def __init__(self, path: Path, settings: Any) -> None:
        self.path, self.settings, self.said = path, settings, settings.as_json()
        known = json.loads(path.read_text()) if path.exists() else None
        if known is not None and known["settings"] != self.said:
            raise LorakernError(f"{path} is of other settings; continue it with those, or move it away")
        for name, empty in self.kept.items():
            setattr(self, name, empty() if known is None else known[name])

    def save(self) -> None:
        content = {"settings": self.said} | {name: getattr(self, name) for name in self.kept}
        write_beside(self.path, json.dumps(content, indent=1) + "\n")


def write_page(folder: Path, name: str, results: Stored, page: Callable[[Stored, str], str], figure) -> Path:
    """Write `name`.md and `name`.png into a folder; `name`_notes.md there ends the page."""
    image = io.BytesIO()
    figure.savefig(image, format="png")
    write_beside(folder / f"{name}.png", image.getvalue())
    notes = folder / f"{name}_notes.md"
    write_beside(folder / f"{name}.md", page(results, notes.read_text() if notes.is_file() else ""))
    return folder / f"{name}.md"


def spread(values: Sequence[float]) -> Spread:
    """
    >>> spread([0.25, 0.75]), spread([0.5])
    ((0.5, 0.3535533905932738), (0.5, None))
    """
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else None


def told(measured: Spread | None) -> str:
    """
    >>> told((0.5, 0.125)), told((0.5, None)), told(None)
    ('50.0% ± 12.5', '50.0%', '-')
    """
    if measured is None:
        return "-"
    return f"{measured[0]:.1%}" + ("" if measured[1] is None else f" ± {100 * measured[1]:.1f}")


def chain(means: Mapping[str, float]) -> str:
    """Names and means in their order, with how each compares with the one before it; the printed digits decide.

    >>> chain({"a": 0.2, "b": 0.50001, "c": 0.5, "d": 0.1})
    'a (20.0%) < b (50.0%) = c (50.0%) > d (10.0%)'
    """
    rounded = {name: round(mean, 3) for name, mean in means.items()}
    first, *_ = rounded
    out = f"{first} ({rounded[first]:.1%})"
    for lower, higher in itertools.pairwise(rounded):
        before, after = rounded[lower], rounded[higher]
        out += f" {'<' if before < after else '>' if before > after else '='} {higher} ({after:.1%})"
    return out


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """
    >>> table(["way", "score"], [["a", "1"]])
    ['| way | score |', '|---|---|', '| a | 1 |']
    """
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    return lines + ["| " + " | ".join(row) + " |" for row in rows]
