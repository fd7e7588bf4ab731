"""A retriever on disk: its vectors as safetensors, its names and settings as JSON, with the hash of the vectors."""

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as to_safetensors

from lorakern.adapters.folder_update import FolderUpdate
from lorakern.adapters.json_file import parse_object, show
from lorakern.adapters.tensor_file import TensorFile
from lorakern.errors import LorakernError
from lorakern.mixture._checks import MAX_DIM, check_name

VECTORS, SETTINGS = "retriever.safetensors", "retriever.json"
FORMAT, VERSION = "lorakern.retriever", 1
MAX_SETTINGS_BYTES = 128 << 20
_TENSOR = "embeddings"
_FIELDS = {
    "format": str,
    "version": int,
    "instruction": str,
    "similarity": str,
    "index": str,
    "encoder": (str, type(None)),
    "dim": int,
    "sha256": str,
    "names": list,
}
# float32 vectors of norm 1, written and read as they are
_UNIT = 1e-5


def write(folder: str | os.PathLike[str], settings: dict[str, Any], names: list[str], vectors: torch.Tensor) -> None:
    """Write both files under other names and rename them, the settings last: without them nothing is loaded."""
    folder = Path(folder)
    data = to_safetensors({_TENSOR: vectors.contiguous()})
    try:
        update = FolderUpdate(folder)
        try:
            update.create(VECTORS).write(data)
            digest = _sha256(data)
            fields = {"format": FORMAT, "version": VERSION, **settings, "dim": vectors.shape[1], "sha256": digest}
            text = json.dumps(fields | {"names": names}, ensure_ascii=False, indent=0).encode()
            if len(text) > MAX_SETTINGS_BYTES:
                raise LorakernError(
                    f"{folder / SETTINGS}: the names take {len(text)} bytes, more than the {MAX_SETTINGS_BYTES} that a "
                    "retriever may have; give shorter names"
                )
            update.create(SETTINGS).write(text)
            update.commit([VECTORS, SETTINGS])
        finally:
            update.discard()
    except OSError as error:
        raise LorakernError(f"{folder}: the retriever cannot be saved ({error}); give a folder to write to") from error


def read(
    folder: str | os.PathLike[str], similarities: tuple[str, ...], indexes: tuple[str, ...]
) -> tuple[dict[str, Any], list[str], torch.Tensor]:
    """Settings, names and vectors (n, d) float32; nothing is allocated before its size was checked."""
    file = Path(folder) / SETTINGS
    try:
        with file.open("rb") as stream:
            text = stream.read(MAX_SETTINGS_BYTES + 1)
    except OSError as error:
        raise LorakernError(f"{file} cannot be read ({error.strerror}); give a folder that save wrote") from None
    if len(text) > MAX_SETTINGS_BYTES:
        raise LorakernError(f"{file} has more than {MAX_SETTINGS_BYTES} bytes; this is no retriever")
    settings = _checked(parse_object(text, file, "the file"), file, similarities, indexes)
    return settings, settings["names"], _vectors(Path(folder) / VECTORS, settings)


def _checked(fields: dict[str, Any], file: Path, similarities: tuple[str, ...], indexes: tuple[str, ...]) -> dict:
    for name, kind in _FIELDS.items():
        if name not in fields or not isinstance(fields[name], kind) or isinstance(fields[name], bool):
            got = show(fields[name]) if name in fields else "none"
            raise LorakernError(
                f"{file}: {name} must be {_named(kind)}, got {got}; this is no retriever, save it again"
            )
    if unknown := [name for name in fields if name not in _FIELDS]:
        raise LorakernError(f"{file}: {show(unknown[0])} is unknown; save it again with this version")
    choices = {"format": (FORMAT,), "version": (VERSION,), "similarity": similarities, "index": indexes}
    for name, takes in choices.items():
        if fields[name] not in takes:
            raise LorakernError(f"{file}: {name} must be one of {takes}, got {show(fields[name])}; save it again")
    if not (0 <= fields["dim"] <= MAX_DIM):
        raise LorakernError(f"{file}: dim must be 0 to {MAX_DIM}, got {show(fields['dim'])}; save it again")
    for i, name in enumerate(fields["names"]):
        check_name(name, f"{file}: names[{i}]")
    if len(set(fields["names"])) < len(fields["names"]):
        raise LorakernError(f"{file}: names holds a name twice; save it again")
    return fields


def _vectors(file: Path, settings: dict[str, Any]) -> torch.Tensor:
    try:
        stored = TensorFile(file)
    except OSError as error:
        raise LorakernError(f"{file} cannot be read ({error.strerror}); give a folder that save wrote") from None
    try:
        shape = len(settings["names"]), settings["dim"]
        found = {name: (info.dtype, info.shape) for name, info in stored.tensors.items()}
        if found != {_TENSOR: ("F32", shape)} or (shape[0] and not shape[1]):
            raise LorakernError(
                f"{file}: it must hold {_TENSOR} in float32 of shape {shape}, as {SETTINGS} says, got {show(found)}; "
                "the files are not of one retriever"
            )
        if stored.sha256() != settings["sha256"]:
            raise LorakernError(f"{file}: its hash is not the one in {SETTINGS}; the files are not of one retriever")
        vectors = stored.read(_TENSOR)
    finally:
        stored.close()
    if not vectors.isfinite().all():
        raise LorakernError(f"{file}: {_TENSOR} holds NaN or infinity; add the adapters anew")
    norms = vectors.double().norm(dim=1)
    if settings["similarity"] == "cosine" and not ((norms - 1).abs() < _UNIT).all():
        raise LorakernError(
            f"{file}: similarity is cosine, but not all of {_TENSOR} have norm 1; add the adapters anew"
        )
    return vectors


def _sha256(data: bytes) -> str:
    import hashlib

    return hashlib.sha256(data).hexdigest()


def _named(kind: Any) -> str:
    names = {str: "text", int: "an integer", list: "a list"}
    return names.get(kind, "text or null")
