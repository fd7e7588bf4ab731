"""benchmarks.learned on a tiny model: what it records, and that the naive solve is the one of lorakern."""

import json

import pytest
import tiny_models
import torch
from test_cli_learned import tokenizer

from benchmarks import learned, learned_iteris
from benchmarks.timing import Effort
from lorakern.integrations import smollm2

pytest.importorskip("peft")


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(smollm2, "load", lambda dtype=torch.float32: (tiny_models.llama(dtype=dtype), tokenizer()))
    monkeypatch.setattr(learned, "EFFORT", Effort(0.01, 1, 1))
    monkeypatch.setattr(learned, "RANK", 2)


def test_a_step_and_a_candidate_are_timed_beside_peft(capsys):
    for record in (learned.cat_step("float32", 2, 8), learned.candidate("float32", 3)):
        assert json.loads(json.dumps(record)) == record
        assert min(value for name, value in record.items() if "seconds" in name or "rival" in name) > 0
        told = learned.lines(record)
        assert len(told) == 2 and f"{record['adapters']} adapters of rank 2" in told[0]


def test_the_naive_solve_is_ours_and_the_features_of_both_models_differ(monkeypatch):
    model = tiny_models.llama()
    adapters = tiny_models.three(model)
    sources = [["the cat sat on a mat", "one big red dog"], ["run far away from home"], ["a mat and saw", "home again"]]
    monkeypatch.setattr(learned_iteris, "problem", lambda samples: (model, tokenizer(), adapters, sources))
    record = learned_iteris.solve(2)
    assert record["difference"] < 1e-3
    assert min(record["naive"], record["forwards"], *record["whole"]) > 0
    assert "updates agree to" in learned.lines(record)[-1]
    updates = {module: torch.full(model.get_submodule(module).weight.shape, 0.1) for module in adapters[0]}
    batches = [learned_iteris._batches(tokenizer(), source) for source in sources]
    for _, own, merged in learned_iteris._features(model, adapters, batches, updates):
        assert own.shape == merged.shape
    assert not torch.equal(own, merged)


def test_the_largest_group_is_all_or_what_may_be_kept():
    # 2 layers: three inputs of 32 columns each and one of 48, C and G, 8 bytes
    assert learned_iteris.largest_group(None) == 2 * 2 * 8 * (3 * 32**2 + 48**2)
    assert learned_iteris.largest_group(1000) == 1000


def test_memory_is_told_by_the_sums(monkeypatch):
    record = {"case": "memory", "max_memory": 100_000_000, "base": 10**9, "peak": 12 * 10**8, "sums": 10**8}
    assert learned.lines(record)[-1].endswith("200 MB above it, 2.00 times the 100 MB of the largest group's sums")
    monkeypatch.setattr(learned_iteris, "memory", lambda limit, samples: record)
    monkeypatch.setattr(
        learned_iteris,
        "solve",
        lambda samples: {
            "case": "solve",
            "samples": samples,
            "sweep": 3.0,
            "naive": 7.0,
            "forwards": 1.0,
            "difference": 0.0,
        },
    )
    monkeypatch.setattr(learned, "STEPS", [("float32", 2, 8)])
    monkeypatch.setattr(learned, "SEARCHES", [("float32", 2)])
    cases = [record["case"] for record in learned.measure(False)]
    assert cases == ["cat", "lorahub", "memory", "memory", "solve"]
