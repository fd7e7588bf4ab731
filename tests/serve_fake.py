"""An engine that decodes nothing: it has the interface of `MixtureModel`, and answers by what it was asked."""

import itertools
import sys
import threading
import time
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path

import torch

from lorakern.adapters import LoraAdapter
from lorakern.errors import LorakernError
from lorakern.mixture import LoraRetriever

MODULES = {"layers.0.proj": (6, 8), "layers.1.proj": (6, 8)}  # d_out, d_in


class Letters:
    """Texts to how often they have each letter."""

    identity = "letters"

    def __init__(self):
        self.encoded = 0

    def __call__(self, texts):
        self.encoded += len(texts)
        return torch.tensor([[1e-3 + text.lower().count(chr(97 + i)) for i in range(26)] for text in texts])


@dataclass
class Generation:
    text: str
    tokens: list
    prompt_tokens: int
    adapters: dict
    finish_reason: str


@dataclass
class Ticket:
    words: list
    prompt_tokens: int
    adapters: dict
    on_token: object
    cancelled: bool = False
    _future: Future = field(default_factory=Future)

    def result(self, timeout=None):
        return self._future.result(timeout)

    def cancel(self):
        self.cancelled = True

    def done(self):
        return self._future.done()

    def add_done_callback(self, function):
        self._future.add_done_callback(lambda _: function(self))

    def finish(self, words, reason):
        tokens = list(range(len(words)))
        self._future.set_result(Generation("".join(words), tokens, self.prompt_tokens, self.adapters, reason))

    def fail(self, error):
        self._future.set_exception(error)


class FakeEngine:
    """Says its adapters and then the words of the prompt, one every `seconds`, until `max_new_tokens`.

    A prompt with the word "slow" is never done, one with "broken" fails.
    """

    def __init__(self, seconds=0.0, max_tokens=2048):
        self.failure = None
        self.mode, self.k, self.max_tokens, self.seconds = "mixture", 2, max_tokens, seconds
        self.retriever = LoraRetriever(Letters(), instruction="")
        self.adapters, self.tickets, self.cancelled = {}, [], 0
        self.counts = {"tokens": 0, "prompt_tokens": 0, "requests": 0}
        self._running, self._lock = 0, threading.Lock()

    @property
    def names(self):
        return list(self.adapters)

    def check(self, name, adapter):
        if name in ("auto", "base"):
            raise LorakernError(f"name {name} is reserved")
        for module, factors in adapter.items():
            if MODULES.get(module) != (factors.B.shape[0], factors.A.shape[1]):
                raise LorakernError(f"adapter {name}: {module} does not fit the model")

    def add(self, name, adapter, texts=None, *, embedding=None, replace=False):
        loaded = adapter if isinstance(adapter, LoraAdapter) else LoraAdapter.load(adapter)
        self.check(name, loaded)
        if name in self.adapters and not replace:
            raise LorakernError(f"{name} is there already")
        if texts is not None:
            embedding = self.retriever.embedding(texts)
        if embedding is not None:
            self.retriever.add_embedding(name, embedding, replace=replace)
        self.adapters[name] = adapter

    def remove(self, name):
        del self.adapters[name]
        if name in self.retriever:
            self.retriever.remove(name)

    def submit(self, prompt, *, max_new_tokens=64, stop=(), adapters=None, exclude=None, on_token=None, query=None):
        if self.failure is not None:
            raise LorakernError("the model was closed")
        words = [str(token) for token in prompt] if isinstance(prompt, list) else prompt.split()
        if not words:
            raise LorakernError("prompt is empty; give some text")
        if len(words) >= self.max_tokens:
            raise LorakernError(f"prompt has {len(words)} tokens, the model has room for {self.max_tokens}")
        if adapters is None:
            (found,) = self.retriever.retrieve([query or " ".join(words)], k=self.k)
            names = [name for name, _ in found]
        else:
            names = [adapters] if isinstance(adapters, str) else list(adapters)
        if unknown := [name for name in names if name not in self.adapters]:
            raise LorakernError(f"there is no adapter {unknown[0]!r}")
        weights = {name: 1 / len(names) for name in names}
        ticket = Ticket(words, len(words), weights, on_token)
        self.tickets.append(ticket)
        threading.Thread(target=self._decode, args=(ticket, max_new_tokens, list(stop)), daemon=True).start()
        return ticket

    def _decode(self, ticket, limit, stop):
        with self._lock:
            self._running += 1
            self.counts["requests"] += 1
            self.counts["prompt_tokens"] += len(ticket.words)
        said, reason = [], "stop"
        slow = "slow" in ticket.words
        for word in itertools.cycle(["wait"]) if slow else ["+".join(ticket.adapters) or "base", *ticket.words]:
            if ticket.cancelled or len(said) == limit:
                reason = "cancelled" if ticket.cancelled else "length"
                self.cancelled += ticket.cancelled
                break
            if word in stop:
                break
            if word == "broken":
                reason = "broken"
                break
            time.sleep(0.02 if slow else self.seconds)
            said.append((" " if said else "") + word)
            self.counts["tokens"] += 1
            if ticket.on_token is not None:
                ticket.on_token(said[-1])
        with self._lock:
            self._running -= 1
        if reason == "broken":
            ticket.fail(RuntimeError("the engine broke"))
        else:
            ticket.finish(said, reason)

    def stats(self):
        now = {"running": self._running, "waiting": 0, "loaded": len(self.adapters), "adapters": len(self.adapters)}
        return now | self.counts

    def close(self):
        for ticket in self.tickets:
            ticket.cancel()


def template(messages):
    """The user's words as they are, with the roles between."""
    return [f"{message['role']}: {message['content']}" for message in messages][-1].split()


def main(folder):
    """A server of its own, to be killed; prints its address."""
    from lorakern.serve import Settings, create_app
    from lorakern.serve.run import log_to_stderr, serve

    log_to_stderr()
    engine = FakeEngine()
    app = create_app(engine, engine.retriever, Path(folder), template, Settings(max_weights=1 << 20))
    encoded = engine.retriever.encoder.encoded
    serve(app, "127.0.0.1", 0, lambda address: print(f"{address} {encoded}", flush=True))


if __name__ == "__main__":
    main(*sys.argv[1:])
