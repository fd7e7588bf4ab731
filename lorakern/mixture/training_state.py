"""A training on disk: the module that learns, its optimizer and losses in one file, replaced as a whole."""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from lorakern.adapters.json_file import show
from lorakern.adapters.state_file import begin_anew, read_fields, write_state
from lorakern.errors import LorakernError

_MOMENTS = ("exp_avg", "exp_avg_sq")


def digest(value: Any) -> str:
    """A hash of plain data, in its order."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


class TrainingState:
    """The last step that was written; `arguments` are those of the call `kind`, and those that the file must have."""

    def __init__(self, folder: str | os.PathLike[str], kind: str, arguments: Mapping[str, Any]) -> None:
        self._file = Path(folder) / f"{kind}.safetensors"
        self._key = f"lorakern.{kind}"
        self._arguments = dict(arguments)

    def load(
        self, module: torch.nn.Module, trained: Mapping[str, torch.nn.Parameter], optimizer: torch.optim.Optimizer
    ) -> list[float]:
        """Put module and optimizer where they were, and return the losses; nothing is changed if there is no file.

        Raises:
            LorakernError: the file is damaged, of other arguments, or of another model.
        """
        if not self._file.exists():
            return []
        hint = begin_anew(self._file)
        try:
            with safe_open(self._file, framework="pt") as tensors:
                text = (tensors.metadata() or {}).get(self._key)
                shapes = {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
                losses = self._losses(text)
                expected = {name: tuple(tensor.shape) for name, tensor in self._tensors(module, trained).items()}
                if shapes != expected:
                    other = sorted(set(shapes.items()) ^ set(expected.items()))[0][0]
                    raise LorakernError(f"state: {self._file} is of another model ({show(other)} differs); {hint}")
                read = {name: tensors.get_tensor(name) for name in expected}
        except (SafetensorError, OSError) as error:
            raise LorakernError(f"state: {self._file} cannot be read ({error}); {hint}") from None
        module.load_state_dict({name: read[f"module.{name}"] for name in module.state_dict()})
        for name, weight in trained.items():
            moments = {moment: read[f"{moment}.{name}"].to(weight.device) for moment in _MOMENTS}
            optimizer.state[weight] = {"step": torch.tensor(float(len(losses))), **moments}
        return losses

    def save(
        self,
        module: torch.nn.Module,
        trained: Mapping[str, torch.nn.Parameter],
        optimizer: torch.optim.Optimizer,
        losses: list[float],
    ) -> None:
        tensors = self._tensors(module, trained)
        for name, weight in trained.items():
            for moment in _MOMENTS:
                # a parameter that no loss depended on has no moments: they are zero
                if moment in optimizer.state[weight]:
                    tensors[f"{moment}.{name}"] = optimizer.state[weight][moment]
        fields = {"arguments": self._arguments, "losses": losses}
        copies = {name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}
        write_state(self._file, copies, self._key, fields)

    def _losses(self, text: str | None) -> list[float]:
        losses = read_fields(text, self._file, ("losses",), self._arguments)["losses"]
        if not isinstance(losses, list) or not losses or not all(isinstance(loss, float) for loss in losses):
            raise LorakernError(
                f"state: {self._file}: losses must be numbers, got {show(losses)}; {begin_anew(self._file)}"
            )
        return losses

    @staticmethod
    def _tensors(module: torch.nn.Module, trained: Mapping[str, torch.nn.Parameter]) -> dict[str, torch.Tensor]:
        """All that a file holds, with moments of zero."""
        weights = {f"module.{name}": weight for name, weight in module.state_dict().items()}
        return weights | {f"{moment}.{name}": torch.zeros_like(w) for moment in _MOMENTS for name, w in trained.items()}
