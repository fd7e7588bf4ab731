"""LoraRetriever: which adapters a request needs, by the likeness of texts."""

import os
import threading
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch

from lorakern.adapters.json_file import show
from lorakern.errors import LorakernError
from lorakern.mixture import retriever_files
from lorakern.mixture._checks import check_name, check_rows, check_texts, directions, embed
from lorakern.mixture.exact_index import ExactIndex
from lorakern.mixture.faiss_index import FaissIndex
from lorakern.mixture.store import Store

INSTRUCTION = "Represent the sentence for similar task retrieval"
SIMILARITIES = ("cosine", "inner_product")
INDEXES: dict[str, Callable] = {"exact": ExactIndex, "faiss": FaissIndex}

Encoder = Callable[[list[str]], torch.Tensor]
Found = list[tuple[str, float]]


class LoraRetriever:
    """A pool of adapters that are found by texts: each is the mean embedding of sample texts of its task.

    ``E(phi) = 1/m sum_j E(I: x_j)`` for an adapter phi with samples x_1..x_m, and ``score = cos(E(I: x), E(phi))`` for
    a request x, I the instruction. The vectors are float32, their products are summed in float64, in the same order
    whatever the batch; a first pass over a float16 copy, whose rounding is bounded, leaves few rows to score.
    Adapters may be added and removed while other threads retrieve; each call sees one state of the pool.

    Args:
        encoder: called with a list of n texts, it returns (n, d) floats; None for `MiniLM`, loaded when it is needed.
            If it has an `identity` (text), `save` keeps it, and a loaded retriever refuses an encoder with another.
        instruction: what each text is prefixed with, as "instruction: text"; "" for nothing.
        similarity: "cosine", or "inner_product" of embeddings as they are (what the paper's code does).
        index: "exact", for up to some 100,000 adapters (memory traffic bounds it: 2 d bytes an adapter and query), or
            "faiss", an HNSW graph of faiss-cpu for more, which is approximate: what it finds has exact scores, but it
            may miss.

    Raises:
        LorakernError: for an argument of another form, or a missing package.

    LoraRetriever: arXiv 2402.09997.

    >>> import torch
    >>> from lorakern.mixture import LoraRetriever
    >>> def letters(texts):
    ...     return torch.tensor([[float(text.count(letter)) for letter in "aeiou"] for text in texts])
    >>> retriever = LoraRetriever(letters, instruction="")
    >>> retriever.add("german", ["eine Reise", "der Weg"])
    >>> retriever.add("latin", ["aqua alta", "alma mater"])
    >>> retriever.retrieve(["ad astra"], k=1)[0][0][0], "latin" in retriever, retriever.names
    ('latin', True, ['german', 'latin'])
    """

    def __init__(
        self,
        encoder: Encoder | None = None,
        *,
        instruction: str = INSTRUCTION,
        similarity: str = "cosine",
        index: str = "exact",
    ) -> None:
        if encoder is not None and not callable(encoder):
            raise LorakernError(f"encoder must be callable with a list of texts, got {show(encoder)}")
        if not isinstance(instruction, str):
            raise LorakernError(f"instruction must be text, got {show(instruction)}")
        for name, value, choices in (("similarity", similarity, SIMILARITIES), ("index", index, tuple(INDEXES))):
            if not isinstance(value, str) or value not in choices:
                raise LorakernError(f"{name} must be one of {', '.join(choices)}, got {show(value)}")
        self.instruction, self.similarity, self.index = instruction, similarity, index
        self._encoder = encoder
        self._identity: str | None = None
        self._lock = threading.Lock()
        self._store: Store | None = None

    def __len__(self) -> int:
        return 0 if self._store is None else len(self._store.snapshot)

    def __contains__(self, name: object) -> bool:
        return self._store is not None and name in self._store

    @property
    def names(self) -> list[str]:
        """The adapters, in the order of upload; one that was replaced counts as uploaded then."""
        if self._store is None:
            return []
        snapshot = self._store.snapshot
        return [snapshot.names[i] for i in snapshot.living().tolist()]

    @property
    def encoder(self) -> Encoder:
        """The encoder; made now if none was given.

        Raises:
            LorakernError: it is not the one that the saved embeddings came from, or it is missing.
        """
        with self._lock:
            if self._encoder is None:
                from lorakern.integrations.minilm import MiniLM

                self._encoder = MiniLM()
            if self._identity is not None and (now := identity_of(self._encoder)) not in (None, self._identity):
                raise LorakernError(
                    f"encoder has identity {show(now)}, the embeddings came from one with {show(self._identity)}; load "
                    "the retriever with that encoder, or add the adapters anew"
                )
            # it was compared: hashing the weights of a model costs more than a request
            self._identity = None
            return self._encoder

    def add(self, name: str, texts: Sequence[str], *, replace: bool = False) -> None:
        """Put an adapter into the pool as the mean embedding of m sample texts of its task.

        Args:
            name: printable text of 1 to 255 characters. It is data, never a path.
            texts: m sample texts, at least one; the paper takes 20.
            replace: allow a name that is there.

        Raises:
            LorakernError: for a name that is there, no texts, or embeddings of another width or without a direction.
        """
        check_name(name)
        check_texts(texts)
        if not replace and name in self:
            self._refuse(name)
        self.add_embedding(name, self.embedding(texts), replace=replace)

    def embedding(self, texts: Sequence[str]) -> torch.Tensor:
        """(d,) float64: what `add` makes of m sample texts, to be kept and given to `add_embedding` later.

        Raises:
            LorakernError: for no texts, or an embedding without a direction.
        """
        vector = embed(self.encoder, check_texts(texts), self.instruction).mean(0)
        self._vectors(check_rows(vector[None], "the embedding of texts"), "the embedding of texts")
        return vector

    def add_embedding(self, name: str, vector: torch.Tensor, *, replace: bool = False) -> None:
        """Put an adapter into the pool by its embedding (d,), floats of any dtype; otherwise as `add`."""
        if not isinstance(vector, torch.Tensor) or vector.ndim != 1:
            got = tuple(vector.shape) if isinstance(vector, torch.Tensor) else show(vector)
            raise LorakernError(f"vector must be a tensor of shape (d,), got {got}")
        rows = self._vectors(
            check_rows(vector[None], f"the embedding of {show(name)}"), f"the embedding of {show(name)}"
        )
        self._store_for(rows.shape[1]).add([check_name(name)], rows, replace)

    def remove(self, name: str) -> None:
        """Take an adapter out of the pool.

        Raises:
            LorakernError: it is not there.
        """
        if self._store is None:
            raise LorakernError(f"name {show(name)} is not in the retriever; it has no adapters")
        self._store.remove(name)

    def retrieve(
        self, texts: Sequence[str], k: int = 3, exclude: Sequence[str | Collection[str] | None] | None = None
    ) -> list[Found]:
        """The k adapters most like each of the texts.

        Args:
            texts: T requests.
            k: how many adapters; fewer come where the pool has fewer.
            exclude: for each text a name, names or None: adapters that it shall not get, as out-of-distribution runs
                leave out the adapter of the text's own task. Names that are not in the pool do not matter.

        Returns:
            For each text (name, score) pairs, the best first, equal scores in the order of upload.

        Raises:
            LorakernError: for arguments of another form, and an encoder whose embeddings do not fit.
        """
        requests = check_texts(texts, empty=True)
        wanted = self._wanted(len(requests), k, exclude)
        if not requests or not len(self):
            return [[] for _ in requests]
        return self._search(embed(self.encoder, requests, self.instruction), k, wanted)

    def search(
        self, embeddings: torch.Tensor, k: int = 3, exclude: Sequence[str | Collection[str] | None] | None = None
    ) -> list[Found]:
        """As `retrieve`, for requests whose embeddings (T, d) are known."""
        rows = check_rows(embeddings, "embeddings")
        return self._search(rows, k, self._wanted(len(rows), k, exclude))

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write retriever.safetensors and retriever.json into a folder, beside what is there, then renamed.

        Raises:
            LorakernError: the folder cannot be written, or the names take more than a retriever's file may hold.
        """
        # an identity that a loaded retriever has not compared yet is still that of its embeddings
        identity = self._identity or identity_of(self._encoder)
        settings = {"instruction": self.instruction, "similarity": self.similarity, "index": self.index}
        snapshot = None if self._store is None else self._store.snapshot
        living = None if snapshot is None else snapshot.living()
        names = [] if snapshot is None else [snapshot.names[i] for i in living.tolist()]
        vectors = torch.empty(0, 0) if snapshot is None else snapshot.vectors[living]
        retriever_files.write(folder, settings | {"encoder": identity}, names, vectors)

    @classmethod
    def load(cls, folder: str | os.PathLike[str], *, encoder: Encoder | None = None) -> "LoraRetriever":
        """A retriever as `save` wrote it, with all that it says checked before it is believed.

        Args:
            folder: where the files are.
            encoder: as for a new one; with the `identity` that was saved, if it has one.

        Raises:
            LorakernError: the files are missing, damaged, or not a retriever's.
        """
        settings, names, vectors = retriever_files.read(folder, SIMILARITIES, tuple(INDEXES))
        made = cls(encoder, **{name: settings[name] for name in ("instruction", "similarity", "index")})
        made._identity = settings["encoder"]
        if encoder is not None:
            _ = made.encoder
        if names:
            made._store_for(vectors.shape[1]).add(names, vectors, False)
        return made

    def _refuse(self, name: str) -> None:
        raise LorakernError(f"name {show(name)} is in the retriever already; remove it first, or give replace=True")

    def _vectors(self, rows: torch.Tensor, what: str) -> torch.Tensor:
        """(n, d) float32, as they are compared."""
        return (directions(rows, what) if self.similarity == "cosine" else rows).float()

    def _store_for(self, dim: int) -> Store:
        with self._lock:
            if self._store is None:
                self._store = Store(dim, INDEXES[self.index])
        if self._store.dim != dim:
            raise LorakernError(
                f"an embedding has {dim} numbers, those in the retriever {self._store.dim}; take one encoder for all"
            )
        return self._store

    def _wanted(self, count: int, k: Any, exclude: Any) -> list[frozenset[str]]:
        if not isinstance(k, int) or isinstance(k, bool) or k < 1:
            raise LorakernError(f"k must be an integer of at least 1, got {show(k)}")
        if exclude is None:
            return [frozenset()] * count
        if isinstance(exclude, (str, bytes)) or not isinstance(exclude, Sequence) or len(exclude) != count:
            raise LorakernError(
                f"exclude must be a list with a name, names or None for each of the {count} rows, got {show(exclude)}"
            )
        return [frozenset([row] if isinstance(row, str) else row or ()) for row in exclude]

    def _search(self, rows: torch.Tensor, k: int, exclude: list[frozenset[str]]) -> list[Found]:
        if self._store is None:
            return [[] for _ in exclude]
        queries = self._vectors(rows, "embeddings")
        if queries.shape[1] != self._store.dim:
            raise LorakernError(
                f"embeddings must be of width {self._store.dim} like those in the retriever, got {queries.shape[1]}"
            )
        # so many more that k are left, whichever of the excluded are there
        found = self._store.snapshot.search(queries, [k + len(names) for names in exclude])
        pairs = zip(found, exclude, strict=True)
        return [[pair for pair in row if pair[0] not in names][:k] for row, names in pairs]


def identity_of(encoder: Any) -> str | None:
    """The encoder's own `identity`, if it has one that is text."""
    identity = getattr(encoder, "identity", None)
    return identity if isinstance(identity, str) else None
