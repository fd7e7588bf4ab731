"""The layers of a model with slots for adapters, under one mode of composition."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch

from lorakern.adapters import LoraFactors
from lorakern.adapters.json_file import show
from lorakern.errors import LorakernError
from lorakern.integrations.slots import LayerSlots
from lorakern.integrations.targets import Target, find_targets
from lorakern.mixture.modes import Layer, Mode, Tokens
from lorakern.mixture.routers import Routers, checked, linear_layers, mode_named
from lorakern.ops import plan


class MixtureLayers:
    """Every linear layer of a model's decoder layers, hooked; outside of `run` the model is what it was.

    A slot is written while forwards run that do not use it. What a layer holds at a moment is one `Layer`, replaced as
    a whole, so a forward that has begun keeps what it saw.

    Args:
        model: any module with decoder layers in a `torch.nn.ModuleList`.
        mode: the composition, by name.
        slots: how many adapters are held at once.
        routers: what a mode that learns has learned.

    Raises:
        LorakernError: an unknown mode, a model without decoder layers, or routers that do not fit them.
    """

    def __init__(self, model: torch.nn.Module, mode: str, slots: int, routers: Routers | None = None) -> None:
        self.model, self.slots = model, slots
        self.mode: Mode = mode_named(mode)()
        linear = linear_layers(model)
        self.routers = checked(routers, mode, linear)
        self._paths = {module: path for path, (_, module) in linear.items()}
        self._slots: dict[str, LayerSlots] = {}
        self._layers: dict[str, Layer] = {}
        self._tokens: Tokens | None = None
        self._hooks = []
        for path, (block, module) in linear.items():
            weight = module.weight
            self._slots[path] = LayerSlots(path, module.in_features, module.out_features, weight.dtype, weight.device)
            router = self.routers.layers.get(block if self.mode.per_block else path, {})
            cast = {name: weight.dtype for name in self.mode.applied}
            router = {name: tensor.to(weight.device, cast.get(name)) for name, tensor in router.items()}
            with torch.inference_mode(False):
                self._slots[path].reserve(slots, 1)
                bank = self._slots[path].bank
                self._layers[path] = Layer(path, block, bank, self.mode.tables(slots, bank), router)
            self._hooks.append(module.register_forward_hook(self._hook(path), with_kwargs=True))
        if self.mode.per_block:
            # of a decoder layer's modules one stands for all: they have the same gate
            for block, path in {block: path for path, (block, _) in linear.items()}.items():
                module = model.get_submodule(block)
                self._hooks.append(module.register_forward_pre_hook(self._enter(block, path), with_kwargs=True))

    def fit(self, op: str, name: str, adapter: Mapping[str, LoraFactors]) -> list[Target]:
        """Where in the model the adapter's modules are.

        Raises:
            LorakernError: it does not fit the model, has a module that is no layer here, or the mode knows it not.
        """
        targets = find_targets(op, self.model, name, adapter)
        for target in targets:
            if target.module not in self._paths:
                raise LorakernError(
                    f"{op}: adapter {name!r}, module {target.slots.name!r}: mixtures are for the linear layers of "
                    "decoder layers; leave the module out of the adapter"
                )
        if self.mode.per_adapter and name not in self.routers.adapters:
            raise LorakernError(
                f"{op}: mode {self.mode.name!r} has learned no gate for adapter {name!r}, only for "
                f"{show(list(self.routers.adapters))}; train one, or take mode 'ramole', which needs none"
            )
        return targets

    @torch.no_grad()
    def load(self, slot: int, name: str, targets: Sequence[Target]) -> None:
        """Put an adapter into a free slot. Not for two threads at once."""
        factors = {self._paths[target.module]: target.factors for target in targets}
        place = self.routers.adapters.index(name) if self.mode.per_adapter else -1
        with torch.inference_mode(False):
            for path, slots in self._slots.items():
                if path in factors:
                    slots.write(slot, factors[path])
                else:
                    slots.bank.ranks[slot : slot + 1] = 0
                layer = self._layers[path]
                tables = dict(layer.tables)
                self.mode.fill(tables, slot, slots.bank, layer.router, place)
                self._layers[path] = layer._replace(bank=slots.bank, tables=tables)

    @contextmanager
    def run(self, tokens: Tokens) -> Iterator[None]:
        """Inside, a forward over these tokens has its mixtures."""
        self._tokens = tokens
        try:
            yield
        finally:
            self._tokens = None

    @contextmanager
    def follow(self, routers: Routers) -> Iterator[None]:
        """Inside, the layers take these parameters, and autograd follows them; the slots hold `routers.adapters`."""
        before = dict(self._layers)
        try:
            for path, layer in before.items():
                router = routers.layers[layer.block if self.mode.per_block else path]
                self._layers[path] = layer._replace(router=router, tables=self.mode.follow(layer.bank, router))
            yield
        finally:
            self._layers = before

    def close(self) -> None:
        """Take every hook away."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def _hook(self, path: str):
        d_in, d_out = self._slots[path].d_in, self._slots[path].d_out

        def add_mixture(module, inputs, named, y):
            tokens = self._tokens
            if tokens is None:
                return None
            (x,) = inputs or named.values()
            return self.mode.add(y.view(-1, d_out), x.reshape(-1, d_in), self._layers[path], tokens).view(y.shape)

        return add_mixture

    def _enter(self, block: str, path: str):
        def enter(module, inputs, named):
            if self._tokens is not None:
                x = inputs[0] if inputs else named["hidden_states"]
                self.mode.enter(block, x.reshape(-1, x.shape[-1]), self._layers[path], self._tokens)

        return enter


def tokens_of(
    rows: Sequence[Sequence[int]],
    lengths: Sequence[int],
    *,
    width: int,
    slots: int,
    size: int | None = None,
    sequences: Sequence[int] | None = None,
    pooled: Sequence[int] | None = None,
    count: int | None = None,
    memory: dict[str, torch.Tensor] | None = None,
    watch: bool = False,
    device: torch.device | None = None,
) -> Tokens:
    """`Tokens` of rows with their slots, lengths[i] tokens of rows[i] one after the other, padded to `size`.

    Args:
        rows: the slots of each row, at most `width`.
        lengths: how many tokens each has.
        sequences: what `Tokens.sequences` says of each row; their numbers by default.
        pooled: how many of a row's first tokens are pooled; all by default.
    """
    total = sum(lengths)
    size = total if size is None else size
    padding = size - total
    padded = [[*row, *[-1] * (width - len(row))] for row in rows]
    shares = [[1 / len(row) if slot >= 0 else 0.0 for slot in full] for row, full in zip(rows, padded, strict=True)]
    repeats = torch.tensor([*lengths, padding])
    sequences = list(range(len(rows))) if sequences is None else list(sequences)
    pooled = list(lengths) if pooled is None else list(pooled)
    marks = [i < first for length, first in zip(lengths, pooled, strict=True) for i in range(length)]

    def by_token(values, dtype):
        return torch.tensor(values, dtype=dtype).repeat_interleave(repeats, dim=0).to(device)

    indices = by_token([*padded, [-1] * width], torch.int32)
    return Tokens(
        indices=indices,
        shares=by_token([*shares, [0.0] * width], torch.float32),
        plan=plan(indices, slots),
        sequences=by_token([*sequences, 0], torch.int64),
        pooled=torch.tensor([*marks, *[False] * padding], dtype=torch.bool).to(device),
        count=len(rows) if count is None else count,
        memory=memory,
        watch=[] if watch else None,
    )
