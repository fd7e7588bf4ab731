"""What the demo asks: the adapters of a directory, and one batch in which every row has its own."""

import json
from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

import lorakern
from lorakern.adapters import LoraAdapter
from lorakern.errors import LorakernError

PROMPTS = "prompts.json"
# Of the shipped adapters those that the demo asks: the other ones do the same for a request in other words.
ASKED = (
    "answer_json",
    "person_json",
    "clock",
    "iso_date",
    "email",
    "reverse_words",
    "initials",
    "roman",
    "pig_latin",
    "sort_words",
)


class Request(NamedTuple):
    """One row of the batch: the text as the model reads it, the adapter (None for the base), the expected answer."""

    prompt: str
    adapter: str | None
    expected: str


def shipped_adapters() -> Path:
    """benchmarks/skills/adapters of the checkout that holds the package.

    Raises:
        LorakernError: the package was installed without its checkout.
    """
    root = Path(lorakern.__file__).resolve().parents[1]
    folder = root / "benchmarks" / "skills" / "adapters"
    if not folder.is_dir():
        raise LorakernError(
            f"demo: {root} is no checkout of lorakern, so the shipped adapters are not here; pass a directory of "
            f"PEFT adapters of SmolLM2-135M-Instruct with a {PROMPTS} as --adapters DIR"
        )
    return folder


def load_adapters(folder: Path, names: Collection[str] | None = None) -> dict[str, LoraAdapter]:
    """Directory name to adapter, for every PEFT adapter right below `folder`, or for those of `names`.

    Raises:
        LorakernError: there is none, or one of them cannot be read.
    """
    if names is None:
        names = [config.parent.name for config in folder.glob("*/adapter_config.json")]
    if not names:
        raise LorakernError(f"demo: {folder} holds no adapter (no */adapter_config.json); pass another --adapters DIR")
    return {name: LoraAdapter.load(folder / name) for name in sorted(names)}


def load_prompts(folder: Path, names: list[str]) -> dict[str, list[Request]]:
    """The requests of each adapter in `folder`/prompts.json: {name: [{"prompt": text, "answer": text}, ...]}.

    Raises:
        LorakernError: the file is missing, damaged, or has no prompt for one of the adapters.
    """
    file = folder / PROMPTS
    form = '{"adapter": [{"prompt": formatted text, "answer": text}, ...], ...}'
    try:
        asked = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise LorakernError(f"demo: {file} is missing; it holds the prompts of every adapter as {form}") from None
    except ValueError as error:
        raise LorakernError(f"demo: {file} is not JSON ({error}); it must be {form}") from None
    requests = {}
    for name in names:
        match asked:
            case {**entries} if isinstance(entries.get(name), list) and entries[name]:
                pass
            case _:
                raise LorakernError(f"demo: {file} has no prompt for adapter {name!r}; it must be {form}")
        for item in asked[name]:
            match item:
                case {"prompt": str(prompt), "answer": str(answer)}:
                    requests.setdefault(name, []).append(Request(prompt, name, answer))
                case _:
                    raise LorakernError(f"demo: {file}, adapter {name!r}: {item!r:.80} must be one item of {form}")
    return requests


def mixed_batch(asked: dict[str, list[Request]], rows: int) -> list[Request]:
    """`rows` requests, neighbours with different adapters; the last has none, and the prompt of the first.

    Args:
        asked: adapter name to its requests, each used in turn.
        rows: the size of the batch; at least one row an adapter, and the row without.

    >>> asked = {"a": [Request("1", "a", "x"), Request("2", "a", "y")], "b": [Request("3", "b", "z")]}
    >>> [(request.prompt, request.adapter) for request in mixed_batch(asked, 5)]
    [('1', 'a'), ('3', 'b'), ('2', 'a'), ('3', 'b'), ('1', None)]
    """
    if rows < len(asked) + 1:
        raise LorakernError(f"demo: rows must be at least {len(asked) + 1}, one an adapter and one without; got {rows}")
    names = list(asked)
    batch = []
    for row in range(rows - 1):
        turn, which = divmod(row, len(names))
        requests = asked[names[which]]
        batch.append(requests[turn % len(requests)])
    return [*batch, batch[0]._replace(adapter=None)]
