"""The engines' processes, as the one that lets them take turns sees them."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from benchmarks.serving.workload import ADAPTERS, MAX_RANK, REQUESTS, Request, without_adapters
from lorakern.errors import LorakernError

ROOT = Path(__file__).parents[2]
ENGINE = {
    "dtype": "bfloat16",
    "max_model_len": 512,
    "max_num_seqs": REQUESTS,
    "max_num_batched_tokens": 2048,
    "enable_prefix_caching": False,
    "seed": 0,
}
LORA = {"enable_lora": True, "max_lora_rank": MAX_RANK, "max_loras": ADAPTERS, "max_cpu_loras": ADAPTERS}
ENVIRONMENT = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}


@dataclass(frozen=True)
class Contender:
    """`setting` is LORAKERN_VLLM; `once`: so slow that a cell has one repetition of it."""

    lora: bool
    setting: str
    once: bool = False


PLAIN, THEIRS, OURS = "no LoRA", "vLLM's LoRA", "lorakern's LoRA"
CONTENDERS = {PLAIN: Contender(False, "0"), THEIRS: Contender(True, "0", once=True), OURS: Contender(True, "")}


def preloaded() -> str:
    """The libraries that vLLM preloads into the worker processes that it starts; an engine in-process has to do it."""
    found = []
    for package, patterns in {"vllm": ["libs/libtcmalloc*.so*"], "torch": ["lib/libgomp*.so*"]}.items():
        spec = importlib.util.find_spec(package)
        if spec is None:
            raise LorakernError(f"bench: serving needs {package}; run `make bench-serving`")
        folder = Path(spec.submodule_search_locations[0])
        candidates = [path for pattern in patterns for path in sorted(folder.glob(pattern))]
        found += [str(path) for path in candidates[:1]]
    return ":".join(found)


class Worker:
    """One engine. `start` returns at once; `ready` waits for it."""

    def __init__(self, name: str, model: Path, adapters: list[str], logs: Path) -> None:
        self.name, self.contender = name, CONTENDERS[name]
        self.log = logs / f"{name.replace(' ', '-').replace(chr(39), '')}.log"
        environment = os.environ | ENVIRONMENT | {"LORAKERN_VLLM": self.contender.setting, "LD_PRELOAD": preloaded()}
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.serving.worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                cwd=ROOT,
                env=environment,
            )
        self._send(
            {
                "engine": {"model": str(model)} | ENGINE | (LORA if self.contender.lora else {}),
                "adapters": adapters if self.contender.lora else [],
            }
        )

    def _send(self, message: dict) -> None:
        try:
            self.process.stdin.write(json.dumps(message) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            raise self._failed() from None

    def _failed(self) -> LorakernError:
        lines = self.log.read_text(errors="replace").splitlines()
        return LorakernError(f"bench: the engine of {self.name!r} ended; {self.log}: " + " / ".join(lines[-3:]))

    def receive(self) -> dict:
        """The answer to the oldest unanswered message; the first one describes the engine."""
        line = self.process.stdout.readline()
        if not line:
            raise self._failed()
        return json.loads(line)

    def serve(self, asked: list[Request], score: list[int] = ()) -> dict:
        asked = asked if self.contender.lora else without_adapters(asked)
        self._send({"requests": asked, "score": list(score)})
        return self.receive()

    def cpu_seconds(self) -> float:
        """Processor time of all of its threads so far."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def close(self) -> None:
        self.process.stdin.close()
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
