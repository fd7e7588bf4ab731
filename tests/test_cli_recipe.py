"""Recipes of `lorakern merge`: what each parameter is in each module, and what is refused."""

import time
from pathlib import Path

import pytest
import torch
from adapter_builders import assert_same, small
from cli_adapters import LAYERS, adapter, adapter_files, lorakern, result, snapshot, three
from hypothesis import given
from hypothesis import strategies as st

import lorakern as lk
from lorakern.adapters import LoraAdapter
from lorakern.commands.settings import Setting, last_layer


@pytest.fixture
def inputs(tmp_path, monkeypatch):
    """A, B and C in a folder beside that of the recipe, and the current directory elsewhere."""
    (tmp_path / "adapters").mkdir()
    (tmp_path / "recipes").mkdir()
    monkeypatch.chdir(tmp_path)
    return three(tmp_path / "adapters")


def recipe(text, name="recipes/merge.yaml"):
    Path(name).write_text(text)
    return name


def assert_merged(capsys, text, expected):
    """The recipe gives the bits of `expected`."""
    lorakern(capsys, "merge", recipe(text), "-o", "OUT")
    assert adapter_files(Path("OUT"))
    assert_same(LoraAdapter.load("OUT"), LoraAdapter({m: tuple(factors) for m, factors in expected.items()}))


MODELS = """
models:
  - model: ../adapters/A
  - {model: ../adapters/B, parameters: {}}
  - model: ../adapters/C
"""


def test_constants_are_the_arguments_of_merge(inputs, capsys):
    text = """
        merge_method: dare_ties
        models:
          - model: ../adapters/A
            parameters: {weight: 0.5, density: 0.4}
          - model: ../adapters/B
            parameters: {weight: -1}
          - model: ../adapters/C
        parameters: {rank: 3, density: 0.8, majority_sign_method: frequency, normalize: true, weight: 2}
        dtype: bfloat16
        seed: 5
        missing: skip
        base_model: other/base
    """
    options = dict(weights=[0.5, -1, 2], rank=3, normalize=True, dtype=torch.bfloat16, seed=5, missing="skip")
    options |= dict(density=[0.4, 0.8, 0.8], majority_sign_method="frequency")
    expected = lk.merge(inputs, "dare_ties", **options)
    assert_merged(capsys, text, expected)
    assert LoraAdapter.load("OUT").config.base_model_name_or_path == "other/base"


def test_defaults_are_those_of_merge(inputs, capsys):
    assert_merged(capsys, f"merge_method: ties{MODELS}", lk.merge(inputs, "ties"))


def test_a_density_of_one_model_leaves_the_others_the_default(inputs, capsys):
    text = f"merge_method: ties{MODELS}    parameters: {{density: 0.9}}"
    assert_merged(capsys, text, lk.merge(inputs, "ties", density=[0.5, 0.5, 0.9]))


def test_gradients_and_filters(inputs, capsys):
    text = """
        merge_method: ties
        models:
          - model: ../adapters/A
            parameters:
              weight: [0, 1]
              density: [{filter: mlp.up, value: 0.9}, {filter: mlp, value: [0.4, 0.7]}, {value: 0.2}]
          - model: ../adapters/B
            parameters:
              weight: [{filter: self_attn, value: 2}, {filter: "*", value: [1, 0, 1]}]
        parameters:
          density: [1.0, 0.25]
          rank: [1, 4]
    """
    layers = {0: (0.0, 1.0, 1), 1: (1 / 3, 1 / 3, 2), 2: (2 / 3, 1 / 3, 3), 3: (1.0, 1.0, 4)}

    def arguments(module):
        layer = int(module.split(".")[2])
        first, second, rank = layers[layer]
        own = 0.9 if "mlp.up" in module else 0.4 + 0.1 * layer if "mlp" in module else 0.2
        weights = [first, 2.0 if "self_attn" in module else second]
        return {"weights": weights, "rank": rank, "density": [own, 1.0 - 0.25 * layer]}

    lorakern(capsys, "merge", recipe(text), "-o", "OUT")
    merged, expected = LoraAdapter.load("OUT"), lk.merge(inputs[:2], "ties", per_module=arguments)
    assert list(merged) == list(expected)
    for module, (A, B, scale) in expected.items():
        found = merged[module].scale * merged[module].B @ merged[module].A
        assert merged[module].rank == A.shape[0] <= arguments(module)["rank"]
        torch.testing.assert_close(found, scale * B @ A, rtol=1e-4, atol=1e-5)


def test_a_dry_run_of_a_recipe(inputs, capsys):
    name = recipe(f"merge_method: svd{MODELS}parameters: {{rank: [1, 4]}}")
    planned = result(capsys, "merge", name, "-o", "OUT", "--dry-run")
    assert not Path("OUT").exists()
    ranks = {module["module"].split(".")[2]: module["rank"] for module in planned["modules"]}
    assert ranks == {"0": 1, "1": 2, "2": 3, "3": 4}
    assert [source["weight"] for source in planned["inputs"]] == [None] * 3


def test_the_card_has_the_recipe(inputs, capsys):
    text = f"# by hand: ```\nmerge_method: svd{MODELS}parameters: {{rank: [1, 4]}}\n"
    name = recipe(text)
    lorakern(capsys, "merge", name, "-o", "OUT")
    card = (Path("OUT") / "README.md").read_text()
    assert f"````yaml\n{text}````" in card and "| `../adapters/A` | in the recipe | `" in card
    assert str(Path.cwd()) not in card and f"lorakern merge {name} -o OUT" in card


@pytest.mark.parametrize("flag", ["--method svd", "--weights 1 1 1", "--rank 2", "--seed 1", "--dtype float32"])
def test_what_belongs_in_the_recipe(flag, inputs, capsys):
    says = lorakern(capsys, "merge", recipe(f"merge_method: ties{MODELS}"), "-o", "OUT", *flag.split(), status=2)
    assert f"recipes/merge.yaml: {flag.split()[0]} belongs in the recipe; write it there" in says


BAD = {
    "": "the recipe must be a mapping with the keys models, merge_method",
    "[]": "the recipe must be a mapping",
    "merge_method: ties": "models must be a list of {model: path, parameters: {...}}, got nothing",
    "merge_method: ties\nmodels: []": "models must name at least one adapter",
    "merge_method: ties\nmodels: [A]": "models must hold {model: path, parameters: ...}, got 'A' in it",
    "merge_method: ties\nmodels: [{path: A}]": "models must hold {model: path, parameters: ...}",
    "merge_method: ties\nmodels: [{model: A, weight: 1}]": "model A has the unknown key 'weight'; known are model, par",
    f"merge_method: tyes{MODELS}": "method must be one of cat, dare_linear",
    f"merge_method: 3{MODELS}": "merge_method must be the name of a method, got 3",
    MODELS: "merge_method must be the name of a method, got nothing",
    f"merge_method: ties{MODELS}slices: []": "the recipe has the unknown key 'slices'; known are models, merge_method,",
    f"merge_method: ties{MODELS}parameters: {{int8_mask: true}}": "parameters has the unknown key 'int8_mask'; known a",
    f"merge_method: cat{MODELS}parameters: {{density: 0.5}}": "unknown key 'density'; known are weight, rank, normaliz",
    f"merge_method: cat{MODELS}    parameters: {{density: 1}}": "parameters of ../adapters/C has the unknown key 'dens",
    f"merge_method: ties{MODELS}    parameters: {{rank: 1}}": "parameters of ../adapters/C has the unknown key 'rank';",
    f"merge_method: ties{MODELS}parameters: [1]": "parameters must be a mapping, got [1]",
    f"merge_method: ties{MODELS}parameters: {{normalize: 1}}": "normalize must be true or false, got 1",
    f"merge_method: ties{MODELS}parameters: {{weight: 1e-3}}": "weight: YAML reads 1e-3 as a word, not as a number",
    f"merge_method: ties{MODELS}parameters: {{weight: many}}": "weights must be None or a list of 3 numbers, one per",
    f"merge_method: ties{MODELS}parameters: {{weight: .nan}}": "weights must be None or a list of 3 numbers",
    f"merge_method: ties{MODELS}parameters: {{weight: }}": "weight must be a value, a list of numbers",
    f"merge_method: ties{MODELS}parameters: {{weight: []}}": "weight must be a value, a list of numbers",
    f"merge_method: ties{MODELS}parameters: {{weight: [1, x]}}": "weight must be a value, a list of numbers",
    f"merge_method: ties{MODELS}parameters: {{weight: [1, {{value: 2}}]}}": "weight must be a value, a list of numbers",
    f"merge_method: ties{MODELS}parameters: {{weight: {{filter: mlp, value: 1}}}}": "weight must be a value, a list",
    f"merge_method: ties{MODELS}parameters: {{weight: [{{filter: mlp}}]}}": "weight must be a list of {filter: name",
    f"merge_method: ties{MODELS}parameters: {{weight: [{{filer: mlp, value: 1}}]}}": "weight must be a list of {filter",
    f"merge_method: ties{MODELS}parameters: {{weight: [{{filter: 3, value: 1}}]}}": "a filter must be a part of a modu",
    f"merge_method: ties{MODELS}parameters: {{weight: [{{filter: mlp, value: 1}}]}}": "weight has no value for model.l",
    f"merge_method: ties{MODELS}parameters: {{density: 2}}": "ties: density must be a number above 0 and at most 1",
    f"merge_method: ties{MODELS}parameters: {{density: [1, 0]}}": "ties: density must be a number above 0 and at most",
    f"merge_method: svd{MODELS}parameters: {{rank: [0, 2]}}": "rank must be None, a positive integer, or a share of",
    f"merge_method: svd{MODELS}parameters: {{rank: [1.5, 2]}}": "rank must be None, a positive integer, or a share of",
    f"merge_method: svd{MODELS}dtype: int8": "dtype must be one of float16, bfloat16, float32, float64, got 'int8'",
    f"merge_method: svd{MODELS}dtype: 16": "dtype must be the name of a dtype, got 16",
    f"merge_method: svd{MODELS}seed: 1.5": "seed must be an integer, got 1.5",
    f"merge_method: svd{MODELS}seed: true": "seed must be an integer, got True",
    f"merge_method: svd{MODELS}missing: no": "missing must be zero, skip or error, got False",
    f"merge_method: svd{MODELS}missing: 'no'": "missing must be one of zero, skip, error, got 'no'",
    f"merge_method: svd{MODELS}base_model: 3": "base_model must be the name of a model, got 3",
    f"merge_method: svd{MODELS}merge_method: svd": "the key 'merge_method' is there twice",
    f"merge_method: &m svd{MODELS}": "anchors (&) and aliases (*) are not taken",
    f"merge_method: *m{MODELS}": "anchors (&) and aliases (*) are not taken",
    f"merge_method: !!python/object/apply:os.system [ls]{MODELS}": "tags (!) are not taken",
    f"merge_method: !!str svd{MODELS}": "tags (!) are not taken",
    f"? [a]\n: 1\nmerge_method: svd{MODELS}": "a key must be a word",
    f"<<: {{merge_method: svd}}{MODELS}": "merge keys (<<) are not taken",
    "merge_method: " + "[" * 1000: "it nests more than 16 deep",
    "merge_method: [": "the recipe is not usable YAML",
    "a: b: c": "the recipe is not usable YAML",
    "a: 1\n--- \nb: 2": "the recipe is not usable YAML",
    "a: \0": "the recipe is not usable YAML",
    "a: " + "9" * 5000: "the recipe is not usable YAML",
    "a: 2024-13-45": "the recipe is not usable YAML",
    "x: 1\n" * 20_000: "the recipe has more than 65536 bytes",
    "merge_method: svd\nmodels: [{model: nowhere}]": "recipes/nowhere: no such file or directory",
    'merge_method: svd\nmodels: [{model: "a\\0b"}]': "no such file or directory",
}


@pytest.mark.parametrize("text", BAD)
def test_bad_recipes(text, inputs, capsys):
    small().save("OUT")
    before = snapshot(Path("OUT"))
    start = time.monotonic()
    says = lorakern(capsys, "merge", recipe(text), "-o", "OUT", "--force", status=2)
    # for a hang: how long it takes is not tested here
    assert time.monotonic() - start < 10
    assert BAD[text] in says and len(says) < 1500
    assert snapshot(Path("OUT")) == before


def test_files_that_are_no_recipe(inputs, capsys):
    Path("folder.yaml").mkdir()
    Path("latin.yaml").write_bytes("merge_method: ü".encode("latin-1"))
    Path("pipe.yml").symlink_to("/dev/zero")
    for name, words in (
        ("folder.yaml", "no such file"),
        ("none.yml", "no such file"),
        ("latin.yaml", "the recipe is not UTF-8"),
        ("pipe.yml", "no such file"),
    ):
        assert words in lorakern(capsys, "merge", name, "-o", "OUT", status=2)


def test_a_gradient_needs_layers(inputs, capsys):
    small().save("adapters/plain")
    LoraAdapter({"lm_head": (torch.ones(1, 5), torch.ones(6, 1), 1.0)}).save("adapters/head")
    text = "merge_method: cat\nmodels: [{model: ../adapters/head, parameters: {weight: %s}}]"
    says = lorakern(capsys, "merge", recipe(text % "[0, 1]"), "-o", "OUT", status=2)
    assert "weight of ../adapters/head is a gradient over the layers, but lm_head has no number between dots" in says
    lorakern(capsys, "merge", recipe(text % "[{filter: head, value: 2}, {value: [0, 1]}]"), "-o", "OUT")
    merged = LoraAdapter.load("OUT")["lm_head"]
    assert (merged.scale * merged.B @ merged.A).eq(2).all()


# settings


@given(st.lists(st.floats(-10, 10), min_size=1, max_size=6), st.integers(0, 40))
def test_a_gradient_meets_its_points_and_stays_between_them(points, last):
    setting = Setting("x", points)
    values = [setting.at(f"layers.{layer}.proj", last) for layer in range(last + 1)]
    assert values[0] == points[0]
    assert all(min(points) - 1e-9 <= value <= max(points) + 1e-9 for value in values)
    if last:
        assert values[-1] == pytest.approx(points[-1])
        for place, point in enumerate(points):
            layer, rest = divmod(place * last, max(len(points) - 1, 1))
            assert rest or values[layer] == pytest.approx(point)
    if points == sorted(points):
        assert values == sorted(values)


def test_layers_are_the_first_number_between_dots():
    names = list(adapter(1))
    assert last_layer(names) == LAYERS - 1
    setting = Setting("x", [0, 8])
    for name, value in {
        "model.layers.2.mlp.experts.7.up": 4.0,
        "4.attn": 8.0,
        "encoder.block.0.layer.1.q": 0.0,
        "blocks.3": 6.0,
    }.items():
        assert setting.at(name, 4) == value
    with pytest.raises(lk.LorakernError, match="no number between dots"):
        setting.at("lora_unet_blocks_3_attn", 4)
