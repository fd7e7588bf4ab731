"""The clustering kernels one by one, against the reference: every instruction set, dtype and layout, and bits."""

import math

import pytest
import torch
from problems import error_ratio

import lorakern as lk
from lorakern.backends import cpu, reference
from lorakern.ops import _clustering
from lorakern.ops._points import collect, flat
from lorakern.ops._uniforms import uniforms

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SIZES = [(1, 1), (5, 63), (33, 128), (50, 257), (129, 1000), (200, 2051)]


@pytest.fixture(params=cpu._cpu.usable_isas())
def isa(request):
    before = cpu._cpu.current_isa()
    cpu._cpu.force_isa(request.param)
    yield request.param
    cpu._cpu.force_isa(before)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def layouts(n, d, dtype):
    """The same number of points as rows, as columns, apart from each other, and in blocks of all of these."""
    wide = torch.full((2 * n + 3, 2 * d + 5), math.nan).to(dtype)
    wide[1 : 2 * n + 1 : 2, 2 : 2 * d + 2 : 2] = randn(n, d, seed=1).to(dtype)
    rows, columns = randn(n, d, seed=2).to(dtype), randn(d, n, seed=3).to(dtype).T
    apart, cut = wide[1 : 2 * n + 1 : 2, 2 : 2 * d + 2 : 2], n // 3
    return {
        "rows": rows,
        "columns": columns,
        "apart": apart,
        "blocks": ([rows[:cut], columns[cut : 2 * cut], apart[2 * cut :]],),
        "parts": (rows, [columns[:cut], columns[cut:]], apart),
    }


def arguments(points, scales=None):
    problems, _ = collect("test", points, None, scales)
    return flat(problems)


@pytest.mark.parametrize("n, d", SIZES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_inner_products_match_the_reference(isa, dtype, n, d):
    for points in layouts(n, d, dtype).values():
        for scales in (None, 0.5 + torch.rand(n, generator=torch.Generator().manual_seed(4))):
            given = arguments(points, scales)
            ((ours,), (exact,)) = (backend.points_gram(*given) for backend in (cpu, reference))
            assert torch.equal(ours, ours.T)
            # Inner products of the points less any one point are as good as theirs less the mean.
            ours = ours.double() - ours.double().mean(dim=0)
            ours = ours - ours.mean(dim=1, keepdim=True)
            assert (ours - exact).abs().max() < 2e-6 * max(d, exact.abs().max())


@pytest.mark.parametrize("n, d", SIZES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_assignment_matches_the_reference(isa, dtype, n, d):
    for points in layouts(n, d, dtype).values():
        given = arguments(points)
        columns = 3 * d if isinstance(points, tuple) and len(points) == 3 else d
        for k in (1, 2, 17, 64):
            centroids = [randn(k, columns, seed=k)]
            (labels,), (sqdist,) = cpu.kmeans_assign(*given, centroids)
            (exact_labels,), (exact,) = reference.kmeans_assign(*given, centroids)
            (distances,), (wanted,) = (b.kmeans_distances(*given, centroids) for b in (cpu, reference))
            assert (distances - wanted).abs().max() <= 1e-5 * wanted.max()
            # In float32, two centroids may be equally near.
            others = (labels != exact_labels).nonzero()[:, 0]
            assert (wanted[others, labels[others]] - exact[others] <= 1e-6 * wanted.max()).all()
            assert len(others) <= n // 50 + (d == 1)
            own = wanted.gather(1, labels[:, None])[:, 0]
            assert error_ratio(sqdist, own) < 1e-6


@pytest.mark.parametrize("n, d", SIZES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_update_matches_the_reference(isa, dtype, n, d):
    g = torch.Generator().manual_seed(n)
    for points in layouts(n, d, dtype).values():
        scales = 0.5 + torch.rand(n, generator=g)
        given = arguments(points, scales)
        for k in (1, 3, 50):
            members, labels = (torch.randint(0, k, (n,), generator=g) for _ in range(2))
            weights = torch.rand(n, generator=g, dtype=torch.float64) * (torch.arange(n) % 5 > 0)
            options = [members], [labels], [weights], [k]
            (ours,), (counts,), inertia = cpu.kmeans_update(*given, *options)
            (exact,), (exact_counts,), exact_inertia = reference.kmeans_update(*given, *options)
            assert error_ratio(ours, exact) < 1e-7 and error_ratio(counts, exact_counts) < 1e-14
            assert (ours[counts == 0] == 0).all()
            assert inertia.item() == pytest.approx(exact_inertia.item(), rel=1e-10)


def clouds(seed=0):
    """Inner products of points, their weights and k."""
    sizes = [(1, 1), (20, 3), (64, 16), (129, 40)]
    grams = [(lambda x: (x @ x.T).float())(randn(n, 7 + n // 4, seed=n).double()) for n, _ in sizes]
    g = torch.Generator().manual_seed(seed)
    weights = [torch.rand(n, generator=g, dtype=torch.float64) * (torch.arange(n) % 3 < 2) for n, _ in sizes]
    return grams, weights, [k for _, k in sizes]


def test_seeds_are_those_of_the_reference(isa):
    grams, weights, ks = clouds()
    trials = [2 + int(math.log(k)) for k in ks]
    table = uniforms(5, 7, 1 + max((k - 1) * t for k, t in zip(ks, trials, strict=True)))
    ours, theirs = (backend.kmeans_seed(grams, weights, ks, trials, table) for backend in (cpu, reference))
    for seeds, exact, w, k in zip(ours, theirs, weights, ks, strict=True):
        assert torch.equal(seeds, exact)
        assert all(len(set(run.tolist())) == k for run in seeds) and (w[seeds] > 0).all()


def test_lloyd_is_that_of_the_reference(isa):
    grams, weights, ks = clouds()
    g = torch.Generator().manual_seed(1)
    positive = [w.nonzero()[:, 0] for w in weights]
    orders = [[p[torch.randperm(len(p), generator=g)] for _ in range(4)] for p in positive]
    seeds = [torch.stack([order[:k] for order in of_runs]) for of_runs, k in zip(orders, ks, strict=True)]
    none = [torch.empty(0)] * len(ks)
    given = grams, weights, ks, seeds, [n.long() for n in none], none, 300, [1e-6] * len(ks)
    ours, theirs = (backend.kmeans_lloyd(*given) for backend in (cpu, reference))
    for left, right in zip(ours, theirs, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def test_equally_near_centroids_give_the_lower_label(isa):
    points, centroid = randn(40, 100), randn(1, 100, seed=1)
    for k in (2, 9, 100):
        labels, _ = lk.kmeans_assign(points, centroid.expand(k, 100))
        assert (labels == 0).all()
        labels, _ = lk.kmeans_assign(points, torch.cat([centroid + 100, centroid.expand(k, 100)]))
        assert (labels == 1).all()


def test_points_on_centroids_are_at_no_distance(isa):
    points = 100 + randn(50, 77)
    labels, sqdist = lk.kmeans_assign(points, points)
    assert labels.tolist() == list(range(50)) and (sqdist == 0).all()


def test_what_lies_around_the_points_is_not_read(isa):
    for dtype in DTYPES:
        wide = torch.full((70, 300), math.nan).to(dtype)
        wide[3:40, 7:140] = 1
        for points in (wide[3:40, 7:140], wide[3:40, 7:140].T):
            n, d = points.shape
            centroids = torch.stack([torch.ones(d), torch.zeros(d)])
            labels, sqdist = lk.kmeans_assign(points, centroids)
            assert (labels == 0).all() and (sqdist == 0).all()
            means, counts = lk.kmeans_update(points, torch.arange(n) % 2, 2)
            assert (means == 1).all() and counts.tolist() == [(n + 1) // 2, n // 2]


def test_lists_and_parts():
    x, y = randn(30, 20), randn(11, 8, seed=1)
    labels, sqdist = lk.kmeans_assign([(x, 2 * x), y], [(x[:3], 2 * x[:3]), y[:2]])
    for part, points, centroids in ((0, torch.cat([x, 2 * x], dim=1), torch.cat([x, 2 * x], dim=1)[:3]), (1, y, y[:2])):
        alone = lk.kmeans_assign(points, centroids)
        assert torch.equal(alone[0], labels[part]) and error_ratio(alone[1], sqdist[part]) < 1e-6
    centroids, counts = lk.kmeans_update([(x, 2 * x), y], labels, [3, 2], weights=[None, torch.full((11,), 2.0)])
    assert [c.shape for c in centroids[0]] == [(3, 20), (3, 20)] and centroids[1].shape == (2, 8)
    assert torch.equal(centroids[0][1], 2 * centroids[0][0])
    assert counts[0].sum() == 30 and counts[1].sum() == 22


def test_many_points_and_bits_for_any_number_of_threads():
    x, centroids = randn(5000, 64), randn(300, 64, seed=1)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            labels, sqdist = lk.kmeans_assign(x, centroids)
            found.append([labels, sqdist, *lk.kmeans_update(x, labels, 300)])
    finally:
        torch.set_num_threads(before)
    for others in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(others, found[0], strict=True))
    assert torch.equal(found[0][0], torch.cdist(x.double(), centroids.double()).argmin(dim=1))


BAD = {
    "labels too large": (
        lambda x, c: lk.kmeans_update(x, torch.full((8,), 2), 2),
        "between 0 and k - 1 = 1; got values",
    ),
    "labels of floats": (lambda x, c: lk.kmeans_update(x, x[:, 0], 2), "labels of points must be int32 or int64"),
    "too few labels": (lambda x, c: lk.kmeans_update(x, torch.zeros(7).long(), 2), r"of shape \(8,\)"),
    "k": (lambda x, c: lk.kmeans_update(x, torch.zeros(8).long(), 0), "k must be a positive integer"),
    "update of NaN": (lambda x, c: lk.kmeans_update(x / 0, torch.zeros(8).long(), 1), "points must be finite; got 40"),
    "assign of NaN": (lambda x, c: lk.kmeans_assign(x / 0, c), "points must be finite; got 40"),
    "NaN centroids": (lambda x, c: lk.kmeans_assign(x, c / 0), "centroids of points must be finite"),
    "no centroids": (lambda x, c: lk.kmeans_assign(x, c[:0]), "k at least 1"),
    "other columns": (lambda x, c: lk.kmeans_assign(x, c[:, 1:]), r"shape \(3, 5\)"),
    "no list": (lambda x, c: lk.kmeans_assign([x], [c, c]), "a list of 1 like points; got a list of 2"),
}


@pytest.mark.parametrize("call, message", BAD.values(), ids=BAD)
def test_bad_input_is_refused(call, message):
    with pytest.raises(lk.LorakernError, match=message):
        call(randn(8, 5), randn(3, 5, seed=1))


def test_opcheck():
    given = arguments([(randn(9, 5), [randn(4, 3), randn(5, 3)]), randn(6, 2)])
    ops, check = torch.ops.lorakern, torch.library.opcheck
    centroids, ks = [randn(2, 8), randn(3, 2)], [2, 3]
    labels, weights = [torch.arange(9) % 2, torch.arange(6) % 3], [torch.ones(n, dtype=torch.float64) for n in (9, 6)]
    check(ops.points_gram.default, given)
    check(ops.kmeans_assign.default, (*given, centroids))
    check(ops.kmeans_distances.default, (*given, centroids))
    check(ops.kmeans_update.default, (*given, labels, labels, weights, ks))
    grams, table = _clustering.points_gram(*given), uniforms(0, 2, 9)
    check(ops.kmeans_seed.default, (grams, weights, ks, [2, 3], table))
    seeds, none = _clustering.seed(grams, weights, ks, [2, 3], table), [torch.empty(0)] * 2
    check(ops.kmeans_lloyd.default, (grams, weights, ks, seeds, [n.long() for n in none], none, 5, [0.0, 0.0]))


def test_uniforms_are_uniform_and_known():
    table = uniforms(0, 200, 1000)
    assert abs(table.mean() - 0.5) < 0.005 and abs(table.var() - 1 / 12) < 0.002
    assert table.min() >= 0 and table.max() < 1 and len(table.unique()) == table.numel()
    streams = table[:-1], table[1:], uniforms(1, 199, 1000)
    correlation = torch.corrcoef(torch.stack([s.flatten() for s in streams]))
    assert (correlation - torch.eye(3)).abs().max() < 0.01

    def mixed(z):
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
        return z ^ (z >> 31)

    step, seed = 0x9E3779B97F4A7C15, 2**63 + 12345
    stream = mixed((mixed(seed) + 3 * step) % 2**64)
    assert uniforms(seed, 3, 7)[2, 6].item() == (mixed((stream + 7 * step) % 2**64) >> 11) / 2**53
