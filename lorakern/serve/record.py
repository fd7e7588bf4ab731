"""What the store knows of an adapter besides its two files: one JSON object, which makes the folder an adapter."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from lorakern.adapters import LoraAdapter
from lorakern.adapters.json_file import parse_object, show
from lorakern.errors import LorakernError
from lorakern.serve.names import check_name


@dataclass(frozen=True)
class Embedding:
    """The mean of an adapter's sample texts (d,) in float64, and the encoder and instruction that it is of."""

    encoder: str | None
    instruction: str
    vector: tuple[float, ...]

    def tensor(self) -> torch.Tensor:
        """(d,) float64."""
        return torch.tensor(self.vector, dtype=torch.float64)


@dataclass(frozen=True)
class Record:
    """An adapter as it was uploaded; `bytes` and `sha256` are those of its weights file."""

    name: str
    created: int
    ranks: tuple[int, ...]
    modules: int
    bytes: int
    sha256: str
    base_model: str | None
    texts: tuple[str, ...] = ()
    embedding: Embedding | None = None

    @classmethod
    def of(cls, name: str, adapter: LoraAdapter, **fields: Any) -> "Record":
        """The record of an adapter that was loaded."""
        ranks = tuple(sorted({factors.rank for factors in adapter.values()}))
        base = adapter.config.base_model_name_or_path
        return cls(name=name, ranks=ranks, modules=len(adapter), base_model=base, **fields)

    def public(self) -> dict[str, Any]:
        """What a client is told."""
        fields = asdict(self)
        del fields["embedding"]
        return fields | {"texts": len(self.texts), "retrievable": self.embedding is not None}

    def to_json(self) -> bytes:
        return json.dumps(asdict(self), ensure_ascii=False, indent=0).encode()

    @classmethod
    def from_json(cls, text: bytes, file: Path) -> "Record":
        """The record in `text`, that of `file`.

        Raises:
            LorakernError: it is damaged, or another version's.
        """
        fields = parse_object(text, file, "the record")
        if wrong := [name for name, check in _CHECKS.items() if name not in fields or not check(fields[name])]:
            raise LorakernError(f"{file}: {wrong[0]} is {show(fields.get(wrong[0]))}; the record is damaged")
        if unknown := set(fields) - set(_CHECKS):
            raise LorakernError(f"{file}: {show(min(unknown))} is unknown; it was written by another version")
        check_name(fields["name"])
        made = fields["embedding"]
        embedding = made and Embedding(made["encoder"], made["instruction"], tuple(made["vector"]))
        lists = {name: tuple(fields[name]) for name in ("ranks", "texts")}
        return cls(**fields | lists | {"embedding": embedding})


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_list(value: Any, kind: type) -> bool:
    return isinstance(value, list) and all(isinstance(entry, kind) for entry in value)


def _is_embedding(value: Any) -> bool:
    match value:
        case None:
            return True
        case {"encoder": str() | None, "instruction": str(), "vector": [_, *_] as vector}:
            return len(value) == 3 and _is_list(vector, float)
    return False


_CHECKS = {
    "name": lambda value: isinstance(value, str),
    "created": _is_count,
    "ranks": lambda value: _is_list(value, int),
    "modules": _is_count,
    "bytes": _is_count,
    "sha256": lambda value: isinstance(value, str),
    "base_model": lambda value: value is None or isinstance(value, str),
    "texts": lambda value: _is_list(value, str),
    "embedding": _is_embedding,
}
