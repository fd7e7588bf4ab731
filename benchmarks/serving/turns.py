"""One engine serves while the others sleep, and the watch over that."""

from __future__ import annotations

import os
import time
from pathlib import Path

from benchmarks.serving.workers import Worker
from benchmarks.serving.workload import Request


def machine_cpu_seconds() -> float:
    """Processor time that anything on this machine has taken since it started, as far as the system tells."""
    try:
        fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
    except OSError:
        return 0.0
    user, nice, system, _idle, _waiting, interrupt, soft = map(int, fields[:7])
    return (user + nice + system + interrupt + soft) / os.sysconf("SC_CLK_TCK")


class Turns:
    """Serves by one of the workers, and adds up what the others and the rest of the machine did meanwhile."""

    def __init__(self, workers: dict[str, Worker]) -> None:
        self.workers = workers
        self.seconds = self.asleep = self.elsewhere = 0.0

    def serve(self, name: str, asked: list[Request]) -> dict:
        before = {other: worker.cpu_seconds() for other, worker in self.workers.items()}
        start, all_before = time.perf_counter(), machine_cpu_seconds()
        answer = self.workers[name].serve(asked)
        self.seconds += time.perf_counter() - start
        everything = machine_cpu_seconds() - all_before
        used = {other: worker.cpu_seconds() - before[other] for other, worker in self.workers.items()}
        self.asleep += sum(seconds for other, seconds in used.items() if other != name)
        self.elsewhere += max(0.0, everything - sum(used.values()))
        return answer

    def busy(self) -> dict[str, float]:
        """Cores that were busy on average: by the engines whose turn it was not, and by what is no engine."""
        seconds = self.seconds or 1.0
        return {"idle_engines": self.asleep / seconds, "elsewhere": self.elsewhere / seconds}
