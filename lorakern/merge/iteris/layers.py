"""The linear layers that adapters target: their weights, and what every adapter adds to them."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from lorakern.adapters import LoraFactors
from lorakern.integrations.targets import find_targets


@dataclass(eq=False)
class Layer:
    """A linear layer of the model; `factors` has one entry per adapter, None for those that leave it alone."""

    name: str
    module: torch.nn.Module
    factors: list[LoraFactors | None]

    @property
    def transposed(self) -> bool:
        """Whether the weight is stored as (d_in, d_out), as in GPT-2's Conv1D."""
        return not isinstance(self.module, torch.nn.Linear)

    @property
    def weight(self) -> torch.Tensor:
        """(d_out, d_in), as it is in the model."""
        weight = self.module.weight.detach()
        return weight.T if self.transposed else weight

    @property
    def d_in(self) -> int:
        return self.weight.shape[1]

    def parts(self, i: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(s_i B_i, A_i) in float64 on the layer's device, of rank 0 where the adapter leaves the layer alone."""
        weight = self.weight
        if self.factors[i] is None:
            d_out, d_in = weight.shape
            return weight.new_zeros(d_out, 0, dtype=torch.float64), weight.new_zeros(0, d_in, dtype=torch.float64)
        A, B, scale = (
            f.detach().to(weight.device, torch.float64) if torch.is_tensor(f) else f for f in self.factors[i]
        )
        return B * scale, A

    def folded(self, update: torch.Tensor) -> torch.Tensor:
        """The weight plus an update (d_out, d_in), rounded once, in the dtype and layout of the weight."""
        weight = self.module.weight.detach()
        wide = torch.promote_types(weight.dtype, torch.float32)
        return (weight.to(wide) + (update.T if self.transposed else update).to(weight.device)).to(weight.dtype)


def find_layers(op: str, model: torch.nn.Module, adapters: Mapping[str, Mapping[str, LoraFactors]]) -> list[Layer]:
    """The layers that any adapter targets, in the order of the model.

    Raises:
        LorakernError: an adapter, by its name, does not fit the model.
    """
    layers: dict[torch.nn.Module, Layer] = {}
    for i, (name, adapter) in enumerate(adapters.items()):
        for module, slots, factors in find_targets(op, model, name, adapter):
            layer = layers.setdefault(module, Layer(slots.name, module, [None] * len(adapters)))
            layer.factors[i] = factors
    return [layers[module] for module in model.modules() if module in layers]
