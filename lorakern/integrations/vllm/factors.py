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

    On the CPU a measured slot of B is packed where it lies, (d_out, rank) instead of (d_out, r_max): for a small rank
    the padding would share the cache lines of what is read.

    Args:
        lora_a: by slice, (slots, 1, r_max, d_in); empty where no op reads A, as for an embedding.
        lora_b: by slice, (slots, 1, d_out, r_max). A of a fully sharded layer has fewer ranks than B.
    """

    def __init__(self, lora_a: Sequence[torch.Tensor], lora_b: Sequence[torch.Tensor]) -> None:
        self.A, self.B = [_view(a) for a in lora_a], [_view(b) for b in lora_b]
        self.num_slots = len(self.B[0])
        self.ranks_a = self.ranks_b = None  # (slices, slots) once a slot was measured
        self.packed = False
        self.groups = [Group(self.A, self.B, None, 0)] if self.A else []

    def measure(self, slot: int) -> None:
        """Note the ranks of a slot, which has just been written."""
        if self.ranks_b is None:
            self.ranks_a, self.ranks_b = _full_ranks(self.A, 1), _full_ranks(self.B, 2)
            self.packed = self.B[0].device.type == "cpu" and all(b[0].is_contiguous() for b in self.B)
        for i, A in enumerate(self.A):
            self.ranks_a[i, slot] = _true_rank(A[slot], 0)
        for i, B in enumerate(self.B):
            self.ranks_b[i, slot] = _true_rank(B[slot], 1)
            if self._multiplied():  # a rank that A has no row for adds nothing
                self.ranks_b[i, slot] = torch.minimum(self.ranks_b[i, slot], self.ranks_a[i, slot])
            if self.packed:
                _pack(B[slot], int(self.ranks_b[i, slot]))
        if self._multiplied():
            self.groups = self._grouped()

    def clear(self, slot: int) -> None:
        """Forget a slot that was written in part: it adds nothing until it is written and measured again."""
        for ranks in (self.ranks_a, self.ranks_b):
            if ranks is not None and ranks.numel():
                ranks[:, slot] = 0

    def _multiplied(self) -> bool:
        """Whether A and B meet in one op; fully sharded layers gather A x before B multiplies it."""
        return bool(self.A) and self.A[0].shape[1] == self.B[0].shape[2]

    def _grouped(self) -> list[Group]:
        groups, column = [], 0
        for A, B, ranks in zip(self.A, self.B, self.ranks_b, strict=True):
            # A captured graph replays the calls that it has seen, so there each slice keeps a call of its own.
            if groups and ranks.device.type == "cpu" and torch.equal(groups[-1].ranks, ranks):
                groups[-1].A.append(A)
                groups[-1].B.append(B)
            else:
                groups.append(Group([A], [B], ranks, column))
            column += B.shape[1]
        return groups


def _pack(B: torch.Tensor, rank: int) -> None:
    """Put the first `rank` columns of one slot, (d_out, r_max), side by side at its beginning."""
    if 0 < rank < B.shape[1]:
        kept = B[:, :rank].flatten()
        B.view(-1)[: kept.numel()] = kept


def _full_ranks(factors: list[torch.Tensor], rank_dim: int) -> torch.Tensor:
    rows = [torch.full((len(f),), f.shape[rank_dim], dtype=torch.int32, device=f.device) for f in factors]
    return torch.stack(rows) if rows else torch.empty(0, 0)


def _true_rank(factor: torch.Tensor, rank_dim: int) -> torch.Tensor:
    """One past the last rank that holds anything but zeros; stays on the device."""
    used = factor.ne(0).any(dim=1 - rank_dim)
    return (used * torch.arange(1, len(used) + 1, dtype=torch.int32, device=used.device)).amax()
