"""Sample inputs of a task: texts, a JSONL file or batches, read as often as there are passes over them."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from lorakern.adapters.json_file import show
from lorakern.adapters.state_file import hash_tensor
from lorakern.errors import LorakernError
from lorakern.merge._texts import Text, is_file, is_text, read_texts, text_of


class Batch(NamedTuple):
    """Arguments of one forward, and which positions count (None for all)."""

    args: tuple[torch.Tensor, ...]
    named: dict[str, Any]
    mask: torch.Tensor | None


class Samples:
    """The batches of one source, on a device; `where` names the source in errors.

    Raises:
        LorakernError: no samples, a source that can be read only once, a file or a batch that cannot be read.
    """

    def __init__(
        self,
        where: str,
        source: Any,
        device: torch.device,
        *,
        tokenizer: Callable | None,
        batch_size: int,
        max_length: int,
    ) -> None:
        self._where = where
        self._device = device
        if is_file(source):
            source = list(_tokenised(list(read_texts(f"{where}:", Path(source))), tokenizer, batch_size, max_length))
        elif isinstance(source, Sequence) and source and is_text(source[0]):
            texts = [text_of(f"{where}, item {i}", item) for i, item in enumerate(source)]
            source = list(_tokenised(texts, tokenizer, batch_size, max_length))
        if isinstance(source, (Mapping, torch.Tensor)) or not isinstance(source, Iterable):
            raise LorakernError(
                f"{where} must be a list of texts, the path of a JSONL file or an iterable of batches, got "
                f"{type(source).__name__} (one batch goes into a list)"
            )
        if isinstance(source, Iterator):
            raise LorakernError(
                f"{where} is a {type(source).__name__}, which can be read only once, but every sweep reads it anew; "
                "give a list, a DataLoader, or another object whose __iter__ begins again"
            )
        self._batches = source
        if next(iter(self), None) is None:
            raise LorakernError(f"{where} is empty; give at least one sample of each task")

    def __iter__(self) -> Iterator[Batch]:
        for number, batch in enumerate(self._batches):
            if isinstance(batch, torch.Tensor):
                yield Batch((batch.to(self._device),), {}, None)
            elif isinstance(batch, Mapping) and batch and all(isinstance(key, str) for key in batch):
                yield self._named(batch)
            else:
                raise LorakernError(
                    f"{self._where}: batch {number} must be a tensor or a dict of model inputs, such as input_ids "
                    f"and attention_mask; got {show(type(batch).__name__)}"
                )

    def _named(self, batch: Mapping[str, Any]) -> Batch:
        # a loss is of no use here
        named = {
            key: value.to(self._device) if isinstance(value, torch.Tensor) else value
            for key, value in batch.items()
            if key != "labels"
        }
        mask = named.get("attention_mask")
        mask = None if mask is None or bool(mask.all()) else mask.bool()
        return Batch((), named, mask)

    def digest(self) -> str:
        """A hash of all that the models are given."""
        digest = hashlib.sha256()
        for args, named, _ in self:
            for key, value in [("", arg) for arg in args] + sorted(named.items()):
                if isinstance(value, torch.Tensor):
                    hash_tensor(digest, key, value)
                else:
                    digest.update(f"{key}={value!r}".encode())
        return digest.hexdigest()


def _tokenised(
    texts: Sequence[Text], tokenizer: Callable | None, batch_size: int, max_length: int
) -> Iterator[dict[str, torch.Tensor]]:
    """Batches padded on the right, where no causal model's token sees the padding."""
    if not texts:
        return
    if tokenizer is None:
        raise LorakernError(f"{texts[0].where}: texts need a tokenizer; give the model's as tokenizer=")
    whole = [text.prompt + text.answer for text in texts]
    tokens = tokenizer(whole, truncation=True, max_length=max_length)["input_ids"]
    if empty := [text for text, ids in zip(texts, tokens, strict=True) if not ids]:
        raise LorakernError(f"{empty[0].where}: {show(empty[0].answer)} has no tokens; leave it out")
    known = (getattr(tokenizer, name, None) for name in ("pad_token_id", "eos_token_id"))
    padding = next((token for token in known if token is not None), 0)
    for begin in range(0, len(tokens), batch_size):
        rows = [torch.tensor(ids) for ids in tokens[begin : begin + batch_size]]
        ones = [torch.ones_like(row) for row in rows]
        pad = torch.nn.utils.rnn.pad_sequence
        yield {
            "input_ids": pad(rows, batch_first=True, padding_value=padding),
            "attention_mask": pad(ones, batch_first=True),
        }
