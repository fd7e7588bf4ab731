"""The examples of the README run, or are read, as they stand."""

import re
from pathlib import Path

import pytest

README = Path(__file__).resolve().parents[1] / "README.md"


def test_bgmv_example_runs_and_is_short():
    example = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)[0]
    assert "lk.bgmv(" in example and "assert torch.allclose" in example
    assert len(example.strip().splitlines()) <= 15
    exec(compile(example, "README.md", "exec"), {})


def test_routed_example_runs():
    (example,) = (e for e in re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL) if "routed_bgmv" in e)
    exec(compile(example, "README.md", "exec"), {})


def test_recipe_is_one(tmp_path):
    pytest.importorskip("yaml")
    from lorakern.commands.recipe import read_recipe

    (example,) = re.findall(r"```yaml\n(.*?)```", README.read_text(), re.DOTALL)
    (tmp_path / "recipe.yaml").write_text(example)
    job = read_recipe(str(tmp_path / "recipe.yaml"))
    assert [source.path for source in job.sources] == [tmp_path / "adapters" / name for name in ("math", "poet")]
    found = job.per_module(["layers.0.mlp.up", "layers.1.attn.q"])("layers.1.attn.q")
    assert found == {"rank": 16, "weights": [0.5, 0.8], "density": [0.4, 0.5]}
