"""`python -m benchmarks.serving`: measuring needs an environment with vLLM, `--from` does not."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from benchmarks.serving.session import Options, run
from benchmarks.serving.workload import RANKS
from lorakern.errors import LorakernError


def _ranks(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python -m benchmarks.serving", description=__doc__.partition("\n")[0])
    made.add_argument("--only", metavar="TEXT", help="only cells whose name contains this")
    made.add_argument("--quick", action="store_true", help="two cells, three repetitions; vLLM's LoRA is not timed")
    made.add_argument("--repeats", type=int, metavar="N", help="repetitions of a cell (not of vLLM's LoRA)")
    made.add_argument("--ranks", type=_ranks, default=RANKS, metavar="R,R,...", help="of the adapters, in turns")
    made.add_argument("--no-vllm", dest="vllm", action="store_false", help="without vLLM's LoRA, also for the checks")
    made.add_argument("--json", type=Path, metavar="FILE", help="write the measurements as JSON lines")
    made.add_argument("--results", type=Path, metavar="DIR", help="write the results page and its plot")
    made.add_argument(
        "--from", dest="source", type=Path, metavar="FILE", help="measure nothing: show what --json wrote"
    )
    made.add_argument("--list", action="store_true", help="list the cells and measure nothing")
    return made


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit status: 2 for bad input or wrong answers, told in one line."""
    try:
        run(Options(**vars(parser().parse_args(arguments))))
    except LorakernError as error:
        print(f"python -m benchmarks.serving: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except SystemExit as exit:  # argparse's own
        return int(exit.code or 0)
    return 0


if __name__ == "__main__":
    sys.exit(main())
