"""A small random Llama whose heads divide by two, and random adapters for it."""

import json

import torch
from safetensors.torch import save_file

VOCABULARY = 512
SIZES = {"hidden_size": 256, "intermediate_size": 384, "num_hidden_layers": 3}
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def save_model(folder):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    # Weights larger than usual: the logits are far from ties.
    config = LlamaConfig(vocab_size=VOCABULARY, num_attention_heads=8, num_key_value_heads=4, initializer_range=0.1,
                         max_position_embeddings=256, tie_word_embeddings=False, **SIZES)  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)


def shapes(targets):
    """(d_in, d_out) of each module, by its name."""
    hidden, inner = SIZES["hidden_size"], SIZES["intermediate_size"]
    of = dict.fromkeys(LINEAR, (hidden, hidden)) | {"gate_proj": (hidden, inner), "up_proj": (hidden, inner)}
    of |= {"k_proj": (hidden, hidden // 2), "v_proj": (hidden, hidden // 2), "down_proj": (inner, hidden)}
    named = {}
    for target in targets:
        if target == "embed_tokens":
            named["model.embed_tokens"] = VOCABULARY, hidden
        elif target == "lm_head":
            named["lm_head"] = hidden, VOCABULARY
        else:
            part = "mlp" if target in ("gate_proj", "up_proj", "down_proj") else "self_attn"
            named |= {f"model.layers.{i}.{part}.{target}": of[target] for i in range(SIZES["num_hidden_layers"])}
    return named


def save_adapter(folder, rank, seed, targets=LINEAR, strength=1.0):
    """In PEFT's format, with scale 1; `strength` is the size of an update beside that of what it is added to."""
    generator, tensors = torch.Generator().manual_seed(seed), {}
    for name, (d_in, d_out) in shapes(targets).items():
        embedding = name.endswith("embed_tokens")
        # Columns of an embedding's A are picked, not summed; the weights of the model have a deviation of 0.1.
        a = torch.randn(rank, d_in, generator=generator) * (1 if embedding else d_in**-0.5)
        b = torch.randn(d_out, rank, generator=generator) * rank**-0.5 * (0.1 if embedding else 1.0) * strength
        kind, weight = ("lora_embedding_", "") if embedding else ("lora_", ".weight")
        tensors |= {f"base_model.model.{name}.{kind}A{weight}": a, f"base_model.model.{name}.{kind}B{weight}": b}
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": list(targets)}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return str(folder)
