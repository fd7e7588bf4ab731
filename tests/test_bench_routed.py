"""benchmarks.routed on a small problem: what it compares is one mixture, and a wrong result has no speed."""

import pytest
import torch

from benchmarks import routed
from benchmarks.timing import Effort


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(routed, "D", 96)
    monkeypatch.setattr(routed, "TOKENS", 5)


@pytest.mark.parametrize("pool", [3, 7])
def test_einsum_is_the_same_mixture(pool):
    problem = routed.Mixture(pool, "float32")
    exact = problem.exact()
    for name in ("routed", "einsum"):
        assert routed.error_of(getattr(problem, name)(problem.y.clone()), exact) < 1e-5


def test_a_wrong_result_is_not_timed(monkeypatch):
    monkeypatch.setattr(routed.Mixture, "routed", lambda self, y: torch.ones_like(y))
    with pytest.raises(AssertionError, match="not timed"):
        routed.measure(3, "float32", Effort(0.01, 1, 2))
