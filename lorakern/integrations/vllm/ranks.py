"""The true rank of every slot: vLLM pads all adapters with zeros to max_lora_rank, and the padding is never read."""

import functools
from typing import NamedTuple

import torch


class Bank(NamedTuple):
    """The slots of one factor of one layer, as the ops take them."""

    stacked: torch.Tensor  # as vLLM holds it, kept so that its id stays its own
    weights: torch.Tensor  # A (slots, r_max, d_in) or B (slots, d_out, r_max), a view
    ranks: torch.Tensor | None


def _view(stacked: torch.Tensor) -> torch.Tensor:
    """Without the dimension of size 1 that vLLM has after the slots."""
    return stacked.detach().squeeze(1) if stacked.dim() == 4 else stacked


class Banks:
    """The factors that adapters were written to, by the identity of vLLM's tensor.

    Others are taken as they come, with all their ranks: so are the slots that no adapter was activated in.
    """

    def __init__(self) -> None:
        self._banks: dict[int, Bank] = {}

    def __getitem__(self, stacked: torch.Tensor) -> Bank:
        bank = self._banks.get(id(stacked))
        return Bank(stacked, _view(stacked), None) if bank is None else bank

    def measure(self, layer: torch.nn.Module, slot: int) -> None:
        """Note the ranks of one slot of a LoRA layer, which has just been written."""
        for name, rank_dim in (("lora_a_stacked", 1), ("lora_b_stacked", 2)):
            factors = getattr(layer, name, ())
            for stacked in (factors,) if isinstance(factors, torch.Tensor) else factors:
                # An embedding holds A as (slots, vocabulary, r_max), and experts hold (r_max, d_in): no op reads those.
                if stacked.dim() == 4 and stacked.shape[1] == 1:
                    self._measure(stacked, rank_dim, slot)

    def _measure(self, stacked: torch.Tensor, rank_dim: int, slot: int) -> None:
        bank = self._banks.get(id(stacked))
        if bank is None:
            slots, r_max = stacked.shape[0], stacked.shape[rank_dim + 1]
            ranks = torch.full((slots,), r_max, dtype=torch.int32, device=stacked.device)
            bank = self._banks[id(stacked)] = Bank(stacked, _view(stacked), ranks)
        bank.ranks[slot] = _true_rank(bank.weights[slot], rank_dim - 1)


def _true_rank(factor: torch.Tensor, rank_dim: int) -> torch.Tensor:
    """One past the last rank that holds anything but zeros; stays on the device."""
    used = factor.ne(0).any(dim=1 - rank_dim)
    return (used * torch.arange(1, len(used) + 1, dtype=torch.int32, device=used.device)).amax()


def follow(manager: type) -> None:
    """Let a LoRA manager class of vLLM measure the slot that it has written an adapter to. A second call does nothing.

    All adapters, those of the warm-up too, come into their slots by ``activate_adapter``; it returns whether it wrote.
    """
    activate = manager.activate_adapter
    if getattr(activate, "followed", False):
        return

    @functools.wraps(activate)
    def activate_adapter(self, lora_id, *args, **kwargs):
        wrote = True  # also if it fails half way
        try:
            wrote = activate(self, lora_id, *args, **kwargs)
            return wrote
        finally:
            if wrote and lora_id in self.lora_index_to_id:
                slot = self.lora_index_to_id.index(lora_id)
                for layer in self.modules.values():
                    banks = getattr(layer.punica_wrapper, "banks", None)
                    if banks is not None:
                        banks.measure(layer, slot)

    activate_adapter.followed = True
    manager.activate_adapter = activate_adapter
