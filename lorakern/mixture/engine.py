"""Continuous batching: requests with adapters of their own join and leave the rows of one packed model."""

import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

import torch

from lorakern.errors import LorakernError
from lorakern.integrations.packed import PackedModel, Piece
from lorakern.mixture._threads import release_team
from lorakern.mixture.layers import MixtureLayers, tokens_of
from lorakern.mixture.pool import AdapterPool, Entry

_BLOCKS_A_STEP = 3  # forwards over prompts between two steps of the rows that decode


@dataclass(frozen=True)
class Generation:
    """What a request got.

    Attributes:
        text: the new tokens as text, without what ended it.
        tokens: their numbers, that of the end left out.
        prompt_tokens: how many tokens the prompt has.
        adapters: the adapters that served it, with their weights: the mean of the gates over the prompt's tokens and
            the layers that have any of them.
        finish_reason: "stop" at the end of the answer, "length" at `max_new_tokens`, or "cancelled".
    """

    text: str
    tokens: list[int]
    prompt_tokens: int
    adapters: dict[str, float]
    finish_reason: str


@dataclass(eq=False)
class Request:
    """A request on its way; `row` is its row of the cache once it runs, `sums` those of its gates."""

    prompt: list[int]
    entries: list[Entry]
    max_new_tokens: int
    stop: tuple[str, ...] = ()
    on_token: Callable[[str], None] | None = None
    future: Future = field(default_factory=Future)
    cancelled: bool = False
    row: int = -1
    done: int = 0  # tokens of the prompt that ran
    tokens: list[int] = field(default_factory=list)
    sent: int = 0  # characters that on_token was given
    sums: torch.Tensor | None = None
    layers: float = 0.0


class Engine:
    """One thread that runs the model for all requests.

    A step runs some blocks of prompts and then one token of every row that decodes. Greedy: the most likely token.
    """

    def __init__(self, packed: PackedModel, layers: MixtureLayers, tokenizer, width: int) -> None:
        self._packed, self._layers, self._tokenizer, self._width = packed, layers, tokenizer, width
        ends = getattr(getattr(packed.model, "generation_config", None), "eos_token_id", None)
        ends = ends if isinstance(ends, list) else [ends]
        self._ends = {end for end in [*ends, tokenizer.eos_token_id] if end is not None}
        self._memory: dict[str, torch.Tensor] = {}
        self._free_rows = list(range(packed.max_rows))[::-1]
        self._waiting: deque[Request] = deque()
        self._running: list[Request] = []
        self._wake = threading.Condition()
        self._closed = False
        self.failure: BaseException | None = None
        self.generated = self.prompted = self.requests = 0
        self.pool = AdapterPool(layers, self._notify)
        self._thread = threading.Thread(target=self._run, name="lorakern-engine", daemon=True)
        self._thread.start()

    @property
    def running(self) -> int:
        return len(self._running)

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    def submit(self, requests: Sequence[Request]) -> None:
        """All of them, in this order."""
        with self._wake:
            if self._closed:
                raise LorakernError("the model was closed; make another MixtureModel") from self.failure
            self._waiting.extend(requests)
            self._wake.notify()

    def cancel(self, request: Request) -> None:
        with self._wake:
            request.cancelled = True
            self._wake.notify()

    def close(self) -> None:
        """Cancel what is not done, and end the threads."""
        with self._wake:
            self._closed = True
            self._wake.notify()
        self._thread.join()
        self.pool.close()

    def _notify(self) -> None:
        with self._wake:
            self._wake.notify()

    def _run(self) -> None:
        try:
            while True:
                with self._wake:
                    if self._closed:
                        break
                    self._admit()
                    if not any(self._ready(request) for request in self._running):
                        release_team()
                        self._wake.wait()
                        continue
                for _ in range(_BLOCKS_A_STEP):
                    if not self._prefill():
                        break
                self._decode()
        except BaseException as error:  # a failure of the model: every request is told, and later ones too
            self.failure = error
        with self._wake:
            self._closed = True
            left = [*self._running, *self._waiting]
            self._waiting.clear()
        for request in left:
            if self.failure is not None:
                self._fail(request, self.failure)
            else:
                self._finish(request, "cancelled")

    def _admit(self) -> None:
        """Give rows and slots to those who wait, in order; who needs slots that are taken lets later ones pass."""
        for request in [request for request in self._running if request.cancelled]:
            self._finish(request, "cancelled")
        passed = deque()
        while self._waiting:
            request = self._waiting.popleft()
            if request.cancelled:
                self._finish(request, "cancelled")
            elif self._free_rows and self.pool.acquire(request.entries):
                request.row = self._free_rows.pop()
                self._running.append(request)
            else:
                passed.append(request)
                if not self._free_rows:
                    break
        passed.extend(self._waiting)
        self._waiting = passed

    def _ready(self, request: Request) -> bool:
        return all(entry.ready or entry.error for entry in request.entries)

    def _prefill(self) -> bool:
        """One block of prompts' pieces, cut at places that depend on their own prompt alone; False if there is none."""
        block, most = self._packed.block, self._packed.max_rows
        chosen: list[tuple[Request, Piece]] = []
        room = block
        for request in list(self._running):
            if request.done == len(request.prompt) or not self._ready(request) or len(chosen) == most:
                continue
            if failed := [entry for entry in request.entries if entry.error]:
                self._fail(request, failed[0].error)
                continue
            piece = Piece(request.row, request.done, request.prompt[request.done : request.done + block])
            if len(piece.tokens) <= room:
                room -= len(piece.tokens)
                chosen.append((request, piece))
        if not chosen:
            return False
        tokens = self._tokens(chosen, block, watch=True)
        with self._layers.run(tokens):
            logits = self._packed.prefill([piece for _, piece in chosen])
        gates, layers = tokens.watched()
        first = 0
        for (request, piece), row in zip(chosen, logits.argmax(1).tolist(), strict=True):
            span = slice(first, first + len(piece.tokens))
            first += len(piece.tokens)
            sums = gates[span].sum(0)
            request.sums = sums if request.sums is None else request.sums + sums
            request.layers += float(layers[span].sum())
            request.done = piece.end
            self.prompted += len(piece.tokens)
            if request.done == len(request.prompt):
                self._take(request, row)
        return True

    def _decode(self) -> None:
        rows = [request for request in self._running if request.done == len(request.prompt)]
        if not rows:
            return
        # neighbours in the cache are read at once
        rows.sort(key=lambda request: request.row)
        chosen = [(r, Piece(r.row, len(r.prompt) + len(r.tokens) - 1, r.tokens[-1:])) for r in rows]
        tokens = self._tokens(chosen, self._packed.max_rows, watch=False)
        with self._layers.run(tokens):
            logits = self._packed.decode([piece for _, piece in chosen])
        for request, token in zip(rows, logits.argmax(1).tolist(), strict=True):
            self._take(request, token)

    def _tokens(self, chosen: Sequence[tuple[Request, Piece]], size: int, watch: bool):
        with torch.inference_mode():
            return tokens_of(
                [[entry.slot for entry in request.entries] for request, _ in chosen],
                [len(piece.tokens) for _, piece in chosen],
                width=self._width,
                slots=self._layers.slots,
                size=size,
                sequences=[piece.row for _, piece in chosen],
                pooled=[len(piece.tokens) if watch and piece.start == 0 else 0 for _, piece in chosen],
                count=self._packed.max_rows,
                memory=self._memory,
                watch=watch,
                device=self._packed.model.device,
            )

    def _take(self, request: Request, token: int) -> None:
        """One more token of a request, which may be its last."""
        if token in self._ends:
            return self._finish(request, "stop")
        request.tokens.append(token)
        self.generated += 1
        if request.stop or request.on_token:
            text = self._text(request)
            if found := [at for stop in request.stop if (at := text.find(stop)) >= 0]:
                return self._finish(request, "stop", text[: min(found)])
            # a character may need more tokens, and a stop may have begun
            whole = len(text.rstrip("\ufffd")) if text.endswith("\ufffd") else len(text)
            self._send(request, text, min(whole, len(text) - _begun(text, request.stop)))
        full = len(request.prompt) + len(request.tokens) == self._packed.max_tokens
        if full or len(request.tokens) == request.max_new_tokens:
            self._finish(request, "length")
        return None

    def _text(self, request: Request) -> str:
        return self._tokenizer.decode(request.tokens, skip_special_tokens=True)

    def _send(self, request: Request, text: str, upto: int) -> None:
        if request.on_token is not None and upto > request.sent:
            piece, request.sent = text[request.sent : upto], upto
            try:
                request.on_token(piece)
            except Exception:  # of a listener that is gone, say: no other request may suffer
                request.cancelled = True

    def _finish(self, request: Request, reason: str, text: str | None = None) -> None:
        text = self._text(request) if text is None else text
        self._send(request, text, len(text))
        self._leave(request)
        names = [entry.name for entry in request.entries]
        weights = [0.0] * len(names) if request.sums is None else request.sums.tolist()
        adapters = {name: weight / (request.layers or 1) for name, weight in zip(names, weights, strict=False)}
        self.requests += 1
        request.future.set_result(Generation(text, request.tokens, len(request.prompt), adapters, reason))

    def _fail(self, request: Request, error: BaseException) -> None:
        self._leave(request)
        request.future.set_exception(error)

    def _leave(self, request: Request) -> None:
        if request in self._running:
            self._running.remove(request)
            self._free_rows.append(request.row)
            self.pool.release(request.entries)


def _begun(text: str, stops: Sequence[str]) -> int:
    """How many characters at the end of the text begin a stop."""
    return max((n for stop in stops for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0)
