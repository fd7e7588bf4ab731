"""Many clients over more adapters than slots, with loads, unloads and cancelled requests going on: every answer is
that of the same request alone, and memory stays flat. Prints one line of JSON; `make soak-vllm` runs it.
"""

import argparse
import contextlib
import json
import random
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from adapters import damaged, derive
from engines import SKILLS, model_folder, questions
from server import BASE, Request, Server, serving

DERIVED = (
    ("roman", {"strength": 0.5}),
    ("pig_latin", {"strength": 1.5}),
    ("iso_date", {"strength": 0.7}),
    ("email", {"rank": 8}),
    ("clock", {"rank": 5}),
    ("answer_json", {"rank": 32}),
)
SLOTS, KEPT, MAX_RANK = 4, 8, 32
CANCELLED = 0.1  # of the requests
REQUESTS_PER_CHANGE = 5  # loads, unloads and refused loads keep pace with the requests
SAMPLES = 100
# of resident memory, from the half to the end: vLLM's tcmalloc still fills its caches until 500 requests or so
MAX_GROWTH_MB = 32


class Leases:
    """Which adapters have requests in flight: an adapter is unloaded when it has none, and is back before the next."""

    def __init__(self) -> None:
        self._changed, self._clients, self._reloading = threading.Condition(), Counter(), set()

    @contextlib.contextmanager
    def used(self, name: str):
        with self._changed:
            self._changed.wait_for(lambda: name not in self._reloading)
            self._clients[name] += 1
        try:
            yield
        finally:
            with self._changed:
                self._clients[name] -= 1
                self._changed.notify_all()

    @contextlib.contextmanager
    def reloaded(self, name: str):
        with self._changed:
            self._reloading.add(name)
            self._changed.wait_for(lambda: not self._clients[name])
        try:
            yield
        finally:
            with self._changed:
                self._reloading.remove(name)
                self._changed.notify_all()


class Soak:
    """One run on a server; ``failures`` says what was not as it must be."""

    def __init__(self, server: Server, folder: Path, adapters: int, seed: int) -> None:
        self.server, self.random = server, random.Random(seed)
        self.failures, self.counts, self.resident = [], Counter(), []
        self._leases, self._progress = Leases(), threading.Condition()
        asked = questions()
        origins = [(skill, {}) for skill in asked] + list(DERIVED)
        # the last ones first, so that a few adapters are of both kinds
        self.folders, self.alone = {}, {}
        for i, (skill, changes) in enumerate(origins[len(origins) - adapters :]):
            name = f"soak-{i}-{skill}"
            self.folders[name] = derive(skill, folder / name, **changes) if changes else SKILLS / skill
            self._note(name, [item["prompt"] for item in asked[skill]])
        self._note(BASE, [item["prompt"] for item in asked["clock"]])
        self.passing = derive("sort_words", folder / "passing", strength=0.8)
        self._note("soak-passing", [item["prompt"] for item in asked["sort_words"]])
        self.broken = damaged("A too wide", folder / "broken")

    def _note(self, name: str, prompts: list[str]) -> None:
        """Two short prompts and one that is prefilled in parts."""
        for prompt in (*prompts[:2], "".join(prompts)):
            self.alone[Request(name, prompt, self.random.randint(8, 16))] = None

    def run(self, requests: int, clients: int) -> dict:
        for name, folder in {**self.folders, "soak-passing": self.passing}.items():
            self._expect(200, self.server.load(name, folder), f"load {name}")
        began = time.monotonic()
        self.alone = {request: self.server.answer(request) for request in self.alone}
        self._expect(200, self.server.unload("soak-passing"), "unload")
        together = time.monotonic()
        choice = [request for request in self.alone if request.adapter != "soak-passing"]
        work = [(self.random.choice(choice), self.random.random() < CANCELLED) for _ in range(requests)]
        with ThreadPoolExecutor(clients) as pool, ThreadPoolExecutor(2) as beside:
            others = [beside.submit(self._change, requests), beside.submit(self._measure, requests)]
            list(pool.map(lambda item: self._serve(*item), work))
            for other in others:
                other.result()
        for name in self.folders:
            self._expect(200, self.server.unload(name), f"unload {name}")
        tenth = SAMPLES // 10
        half, end = (statistics.median(self.resident[i - tenth : i]) for i in (SAMPLES // 2, SAMPLES))
        return {
            "requests": requests,
            "clients": clients,
            "adapters": len(self.folders),
            "distinct requests": len(self.alone),
            **{name: self.counts[name] for name in ("equal", "cancelled", "reloads", "passing", "refused loads")},
            "failures": len(self.failures),
            "resident MB": {"begin": self.resident[0], "half": half, "end": end, "peak": max(self.resident)},
            "seconds": {"alone": round(together - began), "together": round(time.monotonic() - together)},
        }

    def _fail(self, what: str) -> None:
        self.failures.append(what)
        print(what, file=sys.stderr, flush=True)

    def _expect(self, status: int, response, what: str) -> bool:
        if response.status_code != status:
            self._fail(f"{what}: {response.status_code} {response.text[:500]}")
        return response.status_code == status

    def _serve(self, request: Request, cancel: bool) -> None:
        expected = self.alone[request]
        if cancel:
            expected = expected[: len(expected) // 3]
        try:
            with self._leases.used(request.adapter):
                got = self.server.answer_in_part(request, len(expected)) if cancel else self.server.answer(request)
            if got == expected:
                self.counts_up("cancelled" if cancel else "equal")
            else:
                self._fail(f"{request}: {got}, alone {expected}")
        except Exception as error:
            self._fail(f"{request}: {error!r}")
        self.counts_up("served")

    def counts_up(self, name: str) -> None:
        with self._progress:
            self.counts[name] += 1
            self._progress.notify_all()

    def _wait_for(self, served: float) -> None:
        with self._progress:
            self._progress.wait_for(lambda: self.counts["served"] >= served)

    def _measure(self, requests: int) -> None:
        for i in range(SAMPLES):
            self._wait_for(requests * (i + 1) / SAMPLES)
            self.resident.append(round(self.server.resident_bytes() / 1e6, 1))

    def _change(self, requests: int) -> None:
        """Reload an adapter that was served and will be; serve one that comes and goes; try to load a broken one."""
        names, passing = list(self.folders), [request for request in self.alone if request.adapter == "soak-passing"]
        for i in range(requests // REQUESTS_PER_CHANGE):
            self._wait_for(i * REQUESTS_PER_CHANGE)
            try:
                if i % 3 == 0:
                    self._reload(names[i // 3 % len(names)])
                elif i % 3 == 1:
                    self._pass_by(passing[i // 3 % len(passing)])
                elif self._expect(500, self.server.load("soak-broken", self.broken), "load of a broken adapter"):
                    self.counts_up("refused loads")
            except Exception as error:
                self._fail(f"change {i}: {error!r}")

    def _reload(self, name: str) -> None:
        with self._leases.reloaded(name):
            done = self._expect(200, self.server.unload(name), f"unload {name}")
            done &= self._expect(404, self.server.ask(Request(name, "Hello", 1)), f"{name} while it is unloaded")
            done &= self._expect(200, self.server.load(name, self.folders[name]), f"load {name}")
        if done:
            self.counts_up("reloads")

    def _pass_by(self, request: Request) -> None:
        self._expect(200, self.server.load(request.adapter, self.passing), "load")
        if self.server.answer(request) == self.alone[request]:
            self.counts_up("passing")
        else:
            self._fail(f"{request}: not as alone")
        self._expect(200, self.server.unload(request.adapter), "unload")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=500)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--adapters", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    settings = ("--max-loras", SLOTS, "--max-cpu-loras", KEPT, "--max-lora-rank", MAX_RANK, "--block-size", 32)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        with serving(model_folder(), folder, *map(str, settings)) as server:
            soak = Soak(server, folder, options.adapters, options.seed)
            figures = soak.run(options.requests, options.clients)
    print(json.dumps(figures))
    growth = figures["resident MB"]["end"] - figures["resident MB"]["half"]
    if soak.failures or growth > MAX_GROWTH_MB:
        sys.exit(f"{len(soak.failures)} failures, {growth:.1f} MB of growth ({MAX_GROWTH_MB} at most)")


if __name__ == "__main__":
    main()
