"""LoraAdapter against PEFT itself: scales, deltas, logits, round trips, and saves that are cut short."""

import copy
import json
import os
import pickle
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from adapter_builders import assert_same, small
from hypothesis import given, settings
from hypothesis import strategies as st

from lorakern.adapters import LoraAdapter, LoraFactors
from lorakern.adapters.patterns import exact_key, resolve
from lorakern.errors import LorakernError

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
from peft.utils.other import get_pattern_key  # noqa: E402

SHIPPED = sorted(
    config.parent
    for config in (Path(__file__).parents[1] / "benchmarks" / "skills" / "adapters").glob("*/adapter_config.json")
)
LLAMA_TARGETS = ["q_proj", "k_proj", "down_proj"]


pytestmark = pytest.mark.usefixtures("one_thread")


def llama():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=61,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=12,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    return transformers.LlamaForCausalLM(config).eval()


def gpt2():
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=61, n_positions=32, n_embd=16, n_layer=2, n_head=2)
    return transformers.GPT2LMHeadModel(config).eval()


def trained(base, dtype=torch.float32, **config):
    """A PEFT model whose adapter is not a no-op."""
    model = peft.get_peft_model(base, peft.LoraConfig(task_type="CAUSAL_LM", **config))
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = (torch.randn(parameter.shape) * 0.3).to(dtype)
    return model.eval()


def logits(model):
    with torch.no_grad():
        return model(torch.arange(20).reshape(2, 10)).logits


def lora_layers(model):
    layers = {
        name: layer for name, layer in model.base_model.model.named_modules() if hasattr(layer, "get_delta_weight")
    }
    assert layers
    return layers


CONFIGS = {
    "plain": dict(r=4, lora_alpha=7),
    "rslora": dict(r=5, lora_alpha=7, use_rslora=True),
    "rank_pattern": dict(r=4, lora_alpha=6, rank_pattern={"q_proj": 3, r"layers\.1\.mlp\.down_proj": 7}),
    "alpha_pattern": dict(r=4, lora_alpha=6, alpha_pattern={"^model.layers.1.self_attn.q_proj": 5, "k_proj": 1.5}),
    "both_rslora": dict(
        r=4,
        lora_alpha=6,
        use_rslora=True,
        rank_pattern={r".*layers\.\d+\.self_attn\.(q|k)_proj": 6, "q_proj": 2},
        alpha_pattern={"layers.11.self_attn.q_proj": 1, r"layers.1\d.self_attn.q_proj": 3, "q_proj": 9},
    ),
    "some_layers": dict(r=4, lora_alpha=8, layers_to_transform=[0, 11], layers_pattern="layers"),
    "gaussian": dict(r=4, init_lora_weights="gaussian"),
    "orthogonal": dict(r=4, init_lora_weights="orthogonal"),
    "mica": dict(r=2, init_lora_weights="mica"),
    "bfloat16": dict(r=4, dtype=torch.bfloat16),
    "dropout": dict(r=4, lora_dropout=0.25),
    "target_regex": dict(r=4, target_modules=r".*\.(?:[0-9]{1,})\.self_attn\.[qv]_proj"),
}
MODELS = [(llama, {"target_modules": LLAMA_TARGETS} | config, name) for name, config in CONFIGS.items()] + [
    (gpt2, dict(r=4, lora_alpha=7, target_modules=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True), "gpt2"),
    (
        gpt2,
        dict(r=3, use_rslora=True, target_modules=["c_fc"], fan_in_fan_out=True, rank_pattern={"c_fc": 5}),
        "gpt2_rs",
    ),
]


@pytest.mark.parametrize("base, config, name", MODELS, ids=[name for *_, name in MODELS])
def test_loaded_adapter_has_pefts_scales_and_deltas_and_saves_back(base, config, name, tmp_path):
    model = trained(base(), **config)
    model.save_pretrained(tmp_path / "peft")
    adapter = LoraAdapter.load(tmp_path / "peft")

    layers = lora_layers(model)
    assert set(adapter) == set(layers)
    for module, (A, B, scale) in adapter.items():
        layer = layers[module]
        assert scale == layer.scaling["default"]
        assert (adapter[module].rank, adapter[module].d_in, adapter[module].d_out) == (
            layer.r["default"],
            layer.in_features,
            layer.out_features,
        )
        delta = (B.float() @ A.float()) * scale
        delta = (delta.T if adapter.config.fan_in_fan_out else delta).to(A.dtype)
        assert torch.equal(delta, layer.get_delta_weight("default"))

    adapter.save(tmp_path / "ours")
    assert_same(adapter, LoraAdapter.load(tmp_path / "ours"))
    theirs, ours = (json.loads((tmp_path / folder / "adapter_config.json").read_text()) for folder in ("peft", "ours"))
    assert theirs == ours
    reloaded = [peft.PeftModel.from_pretrained(base(), tmp_path / folder).eval() for folder in ("peft", "ours")]
    assert torch.equal(logits(reloaded[0]), logits(reloaded[1]))
    if "dtype" not in config:  # PEFT loads bfloat16 factors as float32
        assert torch.equal(logits(model), logits(reloaded[1]))
    assert not torch.equal(logits(base()), logits(reloaded[1]))


def test_first_pattern_of_the_file_wins_and_saving_keeps_the_order(tmp_path):
    """PEFT sorts the patterns when it saves, so what counts on reload is the order of the file, not of the training."""
    model = trained(llama(), r=4, lora_alpha=6, target_modules=["q_proj"])
    model.save_pretrained(tmp_path / "peft")
    file = tmp_path / "peft" / "adapter_config.json"
    patterns = {"q_proj": 9, "layers.11.self_attn.q_proj": 1, "layers.1.self_attn.q_proj": 2}
    for alphas in (patterns, dict(reversed(patterns.items()))):
        config = json.loads(file.read_text()) | {"alpha_pattern": alphas}
        file.write_text(json.dumps(config))
        adapter = LoraAdapter.load(tmp_path / "peft")
        adapter.save(tmp_path / "ours")
        for folder in ("peft", "ours"):
            layers = lora_layers(peft.PeftModel.from_pretrained(llama(), tmp_path / folder))
            assert {name: layer.scaling["default"] for name, layer in layers.items()} == {
                name: factors.scale for name, factors in adapter.items()
            }
    assert adapter["model.layers.11.self_attn.q_proj"].scale == 1 / 4  # the last order; in the first it is 9 / 4


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("base, fan_in_fan_out", [(llama, False), (gpt2, True)], ids=["llama", "gpt2"])
def test_adapter_made_in_memory_loads_in_peft(base, fan_in_fan_out, use_rslora, tmp_path):
    # layers.1 and layers.11 differ in rank and scale, as do modules whose names end alike
    targets = ("q_proj", "down_proj", "c_attn", "mlp.c_proj")
    shapes = {name: layer.weight.shape for name, layer in base().named_modules() if name.endswith(targets)}
    torch.manual_seed(2)
    factors = {}
    for i, (name, shape) in enumerate(shapes.items()):
        d_out, d_in = reversed(shape) if fan_in_fan_out else shape
        rank = (4, 4, 3, 7)[i % 4]
        scale = (0.5, 1 / 3, 0.1, -2.7182818284590455e-5, 0.5)[i % 5]
        factors[name] = (torch.randn(rank, d_in), torch.randn(d_out, rank), scale)
    adapter = LoraAdapter(
        factors,
        base_model_name_or_path="some/base",
        fan_in_fan_out=fan_in_fan_out,
        use_rslora=use_rslora,
        task_type="CAUSAL_LM",
    )
    adapter.save(tmp_path)
    assert adapter.config.r == 4
    assert json.loads((tmp_path / "adapter_config.json").read_text())["base_model_name_or_path"] == "some/base"

    model = peft.PeftModel.from_pretrained(base(), tmp_path).eval()
    layers = lora_layers(model)
    assert set(layers) == set(factors)
    again = LoraAdapter.load(tmp_path)
    dense = base()
    for name, (A, B, scale) in factors.items():
        layer = layers[name]
        assert layer.r["default"] == A.shape[0]
        assert layer.scaling["default"] == again[name].scale
        assert again[name].scale == pytest.approx(scale, rel=2.3e-16, abs=0)
        assert torch.equal(again[name].A, A) and torch.equal(again[name].B, B)
        delta = scale * (B @ A)
        dense.get_submodule(name).weight.data += delta.T if fan_in_fan_out else delta
    error = (logits(model) - logits(dense)).norm() / logits(dense).norm()
    assert error < 1e-5


@pytest.mark.filterwarnings("ignore:PiSSA changes the base")
def test_converted_pissa_is_a_plain_delta(tmp_path):
    base = llama()
    before = base.get_submodule("model.layers.3.self_attn.q_proj").weight.clone()
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights="pissa"))
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path / "initial")
    model.peft_config["default"].init_lora_weights = "pissa"
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data += torch.randn(parameter.shape) * 0.1
    model.save_pretrained(tmp_path / "raw")
    model.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=str(tmp_path / "initial"))

    with pytest.raises(LorakernError, match=r"init_lora_weights = 'pissa'.*path_initial_model_for_weight_conversion"):
        LoraAdapter.load(tmp_path / "raw")
    A, B, scale = LoraAdapter.load(tmp_path / "plain")["model.layers.3.self_attn.q_proj"]
    after = model.merge_and_unload().get_submodule("model.layers.3.self_attn.q_proj").weight
    assert A.shape[0] == 8
    assert torch.allclose(before + scale * B @ A, after, atol=1e-5)
    assert not torch.allclose(before, after, atol=1e-2)


def test_adapter_of_another_name_is_in_a_subfolder(tmp_path):
    base = llama()
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["q_proj"]), adapter_name="poet")
    model.add_adapter("math", peft.LoraConfig(r=4, target_modules=["v_proj"]))
    model.save_pretrained(tmp_path)
    assert LoraAdapter.load(tmp_path / "poet")["model.layers.0.self_attn.q_proj"].rank == 2
    assert LoraAdapter.load(str(tmp_path / "math"))["model.layers.0.self_attn.v_proj"].rank == 4
    with pytest.raises(LorakernError, match=f"did you mean {tmp_path}/math or {tmp_path}/poet"):
        LoraAdapter.load(tmp_path)


NAMES = st.lists(st.sampled_from(["layers", "layer", "1", "11", "q_proj", "aXb", "a.b", "a+b", "(x)", "-"]), min_size=1)
PATTERNS = st.sampled_from(
    ["1", "11", "q_proj", "layers.1", r"layers\.1", ".*", "(q|k)_proj", "^layers", "a.b", "a+b", "1.q", r"\d+", "-"]
)


@given(st.lists(NAMES.map(".".join), min_size=1, max_size=6), st.dictionaries(PATTERNS, st.integers(1, 99), max_size=5))
def test_patterns_resolve_as_in_peft(names, patterns):
    ours = resolve(patterns, set(names), 0, "rank_pattern", "file")
    assert ours == {name: patterns.get(get_pattern_key(patterns.keys(), name), 0) for name in names}


@pytest.mark.parametrize(
    "name, patterns, expected",
    [
        ("layers.11", {"1": 1}, 0),
        ("layers.11", {"11": 1}, 1),
        ("layers.11", {"s.11": 1}, 0),
        ("layers.1.q", {"layers.1": 1}, 0),
        ("layers.1.q", {"^q": 1, "q": 2, "layers.1.q": 3}, 2),
        ("a+b", {"a+b": 1}, 1),  # no match as an expression, but PEFT looks the name itself up at last
        ("x.a+b", {"a+b": 1}, 0),
        ("a+b", {"a+b": 1, r"a\+b": 2}, 2),
    ],
)
def test_pattern_corner_cases(name, patterns, expected):
    assert patterns.get(get_pattern_key(patterns.keys(), name), 0) == expected
    assert resolve(patterns, [name], 0, "rank_pattern", "file") == {name: expected}


@given(st.lists(NAMES.map(".".join), min_size=1, max_size=8, unique=True))
def test_exact_keys_name_one_module(names):
    values = {name: i for i, name in enumerate(names)}
    patterns = {exact_key(name): i for name, i in values.items()}
    for name in names:
        assert patterns[get_pattern_key(patterns.keys(), name)] == values[name]
        extended = f"{name}.{name}"
        if extended not in values:
            assert get_pattern_key(patterns.keys(), extended) == extended  # no hit


DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
SCALES = st.floats(-1e300, 1e300, allow_subnormal=False).filter(lambda scale: scale == 0 or abs(scale) > 1e-290)
SIZES = st.integers(1, 9)
MODULES = st.dictionaries(
    NAMES.map(".".join), st.tuples(SIZES, SIZES, SIZES, SCALES, st.sampled_from(DTYPES)), min_size=1, max_size=6
)


@settings(deadline=None, max_examples=50)
@given(modules=MODULES, use_rslora=st.booleans(), seed=st.integers(0, 99))
def test_round_trip(tmp_path_factory, modules, use_rslora, seed):
    folder = tmp_path_factory.mktemp("adapter")
    generator = torch.Generator().manual_seed(seed)
    factors = {
        name: LoraFactors(
            torch.randn(d_in, rank, generator=generator).to(dtype).T,  # not contiguous
            torch.randn(d_out, rank, generator=generator).to(dtype),
            scale,
        )
        for name, (rank, d_in, d_out, scale, dtype) in modules.items()
    }
    adapter = LoraAdapter(factors, use_rslora=use_rslora)
    adapter.save(folder)
    once = LoraAdapter.load(folder)
    assert set(once) == set(factors)
    assert once.config == adapter.config
    for name, (A, B, scale) in factors.items():
        assert torch.equal(once[name].A, A) and torch.equal(once[name].B, B)
        assert once[name].scale == pytest.approx(scale, rel=2.3e-16, abs=0)
    files = [(folder / file).read_bytes() for file in sorted(os.listdir(folder))]
    once.save(folder)  # over the files that its tensors are mapped from
    assert files == [(folder / file).read_bytes() for file in sorted(os.listdir(folder))]
    assert_same(once, LoraAdapter.load(folder))


@pytest.mark.parametrize("use_rslora", [False, True])
def test_scales_of_whole_alphas_come_back_exactly(use_rslora):
    """49 * (1 / 49) is not 1 in float64, yet the config is to say 1."""
    for rank in range(1, 65):
        for alpha in (1, 3, 7, 10, 16, 23, 64, 100):
            scale = alpha / (rank**0.5 if use_rslora else rank)
            factors = {"a": (torch.ones(rank, 1), torch.ones(1, rank), scale)}
            config = LoraAdapter(factors, use_rslora=use_rslora).config
            assert config.scales({"a": rank}, "file") == {"a": scale}
            assert config.lora_alpha == alpha and isinstance(config.lora_alpha, int)


def test_save_keeps_shared_and_non_default_tensors(tmp_path):
    storage = torch.arange(64.0)
    A = storage[:16].view(2, 8).requires_grad_()
    adapter = LoraAdapter({"a": (A, storage[8:20].view(6, 2), 1), "b": (A, storage[::5][:10].view(5, 2), 2)})
    adapter.save(tmp_path)
    assert_same(adapter, LoraAdapter.load(tmp_path))
    assert LoraAdapter.load(tmp_path / "adapter_model.safetensors")["b"].scale == 2.0


def test_tensors_are_private_views_of_the_file(tmp_path):
    small().save(tmp_path)
    adapter = LoraAdapter.load(tmp_path)
    maps = Path("/proc/self/maps")
    if maps.exists():
        assert str(tmp_path / "adapter_model.safetensors") in maps.read_text()
    adapter["layers.0.proj"].A.zero_()
    assert LoraAdapter.load(tmp_path)["layers.0.proj"].A.eq(1).all()


@pytest.mark.parametrize("padding", range(8))
def test_unaligned_file_loads_aligned_tensors(tmp_path, padding):
    small().save(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = content[8 : 8 + length] + b" " * padding
    file.write_bytes(len(header).to_bytes(8, "little") + header + content[8 + length :])
    adapter = LoraAdapter.load(tmp_path)
    assert_same(adapter, small())
    assert all(tensor.data_ptr() % 4 == 0 for A, B, _ in adapter.values() for tensor in (A, B))


class Crash(BaseException):
    pass


SAVE_STEPS = ["fsync", "fsync"] + 4 * ["fsync", "replace"] + ["fsync"]


@pytest.mark.parametrize("step", range(len(SAVE_STEPS) + 1))
def test_a_save_cut_short_leaves_the_old_adapter(tmp_path, monkeypatch, step):
    """Stop before the step-th sync or rename: two files synced, two moved away and two moved in, config out first."""
    small(1.0).save(tmp_path)
    calls = []

    def stopping(function):
        def wrapper(*args, **kwargs):
            calls.append(function.__name__)
            if len(calls) == step + 1:
                raise Crash
            return function(*args, **kwargs)

        return wrapper

    monkeypatch.setattr(Path, "replace", stopping(Path.replace))
    monkeypatch.setattr(os, "fsync", stopping(os.fsync))
    if step < len(SAVE_STEPS):
        with pytest.raises(Crash):
            small(2.0).save(tmp_path)
    else:
        small(2.0).save(tmp_path)
        assert calls == SAVE_STEPS
    monkeypatch.undo()

    assert sorted(os.listdir(tmp_path)) == ["adapter_config.json", "adapter_model.safetensors"]
    assert_same(LoraAdapter.load(tmp_path), small(1.0 if step < len(SAVE_STEPS) else 2.0))


def test_mapping_pickle_and_repr(tmp_path):
    adapter = small()
    assert list(adapter) == ["layers.0.proj", "layers.1.proj"] and len(adapter) == 2
    assert adapter == adapter and adapter != small() and adapter in {adapter}
    for twin in (pickle.loads(pickle.dumps(adapter)), copy.deepcopy(adapter)):
        assert_same(adapter, twin)
        assert twin.config == adapter.config
    with pytest.raises(KeyError):
        adapter["layers.2.proj"]
    with pytest.raises(TypeError):
        adapter.config.rank_pattern["x"] = 1
    with pytest.raises(AttributeError):
        adapter.config.r = 1
    assert repr(adapter) == "LoraAdapter(2 modules, rank 2, base None, path None)"


def test_eight_adapters_are_shipped():
    assert len(SHIPPED) >= 8


@pytest.mark.parametrize("folder", SHIPPED, ids=[folder.name for folder in SHIPPED])
def test_shipped_adapter_round_trips(folder, tmp_path):
    adapter = LoraAdapter.load(folder)
    adapter.save(tmp_path)
    assert_same(adapter, LoraAdapter.load(tmp_path))
