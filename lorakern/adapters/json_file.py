"""JSON from files that anyone may have written: one object, no duplicate keys, every failure a `LorakernError`."""

import json
import reprlib
from collections import Counter
from pathlib import Path
from typing import Any

from lorakern.errors import LorakernError

_short = reprlib.Repr()
_short.maxstring = _short.maxother = 160
_short.maxlist = _short.maxdict = 8


def show(value: Any) -> str:
    """`repr`, cut to a length that fits an error message."""
    return _short.repr(value)


def parse_object(text: bytes, file: Path, what: str) -> dict[str, Any]:
    """The JSON object in `text`; `what` names the part of `file` in the error message."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        fields = dict(pairs)
        if len(fields) < len(pairs):
            twice = Counter(name for name, _ in pairs).most_common(1)[0][0]
            raise LorakernError(f"{file}: {what} has the key {show(twice)} twice; save the file again with one of them")
        return fields

    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=unique)
    except LorakernError:
        raise
    except (ValueError, RecursionError) as error:
        raise LorakernError(
            f"{file}: {what} is not valid JSON ({error}); the file is damaged, download or save it again"
        ) from None
    if not isinstance(value, dict):
        raise LorakernError(f"{file}: {what} must be a JSON object, got {show(value)}; this is no adapter file")
    return value
