"""The tensors of a case, and what it must move and compute at the least."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch

import lorakern as lk
from benchmarks.registry import Case


def route(case: Case, generator: torch.Generator) -> torch.Tensor:
    """(T, K) slots of the tokens; those in use are the first ones, so that copies of the weights need hold no more."""
    shape, slots = (case.tokens, case.choices), case.adapters
    if case.popularity == "identical":
        indices = torch.zeros(shape, dtype=torch.long)
    elif case.popularity == "distinct":
        indices = (torch.arange(case.tokens * case.choices) % slots).reshape(shape)
    else:
        weights = {
            "uniform": torch.ones(slots),
            "zipf": 1 / torch.arange(1, slots + 1),
            "skewed": torch.tensor([float(slots)] + [1 / slots] * (slots - 1)),
        }[case.popularity]
        indices = torch.multinomial(weights, case.tokens * case.choices, True, generator=generator).reshape(shape)
    indices = indices.unique(return_inverse=True)[1]
    return indices[indices[:, 0].argsort(stable=True)] if case.runs else indices


@dataclass
class Inputs:
    """Arguments of a case's calls. `A[copy][slice]` and `B[copy][slice]`; a warm case has one copy of the weights.

    Weights are zero beyond a slot's rank, so that rivals which know of no ranks compute the same.
    """

    case: Case
    x: torch.Tensor
    y: torch.Tensor
    indices: torch.Tensor
    gates: torch.Tensor | None
    ranks: torch.Tensor | None
    A: list[list[torch.Tensor]]
    B: list[list[torch.Tensor]]
    dy: torch.Tensor | None = None

    @property
    def copies(self) -> int:
        return len(self.A)

    @property
    def used(self) -> int:
        """Slots that some token uses: the first ones."""
        return int(self.indices.max()) + 1

    def rank_of(self, slot: int) -> int:
        return self.case.ranks[slot % len(self.case.ranks)]

    @cached_property
    def groups(self) -> list[tuple[int, int, torch.Tensor, torch.Tensor | None]]:
        """(slot, rank, its tokens, their gates as a column) of every slot in use."""
        found = []
        for slot in range(self.used):
            token, choice = (self.indices.reshape(self.case.tokens, -1) == slot).nonzero(as_tuple=True)
            gate = None if self.gates is None else self.gates[token, choice][:, None].to(self.x.dtype)
            found.append((slot, self.rank_of(slot), token, gate))
        return found

    @property
    def bytes(self) -> int:
        """Bytes that must move: the weights in use at their true ranks and x once, y read and written once.

        Backward: x, dy and the weights in use read, dx and the gradients of all weights written.
        """
        case, slices = self.case, len(self.case.d_outs)
        row = case.d_in * slices + sum(case.d_outs)  # elements of one rank of one slot
        weights = row * sum(self.rank_of(slot) for slot in range(self.used))
        if case.op == "backward":
            elements = 2 * case.tokens * case.d_in + case.tokens * sum(case.d_outs)
            elements += weights + row * case.r_max * case.adapters
        else:
            elements = weights + case.tokens * (case.d_in + 2 * sum(case.d_outs))
        return elements * self.x.element_size()

    @property
    def operations(self) -> int:
        """Multiplications and additions. Backward: h anew and dx, dA through A; dh and dB through B."""
        through_A, through_B = (3, 2) if self.case.op == "backward" else (1, 1)
        pairs = sum(rank * len(tokens) for _, rank, tokens, _ in self.groups)
        row = through_A * self.case.d_in * len(self.case.d_outs) + through_B * sum(self.case.d_outs)
        return 2 * pairs * row


def make(case: Case, device: str, cache_bytes: int) -> Inputs:
    """Random inputs of a case; cold weights come in so many copies that a round of them exceeds 4 x the cache."""
    generator = torch.Generator().manual_seed(0)
    dtype = getattr(torch, case.dtype)
    indices = route(case, generator)
    used = int(indices.max()) + 1
    mixed = len(case.ranks) > 1
    of_slot = [case.ranks[slot % len(case.ranks)] for slot in range(case.adapters)]
    row = (case.d_in * len(case.d_outs) + sum(case.d_outs)) * dtype.itemsize
    copies = 4 * cache_bytes // (row * sum(of_slot[:used])) + 2 if case.cold else 1

    def random(*shape, scale=1.0):
        # A prime number of values, repeated: large weights are quick to make, and no two slots or rows are the same.
        size = math.prod(shape)
        values = (torch.randn(min(size, 4194301), generator=generator) * scale).to(dtype)
        return values.repeat(-(-size // len(values)))[:size].reshape(shape)

    def weights(rows, columns, fan_in, rank_dim):
        """Windows of one buffer, a copy each; they overlap only in slots that no token uses."""
        filled = random(used, rows, columns, scale=fan_in**-0.5)
        for slot in range(used if mixed else 0):
            filled[slot].narrow(rank_dim, of_slot[slot], case.r_max - of_slot[slot]).zero_()
        filled = filled.to(device)
        buffer = torch.zeros(used * copies + case.adapters - used, rows, columns, dtype=dtype, device=device)
        for copy in range(copies):
            buffer[copy * used : (copy + 1) * used].copy_(filled)
        return [buffer[copy * used : copy * used + case.adapters] for copy in range(copies)]

    A = [weights(case.r_max, case.d_in, case.d_in, 0) for _ in case.d_outs]
    B = [weights(d_out, case.r_max, case.r_max, 1) for d_out in case.d_outs]
    gates = torch.rand(case.tokens, case.choices, generator=generator).to(device) if case.choices > 1 else None
    y = torch.zeros(case.tokens, sum(case.d_outs), dtype=dtype, device=device)
    return Inputs(
        case=case,
        x=random(case.tokens, case.d_in).to(device),
        y=y,
        indices=(indices if case.choices > 1 else indices[:, 0].contiguous()).to(device),
        gates=gates,
        ranks=torch.tensor(of_slot, dtype=torch.int32, device=device) if mixed else None,
        A=[list(copy) for copy in zip(*A, strict=True)],
        B=[list(copy) for copy in zip(*B, strict=True)],
        dy=random(*y.shape).to(device) if case.op == "backward" else None,
    )


ROWS_CHECKED = 128
BYTES_CHECKED = 512 << 20  # of weights in float64; fewer rows are checked where they would need more


def _checked_rows(inputs: Inputs) -> torch.Tensor:
    """All rows, or a sample: the first row of each slot for one half of it, rows spread evenly for the other."""
    case = inputs.case
    of_row = 8 * case.choices * case.r_max * (case.d_in * len(case.d_outs) + sum(case.d_outs))
    most = max(16, min(ROWS_CHECKED, BYTES_CHECKED // of_row))
    if case.op == "backward" or case.tokens <= most:
        return torch.arange(case.tokens, device=inputs.x.device)
    first = [tokens[:1].cpu() for _, _, tokens, _ in inputs.groups[: most // 2]]
    even = torch.linspace(0, case.tokens - 1, most // 2).long()
    return torch.cat([*first, even]).unique().to(inputs.x.device)


def exact(inputs: Inputs) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The reference's answer in float64: (rows, values).

    Forward: the update of some rows. Backward, where sums over rows come out, from all of them: the gradients of x, of
    every A and B, and of gates where there are any.
    """
    rows, backward = _checked_rows(inputs), inputs.case.op == "backward"
    indices = inputs.indices[rows]
    slots = torch.arange(inputs.case.adapters, device=rows.device) if backward else indices.unique()

    def wide(tensor):
        return tensor.double().requires_grad_(backward)

    x = wide(inputs.x[rows])
    A, B = ([wide(w[slots]) for w in weights[0]] for weights in (inputs.A, inputs.B))
    gates = None if inputs.gates is None else wide(inputs.gates[rows])
    ranks = None if inputs.ranks is None else inputs.ranks[slots]
    with lk.use_backend("reference"):
        delta = lk.lora_delta(x, A, B, torch.searchsorted(slots, indices), ranks=ranks, gates=gates)
        if not backward:
            return rows, [delta]
        wanted = [x, *A, *B, *([] if gates is None else [gates])]
        return rows, list(torch.autograd.grad(delta, wanted, inputs.dy.double()))


def error_ratio(result: torch.Tensor, wanted: torch.Tensor) -> float:
    """RMS of the difference over RMS of the exact values."""
    difference = (result.double() - wanted).pow(2).mean().sqrt()
    return (difference / wanted.pow(2).mean().sqrt().clamp_min(1e-300)).item()
