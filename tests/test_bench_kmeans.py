"""benchmarks.kmeans on small problems: what it records, and that a wrong result has no speed."""

import json

import pytest
import torch

import lorakern as lk
from benchmarks import floors, kmeans
from benchmarks.timing import Effort


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(kmeans, "LAYER", [(70, 80), (90, 70)])
    monkeypatch.setattr(kmeans, "SINGLE", [(40, 60, 3)])
    monkeypatch.setattr(kmeans, "SPACES", [(60, 80, 4)])
    monkeypatch.setattr(kmeans, "OURS", Effort(0.01, 1, 1))
    monkeypatch.setattr(kmeans, "RIVAL", Effort(0.01, 1, 1))
    monkeypatch.setattr(kmeans, "FMA_ROUNDS", 1 << 10)
    monkeypatch.setattr(floors, "cache_bytes", lambda device="cpu": 1 << 16)


def test_what_is_measured(tmp_path, capsys):
    assert kmeans.main(["--quick", "--json", str(tmp_path / "out")]) == 0
    header, *records = map(json.loads, (tmp_path / "out").read_text().splitlines())
    assert header["machine"]["cores"]
    assert [r["case"] for r in records] == ["single", "spaces", "merge", "merge"]
    single, spaces, *merges = records
    assert (single["n"], single["runs"]) == (40, 10) and min(single["phases"].values()) > 0
    assert ("rival_seconds" in single) == (kmeans.scikit_learn(torch.ones(2, 2), 1) is not None)
    assert spaces["gram"] > 0 < spaces["direct"]
    for merge in merges:
        assert merge["modules"] == 4 and merge["n"] == 128
        elements = 2 * 128 * (70 + 80 + 90 + 70)
        assert merge["bytes"] == elements * (4 if merge["dtype"] == "float32" else 2)
        assert merge["operations"] == 129 * elements and merge["floor"] > merge["reading"] > 0
    assert "times the floor" in capsys.readouterr().out


def test_a_wrong_result_has_no_speed(monkeypatch, capsys):
    honest = lk.kmeans

    def wrong(points, k, **options):
        found = honest(points, k, **options)
        return found if isinstance(found, list) else found._replace(inertia=found.inertia * 1.01)

    monkeypatch.setattr(lk, "kmeans", wrong)
    assert kmeans.main(["--quick"]) == 2
    told = capsys.readouterr()
    assert "kmeans of N = 40 is wrong" in told.err and "runs:" not in told.out
