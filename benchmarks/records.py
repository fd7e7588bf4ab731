"""Results as JSON lines: a header with the machine and the floors, then a line a case."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

from lorakern.errors import LorakernError

SCHEMA = "lorakern-bench/1"


@dataclass
class Results:
    """A run: the machine, the floors at its start and its end, and a record for each case by name."""

    machine: dict
    floors: dict
    floors_after: dict | None = None
    quick: bool = False
    failed: dict[str, str] = field(default_factory=dict)  # cases that could not be measured, and why
    records: dict[str, dict] = field(default_factory=dict)


def check_target(option: str, path: Path | None, folder: bool = False) -> None:
    """Fail before minutes of work rather than after.

    Raises:
        LorakernError: `path` cannot become that file (or folder): its parent is missing, or it is the other kind.
    """
    if path is None:
        return
    if not path.absolute().parent.is_dir() or (path.exists() and path.is_dir() != folder):
        kind = "a folder, or a name for one" if folder else "a file"
        raise LorakernError(f"bench: {option} {path} must be {kind} in a folder that exists")


def write_beside(path: Path, content: str | bytes) -> None:
    """Write under another name in the same folder, then rename: never half a file."""
    temporary = path.with_name(f".{path.name}.part")
    try:
        temporary.write_bytes(content if isinstance(content, bytes) else content.encode())
        temporary.replace(path)
    except OSError as error:
        raise LorakernError(f"bench: {path} cannot be written ({error.strerror or error})") from None
    finally:
        temporary.unlink(missing_ok=True)


def write(path: Path, results: Results) -> None:
    header = {"schema": SCHEMA, **{k: v for k, v in vars(results).items() if k != "records"}}
    lines = [header, *results.records.values()]
    write_beside(path, "".join(json.dumps(line) + "\n" for line in lines))


def read(path: Path, option: str) -> Results:
    """The run that `write` wrote.

    Raises:
        LorakernError: the file is missing, is no such file, or is of another version; `option` named it.
    """
    where = f"bench: {option} {path}"
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except OSError as error:
        raise LorakernError(f"{where} cannot be read ({error.strerror or error})") from None
    except ValueError as error:
        raise LorakernError(f"{where} is not JSON lines ({error}); give a file that --json wrote") from None
    header = lines[0] if lines and isinstance(lines[0], dict) else {}
    if header.pop("schema", None) != SCHEMA:
        raise LorakernError(
            f"{where} does not begin with the schema {SCHEMA}; give a file that --json of this version wrote"
        )
    try:
        records = {line["name"]: line for line in lines[1:]}
        for line in records.values():
            line["floor"]["seconds"], line["case"]["tokens"]
            if not all(isinstance(run, dict) for run in line["runs"].values()):
                raise TypeError("runs")
        return Results(**header, records=records)
    except (KeyError, TypeError, AttributeError) as error:
        raise LorakernError(f"{where} lacks what a run has ({error}); give a file that --json wrote whole") from None


def bandwidth(floor: dict) -> tuple[str, float]:
    """What bytes are measured by, and how many a second: "copy" on a GPU, bytes read and written; "read" on a CPU."""
    kind = "copy" if "copy_bandwidth" in floor else "read"
    return kind, floor[f"{kind}_bandwidth"]


def first_run(record: dict) -> tuple[str, dict]:
    """Name and run of lorakern's default backend in a record."""
    return next((name, run) for name, run in record["runs"].items() if run.get("ours"))
