"""What the engines serve: cells of requests whose lengths, prompts and adapters follow from fixed seeds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from benchmarks.inputs import route
from benchmarks.registry import Case

SEED = 0
REQUESTS = 16
ADAPTERS = 16  # that exist; the cells use the first ones
# The most popular adapters have the highest ranks: the cheap order would flatter whoever reads true ranks.
RANKS = (64, 32, 16, 8)
MAX_RANK = 64


class Lengths(NamedTuple):
    """Of a request: the bounds of its prompt, and the tokens that it generates."""

    shortest: int
    longest: int
    new: int


LENGTHS = {"prefill": Lengths(96, 124, 4), "decode": Lengths(16, 16, 32)}


class Request(NamedTuple):
    """Token ids, the adapter's number or None, and the tokens to generate."""

    prompt: list[int]
    adapter: int | None
    new: int


@dataclass(frozen=True)
class Cell:
    """A square of the table; `kind` is "prefill" or "decode"."""

    kind: str
    adapters: int
    popularity: str = "uniform"

    @property
    def name(self) -> str:
        """How files and the command line call it.

        >>> Cell("decode", 4, "zipf").name, Cell("prefill", 1).name
        ('decode-4ad-zipf', 'prefill-1ad')
        """
        return f"{self.kind}-{self.adapters}ad" + (f"-{self.popularity}" if self.adapters > 1 else "")


CELLS = tuple(
    Cell(kind, adapters, popularity)
    for kind in LENGTHS
    for adapters in (1, 4, 16)
    for popularity in (("uniform", "zipf") if adapters > 1 else ("uniform",))
)
QUICK = (Cell("prefill", 4, "uniform"), Cell("decode", 16, "zipf"))


def select(only: str | None = None, quick: bool = False) -> list[Cell]:
    return [cell for cell in (QUICK if quick else CELLS) if only is None or only in cell.name]


def _prompt(length: int, vocabulary: int, generator: torch.Generator) -> list[int]:
    # The first ids are control tokens.
    return torch.randint(100, vocabulary, (length,), generator=generator).tolist()


def requests(cell: Cell, vocabulary: int) -> list[Request]:
    """The requests of a cell, the same in every process and at every repetition."""
    lengths = LENGTHS[cell.kind]
    generator = torch.Generator().manual_seed(SEED)
    sizes = torch.randint(lengths.shortest, lengths.longest + 1, (REQUESTS,), generator=generator).tolist()
    prompts = [_prompt(size, vocabulary, generator) for size in sizes]
    # A generator of its own: cells that differ in the adapters alone have the same prompts.
    drawn = route(Case(REQUESTS, cell.adapters, popularity=cell.popularity), torch.Generator().manual_seed(SEED))
    return [Request(p, a, lengths.new) for p, a in zip(prompts, drawn[:, 0].tolist(), strict=True)]


def sample(vocabulary: int) -> list[Request]:
    """A request for every adapter: what warms the engines up, and what their answers are compared on."""
    generator = torch.Generator().manual_seed(SEED + 1)
    return [Request(_prompt(16, vocabulary, generator), adapter, 4) for adapter in range(ADAPTERS)]


def without_adapters(served: list[Request]) -> list[Request]:
    return [request._replace(adapter=None) for request in served]


def rank_of(adapter: int, ranks: tuple[int, ...]) -> int:
    return ranks[adapter % len(ranks)]


def least(served: list[Request], ranks: tuple[int, ...], elements: int) -> dict:
    """What the adapters of a cell cost at the least.

    Args:
        served: its requests.
        ranks: of the adapters, in turns.
        elements: of one rank of one adapter: the sum of d_in + d_out over all layers.

    Returns:
        "distinct": adapters in the batch; "step_bytes": bfloat16 weights at their true ranks that one step reads, each
        adapter once; "prompt_operations": multiplications and additions of all prompts.
    """
    used = {request.adapter for request in served}
    pairs = sum(len(request.prompt) * rank_of(request.adapter, ranks) for request in served)
    return {
        "distinct": len(used),
        "ranks": sorted((rank_of(adapter, ranks) for adapter in used), reverse=True),
        "step_bytes": 2 * elements * sum(rank_of(adapter, ranks) for adapter in used),
        "prompt_operations": 2 * elements * pairs,
    }
