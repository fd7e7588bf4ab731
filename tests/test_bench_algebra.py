"""benchmarks.algebra on small modules: what it records, and that a wrong result has no speed."""

import json

import pytest
import torch

import lorakern as lk
from benchmarks import algebra, floors
from benchmarks.timing import Effort


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(algebra, "LAYER", [(70, 80), (90, 70)])
    monkeypatch.setattr(algebra, "OURS", Effort(0.01, 1, 1))
    monkeypatch.setattr(algebra, "FLIPS", 6)
    monkeypatch.setattr(floors, "cache_bytes", lambda device="cpu": 1 << 16)


def test_what_is_measured(tmp_path, capsys):
    assert algebra.main(["--quick", "--dtype", "float32", "--dtype", "bfloat16", "--json", str(tmp_path / "out")]) == 0
    header, *records = map(json.loads, (tmp_path / "out").read_text().splitlines())
    assert header["machine"]["cores"]
    cases = ["truncate", "delta_norm", "check_concat_sum", "flipped bits", "truncate 70 x 80"]
    assert [(r["dtype"], r["case"]) for r in records] == [(d, c) for d in ("float32", "bfloat16") for c in cases]
    assert [r["modules"] for r in records[:3]] == [4, 16, 4]
    assert records[2]["worst_error"] <= records[2]["worst_bound"] and records[2]["dense_forming_seconds"] > 0
    assert records[3]["found"] == records[3]["of"] == 6
    assert max(records[4]["values"], records[4]["update"]) < 1e-5
    printed = capsys.readouterr().out
    assert "6 of 6 found" in printed and "times ours" in printed and "resident memory at most" in printed


def test_a_wrong_result_has_no_speed(monkeypatch, capsys):
    honest = lk.truncate

    def wrong(terms, rank, **options):
        out = honest(terms, rank, **options)
        return {name: t._replace(A=t.A * 1.01) for name, t in out.items()} if isinstance(out, dict) else out

    monkeypatch.setattr(lk, "truncate", wrong)
    assert algebra.main(["--quick", "--dtype", "float32"]) == 2
    told = capsys.readouterr()
    assert "truncate of 0.0 is wrong" in told.err and "modules:" not in told.out


def test_the_dense_sum_is_the_sum():
    merge = algebra.make(torch.float32, 1)
    merged = merge.merged()
    for name, terms in merge.terms.items():
        exact = sum(scale * B.double() @ A.double() for A, B, scale in terms)
        for dense in (algebra.dense_sum(terms), algebra.dense_sum([merged[name]])):
            assert float((dense.double() - exact).norm() / exact.norm()) < 1e-6
