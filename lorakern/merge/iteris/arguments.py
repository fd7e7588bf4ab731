"""The arguments of a merge by features, checked, as the `Sweeps` that it goes through."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from lorakern.adapters.json_file import show
from lorakern.errors import LorakernError
from lorakern.merge._arguments import check_choice, check_integer, check_number
from lorakern.merge.inputs import Factors, checked_adapters
from lorakern.merge.iteris.layers import find_layers
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
    adapters = checked_adapters(adapters)
    count = len(adapters)
    for name, value in (("batch_size", batch_size), ("max_length", max_length)):
        check_integer(OP, name, value)
    if max_memory is not None:
        check_integer(OP, "max_memory", max_memory)
    check_choice(OP, "lambda_source", lambda_source, ("full", "delta", None))
    check_choice(OP, "target", target, ("delta", "full"))
    check_number(OP, "alpha", alpha, zero=True)
    check_number(OP, "ratio", ratio, zero=True)
    if ratio >= 1:
        raise LorakernError(f"{OP}: ratio must be below 1, where the merged model no longer counts; got {ratio!r}")
    coefficients = [1.0] * count if coefficients is None else coefficients
    if isinstance(coefficients, str) or not isinstance(coefficients, Sequence) or len(coefficients) != count:
        raise LorakernError(f"{OP}: coefficients must be {count} numbers, one per adapter; got {show(coefficients)}")
    for i, coefficient in enumerate(coefficients):
        check_number(OP, f"coefficients[{i}]", coefficient, zero=True)
    if not any(coefficients):
        raise LorakernError(f"{OP}: coefficients are all zero; give at least one adapter a weight")
    if isinstance(samples, str) or not isinstance(samples, Sequence) or len(samples) != count:
        got = f"{len(samples)}" if isinstance(samples, Sequence) else type(samples).__name__
        raise LorakernError(f"{OP}: samples must be a list of {count} sources, one per adapter; got {got}")

    named = {f"adapter {i}": adapter for i, adapter in enumerate(adapters)}
    layers = find_layers(OP, model, named)
    device = layers[0].weight.device
    text = {"tokenizer": tokenizer, "batch_size": batch_size, "max_length": max_length}
    sources = [Samples(f"{OP}: samples[{i}]", source, device, **text) for i, source in enumerate(samples)]
    options = Options(float(alpha), lambda_source, target, float(ratio), tuple(map(float, coefficients)))
    return Sweeps(OP, model, named, layers, sources, options, max_memory, progress)
