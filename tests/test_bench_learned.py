"""benchmarks.learned on a tiny model: what it records and prints."""

import json

import pytest
import tiny_models
import torch
from test_cli_learned import tokenizer

from benchmarks import learned, learned_memory
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


def test_the_largest_group_is_all_or_what_may_be_kept():
    config = tiny_models.llama().config
    # 2 layers: three inputs of 32 columns each and one of 48, C and G, 8 bytes
    assert learned_memory.largest_group(config, None) == 2 * 2 * 8 * (3 * 32**2 + 48**2)
    assert learned_memory.largest_group(config, 1000) == 1000


def test_memory_is_told_by_the_sums(monkeypatch):
    record = {"case": "memory", "max_memory": 100_000_000, "base": 10**9, "peak": 12 * 10**8, "sums": 10**8}
    assert learned.lines(record)[-1].endswith("200 MB above it, 2.00 times the 100 MB of the largest group's sums")
    monkeypatch.setattr(learned_memory, "memory", lambda limit, samples: record)
    monkeypatch.setattr(learned, "STEPS", [("float32", 2, 8)])
    monkeypatch.setattr(learned, "SEARCHES", [("float32", 2)])
    cases = [record["case"] for record in learned.measure(False)]
    assert cases == ["cat", "lorahub", "memory", "memory"]
