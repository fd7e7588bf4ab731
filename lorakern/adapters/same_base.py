"""Whether adapters are for the same base model."""

from collections.abc import Iterable
from typing import Any

from lorakern.adapters.json_file import show
from lorakern.errors import LorakernError


def check_same_base(adapters: Iterable[Any], *, allow_mixed: bool = False) -> str | None:
    """The base model that the adapters name in base_model_name_or_path, None if none of them does.

    Args:
        adapters: of `LoraAdapter.load` or `open_adapter`. One that names no base is taken to fit.
        allow_mixed: return the first name where they differ (a local copy and a hub name may be the same model).

    Raises `LorakernError`, naming both adapters, if they name different ones.

    >>> import torch
    >>> from lorakern.adapters import LoraAdapter, check_same_base
    >>> factors = {"proj": (torch.ones(2, 8), torch.ones(6, 2), 0.5)}
    >>> check_same_base([LoraAdapter(factors), LoraAdapter(factors, base_model_name_or_path="my/model")])
    'my/model'
    """
    first, its_base = None, None
    for number, adapter in enumerate(adapters):
        name, base = adapter.path or f"adapter {number}", adapter.config.base_model_name_or_path
        if not base:
            continue
        if first is None:
            first, its_base = name, base
        elif base != its_base and not allow_mixed:
            raise LorakernError(
                f"{name} is for the base model {show(base)}, {first} for {show(its_base)}; adapters of different bases "
                "do not belong together, or allow_mixed=True if the two are the same model"
            )
    return its_base
