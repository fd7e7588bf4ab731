"""The adapters of a running server: what is in the store is in the engine, and the other way round."""

import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lorakern.adapters import LoraAdapter
from lorakern.adapters.json_file import show
from lorakern.errors import LorakernError
from lorakern.mixture import LoraRetriever
from lorakern.mixture.retriever import identity_of
from lorakern.serve.errors import ApiError
from lorakern.serve.record import Embedding, Record
from lorakern.serve.store import AdapterStore


class Catalogue:
    """Uploads and deletions, in the store first and then in the engine.

    Args:
        engine: a `MixtureModel`, or what has its `add`, `check` and `remove`.
        retriever: encodes the sample texts; the engine's own.
        store: its adapters are put into the engine by `restore`.
        warn: told why an adapter of the store is not served.
    """

    def __init__(self, engine: Any, retriever: LoraRetriever, store: AdapterStore, warn: Callable[[str], None]) -> None:
        self.store = store
        self._engine, self._retriever, self._warn = engine, retriever, warn
        self._lock = threading.Lock()
        self._encoder = identity_of(retriever.encoder)

    def restore(self) -> None:
        """Put what the store holds into the engine. Texts are encoded anew only where another encoder was used."""
        for record in self.store.records:
            try:
                if record.texts and not self._is_current(record.embedding):
                    record = Record(**vars(record) | {"embedding": self._embed(record.texts)})
                    if self._encoder is not None:
                        self.store.update(record)
                # the numbers were read when it was uploaded
                self._add(record, LoraAdapter.load(self.store.path(record.name), check_finite=False))
            except LorakernError as error:
                self._warn(f"adapter {show(record.name)} is not served: {error}")

    def accept(
        self, quarantine: Path, name: str, texts: Sequence[str], sha256: str, *, replace: bool = False
    ) -> Record:
        """Check a quarantined upload, and make it an adapter that is on the disk and visible when this returns.

        Raises:
            ApiError: 409 for a name that is there, 422 for files that are no adapter of this model.
        """
        self.check_free(name, replace)
        try:
            adapter = LoraAdapter.load(quarantine)
        except LorakernError as error:
            raise ApiError(422, _without(quarantine, error), "not_an_adapter") from None
        try:
            self._engine.check(name, adapter)
        except LorakernError as error:
            raise ApiError(422, _without(quarantine, error), "does_not_fit") from None
        size = (quarantine / "adapter_model.safetensors").stat().st_size
        try:
            embedding = self._embed(texts) if texts else None
        except LorakernError as error:
            raise ApiError(422, f"texts: {error}", "bad_texts", "texts") from None
        fields = {"texts": tuple(texts), "embedding": embedding, "sha256": sha256, "bytes": size}
        record = Record.of(name, adapter, created=int(time.time()), **fields)
        with self._lock:
            self.check_free(name, replace)
            self.store.publish(quarantine, record)
            try:
                self._add(record, adapter)
            except BaseException:
                self.store.remove(name)
                raise
        return record

    def delete(self, name: str) -> None:
        """Take an adapter out; running requests finish with it.

        Raises:
            ApiError: 404 for a name that is not there.
        """
        with self._lock:
            self._check_there(name)
            self.store.remove(name)
            if name in self._engine.names:
                self._engine.remove(name)

    def listed(self) -> list[dict[str, Any]]:
        """What clients are told of all adapters, in the order of upload."""
        served = set(self._engine.names)
        return [record.public() | {"served": record.name in served} for record in self.store.records]

    def shown(self, name: str) -> dict[str, Any]:
        """The same of one; raises `ApiError` 404."""
        self._check_there(name)
        return self.store.record(name).public() | {"served": name in self._engine.names}

    def check_free(self, name: str, replace: bool) -> None:
        """Raises `ApiError` 409 if an upload may not have this name."""
        if name in self.store and not replace:
            raise ApiError(
                409, f"name {show(name)} is taken; delete that adapter first, or send replace=true", "exists", "name"
            )

    def _check_there(self, name: str) -> None:
        if name not in self.store:
            raise ApiError(404, f"there is no adapter {show(name)}; GET /adapters lists them", "not_found", "name")

    def _add(self, record: Record, adapter: LoraAdapter) -> None:
        # its files are mapped: requests finish with them also when they were removed
        embedding = None if record.embedding is None else record.embedding.tensor()
        self._engine.add(record.name, adapter, embedding=embedding, replace=True)

    def _embed(self, texts: Sequence[str]) -> Embedding:
        vector = self._retriever.embedding(texts)
        return Embedding(self._encoder, self._retriever.instruction, tuple(vector.tolist()))

    def _is_current(self, made: Embedding | None) -> bool:
        now = self._encoder, self._retriever.instruction
        # an encoder without an identity may be any other one
        return made is not None and self._encoder is not None and (made.encoder, made.instruction) == now


def _without(folder: Path, error: LorakernError) -> str:
    """The message without where the server keeps its files."""
    return str(error).replace(f"{folder}/", "").replace(str(folder), "the upload")
