"""What goes into a merge: the adapters, checked against each other, and the terms of one module."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from lorakern.adapters import LoraAdapter, LoraFactors
from lorakern.adapters.factors import all_finite, checked
from lorakern.adapters.json_file import show
from lorakern.errors import LorakernError
from lorakern.merge.registry import Term

Factors = Mapping[str, LoraFactors]
MISSING = ("zero", "skip", "error")


class Target(NamedTuple):
    """What the merged factors of a module are to be, unless the caller says otherwise."""

    shape: tuple[int, int]
    dtype: torch.dtype
    device: torch.device


class Inputs:
    """The adapters of a merge. `terms` looks a module's factors up, once; `target` knows what it saw of them."""

    def __init__(
        self, adapters: Sequence[Factors], *, normalize: bool, missing: str, device: torch.device | str | None
    ) -> None:
        if missing not in MISSING:
            raise LorakernError(f"missing must be one of {', '.join(MISSING)}, got {show(missing)}")
        if not isinstance(normalize, bool):
            raise LorakernError(f"normalize must be True or False, got {show(normalize)}")
        try:
            self._device = None if device is None else torch.device(device)
        except (RuntimeError, TypeError) as error:
            raise LorakernError(f"device must be one of torch, such as 'cpu', got {show(device)} ({error})") from None
        self._adapters = adapters
        self._normalize = normalize
        self._missing = missing
        self._targets: dict[str, Target] = {}

    def terms(self, module: str, weights: Sequence[float] | None) -> list[Term]:
        """The terms of a module, in the order of the adapters; raises for factors that cannot be merged."""
        factors = {i: self._factors(i, module) for i in self.holders(module)}
        self.check(module, {i: (f.d_in, f.d_out) for i, f in factors.items()})
        weights = self._weights(module, weights, factors)
        first, *_ = factors.values()
        dtype = first.A.dtype
        for A, B, _ in factors.values():
            dtype = torch.promote_types(dtype, torch.promote_types(A.dtype, B.dtype))
        self._targets[module] = Target((first.d_out, first.d_in), dtype, first.A.device)
        inner = torch.float64 if dtype == torch.float64 else torch.float32
        place = {"dtype": inner, "device": self._device or first.A.device}
        terms = []
        for i, (A, B, scale) in factors.items():
            terms.append(Term(A.detach().to(**place), B.detach().to(**place), scale, weights[i]))
            if not math.isfinite(terms[-1].factor):
                raise LorakernError(
                    f"{module}: the weight of {label(self._adapters, i)}, {weights[i]}, times its scale, {scale}, is "
                    "not finite; give a smaller weight"
                )
        return terms

    def holders(self, module: str) -> list[int]:
        """Which adapters have the module: those whose terms `terms` returns."""
        return [i for i, adapter in enumerate(self._adapters) if module in adapter]

    def target(self, module: str) -> Target:
        """What the merged factors of a module are to be."""
        if module not in self._targets:
            self.terms(module, None)
        return self._targets[module]

    def _factors(self, i: int, module: str) -> LoraFactors:
        try:
            factors = checked(module, self._adapters[i][module])
        except LorakernError as error:
            raise LorakernError(f"{label(self._adapters, i)}: {error}") from None
        for letter, tensor in (("A", factors.A), ("B", factors.B)):
            if not all_finite(tensor):
                raise LorakernError(
                    f"{module}: {letter} of {label(self._adapters, i)} holds NaN or infinity; "
                    "leave this adapter out, or train it again"
                )
        return factors

    def check(self, module: str, shapes: Mapping[int, tuple[int, int]]) -> None:
        """Raise unless adapters whose updates have these d_in, d_out, by their place, can be merged."""
        absent = [i for i in range(len(self._adapters)) if i not in shapes]
        first = min(shapes)
        if absent and self._missing == "error":
            raise LorakernError(
                f"{module}: {label(self._adapters, absent[0])} lacks this module, which "
                f"{label(self._adapters, first)} has; merge with missing='zero' to take its update as zero"
            )
        for i, shape in shapes.items():
            if shape != shapes[first]:
                raise LorakernError(
                    f"{module}: d_in, d_out are {shapes[first]} in {label(self._adapters, first)} and "
                    f"{shape} in {label(self._adapters, i)}; their base models differ"
                )

    def _weights(self, module: str, weights: Sequence[float] | None, present: Mapping[int, Any]) -> list[float]:
        weights = [1.0] * len(self._adapters) if weights is None else [float(weight) for weight in weights]
        if not self._normalize:
            return weights
        counted = [weights[i] for i in present] if self._missing == "skip" else weights
        total = sum(counted)
        if abs(total) <= 1e-12 * sum(map(abs, counted)):
            raise LorakernError(f"{module}: weights {counted} sum to zero and cannot be normalized; change them")
        return [weight / total for weight in weights]


def label(adapters: Sequence[Factors], i: int) -> str:
    """The i-th adapter in an error message: its place, and where it came from if that is known."""
    path = getattr(adapters[i], "path", None)
    return f"adapter {i}" if path is None else f"adapter {i} ({path})"


def check_adapters(adapters: Any) -> None:
    """Raise unless `adapters` is a list of mappings that store their updates in one layout."""
    if isinstance(adapters, (Mapping, str)) or not isinstance(adapters, Sequence) or not adapters:
        raise LorakernError(f"adapters must be a list of at least one adapter, got {show(adapters)}")
    for i, adapter in enumerate(adapters):
        if not isinstance(adapter, Mapping):
            raise LorakernError(
                f"adapters[{i}] must be a LoraAdapter or a mapping of module to (A, B, scale), got {show(adapter)}; "
                "LoraAdapter.load reads one from a directory"
            )
    _common(adapters, "fan_in_fan_out", "their layers store weights in different layouts and cannot be one")


def checked_adapters(adapters: Any) -> list[Factors]:
    """The adapters with `LoraFactors` in every module, each looked at; raises where they are not of one model."""
    check_adapters(adapters)
    inputs = Inputs(adapters, normalize=False, missing="zero", device=None)
    for module in dict.fromkeys(module for adapter in adapters for module in adapter):
        inputs.terms(module, None)
    if empty := [i for i, adapter in enumerate(adapters) if not adapter]:
        raise LorakernError(f"{label(adapters, empty[0])} has no modules; leave it out")
    return [
        adapter if isinstance(adapter, LoraAdapter) else {module: checked(module, f) for module, f in adapter.items()}
        for adapter in adapters
    ]


def shared_config(adapters: Sequence[Factors], base_model_name_or_path: str | None) -> dict[str, Any]:
    """The arguments of `LoraAdapter` that the adapters agree on; raises for adapters of different base models."""
    hint = "if these are names of one model, give base_model_name_or_path to say which one to write"
    tasks = {adapter.config.task_type for adapter in adapters if hasattr(adapter, "config")}
    return {
        "fan_in_fan_out": bool(_common(adapters, "fan_in_fan_out", "their layers store weights in different layouts")),
        "base_model_name_or_path": base_model_name_or_path or _common(adapters, "base_model_name_or_path", hint),
        "task_type": tasks.pop() if len(tasks) == 1 else None,
    }


def _common(adapters: Sequence[Factors], field: str, why: str) -> Any:
    """The value of a config field that all adapters which have one agree on."""
    values = {i: getattr(adapter.config, field) for i, adapter in enumerate(adapters) if hasattr(adapter, "config")}
    values = {i: value for i, value in values.items() if value is not None}
    first = min(values, default=None)
    for i, value in values.items():
        if value != values[first]:
            raise LorakernError(
                f"{field} is {show(values[first])} in {label(adapters, first)} and {show(value)} in "
                f"{label(adapters, i)}; {why}"
            )
    return values.get(first)
