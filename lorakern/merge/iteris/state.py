"""Sweeps on disk: what a merge has reached, so that a killed one goes on after its last whole sweep."""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from lorakern.adapters.json_file import parse_object, show
from lorakern.errors import LorakernError
from lorakern.merge.iteris.samples import hash_tensor

FILE = "iteris.safetensors"
_KEY = "lorakern.iteris"


@dataclass
class State:
    """What is known after some sweeps; lists have one entry per sweep or, in a module, per adapter."""

    sweeps: int = 0
    updates: dict[str, torch.Tensor] = field(default_factory=dict)
    lambdas: dict[str, list[float]] = field(default_factory=dict)
    energies: dict[str, list[float]] = field(default_factory=dict)
    objectives: list[dict[str, float]] = field(default_factory=list)
    undetermined: dict[str, int] = field(default_factory=dict)


_FIELDS = ("sweeps", "lambdas", "energies", "objectives", "undetermined")


class StateFile:
    """One file in a folder, replaced as a whole after each sweep: at any moment it is of one sweep."""

    def __init__(self, op: str, folder: str | os.PathLike[str], arguments: Mapping[str, Any]) -> None:
        self._op = op
        self._file = Path(folder) / FILE
        self._arguments = json.loads(json.dumps(arguments))

    def load(self) -> State:
        """The state that is there, or a new one.

        Raises:
            LorakernError: the file is damaged, or of other arguments.
        """
        if not self._file.exists():
            return State()
        hint = f"give another state folder, or remove {self._file} to begin anew"
        try:
            with safe_open(self._file, framework="pt") as tensors:
                text = (tensors.metadata() or {}).get(_KEY)
                updates = {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise LorakernError(f"{self._op}: {self._file} cannot be read ({error}); {hint}") from None
        if text is None:
            raise LorakernError(f"{self._op}: {self._file} holds no sweeps; {hint}")
        fields = parse_object(text.encode(), self._file, "the metadata")
        if missing := [name for name in (*_FIELDS, "arguments") if name not in fields]:
            raise LorakernError(f"{self._op}: {self._file} lacks {missing[0]}; {hint}")
        for name, now in self._arguments.items():
            if (then := fields["arguments"].get(name)) != now:
                raise LorakernError(
                    f"{self._op}: {self._file} holds sweeps with other {name} ({show(then)}, now {show(now)}); {hint}"
                )
        return State(updates=updates, **{name: fields[name] for name in _FIELDS})

    def save(self, state: State) -> None:
        fields = {name: getattr(state, name) for name in _FIELDS} | {"arguments": self._arguments}
        self._file.parent.mkdir(parents=True, exist_ok=True)
        # of a fixed name, so that what a kill leaves is overwritten
        temporary = self._file.with_name(f".{FILE}.tmp")
        save_file(state.updates, temporary, metadata={_KEY: json.dumps(fields, allow_nan=False)})
        with temporary.open("rb") as stream:
            os.fsync(stream.fileno())
        temporary.replace(self._file)


def digest_of(tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
    """A hash of named tensors, in their order."""
    digest = hashlib.sha256()
    for name, tensor in tensors:
        hash_tensor(digest, name, tensor)
    return digest.hexdigest()
