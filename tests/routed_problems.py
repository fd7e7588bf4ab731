"""Random routed mixtures and what the direct formula makes of them, with every adapter's update formed."""

from dataclasses import dataclass, replace

import torch
from problems import Problem, problem

import lorakern as lk


@dataclass
class Routed:
    """A problem with a router. Weights and cores hold NaN beyond the rank of their slot."""

    lora: Problem
    router_A: list
    router_B: list
    cores: list

    @property
    def arguments(self):
        p = self.lora
        return p.x, p.A, p.B, self.router_A, self.cores, p.indices

    @property
    def options(self):
        return {"scale": self.lora.scale, "ranks": self.lora.ranks}

    def run(self, **options):
        """What lorakern makes of it, in a copy of y."""
        options = {"y_offset": self.lora.y_offset, **self.options, **options}
        return lk.routed_bgmv(self.lora.y.clone(), *self.arguments, **options)

    def gates(self):
        p = self.lora
        h = lk.shrink(p.x, p.A, p.indices, ranks=p.ranks)
        return lk.attention_gates(p.x, h, self.router_A, self.cores, p.indices, ranks=p.ranks)

    def rows(self, start, stop):
        return replace(self, lora=self.lora.rows(start, stop))

    def double(self):
        lists = {name: [t.double() for t in getattr(self, name)] for name in ("router_A", "router_B", "cores")}
        return replace(self, lora=self.lora.double(), **lists)

    def exact(self, **options):
        """The reference's answer in float64."""
        with lk.use_backend("reference"):
            return self.double().run(**options)


def routed(dtype=torch.float32, *args, router_rank=4, sharpness=1.0, **kwargs):
    """`problem` with a router for every slice, whose logits are about as large as `sharpness`."""
    p = replace(problem(dtype, *args, **kwargs), gates=None)
    g = torch.Generator().manual_seed(kwargs.get("seed", 0) + 1)
    d_in = p.x.shape[1]
    router_A = [(torch.randn(router_rank, d_in, generator=g) / d_in**0.5).to(dtype) for _ in p.A]
    router_B = [sharpness * torch.randn(b.shape[1], router_rank, generator=g) / b.shape[1] ** 0.5 for b in p.B]
    cores = lk.router_cores(p.B, router_B, scale=p.scale, ranks=p.ranks)
    for core in cores:
        for slot, rank in enumerate([] if p.ranks is None else p.ranks.tolist()):
            core[slot, :, rank:] = float("nan")
    return Routed(p, router_A, router_B, cores)


def direct(x, A, B, router_A, router_B, indices, scale=None, ranks=None):
    """(delta, gates (slices, T, K)) in the order of the paper: v = B A x, key = router_B^T v, softmax, sum."""
    deltas, gates = [], []
    for a, b, router_a, router_b in zip(A, B, router_A, router_B, strict=True):
        updates = x.new_zeros(*indices.shape, b.shape[1])
        for t, row in enumerate(indices.tolist()):
            for k, slot in enumerate(row):
                if slot >= 0:
                    r = a.shape[1] if ranks is None else int(ranks[slot])
                    update = b[slot, :, :r] @ (a[slot, :r] @ x[t])
                    updates = updates.index_put(
                        (torch.tensor([t]), torch.tensor([k])), update if scale is None else scale[slot] * update
                    )
        query = x @ router_a.T
        logits = torch.einsum("tq,oq,tko->tk", query, router_b, updates) / router_a.shape[0] ** 0.5
        present = indices >= 0
        logits = logits.masked_fill(~present, -torch.inf).where(present.any(1, keepdim=True), 0.0)
        gate = logits.softmax(dim=1) * present
        gates.append(gate)
        deltas.append(torch.einsum("tk,tko->to", gate, updates))
    return torch.cat(deltas, dim=1), torch.stack(gates)
