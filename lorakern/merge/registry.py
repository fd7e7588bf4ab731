"""The registry of merge methods: what a method is given, what it returns, and the decorator that adds one."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple

import torch

from lorakern.adapters.json_file import show
from lorakern.errors import LorakernError
from lorakern.merge.options import Option, read_options

# What lk.merge takes itself; a method's own options have other names.
RESERVED = frozenset(
    ("adapters", "method", "weights", "rank", "dtype", "seed", "normalize", "missing", "device", "per_module")
) | {"progress", "base_model_name_or_path"}
_POSITIONAL = 3


class Term(NamedTuple):
    """One adapter's update of the module that is merged, weight * scale * B @ A.

    Args:
        A: (r, d_in) float32, or float64 if any adapter's factors of this module are.
        B: (d_out, r), likewise.
        scale: the adapter's own scale, alpha / r or alpha / sqrt(r).
        weight: the caller's weight of the adapter, normalised if that was asked for.

    >>> import torch
    >>> from lorakern.merge import Term
    >>> Term(torch.ones(2, 8), torch.ones(6, 2), 0.5, -3.0).factor
    -1.5
    """

    A: torch.Tensor
    B: torch.Tensor
    scale: float
    weight: float

    @property
    def factor(self) -> float:
        return self.weight * self.scale

    @property
    def rank(self) -> int:
        return self.A.shape[0]


@dataclass(frozen=True)
class Method:
    """A registered merge method.

    Args:
        name: what `lk.merge(..., method=name)` calls it.
        function: see `method`.
        whole: whether the function is given all modules at once rather than one.
        options: option name to `Option`, as in the function's signature.
    """

    name: str
    function: Callable
    whole: bool
    options: Mapping[str, Option]

    @property
    def per_adapter(self) -> frozenset[str]:
        """The options that may be a list with one for each adapter."""
        return frozenset(name for name, option in self.options.items() if option.per_adapter)

    @property
    def summary(self) -> str:
        """The first paragraph of the function's docstring, in one line."""
        return " ".join((inspect.getdoc(self.function) or "").partition("\n\n")[0].split())


_METHODS: dict[str, Method] = {}
# Read-only view of the registry: method name to `Method`.
methods: Mapping[str, Method] = MappingProxyType(_METHODS)


def register(name: str, function: Callable, *, whole: bool = False) -> Method:
    """Add `function` to the registry as the merge method `name`; `method` is the same as a decorator.

    Raises `LorakernError` for a name that is taken, a signature that is not a method's, or an option without a type.

    >>> from lorakern.merge import methods, register
    >>> def first(terms, rank, generator):
    ...     return terms[0].A, terms[0].B, terms[0].factor
    >>> register("doc_first", first).name in methods
    True
    """
    if not isinstance(name, str) or not name.isidentifier():
        raise LorakernError(f"name must be the name of a method, such as 'my_ties', got {show(name)}")
    if name in _METHODS:
        raise LorakernError(f"name {name!r} is taken by {_METHODS[name].function.__module__}; choose another one")
    options = read_options(function, _POSITIONAL)
    if taken := RESERVED & options.keys():
        raise LorakernError(f"{name}: option {min(taken)} is an argument of lk.merge itself; give it another name")
    if whole and any(option.per_adapter for option in options.values()):
        raise LorakernError(f"{name}: a method of all modules at once has no options per adapter; take numbers")
    _METHODS[name] = Method(name, function, whole, MappingProxyType(options))
    return _METHODS[name]


def method(name: str, *, whole: bool = False) -> Callable[[Callable], Callable]:
    """Decorator that makes a function the merge method `name`, for `lk.merge`, the command line and everything else.

    The function merges one module: it gets ``(terms, rank, generator)`` and its own options by keyword, and returns
    ``(A, B)`` or ``(A, B, scale)``, the merged update being scale * B @ A. With ``whole=True`` it gets
    ``(modules, ranks, generators)`` instead and yields ``(module, (A, B))`` or ``(module, (A, B, scale))``, every
    module once, in any order; it is called once for all modules that the caller gives the same options.

    Args of the function:
        terms: list of `Term`, the adapters that have the module, in the caller's order; never empty. Not to be
            written to.
        rank: what the caller asked for: None, a positive integer, or a share of the energy in (0, 1).
        generator: a `torch.Generator` on the CPU, seeded from (seed, module): other modules do not change it.
        modules: a mapping from module path to terms, which are made when they are looked up.
        ranks, generators: functions from module path to such a rank and such a generator.

    Options are keyword-only and annotated, with `typing.Literal` and ``Annotated[float, Range(0, 1)]`` where that says
    more: what a caller gives is checked against the annotations. ``Annotated[list[..], PerAdapter()]`` is a list with a
    value for each adapter, of which the function gets those of its terms.

    Raises `LorakernError` as `register`. The idea of a typed function as a method is mergekit's.

    >>> import torch, lorakern as lk
    >>> from lorakern.merge import method
    >>> @method("doc_loudest")
    ... def loudest(terms, rank, generator, *, gain: float = 1.0):
    ...     term = max(terms, key=lambda term: abs(term.factor))
    ...     return term.A, term.B, gain * term.factor
    >>> a, b = ({"proj": (torch.ones(2, 8), torch.ones(6, 2), scale)} for scale in (1.0, 3.0))
    >>> lk.merge([a, b], method="doc_loudest", gain=2.0)["proj"].scale
    6.0
    """

    def decorate(function: Callable) -> Callable:
        register(name, function, whole=whole)
        return function

    return decorate


def find(name: str) -> Method:
    """The method of that name, or a `LorakernError` that lists those there are."""
    if name not in _METHODS:
        raise LorakernError(f"method must be one of {', '.join(sorted(_METHODS))}, got {show(name)}")
    return _METHODS[name]
