"""The typed options of a merge method: read from its signature, checked before anything is computed."""

import inspect
import math
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from lorakern.adapters.json_file import show
from lorakern.errors import LorakernError


@dataclass(frozen=True)
class Range:
    """The numbers that an option takes, for `Annotated[float, Range(...)]`: low <= value <= high, or low < value."""

    low: float = -math.inf
    high: float = math.inf
    above_low: bool = False

    def __contains__(self, value: float) -> bool:
        return (self.low < value if self.above_low else self.low <= value) and value <= self.high

    def __str__(self) -> str:
        low = f"above {self.low:g}" if self.above_low else f"at least {self.low:g}"
        return low if self.high == math.inf else f"{low} and at most {self.high:g}"


class PerAdapter:
    """Marks a list option that has a number for each adapter: a method gets those of its terms, in their order."""


Density = Annotated[float, Range(0, 1, above_low=True)]
Densities = Density | Annotated[list[Density], PerAdapter()]
SignMethod = Literal["total", "frequency"]


@dataclass(frozen=True)
class Option:
    """One option of a method: its type as annotated, its default, or `inspect.Parameter.empty` if it must be given."""

    name: str
    hint: Any
    default: Any

    @property
    def required(self) -> bool:
        return self.default is inspect.Parameter.empty

    @property
    def per_adapter(self) -> bool:
        """Whether it may be a list with one for each adapter."""
        return any(isinstance(extra, PerAdapter) for part in _alternatives(self.hint) for extra in get_args(part)[1:])

    def takes(self) -> str:
        """What the option takes, in words for an error or a help text."""
        return _words(self.hint)

    def check(self, value: Any, method: str) -> None:
        if not _fits(value, self.hint):
            raise LorakernError(f"{method}: {self.name} must be {self.takes()}, got {show(value)}; correct it")

    def parse(self, text: str) -> Any:
        """The value that `text` of a command line stands for: its first reading that the option takes, or the text.

        >>> from lorakern.merge import methods
        >>> options = methods["ties"].options
        >>> options["density"].parse("0.5"), options["density"].parse("0.5,1"), options["density"].parse("half")
        (0.5, [0.5, 1.0], 'half')
        """
        for read in (_WORDS.__getitem__, int, float, _numbers, str):
            try:
                value = read(text)
            except (KeyError, ValueError):
                continue
            if _fits(value, self.hint):
                return value
        return text


_WORDS = {"true": True, "false": False, "none": None}


def _numbers(text: str) -> list[float]:
    return [float(part) for part in text.split(",")]


def _alternatives(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def read_options(function: Callable, positional: int) -> dict[str, Option]:
    """The keyword-only parameters of `function`, which must take `positional` others."""
    parameters = inspect.signature(function).parameters.values()
    kinds = [parameter.kind for parameter in parameters]
    keywords = [parameter for parameter in parameters if parameter.kind is inspect.Parameter.KEYWORD_ONLY]
    plain = kinds.count(inspect.Parameter.POSITIONAL_OR_KEYWORD) + kinds.count(inspect.Parameter.POSITIONAL_ONLY)
    if plain != positional or len(kinds) != plain + len(keywords):
        raise LorakernError(
            f"{function.__qualname__}: a merge method takes {positional} positional arguments and its options after a "
            f"*, got {inspect.signature(function)}; change its signature"
        )
    hints = get_type_hints(function, include_extras=True)
    for parameter in keywords:
        if parameter.name not in hints:
            raise LorakernError(
                f"{function.__qualname__}: option {parameter.name} has no type; annotate it, as `density: float = 0.5`"
            )
    return {parameter.name: Option(parameter.name, hints[parameter.name], parameter.default) for parameter in keywords}


def check_options(method: str, known: Mapping[str, Option], given: Mapping[str, Any]) -> None:
    """Raise `LorakernError` for an option that the method does not have, lacks, or takes in another form."""
    takes = "; ".join(f"{option.name}: {option.takes()}" for option in known.values()) or "none"
    for name, value in given.items():
        if name not in known:
            raise LorakernError(f"{method}: there is no option {show(name)}; the options of this method are: {takes}")
        known[name].check(value, method)
    for option in known.values():
        if option.required and option.name not in given:
            raise LorakernError(f"{method}: option {option.name} must be given, it is {option.takes()}")


def _fits(value: Any, hint: Any) -> bool:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        ranges = [extra for extra in arguments[1:] if isinstance(extra, Range)]
        return _fits(value, arguments[0]) and all(value in allowed for allowed in ranges)
    if origin in (Union, types.UnionType):
        return any(_fits(value, argument) for argument in arguments)
    if origin is Literal:
        return any(type(value) is type(choice) and value == choice for choice in arguments)
    if hint in (None, types.NoneType):
        return value is None
    if origin is list and arguments:
        return isinstance(value, list) and all(_fits(item, arguments[0]) for item in value)
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    kind = origin or hint
    return isinstance(value, kind) if isinstance(kind, type) else True


def _words(hint: Any) -> str:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        if any(isinstance(extra, PerAdapter) for extra in arguments[1:]):
            return "a list with one for each adapter"
        return " ".join([_words(arguments[0]), *(str(extra) for extra in arguments[1:] if isinstance(extra, Range))])
    if origin in (Union, types.UnionType):
        return " or ".join(map(_words, arguments))
    if origin is Literal:
        return " or ".join(map(repr, arguments))
    if origin is list and arguments:
        return f"a list of {_words(arguments[0])}"
    if hint in (None, types.NoneType):
        return "None"
    names = {float: "a number", int: "an integer", bool: "True or False", str: "a string"}
    return names.get(hint, getattr(hint, "__name__", str(hint)))
