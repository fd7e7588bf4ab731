"""Small random transformers models, adapters for them, and batches of random tokens."""

import pytest
import torch

import lorakern as lk

transformers = pytest.importorskip("transformers")

TARGETS = ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")


def llama(seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=False,
    )
    return transformers.LlamaForCausalLM(config).to(dtype).eval()


def adapter(model, rank, scale=1.0, seed=0, targets=TARGETS, std=0.3, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    factors = {}
    for name, module in model.named_modules():
        if name.endswith(targets):
            d_out, d_in = module.weight.shape
            A, B = torch.randn(rank, d_in, generator=g) * std, torch.randn(d_out, rank, generator=g) * std
            factors[name] = (A.to(dtype), B.to(dtype), scale)
    return lk.LoraAdapter(factors, task_type="CAUSAL_LM")


def batches(count=3, rows=2, length=7, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [{"input_ids": torch.randint(1, 61, (rows, length), generator=g)} for _ in range(count)]


def logits(model, batch):
    with torch.no_grad():
        return model(input_ids=batch["input_ids"], use_cache=False).logits
