"""A parameter of a recipe: one value, a gradient over the layers, or values by filters on the modules' names."""

import re
from collections.abc import Collection
from typing import Any

from lorakern.adapters.json_file import show
from lorakern.errors import LorakernError

_LAYER = re.compile(r"(?:^|\.)(\d+)(?:\.|$)", re.ASCII)


class Setting:
    """The value that one parameter has in each module.

    A number, word or truth value is the same everywhere. A list of numbers is a gradient: evenly spaced over the
    layers, with straight lines between. A list of {filter, value} gives the first value whose filter is a part of the
    module's path; one without a filter, or with "*", takes every module.

    Args:
        where: what the parameter is called in error messages.
        value: as it is in the recipe.
        whole: round the values of a gradient of integers to integers.

    Raises `LorakernError` for any other value. The forms are those of mergekit's recipes.

    >>> setting = Setting("weight", [{"filter": "mlp", "value": [0, 1]}, {"value": 0.5}])
    >>> [setting.at(f"layers.{layer}.mlp.up_proj", 4) for layer in range(5)], setting.at("layers.3.self_attn.q_proj", 4)
    ([0.0, 0.25, 0.5, 0.75, 1.0], 0.5)
    """

    def __init__(self, where: str, value: Any, whole: bool = False) -> None:
        self.where = where
        self._whole = whole
        entries = isinstance(value, list) and value and all(isinstance(entry, dict) for entry in value)
        self._entries = [self._entry(entry) for entry in value] if entries else [("*", self._checked(value))]
        self.constant = not entries and not isinstance(value, list)

    def at(self, module: str, last_layer: int) -> Any:
        """The value for a module of a model whose layers are numbered from 0 to `last_layer`."""
        for pattern, value in self._entries:
            if pattern == "*" or pattern in module:
                return self._gradient(value, module, last_layer) if isinstance(value, list) else value
        raise LorakernError(
            f"{self.where} has no value for {module}: none of its filters is a part of that name; end the list with "
            "{value: ...}, which takes every module"
        )

    def _entry(self, entry: dict[Any, Any]) -> tuple[str, Any]:
        if not entry.keys() <= {"filter", "value"} or "value" not in entry:
            raise LorakernError(f"{self.where} must be a list of {{filter: name, value: ...}}, got {show(entry)} in it")
        pattern = entry.get("filter", "*")
        if not isinstance(pattern, str) or not pattern:
            raise LorakernError(f"{self.where}: a filter must be a part of a module's path, got {show(pattern)}")
        return pattern, self._checked(entry["value"])

    def _checked(self, value: Any) -> Any:
        if isinstance(value, list):
            if value and all(isinstance(point, (int, float)) and not isinstance(point, bool) for point in value):
                return value
        elif isinstance(value, str | int | float):
            if isinstance(value, str) and _is_number(value):
                raise LorakernError(f"{self.where}: YAML reads {value} as a word, not as a number; write it as 1.0e-3")
            return value
        raise LorakernError(
            f"{self.where} must be a value, a list of numbers (over the layers), or a list of {{filter: name, "
            f"value: ...}}, got {show(value)}"
        )

    def _gradient(self, points: list[float], module: str, last_layer: int) -> float:
        found = _LAYER.search(module)
        if found is None:
            raise LorakernError(
                f"{self.where} is a gradient over the layers, but {module} has no number between dots that says which "
                "one it is; put {filter: ..., value: ...} for such modules before it"
            )
        place = int(found[1]) / max(last_layer, 1) * (len(points) - 1)
        left = min(int(place), len(points) - 1)
        right = min(left + 1, len(points) - 1)
        value = points[left] + (place - left) * (points[right] - points[left])
        return round(value) if self._whole and all(isinstance(point, int) for point in points) else float(value)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def last_layer(modules: Collection[str]) -> int:
    """The largest number that stands between dots in a module's path first; 0 if there is none.

    >>> last_layer(["model.layers.11.mlp.up_proj", "model.layers.7.mlp.experts.63.up_proj", "lm_head"])
    11
    """
    return max((int(found[1]) for found in map(_LAYER.search, modules) if found), default=0)
