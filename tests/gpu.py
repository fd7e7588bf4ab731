"""Everything that only a GPU can show, in one command: `make gpu`, under nine minutes.

The steps are those of `STEPS`. One that fails does not stop the others; each has its own limit, and what it printed is
in build/gpu/NAME.log. Needs a Python with torch for CUDA, triton, pybind11 and pytest, and nvcc; no network. Exits
with 1 if a step failed.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LOGS = ROOT / "build" / "gpu"
TESTS = sorted((ROOT / "tests").glob("test_*.py"))
SHOWN = 60  # last lines of a step that are printed too
GRACE = 5  # seconds between asking a step to end and ending it


@dataclass(frozen=True)
class Step:
    """A command, its limit in seconds, what it adds to the environment, and why it is left out, if it is."""

    name: str
    command: list[str]
    limit: int
    environment: dict[str, str] = field(default_factory=dict)
    left_out: str | None = None


def steps(python: str = sys.executable) -> list[Step]:
    """The steps, in order. Their limits and graces add up to less than nine minutes.

    Only files that name the mark are collected: others may import what a GPU machine need not have.
    """
    marked = [
        str(file.relative_to(ROOT))
        for file in TESTS
        if re.search(r"mark\.gpu|^import test_triton$", file.read_text(), re.M)
    ]
    workers = max(2, (os.cpu_count() or 1) * 3 // 4)  # most of their time is Triton's compiler
    parallel = ["-n", str(workers)] if importlib.util.find_spec("xdist") else []
    sanitizer = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    absent = None if Path(sanitizer).is_file() else "compute-sanitizer is not installed"
    # Each tensor in memory of its own: a read beyond it is then beyond what the tool knows.
    own_memory = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    small = [python, "tests/gpu_small.py"]
    checked = [sanitizer, "--error-exitcode", "9", "--print-limit", "5"]
    options = ["-p", "no:cacheprovider", "-rfE", "--continue-on-collection-errors", *parallel]
    results = ["--results", "benchmarks/results", "--json", str(LOGS / "bench.jsonl")]
    return [
        Step("build", [python, "setup.py", "--quiet", "build_ext", "--inplace"], 70),
        Step("tests", [python, "-m", "pytest", *marked, "-q", "-m", "gpu", *options], 230),
        Step("memcheck", [*checked, "--tool", "memcheck", *small], 40, own_memory, absent),
        Step("racecheck", [*checked, "--tool", "racecheck", *small], 40, {}, absent),
        Step("bench", [python, "-m", "benchmarks", "--device", "cuda", "--seconds", "100", *results], 130),
    ]


def run(step: Step, logs: Path = LOGS) -> str:
    """Run one step, its output into a log: "passed", "failed (...)" or "left out: ...".

    At its limit it is asked to end as if by Ctrl-C, so that pytest prints what it has, and a little later ended.
    """
    if step.left_out:
        return f"left out: {step.left_out}"
    logs.mkdir(parents=True, exist_ok=True)
    with open(logs / f"{step.name}.log", "wb") as log:
        try:
            process = subprocess.Popen(
                step.command,
                cwd=ROOT,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=os.environ | {"HF_HUB_OFFLINE": "1"} | step.environment,
                start_new_session=True,
            )
        except OSError as error:
            return f"failed ({error})"
        late = False
        for ask, seconds in ((signal.SIGINT, step.limit), (signal.SIGKILL, GRACE)):
            try:
                process.wait(seconds)
                break
            except subprocess.TimeoutExpired:
                late = True
                os.killpg(process.pid, ask)
        status = process.wait()
    return f"failed (over {step.limit} s)" if late else "passed" if status == 0 else f"failed (exit status {status})"


def main(chosen: list[Step] | None = None, logs: Path = LOGS) -> int:
    """Run the steps, print the end of each one's output and, last, a table; 1 if any failed."""
    verdicts = []
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a shell leaves it so in the background
        signal.signal(signal.SIGINT, signal.default_int_handler)
    for step in steps() if chosen is None else chosen:
        print(f"== {step.name}: {' '.join(step.command)}", flush=True)
        start = time.monotonic()
        verdict = run(step, logs)
        verdicts.append((step.name, time.monotonic() - start, verdict))
        if not step.left_out and (logs / f"{step.name}.log").is_file():
            lines = (logs / f"{step.name}.log").read_text(errors="replace").splitlines()
            print(*lines[-SHOWN:], sep="\n", flush=True)
        print(f"== {step.name}: {verdict}", flush=True)
    print(f"logs in {logs}")
    for name, seconds, verdict in verdicts:
        print(f"{name:10} {seconds:6.1f} s  {verdict}")
    return int(any(verdict.startswith("failed") for _, _, verdict in verdicts))


if __name__ == "__main__":
    sys.exit(main())
