"""Slots of linear layers for many adapters, and the routing of a batch to them. Knows nothing of any engine."""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple

import torch

from lorakern.adapters import LoraFactors
from lorakern.errors import LorakernError
from lorakern.ops import Plan, plan


class Group:
    """What the routing of a batch depends on; layers that agree in it share one object, indices and plan."""

    def __init__(self, served: frozenset[int], num_slots: int, dtype: torch.dtype, device: torch.device) -> None:
        self.served = served
        self.num_slots = num_slots
        self.dtype = dtype
        self.device = device


_group = lru_cache(maxsize=4096)(Group)  # compared and hashed by identity, once a layer of every forward


class Bank(NamedTuple):
    """The slots of a layer at one moment: a forward that runs while another thread grows them keeps its own."""

    A: list[torch.Tensor]  # one slice, as the ops take them
    B: list[torch.Tensor]
    scale: torch.Tensor
    ranks: torch.Tensor
    group: Group


class LayerSlots:
    """A (slots, r_max, d_in), B (slots, d_out, r_max), scale (slots,) and ranks (slots,) of one layer, as `bank`.

    Slot i belongs to the same adapter in every layer of a model. In a layer that an adapter leaves alone its slot has
    rank 0; a layer has only the slots up to the highest that targets it, and the rank of its own largest adapter.
    """

    def __init__(self, name: str, d_in: int, d_out: int, dtype: torch.dtype, device: torch.device) -> None:
        self.name = name
        self.d_in = d_in
        self.d_out = d_out
        self.bank = Bank(
            [torch.zeros(0, 0, d_in, dtype=dtype, device=device)],
            [torch.zeros(0, d_out, 0, dtype=dtype, device=device)],
            torch.ones(0, dtype=torch.float64 if dtype == torch.float64 else torch.float32, device=device),
            torch.zeros(0, dtype=torch.int32, device=device),
            _group(frozenset(), 0, dtype, device),
        )

    def reserve(self, num_slots: int, r_max: int) -> None:
        """Grow to at least this many slots and this rank; what the slots hold stays."""
        (A,), (B,), scale, ranks, group = self.bank
        slots, rank = A.shape[:2]
        if num_slots <= slots and r_max <= rank:
            return
        if num_slots > slots:  # in steps of half, so that many single additions do not copy the slots every time
            num_slots = max(num_slots, slots + slots // 2)
        num_slots, r_max = max(num_slots, slots), max(r_max, rank)
        new_A, new_B = A.new_zeros(num_slots, r_max, self.d_in), B.new_zeros(num_slots, self.d_out, r_max)
        new_scale, new_ranks = scale.new_ones(num_slots), ranks.new_zeros(num_slots)
        new_A[:slots, :rank], new_B[:slots, :, :rank] = A, B
        new_scale[:slots], new_ranks[:slots] = scale, ranks
        grown = _group(group.served, num_slots, group.dtype, group.device)
        self.bank = Bank([new_A], [new_B], new_scale, new_ranks, grown)

    def write(self, slot: int, factors: LoraFactors) -> None:
        """Fill a free slot; the factors are cast to the dtype of the layer."""
        self.reserve(slot + 1, factors.rank)
        (A,), (B,), scale, ranks, group = self.bank
        A[slot, : factors.rank].copy_(factors.A)
        B[slot, :, : factors.rank].copy_(factors.B)
        scale[slot] = factors.scale
        ranks[slot] = factors.rank
        self._serve(group.served | {slot})

    def clear(self, slot: int) -> None:
        """Free a slot; its memory is kept for the next adapter."""
        self.bank.ranks[slot : slot + 1] = 0
        self._serve(self.bank.group.served - {slot})

    def _serve(self, served: frozenset[int]) -> None:
        group = self.bank.group
        self.bank = self.bank._replace(group=_group(served, group.num_slots, group.dtype, group.device))


class Route(NamedTuple):
    """The way of one batch through the layers of a group; `same_dtype` is False where x or y are cast (autocast)."""

    indices: torch.Tensor  # (T, K) int32
    gates: torch.Tensor | None  # (T, K) float32, None for 1
    plan: Plan
    same_dtype: bool


class Rows:
    """The slots of each row of a batch with their weights, and the routes that were made for the shapes met so far.

    Args:
        slots: for each row slot to weight; an empty one is the base model.
    """

    def __init__(self, slots: Sequence[Mapping[int, float]]) -> None:
        width = max(1, *map(len, slots))
        self.slots = [[*row, *[-1] * (width - len(row))] for row in slots]
        self.weights = [[*row.values(), *[0.0] * (width - len(row))] for row in slots]
        self.served = {slot for row in slots for slot in row}
        self.plain = width == 1 and all(weight == 1 for row in slots for weight in row.values())
        self.routes: dict[tuple, Route | None] = {}

    def make_route(self, key: tuple, layer: LayerSlots, x: torch.Tensor, y: torch.Tensor) -> Route | None:
        """Check a batch against layer and rows, and keep its route under `key`; None if no row uses this group."""
        group: Group = key[0]
        named, tokens = len(self.slots), x.numel() // layer.d_in
        batch = x.shape[0] if x.dim() > 2 else tokens
        if batch % named:
            raise LorakernError(
                f"use: {named} rows are named, but layer {layer.name!r} runs on a batch of {batch} (x is "
                f"{tuple(x.shape)}); name one adapter or None for each row. Only a multiple of the rows is taken, as "
                "beams and num_return_sequences make it"
            )
        if x.device != group.device:
            raise LorakernError(
                f"use: layer {layer.name!r} runs on {x.device}, its adapters are on {group.device}; detach before "
                "moving a model, and attach again"
            )
        route = None
        if not group.served.isdisjoint(self.served):
            with torch.inference_mode(False):  # a later step of the same block may save these for its backward
                rows = [[slot if slot in group.served else -1 for slot in row] for row in self.slots]
                indices = _by_token(rows, torch.int32, group.device, tokens // named)
                gates = None if self.plain else _by_token(self.weights, torch.float32, group.device, tokens // named)
                route = Route(indices, gates, plan(indices, group.num_slots), x.dtype == y.dtype == group.dtype)
        if len(self.routes) >= 64:  # a long block, such as a training loop, meets ever new lengths
            self.routes.clear()
        self.routes[key] = route
        return route


def _by_token(rows: Sequence[Sequence], dtype: torch.dtype, device: torch.device, times: int) -> torch.Tensor:
    """(T, K), each row as often as it has tokens."""
    return torch.tensor(rows, dtype=dtype).to(device).repeat_interleave(times, dim=0)
