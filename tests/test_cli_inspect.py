"""`lorakern resize`, `check` and `inspect`: their figures against dense ones, their exit status, their output."""

import math
from pathlib import Path

import pytest
import torch
from adapter_builders import WEIGHTS, assert_same
from cli_adapters import adapter, adapter_files, kohya, lorakern, result, snapshot, three
from merging import factors, update
from problems import error_ratio

import lorakern as lk
from lorakern.adapters import LoraAdapter
from lorakern.commands import check as check_command

TRUNCATED = {"float32": 2e-6, "bfloat16": 2e-2, "float64": 1e-12}


@pytest.fixture
def inputs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return three(tmp_path)


def best(D, rank):
    """The best approximation of that rank, and the share of the energy that it holds."""
    U, S, Vh = torch.linalg.svd(D)
    energy = S.square().cumsum(0) / S.square().sum()
    return U[:, :rank] * S[:rank] @ Vh[:rank], energy[min(rank, len(S)) - 1].item()


# resize


@pytest.mark.parametrize("dtype", [None, "float64", "bfloat16"])
def test_resize_is_the_best_approximation(dtype, tmp_path, capsys):
    big, out = adapter(5, 0.5, seed=1, task_type="CAUSAL_LM"), tmp_path / "out"
    big.save(tmp_path / "in")
    words = [] if dtype is None else ["--dtype", dtype]
    found = result(capsys, "resize", tmp_path / "in", "-o", out, "--rank", "3", *words)
    assert adapter_files(out) and found["bytes"] == (out / WEIGHTS).stat().st_size
    small_one = LoraAdapter.load(out)
    assert small_one.config.base_model_name_or_path == "my/base" and small_one.config.task_type == "CAUSAL_LM"
    for module, told in zip(big, found["modules"], strict=True):
        exact, energy = best(update(big[module]), 3)
        assert error_ratio(update(small_one[module]), exact) < TRUNCATED[dtype or "float32"]
        assert str(small_one[module].A.dtype) == f"torch.{dtype or 'float32'}"
        before = big[module].rank
        assert told["module"] == module and (told["rank_before"], told["rank"]) == (before, 3)
        assert told["energy"] == pytest.approx(energy, rel=1e-6)
        assert told["error"] == pytest.approx(math.sqrt(1 - energy), rel=1e-2)


def test_resize_to_a_share_of_the_energy(inputs, capsys):
    found = result(capsys, "resize", "A", "-o", "OUT", "--rank", "0.8")
    for module in found["modules"]:
        D = update(inputs[0][module["module"]])
        assert module["energy"] >= 0.8 and module["energy"] == pytest.approx(best(D, module["rank"])[1], rel=1e-6)
        assert module["rank"] == 1 or best(D, module["rank"] - 1)[1] < 0.8
    assert len({module["rank"] for module in found["modules"]}) > 1


def test_what_is_small_enough_keeps_its_bits(inputs, capsys):
    for name, adapter_in in zip("ABC", inputs, strict=True):
        lorakern(capsys, "resize", name, "-o", f"{name}2", "--rank", "9")
        assert_same(LoraAdapter.load(f"{name}2"), LoraAdapter({m: tuple(f) for m, f in adapter_in.items()}))
    found = result(capsys, "resize", "C", "-o", "C3", "--rank", "1")
    changed = {module["module"] for module in found["modules"] if module["error"]}
    assert changed == {m for m in inputs[2] if inputs[2][m].rank > 1}


def test_resize_dry_run_table_and_card(inputs, capsys):
    planned = result(capsys, "resize", "A", "-o", "OUT", "--rank", "1", "--dry-run")
    assert planned["written"] is False and not Path("OUT").exists()
    told = lorakern(capsys, "resize", "A", "-o", "OUT", "--rank", "1")
    least = min(module["energy"] for module in planned["modules"])
    assert "model.layers.*.mlp.up_proj" in told and f"{least:.4%}" in told
    assert planned["modules"] == result(capsys, "resize", "A", "-o", "OUT", "--rank", "1", "--force")["modules"]
    card = (Path("OUT") / "README.md").read_text()
    assert f"| `A` | 1 | `{planned['input']['sha256']}` |" in card
    assert "lorakern resize A -o OUT --rank 1 --force" in card and f"`{least:.6f}`" in card
    assert lorakern(capsys, "resize", "A", "-o", "Q", "--rank", "1", "--quiet") == ""


def test_resize_of_zero(tmp_path, capsys):
    zero = {"proj": (torch.ones(3, 8), torch.zeros(6, 3), 1.0)}
    LoraAdapter(zero).save(tmp_path / "in")
    found = result(capsys, "resize", tmp_path / "in", "-o", tmp_path / "out", "--rank", "2")
    assert [(m["rank"], m["energy"], m["error"]) for m in found["modules"]] == [(2, 1.0, 0.0)]
    assert not update(LoraAdapter.load(tmp_path / "out")["proj"]).any()


@pytest.mark.parametrize(
    "words, says",
    [
        ("--rank 0", "--rank must be a positive integer, or a share"),
        ("--rank 1.5", "--rank must be a positive integer, or a share"),
        ("--rank 2 --dtype int8", "--dtype must be one of"),
        ("--rank 2 -o A --force", "--output is where the input A is"),
        ("--rank 2 -o B", "--output exists and is not empty"),
    ],
)
def test_resize_refuses(words, says, inputs, capsys):
    before = snapshot(Path("A")), snapshot(Path("B"))
    words = words.split() if "-o" in words else [*words.split(), "-o", "OUT"]
    assert says in lorakern(capsys, "resize", "A", *words, status=2)
    assert (snapshot(Path("A")), snapshot(Path("B"))) == before and not Path("OUT").exists()


# check


@pytest.mark.parametrize("probe", [[], ["--probe"]])
def test_check_of_a_merge_and_of_another(probe, inputs, capsys):
    lorakern(capsys, "merge", "A", "B", "C", "-o", "OUT", "--weights", "0.5", "-0.3", "2")
    line = ("check", "A", "B", "C", "--merged", "OUT", *probe)
    found = result(capsys, *line, "--weights", "0.5", "-0.3", "2")
    assert found["passed"] and len(found["modules"]) == 12 and all(module["passed"] for module in found["modules"])
    assert all((module["probe"] is not None) == bool(probe) for module in found["modules"])
    told = lorakern(capsys, *line, "--weights", "0.5,-0.3,2")
    assert told.splitlines()[-1] == "PASS: 0 of 12 modules differ, 0 missing, 0 extra"
    assert "2 more modules; --all shows them" in told
    told = lorakern(capsys, *line, status=1)
    assert told.splitlines()[-1].startswith("FAIL: 12 of 12 modules differ")
    assert "the update differs by" in told
    assert not result(capsys, *line, status=1)["passed"]
    assert lorakern(capsys, *line, "--quiet", status=1) == ""


def test_check_names_the_one_changed_module_first(inputs, capsys, monkeypatch):
    """Also where the modules are read in several parts."""
    merged = {m: list(f) for m, f in lk.merge(inputs).items()}
    bad = "model.layers.2.mlp.down_proj"
    merged[bad][1][3, 1] *= 2
    LoraAdapter({m: tuple(f) for m, f in merged.items()}).save("OUT")
    monkeypatch.setattr(check_command, "_MODULES", 5)
    found = result(capsys, "check", "A", "B", "C", "--merged", "OUT", status=1)
    assert [module["module"] for module in found["modules"] if not module["passed"]] == [bad]
    table = [line for line in lorakern(capsys, "check", "A", "B", "C", "--merged", "OUT", status=1).splitlines()]
    rows = [line for line in table if "model.layers" in line]
    assert bad in rows[0] and len(rows) == 10
    every = lorakern(capsys, "check", "A", "B", "C", "--merged", "OUT", "--all", status=1)
    assert sum("model.layers" in line for line in every.splitlines()) == 12


def test_check_missing_extra_and_nan(inputs, capsys):
    merged = {m: tuple(f) for m, f in lk.merge(inputs).items()}
    lost = "model.layers.0.mlp.up_proj"
    del merged[lost]
    merged["lm_head"] = factors(5, 7, 2)
    LoraAdapter(merged).save("OUT")
    found = result(capsys, "check", "A", "B", "C", "--merged", "OUT", status=1)
    assert found["missing"] == [lost] and found["extra"] == ["lm_head"]
    told = lorakern(capsys, "check", "A", "B", "C", "--merged", "OUT", status=1)
    assert f"missing: {lost}" in told and "extra: lm_head" in told
    merged["model.layers.1.mlp.up_proj"][0][0, 0] = torch.nan
    LoraAdapter(merged).save("OUT")
    found = result(capsys, "check", "A", "B", "C", "--merged", "OUT", status=1)
    bad = {module["module"]: module for module in found["modules"] if not module["passed"]}
    assert list(bad) == ["model.layers.1.mlp.up_proj"] and "NaN" in bad[next(iter(bad))]["note"]


def test_check_with_rtol(inputs, capsys):
    lorakern(capsys, "merge", "A", "B", "C", "-o", "OUT", "-m", "svd", "--rank", "4")
    line = ("check", "A", "B", "C", "--merged", "OUT")
    found = result(capsys, *line, status=1)
    worst = max(module["error"] for module in found["modules"])
    assert result(capsys, *line, "--rtol", str(worst * 1.01))["passed"]
    assert not result(capsys, *line, "--rtol", str(worst * 0.9), status=1)["passed"]


@pytest.mark.parametrize(
    "words, says",
    [
        ("--weights 1 2", "weights must be 3 finite numbers, one for each adapter"),
        ("--rtol -1", "rtol must be a number that is not negative"),
        ("--device toaster", "--device 'toaster' cannot be used"),
        ("--merged nowhere", "nowhere: no such file or directory"),
        ("nowhere", "nowhere: no such file or directory"),
        ("other", "module 'model.layers.0.self_attn.q_proj', term 3, must update a 11 x 7 matrix"),
    ],
)
def test_check_refuses(words, says, inputs, capsys):
    LoraAdapter({"model.layers.0.self_attn.q_proj": (torch.ones(1, 5), torch.ones(6, 1), 1.0)}).save("other")
    inputs[0].save("OUT")
    assert says in lorakern(capsys, "check", "A", "B", "C", "--merged", "OUT", *words.split(), status=2)


# inspect


@pytest.mark.parametrize("name", ["A", "B", "C"])
def test_inspect_says_what_a_dense_decomposition_says(name, inputs, capsys):
    source = LoraAdapter.load(name)
    found = result(capsys, "inspect", name)
    assert [module["module"] for module in found["modules"]] == list(source)
    assert (found["path"], found["base_model"], found["use_rslora"]) == (name, "my/base", name == "C")
    count = 0
    for module, (A, B, scale) in zip(found["modules"], source.values(), strict=True):
        D = update((A, B, scale))
        S = torch.linalg.svdvals(D)[: A.shape[0]]
        p, energy = S / S.sum(), S.square().cumsum(0) / S.square().sum()
        shape = module["rank"], module["d_in"], module["d_out"]
        assert shape == (A.shape[0], A.shape[1], B.shape[0]) and module["scale"] == scale
        assert module["dtype"] == str(A.dtype)[6:]
        assert module["norm"] == pytest.approx(D.norm().item(), rel=1e-6)
        assert module["singular_values"] == pytest.approx(S.tolist(), rel=1e-5)
        assert module["effective_rank"] == pytest.approx(math.exp(-(p * p.log()).sum()), rel=1e-5)
        assert module["rank_90"] == int((energy < 0.9).sum()) + 1
        assert module["rank_99"] == int((energy < 0.99).sum()) + 1
        count += A.numel() + B.numel()
    assert found["parameters"] == count
    assert found["norm"] == pytest.approx(math.sqrt(sum(module["norm"] ** 2 for module in found["modules"])))


def test_inspect_prints_kinds_or_all(inputs, capsys):
    told = lorakern(capsys, "inspect", "A")
    rows = [line for line in told.splitlines() if "model.layers" in line]
    assert len(rows) == 3 and all("model.layers.*." in row and "2 to 3" in row for row in rows)
    assert "base model: my/base; 12 modules" in told
    told = lorakern(capsys, "inspect", "A", "--all")
    assert all(module in told for module in inputs[0])


def test_inspect_of_kohya_and_of_zero(tmp_path, capsys):
    told = lorakern(capsys, "inspect", kohya(tmp_path))
    assert "lora_unet_model_layers_*_mlp_up_proj" in told and "base model: not named" in told
    LoraAdapter({"proj": (torch.ones(3, 8), torch.zeros(6, 3), 1.0)}).save(tmp_path / "zero")
    (module,) = result(capsys, "inspect", tmp_path / "zero")["modules"]
    assert (module["norm"], module["effective_rank"], module["rank_90"]) == (0.0, 0.0, 0)
    assert module["singular_values"] == [0.0] * 3


def test_inspect_plot(inputs, capsys, tmp_path):
    pytest.importorskip("matplotlib")
    lorakern(capsys, "inspect", "A", "--plot", "a.png", "--quiet")
    assert Path("a.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    zero = {f"proj{i}$x^": (torch.ones(3, 8), torch.zeros(6, 3), 1.0) for i in range(12)}
    LoraAdapter(zero).save("zero$_")
    lorakern(capsys, "inspect", "zero$_", "--plot", "zero.png", "--quiet")
    assert not list(tmp_path.glob(".*.part"))
    for bad in ("no/where.png", "A"):
        assert f"--plot {bad} must be a file in a directory" in lorakern(
            capsys, "inspect", "A", "--plot", bad, status=2
        )


def test_inspect_refuses_nan(tmp_path, capsys):
    broken = adapter(2)
    broken["model.layers.1.mlp.up_proj"].A[0, 0] = torch.nan
    broken.save(tmp_path / "in")
    assert "lora_A of model.layers.1.mlp.up_proj has 1 values that are NaN" in lorakern(
        capsys, "inspect", tmp_path / "in", status=2
    )
