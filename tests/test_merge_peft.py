"""Merges beside PEFT's own: the factor-wise methods bit for bit, the others up to rounding, and reload in PEFT."""

import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from merging import assert_update, factors, total, update
from problems import error_ratio

import lorakern as lk
from lorakern.integrations.transformers import attach
from lorakern.merge import module_generator

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

PLACE = "layer"
SKILLS = Path(__file__).parents[1] / "benchmarks" / "skills" / "adapters"


pytestmark = pytest.mark.usefixtures("one_thread")


class OneLayer(torch.nn.Module):
    def __init__(self, d_in=63, d_out=40):
        super().__init__()
        self.layer = torch.nn.Linear(d_in, d_out, bias=False)

    def forward(self, x):
        return self.layer(x)


def llama():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=61,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    return transformers.LlamaForCausalLM(config).eval()


def with_adapters(base, *configs):
    """A PEFT model with trained-looking adapters "0", "1", .."""
    model = peft.get_peft_model(base, configs[0], adapter_name="0")
    for i, config in enumerate(configs[1:], 1):
        model.add_adapter(str(i), config)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape) * 0.3
    return model.eval()


def lora_layers(model):
    layers = {
        name: layer for name, layer in model.base_model.model.named_modules() if hasattr(layer, "get_delta_weight")
    }
    assert layers
    return layers


def read_back(model, name):
    """A PEFT model's adapter as lorakern's factors."""
    return {
        module: (layer.lora_A[name].weight.data, layer.lora_B[name].weight.data, layer.scaling[name])
        for module, layer in lora_layers(model).items()
        if name in layer.lora_A
    }


def config(r=4, alpha=7, targets=(PLACE,), **more):
    return peft.LoraConfig(r=r, lora_alpha=alpha, target_modules=list(targets), **more)


FACTORWISE = {
    "peft_linear": ("linear", {}),
    "peft_ties": ("ties", {"density": 0.3}),
    "peft_ties_frequency": ("ties", {"density": 0.5, "majority_sign_method": "frequency"}),
    "peft_magnitude_prune": ("magnitude_prune", {"density": 0.4}),
    "peft_dare_linear": ("dare_linear", {"density": 0.6}),
    "peft_dare_ties": ("dare_ties", {"density": 0.7}),
    "peft_dare_ties_frequency": ("dare_ties", {"density": 0.7, "majority_sign_method": "frequency"}),
}


@pytest.mark.parametrize("weights", [[1.0, 1.0, 1.0], [0.5, -0.3, 2.0]])
@pytest.mark.parametrize("name", FACTORWISE)
def test_factorwise_methods_have_pefts_bits(name, weights, monkeypatch):
    combination, options = FACTORWISE[name]
    model = with_adapters(OneLayer(), config(alpha=7), config(alpha=3), config(alpha=4))
    adapters = [read_back(model, name) for name in "012"]
    merge_layer = model.base_model._generalized_task_arithmetic_weighted_adapter

    def seeded(*arguments):
        # after PEFT has made the new adapter, which draws numbers too
        torch.manual_seed(module_generator(9, PLACE).initial_seed())
        return merge_layer(*arguments)

    monkeypatch.setattr(model.base_model, "_generalized_task_arithmetic_weighted_adapter", seeded)
    model.add_weighted_adapter(["0", "1", "2"], weights, "merged", combination_type=combination, **options)
    A, B, scale = read_back(model, "merged")[PLACE]
    ours = lk.merge(adapters, name.removesuffix("_frequency"), weights=weights, seed=9, **options)[PLACE]
    assert scale == ours.scale == 1.0
    assert torch.equal(A, ours.A) and torch.equal(B, ours.B)
    assert A.any() and B.any()


TRUE_UPDATES = {
    "svd": ("svd", {}),
    "ties": ("ties_svd", {"density": 0.3}),
    "magnitude_prune": ("magnitude_prune_svd", {"density": 0.4}),
}


@pytest.mark.parametrize("rank", [None, 40, 5])
@pytest.mark.parametrize("name", TRUE_UPDATES)
def test_methods_on_updates_equal_pefts(name, rank):
    """rank None: the same default as PEFT's; 40: the full rank of the update; different ranks and alphas."""
    combination, options = TRUE_UPDATES[name]
    model = with_adapters(OneLayer(), config(4, 7), config(6, 3), config(2, 4))
    adapters, weights = [read_back(model, name) for name in "012"], [0.5, -0.3, 2.0]
    how = {"combination_type": combination, "svd_rank": rank, **options}
    model.add_weighted_adapter(["0", "1", "2"], weights, "merged", **how)
    theirs = read_back(model, "merged")[PLACE]
    assert_update(lk.merge(adapters, name, weights=weights, rank=rank, **options)[PLACE], update(theirs), 1e-5)


def test_where_peft_loses_the_scale_we_do_not():
    """PEFT gives the merged adapter the first one's use_rslora, so its alpha = r means a scale of sqrt(r)."""
    model = with_adapters(OneLayer(), config(4, 7, use_rslora=True), config(4, 3, use_rslora=True))
    adapters = [read_back(model, name) for name in "01"]
    exact = total(adapters, [1.0, 0.5], PLACE)
    for name in ("cat", "linear", "fedex"):
        assert_update(lk.merge(adapters, name, weights=[1.0, 0.5])[PLACE], exact, 1e-6)


CONFIGS = {
    "plain": dict(r=4, lora_alpha=7),
    "rslora": dict(r=5, lora_alpha=7, use_rslora=True),
    "rank_pattern": dict(r=4, lora_alpha=6, rank_pattern={"q_proj": 3, r"layers\.1\.mlp\.down_proj": 7}),
    "alpha_pattern": dict(r=4, lora_alpha=6, alpha_pattern={"q_proj": 5, r"layers\.1\.self_attn\.k_proj": 1.5}),
    "both_rslora": dict(
        r=4, lora_alpha=6, use_rslora=True, rank_pattern={"q_proj": 2}, alpha_pattern={"layers.1.self_attn.q_proj": 3}
    ),
}
IDENTITIES = [
    "cat",
    "linear",
    "svd",
    "fedex",
    "knots",
    "ties",
    "dare_ties",
    "peft_linear",
    "peft_ties",
    "lorahub_linear",
]


@pytest.mark.parametrize("name", CONFIGS)
def test_one_adapter_is_the_identity_from_file_to_file(name, tmp_path):
    """peft#3761's first test: rslora, rank_pattern and alpha_pattern survive a merge of one adapter."""
    targets = ["q_proj", "k_proj", "down_proj"]
    model = peft.get_peft_model(
        llama(), peft.LoraConfig(target_modules=targets, task_type="CAUSAL_LM", **CONFIGS[name])
    )
    torch.manual_seed(1)
    for key, parameter in model.named_parameters():
        if "lora_" in key:
            parameter.data = torch.randn(parameter.shape) * 0.3
    model.save_pretrained(tmp_path / "one")
    exact = {module: layer.get_delta_weight("default").double() for module, layer in lora_layers(model).items()}
    adapter = lk.LoraAdapter.load(tmp_path / "one")
    for method in IDENTITIES:
        options = {"density": 1.0} if "density" in lk.merge.methods[method].options else {}
        lk.merge([adapter], method, **options).save(tmp_path / method)
        reloaded = lora_layers(peft.PeftModel.from_pretrained(llama(), tmp_path / method))
        assert set(reloaded) == set(exact)
        for module, layer in reloaded.items():
            assert error_ratio(layer.get_delta_weight("default"), exact[module]) < 3e-6


def tokens():
    return torch.arange(20).reshape(2, 10)


@pytest.mark.parametrize("name", ["cat", "svd", "ties", "dare_linear", "knots", "fedex", "peft_linear"])
def test_merged_adapters_give_the_same_outputs_in_peft_and_here(name, tmp_path):
    """Different ranks, scales and modules; the logits of PEFT's reload, of `attach` and of the updates added."""
    modules = {n: m.weight.shape for n, m in llama().named_modules() if n.endswith(("q_proj", "v_proj", "down_proj"))}
    adapters = []
    for i in range(3):
        chosen = [n for j, n in enumerate(modules) if (i + j) % 3]
        adapter = {n: factors(*modules[n], 2 + i, 0.2 * (i + 1), seed=10 * i + j) for j, n in enumerate(chosen)}
        adapters.append(lk.LoraAdapter(adapter, use_rslora=i == 1, task_type="CAUSAL_LM"))
    merged = lk.merge(adapters, name, weights=[0.5, -0.3, 0.4])
    assert set(merged) == set(modules)
    merged.save(tmp_path)

    dense = llama()
    for module, own in merged.items():
        dense.get_submodule(module).weight.data += update(own).float()
    model = llama()
    with torch.no_grad():
        expected = dense(tokens()).logits
        reloaded = peft.PeftModel.from_pretrained(llama(), tmp_path).eval()(tokens()).logits
        with attach(model, {"merged": merged}).use(["merged", "merged"]):
            attached = model(tokens()).logits
        assert error_ratio(model(tokens()).logits, expected) > 0.05
    assert error_ratio(reloaded, expected) < 1e-4
    assert error_ratio(attached, expected) < 1e-4


def test_shipped_skills_merge():
    adapters = [lk.LoraAdapter.load(SKILLS / name) for name in ("email", "clock", "roman")]
    weights = [0.4, 0.4, -0.2]
    merged = lk.merge(adapters, "linear", weights=weights)
    assert set(merged) == {module for adapter in adapters for module in adapter}
    for module in list(merged)[::20]:
        # their dtype rounds the result once
        assert_update(merged[module], total(adapters, weights, module), 1e-2)
