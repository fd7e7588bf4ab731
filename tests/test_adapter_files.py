"""Adapters that stay in their file, and the files of kohya and diffusers."""

import json
import math
import os
import pickle
import subprocess
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from adapter_builders import CONFIG, WEIGHTS, Chain, assert_same, factors, refused, small, write
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from lorakern.adapters import LoraAdapter, check_same_base, open_adapter
from lorakern.adapters.factors import all_finite
from lorakern.errors import LorakernError


def test_opened_adapter_is_the_loaded_one(tmp_path):
    small(2.0).save(tmp_path)
    for path in (tmp_path, str(tmp_path), tmp_path / WEIGHTS):
        with open_adapter(path) as opened:
            loaded = LoraAdapter.load(path)
            assert_same(opened, loaded)
            assert opened.config == loaded.config and opened.path == loaded.path == Path(path)
            assert opened.shapes() == {"layers.0.proj": (2, 8, 6), "layers.1.proj": (2, 8, 6)}
            assert "layers.1.proj" in opened and "layers.2.proj" not in opened and len(opened) == 2
            assert repr(opened) == f"AdapterFile(2 modules, path {path})"
            with pytest.raises(KeyError):
                opened["layers.2.proj"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_finite_is_what_torch_says_it_is(dtype):
    most = torch.finfo(dtype).max
    for numel in (1, 7, 64, 10_000):
        good = torch.linspace(-1, 1, numel, dtype=torch.float64).mul(most).to(dtype)
        assert good.isfinite().all() and all_finite(good[:, None]) and all_finite(good[None].expand(3, numel))
        for value in (torch.nan, -torch.nan, torch.inf, -torch.inf):
            for place in {0, numel // 2, numel - 1}:
                bad = good.clone()
                bad[place] = value
                assert not all_finite(bad) and not all_finite(bad[:, None]) and not all_finite(bad.flip(0))


def test_every_read_is_a_fresh_copy_and_a_closed_file_says_so(tmp_path):
    small(2.0).save(tmp_path)
    opened = open_adapter(tmp_path)
    first = opened["layers.0.proj"]
    first.A.zero_()
    assert opened["layers.0.proj"].A.eq(2).all()
    opened.close()
    opened.close()
    with pytest.raises(LorakernError, match="closed"):
        opened["layers.0.proj"]
    assert first.B.eq(2).all()


def test_files_are_closed_with_their_adapters(tmp_path):
    small().save(tmp_path)
    script = (
        "import os, sys; from lorakern.adapters import LoraAdapter, open_adapter\n"
        "before = len(os.listdir('/proc/self/fd'))\n"
        "adapters = [LoraAdapter.load(sys.argv[1]) for _ in range(20)]\n"
        "for _ in range(20): open_adapter(sys.argv[1])\n"
        "for _ in range(20):\n"
        "    with open_adapter(sys.argv[1]) as adapter: adapter['layers.0.proj']\n"
        "assert len(os.listdir('/proc/self/fd')) == before\n"
    )
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, "-W", "error", "-c", script, str(tmp_path)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and not done.stderr, done.stderr


def test_one_tensor_of_a_loaded_adapter_does_not_take_the_file_along(tmp_path):
    LoraAdapter({"a": factors(2, 8, 6, 1.0), "b": factors(64, 900, 900, 1.0)}).save(tmp_path)
    tensor = LoraAdapter.load(tmp_path)["a"].A
    assert tensor.untyped_storage().nbytes() == 64 and len(pickle.dumps(tensor)) < 2000


def test_an_opened_adapter_is_read_as_it_was(tmp_path):
    small(1.0).save(tmp_path)
    with open_adapter(tmp_path) as opened:
        small(2.0).save(tmp_path)
        assert_same(opened, small(1.0))
        with pytest.raises(LorakernError, match="was replaced while it was read"):
            opened.map()  # maps by name
    assert_same(LoraAdapter.load(tmp_path), small(2.0))


def test_not_finite_is_told_when_the_module_is_read(tmp_path):
    adapter = small()
    adapter["layers.1.proj"].B[0, 0] = math.nan
    good, bad = adapter.items()
    adapter = LoraAdapter({good[0]: (torch.ones(2, 8), torch.ones(6, 2), 1), bad[0]: bad[1]})
    adapter.save(tmp_path)
    with open_adapter(tmp_path) as opened:
        assert opened["layers.0.proj"].A.eq(1).all()
        with pytest.raises(LorakernError, match=rf"{WEIGHTS}: lora_B of layers.1.proj has 1 values"):
            opened["layers.1.proj"]
    with open_adapter(tmp_path, check_finite=False) as opened:
        assert opened["layers.1.proj"].B.isnan().sum() == 1


def test_a_file_cut_while_it_is_open(tmp_path):
    small().save(tmp_path)
    with open_adapter(tmp_path) as opened:
        os.truncate(tmp_path / WEIGHTS, (tmp_path / WEIGHTS).stat().st_size - 8)
        assert opened["layers.0.proj"].A.eq(1).all()
        with pytest.raises(LorakernError, match=f"{WEIGHTS}: the file was cut short while it was read"):
            opened["layers.1.proj"]


def test_an_adapter_replaced_while_it_is_opened(tmp_path, monkeypatch):
    """The config of one adapter with the tensors of the next would have the wrong scale."""
    small(1.0).save(tmp_path)
    small(2.0).save(tmp_path / "next")
    opening = Path.open

    def open_and_replace(file, *args, **kwargs):
        stream = opening(file, *args, **kwargs)
        if file == tmp_path / CONFIG:
            monkeypatch.undo()
            for name in (WEIGHTS, CONFIG):
                (tmp_path / "next" / name).replace(tmp_path / name)
        return stream

    monkeypatch.setattr(Path, "open", open_and_replace)
    refused(tmp_path, "was replaced while it was opened", load=open_adapter)
    assert_same(LoraAdapter.load(tmp_path), small(2.0))


def kohya(modules, alpha=torch.float32, prefix="lora_unet_"):
    """The tensors of a kohya file."""
    tensors = {}
    for name, (a, b, scale) in modules.items():
        flat = prefix + name.replace(".", "_")
        tensors |= {f"{flat}.lora_down.weight": a, f"{flat}.lora_up.weight": b}
        tensors[f"{flat}.alpha"] = torch.tensor(scale * a.shape[0]).to(alpha)
    return tensors


def chain(scale=1.5):
    return {n: factors(2 + i, d_in, d_out, scale) for i, (n, d_in, d_out) in enumerate(Chain.SHAPES)}


@pytest.mark.parametrize("alpha", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int64])
def test_kohya(tmp_path, alpha):
    file = tmp_path / "style.safetensors"
    modules = chain(2.0)
    save_file(kohya(modules, alpha), file)
    flat = {f"lora_unet_{name.replace('.', '_')}": value for name, value in modules.items()}
    expected = LoraAdapter(dict(sorted(flat.items())))
    for load in (LoraAdapter.load, open_adapter):
        adapter = load(file)
        assert dict(adapter).keys() == flat.keys() and adapter.path == file
        assert_same(LoraAdapter({name: adapter[name] for name in expected}), expected)
        assert adapter.config.base_model_name_or_path is None
        named = load(file, modules=["", "layers", "not.in.it", *modules])
        assert set(named) == set(modules)
        assert all(torch.equal(named[name].B, value[1]) for name, value in modules.items())


def test_kohya_without_alpha_and_with_one_of_one_element(tmp_path):
    file = tmp_path / "style.safetensors"
    tensors = kohya({"a": factors(3, 5, 7, 1.0), "b": factors(4, 5, 7, 1.0)}, prefix="lora_te_")
    del tensors["lora_te_a.alpha"]
    tensors["lora_te_b.alpha"] = torch.tensor([6.0])
    save_file(tensors, file)
    scales = {name: value.scale for name, value in LoraAdapter.load(file).items()}
    assert scales == {"lora_te_a": 1.0, "lora_te_b": 1.5}


@pytest.mark.parametrize(
    "key, name",
    [
        ("lora_unet_down_blocks_0_to_q", "down_blocks.0.to_q"),
        ("lora_unet_down_blocks_0_to_q", "unet.down_blocks.0.to_q"),
        ("lora_unet_blocks_0_to_q", "diffusion_model.blocks.0.to_q"),
        ("lora_unet_blocks_0_to_q", "transformer.blocks.0.to_q"),
        ("lora_te_text_model_q", "text_encoder.text_model.q"),
        ("lora_te1_text_model_q", "text_encoder.text_model.q"),
        ("lora_te2_text_model_q", "text_encoder_2.text_model.q"),
        ("lora_te3_q", "q"),
        ("transformer.blocks.0.to_q", "blocks.0.to_q"),
        ("text_encoder_2.q", "q"),
        ("unet.to_q", "unet.to_q"),
        ("lora_unet_x", "lora_unet_x"),
    ],
)
def test_names_that_a_file_is_resolved_to(tmp_path, key, name):
    file = tmp_path / "style.safetensors"
    a, b, _ = factors(2, 8, 6, 1.0)
    save_file({f"{key}.lora_A.weight": a, f"{key}.lora_B.weight": b}, file)
    assert list(LoraAdapter.load(file)) == [key]
    assert list(LoraAdapter.load(file, modules=["other", name, "text_encoder.other"])) == [name]


def test_names_that_cannot_be_resolved(tmp_path):
    file = tmp_path / "style.safetensors"
    modules = {"a.b": factors(2, 8, 6, 1.0)}
    save_file(kohya(modules, prefix="lora_te1_") | kohya({"a.b": factors(3, 8, 6, 1.0)}, prefix="lora_te2_"), file)
    refused(file, str(file), "lora_te1_a_b", "no name in modules is", modules=["a.c"])
    refused(file, str(file), "2 of the names in modules are: ['a.b', 'a_b']", modules=["a_b", "a.b"])
    refused(file, str(file), "lora_te2_a_b and lora_te1_a_b are both a.b", "name the components", modules=["a.b"])
    refused(file, "got the string 'a.b'", modules="a.b")
    refused(file, "modules: a module path must be", modules=["a..b"])
    refused(file, "modules: a module path must be", modules=[3])
    both = ["text_encoder.a.b", "text_encoder_2.a.b"]
    assert sorted(LoraAdapter.load(file, modules=both)) == both


@pytest.mark.parametrize("use_rslora", [False, True])
def test_diffusers_file_with_metadata_has_the_scales_of_peft(tmp_path, use_rslora):
    """Alpha is only in the metadata there: to take the rank for it would give another scale."""
    peft = pytest.importorskip("peft")
    patterns = dict(rank_pattern={"layers.11.proj": 5}, alpha_pattern={r"layers\.1\.proj": 9})
    config = peft.LoraConfig(
        r=3,
        lora_alpha=7,
        use_rslora=use_rslora,
        target_modules=["proj", "out_proj"],
        init_lora_weights=False,
        **patterns,
    )
    model = peft.get_peft_model(Chain(), config)
    tensors, fields = {}, {}
    for component in ("transformer", "text_encoder"):
        for key, tensor in peft.get_peft_model_state_dict(model).items():
            tensors[component + key.removeprefix("base_model.model")] = tensor.clone()
        fields |= {f"{component}.{name}": value for name, value in config.to_dict().items()}
    fields = {k: sorted(v) if isinstance(v, set) else v for k, v in fields.items()}
    file = tmp_path / "pytorch_lora_weights.safetensors"
    save_file(tensors, file, metadata={"format": "pt", "lora_adapter_metadata": json.dumps(fields)})

    adapter = LoraAdapter.load(file)
    layers = {n: m for n, m in model.base_model.model.named_modules() if hasattr(m, "lora_A")}
    assert set(adapter) == {f"{c}.{name}" for c in ("transformer", "text_encoder") for name in layers}
    for name, layer in layers.items():
        got = adapter[f"transformer.{name}"]
        assert got.scale == layer.scaling["default"] and torch.equal(got.A, layer.lora_A["default"].weight)
    assert len({value.scale for value in adapter.values()}) == 3

    refused(tmp_path, f"there is no {CONFIG} in it; did you mean {file}?")
    alpha = {"transformer.layers.1.proj.alpha": torch.tensor(3.0)}
    save_file(tensors | alpha, file, metadata={"lora_adapter_metadata": json.dumps(fields)})
    refused(file, "alphas both in the metadata", "transformer.layers.1.proj.alpha")
    only = {name: value for name, value in fields.items() if name.startswith("transformer.")}
    save_file(tensors, file, metadata={"lora_adapter_metadata": json.dumps(only)})
    refused(file, "no config of text_encoder")
    for text, says in [
        ("{", "not valid JSON"),
        ("[]", "must be a JSON object"),
        (json.dumps(fields | {"transformer.use_dora": True}), "use_dora = True is not supported"),
        (json.dumps(fields | {"transformer.r": 4}), "r and rank_pattern give layers.1.proj rank 4"),
        (json.dumps(fields | {"transformer.rank_pattern": {"(a+)+": 4}}), "not a usable regular expression"),
        ('{"transformer.r": 3, "transformer.r": 4}', "the key 'transformer.r' twice"),
    ]:
        save_file(tensors, file, metadata={"lora_adapter_metadata": text})
        refused(file, str(file), says)


@settings(deadline=None, max_examples=25)
@given(
    ranks=st.lists(st.integers(1, 9), min_size=4, max_size=4),
    alphas=st.lists(st.none() | st.sampled_from([0.5, 1.0, 3.0, 16.0, 20.25]), min_size=4, max_size=4),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32]),
    resolve=st.booleans(),
)
def test_kohya_in_and_peft_out(tmp_path_factory, ranks, alphas, dtype, resolve):
    peft = pytest.importorskip("peft")
    folder = tmp_path_factory.mktemp("kohya")
    tensors, dense = {}, Chain()
    for i, ((name, d_in, d_out), rank, alpha) in enumerate(zip(Chain.SHAPES, ranks, alphas, strict=True)):
        a, b, _ = factors(rank, d_in, d_out, 1.0, dtype, seed=i)
        key = f"lora_unet_{name.replace('.', '_')}" if i % 2 else f"unet.{name}"
        tensors |= {f"{key}.lora_down.weight": a, f"{key}.lora_up.weight": b}
        if alpha is not None:
            tensors[f"{key}.alpha"] = torch.tensor(alpha, dtype=dtype)
        scale = (rank if alpha is None else alpha) / rank
        dense.get_submodule(name).weight.data += scale * b.float() @ a.float()
    save_file(tensors, folder / "style.safetensors")
    names = [name for name, *_ in Chain.SHAPES]
    adapter = LoraAdapter.load(folder / "style.safetensors", modules=names if resolve else None)
    assert (set(adapter) == set(names)) == resolve
    adapter.save(folder / "peft")
    assert_same(LoraAdapter.load(folder / "peft"), adapter)
    if resolve:
        model = peft.PeftModel.from_pretrained(Chain(), folder / "peft")
        x = torch.randn(4, 7)
        with torch.no_grad():
            error = (model(x) - dense(x)).norm() / dense(x).norm()
        assert error < 1e-5


def test_modules_of_a_peft_file_keep_their_names(tmp_path):
    small().save(tmp_path)
    assert list(LoraAdapter.load(tmp_path, modules=["other"])) == ["layers.0.proj", "layers.1.proj"]


def test_a_config_beside_the_file_makes_it_pefts(tmp_path):
    save_file(kohya({"a": factors(2, 8, 6, 1.0)}), write(tmp_path) / "style.safetensors")
    refused(tmp_path / "style.safetensors", "move the file to a folder without adapter_config.json")
    (tmp_path / CONFIG).unlink()
    assert list(LoraAdapter.load(tmp_path / "style.safetensors")) == ["lora_unet_a"]
    refused(tmp_path / WEIGHTS, f"there is no {CONFIG} beside it", "keeps alpha there")


def based(path, base):
    adapter = LoraAdapter({"a": factors(2, 8, 6, 1.0)}, base_model_name_or_path=base)
    adapter.save(path)
    return LoraAdapter.load(path)


def test_mixed_base_models(tmp_path):
    one, same, none, other = (
        based(tmp_path / str(i), base) for i, base in enumerate(["my/model", "my/model", None, "another/model"])
    )
    assert check_same_base([]) is None and check_same_base([none]) is None
    assert check_same_base([none, one, same]) == "my/model"
    with pytest.raises(LorakernError) as error:
        check_same_base([none, one, same, other])
    for words in (str(tmp_path / "0"), str(tmp_path / "3"), "'my/model'", "'another/model'", "allow_mixed=True"):
        assert words in str(error.value)
    assert check_same_base([one, other], allow_mixed=True) == "my/model"
    with open_adapter(tmp_path / "3") as opened, pytest.raises(LorakernError, match="adapter 0"):
        check_same_base([LoraAdapter({"a": one["a"]}, base_model_name_or_path="x"), opened])
