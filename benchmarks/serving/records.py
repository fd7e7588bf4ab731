"""Results of the serving benchmark as JSON lines: a header with machine, engines and checks, then a line a cell."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.records import write_beside
from lorakern.errors import LorakernError

SCHEMA = "lorakern-serving/1"


@dataclass
class Results:
    """A run. `busy` says how far the processors were kept busy by anything but the engine that had its turn."""

    machine: dict
    settings: dict
    floors: dict
    engines: dict[str, dict] = field(default_factory=dict)
    check: dict = field(default_factory=dict)
    busy: dict = field(default_factory=dict)
    floors_after: dict | None = None
    quick: bool = False
    seconds: float | None = None  # that the whole run took
    records: dict[str, dict] = field(default_factory=dict)


def write(path: Path, results: Results) -> None:
    header = {"schema": SCHEMA, **{k: v for k, v in vars(results).items() if k != "records"}}
    write_beside(path, "".join(json.dumps(line) + "\n" for line in (header, *results.records.values())))


def read(path: Path) -> Results:
    """The run that `write` wrote.

    Raises:
        LorakernError: the file is missing, or is none of `write`.
    """
    where = f"bench: --from {path}"
    try:
        header, *lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        if header.pop("schema") != SCHEMA:
            raise LorakernError(f"{where} is not of the schema {SCHEMA}")
        return Results(**header, records={line["name"]: line for line in lines})
    except OSError as error:
        raise LorakernError(f"{where} cannot be read ({error.strerror or error})") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, LorakernError):
            raise
        raise LorakernError(f"{where} is no file that --json wrote ({type(error).__name__}: {error})") from None
