"""Adapters on disk, and calls of the lorakern command, for the tests of its commands on adapter files."""

import json

import torch
from adapter_builders import CONFIG, WEIGHTS
from merging import factors
from safetensors.torch import save_file

from lorakern import cli
from lorakern.adapters import LoraAdapter

SHAPES = {"self_attn.q_proj": (11, 7), "mlp.up_proj": (9, 7), "mlp.down_proj": (7, 9)}  # d_out, d_in
LAYERS = 4


def adapter(rank, scale=1.0, dtype=torch.float32, seed=0, leave_out=(), **config):
    """An adapter of 12 modules whose last layer has one rank more."""
    modules = {}
    for layer in range(LAYERS):
        for place, (name, (d_out, d_in)) in enumerate(SHAPES.items()):
            if name not in leave_out:
                own = rank + (layer == LAYERS - 1)
                path = f"model.layers.{layer}.{name}"
                modules[path] = factors(d_out, d_in, own, scale, dtype, seed=100 * seed + 10 * layer + place)
    return LoraAdapter(modules, **{"base_model_name_or_path": "my/base", **config})


def three(folder):
    """Adapters A, B and C in `folder`, of other ranks, scales, dtypes and modules, one of them rsLoRA."""
    adapter(2, 0.5, seed=1).save(folder / "A")
    adapter(3, 2.0, torch.bfloat16, seed=2, leave_out=["mlp.up_proj"]).save(folder / "B")
    adapter(1, 16 / 5**0.5, torch.float16, seed=3, use_rslora=True).save(folder / "C")
    return [LoraAdapter.load(folder / name) for name in "ABC"]


def kohya(folder):
    """The same module names in a kohya file, where alpha is half the rank."""
    tensors = {}
    for path, (A, B, _) in adapter(2, seed=4).items():
        name = "lora_unet_" + path.replace(".", "_")
        tensors |= {f"{name}.lora_down.weight": A.contiguous(), f"{name}.lora_up.weight": B.contiguous()}
        tensors[f"{name}.alpha"] = torch.tensor(1.0)
    save_file(tensors, folder / "style.safetensors")
    return folder / "style.safetensors"


def lorakern(capsys, *arguments, status=0):
    """What the command prints on stdout, or on stderr if it is to fail with 2; nothing else is there then."""
    capsys.readouterr()
    got = cli.main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    assert got == status, captured.err
    if status != 2:
        assert captured.err == ""
        return captured.out
    assert captured.out == "" and captured.err.startswith("lorakern: ") and captured.err.count("\n") == 1
    return captured.err


def result(capsys, *arguments, status=0):
    """The command's --json."""
    return json.loads(lorakern(capsys, *arguments, "--json", status=status))


def snapshot(folder):
    return {file.name: (file.read_bytes(), file.stat().st_mtime_ns) for file in folder.iterdir()}


def adapter_files(folder):
    return sorted(file.name for file in folder.iterdir()) == sorted([CONFIG, WEIGHTS, "README.md"])
