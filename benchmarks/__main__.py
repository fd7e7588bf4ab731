"""`python -m benchmarks`: needs torch and lorakern alone; rich, matplotlib and the rivals are used where installed."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from benchmarks.session import Options, run
from lorakern.errors import LorakernError


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python -m benchmarks", description="Time lorakern beside its rivals.")
    made.add_argument("--suite", dest="suites", action="append", default=[], metavar="NAME", help="only this suite")
    made.add_argument("--only", metavar="TEXT", help="only cases whose name contains this")
    made.add_argument("--quick", action="store_true", help="few cases and repetitions: under 90 seconds")
    made.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="cuda: the suite gpu")
    made.add_argument("--no-rivals", dest="rivals", action="store_false", help="lorakern alone")
    made.add_argument("--json", type=Path, metavar="FILE", help="write the measurements as JSON lines")
    made.add_argument("--plots", type=Path, metavar="DIR", help="write PNG plots")
    made.add_argument("--results", type=Path, metavar="DIR", help="write the results page and its plots")
    made.add_argument("--compare", type=Path, metavar="OLD.jsonl", help="print ratios to an earlier run")
    made.add_argument(
        "--from", dest="source", type=Path, metavar="FILE", help="measure nothing: show what --json wrote"
    )
    made.add_argument("--seconds", type=float, metavar="N", help="begin no further case after N seconds")
    made.add_argument("--list", action="store_true", help="list the cases and measure nothing")
    return made


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit status: 2 for bad input, told in one line."""
    try:
        given = vars(parser().parse_args(arguments))
        run(Options(**(given | {"suites": tuple(given["suites"])})))
    except LorakernError as error:
        print(f"python -m benchmarks: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except SystemExit as exit:  # argparse's own
        return int(exit.code or 0)
    return 0


if __name__ == "__main__":
    sys.exit(main())
