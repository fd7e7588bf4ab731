"""One file that keeps what a long computation has reached: tensors and plain data, replaced as a whole."""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from lorakern.adapters.json_file import parse_object, show
from lorakern.errors import LorakernError


def write_state(file: Path, tensors: Mapping[str, torch.Tensor], key: str, fields: Mapping[str, Any]) -> None:
    """Write the tensors, and the fields as JSON under `key` of the metadata: beside, synced and renamed.

    Raises:
        LorakernError: it cannot be written; what was there is still there.
    """
    # of a fixed name, so that what a kill leaves is overwritten
    temporary = file.with_name(f".{file.name}.tmp")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file(dict(tensors), temporary, {key: json.dumps(fields, allow_nan=False)})
        with temporary.open("rb") as stream:
            os.fsync(stream.fileno())
        temporary.replace(file)
    except (OSError, SafetensorError) as error:
        raise LorakernError(f"state: {file} cannot be written ({error}); give another folder") from error


def read_fields(text: str | None, file: Path, names: tuple[str, ...], arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The fields in a state's metadata, which must have these names and have been made with these arguments.

    Raises:
        LorakernError: there are none, one is missing, or the arguments are others.
    """
    hint = begin_anew(file)
    if text is None:
        raise LorakernError(f"state: {file} holds no state of this computation; {hint}")
    fields = parse_object(text.encode(), file, "the metadata")
    if missing := [name for name in (*names, "arguments") if name not in fields]:
        raise LorakernError(f"state: {file} lacks {missing[0]}; {hint}")
    then = fields["arguments"]
    for name, now in arguments.items():
        if not isinstance(then, dict) or then.get(name) != now:
            was = then.get(name) if isinstance(then, dict) else then
            raise LorakernError(f"state: {file} is of other {name} ({show(was)}, now {show(now)}); {hint}")
    return fields


def begin_anew(file: Path) -> str:
    """What to do about a state that cannot be used."""
    return f"give another state folder, or remove {file} to begin anew"


def hash_tensor(digest: Any, name: str, tensor: torch.Tensor) -> None:
    """Add name, dtype, shape and bytes to a digest of hashlib."""
    digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
    digest.update(memoryview(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()))


def digest_of(tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
    """A hash of (name, tensor) pairs, in their order."""
    digest = hashlib.sha256()
    for name, tensor in tensors:
        hash_tensor(digest, name, tensor)
    return digest.hexdigest()
