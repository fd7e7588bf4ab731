"""Named vectors that are added and removed while others search: writers take a lock, readers a snapshot."""

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from lorakern.adapters.json_file import show
from lorakern.errors import LorakernError
from lorakern.mixture._scores import best, exact_scores

_FEW_DEAD = 64
_QUERIES = 16  # at a time: their scores of 100,000 rows take 6.4 MB


class Index(Protocol):
    """What proposes candidates; a search scores them exactly."""

    def append(self, vectors: torch.Tensor, first: int) -> "Index": ...

    def candidates(self, queries: torch.Tensor, k: int, count: int, dead: torch.Tensor) -> list[torch.Tensor]: ...


@dataclass(frozen=True)
class Snapshot:
    """The first `count` names and vectors without those at `dead`. Later snapshots share the memory behind it."""

    names: list[str]
    vectors: torch.Tensor
    count: int
    dead: torch.Tensor
    index: Index

    def __len__(self) -> int:
        return self.count - len(self.dead)

    def living(self) -> torch.Tensor:
        """Positions, in the order of upload."""
        alive = torch.ones(self.count, dtype=torch.bool)
        alive[self.dead] = False
        return alive.nonzero()[:, 0]

    def search(self, queries: torch.Tensor, ks: Sequence[int]) -> list[list[tuple[str, float]]]:
        """The best ks[i] of query i (T, d) float32: names with scores, best first, ties by the order of upload."""
        if not len(self):
            return [[] for _ in ks]
        results = []
        for first in range(0, len(ks), _QUERIES):
            part, wanted = queries[first : first + _QUERIES], ks[first : first + _QUERIES]
            found = self.index.candidates(part, max(wanted), self.count, self.dead)
            for query, k, positions in zip(part, wanted, found, strict=True):
                scores = exact_scores(query, self.vectors[positions])
                results.append([(self.names[i], score) for i, score in best(scores, positions, k)])
        return results


class Store:
    """Adding fills the rows behind those in use, removing marks a row: no row that a snapshot reads ever changes.

    Memory doubles when it is full; when more than half of the rows are dead, the living ones are copied.
    """

    def __init__(self, dim: int, make_index: Any) -> None:
        self.dim = dim
        self._make_index = make_index
        self._lock = threading.Lock()
        self._positions: dict[str, int] = {}
        self.snapshot = Snapshot([], torch.empty(0, dim), 0, torch.empty(0, dtype=torch.int64), make_index(dim))

    def __contains__(self, name: object) -> bool:
        return name in self._positions

    def add(self, names: Sequence[str], vectors: torch.Tensor, replace: bool) -> None:
        """Put vectors (n, dim) float32 under new names; `replace` allows names that are there, and moves them back."""
        with self._lock:
            taken = [name for name in names if name in self._positions]
            if taken and not replace:
                raise LorakernError(
                    f"name {show(taken[0])} is in the retriever already; remove it first, or give replace=True"
                )
            last = self.snapshot
            count = last.count + len(names)
            buffer = last.vectors
            if count > len(buffer):
                buffer = torch.empty(max(count, 2 * len(buffer), 8), self.dim)
                buffer[: last.count] = last.vectors[: last.count]
            buffer[last.count : count] = vectors
            index = last.index.append(buffer[:count], last.count)
            last.names.extend(names)
            dead = torch.cat([last.dead, torch.tensor([self._positions[name] for name in taken], dtype=torch.int64)])
            self.snapshot = Snapshot(last.names, buffer, count, dead, index)
            self._positions.update(zip(names, range(last.count, count), strict=True))
            self._compact()

    def remove(self, name: str) -> None:
        with self._lock:
            if name not in self._positions:
                raise LorakernError(f"name {show(name)} is not in the retriever; it has {len(self.snapshot)} adapters")
            last = self.snapshot
            dead = torch.cat([last.dead, torch.tensor([self._positions[name]])])
            self.snapshot = Snapshot(last.names, last.vectors, last.count, dead, last.index)
            del self._positions[name]
            self._compact()

    def _compact(self) -> None:
        last = self.snapshot
        if len(last.dead) <= max(_FEW_DEAD, last.count // 2):
            return
        living = last.living()
        names, vectors = [last.names[i] for i in living.tolist()], last.vectors[living]
        index = self._make_index(self.dim).append(vectors, 0)
        self.snapshot = Snapshot(names, vectors, len(names), last.dead[:0], index)
        self._positions = {name: i for i, name in enumerate(names)}
