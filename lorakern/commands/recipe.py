"""Recipes: YAML files that describe a merge, as mergekit's do.

    merge_method: ties
    models:
      - model: adapters/math              # relative to this file
        parameters: {weight: 0.5, density: 0.4}
      - model: adapters/poet
        parameters: {weight: [0.2, 0.8]}  # a gradient from the first layer to the last
    parameters:
      rank: 16
      density: [{filter: mlp, value: 0.2}, {value: 0.5}]  # the first filter that is a part of the module's path

Other keys are dtype, seed, missing and base_model. A model's own parameter goes before the one of all models.
"""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import yaml

from lorakern.adapters.json_file import show
from lorakern.commands.merge import Job
from lorakern.commands.settings import Setting, last_layer
from lorakern.commands.sources import read_dtype, sources
from lorakern.errors import LorakernError
from lorakern.merge.driver import PerModule
from lorakern.merge.registry import Method, find

MAX_BYTES = 64 << 10
MAX_DEPTH = 16
_KEYS = ("models", "merge_method", "parameters", "dtype", "seed", "missing", "base_model")


def read_recipe(name: str) -> Job:
    """The merge that the YAML file `name` describes.

    Raises `LorakernError`, naming the file and the key, for a file that is no such recipe, is larger than 64 kB or has
    anchors, aliases or tags; for keys that are unknown; and for what `lorakern.merge.merge` refuses.

    The format is modelled on that of mergekit (https://github.com/arcee-ai/mergekit).
    """
    path = Path(name)
    text = _text(path)
    fields = _parsed(text, path)
    _known(fields, _KEYS, f"{path}: the recipe")
    method = find(_take(fields, "merge_method", str, path, "the name of a method"))
    models = _take(fields, "models", list, path, "a list of {model: path, parameters: {...}}")
    if not models:
        raise LorakernError(f"{path}: models must name at least one adapter, got an empty list")
    for model in models:
        if not isinstance(model, dict) or not isinstance(model.get("model"), str) or not model["model"]:
            raise LorakernError(f"{path}: models must hold {{model: path, parameters: ...}}, got {show(model)} in it")
        _known(model, ("model", "parameters"), f"{path}: model {model['model']}")
    shared = _take(fields, "parameters", dict, path, "a mapping", {})
    _known(shared, ("weight", "rank", "normalize", *method.options), f"{path}: parameters")
    own = [_take(model, "parameters", dict, path, "a mapping", {}) for model in models]
    for model, parameters in zip(models, own, strict=True):
        _known(parameters, ("weight", *sorted(method.per_adapter)), f"{path}: parameters of {model['model']}")
    normalize = shared.pop("normalize", False)
    if not isinstance(normalize, bool):
        raise LorakernError(f"{path}: normalize must be true or false, got {show(normalize)}")
    settings = _Settings(method, shared, own, [model["model"] for model in models], path)
    constants = settings.at("", 0) if settings.constant else {}
    return Job(
        sources([model["model"] for model in models], path.parent),
        method.name,
        weights=constants.pop("weights", None),
        rank=constants.pop("rank", None),
        dtype=read_dtype(_take(fields, "dtype", str, path, "the name of a dtype", None), f"{path}: dtype"),
        seed=_take(fields, "seed", int, path, "an integer", 0),
        normalize=normalize,
        missing=_take(fields, "missing", str, path, "zero, skip or error", "zero"),
        base_model=_take(fields, "base_model", str, path, "the name of a model", None),
        options=constants,
        per_module=None if settings.constant else settings.per_module,
        recipe=text,
    )


class _Settings:
    """The parameters of all models and of each, as the arguments of a merge, module by module."""

    def __init__(
        self,
        method: Method,
        shared: Mapping[str, Any],
        own: list[Mapping[str, Any]],
        models: list[str],
        path: Path,
    ) -> None:
        self._method = method
        self._shared = {name: self._setting(name, value, f"{path}: {name}") for name, value in shared.items()}
        self._own = [
            {name: self._setting(name, value, f"{path}: {name} of {model}") for name, value in parameters.items()}
            for model, parameters in zip(models, own, strict=True)
        ]
        everything = [setting for settings in (self._shared, *self._own) for setting in settings.values()]
        self.constant = all(setting.constant for setting in everything)

    def _setting(self, name: str, value: Any, where: str) -> Setting:
        option = self._method.options.get(name)
        return Setting(where, value, whole=name == "rank" or (option is not None and option.hint is int))

    def per_module(self, modules: Collection[str]) -> PerModule:
        """`merge`'s argument of that name; raises if a parameter has no value for one of the modules."""
        last = last_layer(modules)
        return {module: self.at(module, last) for module in modules}.__getitem__

    def at(self, module: str, last: int) -> dict[str, Any]:
        """Weights, rank and options, as far as the recipe says something of them."""
        arguments = {name: setting.at(module, last) for name, setting in self._shared.items()}
        weight = arguments.pop("weight", None)
        if weight is not None or any("weight" in own for own in self._own):
            arguments["weights"] = self._each("weight", 1.0 if weight is None else weight, module, last)
        for name in self._method.per_adapter:
            if any(name in own for own in self._own):
                option = self._method.options[name]
                otherwise = arguments.get(name, None if option.required else option.default)
                arguments[name] = self._each(name, otherwise, module, last)
        return arguments

    def _each(self, name: str, otherwise: Any, module: str, last: int) -> list[Any]:
        return [own[name].at(module, last) if name in own else otherwise for own in self._own]


def _known(fields: Mapping[Any, Any], known: Collection[str], where: str) -> None:
    for key in fields:
        if key not in known:
            raise LorakernError(f"{where} has the unknown key {show(key)}; known are {', '.join(known)}")


_REQUIRED = object()


def _take(fields: Mapping[str, Any], key: str, kind: type, path: Path, says: str, default: Any = _REQUIRED) -> Any:
    value = fields.get(key)
    if value is None and default is not _REQUIRED:
        return default
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise LorakernError(f"{path}: {key} must be {says}, got {'nothing' if value is None else show(value)}")
    return value


def _text(path: Path) -> str:
    try:
        if not path.is_file():
            raise LorakernError(f"{path}: no such file; give a recipe or the directories of adapters")
        with path.open("rb") as stream:
            content = stream.read(MAX_BYTES + 1)
        if len(content) > MAX_BYTES:
            raise LorakernError(f"{path}: the recipe has more than {MAX_BYTES} bytes; this is no recipe of a merge")
        return content.decode()
    except UnicodeDecodeError as error:
        raise LorakernError(f"{path}: the recipe is not UTF-8 ({error}); save it again") from None
    except OSError as error:
        raise LorakernError(f"{path}: the recipe cannot be read ({error}); check the file and its rights") from None


class _Loader(yaml.SafeLoader):
    """YAML's plain types, without what a recipe needs not and an attack does: anchors, tags, deep nesting."""

    depth = 0

    def compose_node(self, parent, index):
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent) or event.anchor is not None:
            raise yaml.MarkedYAMLError(None, None, "anchors (&) and aliases (*) are not taken", event.start_mark)
        if getattr(event, "tag", None) is not None:
            raise yaml.MarkedYAMLError(None, None, "tags (!) are not taken", event.start_mark)
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise yaml.MarkedYAMLError(None, None, f"it nests more than {MAX_DEPTH} deep", event.start_mark)
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.MarkedYAMLError(None, None, "a key must be a word", key.start_mark)
            if key.value == "<<":
                raise yaml.MarkedYAMLError(None, None, "merge keys (<<) are not taken", key.start_mark)
            if key.value in seen:
                raise yaml.MarkedYAMLError(None, None, f"the key {show(key.value)} is there twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def _parsed(text: str, path: Path) -> dict[str, Any]:
    try:
        fields = yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise LorakernError(f"{path}: the recipe is not usable YAML ({reason}); correct it") from None
    if not isinstance(fields, dict):
        known = ", ".join(_KEYS)
        raise LorakernError(f"{path}: the recipe must be a mapping with the keys {known}, got {show(fields)}")
    return fields
