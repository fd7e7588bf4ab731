"""What does a router cost? `python -m benchmarks.routed`: 64 tokens, k = 3, d = 4096, rank 16, pools of 3 to 48.

routed_bgmv beside bgmv with gates that are given, and beside the published formulation by einsum, which forms the
update of every adapter in the pool for every token and masks what a token did not retrieve. Memory is what the peak of
the resident set grows by in the first call of a fresh process.
"""

from __future__ import annotations

import argparse
import multiprocessing
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

import lorakern as lk
from benchmarks import machine
from benchmarks.timing import Effort, in_turns

TOKENS, K, D, RANK, ROUTER_RANK = 64, 3, 4096, 16, 16
POOLS = (3, 16, 48)
TOLERANCES = {"float32": 1e-5, "bfloat16": 2e-2}
TARGETS = {"over bgmv": 1.35, "einsum over ours": 8.0, "einsum's memory over ours": 20.0}


class Mixture:
    """Random adapters, a router, and for every token K distinct adapters of the pool."""

    def __init__(self, pool: int, dtype: str):
        g = torch.Generator().manual_seed(pool)
        kind = getattr(torch, dtype)

        def normal(*shape, size=1.0):
            return size * torch.randn(*shape, generator=g)

        self.x = normal(TOKENS, D).to(kind)
        self.A, self.B = normal(pool, RANK, D, size=D**-0.5).to(kind), normal(pool, D, RANK, size=0.25).to(kind)
        self.router_A, self.router_B = normal(ROUTER_RANK, D, size=D**-0.5).to(kind), normal(D, ROUTER_RANK, size=0.05)
        self.scale = torch.rand(pool, generator=g) + 0.5
        self.indices = torch.rand(TOKENS, pool, generator=g).topk(K, dim=1).indices
        self.gates = torch.rand(TOKENS, K, generator=g)
        self.cores = lk.router_cores(self.B, self.router_B, scale=self.scale)
        self.mask = torch.full((TOKENS, 1, pool), -torch.inf).scatter_(2, self.indices[:, None], 0.0)
        self.y = torch.zeros(TOKENS, D, dtype=kind)

    def routed(self, y):
        return lk.routed_bgmv(
            y, self.x, self.A, self.B, self.router_A, self.cores, self.indices, scale=self.scale
        )  # fmt: skip

    def plain(self, y):
        return lk.bgmv(y, self.x, self.A, self.B, self.indices, scale=self.scale, gates=self.gates)

    def einsum(self, y):
        x, dtype = self.x[:, None], self.x.dtype
        h = torch.einsum("bld,prd->blpr", x, self.A)
        v = torch.einsum("blpr,pdr->blpd", h, self.B) * self.scale.to(dtype)[:, None]
        keys = torch.einsum("blpd,dr->blpr", v, self.router_B.to(dtype))
        query = torch.einsum("bld,rd->blr", x, self.router_A)
        logits = torch.einsum("blr,blpr->blp", query, keys).float() / ROUTER_RANK**0.5 + self.mask
        y += torch.einsum("blp,blpd->bld", logits.softmax(dim=2).to(dtype), v)[:, 0]
        return y

    def exact(self):
        """The direct formula in float64."""
        x, A, B, router_A, router_B = (t.double() for t in (self.x, self.A, self.B, self.router_A, self.router_B))
        v = torch.einsum("tpr,pdr->tpd", torch.einsum("td,prd->tpr", x, A), B) * self.scale.double()[:, None]
        logits = torch.einsum("tr,dr,tpd->tp", x @ router_A.T, router_B, v) / ROUTER_RANK**0.5
        return torch.einsum("tp,tpd->td", (logits + self.mask[:, 0]).softmax(dim=1), v)


def error_of(result: torch.Tensor, exact: torch.Tensor) -> float:
    return ((result.double() - exact).norm() / exact.norm()).item()


def grown_bytes(pool: int, dtype: str, name: str, threads: int) -> int:
    """How much the peak of the resident set grows in the first call of this size."""
    torch.set_num_threads(threads)
    problem, status = Mixture(pool, dtype), Path("/proc/self/status")
    function: Callable[[torch.Tensor], torch.Tensor] = getattr(problem, name)
    # first one token, for what libraries and threads keep
    whole = problem.x, problem.indices, problem.mask
    problem.x, problem.indices, problem.mask = (t[:1] for t in whole)
    function(problem.y[:1])
    problem.x, problem.indices, problem.mask = whole
    before = int(re.search(r"VmRSS:\s+(\d+)", status.read_text()).group(1))
    Path("/proc/self/clear_refs").write_text("5")
    function(problem.y)
    return (int(re.search(r"VmHWM:\s+(\d+)", status.read_text()).group(1)) - before) * 1024


def measure(pool: int, dtype: str, effort: Effort) -> dict:
    """Times and memory of one cell; nothing is timed that is wrong."""
    problem = Mixture(pool, dtype)
    exact = problem.exact()
    errors = {name: error_of(getattr(problem, name)(problem.y.clone()), exact) for name in ("routed", "einsum")}
    if not errors["routed"] < TOLERANCES[dtype]:
        raise AssertionError(f"routed_bgmv is off by {errors['routed']:.1e}; a wrong result is not timed")
    y = problem.y.clone()
    functions = {name: partial(getattr(problem, name), y) for name in ("routed", "plain", "einsum")}
    timed = {name: entry["seconds"] for name, entry in in_turns(functions, effort).items()}
    threads = torch.get_num_threads()
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as fresh:
        jobs = [(pool, dtype, name, threads) for name in ("routed", "einsum")]
        memory = dict(zip(("routed", "einsum"), fresh.starmap(grown_bytes, jobs, chunksize=1), strict=True))
    return {"seconds": timed, "memory": memory, "errors": errors}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.routed", description=__doc__)
    parser.add_argument("--pools", type=int, nargs="+", default=POOLS)
    parser.add_argument("--seconds", type=float, default=1.0, help="spent on each function of a cell")
    arguments = parser.parse_args()
    print("\n".join(machine.lines(machine.describe("cpu"))))
    print(f"\n{TOKENS} tokens, k = {K}, d = {D}, rank {RANK}, router rank {ROUTER_RANK}; medians, of calls in turn")
    print(f"targets: {', '.join(f'{name} {bound}' for name, bound in TARGETS.items())}\n")
    print(
        "| dtype | pool | error (einsum's) | bgmv us | routed us | over bgmv | einsum us | einsum over ours | ", end=""
    )
    print("ours MB | einsum MB | einsum's memory over ours |\n|" + "---|" * 11)
    for dtype in TOLERANCES:
        for pool in arguments.pools:
            found = measure(pool, dtype, Effort(arguments.seconds, 7, 200))
            us = {name: 1e6 * seconds for name, seconds in found["seconds"].items()}
            mb = {name: size / 1e6 for name, size in found["memory"].items()}
            errors = found["errors"]
            print(
                f"| {dtype} | {pool} | {errors['routed']:.1e} ({errors['einsum']:.1e}) | {us['plain']:.0f}"
                f" | {us['routed']:.0f} | {us['routed'] / us['plain']:.2f} | {us['einsum']:.0f}"
                f" | {us['einsum'] / us['routed']:.1f} | {mb['routed']:.2f} | {mb['einsum']:.1f}"
                f" | {mb['einsum'] / max(mb['routed'], 1e-9):.0f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
