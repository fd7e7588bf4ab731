"""MixtureModel: a model that answers each prompt with the adapters that are retrieved for it."""

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch

from lorakern.adapters.json_file import show
from lorakern.errors import LorakernError
from lorakern.integrations.packed import PackedModel
from lorakern.mixture._checks import check_texts
from lorakern.mixture._threads import release_team
from lorakern.mixture.engine import Engine, Generation, Request
from lorakern.mixture.layers import MixtureLayers
from lorakern.mixture.pool import Source
from lorakern.mixture.retriever import LoraRetriever
from lorakern.mixture.routers import Routers

Names = str | Sequence[str] | None


class Ticket:
    """A request on its way."""

    def __init__(self, engine: Engine, request: Request) -> None:
        self._engine, self._request = engine, request

    def result(self, timeout: float | None = None) -> Generation:
        """Wait for it, `timeout` seconds at most (TimeoutError)."""
        return self._request.future.result(timeout)

    def done(self) -> bool:
        return self._request.future.done()

    def cancel(self) -> None:
        """Stop it where it is; the result has what there is."""
        self._engine.cancel(self._request)

    def add_done_callback(self, callback: Callable[["Ticket"], Any]) -> None:
        """Call `callback(self)` when it is done, from the engine's thread, or now if it is."""
        self._request.future.add_done_callback(lambda _: callback(self))


class MixtureModel:
    """A base model and a pool of adapters that may grow and shrink while it answers: RAMoLE.

    For each prompt the k most fitting adapters are retrieved, and composed in every layer; rows with other adapters run
    in one batch (continuous batching, one thread). A prompt's answer is the same to the bit, alone and in any company,
    on one machine with one `max_rows`.

    Args:
        model: a causal language model of transformers, whose attention sees all previous tokens.
        retriever: what finds the adapters; None if every request names its own.
        tokenizer: the model's; None to load the one of transformers for `model.config._name_or_path`.
        mode: how adapters are composed: "selection" (the best one), "fusion" (the mean of factors), "mixture" (the mean
            of outputs), "ramole" (a router by attention), "mole", "lora_flow", "meteora", "arrow" or "milora".
        k: how many adapters a prompt gets, 1 for "selection".
        routers: what "ramole", "mole", "lora_flow", "meteora" and "milora" have learned, see `train_router`.
        max_rows: how many prompts run at once.
        max_loaded: how many adapters are in slots at once; the others stay in their files. At least k.
        max_tokens: the most tokens of a prompt and its answer.

    Raises:
        LorakernError: for arguments of another form, and routers that do not fit.

    RAMoLE: arXiv 2406.16989; LoraRetriever: arXiv 2402.09997.

    >>> from lorakern.integrations import smollm2                         # doctest: +SKIP
    >>> from lorakern.mixture import LoraRetriever, MixtureModel
    >>> model, tokenizer = smollm2.load()                                 # doctest: +SKIP
    >>> mixture = MixtureModel(model, LoraRetriever(), tokenizer=tokenizer, mode="mixture")   # doctest: +SKIP
    >>> mixture.add("clock", "adapters/clock", ["Convert to 12-hour time: 13:05"])            # doctest: +SKIP
    >>> mixture.generate(["Convert to 12-hour time: 18:30"])[0].adapters                      # doctest: +SKIP
    {'clock': 1.0}
    """

    def __init__(
        self,
        model: torch.nn.Module,
        retriever: LoraRetriever | None = None,
        *,
        tokenizer: Any = None,
        mode: str = "mixture",
        k: int = 3,
        routers: Routers | None = None,
        max_rows: int = 16,
        max_loaded: int = 64,
        max_tokens: int = 2048,
    ) -> None:
        for name, value in (("k", k), ("max_rows", max_rows), ("max_loaded", max_loaded), ("max_tokens", max_tokens)):
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise LorakernError(f"{name} must be an integer of at least 1, got {show(value)}")
        if retriever is not None and not isinstance(retriever, LoraRetriever):
            raise LorakernError(f"retriever must be a LoraRetriever or None, got {show(retriever)}")
        packed = PackedModel(model, max_rows=max_rows, max_tokens=max_tokens)
        self.tokenizer = _tokenizer_of(model) if tokenizer is None else tokenizer
        self.retriever, self.mode = retriever, mode
        self.layers = MixtureLayers(model, mode, max_loaded, routers)
        self.k = min(k, self.layers.mode.most or k)
        if self.k > max_loaded:
            self.layers.close()
            raise LorakernError(f"max_loaded is {max_loaded}, fewer than the k = {self.k} adapters of one prompt")
        self.max_tokens = packed.max_tokens
        self._engine = Engine(packed, self.layers, self.tokenizer, self.k)
        self._pool = self._engine.pool

    def __enter__(self) -> "MixtureModel":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    @property
    def names(self) -> list[str]:
        """The adapters that new requests may get, in the order of upload."""
        return self._pool.names

    @property
    def failure(self) -> BaseException | None:
        """What the model failed with; it takes no more requests then."""
        return self._engine.failure

    def check(self, name: str, adapter: Source) -> None:
        """Raise what `add` would raise for this adapter, and add nothing."""
        self._pool.check("check", name, adapter)

    def add(
        self,
        name: str,
        adapter: Source,
        texts: Sequence[str] | None = None,
        *,
        embedding: torch.Tensor | None = None,
        replace: bool = False,
    ) -> None:
        """Add an adapter; requests get it from now on.

        Args:
            name: printable text that no other adapter has, unless it is to `replace` that one.
            adapter: a `LoraAdapter`, or the path of one, whose files are mapped and read when a request needs it.
            texts: sample texts of its task, by which it is retrieved. Without them and `embedding` it is there for
                requests that name it.
            embedding: (d,), the mean of what the retriever's encoder makes of such texts.
            replace: allow a name that is there; each request gets the old one or the new one, and finishes with it.

        Raises:
            LorakernError: a name that is taken, an adapter that does not fit the model, or samples of another form.
        """
        if texts is not None and embedding is not None:
            raise LorakernError("texts and embedding are both given; give one of them")
        if self.retriever is None and (texts is not None or embedding is not None):
            raise LorakernError("texts or an embedding need a retriever; give MixtureModel one, or leave them out")
        if texts is not None:
            embedding = self.retriever.embedding(texts)
        self._pool.add("add", name, adapter, replace)
        # in the pool first: what is retrieved can be run
        try:
            if embedding is not None:
                self.retriever.add_embedding(name, embedding, replace=replace)
            elif self.retriever is not None and name in self.retriever:
                self.retriever.remove(name)
        except BaseException:
            self._pool.remove("add", name)
            raise

    def remove(self, name: str) -> None:
        """Take an adapter away; requests that have it finish with it.

        Raises:
            LorakernError: it is not there.
        """
        self._pool.remove("remove", name)
        if self.retriever is not None and name in self.retriever:
            self.retriever.remove(name)

    def submit(
        self,
        prompt: str | Sequence[int],
        *,
        max_new_tokens: int = 64,
        stop: Sequence[str] = (),
        adapters: Names = None,
        exclude: str | Collection[str] | None = None,
        query: str | None = None,
        on_token: Callable[[str], None] | None = None,
    ) -> Ticket:
        """Hand in one prompt; returns at once. Greedy decoding.

        Args:
            prompt: text, in the format that the model expects, or tokens.
            max_new_tokens: the most new tokens.
            stop: texts at which the answer ends.
            adapters: None to retrieve; a name or names, at most k, in place of that; () for the base model.
            exclude: names that shall not be retrieved.
            query: what is retrieved by, such as the words of the user without the format; None for the prompt.
            on_token: called from the engine's thread with each new piece of text.

        Raises:
            LorakernError: for an unknown name, a prompt that is empty or too long, or arguments of another form.
        """
        return self._submit([prompt], max_new_tokens, stop, [adapters], [exclude], [query], [on_token])[0]

    def generate(
        self,
        prompts: Sequence[str | Sequence[int]],
        *,
        max_new_tokens: int = 64,
        stop: Sequence[str] = (),
        adapters: Sequence[Names] | None = None,
        exclude: Sequence[str | Collection[str] | None] | None = None,
        queries: Sequence[str | None] | None = None,
    ) -> list[Generation]:
        """Answers to all prompts, in their order; other arguments as in `submit`, in lists with one for each prompt."""
        if isinstance(prompts, str) or not isinstance(prompts, Sequence):
            raise LorakernError(f"prompts must be a list of texts, got {show(prompts)}")
        lists = []
        for name, value in (("adapters", adapters), ("exclude", exclude), ("queries", queries)):
            if value is not None and (isinstance(value, str) or len(value) != len(prompts)):
                raise LorakernError(f"{name} must be a list with one for each of the {len(prompts)} prompts")
            lists.append([None] * len(prompts) if value is None else value)
        tickets = self._submit(prompts, max_new_tokens, stop, *lists, [None] * len(prompts))
        try:
            return [ticket.result() for ticket in tickets]
        except BaseException:
            for ticket in tickets:
                ticket.cancel()
            raise

    def stats(self) -> dict[str, int]:
        """What runs now, and totals since the start."""
        engine = self._engine
        return {
            "running": engine.running,
            "waiting": engine.waiting,
            "loaded": self._pool.loaded,
            "adapters": len(self._pool.names),
            "tokens": engine.generated,
            "prompt_tokens": engine.prompted,
            "requests": engine.requests,
        }

    def close(self) -> None:
        """Cancel what runs, and give the model back as it was."""
        self._engine.close()
        self.layers.close()

    def _submit(self, prompts, max_new_tokens, stop, adapters, exclude, queries, listeners) -> list[Ticket]:
        if not isinstance(max_new_tokens, int) or isinstance(max_new_tokens, bool) or max_new_tokens < 1:
            raise LorakernError(f"max_new_tokens must be an integer of at least 1, got {show(max_new_tokens)}")
        stop = tuple(check_texts([stop] if isinstance(stop, str) else stop, empty=True))
        tokens = [self._encode(prompt) for prompt in prompts]
        entries = self._entries(prompts, adapters, exclude, queries)
        requests = [
            Request(prompt, found, max_new_tokens, tuple(text for text in stop if text), listener)
            for prompt, found, listener in zip(tokens, entries, listeners, strict=True)
        ]
        release_team()
        self._engine.submit(requests)
        return [Ticket(self._engine, request) for request in requests]

    def _encode(self, prompt: str | Sequence[int]) -> list[int]:
        tokens = self.tokenizer(prompt)["input_ids"] if isinstance(prompt, str) else list(prompt)
        if not tokens:
            raise LorakernError("prompt is empty; give at least one token")
        size = self.tokenizer.vocab_size + len(self.tokenizer.get_added_vocab())
        if wrong := [t for t in tokens if not isinstance(t, int) or isinstance(t, bool) or not 0 <= t < size]:
            raise LorakernError(f"prompt must be text or tokens from 0 to {size - 1}, got {show(wrong[0])} among them")
        if len(tokens) >= self.max_tokens:
            raise LorakernError(
                f"prompt has {len(tokens)} tokens, the model has room for {self.max_tokens} with the answer"
            )
        return tokens

    def _entries(self, prompts, adapters, exclude, queries):
        """The adapters of each prompt: those it names, or those that are retrieved."""
        open_rows = [i for i, names in enumerate(adapters) if names is None]
        texts = [prompts[i] if queries[i] is None else queries[i] for i in open_rows]
        if open_rows and self.retriever is None:
            raise LorakernError("adapters must be named for each prompt, as there is no retriever")
        if [text for text in texts if not isinstance(text, str)]:
            raise LorakernError("query is needed where the prompt is tokens and adapters are retrieved")
        found: list[list[str]] = [[] if names is None else self._named(names) for names in adapters]
        entries = [self._pool.find(names) for names in found]
        left = list(open_rows)
        while left:
            asked = [texts[open_rows.index(i)] for i in left]
            rows = self.retriever.retrieve(asked, self.k, [exclude[i] for i in left])
            again = []
            for i, row in zip(left, rows, strict=True):
                try:
                    entries[i] = self._pool.find([name for name, _ in row])
                except LorakernError:
                    # it was removed just now: the retriever will not have it for long
                    again.append(i)
            left = again
        return entries

    def _named(self, names: Names) -> list[str]:
        names = [names] if isinstance(names, str) else list(names)
        if len(names) > self.k or len(set(names)) < len(names):
            raise LorakernError(f"adapters must be at most k = {self.k} different names, got {show(names)}")
        return names


def _tokenizer_of(model: torch.nn.Module) -> Any:
    from transformers import AutoTokenizer

    name = getattr(model.config, "_name_or_path", "")
    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise LorakernError(f"tokenizer: none is given, and {name!r} has none ({error}); give tokenizer=") from None
