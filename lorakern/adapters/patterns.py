"""PEFT's rank_pattern and alpha_pattern: regular expressions over module names, the first hit in file order wins.

They come from a file that anyone may have written, and Python's `re` can take exponential time, so the number of ways
in which a pattern can match is bounded before it runs.
"""

import math
import re
import re._constants as sre
import re._parser as sre_parser  # no public door to a parsed expression; the same since Python 3.11
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, TypeVar

from lorakern.adapters.json_file import show
from lorakern.errors import LorakernError

MAX_PATTERNS = 20_000
MAX_PATTERN_CHARS = 10_000
MAX_STEPS = 2e9  # about 10 s of matching at the very worst
MAX_UNROLL = 16
TOO_MANY = 1e18  # stands for any larger number, so that nothing overflows

Number = TypeVar("Number", int, float)


def resolve(
    patterns: Mapping[str, Number], names: Collection[str], default: Number, field: str, file: Path | str
) -> dict[str, Number]:
    """The value of every module, found as PEFT finds it (`peft.utils.other.get_pattern_key`)."""
    longest = max(map(len, names), default=0)
    if len(patterns) > MAX_PATTERNS:
        raise LorakernError(f"{file}: {field} has {len(patterns)} patterns, more than {MAX_PATTERNS}; merge some")
    steps = 0.0
    compiled = []
    for key, value in patterns.items():
        try:
            if len(key) > MAX_PATTERN_CHARS:
                raise ValueError(f"it has {len(key)} characters, more than {MAX_PATTERN_CHARS}")
            expression = rf"(.*\.)?({key})$"
            steps += _ways(expression, longest) * len(names)
            if steps > MAX_STEPS:
                raise ValueError(f"it can backtrack so often that {len(names)} module names would take too long")
            compiled.append((re.compile(expression), value))
        except (re.error, ValueError, OverflowError, RecursionError) as error:
            raise LorakernError(
                f"{file}: the {field} key {show(key)} is not a usable regular expression ({error}); "
                "write module names, such as 'layers.0.self_attn.q_proj', in its place"
            ) from None
    # PEFT's last resort is the dictionary itself: a key that is no match as a pattern but equals the name
    return {
        name: next((value for regex, value in compiled if regex.match(name)), patterns.get(name, default))
        for name in names
    }


def exact_key(name: str) -> str:
    """A key that matches the module `name` and no other: `^` holds at the start only, so no prefix can come before."""
    return "^" + re.escape(name)


def _ways(expression: str, length: int) -> float:
    """An upper bound on the ways to match the start of a string of `length` characters: the backtracking steps."""
    stars, factor = _choices(sre_parser.parse(expression))
    # stars in a row share the characters among them
    return factor * math.comb(length + min(stars, 30), min(stars, 30))


def _choices(parsed: Any) -> tuple[int, float]:
    """(unbounded repeats in a row, number of other choices) of a parsed expression."""
    stars, factor = 0, 1.0
    for op, argument in parsed:
        if op in (sre.MAX_REPEAT, sre.MIN_REPEAT, sre.POSSESSIVE_REPEAT):
            low, high, body = argument
            inner_stars, inner_factor = _choices(body)
            if (inner_stars, inner_factor) == (0, 1.0):
                inner = (1, 1.0) if high > MAX_UNROLL else (0, high - low + 1)
            elif high <= MAX_UNROLL:
                inner = (inner_stars * high, inner_factor**high * (high - low + 1))
            else:
                inner = (0, TOO_MANY)
        elif op is sre.BRANCH:
            arms = [_choices(arm) for arm in argument[1]]
            inner = (max(arm[0] for arm in arms), sum(arm[1] for arm in arms))
        elif op is sre.GROUPREF_EXISTS:
            arms = [_choices(arm) for arm in argument[1:] if arm is not None]
            inner = (max(arm[0] for arm in arms), sum(arm[1] for arm in arms))
        elif op in (sre.SUBPATTERN, sre.ASSERT, sre.ASSERT_NOT):
            inner = _choices(argument[-1])
        elif op is sre.ATOMIC_GROUP:
            inner = _choices(argument)
        else:
            inner = (0, 1.0)
        stars += inner[0]
        factor = min(factor * inner[1], TOO_MANY)
    return stars, factor
