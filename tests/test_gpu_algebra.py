"""Norms, truncation and the check of a merge take factors on a GPU as they take them on the CPU."""

import pytest
import torch
from merging import SHAPES, factors, total, update
from problems import error_ratio

import lorakern as lk

pytestmark = pytest.mark.gpu


def on_gpu(module):
    A, B, scale = module
    return A.cuda(), B.cuda(), scale


@pytest.mark.parametrize("shape", [(5, 7), (40, 9), (130, 257)])
def test_norms_distances_and_truncation(shape):
    terms = [factors(*shape, rank, scale, seed=rank) for rank, scale in ((4, 0.5), (7, -2.0))]
    there = [on_gpu(term) for term in terms]
    assert lk.delta_norm(*there[0]) == pytest.approx(lk.delta_norm(*terms[0]), rel=1e-9)
    assert lk.delta_distance(there, there[:1]) == pytest.approx(lk.delta_distance(terms, terms[:1]), rel=1e-9)
    ours, theirs = lk.truncate(terms, 3), lk.truncate(there, 3)
    assert theirs.A.is_cuda and theirs.B.is_cuda
    assert error_ratio(theirs.B.cpu() @ theirs.A.cpu(), ours.B @ ours.A) < 1e-6


def test_the_check_of_a_merge():
    adapters = [{name: factors(*shape, 3, 0.5, seed=seed) for name, shape in SHAPES.items()} for seed in range(3)]
    weights = [0.5, 1.0, -2.0]
    merged = {
        name: (
            torch.cat([adapter[name][0] for adapter in adapters]),
            torch.cat([w * adapter[name][1] * 0.5 for w, adapter in zip(weights, adapters, strict=True)], dim=1),
            1.0,
        )
        for name in SHAPES
    }
    assert error_ratio(update(merged["q_proj"]), total(adapters, weights, "q_proj")) < 1e-6
    there = [{name: on_gpu(module) for name, module in adapter.items()} for adapter in (*adapters, merged)]
    report = lk.check_concat_sum(there[:-1], there[-1], weights=weights, probe=True)
    assert report.passed, str(report)
    there[-1]["q_proj"][1][3, 2] *= 2
    report = lk.check_concat_sum(there[:-1], there[-1], weights=weights)
    assert [m.module for m in report.failed] == ["q_proj"]
