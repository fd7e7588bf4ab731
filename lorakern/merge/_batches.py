"""Training data of a causal language model: texts, records, a JSONL file, or batches that are tokenised already."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from lorakern.adapters.json_file import show
from lorakern.errors import LorakernError
from lorakern.merge._texts import Text, is_file, read_texts, text_of

# What transformers' losses leave out.
IGNORED = -100
Batch = dict[str, torch.Tensor]


class Example(NamedTuple):
    """The tokens of a text, and how many of them at its beginning are a prompt, which the loss leaves out."""

    ids: list[int]
    prompt: int


class Batches:
    """`data` as batches of input_ids, attention_mask and labels, all (rows, length) int64, on the CPU.

    Args:
        op: what an error message begins with.
        data: texts, or records {"text"} or {"prompt", "answer"}; the path of a JSONL file of such records; or batches,
            mappings with input_ids and, if they like, attention_mask and labels (-100 is left out).
        tokenizer: as transformers' are: called with a text it gives input_ids; it has an eos_token_id.
        batch_size: examples a batch; tokenised batches keep theirs.
        cutoff: the most tokens of a sequence; what is beyond is cut off.

    Raises:
        LorakernError: for no data, data of another form, and a sequence of which no token would count.
    """

    def __init__(self, op: str, data: Any, tokenizer: Callable | None, batch_size: int, cutoff: int) -> None:
        self._size = batch_size
        self._examples: list[Example] = []
        self._ready: list[Batch] = []
        for item in _items(op, data):
            if isinstance(item, Text):
                self._examples.append(_example(item, tokenizer, cutoff))
            else:
                self._ready.append(_batch(*item, cutoff))
        if self._examples and self._ready:
            raise LorakernError(f"{op}: data holds texts and tokenised batches; give one kind")
        if not self._examples and not self._ready:
            raise LorakernError(f"{op}: data is empty; give at least one text, record or batch")

    def __len__(self) -> int:
        return len(self._ready) or -(-len(self._examples) // self._size)

    def epoch(self, generator: torch.Generator | None = None) -> Iterator[Batch]:
        """All batches once: examples in an order drawn from the generator, tokenised batches in their own."""
        yield from self._ready
        count = len(self._examples)
        order = range(count) if generator is None else torch.randperm(count, generator=generator).tolist()
        for first in range(0, count, self._size):
            yield _collate([self._examples[i] for i in order[first : first + self._size]])


def _items(op: str, data: Any) -> Iterator[Text | tuple[str, Mapping]]:
    if is_file(data):
        yield from read_texts(f"{op}: data", Path(data))
    elif isinstance(data, Iterable) and not isinstance(data, Mapping):
        for i, item in enumerate(data):
            where = f"{op}: data[{i}]"
            yield (where, item) if isinstance(item, Mapping) and "input_ids" in item else text_of(where, item)
    else:
        raise LorakernError(
            f"{op}: data must be a list of texts, the path of a JSONL file or an iterable of tokenised batches, "
            f"got {show(data)}"
        )


def _example(text: Text, tokenizer: Callable | None, cutoff: int) -> Example:
    where, prompt, answer = text
    if not callable(tokenizer):
        raise LorakernError(f"{where}: texts need a tokenizer; give tokenizer=, got {show(tokenizer)}")
    eos = getattr(tokenizer, "eos_token_id", None)
    question = list(tokenizer(prompt)["input_ids"]) if prompt else []
    while question and question[-1] == eos:
        question.pop()
    reply = list((tokenizer(answer, add_special_tokens=False) if prompt else tokenizer(answer))["input_ids"])
    if eos is not None and reply[-1:] != [eos]:
        reply.append(eos)
    ids = (question + reply)[:cutoff]
    # the first token has nothing before it that could predict it
    if len(ids) <= max(1, len(question)):
        raise LorakernError(
            f"{where}: of its {len(question) + len(reply)} tokens, {len(question)} of them the prompt's, none is left "
            f"to learn from within the cutoff of {cutoff}; raise the cutoff, or leave it out"
        )
    return Example(ids, len(question))


def _collate(examples: list[Example]) -> Batch:
    """Padded on the right."""
    shape = len(examples), max(len(example.ids) for example in examples)
    ids, mask = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape, dtype=torch.int64)
    labels = torch.full(shape, IGNORED)
    for row, (tokens, prompt) in enumerate(examples):
        ids[row, : len(tokens)] = torch.tensor(tokens)
        mask[row, : len(tokens)] = 1
        labels[row, prompt : len(tokens)] = ids[row, prompt : len(tokens)]
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def _batch(where: str, item: Mapping[str, Any], cutoff: int) -> Batch:
    ids = _matrix(where, "input_ids", item["input_ids"], None)
    mask = _matrix(where, "attention_mask", item.get("attention_mask", torch.ones_like(ids)), ids.shape)
    labels = item.get("labels")
    labels = ids.masked_fill(mask == 0, IGNORED) if labels is None else _matrix(where, "labels", labels, ids.shape)
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    batch = {name: tensor[:, :cutoff] for name, tensor in batch.items()}
    if not (batch["labels"][:, 1:] != IGNORED).any():
        raise LorakernError(f"{where}: no label is left within the cutoff of {cutoff}; raise it, or leave it out")
    return batch


def _matrix(where: str, name: str, value: Any, shape: torch.Size | None) -> torch.Tensor:
    try:
        tensor = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise LorakernError(f"{where}: {name} must be a matrix of integers ({error})") from None
    whole = not tensor.is_floating_point() and not tensor.is_complex()
    if tensor.ndim != 2 or not tensor.numel() or not whole or (shape is not None and tensor.shape != shape):
        takes = "(rows, length)" if shape is None else f"{tuple(shape)}, like input_ids"
        got = f"{tensor.dtype} {tuple(tensor.shape)}"
        raise LorakernError(f"{where}: {name} must be integers of shape {takes}, got {got}")
    return tensor.detach().to("cpu", torch.int64)
