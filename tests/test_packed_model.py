"""Packed sequences against the model's own forward, and the same bits alone and in company."""

import pytest
import torch
from mixture_models import tiny

from lorakern.errors import LorakernError
from lorakern.integrations import packed as packed_module
from lorakern.integrations.packed import PackedModel, Piece

PROMPTS = [[3, 4, 5], [7] * 20, list(range(1, 9)), [2]]


def run(model, chosen, new=6, **options):
    """Greedy logits of prompts by their numbers, all at once, each in a row of its own."""
    packed = PackedModel(model, **{"max_rows": 4, "block": 16, **options})
    rows = {number: (number * 3 + 1) % 4 for number in chosen}
    logits, tokens = {number: [] for number in chosen}, {number: [] for number in chosen}
    pieces = [
        (number, Piece(rows[number], start, PROMPTS[number][start : start + packed.block]))
        for number in chosen
        for start in range(0, len(PROMPTS[number]), packed.block)
    ]
    while pieces:
        block = []
        while pieces and sum(len(p.tokens) for _, p in block) + len(pieces[0][1].tokens) <= packed.block:
            block.append(pieces.pop(0))
        for (number, piece), row in zip(block, packed.prefill([p for _, p in block]), strict=True):
            if piece.end == len(PROMPTS[number]):
                logits[number].append(row)
                tokens[number].append(int(row.argmax()))
    for _ in range(new - 1):
        step = [Piece(rows[n], len(PROMPTS[n]) + len(tokens[n]) - 1, tokens[n][-1:]) for n in chosen]
        for number, row in zip(chosen, packed.decode(step), strict=True):
            logits[number].append(row)
            tokens[number].append(int(row.argmax()))
    return logits, tokens


def test_it_is_the_model():
    model = tiny()
    logits, tokens = run(model, [0, 1, 2, 3])
    for number, prompt in enumerate(PROMPTS):
        with torch.no_grad():
            whole = model(torch.tensor([prompt + tokens[number][:-1]])).logits[0, len(prompt) - 1 :]
        torch.testing.assert_close(torch.stack(logits[number]), whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_sequence_has_the_same_bits_alone_and_in_company(dtype):
    model = tiny(dtype)
    together, _ = run(model, [0, 1, 2, 3])
    for chosen in ([1], [3, 0], [2, 1, 3]):
        apart, _ = run(model, chosen)
        for number in chosen:
            assert all(torch.equal(a, b) for a, b in zip(apart[number], together[number], strict=True))


def test_the_cache_grows(monkeypatch):
    monkeypatch.setattr(packed_module, "_FIRST_CAPACITY", 64)
    model = tiny()
    packed = PackedModel(model, max_rows=2, block=64, max_tokens=250)
    for start in range(0, 192, 64):
        packed.prefill([Piece(1, start, [5] * 64)])
    logits = packed.prefill([Piece(1, 192, [6] * 30)])
    with torch.no_grad():
        whole = model(torch.tensor([[5] * 192 + [6] * 30])).logits[:, -1]
    torch.testing.assert_close(logits, whole, rtol=1e-3, atol=1e-3)


def test_the_model_keeps_its_attention():
    model = tiny()
    before = model.config._attn_implementation
    PackedModel(model).prefill([Piece(0, 0, [1, 2])])
    assert model.config._attn_implementation == before


def test_other_models_are_refused():
    with pytest.raises(LorakernError, match="causal language model"):
        PackedModel(torch.nn.Linear(2, 2))


def test_a_sliding_window_is_refused():
    from transformers import MistralConfig, MistralForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    model = MistralForCausalLM(MistralConfig(vocab_size=9, num_key_value_heads=2, sliding_window=4, **sizes)).eval()
    with pytest.raises(LorakernError, match="sliding_window"):
        PackedModel(model).prefill([Piece(0, 0, [1])])
