"""LoRA-LEGO's identities with the clustering kernels of Triton: on a GPU, or interpreted (see test_triton.py)."""

import math
import os

import pytest
import torch
from merging import assert_update, factors, total, update

import lorakern as lk
from lorakern import backends
from lorakern.backends import triton

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
if not INTERPRETED:
    pytestmark = [
        pytest.mark.gpu,
        pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device; test_triton_aot.py interprets it"),
    ]


@pytest.fixture(autouse=True)
def clustering_on_triton(monkeypatch):
    """As on a GPU, where what has no Triton kernel (inner products in float64) is torch's."""
    if INTERPRETED:
        order = {op: (triton,) for op in backends.CLUSTERING}
        monkeypatch.setitem(backends._ORDER, "cpu", backends._ORDER["cpu"] | order)


def adapter(rank, scale=1.0, seed=0, dtype=torch.float32):
    A, B, scale = factors(40, 31, rank, scale, dtype, seed)
    return {"p": (A.to(DEVICE), B.to(DEVICE), scale)}


def mixed(one, seed):
    order = torch.randperm(one["p"][0].shape[0], generator=torch.Generator().manual_seed(seed)).to(DEVICE)
    A, B, scale = one["p"]
    return {"p": (A[order], B[:, order], scale)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("count", [1, 3])
def test_identical_adapters_are_that_adapter(count, dtype):
    one = adapter(5, 0.5, dtype=dtype)
    merged = lk.merge([mixed(one, i) for i in range(count)], "lego", rank=5)["p"]
    assert merged.A.device.type == DEVICE and merged.rank == 5
    assert_update(merged, update(one["p"]), 1e-6)


def test_as_many_clusters_as_units_are_the_concatenation():
    adapters = [adapter(r, s, seed=r) for r, s in ((1, 0.5), (5, 3.0), (2, -2.0))]
    exact = total(adapters, [1.0] * 3, "p")
    for options in ({}, {"norm": "l2"}, {"fold_scale": False}):
        plain = {"parameter_reweight": False, "output_reweight": False, **options}
        assert_update(lk.merge(adapters, "lego", rank=8, **plain)["p"], exact, 1e-6)
        assert_update(lk.merge(adapters, "lego", rank=8, **options)["p"], exact * math.sqrt(1 / 3), 1e-6)


@pytest.mark.parametrize("options", [{}, {"align_signs": True, "balance": True}, {"assign": "normalised"}])
def test_order_of_ranks_and_adapters_does_not_matter_and_the_cpu_agrees(options, monkeypatch):
    adapters = [adapter(r, s, seed=r) for r, s in ((4, 0.5), (6, 3.0), (3, 1.0))]
    one = lk.merge(adapters, "lego", rank=4, **options)["p"]
    other = lk.merge([mixed(adapters[i], i) for i in (2, 0, 1)], "lego", rank=4, **options)["p"]
    assert_update(other, update(one), 1e-5)
    monkeypatch.undo()
    on_cpu = [{"p": (A.cpu(), B.cpu(), scale)} for A, B, scale in (a["p"] for a in adapters)]
    assert_update(lk.merge(on_cpu, "lego", rank=4, **options)["p"], update(one).cpu(), 1e-5)
