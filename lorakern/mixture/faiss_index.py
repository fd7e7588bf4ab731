"""Approximate search for pools beyond 100,000 adapters: the graph of faiss proposes, the exact scores decide."""

import threading

import numpy as np
import torch

from lorakern.errors import LorakernError

LINKS = 32
# how many rows are looked at for a new row's links: faiss's own 40 leaves clusters badly linked
CONSTRUCTION = 200
# how many rows the graph looks at, at least; more finds more of the true best
BREADTH = 128


class FaissIndex:
    """An HNSW graph of faiss under the inner product. Rows it does not reach are not found: this is no exact search."""

    def __init__(self, dim: int) -> None:
        try:
            import faiss
        except ImportError as error:
            raise LorakernError(
                f"index 'faiss' needs faiss-cpu ({error}); run `pip install faiss-cpu`, or take index='exact'"
            ) from None
        self._faiss = faiss
        # faiss does not allow a search while rows are added
        self._lock = threading.Lock()
        self._graph = faiss.IndexHNSWFlat(dim, LINKS, faiss.METRIC_INNER_PRODUCT)
        self._graph.hnsw.efConstruction = CONSTRUCTION

    def append(self, vectors: torch.Tensor, first: int) -> "FaissIndex":
        """This index, with rows `first` and on of `vectors` (n, d) float32 added."""
        with self._lock:
            if self._graph.ntotal != first:
                raise LorakernError(
                    f"index 'faiss' holds {self._graph.ntotal} rows, {first} were expected: an earlier add failed; "
                    "save the retriever and load it again"
                )
            self._graph.add(vectors[first:].numpy())
        return self

    def candidates(self, queries: torch.Tensor, k: int, count: int, dead: torch.Tensor) -> list[torch.Tensor]:
        """For each of the queries (T, d) float32, the positions of rows that are likely to be its best."""
        alive = np.ones(count, dtype=np.uint8)
        alive[dead.numpy()] = 0
        bits = np.packbits(alive, bitorder="little")
        wanted = min(max(BREADTH, 2 * k), count)
        options = self._faiss.SearchParametersHNSW(sel=self._faiss.IDSelectorBitmap(bits), efSearch=wanted)
        with self._lock:
            _, found = self._graph.search(queries.numpy(), wanted, params=options)
        return [torch.from_numpy(np.sort(row[row >= 0])) for row in found]
