"""How a layer weighs and sums the adapters of its tokens: one class a composition, all with the same methods.

Symbols: T tokens, K adapters a token chooses among, i = indices[t, k] its slot, v_i = scale_i B_i A_i x the update of
one adapter, "present" where i is not -1. All but `fusion` add ``sum_k gates[t, k] v_i`` to y.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple

import torch

from lorakern.errors import LorakernError
from lorakern.integrations.slots import Bank
from lorakern.ops import (
    Plan,
    attention_gates,
    bgmv,
    expand,
    lora_delta,
    routed_bgmv,
    routed_delta,
    router_cores,
    shrink,
)

Tables = dict[str, torch.Tensor]


@dataclass
class Tokens:
    """The tokens of one forward, and what the layers share and learn about them.

    Attributes:
        indices: (T, K) int32, -1 where there is none.
        shares: (T, K) float32, one over the number of adapters of the token; 0 where there is none.
        plan: of the indices.
        sequences: (T,) int64, the sequence of each token, as a row of `memory`.
        pooled: (T,) bool, the tokens from which a sequence's gates are made, where they are made once.
        count: how many sequences there are.
        memory: gates of a layer by sequence, (count, K), kept over forwards; None where a forward has all of them.
        by_block: what was computed at the input of a decoder layer for all its modules.
        watch: None, or what each layer adds as it runs: its gates, (T, K), and its ranks, (slots,).
    """

    indices: torch.Tensor
    shares: torch.Tensor
    plan: Plan
    sequences: torch.Tensor
    pooled: torch.Tensor
    count: int
    memory: dict[str, torch.Tensor] | None = None
    by_block: dict[str, torch.Tensor] = field(default_factory=dict)
    watch: list[tuple[torch.Tensor, torch.Tensor]] | None = None

    @property
    def present(self) -> torch.Tensor:
        return self.indices >= 0

    def watched(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The gates summed over the layers where a token has an adapter, (T, K) floats, and their number, (T, 1)."""
        gates, ranks = (torch.stack(tensors) for tensors in zip(*self.watch, strict=True))
        live = ((ranks[:, self.indices.clamp(min=0).long()] > 0) & self.present).any(2, keepdim=True)
        return (gates * live).sum(0), live.sum(0)


class Layer(NamedTuple):
    """What a mode sees of one layer.

    `bank` are its slots, `tables` what the mode made of each adapter in them, `router` what was learned for the layer.
    """

    path: str
    block: str
    bank: Bank
    tables: Tables
    router: Mapping[str, torch.Tensor]


class Mode:
    """A composition.

    Attributes:
        name: as `MixtureModel` takes it.
        learned: the parameters that `init` makes for a layer.
        applied: those of them that multiply x, and have its dtype outside of training.
        per_adapter: whether they are learned for each adapter.
        per_block: whether a decoder layer has one gate for all its modules.
        most: the most adapters of a row, None for k.
    """

    name: ClassVar[str]
    learned: ClassVar[tuple[str, ...]] = ()
    applied: ClassVar[tuple[str, ...]] = ()
    per_adapter: ClassVar[bool] = False
    per_block: ClassVar[bool] = False
    most: ClassVar[int | None] = None

    def init(self, d_in: int, d_out: int, adapters: int, rank: int, generator: torch.Generator) -> Tables:
        """The parameters of a layer before training."""
        return {}

    def tables(self, slots: int, bank: Bank) -> Tables:
        """Room for what `fill` writes, by slot."""
        return {}

    def fill(self, tables: Tables, slot: int, bank: Bank, router: Mapping[str, torch.Tensor], place: int) -> None:
        """Make what the mode needs of the adapter in a slot; `place` is its place among those learned for, or -1."""

    def follow(self, bank: Bank, router: Mapping[str, torch.Tensor]) -> Tables:
        """What `fill` makes of slots that hold the adapters learned for, in their order; autograd follows it."""
        return {}

    def enter(self, block: str, x: torch.Tensor, layer: Layer | None, tokens: Tokens) -> None:
        """Called with the input of a decoder layer, (T, hidden size), where `per_block`."""

    def add(self, y: torch.Tensor, x: torch.Tensor, layer: Layer, tokens: Tokens) -> torch.Tensor:
        """y (T, d_out) with the mixture of x (T, d_in) added; in place unless autograd is to follow."""
        raise NotImplementedError


class _Gated(Mode):
    """A mode that computes gates (T, K) and adds the weighted sum of updates."""

    def gates(self, x: torch.Tensor, layer: Layer, tokens: Tokens) -> torch.Tensor:
        raise NotImplementedError

    def add(self, y, x, layer, tokens):
        gates = self.gates(x, layer, tokens)
        _watch(tokens, gates, layer.bank)
        return _add(y, x, layer.bank, tokens, gates)


class Mixture(_Gated):
    """The mean of outputs: ``gates = 1/k`` (LoraRetriever, arXiv 2402.09997)."""

    name = "mixture"

    def gates(self, x, layer, tokens):
        return tokens.shares


class Selection(Mixture):
    """The one best adapter (LoraRetriever, arXiv 2402.09997)."""

    name = "selection"
    most = 1


class Fusion(Mode):
    """The mean of factors: ``y += (1/k sum_i scale_i B_i) (1/k sum_j A_j) x`` (LoraRetriever, arXiv 2402.09997).

    Its cross terms B_i A_j are as published. Factors of a lower rank count as padded with zeros.
    """

    name = "fusion"

    def add(self, y, x, layer, tokens):
        (A, B, scale, ranks, _), gates = layer.bank, tokens.shares
        _watch(tokens, gates, layer.bank)
        if torch.is_grad_enabled() and x.requires_grad:
            raise LorakernError("mode 'fusion' has nothing to learn, and no gradient; run it under torch.no_grad")
        h = shrink(x, A, tokens.indices, ranks=ranks, plan=tokens.plan)
        mean = (h * gates[:, :, None]).sum(2, keepdim=True).expand_as(h).contiguous()
        return expand(y, mean, B, tokens.indices, scale=scale, ranks=ranks, gates=gates, plan=tokens.plan)


class Ramole(Mode):
    """A router by attention, token by token: ``gates = softmax(q . router_B^T v_i / sqrt(r_r))``, ``q = router_A x``.

    It needs no training for a new adapter: filling a slot computes the core scale_i router_B^T B_i (RAMoLE, arXiv
    2406.16989).
    """

    name = "ramole"
    learned = ("A", "B")
    applied = ("A",)

    def init(self, d_in, d_out, adapters, rank, generator):
        bound = 1 / math.sqrt(d_in)
        return {
            "A": torch.empty(rank, d_in).uniform_(-bound, bound, generator=generator),
            "B": torch.empty(d_out, rank).normal_(0, 0.01, generator=generator),
        }

    def tables(self, slots, bank):
        return {"cores": torch.zeros(slots, 0, bank.A[0].shape[1], device=bank.scale.device)}

    def fill(self, tables, slot, bank, router, place):
        (B,), r_max = bank.B, bank.B[0].shape[2]
        cores = tables["cores"]
        rank = router["A"].shape[0]
        if cores.shape[1:] != (rank, r_max):
            grown = torch.zeros(B.shape[0], rank, r_max, device=B.device)
            grown[: len(cores), : cores.shape[1], : cores.shape[2]] = cores
            tables["cores"] = cores = grown
        one = slice(slot, slot + 1)
        cores[one] = router_cores(B[one], router["B"], scale=bank.scale[one], ranks=bank.ranks[one])

    def follow(self, bank, router):
        return {"cores": router_cores(bank.B[0], router["B"], scale=bank.scale, ranks=bank.ranks)}

    def add(self, y, x, layer, tokens):
        (A, B, scale, ranks, _), indices, plan = layer.bank, tokens.indices, tokens.plan
        router_A = layer.router["A"].to(x.dtype)
        options = {"scale": scale, "ranks": ranks, "plan": plan}
        cores = [layer.tables["cores"]]
        if torch.is_grad_enabled():
            return y + routed_delta(x, A, B, [router_A], cores, indices, **options)
        if tokens.watch is None:
            return routed_bgmv(y, x, A, B, [router_A], cores, indices, **options)
        h = shrink(x, A, indices, ranks=ranks, plan=plan)
        gates = attention_gates(x, h, [router_A], cores, indices, ranks=ranks)[0]
        _watch(tokens, gates, layer.bank)
        return expand(y, h, B, indices, gates=gates, **options)


class _Learned(_Gated):
    """A gate that is learned for each adapter: one for which nothing was learned is refused."""

    per_adapter = True
    learned = ("gate",)
    temperature = 1.0
    top: ClassVar[int | None] = None

    def width(self, d_in: int, d_out: int) -> int:
        return d_in

    def init(self, d_in, d_out, adapters, rank, generator):
        width = self.width(d_in, d_out)
        return {"gate": torch.empty(adapters, width).normal_(0, 0.01 / math.sqrt(width), generator=generator)}

    def tables(self, slots, bank):
        return {"rows": torch.zeros(slots, 0, device=bank.scale.device)}

    def fill(self, tables, slot, bank, router, place):
        row = self.row(slot, bank, router, place)
        if tables["rows"].shape[1] != len(row):
            tables["rows"] = row.new_zeros(len(tables["rows"]), len(row))
        tables["rows"][slot] = row

    def follow(self, bank, router):
        return {"rows": torch.stack([self.row(slot, bank, router, slot) for slot in range(len(bank.ranks))])}

    def row(self, slot: int, bank: Bank, router: Mapping[str, torch.Tensor], place: int) -> torch.Tensor:
        return router["gate"][place]

    def logits(self, x: torch.Tensor, layer: Layer, tokens: Tokens) -> torch.Tensor:
        """<row_i, x> as (T, K)."""
        every = x.float() @ layer.tables["rows"].T
        return every.gather(1, tokens.indices.clamp(min=0).long())

    def weigh(self, logits: torch.Tensor, present: torch.Tensor) -> torch.Tensor:
        return top_softmax(logits / self.temperature, present, self.top)

    def gates(self, x, layer, tokens):
        return self.weigh(self.logits(x, layer, tokens), tokens.present)


class Meteora(_Learned):
    """A linear router in each layer: ``gates = softmax`` of the two highest ``<g_i, x>``. MeteoRA, arXiv 2405.13053."""

    name = "meteora"
    top = 2


class Arrow(_Learned):
    """Prototypes in place of learning: ``|<p_i, x>|`` with p_i the first right singular vector of B_i A_i.

    The softmax runs over the three highest. Nothing is learned, so a new adapter needs its prototype alone (Arrow,
    arXiv 2405.11157, as in PEFT).
    """

    name = "arrow"
    per_adapter = False
    learned = ()
    top = 3

    def init(self, *_):
        return {}

    def row(self, slot, bank, router, place):
        (A,), (B,), _, ranks, _ = bank
        rank = int(ranks[slot])
        if rank == 0:
            return A.new_zeros(A.shape[2], dtype=torch.float32)
        a, b = A[slot, :rank].double(), B[slot, :, :rank].double()
        # B A = Q R A: its right singular vectors are those of the small R A
        return torch.linalg.svd(torch.linalg.qr(b).R @ a, full_matrices=False).Vh[0].float()

    def logits(self, x, layer, tokens):
        return super().logits(x, layer, tokens).abs()


class Milora(_Learned):
    """The two adapters of a layer are chosen once, from the prompt, and kept for all new tokens (arXiv 2410.18035).

    ``gates = softmax`` of the two highest ``<g_i, mean of x>``, over the tokens of the prompt's first piece.
    """

    name = "milora"
    top = 2

    def gates(self, x, layer, tokens):
        fresh = None
        if tokens.pooled.any():
            chosen, owner = x[tokens.pooled].float(), tokens.sequences[tokens.pooled]
            sums = chosen.new_zeros(tokens.count, x.shape[1]).index_add(0, owner, chosen)
            number = chosen.new_zeros(tokens.count, 1).index_add(0, owner, chosen.new_ones(len(owner), 1))
            mean = sums / number.clamp(min=1)
            fresh = super().gates(mean[tokens.sequences], layer, tokens)
        if tokens.memory is None:
            return fresh
        if layer.path not in tokens.memory:
            tokens.memory[layer.path] = x.new_zeros(tokens.count, tokens.indices.shape[1], dtype=torch.float32)
        known = tokens.memory[layer.path]
        if fresh is not None:
            # the tokens of a sequence have equal gates, so it does not matter whose are kept
            known[tokens.sequences[tokens.pooled]] = fresh[tokens.pooled]
        return known[tokens.sequences] * tokens.present


class LoraFlow(_Learned):
    """One gate a decoder layer from its input, shared by its modules: ``gates = softmax(<g_i, x>) + b_i``.

    Gates may be negative (LoRA-Flow, arXiv 2402.11455).
    """

    name = "lora_flow"
    learned = ("gate", "bias")
    per_block = True

    def init(self, d_in, d_out, adapters, rank, generator):
        return super().init(d_in, d_out, adapters, rank, generator) | {"bias": torch.zeros(adapters)}

    def row(self, slot, bank, router, place):
        return torch.cat([router["gate"][place], router["bias"][place : place + 1]])

    def enter(self, block, x, layer, tokens):
        rows, index = layer.tables["rows"], tokens.indices.clamp(min=0).long()
        logits = (x.float() @ rows[:, :-1].T).gather(1, index)
        gates = top_softmax(logits / self.temperature, tokens.present, None) + rows[:, -1][index]
        tokens.by_block[block] = gates * tokens.present

    def gates(self, x, layer, tokens):
        return tokens.by_block[layer.block]


class Mole(_Learned):
    """A learned gate a layer over what the adapters put out: ``gates = softmax(<g_i, v_i / |v_i|>)``.

    Both are taken from the ranks h_i = A_i x, by B_i^T g_i and B_i^T B_i, so that no v_i is formed (MoLE, arXiv
    2404.13628; each adapter is scored by its own output alone, so that those a row lacks do not matter).
    """

    name = "mole"

    def width(self, d_in, d_out):
        return d_out

    def tables(self, slots, bank):
        zeros = torch.zeros(slots, 1, 1, device=bank.scale.device)
        return {"keys": zeros[..., 0], "grams": zeros}

    def fill(self, tables, slot, bank, router, place):
        (B,), rank = bank.B, int(bank.ranks[slot])
        slots, r_max = B.shape[0], B.shape[2]
        for name, shape in (("keys", (slots, r_max)), ("grams", (slots, r_max, r_max))):
            old = tables[name]
            if old.shape != shape:
                grown = torch.zeros(shape, device=B.device)
                grown[tuple(slice(0, size) for size in old.shape)] = old
                tables[name] = grown
        b = B[slot, :, :rank].float()
        tables["keys"][slot], tables["grams"][slot] = 0.0, 0.0
        tables["keys"][slot, :rank] = b.T @ router["gate"][place]
        tables["grams"][slot, :rank, :rank] = b.T @ b

    def follow(self, bank, router):
        b = bank.B[0].float()
        return {"keys": torch.einsum("sdr,sd->sr", b, router["gate"]), "grams": b.mT @ b}

    def logits(self, x, layer, tokens):
        (A, _, _, ranks, _), index = layer.bank, tokens.indices.clamp(min=0).long()
        if torch.is_grad_enabled():
            h = torch.einsum("td,srd->tsr", x.float(), A[0].float())
            h = h.gather(1, index[..., None].expand(*index.shape, h.shape[2]))
        else:
            h = shrink(x, A, tokens.indices, ranks=ranks, plan=tokens.plan)[0]
        keys, grams = layer.tables["keys"][index], layer.tables["grams"][index]
        squared = (h[:, :, None] @ grams @ h[..., None])[..., 0, 0]
        return (h * keys).sum(-1) / (squared.clamp(min=0) + 1e-12).sqrt()


MODES: dict[str, type[Mode]] = {
    mode.name: mode for mode in (Selection, Fusion, Mixture, Ramole, Mole, LoraFlow, Meteora, Arrow, Milora)
}


def top_softmax(logits: torch.Tensor, present: torch.Tensor, top: int | None) -> torch.Tensor:
    """Softmax over the `top` highest of those present, the first of equal ones; 0 elsewhere.

    >>> import torch
    >>> from lorakern.mixture.modes import top_softmax
    >>> top_softmax(torch.zeros(1, 3), torch.tensor([[True, False, True]]), 2).tolist()
    [[0.5, 0.0, 0.5]]
    """
    logits = logits.masked_fill(~present, -math.inf)
    if top is not None and top < logits.shape[1]:
        keep = logits.argsort(dim=1, descending=True, stable=True)[:, :top]
        logits = logits.masked_fill(torch.ones_like(present).scatter_(1, keep, False), -math.inf)
    return logits.masked_fill(~present.any(1, keepdim=True), 0.0).softmax(1) * present


def _add(y: torch.Tensor, x: torch.Tensor, bank: Bank, tokens: Tokens, gates: torch.Tensor) -> torch.Tensor:
    options = {"scale": bank.scale, "ranks": bank.ranks, "gates": gates, "plan": tokens.plan}
    if torch.is_grad_enabled() and (x.requires_grad or gates.requires_grad):
        return y + lora_delta(x, bank.A, bank.B, tokens.indices, **options)
    return bgmv(y, x, bank.A, bank.B, tokens.indices, **options)


def _watch(tokens: Tokens, gates: torch.Tensor, bank: Bank) -> None:
    if tokens.watch is not None:
        tokens.watch.append((gates, bank.ranks))
