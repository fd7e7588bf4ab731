"""Clustering on the Triton backend against the reference: on a GPU, or in Triton's interpreter (see test_triton.py)."""

import os

import pytest
import torch
from problems import error_ratio

import lorakern as lk
from lorakern.backends import reference
from lorakern.backends import triton as backend
from lorakern.ops import _clustering
from lorakern.ops._points import collect, flat
from lorakern.ops._uniforms import uniforms

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
if not INTERPRETED:
    pytestmark = [
        pytest.mark.gpu,
        pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device; test_triton_aot.py interprets it"),
    ]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(autouse=True)
def on_triton():
    with lk.use_backend("triton"):
        yield


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def batch(dtype):
    """Points as rows of A and columns of B in blocks, as one matrix, and one point alone."""
    A, B = (
        [randn(r, 70, seed=r, dtype=dtype) for r in (5, 16, 20)],
        [randn(37, r, seed=r, dtype=dtype) for r in (5, 16, 20)],
    )
    return [(A, [b.T for b in B]), 3 + randn(9, 1100, dtype=dtype), randn(2, 3, dtype=dtype)[1:, ::2]]


def arguments(dtype, scaled):
    problems, _ = collect("test", batch(dtype), None, None)
    scales = [0.5 + torch.rand(len(p.parts), p.count, generator=torch.Generator().manual_seed(1)) for p in problems]
    if scaled:
        problems = [p._replace(scales=s.to(DEVICE)) for p, s in zip(problems[:2], scales, strict=False)] + problems[2:]
    return flat(problems)


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_inner_products(dtype, scaled):
    given = arguments(dtype, scaled)
    for ours, exact in zip(backend.points_gram(*given), reference.points_gram(*given), strict=True):
        assert torch.equal(ours, ours.T)
        ours = ours.double() - ours.double().mean(dim=0)
        assert (ours - ours.mean(dim=1, keepdim=True) - exact).abs().max() <= 1e-5 * exact.abs().max()


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_assign_and_update(dtype, scaled):
    given = arguments(dtype, scaled)
    centroids = [randn(k, d, seed=k) for k, d in ((40, 107), (3, 1100), (1, 2))]
    labels, sqdist = backend.kmeans_assign(*given, centroids)
    exact_labels, exact_sqdist = reference.kmeans_assign(*given, centroids)
    for ours, exact in zip(labels, exact_labels, strict=True):
        assert torch.equal(ours, exact)
    for ours, exact in zip(sqdist, exact_sqdist, strict=True):
        assert error_ratio(ours, exact) < 1e-6
    weights = [torch.arange(len(label), dtype=torch.float64, device=DEVICE) % 4 + (len(label) == 1) for label in labels]
    moved = [(label + 1) % len(c) for label, c in zip(labels, centroids, strict=True)]
    options = labels, moved, weights, [40, 3, 1]
    for ours, exact in zip(
        backend.kmeans_update(*given, *options), reference.kmeans_update(*given, *options), strict=True
    ):
        for left, right in zip(ours, exact, strict=True):
            assert error_ratio(left, right) < 1e-6


def test_ties_go_to_the_lower_label():
    points, centroid = randn(40, 50), randn(1, 50, seed=1)
    assert (lk.kmeans_assign(points, centroid.expand(70, 50))[0] == 0).all()
    assert (lk.kmeans_assign(points, torch.cat([centroid + 9, centroid.expand(70, 50)]))[0] == 1).all()


def clouds():
    problems, _ = collect("test", [randn(40, 30), randn(7, 5, seed=1), randn(61, 9, seed=2)], None, None)
    grams = [g.to(DEVICE) for g in reference.points_gram(*flat(problems))]
    weights = [(torch.arange(len(g), dtype=torch.float64) % 3 < 2).double().to(DEVICE) + 0.0 for g in grams]
    return grams, weights, [6, 3, 17]


def test_seeds():
    grams, weights, ks = clouds()
    trials, table = [3, 3, 4], uniforms(2, 3, 65).to(DEVICE)
    options = grams, weights, ks, trials, table
    for ours, exact in zip(backend.kmeans_seed(*options), reference.kmeans_seed(*options), strict=True):
        assert torch.equal(ours, exact)


@pytest.mark.parametrize("max_iterations, tolerance", [(300, 0.0), (300, 1e-2), (1, 0.0)])
def test_lloyd(max_iterations, tolerance):
    grams, weights, ks = clouds()
    seeds = reference.kmeans_seed(grams, weights, ks, [3, 3, 4], uniforms(2, 3, 65).to(DEVICE))
    seeds[1] = seeds[1][:1]
    none = [torch.empty(0, device=DEVICE)] * 3
    options = seeds, [n.long() for n in none], none, max_iterations, [tolerance] * 3
    ours, exact = (b.kmeans_lloyd(grams, weights, ks, *options) for b in (backend, reference))
    for left, right in zip(ours, exact, strict=True):
        assert all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(left, right, strict=True))


@pytest.mark.parametrize("init", ["k-means++", "random", "centroids", "far centroids"])
def test_kmeans(init):
    x, y = randn(45, 20), randn(30, 8, seed=1)
    first = {
        "centroids": [x[:6] + 0.1, y[:4]],
        "far centroids": [x[:6] + 90 * torch.arange(6, device=DEVICE)[:, None], y[:4]],
    }
    options = {"init": first.get(init, init), "n_init": 2, "seed": 4}
    for space in ("gram", "direct"):
        found = lk.kmeans([x, y], [6, 4], space=space, **options)
        with lk.use_backend("reference"):
            exact = lk.kmeans([x, y], [6, 4], space=space, **options)
        for ours, theirs in zip(found, exact, strict=True):
            assert torch.equal(ours.labels, theirs.labels) and ours.n_iter == theirs.n_iter
            assert error_ratio(ours.centroids, theirs.centroids) < 1e-6
            assert ours.inertia == pytest.approx(theirs.inertia, rel=1e-5)


def test_a_ragged_batch_is_its_problems_one_by_one():
    problems = batch(torch.float32)[:2]
    together = lk.kmeans(problems, [5, 3], n_init=2)
    for points, k, found in zip(problems, (5, 3), together, strict=True):
        alone = lk.kmeans(points, k, n_init=2)
        assert torch.equal(alone.labels, found.labels) and alone.inertia == found.inertia
        for a, b in zip(
            *(r.centroids if isinstance(points, tuple) else [r.centroids] for r in (alone, found)), strict=True
        ):
            assert torch.equal(a, b)


def test_points_that_are_not_finite_are_refused():
    x = randn(20, 30)
    x[3, 4] = torch.nan
    with pytest.raises(lk.LorakernError, match="points must be finite; got 1 value"):
        lk.kmeans(x, 3)


def test_more_points_than_a_program_holds(monkeypatch):
    from lorakern import triton_kernels

    grams, weights, ks = clouds()
    monkeypatch.setattr(triton_kernels, "MOST_POINTS", 8)
    table = uniforms(2, 3, 65).to(DEVICE)
    ours = _clustering.seed(grams, weights, ks, [3, 3, 4], table)
    assert all(
        torch.equal(a, b)
        for a, b in zip(ours, reference.kmeans_seed(grams, weights, ks, [3, 3, 4], table), strict=True)
    )
