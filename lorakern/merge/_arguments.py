"""Checks of the numbers and words that the merges that use data take."""

import math
import numbers
from typing import Any

from lorakern.adapters.json_file import show
from lorakern.errors import LorakernError


def check_integer(op: str, name: str, value: Any, least: int | None = 1) -> None:
    """Raise unless `value` is an integer, and at least `least`."""
    if not isinstance(value, int) or isinstance(value, bool) or (least is not None and value < least):
        at_least = "" if least is None else f" of at least {least}"
        raise LorakernError(f"{op}: {name} must be an integer{at_least}, got {show(value)}")


def check_number(op: str, name: str, value: Any, *, zero: bool = False) -> None:
    """Raise unless `value` is a finite number above 0, or 0 where that is allowed."""
    number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not number or not (0 < value < math.inf or (zero and value == 0)):
        raise LorakernError(f"{op}: {name} must be a positive number{' or 0' if zero else ''}, got {show(value)}")


def check_choice(op: str, name: str, value: Any, choices: tuple[str | None, ...]) -> None:
    """Raise unless `value` is one of these."""
    if not any(value is choice or (isinstance(value, str) and value == choice) for choice in choices):
        raise LorakernError(f"{op}: {name} must be one of {', '.join(map(str, choices))}, got {show(value)}")
