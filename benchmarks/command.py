"""What commands that print records and keep them as JSON lines have in common."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from benchmarks import machine
from benchmarks.records import check_target, write_beside
from lorakern.errors import LorakernError


def report(
    program: str, records: Iterable[Mapping], lines: Callable[[Mapping], list[str]], path: Path | None = None
) -> int:
    """Print the machine and each record as it comes, write all of them to `path`, and return the exit status.

    Args:
        program: the module, as an error names it.
        records: what is measured, lazily.
        lines: a record as it is printed.
        path: of the JSON lines; None for none.
    """
    try:
        check_target("--json", path)
        kept: list[Mapping] = [{"machine": machine.describe("cpu")}]
        print("\n".join(machine.lines(kept[0]["machine"])), flush=True)
        for record in records:
            kept.append(record)
            print("\n".join(lines(record)), flush=True)
        if path is not None:
            write_beside(path, "".join(json.dumps(record) + "\n" for record in kept))
    except LorakernError as error:
        print(f"python -m {program}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0
