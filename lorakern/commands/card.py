"""The model card of an adapter that a command made: what it was made of, and how."""

import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

import lorakern

_HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")  # what the hub takes as a base_model; a local path is none


@dataclass(frozen=True)
class Input:
    """An adapter that went in: as the user wrote it, what it is worth, and the SHA-256 of its tensors' file."""

    name: str
    sha256: str
    weight: str = "1"


def card(
    title: str,
    what: str,
    inputs: Sequence[Input],
    options: Mapping[str, Any],
    command: str,
    *,
    base_model: str | None,
    recipe: str | None = None,
) -> str:
    """The text of README.md.

    Args:
        title: a heading.
        what: a sentence about the method.
        inputs: the adapters.
        options: what the method was given, name to value.
        command: the command line.
        base_model: as in the config; it is left out of the front matter if it is no id of the Hugging Face hub.
        recipe: the text of the YAML file, if there was one.

    >>> print(card("merge", "The sum.", [Input("a", "0f")], {"rank": 8}, "lorakern merge a -o b", base_model="my/base"))
    ---
    base_model: "my/base"
    library_name: peft
    tags: ["lora", "merge", "lorakern"]
    ---
    <BLANKLINE>
    # merge
    <BLANKLINE>
    The sum.
    <BLANKLINE>
    | adapter | weight | SHA-256 of its tensors' file |
    |---|---|---|
    | `a` | 1 | `0f` |
    <BLANKLINE>
    | option | value |
    |---|---|
    | rank | `8` |
    <BLANKLINE>
    ```
    lorakern merge a -o b
    ```
    ...
    """
    base = [f"base_model: {json.dumps(base_model)}"] if base_model and _HUB_ID.fullmatch(base_model) else []
    lines = ["---", *base, "library_name: peft", 'tags: ["lora", "merge", "lorakern"]', "---", ""]
    lines += [f"# {title}", "", what, ""]
    lines += ["| adapter | weight | SHA-256 of its tensors' file |", "|---|---|---|"]
    lines += [f"| {_code(source.name)} | {source.weight} | `{source.sha256}` |" for source in inputs]
    if options:
        lines += ["", "| option | value |", "|---|---|"]
        lines += [f"| {name} | {_code(str(value))} |" for name, value in options.items()]
    lines += ["", *_fenced(command, "")]
    if recipe is not None:
        lines += ["", "The recipe:", "", *_fenced(recipe.rstrip("\n"), "yaml")]
    versions = f"lorakern {lorakern.__version__}, torch {torch.__version__}, Python {sys.version.split()[0]}"
    lines += ["", f"Made with {versions}.", ""]
    return "\n".join(lines).encode(errors="backslashreplace").decode()


def _code(text: str) -> str:
    """A code span in a table, whatever the text holds."""
    text = " ".join(text.split()).replace("|", "\\|")
    fence = "`" * (_longest_run(text) + 1)
    space = " " if "`" in text else ""
    return f"{fence}{space}{text}{space}{fence}"


def _fenced(text: str, language: str) -> list[str]:
    fence = "`" * max(3, _longest_run(text) + 1)
    return [f"{fence}{language}", text, fence]


def _longest_run(text: str) -> int:
    return max(map(len, re.findall("`+", text)), default=0)
