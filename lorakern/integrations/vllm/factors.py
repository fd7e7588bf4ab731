"""The stacked factors of a LoRA layer of vLLM, which pads all to max_lora_rank, and the true rank of each slot."""

from collections.abc import Sequence
from typing import NamedTuple

import torch


class Group(NamedTuple):
    """Adjacent slices whose slots have the same ranks: one call of an op serves them all."""

    A: list[torch.Tensor]  # (slots, r_max, d_in), views
    B: list[torch.Tensor]  # (slots, d_out, r_max), views
    ranks: torch.Tensor | None
    column: int  # of y, where the first of the slices begins


def _view(stacked: torch.Tensor) -> torch.Tensor:
    """Without the dimension of size 1 that vLLM has after the slots."""
    return stacked.detach().squeeze(1) if stacked.dim() == 4 else stacked


class Factors:
    """A and B of every slice of a layer as the ops take them. Until a slot is measured, all of its ranks count.

    Args:
        lora_a: by slice, (slots, 1, r_max, d_in); empty where no op reads A, as for an embedding.
        lora_b: by slice, (slots, 1, d_out, r_max).
    """

    def __init__(self, lora_a: Sequence[torch.Tensor], lora_b: Sequence[torch.Tensor]) -> None:
        self.A, self.B = [_view(a) for a in lora_a], [_view(b) for b in lora_b]
        self.num_slots = len(self.B[0])
        # (slices, slots): what shrink reads, what expand reads, and what a product of both reads.
        self.ranks_a = self.ranks_b = self.ranks = None
        self.groups = [Group(self.A, self.B, None, 0)] if self.A else []

    def measure(self, slot: int) -> None:
        """Note the ranks of a slot, which has just been written."""
        if self.ranks_b is None:
            self.ranks_a, self.ranks_b = _full_ranks(self.A, 1), _full_ranks(self.B, 2)
            self.ranks = self.ranks_a.clone()
        for ranks, factors, rank_dim in ((self.ranks_a, self.A, 0), (self.ranks_b, self.B, 1)):
            for row, factor in zip(ranks, factors, strict=True):
                row[slot] = _true_rank(factor[slot], rank_dim)
        if self.A:
            torch.minimum(self.ranks_a, self.ranks_b, out=self.ranks)
            self.groups = self._grouped()

    def _grouped(self) -> list[Group]:
        groups, column = [], 0
        for A, B, ranks in zip(self.A, self.B, self.ranks, strict=True):
            # A captured graph replays the calls that it has seen, so there each slice keeps a call of its own.
            if groups and ranks.device.type == "cpu" and torch.equal(groups[-1].ranks, ranks):
                groups[-1].A.append(A)
                groups[-1].B.append(B)
            else:
                groups.append(Group([A], [B], ranks, column))
            column += B.shape[1]
        return groups


def _full_ranks(factors: list[torch.Tensor], rank_dim: int) -> torch.Tensor:
    rows = [torch.full((len(f),), f.shape[rank_dim], dtype=torch.int32, device=f.device) for f in factors]
    return torch.stack(rows) if rows else torch.empty(0, 0)


def _true_rank(factor: torch.Tensor, rank_dim: int) -> torch.Tensor:
    """One past the last rank that holds anything but zeros; stays on the device."""
    used = factor.ne(0).any(dim=1 - rank_dim)
    return (used * torch.arange(1, len(used) + 1, dtype=torch.int32, device=used.device)).amax()
