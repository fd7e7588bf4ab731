"""Random PEFT adapters of all linear layers, of the served model's shapes, made anew for each run."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from benchmarks.serving.workload import ADAPTERS, rank_of

# Large enough that answers differ from the base model's, small enough that they stay text-like.
B_SIZE = 0.05


def shapes(config: dict) -> dict[str, tuple[int, int]]:
    """(d_out, d_in) of the linear modules of one layer of a Llama, from its config.json."""
    d, wide = config["hidden_size"], config["intermediate_size"]
    head = config.get("head_dim") or d // config["num_attention_heads"]
    queries, keys = head * config["num_attention_heads"], head * config["num_key_value_heads"]
    return {
        "self_attn.q_proj": (queries, d),
        "self_attn.k_proj": (keys, d),
        "self_attn.v_proj": (keys, d),
        "self_attn.o_proj": (d, queries),
        "mlp.gate_proj": (wide, d),
        "mlp.up_proj": (wide, d),
        "mlp.down_proj": (d, wide),
    }


def elements_of_a_rank(config: dict) -> int:
    """d_in + d_out, summed over all layers."""
    return config["num_hidden_layers"] * sum(d_out + d_in for d_out, d_in in shapes(config).values())


def paths(folder: Path) -> list[Path]:
    """Where `write` puts the adapters, each a folder."""
    return [folder / f"adapter{i:02}" for i in range(ADAPTERS)]


def write(folder: Path, config: dict, ranks: tuple[int, ...]) -> None:
    for i, path in enumerate(paths(folder)):
        _write(path, config, rank_of(i, ranks), seed=i)


def _write(folder: Path, config: dict, rank: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    factors = {}
    for layer in range(config["num_hidden_layers"]):
        for module, (d_out, d_in) in shapes(config).items():
            name = f"base_model.model.model.layers.{layer}.{module}"
            A = torch.randn(rank, d_in, generator=generator) / d_in**0.5
            factors[f"{name}.lora_A.weight"] = A.bfloat16()
            factors[f"{name}.lora_B.weight"] = (torch.randn(d_out, rank, generator=generator) * B_SIZE).bfloat16()
    folder.mkdir(parents=True)
    save_file(factors, folder / "adapter_model.safetensors")
    modules = [module.rpartition(".")[2] for module in shapes(config)]
    described = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": rank, "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(described | {"target_modules": modules}))
