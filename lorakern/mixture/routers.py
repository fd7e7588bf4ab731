"""What was learned to weigh adapters: parameters by layer, in memory and in a file."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from lorakern.adapters.json_file import parse_object, show
from lorakern.adapters.state_file import write_state
from lorakern.adapters.tensor_file import TensorFile
from lorakern.errors import LorakernError
from lorakern.mixture.modes import MODES, Mode

_KEY = "lorakern.routers"
_DTYPE = "F32"


@dataclass
class Routers:
    """The parameters of a mode, float32, for each of a model's layers.

    Attributes:
        mode: its name, such as "ramole".
        layers: path of a linear layer (of a decoder layer for a mode that has one gate for all its modules) to named
            parameters: A (r_r, d_in) and B (d_out, r_r) for "ramole", gate (N, d) and bias (N,) for the others.
        adapters: the N adapters that the gates are for, in order; empty for "ramole", which takes any.

    >>> import torch
    >>> from lorakern.mixture import Routers
    >>> model = torch.nn.Sequential(torch.nn.ModuleList([torch.nn.Linear(4, 2)]))
    >>> routers = Routers.init(model, "ramole", rank=3)
    >>> {path: tuple(router["B"].shape) for path, router in routers.layers.items()}
    {'0.0': (2, 3)}
    """

    mode: str
    layers: dict[str, dict[str, torch.Tensor]] = field(repr=False)
    adapters: tuple[str, ...] = ()

    @classmethod
    def init(
        cls, model: torch.nn.Module, mode: str, *, adapters: Sequence[str] = (), rank: int = 8, seed: int = 0
    ) -> "Routers":
        """Parameters that weigh all adapters alike, or nearly: the start of training.

        Args:
            model: every `torch.nn.Linear` in its decoder layers gets a router.
            mode: as `MixtureModel` takes it.
            adapters: the names that a mode with a gate for each adapter is for.
            rank: r_r of "ramole".
            seed: of what is drawn.

        Raises:
            LorakernError: an unknown mode, no adapters where they are needed, or a model without decoder layers.
        """
        kind = mode_named(mode)()
        if kind.per_adapter and not adapters:
            raise LorakernError(f"adapters is empty; mode {mode!r} learns a gate for each, so name them")
        if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
            raise LorakernError(f"rank must be an integer of at least 1, got {show(rank)}")
        generator = torch.Generator().manual_seed(seed)
        layers = {}
        for path, (block, linear) in sorted(linear_layers(model).items()):
            key = block if kind.per_block else path
            # the first module of a decoder layer that reads its input tells the width of that input
            if kind.learned and key not in layers:
                width = model.config.hidden_size if kind.per_block else linear.in_features
                layers[key] = kind.init(width, linear.out_features, len(adapters), rank, generator)
        return cls(mode, layers, tuple(adapters) if kind.per_adapter else ())

    def parameters(self) -> dict[str, torch.Tensor]:
        """All of them, as "layer/name"."""
        return {f"{path}/{name}": tensor for path, named in self.layers.items() for name, tensor in named.items()}

    def save(self, file: str | os.PathLike[str]) -> None:
        """Write one safetensors file, beside and renamed.

        Raises:
            LorakernError: it cannot be written.
        """
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.parameters().items()}
        write_state(Path(file), tensors, _KEY, {"mode": self.mode, "adapters": list(self.adapters)})

    @classmethod
    def load(cls, file: str | os.PathLike[str]) -> "Routers":
        """Read what `save` wrote; its header is checked before anything is allocated.

        Raises:
            LorakernError: the file is missing, damaged, or holds something else.
        """
        path = Path(file)
        try:
            stored = TensorFile(path)
        except OSError as error:
            raise LorakernError(
                f"{path} cannot be read ({error.strerror}); give a file that Routers.save wrote"
            ) from None
        try:
            fields = parse_object((stored.metadata.get(_KEY) or "{}").encode(), path, "the metadata")
            mode, adapters = fields.get("mode"), fields.get("adapters")
            if not isinstance(mode, str) or mode not in MODES or not isinstance(adapters, list):
                raise LorakernError(f"{path} holds no routers; give a file that Routers.save wrote")
            if not all(isinstance(name, str) for name in adapters):
                raise LorakernError(f"{path}: adapters must be names, got {show(adapters)}")
            layers: dict[str, dict[str, torch.Tensor]] = {}
            for name, info in stored.tensors.items():
                layer, _, parameter = name.rpartition("/")
                if info.dtype != _DTYPE or parameter not in MODES[mode].learned or not layer:
                    raise LorakernError(f"{path}: {show(name)} ({info.dtype}) is no parameter of mode {mode!r}")
                tensor = stored.read(name)
                if not tensor.isfinite().all():
                    raise LorakernError(f"{path}: {show(name)} holds NaN or infinity; train it again")
                layers.setdefault(layer, {})[parameter] = tensor
        finally:
            stored.close()
        return cls(mode, layers, tuple(adapters))


def mode_named(name: str) -> type[Mode]:
    if not isinstance(name, str) or name not in MODES:
        raise LorakernError(f"mode must be one of {', '.join(MODES)}; got {show(name)}")
    return MODES[name]


def linear_layers(model: torch.nn.Module) -> dict[str, tuple[str, torch.nn.Linear]]:
    """Path to (path of its decoder layer, module) of every linear layer inside of a list of modules.

    Raises:
        LorakernError: there are none.
    """
    lists = [name for name, module in model.named_modules() if isinstance(module, torch.nn.ModuleList)]
    blocks = [f"{name}.{i}" for name in lists for i in range(len(model.get_submodule(name)))]
    found = {}
    for block in sorted(blocks, key=len):
        for name, module in model.get_submodule(block).named_modules():
            if isinstance(module, torch.nn.Linear):
                found.setdefault(f"{block}.{name}".rstrip("."), (block, module))
    if not found:
        raise LorakernError("model has no decoder layers, lists of modules with linear layers; give another model")
    return found


def checked(routers: "Routers | None", mode: str, layers: Mapping[str, tuple[str, torch.nn.Linear]]) -> "Routers":
    """The routers that a mode needs, of the shapes that these layers need.

    Raises:
        LorakernError: they are missing, of another mode or of another model.
    """
    kind = mode_named(mode)()
    if not kind.learned:
        if routers is not None:
            raise LorakernError(f"routers are of no use to mode {mode!r}, which learns nothing; leave them out")
        return Routers(mode, {})
    if not isinstance(routers, Routers):
        raise LorakernError(
            f"mode {mode!r} needs routers=Routers.load(...) or those of train_router; got {show(routers)}"
        )
    if routers.mode != mode:
        raise LorakernError(f"routers are of mode {routers.mode!r}, not {mode!r}; train or load those of the mode")
    needed = {block if kind.per_block else path for path, (block, _) in layers.items()}
    if routers.layers.keys() != needed:
        other = sorted(routers.layers.keys() ^ needed)[0]
        raise LorakernError(f"routers and the model differ in layer {other!r}; train routers for this model")
    for path, named in routers.layers.items():
        shapes = {name: tuple(tensor.shape) for name, tensor in named.items()}
        rank = shapes.get("A", (1,))[0]
        linear = None if kind.per_block else layers[path][1]
        d_in, d_out = (linear.in_features, linear.out_features) if linear else (shapes["gate"][-1], 0)
        made = kind.init(d_in, d_out, len(routers.adapters), rank, torch.Generator())
        expected = {name: tuple(tensor.shape) for name, tensor in made.items()}
        if shapes != expected:
            raise LorakernError(f"routers: layer {path!r} has {shapes}, the model needs {expected}; train them for it")
    return routers
