"""Texts with or without a prompt: strings, records, and JSONL files of records."""

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from lorakern.adapters.json_file import show
from lorakern.errors import LorakernError

RECORD = '{"text"} or {"prompt", "answer"}'


class Text(NamedTuple):
    """A prompt, "" if there is none, and what follows it; `where` it stands, for errors."""

    where: str
    prompt: str
    answer: str


def is_file(data: Any) -> bool:
    """Whether data names a file: a string is a path, a text goes into a list."""
    return isinstance(data, (str, os.PathLike))


def is_text(item: Any) -> bool:
    """Whether an item of data is a text or a record, and no batch of tensors."""
    return isinstance(item, str) or (isinstance(item, Mapping) and not {"text", "prompt", "answer"}.isdisjoint(item))


def text_of(where: str, item: Any) -> Text:
    """A string, or a record {"text"} or {"prompt", "answer"}; raises for anything else, and for no text at all."""
    prompt, answer = "", item
    if isinstance(item, Mapping):
        answer = item.get("text")
        if "prompt" in item or "answer" in item:
            prompt, answer = item.get("prompt"), item.get("answer")
    if not isinstance(prompt, str) or not isinstance(answer, str) or not prompt + answer:
        raise LorakernError(f"{where}: it must be a text, {RECORD}, got {show(item)}")
    return Text(where, prompt, answer)


def read_texts(what: str, path: Path) -> Iterator[Text]:
    """The records of a JSONL file, blank lines left out; `what` begins the error messages.

    Raises:
        LorakernError: a file that cannot be read, and a line that is no record, by its number.
    """
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise LorakernError(
            f"{what} {path} cannot be read ({error.strerror}); a string is the path of a JSONL file, a text goes into "
            "a list"
        ) from None
    for number, line in enumerate(lines, 1):
        if line.strip():
            where = f"{what} {path}, line {number}"
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise LorakernError(f"{where} is not valid JSON ({error}); write one record a line") from None
            if not isinstance(record, dict):
                raise LorakernError(f"{where} must be a record {RECORD}, got {show(record)}")
            yield text_of(where, record)
