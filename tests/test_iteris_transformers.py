"""IterIS on transformers: padding, shared inputs, GPT-2's Conv1D, texts, and SmolLM2 itself."""

import copy
import json
import re

import pytest
import torch
import transformers
from merging import factors
from problems import error_ratio

import lorakern as lk
from benchmarks.skills.__main__ import ADAPTERS
from benchmarks.skills.tasks import format_prompt, held_out_items
from lorakern.adapters import LoraFactors
from lorakern.integrations import smollm2
from lorakern.integrations.transformers import attach
from lorakern.merge import iteris
from lorakern.merge.iteris.features import Features
from lorakern.merge.iteris.layers import find_layers
from lorakern.merge.iteris.samples import Batch

LINEAR = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
LINEAR += ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")


pytestmark = pytest.mark.usefixtures("one_thread")


def llama(dtype=torch.float32):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=256,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
    )
    return transformers.LlamaForCausalLM(config).to(dtype).eval()


def adapters_of(model, names, count=2, scale=0.02):
    modules = dict(model.named_modules())
    result = []
    for i in range(count):
        adapter = {}
        for j, name in enumerate(names):
            weight = modules[name].weight
            shape = weight.shape if isinstance(modules[name], torch.nn.Linear) else weight.shape[::-1]
            adapter[name] = LoraFactors(*factors(*shape, 3 + i, scale, seed=100 * i + j))
        result.append(adapter)
    return result


def llama_names():
    return [f"model.layers.{layer}.{name}" for layer in range(2) for name in LINEAR]


def token_batches(seed, shapes=((3, 9), (2, 14))):
    g = torch.Generator().manual_seed(seed)
    return [{"input_ids": torch.randint(1, 250, shape, generator=g)} for shape in shapes]


def padded(batches, width=4, junk=7):
    """The same rows with a mask and other tokens where it is zero, on the right."""
    for batch in batches:
        ids = batch["input_ids"]
        yield {
            "input_ids": torch.nn.functional.pad(ids, (0, width), value=junk),
            "attention_mask": torch.nn.functional.pad(torch.ones_like(ids), (0, width)),
        }


def test_padding_changes_nothing():
    model = llama()
    adapters = adapters_of(model, llama_names())
    plain = [token_batches(1), token_batches(2)]
    whole = iteris.solve(model, adapters, plain, iterations=2, alpha=1e-4)
    for junk in (7, 200):
        masked = [list(padded(batches, junk=junk)) for batches in plain]
        other = iteris.solve(model, adapters, masked, iterations=2, alpha=1e-4)
        assert whole.objectives == pytest.approx(other.objectives, rel=1e-3)
        for name, update in whole.updates.items():
            assert error_ratio(other.updates[name], update) < 1e-3
    unmasked = [[{"input_ids": b["input_ids"]} for b in padded(batches)] for batches in plain]
    other = iteris.solve(model, adapters, unmasked, iterations=2, alpha=1e-4)
    assert max(error_ratio(other.updates[name], update) for name, update in whole.updates.items()) > 0.05


def test_layers_of_one_input_share_their_sums_and_those_of_like_inputs_do_not():
    model = llama()
    adapters = {"a": adapters_of(model, llama_names())[0]}
    layers = find_layers("test", model, adapters)
    features = Features("test", model, adapters, layers)
    with features.running():
        groups = features.groups(Batch((), token_batches(1)[0], None))
    ends = [[layer.name.rpartition(".")[2] for layer in group] for group in groups]
    assert ends == 2 * [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]


class Overwriting(torch.nn.Module):
    """Gives one tensor to three layers, and overwrites it between the second and the third and at the end."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = (torch.nn.Linear(6, 5) for _ in range(3))

    def forward(self, x):
        x = x.clone()
        y = self.a(x) + self.b(input=x)
        x += y.sum(-1, keepdim=True)
        y = y + self.c(x)
        x.zero_()
        return y


def test_a_tensor_that_is_overwritten_is_two_inputs():
    model = Overwriting()
    adapters = adapters_of(model, "abc", scale=1.0)
    samples = [[torch.randn(30, 6)], [torch.randn(20, 6)]]
    layers = find_layers("test", model, {"a": adapters[0]})
    features = Features("test", model, {"a": adapters[0]}, layers)
    with features.running():
        groups = features.groups(Batch((samples[0][0],), {}, None))
    assert [[layer.name for layer in group] for group in groups] == [["a", "b"], ["c"]]
    solution = iteris.regmean(model, adapters, samples)
    X = []
    for adapter, (x,) in zip(adapters, samples, strict=True):
        y = sum(model.get_submodule(n)(x) + x @ (s * B @ A).T for n, (A, B, s) in adapter.items() if n != "c")
        X.append((x + y.sum(-1, keepdim=True)).detach().double())
    above = sum((s * B @ A).double() @ x.T @ x for x, (A, B, s) in zip(X, (a["c"] for a in adapters), strict=True))
    assert error_ratio(solution.updates["c"], above @ torch.linalg.inv(sum(x.T @ x for x in X))) < 1e-4


def test_inference_tensors_are_taken_too():
    model = torch.nn.Sequential(torch.nn.Linear(6, 5))
    (adapter,) = adapters_of(model, ["0"], count=1, scale=1.0)
    with torch.inference_mode():
        solution = iteris.solve(model, [adapter], [[torch.randn(30, 6)]], iterations=2)
    A, B, scale = adapter["0"]
    assert error_ratio(solution.updates["0"], scale * B @ A) < 1e-3
    assert not solution.updates["0"].is_inference()


class Bytes:
    """One token a byte."""

    pad_token_id = None
    eos_token_id = 3

    def __call__(self, texts, truncation, max_length):
        return {"input_ids": [list(text.encode())[:max_length] for text in texts]}


def test_texts_and_files_and_batches_are_the_same_samples(tmp_path):
    model = llama()
    adapters = adapters_of(model, llama_names()[:3])
    texts = [["say a", "or b, longer", "c"], ["what is d?", "e", "f?"]]
    options = {"iterations": 2, "alpha": 1e-4, "tokenizer": Bytes(), "batch_size": 2, "max_length": 8}
    solution = iteris.solve(model, adapters, texts, **options)
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts[0]))
    items = [json.dumps({"prompt": text[:1], "answer": text[1:], "id": 3}) for text in texts[1]]
    (tmp_path / "b.jsonl").write_text("\n\n".join(items) + "\n")
    files = iteris.solve(model, adapters, [tmp_path / "a.jsonl", str(tmp_path / "b.jsonl")], **options)
    batches = [
        [{"input_ids": torch.tensor([list(t.encode())[:8]]), "labels": None} for t in source] for source in texts
    ]
    single = iteris.solve(model, adapters, batches, iterations=2, alpha=1e-4)
    for name, update in solution.updates.items():
        assert torch.equal(files.updates[name], update)
        assert error_ratio(single.updates[name], update) < 1e-3
    with pytest.raises(lk.LorakernError, match=r"samples\[0\], item 1: it must be a text"):
        iteris.solve(model, adapters, [["a", ""], ["b"]], **options)


def test_one_adapter_is_returned_for_conv1d_too():
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=97, n_positions=32, n_embd=12, n_layer=2, n_head=3, tie_word_embeddings=False
    )
    model = transformers.GPT2LMHeadModel(config).eval()
    names = [f"transformer.h.{i}.{name}" for i in range(2) for name in ("attn.c_attn", "mlp.c_proj")]
    adapters = adapters_of(model, names, count=1)
    g = torch.Generator().manual_seed(1)
    samples = [[{"input_ids": torch.randint(0, 97, (4, 20), generator=g)}]]
    solution = iteris.solve(model, adapters, samples, iterations=2, alpha=1e-5)
    for name in names:
        A, B, scale = adapters[0][name]
        assert error_ratio(solution.updates[name], scale * B @ A) < 1e-3
    adapter, _ = solution.adapter(3)
    assert adapter.config.fan_in_fan_out
    folded = solution.fold(copy.deepcopy(model))
    with attach(model, {"m": adapter}).use(["m"]), torch.no_grad():
        assert torch.allclose(model(**samples[0][0]).logits, folded(**samples[0][0]).logits, atol=1e-4)


def test_a_bfloat16_model_fits_better_after_iterating_and_stays_bfloat16():
    model = llama(torch.bfloat16)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    adapters = adapters_of(model, llama_names(), count=3, scale=0.05)
    samples = [token_batches(i, ((8, 12), (8, 12))) for i in range(3)]
    solution = iteris.solve(model, adapters, samples, iterations=4, alpha=1e-5)
    assert solution.objectives[-1] < solution.objectives[0]
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert {p.dtype for p in solution.fold(copy.deepcopy(model)).parameters()} == {torch.bfloat16}


def test_masks_of_other_sizes_are_refused():
    model = Masked()
    adapters = adapters_of(model, ["layer"])
    bad = {"x": torch.ones(2, 3, 6), "attention_mask": torch.tensor([[1, 0], [1, 1]])}
    with pytest.raises(lk.LorakernError, match=r"'layer' is given \(2, 3, 6\).*\(2, 2\)"):
        iteris.solve(model, adapters, [[bad], [bad]])


class Masked(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(6, 5)

    def forward(self, x, attention_mask):
        return self.layer(x)


def test_smollm2_with_three_skills():
    model, tokenizer = smollm2.load()
    names = ("roman", "reverse_words", "iso_date")
    early = re.compile(r"model\.layers\.[01]\..*")
    adapters = [
        {module: f for module, f in lk.LoraAdapter.load(ADAPTERS / name).items() if early.fullmatch(module)}
        for name in names
    ]
    texts = [[format_prompt(prompt) + answer for prompt, answer in held_out_items(name, 2)] for name in names]
    solution = iteris.solve(model, adapters, texts, iterations=3, alpha=1e-6, tokenizer=tokenizer)
    assert set(solution.updates) == set().union(*adapters)
    # the first layer's input is the same in all models, and nothing of it changes after the first sweep
    first = "model.layers.0.self_attn.q_proj"
    assert solution.module_objectives[0][first] == pytest.approx(solution.module_objectives[2][first], rel=1e-3)
    assert solution.objectives[2] < solution.objectives[0]
