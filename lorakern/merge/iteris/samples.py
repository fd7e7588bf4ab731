"""Sample inputs of a task: texts, a JSONL file or batches, read as often as there are passes over them."""

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from lorakern.adapters.json_file import parse_object, show
from lorakern.errors import LorakernError


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
        if isinstance(source, (str, os.PathLike)):
            source = _texts_of(where, Path(source))
        if isinstance(source, Sequence) and source and all(isinstance(text, str) for text in source):
            source = list(_tokenised(where, source, tokenizer, batch_size, max_length))
        if isinstance(source, (Mapping, torch.Tensor)) or not isinstance(source, Iterable):
            raise LorakernError(
                f"{where} must be a list of strings, the path of a JSONL file, or an iterable of batches; "
                f"got {type(source).__name__} (one batch goes into a list)"
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


def hash_tensor(digest: Any, name: str, tensor: torch.Tensor) -> None:
    """Add name, dtype, shape and bytes."""
    digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
    digest.update(memoryview(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()))


def _texts_of(where: str, file: Path) -> list[str]:
    try:
        lines = file.read_bytes().splitlines()
    except OSError as error:
        raise LorakernError(
            f"{where}: {file} cannot be read ({error.strerror}); a string here is the path of a JSONL file, "
            "a text goes into a list"
        ) from None
    texts = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        what = f"line {number}"
        fields = parse_object(line, file, what)
        keys = ("text",) if "text" in fields else ("prompt", "answer")
        if not all(isinstance(fields.get(key), str) for key in keys):
            raise LorakernError(
                f"{file}: {what} must have the string 'text', or 'prompt' and 'answer'; got {show(fields)}"
            )
        texts.append("".join(fields[key] for key in keys))
    if not texts:
        raise LorakernError(f"{where}: {file} is empty; give at least one sample of each task")
    return texts


def _tokenised(
    where: str, texts: Sequence[str], tokenizer: Callable | None, batch_size: int, max_length: int
) -> Iterator[dict[str, torch.Tensor]]:
    """Batches padded on the right, where no causal model's token sees the padding."""
    if tokenizer is None:
        raise LorakernError(f"{where} holds texts; give the model's tokenizer as tokenizer=, or tokenised batches")
    tokens = tokenizer(list(texts), truncation=True, max_length=max_length)["input_ids"]
    if empty := [number for number, ids in enumerate(tokens) if not ids]:
        raise LorakernError(f"{where}: sample {empty[0]}, {show(texts[empty[0]])}, has no tokens; leave it out")
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
