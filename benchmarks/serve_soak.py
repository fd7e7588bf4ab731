"""Does a busy server answer each request as it does alone? `python -m benchmarks.serve_soak`.

`lorakern serve` in a process of its own with SmolLM2 and the shipped skills. Every distinct request is answered once
with nothing else going on; then many clients at once ask them again in random order, whole and as streams, some leaving
before the end, while adapters are uploaded, replaced and deleted. Text, tokens, weights and finish reason must be the
same, each upload and deletion must show at once, and memory must stay flat.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

from benchmarks import machine
from benchmarks.records import write_beside
from benchmarks.skills.tasks import SKILLS, held_out_items, stream

ROOT = Path(__file__).resolve().parents[1]
ADAPTERS = ROOT / "benchmarks" / "skills" / "adapters"
PAGE = ROOT / "benchmarks" / "results" / "serve.md"
BOUNDARY = "serve-soak"
SAMPLES = 20  # texts an adapter is uploaded with
LEAVING = 0.05  # of the requests
PASSING = 6  # adapters that come and go; what their texts are about, no request is about
PASSING_TEXTS = [f"Which {part} fits a diesel tractor of 19{year}?" for part in ("gasket", "belt") for year in (51, 62)]
MEMORY_SAMPLES = 100
MAX_GROWTH_MB = 32  # from the half to the end


@dataclass(frozen=True)
class Ask:
    """A request: the model it names, the user's messages, and how many tokens it may get."""

    model: str
    messages: tuple[str, ...]
    tokens: int


class Client:
    """One server, over HTTP."""

    def __init__(self, port: int) -> None:
        self._port = port

    @contextmanager
    def call(self, method: str, path: str, body: bytes | None = None, **headers: str) -> Iterator[Any]:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=300)
        try:
            connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
            yield connection.getresponse()
        finally:
            connection.close()

    def status(self, method: str, path: str, body: bytes | None = None, **headers: str) -> int:
        with self.call(method, path, body, **headers) as response:
            response.read()
            return response.status

    def upload(self, name: str, skill: str, texts: list[str], replace: bool = False) -> int:
        files = [("config", "adapter_config.json"), ("weights", "adapter_model.safetensors")]
        parts = [
            (f'name="{field}"; filename="{file}"', (ADAPTERS / skill / file).read_bytes()) for field, file in files
        ]
        fields = {"name": name, "texts": json.dumps(texts), "replace": json.dumps(replace)}
        parts += [(f'name="{field}"', text.encode()) for field, text in fields.items()]
        head = f"--{BOUNDARY}\r\nContent-Disposition: form-data; "
        body = b"".join(f"{head}{what}\r\n\r\n".encode() + content + b"\r\n" for what, content in parts)
        kind = f"multipart/form-data; boundary={BOUNDARY}"
        return self.status("POST", "/adapters", body + f"--{BOUNDARY}--\r\n".encode(), Content_Type=kind)

    def whole(self, ask: Ask) -> tuple:
        with self.call("POST", "/v1/chat/completions", _body(ask)) as response:
            answer = json.loads(response.read())
        if response.status != 200:
            return response.status, answer["error"]["message"]
        choice = answer["choices"][0]
        return _answer(choice["message"]["content"], choice["finish_reason"], answer)

    def streamed(self, ask: Ask, first: threading.Event | None = None, leave: bool = False) -> tuple:
        """The same from a stream; `first` is set at the first piece, and with `leave` that is where the client goes."""
        text, finish, last = "", None, {}
        with self.call("POST", "/v1/chat/completions", _body(ask, stream=True)) as response:
            if response.status != 200:
                return response.status, response.read().decode()
            for line in response:
                if not line.startswith(b"data: {"):
                    continue
                part = json.loads(line[6:])
                if first is not None:
                    first.set()
                if leave:
                    return ()
                for choice in part["choices"]:
                    text += choice["delta"].get("content", "")
                    finish = choice["finish_reason"] or finish
                last |= {name: part[name] for name in ("usage", "lorakern") if part.get(name)}
        return _answer(text, finish, last)


def _body(ask: Ask, **more: Any) -> bytes:
    messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(ask.messages)]
    more |= {"stream_options": {"include_usage": True}} if more else {}
    return json.dumps({"model": ask.model, "messages": messages, "max_tokens": ask.tokens} | more).encode()


def _answer(text: str, finish: str, fields: dict) -> tuple:
    return text, finish, fields["usage"]["total_tokens"], tuple(fields["lorakern"]["adapters"].items())


@contextmanager
def server(folder: Path, options: list[str]) -> Iterator[tuple[Client, int]]:
    """A server in a process of its own, and its process id."""
    command = [sys.executable, "-m", "lorakern.cli", "serve", "--adapters", str(folder), "--port", "0", *options]
    child = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"}
    )
    try:
        line = child.stdout.readline()
        if "http://" not in line:
            sys.exit("the server did not start")
        yield Client(int(line.rpartition(":")[2])), child.pid
    finally:
        child.terminate()
        child.wait(60)


def resident_mb(process: int) -> float:
    """Anonymous memory: pages of mapped files come and go as the system likes."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024


def requests_of(skills: list[str], rng: random.Random) -> list[Ask]:
    """Found, pinned and base; short ones, and conversations that take several blocks of the prompt."""
    asks = []
    for skill in skills:
        prompts = [prompt for prompt, _ in held_out_items(skill, 4)]
        asks += [Ask("auto", (prompt,), rng.randint(4, 24)) for prompt in prompts[:2]]
        asks.append(Ask(skill, (prompts[2],), rng.randint(4, 24)))
        talk = [text for item in held_out_items(skill, 5) for text in item][:9]
        asks.append(Ask(rng.choice(["auto", skill, "base"]), tuple(talk), rng.randint(4, 12)))
    return asks + [Ask("base", asks[i].messages, 12) for i in range(0, 20, 4)]


class Soak:
    """One run; `failures` says what was not as it must be."""

    def __init__(self, client: Client, process: int, seed: int) -> None:
        self.client, self.process = client, process
        self.failures: list[str] = []
        self.counts: Counter[str] = Counter()
        self.seconds: list[float] = []
        self.resident: list[float] = []
        self._rng, self._lock = random.Random(seed), threading.Lock()
        self.skills = [skill for skill in SKILLS if (ADAPTERS / skill).is_dir()]
        self.alone: dict[Ask, tuple] = dict.fromkeys(requests_of(self.skills, self._rng))
        # each stands for a skill under another name, and later for another one
        chosen = self._rng.sample(self.skills, PASSING + 1)
        self.passing = {f"passing {i}": pair for i, pair in enumerate(pairwise(chosen))}

    def run(self, requests: int, clients: int) -> dict[str, Any]:
        load = os.getloadavg()[0]
        for skill in self.skills:
            texts = [prompt for prompt, _ in islice(stream(skill, held_out=False, seed=1), SAMPLES)]
            self._expect(201, self.client.upload(skill, skill, texts), f"upload of {skill}")
        # all that will come is there: what is found now is found whichever of them are
        for name, (skill, _) in self.passing.items():
            self._expect(201, self.client.upload(name, skill, PASSING_TEXTS), f"upload of {name}")
        began = time.monotonic()
        for ask in self.alone:
            self.alone[ask] = self.client.whole(ask)
            if any(name in self.passing for name, _ in self.alone[ask][3]):
                self._fail(f"{ask}: found an adapter that comes and goes; the soak compares nothing then")
        for name in self.passing:
            self._expect(
                204, self.client.status("DELETE", f"/adapters/{name.replace(' ', '%20')}"), f"deletion of {name}"
            )
        together = time.monotonic()
        asks = list(self.alone)
        work = [(self._rng.choice(asks), self._rng.random()) for _ in range(requests)]
        done = threading.Event()
        with ThreadPoolExecutor(clients) as pool, ThreadPoolExecutor(PASSING + 1) as beside:
            others = [beside.submit(self._come_and_go, done, name) for name in self.passing]
            others.append(beside.submit(self._measure, requests, done))
            try:
                list(pool.map(lambda item: self._serve(*item), work))
            finally:
                done.set()
            for other in others:
                other.result()
        ended = time.monotonic()
        figures = self._figures(requests, clients, together - began, ended - together)
        return figures | {"load average before": round(load, 1)}

    def _figures(self, requests: int, clients: int, alone: float, together: float) -> dict[str, Any]:
        tokens = sum(self.alone[ask][2] for ask in self.alone)
        tenth = max(1, len(self.resident) // 10)
        half = len(self.resident) // 2
        at_half, at_end = (
            statistics.median(self.resident[i - tenth : i]) for i in (max(half, tenth), len(self.resident))
        )
        cuts = statistics.quantiles(self.seconds, n=100)
        return {
            "requests": requests,
            "clients": clients,
            "adapters": len(self.skills),
            "distinct requests": len(self.alone),
            "tokens of the distinct requests": tokens,
            **{name: self.counts[name] for name in ("equal", "left early", "uploads", "replaced", "deletions")},
            "deleted under a running request": self.counts["deleted under"],
            "failures": len(self.failures),
            "seconds": {"alone": round(alone, 1), "together": round(together, 1)},
            "answer seconds": {
                "median": round(cuts[49], 2),
                "p95": round(cuts[94], 2),
                "max": round(max(self.seconds), 2),
            },
            "tokens a second": round(self.counts["tokens"] / together, 1),
            "resident MB": {"begin": round(self.resident[0]), "half": round(at_half), "end": round(at_end)},
            "growth MB": round(at_end - at_half, 1),
        }

    def _serve(self, ask: Ask, draw: float) -> None:
        began = time.monotonic()
        try:
            if draw < LEAVING:
                self.client.streamed(ask, leave=True)
                self._count("left early")
            else:
                got = self.client.streamed(ask) if draw < 0.5 else self.client.whole(ask)
                if got == self.alone[ask]:
                    self._count("equal")
                    self._count("tokens", got[2])
                else:
                    self._fail(f"{ask}: {got}, alone {self.alone[ask]}")
                with self._lock:
                    self.seconds.append(time.monotonic() - began)
        except Exception as error:
            self._fail(f"{ask}: {error!r}")
        self._count("served")

    def _come_and_go(self, done: threading.Event, name: str) -> None:
        """Upload it, ask it, replace it, delete it while a request has it, and ask for it in vain; again and again."""
        while not done.is_set():
            try:
                self._pass_by(name, *self.passing[name])
            except Exception as error:
                self._fail(f"{name}: {error!r}")

    def _pass_by(self, name: str, skill: str, other: str) -> None:
        known = {ask.model: ask for ask in self.alone if ask.model in (skill, other) and len(ask.messages) == 1}

        def same(asked: tuple, of: str) -> bool:
            text, finish, tokens, _ = self.alone[known[of]]
            return asked == (text, finish, tokens, ((name, 1.0),))

        def ask(of: str) -> Ask:
            return Ask(name, known[of].messages, known[of].tokens)

        self._expect(201, self.client.upload(name, skill, PASSING_TEXTS), f"upload of {name}")
        self._count("uploads")
        self._expect(True, same(self.client.whole(ask(skill)), skill), f"{name} as {skill}")
        self._expect(201, self.client.upload(name, other, PASSING_TEXTS, replace=True), f"replacement of {name}")
        self._count("replaced")
        first = threading.Event()
        with ThreadPoolExecutor(1) as pool:
            running = pool.submit(self.client.streamed, ask(other), first)
            first.wait(300)
            path = f"/adapters/{name.replace(' ', '%20')}"
            self._expect(204, self.client.status("DELETE", path), f"deletion of {name}")
            self._expect(True, same(running.result(), other), f"{name} as {other}, deleted meanwhile")
        self._count("deletions")
        self._count("deleted under")
        gone = self.client.whole(ask(other))
        self._expect(404, gone[0], f"{name} after its deletion")

    def _measure(self, requests: int, done: threading.Event) -> None:
        self.resident.append(resident_mb(self.process))
        while not done.wait(0.2):
            if self.counts["served"] * MEMORY_SAMPLES >= requests * len(self.resident):
                self.resident.append(resident_mb(self.process))

    def _count(self, name: str, by: int = 1) -> None:
        with self._lock:
            self.counts[name] += by

    def _expect(self, wanted: Any, got: Any, what: str) -> None:
        if got != wanted:
            self._fail(f"{what}: {got}, not {wanted}")

    def _fail(self, what: str) -> None:
        self.failures.append(what)
        print(what, file=sys.stderr, flush=True)


def page(figures: dict[str, Any], known: dict[str, Any], options: list[str]) -> str:
    """The results page."""
    rows = "\n".join(f"| {name} | {_cell(value)} |" for name, value in figures.items())
    how = " ".join(["lorakern serve", *options])
    return f"""\
# lorakern serve, busy

`python -m benchmarks.serve_soak`, one run.
{__doc__.partition("`.")[2].strip()}

The server is `{how}`, a process beside the clients on the same cores.
An answer's seconds are from its request to its last byte, with {figures["clients"]} clients waiting for theirs; the
tokens are those of prompts and answers. Memory is anonymous.

{chr(10).join(machine.lines(known))}

| | |
|---|---|
{rows}
"""


def _cell(value: Any) -> str:
    return ", ".join(f"{name} {part}" for name, part in value.items()) if isinstance(value, dict) else str(value)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serve_soak", description=__doc__)
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--mode", default="mixture")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--page", type=Path, help=f"write the results page, such as {PAGE.relative_to(ROOT)}")
    chosen = parser.parse_args()
    options = ["--mode", chosen.mode, "--dtype", chosen.dtype]
    with tempfile.TemporaryDirectory() as folder, server(Path(folder), options) as (client, process):
        soak = Soak(client, process, chosen.seed)
        figures = soak.run(chosen.requests, chosen.clients)
    print(json.dumps(figures))
    if chosen.page is not None:
        write_beside(chosen.page, page(figures, machine.describe("cpu"), options))
    if soak.failures or figures["growth MB"] > MAX_GROWTH_MB:
        sys.exit(f"{len(soak.failures)} failures, {figures['growth MB']} MB of growth ({MAX_GROWTH_MB} at most)")


if __name__ == "__main__":
    main()
