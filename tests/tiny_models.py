"""Small random transformers models, adapters for them, and batches of random tokens."""

import pytest
import torch

import lorakern as lk
from lorakern.integrations.transformers import attach

transformers = pytest.importorskip("transformers")

TARGETS = ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj", "attn.c_attn", "mlp.c_proj")
FEW = ("self_attn.q_proj", "attn.c_attn")


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


def gpt2(seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    sizes = {"vocab_size": 61, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4}
    config = transformers.GPT2Config(**sizes, bos_token_id=1, eos_token_id=2)
    return transformers.GPT2LMHeadModel(config).to(dtype).eval()


def adapter(model, rank, scale=1.0, seed=0, targets=TARGETS, std=0.3, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    factors = {}
    for name, module in model.named_modules():
        if name.endswith(targets):
            shape = module.weight.shape
            d_out, d_in = shape if isinstance(module, torch.nn.Linear) else reversed(shape)
            A, B = torch.randn(rank, d_in, generator=g) * std, torch.randn(d_out, rank, generator=g) * std
            factors[name] = (A.to(dtype), B.to(dtype), scale)
    return lk.LoraAdapter(factors, task_type="CAUSAL_LM")


def batches(count=3, rows=2, length=7, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [{"input_ids": torch.randint(1, 61, (rows, length), generator=g)} for _ in range(count)]


def logits(model, batch):
    with torch.no_grad():
        return model(input_ids=batch["input_ids"], use_cache=False).logits


def three(model):
    """Adapters of different ranks and scales; the second has only some of the modules."""
    return [
        adapter(model, 3, 0.5, seed=1),
        adapter(model, 5, 2.0, seed=2, targets=FEW),
        adapter(model, 1, -1.0, seed=3, targets=("v_proj", *FEW)),
    ]


def snapshot(model):
    return (
        {name: tensor.clone() for name, tensor in model.state_dict().items()},
        {name: (p.requires_grad, p.grad) for name, p in model.named_parameters()},
        {name: (m.training, len(m._forward_hooks)) for name, m in model.named_modules()},
    )


def assert_unchanged(model, before):
    tensors, flags, modes = snapshot(model)
    assert tensors.keys() == before[0].keys() and all(torch.equal(t, before[0][name]) for name, t in tensors.items())
    assert (flags, modes) == before[1:]


def teacher_batches(model, teacher, count=6):
    """What the model with the adapter `teacher` predicts, as labels."""
    data = batches(count, rows=3, length=12, seed=5)
    with attach(model, {"teacher": teacher}).use(["teacher"]):
        for batch in data:
            predicted = logits(model, batch).argmax(-1)
            batch["labels"] = torch.cat([torch.full((3, 1), -100), predicted[:, :-1]], 1)
    return data
