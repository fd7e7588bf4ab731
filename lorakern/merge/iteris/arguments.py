"""The arguments of a merge by features, checked, as the `Sweeps` that it goes through."""

import numbers
from collections.abc import Callable, Sequence
from typing import Any

import torch

from lorakern.adapters.json_file import show
from lorakern.errors import LorakernError
from lorakern.merge.inputs import Factors, check_adapters
from lorakern.merge.iteris.layers import checked_adapters, find_layers
from lorakern.merge.iteris.samples import Samples
from lorakern.merge.iteris.sweeps import Options, Progress, Sweeps

OP = "iteris"


def prepare(
    model: torch.nn.Module,
    adapters: Sequence[Factors],
    samples: Sequence[Any],
    *,
    alpha: float,
    lambda_source: str | None,
    target: str,
    ratio: float,
    coefficients: Sequence[float] | None,
    tokenizer: Callable | None,
    batch_size: int,
    max_length: int,
    max_memory: int | None,
    progress: Progress | None,
) -> Sweeps:
    """What `lorakern.merge.iteris.solve` says of its arguments, or a `LorakernError`."""
    if not isinstance(model, torch.nn.Module):
        raise LorakernError(f"{OP}: model must be a torch.nn.Module; got {type(model).__name__}")
    check_adapters(adapters)
    count = len(adapters)
    for name, value in (("batch_size", batch_size), ("max_length", max_length)):
        check_whole(name, value)
    if max_memory is not None:
        check_whole("max_memory", max_memory)
    check_choice("lambda_source", lambda_source, ("full", "delta", None))
    check_choice("target", target, ("delta", "full"))
    check_number("alpha", alpha)
    check_number("ratio", ratio)
    if ratio >= 1:
        raise LorakernError(f"{OP}: ratio must be below 1, where the merged model no longer counts; got {ratio!r}")
    coefficients = [1.0] * count if coefficients is None else coefficients
    if isinstance(coefficients, str) or not isinstance(coefficients, Sequence) or len(coefficients) != count:
        raise LorakernError(f"{OP}: coefficients must be {count} numbers, one per adapter; got {show(coefficients)}")
    for i, coefficient in enumerate(coefficients):
        check_number(f"coefficients[{i}]", coefficient)
    if not any(coefficients):
        raise LorakernError(f"{OP}: coefficients are all zero; give at least one adapter a weight")
    if isinstance(samples, str) or not isinstance(samples, Sequence) or len(samples) != count:
        got = f"{len(samples)}" if isinstance(samples, Sequence) else type(samples).__name__
        raise LorakernError(f"{OP}: samples must be a list of {count} sources, one per adapter; got {got}")

    named = {f"adapter {i}": adapter for i, adapter in enumerate(checked_adapters(OP, adapters))}
    layers = find_layers(OP, model, named)
    device = layers[0].weight.device
    text = {"tokenizer": tokenizer, "batch_size": batch_size, "max_length": max_length}
    sources = [Samples(f"{OP}: samples[{i}]", source, device, **text) for i, source in enumerate(samples)]
    options = Options(float(alpha), lambda_source, target, float(ratio), tuple(map(float, coefficients)))
    return Sweeps(OP, model, named, layers, sources, options, max_memory, progress)


def check_whole(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise LorakernError(f"{OP}: {name} must be a positive integer; got {show(value)}")


def check_number(name: str, value: Any) -> None:
    plain = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not plain or not 0 <= float(value) < float("inf"):
        raise LorakernError(f"{OP}: {name} must be a finite number of at least 0; got {show(value)}")


def check_choice(name: str, value: Any, choices: tuple) -> None:
    if not any(value is choice or value == choice for choice in choices):
        raise LorakernError(f"{OP}: {name} must be one of {', '.join(map(repr, choices))}; got {show(value)}")
