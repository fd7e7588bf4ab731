"""The map of LoRA-LEGO's clusters: what it says of a merge, its picture, and the command."""

import io
import json

import pytest
import torch
from merging import factors

import lorakern as lk
from lorakern.merge import lego_map, lego_picture

pytest.importorskip("matplotlib")
pytest.importorskip("typer")
from matplotlib import image

from lorakern.cli import main


def family(rows, scale=1.0):
    """An adapter's module whose units are unit vectors: equal rows are equal units."""
    eye = torch.eye(8)
    return eye[rows], eye[:, rows], scale


def adapters():
    a = {"layers.0.q": family([0, 1, 2], 2.0), "layers.1.q": family([0, 1]), "layers.0.v": family([3])}
    b = {"layers.0.q": family([2, 3], 2.0), "layers.1.q": family([4, 5])}
    c = {"layers.0.q": family([2, 6, 7, 0], 2.0)}
    return [a, b, c]


def clusters_of(module):
    """{(adapter, rank)} of every cluster."""
    found = {}
    for adapter, labels in enumerate(module["labels"]):
        for rank, label in enumerate(labels):
            found.setdefault(label, set()).add((adapter, rank))
    assert sorted(found) == list(range(module["k"]))
    return sorted(map(sorted, found.values()))


def test_who_is_with_whom():
    found = lego_map(adapters(), names=["a", "b", "c"], rank=6)
    assert found == json.loads(json.dumps(found)) and found["adapters"] == ["a", "b", "c"]
    assert list(found["modules"]) == ["layers.0.q", "layers.1.q", "layers.0.v"]
    first, second, third = found["modules"].values()
    together = [[(0, 0), (2, 3)], [(0, 1)], [(0, 2), (1, 0), (2, 0)], [(1, 1)], [(2, 1)], [(2, 2)]]
    assert clusters_of(first) == together
    assert clusters_of(second) == [[(0, 0)], [(0, 1)], [(1, 0)], [(1, 1)]]
    assert third == {"k": 1, "kept_energy": 1.0, "labels": [[0], [], []]}
    assert first["kept_energy"] == pytest.approx(1.0)
    assert found["pairs"] == [[1.0, 1 / 6, 2 / 6], [1 / 4, 1.0, 1 / 4], [2 / 4, 1 / 4, 1.0]]
    assert found["shared"] == 5 / 14


@pytest.mark.parametrize("options", [{}, {"align_signs": True}, {"assign": "normalised", "n_init": 2}])
@pytest.mark.parametrize("rank", [3, 0.6, {"p": 5}])
def test_map_is_that_of_the_merge(rank, options):
    """Means over the clusters of the map are the factors of the merge."""
    pool = [{"p": factors(40, 31, r, 1.0, torch.float64, seed=r)} for r in (4, 7)]
    pool.insert(1, {"other": factors(5, 7, 2)})
    found = lego_map(pool, rank=rank, seed=4, **options)["modules"]["p"]
    plain = {"parameter_reweight": False, "output_reweight": False, **options}
    merged = lk.merge(pool, "lego", rank=rank, seed=4, **plain)["p"]
    assert found["k"] == merged.rank and found["labels"][1] == []
    units = torch.cat([torch.cat([pool[i]["p"][0], pool[i]["p"][1].T], dim=1) for i in (0, 2)])
    labels = torch.tensor(found["labels"][0] + found["labels"][2])
    means = torch.cat([merged.A, merged.B.T], dim=1)
    kept = 0.0
    for c in range(found["k"]):
        members = units[labels == c]
        if not options.get("align_signs"):
            assert torch.allclose(means[c], members.mean(0), rtol=1e-6, atol=1e-6)
        kept += len(members) * means[c].square().sum()
    if "assign" not in options:
        assert found["kept_energy"] == pytest.approx(float(kept / units.square().sum()), rel=1e-6)


def test_weights_of_zero_have_no_cluster():
    found = lego_map(adapters(), rank=6, weights=[1.0, 0.0, 1.0])
    assert [len(labels) for labels in found["modules"]["layers.0.q"]["labels"]] == [3, 0, 4]
    nothing = lego_map(adapters(), weights=[0.0, 0.0, 0.0])
    assert nothing["shared"] == 0 and {module["k"] for module in nothing["modules"].values()} == {0}
    assert lego_picture(nothing)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"names": ["a"]}, "names must be None or one for each of 3 adapters, got 1"),
        ({"rank": 0}, "rank must be None, a positive integer"),
        ({"n_init": 0}, "lego: n_init must be an integer at least 1"),
        ({"missing": "error"}, "layers.1.q: adapter 2 lacks this module"),
        ({"seed": 0.5}, "seed must be an integer"),
        ({"weights": [1.0]}, "weights must be None or a list of 3 numbers"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(lk.LorakernError, match=message):
        lego_map(adapters(), **arguments)


def pixels(found, **options):
    """(height, width, 3) integers from 0 to 255."""
    shown = image.imread(io.BytesIO(lego_picture(found, **options)))
    return torch.tensor(shown[..., :3]).mul(255).round().long()


def share_of(picture, color):
    wanted = torch.tensor([int(color[i : i + 2], 16) for i in (1, 3, 5)])
    return ((picture - wanted).abs().amax(-1) <= 2).float().mean().item()


def test_picture_shows_shared_ranks_full_and_others_pale():
    from lorakern.merge.lego_picture import COLORS, PALE

    def faded(color):
        parts = (round(PALE * int(color[i : i + 2], 16) + (1 - PALE) * 255) for i in (1, 3, 5))
        return "#" + "".join(f"{part:02x}" for part in parts)

    shared = pixels(lego_map([{"layers.0.q": family([0, 1, 2])}] * 2, rank=3))
    apart = pixels(lego_map([{"layers.0.q": family([i, i + 1])} for i in (0, 4)], rank=4))
    for color in COLORS[:2]:
        assert share_of(shared, color) > 0.05 > 0.02 > share_of(shared, faded(color))
        assert share_of(apart, faded(color)) > 0.05 > 0.02 > share_of(apart, color)
    assert share_of(shared, COLORS[2]) == 0


@pytest.mark.parametrize("count, layers, kinds", [(2, 1, 1), (8, 30, 1), (12, 5, 9), (3, 12, 4)])
def test_picture_of_any_number(count, layers, kinds):
    names = [f"model.layers.{i}.block{j % 2}.m{j}" for i in range(layers) for j in range(kinds)] + ["lm_head"]
    pool = [{name: factors(5, 6, 2, seed=i) for name in names[i % 2 :]} for i in range(count)]
    found = lego_map(pool, names=[f"$name_{i}$" for i in range(count)], rank=2, n_init=1)
    height, width, _ = pixels(found, title="_$x$_").shape
    assert 300 < width < 3000 and 150 < height < 3000


# the command


@pytest.fixture
def folders(tmp_path):
    for name, adapter in zip("abc", adapters(), strict=True):
        lk.LoraAdapter(adapter, base_model_name_or_path="some/model").save(tmp_path / name)
    return [str(tmp_path / name) for name in "abc"]


def test_command_prints_the_map_as_json(folders, capsys):
    assert main(["lego-map", *folders, "--rank", "6", "--weights", "1", "0.5", "2", "--set", "n_init=3", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    loaded = [lk.LoraAdapter.load(folder) for folder in folders]
    assert found == lego_map(loaded, names=["a", "b", "c"], rank=6, weights=[1.0, 0.5, 2.0], n_init=3)


def test_command_prints_a_table_and_writes_the_picture(folders, tmp_path, capsys):
    plot = tmp_path / "map.png"
    assert main(["lego-map", *folders, "--rank", "6", "--plot", str(plot)]) == 0
    shown = capsys.readouterr().out
    assert "layers.*.q" in shown and "35.7% of the ranks share a cluster" in shown
    assert plot.read_bytes()[1:4] == b"PNG"
    assert main(["lego-map", *folders, "--all", "--quiet"]) == 0
    assert capsys.readouterr().out == ""
    assert main(["lego-map", *folders, "--all"]) == 0
    assert "layers.1.q" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--set", "norm=l1"], "lego: norm must be 'inf' or 'l2', got 'l1'"),
        (["--set", "density=1"], "lego: there is no option 'density'"),
        (["--rank", "0"], "--rank must be a positive integer"),
        (["--plot", "nowhere/a.png"], "--plot nowhere/a.png must be a file in a directory that exists"),
        (["--missing", "no"], "missing must be one of zero, skip, error"),
        (["nowhere"], "nowhere"),
    ],
)
def test_command_refuses(arguments, message, folders, capsys):
    assert main(["lego-map", *folders, *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1 and message in captured.err


def test_command_merges_by_lego(folders, tmp_path, capsys):
    out = tmp_path / "merged"
    dry = ["merge", *folders, "-o", str(out), "--method", "lego", "--rank", "6", "--set", "norm=l2", "--json"]
    assert main([*dry, "--dry-run"]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert main(dry) == 0
    written = lk.LoraAdapter.load(out)
    merged = lk.merge([lk.LoraAdapter.load(folder) for folder in folders], "lego", rank=6, norm="l2")
    assert {module["module"]: module["rank"] for module in planned["modules"]} == {m: merged[m].rank for m in merged}
    for module in merged:
        assert torch.equal(written[module].A, merged[module].A)


def test_recipe_gives_each_module_its_rank(folders, tmp_path, capsys):
    recipe, out = tmp_path / "recipe.yaml", tmp_path / "merged"
    models = "\n".join(f"  - model: {folder}" for folder in folders)
    ranks = "[{filter: layers.1, value: 3}, {value: 5}]"
    recipe.write_text(
        f"merge_method: lego\nmodels:\n{models}\nparameters:\n  rank: {ranks}\n  output_reweight: false\n"
    )
    arguments = ["merge", str(recipe), "-o", str(out), "--json"]
    assert main([*arguments, "--dry-run"]) == 0
    planned = json.loads(capsys.readouterr().out)["modules"]
    assert main(arguments) == 0, capsys.readouterr().err
    written = lk.LoraAdapter.load(out)
    by_module = {"layers.0.q": 5, "layers.1.q": 3, "layers.0.v": 5}
    loaded = [lk.LoraAdapter.load(folder) for folder in folders]
    merged = lk.merge(loaded, "lego", rank=by_module, output_reweight=False)
    assert {m: written[m].rank for m in written} == {m: merged[m].rank for m in merged}
    assert written["layers.0.q"].rank == 5 and written["layers.0.v"].rank == 1
    assert all(torch.equal(written[m].B, merged[m].B) for m in merged)
    assert {m["module"]: m["rank"] for m in planned}["layers.0.v"] == 1
