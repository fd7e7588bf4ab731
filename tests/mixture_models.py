"""A small model, a tokenizer of letters and adapters, for the tests of mixtures."""

from __future__ import annotations

import torch

import lorakern as lk

LETTERS = "\0abcdefghijklmnopqrstuvwxyz .,:"
TARGETS = ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj")


class Letters:
    """A token is a letter."""

    eos_token_id = 0
    vocab_size = len(LETTERS)

    def get_added_vocab(self):
        return {}

    def __call__(self, text, add_special_tokens=True):
        return {"input_ids": [LETTERS.index(letter) for letter in text]}

    def decode(self, tokens, skip_special_tokens=True):
        return "".join(LETTERS[token] for token in tokens)


def tiny(dtype=torch.float32):
    """Two layers of a Llama with grouped heads, weights large enough that adapters change its answers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(LETTERS),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config).to(dtype).eval()


def adapters(model, count=5, ranks=(4, 2, 3), seed=0):
    """Adapters a0, a1, ... of different ranks, of which the second lacks a module."""
    generator = torch.Generator().manual_seed(seed)
    modules = dict(model.named_modules())
    made = {}
    for i in range(count):
        factors = {}
        for layer in range(2):
            for target in TARGETS[: 2 if i == 1 else 3]:
                path = f"model.layers.{layer}.{target}"
                linear, rank = modules[path], ranks[i % len(ranks)]
                A = torch.randn(rank, linear.in_features, generator=generator) * 0.3
                B = torch.randn(linear.out_features, rank, generator=generator) * 0.3
                factors[path] = (A, B, 0.5 + 0.25 * i)
        made[f"a{i}"] = lk.LoraAdapter(factors)
    return made


def letters_encoder(texts):
    """How often each letter is in a text."""
    return torch.tensor([[float(text.count(letter)) + 0.01 for letter in LETTERS[1:27]] for text in texts])
