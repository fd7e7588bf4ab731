"""Which layers of a model an adapter targets, and whether it fits them."""

import difflib
import sys
from collections.abc import Mapping
from typing import NamedTuple

import torch

from lorakern.adapters import LoraFactors
from lorakern.errors import LorakernError
from lorakern.integrations.slots import LayerSlots


class Target(NamedTuple):
    """A layer of a model, empty slots of its sizes, and the factors that an adapter has for it."""

    module: torch.nn.Module
    slots: LayerSlots
    factors: LoraFactors


def find_targets(op: str, model: torch.nn.Module, name: str, adapter: Mapping[str, LoraFactors]) -> list[Target]:
    """The layers of `model` that the adapter `name` targets.

    Raises:
        LorakernError: it names `op`, the adapter, the module and the shapes, and says what to do.
    """
    if not isinstance(name, str) or not name:
        raise LorakernError(f"{op}: an adapter's name must be a non-empty string; got {name!r}")
    if not isinstance(adapter, Mapping) or not adapter or not all(isinstance(f, LoraFactors) for f in adapter.values()):
        hint = "load a directory by lorakern.LoraAdapter.load"
        raise LorakernError(f"{op}: adapter {name!r} must be a LoraAdapter; got {type(adapter).__name__} ({hint})")
    modules = dict(model.named_modules(remove_duplicate=False))
    found: dict[torch.nn.Module, Target] = {}
    for path, factors in adapter.items():
        where = f"{op}: adapter {name!r}, module {path!r}"
        full = _full_name(where, path, modules, model, adapter)
        if modules[full] in found:
            other = found[modules[full]].slots.name
            raise LorakernError(f"{where}: it is the same layer as {other!r}; leave one of the two out")
        found[modules[full]] = _fitted(where, full, modules[full], factors)
    return list(found.values())


def _full_name(where: str, path: str, modules: Mapping, model: torch.nn.Module, adapter: Mapping) -> str:
    """The name in the model: the path itself, or the only one that ends with it."""
    if path in modules:
        return path
    nested = [name for name in modules if name.endswith(f".{path}")]
    if len(nested) == 1:
        return nested[0]
    if nested:
        raise LorakernError(
            f"{where}: the {type(model).__name__} has {len(nested)} modules of that end ({', '.join(nested[:3])}); "
            "attach to the inner model whose names the adapter has"
        )
    base = getattr(getattr(adapter, "config", None), "base_model_name_or_path", None)
    near = difflib.get_close_matches(path, modules, n=1, cutoff=0.5)
    raise LorakernError(
        f"{where}: the {type(model).__name__} has no such module"
        + (f" (the nearest is {near[0]!r})" if near else "")
        + (f"; the adapter is for {base!r}" if base else "")
        + "; attach it to the model that it was trained on"
    )


def _fitted(where: str, name: str, module: torch.nn.Module, factors: LoraFactors) -> Target:
    A, B, _ = factors
    weight = getattr(module, "weight", None)
    # A model that holds a Conv1D has imported it; a model of plain torch layers needs no transformers here.
    conv1d = getattr(sys.modules.get("transformers.pytorch_utils"), "Conv1D", ())
    if isinstance(module, torch.nn.Linear):
        d_out, d_in = weight.shape
    elif isinstance(module, conv1d):
        d_in, d_out = weight.shape
    else:
        raise LorakernError(
            f"{where}: it is a {type(module).__name__}; adapters attach to torch.nn.Linear and transformers' Conv1D "
            "(a PEFT model must be unloaded first)"
        )
    if not weight.dtype.is_floating_point or weight.dtype.itemsize < 2 or weight.device.type == "meta":
        raise LorakernError(
            f"{where}: its weight is {weight.dtype} on {weight.device}; it must be float32, bfloat16 or float16, "
            "in memory: load the base model unquantized and not offloaded"
        )
    if "experts" in name.split("."):
        raise LorakernError(
            f"{where}: an expert of a mixture sees gathered tokens, whose rows cannot be told apart; "
            "leave the module out of the adapter"
        )
    if (A.shape[1], B.shape[0]) != (d_in, d_out):
        raise LorakernError(
            f"{where}: A {tuple(A.shape)} and B {tuple(B.shape)} do not fit the layer of d_in = {d_in} and "
            f"d_out = {d_out}; the adapter is for a model of other sizes"
        )
    return Target(module, LayerSlots(name, d_in, d_out, weight.dtype, weight.device), factors)
