"""The `lorakern` command: options and errors. What a sub-command does lives in a module of its own."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator, Sequence

from lorakern.errors import LorakernError

# What a command may find missing, and the extra that installs it.
_EXTRAS = {"typer": "cli", "rich": "cli", "yaml": "cli", "matplotlib": "plot"}
_EXTRAS |= {"transformers": "transformers", "gguf": "transformers", "peft": "demo"}
_EXTRAS |= dict.fromkeys(("fastapi", "uvicorn", "python_multipart", "prometheus_client"), "serve")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status: 2 for bad input or a missing package, told in one line."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    try:
        from lorakern.cli.app import app

        app(args=list(_one_word_lists(arguments)), prog_name="lorakern", obj=shlex.join(["lorakern", *arguments]))
    except LorakernError as error:
        message = str(error)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in _EXTRAS:
            raise
        message = f"this needs the package {package}; run `pip install 'lorakern[{_EXTRAS[package]}]'`"
    except SystemExit as exit:
        return exit.code if isinstance(exit.code, int) else int(exit.code is not None)
    else:
        return 0
    # a surrogate stands for a byte of a file name that is no UTF-8
    line = " ".join(message.split()).encode(errors="backslashreplace").decode()
    print(f"lorakern: {line}", file=sys.stderr)
    return 2


def _one_word_lists(words: Sequence[str]) -> Iterator[str]:
    """The command line with the numbers after --weights and the like as one word, which is what an option can take.

    And with a --data before each of the files that follow one in `lorakern iteris`.

    >>> list(_one_word_lists(["merge", "a", "--weights", "0.5", "-0.25", "b"]))
    ['merge', 'a', '--weights', '0.5,-0.25', 'b']
    >>> list(_one_word_lists(["iteris", "model", "--data", "a", "b", "-o", "out"]))
    ['iteris', 'model', '--data', 'a', '--data', 'b', '-o', 'out']
    """
    words = list(words)
    many_data = words[:1] == ["iteris"]
    while words:
        word = words.pop(0)
        yield word
        if word == "--":
            yield from words
            return
        if many_data and word == "--data" and words:
            yield words.pop(0)
            while words and not words[0].startswith("-"):
                yield from ("--data", words.pop(0))
        if word in ("--weights", "--density", "--coefficients", "--init"):
            numbers = []
            while words and _is_numbers(words[0]):
                numbers.append(words.pop(0))
            if numbers:
                yield ",".join(numbers)


def _is_numbers(word: str) -> bool:
    try:
        [float(part) for part in word.split(",")]
    except ValueError:
        return False
    return True
