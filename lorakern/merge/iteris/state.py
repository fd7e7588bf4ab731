"""Sweeps on disk: what a merge has reached, so that a killed one goes on after its last whole sweep."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from lorakern.adapters.state_file import begin_anew, read_fields, write_state
from lorakern.errors import LorakernError

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

    def __init__(self, folder: str | os.PathLike[str], arguments: Mapping[str, Any]) -> None:
        self._file = Path(folder) / FILE
        self._arguments = json.loads(json.dumps(arguments))

    def load(self) -> State:
        """The state that is there, or a new one.

        Raises:
            LorakernError: the file is damaged, or of other arguments.
        """
        if not self._file.exists():
            return State()
        try:
            with safe_open(self._file, framework="pt") as tensors:
                text = (tensors.metadata() or {}).get(_KEY)
                updates = {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise LorakernError(f"state: {self._file} cannot be read ({error}); {begin_anew(self._file)}") from None
        fields = read_fields(text, self._file, _FIELDS, self._arguments)
        return State(updates=updates, **{name: fields[name] for name in _FIELDS})

    def save(self, state: State) -> None:
        fields = {name: getattr(state, name) for name in _FIELDS} | {"arguments": self._arguments}
        write_state(self._file, state.updates, _KEY, fields)
