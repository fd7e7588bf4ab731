"""Adapters made from the shipped skills: derived ones that serve, and damaged ones that must not."""

import json
import pickle
import shutil
from pathlib import Path

import torch
from engines import SKILLS
from safetensors.torch import load_file, save_file

from lorakern import LoraAdapter, LoraFactors

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def derive(skill: str, folder: Path, rank: int | None = None, strength: float = 1.0) -> Path:
    """A skill with its update scaled, its ranks cut to the first ``rank`` ones or padded with further ones up to it."""
    factors = {name: _of_rank(factors, rank, strength) for name, factors in LoraAdapter.load(SKILLS / skill).items()}
    LoraAdapter(factors, task_type="CAUSAL_LM").save(folder)
    return folder


def _of_rank(factors: LoraFactors, rank: int | None, strength: float) -> LoraFactors:
    A, B, scale = factors
    if rank is None:
        return LoraFactors(A, B, scale * strength)
    A = torch.cat([A, A.new_full((max(0, rank - len(A)), A.shape[1]), 1e-3)])
    B = torch.cat([B, B.new_full((len(B), max(0, rank - B.shape[1])), 1e-3)], dim=1)
    return LoraFactors(A[:rank], B[:, :rank].contiguous(), scale * strength)


def change_config(folder: Path, **fields) -> None:
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | fields))


def _change_first_tensor(folder: Path, factor: str, change) -> None:
    tensors = load_file(folder / WEIGHTS)
    name = next(name for name in tensors if f".{factor}." in name)
    tensors[name] = change(tensors[name]).contiguous()
    save_file(tensors, folder / WEIGHTS)


def _drop_first_tensor(folder: Path, factor: str) -> None:
    tensors = load_file(folder / WEIGHTS)
    del tensors[next(name for name in tensors if f".{factor}." in name)]
    save_file(tensors, folder / WEIGHTS)


def _truncate(folder: Path) -> None:
    weights = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(weights[: len(weights) // 2])


class _Touch:
    """What a pickle of it does when it is read: make a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def _pickle(folder: Path, name: str) -> None:
    (folder / WEIGHTS).unlink()
    (folder / name).write_bytes(pickle.dumps(_Touch(folder / "executed"), protocol=2))


def _spoil(factor: torch.Tensor, value: float) -> torch.Tensor:
    factor[-1, -1] = value
    return factor


# What vLLM refuses, by what is broken; values that are not finite, lorakern.
DAMAGE = {
    "weights truncated": _truncate,
    "weights empty": lambda folder: (folder / WEIGHTS).write_bytes(b""),
    "weights missing": lambda folder: (folder / WEIGHTS).unlink(),
    "weights pickled": lambda folder: _pickle(folder, "adapter_model.bin"),
    "weights pickled under the name of safetensors": lambda folder: _pickle(folder, WEIGHTS),
    "config missing": lambda folder: (folder / CONFIG).unlink(),
    "config cut off": lambda folder: (folder / CONFIG).write_text('{"r": 4, "lora_al'),
    "config without rank": lambda folder: (folder / CONFIG).write_text('{"lora_alpha": 8, "target_modules": []}'),
    "config of rank 0": lambda folder: change_config(folder, r=0),
    "config of a DoRA": lambda folder: change_config(folder, use_dora=True),
    "A too wide": lambda folder: _change_first_tensor(folder, "lora_A", lambda A: torch.cat([A, A], dim=1)),
    "A of one dimension": lambda folder: _change_first_tensor(folder, "lora_A", torch.flatten),
    "B too tall": lambda folder: _change_first_tensor(folder, "lora_B", lambda B: torch.cat([B, B])),
    "B missing": lambda folder: _drop_first_tensor(folder, "lora_B"),
    "A with NaN": lambda folder: _change_first_tensor(folder, "lora_A", lambda A: _spoil(A, torch.nan)),
    "B with inf": lambda folder: _change_first_tensor(folder, "lora_B", lambda B: _spoil(B, torch.inf)),
}

# What vLLM 0.32 loads without a word.
ACCEPTED = {
    "A too narrow": lambda folder: _change_first_tensor(folder, "lora_A", lambda A: A[:, :-1]),
    "A of a lower rank": lambda folder: _change_first_tensor(folder, "lora_A", lambda A: A[:-1]),
    "A missing": lambda folder: _drop_first_tensor(folder, "lora_A"),
    "B too short": lambda folder: _change_first_tensor(folder, "lora_B", lambda B: B[:-1]),
    "B of integers": lambda folder: _change_first_tensor(folder, "lora_B", lambda B: B.to(torch.int32)),
}


def damaged(damage: str, folder: Path, skill: str = "reverse_words") -> Path:
    """A copy of a skill with one thing broken."""
    shutil.copytree(SKILLS / skill, folder)
    (DAMAGE | ACCEPTED)[damage](folder)
    return folder
