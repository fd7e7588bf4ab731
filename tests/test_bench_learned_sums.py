"""The benchmark of an IterIS sweep's algebra: both ways agree, wrong results are refused; no times are asserted."""

import json

import pytest
import torch
from iteris_problems import Problem

from benchmarks import learned_sums
from benchmarks.timing import QUICK
from lorakern.errors import LorakernError
from lorakern.merge.iteris.layers import find_layers


def recorded():
    """Two layers of the same shape that share their input, and a third, in three batches of each of two tasks."""
    problem = Problem(sizes=(9, 7, 9, 7), count=2)
    adapters = dict(zip("ab", problem.adapters, strict=True))
    first, second, third = find_layers("test", problem.model, adapters)
    generator = torch.Generator().manual_seed(0)

    def rows(d_in):
        return [[tuple(torch.randn(2, n, d_in, generator=generator)) for n in (20, 3, 12)] for _ in adapters]

    return learned_sums.Recorded([[first, third], [second]], [rows(9), rows(7)])


def test_both_ways_give_the_same_updates():
    given = recorded()
    found, exact = learned_sums.ours(given), learned_sums.naive(given)
    assert list(found) == list(exact) == ["0", "4", "2"] and given.tokens == 70
    assert max(learned_sums.deviations(given, found, exact)) < 1e-4
    assert all(update.any() for update in exact.values())


def test_a_record_and_its_lines(monkeypatch):
    monkeypatch.setattr(learned_sums, "record", lambda batch, samples: recorded())
    record = json.loads(json.dumps(learned_sums.measure(4, 10, QUICK)))
    assert record["tokens"] == 70 and record["updates"] < 1e-4 and record["seconds"] > 0
    first, second, third = learned_sums.lines(record)
    assert "4 adapters, 10 texts each in batches of 4, 70 tokens" in first and "times ours" in second
    assert f"{record['outputs']:.1e}" in third


def test_no_speed_is_told_of_wrong_updates(monkeypatch):
    monkeypatch.setattr(learned_sums, "record", lambda batch, samples: recorded())
    monkeypatch.setattr(learned_sums, "ours", lambda given: {n: 2 * u for n, u in learned_sums.naive(given).items()})
    with pytest.raises(LorakernError, match=r"wrong by 1\.0e"):
        learned_sums.measure(4, 10, QUICK)


def test_a_file_that_cannot_be_written_is_refused_before_the_model_is_loaded(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(learned_sums, "record", None)
    assert learned_sums.main(["--json", str(tmp_path / "absent" / "file")]) == 2
    assert "--json" in capsys.readouterr().err
