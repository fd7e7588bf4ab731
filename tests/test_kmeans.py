"""kmeans against a plain float64 oracle, in both spaces, on every instruction set, and beside scikit-learn."""

import importlib
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kmeans_oracle import best_of, lloyd
from problems import error_ratio

import lorakern as lk
from lorakern.backends import cpu

SPACES = ["gram", "direct"]


@pytest.fixture(params=cpu._cpu.usable_isas())
def isa(request):
    before = cpu._cpu.current_isa()
    cpu._cpu.force_isa(request.param)
    yield request.param
    cpu._cpu.force_isa(before)


@pytest.fixture
def threads_restored():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def generator(seed):
    return torch.Generator().manual_seed(seed)


def blobs(n, d, k, seed=0, spread=0.1, dtype=torch.float32):
    """Points around k far centers, in turns."""
    g = generator(seed)
    centers = torch.randn(k, d, generator=g)
    return (centers[torch.arange(n) % k] + spread * torch.randn(n, d, generator=g)).to(dtype)


def noise(n, d, seed=0):
    return torch.randn(n, d, generator=generator(seed))


def same_partition(left, right):
    return torch.equal(left[:, None] == left, right[:, None] == right)


def equal(left, right):
    """Are two results the same to the bit?"""
    parts = [(r.centroids if isinstance(r.centroids, tuple) else (r.centroids,)) for r in (left, right)]
    return (
        torch.equal(left.labels, right.labels)
        and all(torch.equal(a, b) for a, b in zip(*parts, strict=True))
        and left.inertia == right.inertia
        and left.n_iter == right.n_iter
    )


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("n, d, k", [(1, 1, 1), (5, 1, 2), (63, 5, 7), (64, 129, 16), (128, 1000, 8), (200, 40, 33)])
def test_given_centroids_lead_where_the_oracle_goes(isa, space, n, d, k):
    x = noise(n, d, seed=n)
    first = x[torch.randperm(n, generator=generator(1))[:k]] + 0.01
    found = lk.kmeans(x, k, init=first, space=space)
    labels, centroids, inertia, iterations = lloyd(x, first)
    assert found.labels.tolist() == labels.tolist() and found.n_iter == iterations
    assert error_ratio(found.centroids, torch.from_numpy(centroids)) < 1e-6
    assert found.inertia == pytest.approx(inertia, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_separable_points_are_separated(isa, space, dtype):
    for n, d, k in ((30, 8, 3), (130, 300, 13), (96, 1111, 6)):
        x = blobs(n, d, k, seed=d, dtype=dtype)
        found = lk.kmeans(x, k, space=space)
        truth = torch.arange(n) % k
        assert same_partition(found.labels, truth)
        wanted = torch.stack([x[truth == truth[found.labels == c][0]].double().mean(dim=0) for c in range(k)])
        assert error_ratio(found.centroids, wanted) < 1e-6
        assert found.inertia == pytest.approx(float((x.double() - wanted[found.labels]).square().sum()), rel=1e-5)


@pytest.mark.parametrize("space", SPACES)
def test_as_good_as_the_oracle_on_random_problems(space):
    ratios = []
    for seed in range(20):
        x = noise(60, 2 + seed, seed) + 2 * blobs(60, 2 + seed, 5, seed)
        ratios.append(lk.kmeans(x, 4, seed=seed, space=space).inertia / best_of(x, 4, 10, seed))
    assert max(ratios) < 1.01, ratios


def test_both_spaces_and_the_reference_agree(isa):
    for n, d, k in ((40, 30, 5), (128, 500, 16)):
        x = noise(n, d, seed=n)
        for init in ("k-means++", "random", torch.arange(k), x[:k] * 0.9):
            found = [lk.kmeans(x, k, init=init, n_init=3, space=space) for space in SPACES]
            with lk.use_backend("reference"):
                found += [lk.kmeans(x, k, init=init, n_init=3, space=space) for space in SPACES]
                found.append(lk.kmeans(x.double(), k, init=init, n_init=3))
            for other in found[1:]:
                assert torch.equal(other.labels, found[0].labels) and other.n_iter == found[0].n_iter
                assert error_ratio(found[0].centroids, other.centroids) < 1e-6
                assert found[0].inertia == pytest.approx(other.inertia, rel=1e-6)


def test_weights_are_multiplicities(isa):
    x = noise(30, 20, seed=3)
    times = torch.randint(0, 4, (30,), generator=generator(4))
    first = x[times > 0][:4]
    repeated = lk.kmeans(x.repeat_interleave(times, dim=0), 4, init=first)
    for space in SPACES:
        found = lk.kmeans(x, 4, init=first, weights=times, space=space)
        assert torch.equal(found.labels.repeat_interleave(times), repeated.labels)
        assert error_ratio(found.centroids, repeated.centroids) < 1e-6
        assert found.inertia == pytest.approx(repeated.inertia, rel=1e-5)
        labels, centroids, inertia, iterations = lloyd(x, first, weights=times)
        assert found.labels.tolist() == labels.tolist() and found.n_iter == iterations
        assert error_ratio(found.centroids, torch.from_numpy(centroids)) < 1e-6
        assert found.inertia == pytest.approx(inertia, rel=1e-5)


@pytest.mark.parametrize("space", SPACES)
def test_points_without_weight_have_no_say(isa, space):
    x = torch.cat([blobs(20, 6, 2), torch.full((3, 6), 1e3)])
    weights = torch.cat([torch.rand(20, generator=generator(0)) + 0.5, torch.zeros(3)])
    for init in ("k-means++", "random"):
        found = lk.kmeans(x, 2, init=init, weights=weights, space=space)
        assert found.centroids.abs().max() < 10
        assert same_partition(found.labels[:20], torch.arange(20) % 2)


@pytest.mark.parametrize("space", SPACES)
def test_empty_clusters_take_the_farthest_point(isa, space):
    x = torch.tensor([[0.0], [0.5], [1.0], [10.0], [30.0], [30.5]])
    first = torch.tensor([[0.0], [1000.0], [30.0], [2000.0]])
    found = lk.kmeans(x, 4, init=first, space=space)
    labels, centroids, inertia, iterations = lloyd(x, first)
    assert found.labels.tolist() == labels.tolist() and len(set(found.labels.tolist())) == 4
    assert found.centroids.tolist() == centroids.tolist()
    assert found.inertia == pytest.approx(inertia) and found.n_iter == iterations


@pytest.mark.parametrize("space", SPACES)
def test_duplicates(isa, space):
    """Every distinct point becomes a centroid; where k is larger than their number, the rest repeat some."""
    x = noise(5, 40).repeat(4, 1)
    for k in (5, 8):
        found = lk.kmeans(x, k, space=space)
        assert found.inertia == 0 and same_partition(found.labels, torch.arange(20) % 5)
        distances = torch.cdist(found.centroids, x[:5])
        assert (distances.amin(dim=1) == 0).all() and (distances.amin(dim=0) == 0).all()


@pytest.mark.parametrize("space", SPACES)
def test_as_many_clusters_as_points(isa, space):
    x = noise(19, 70)
    found = lk.kmeans(x, 19, space=space)
    assert sorted(found.labels.tolist()) == list(range(19)) and found.inertia == 0
    assert torch.equal(found.centroids[found.labels], x)


@pytest.mark.parametrize("space", SPACES)
def test_a_large_common_offset_changes_nothing(isa, space):
    """Squares of the points would drown their differences in float32."""
    x = blobs(60, 200, 4, spread=0.3)
    offset = 1000 + 100 * torch.randn(200, generator=generator(7))
    shifted = x + offset
    found = lk.kmeans(shifted, 4, space=space)
    assert same_partition(found.labels, torch.arange(60) % 4)
    exact = sum(float((shifted[i::4].double() - shifted[i::4].double().mean(dim=0)).square().sum()) for i in range(4))
    assert found.inertia == pytest.approx(exact, rel=1e-5 if space == "gram" else 1e-3)


def factors(ranks, d_in, d_out, dtype=torch.float32, seed=0):
    g = generator(seed)
    A = [torch.randn(r, d_in, generator=g).to(dtype) for r in ranks]
    return A, [torch.randn(d_out, r, generator=g).to(dtype) for r in ranks]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_parts_and_row_blocks_are_the_whole(isa, dtype):
    A, B = factors((5, 16, 1, 33, 8), 130, 77, dtype)
    whole = torch.cat([torch.cat(A), torch.cat(B, dim=1).T], dim=1)
    first = whole[::9].float()
    for space in SPACES:
        found = lk.kmeans((A, [b.T for b in B]), 7, init=(first[:, :130], first[:, 130:]), space=space)
        joined = lk.kmeans(whole, 7, init=first, space=space)
        assert torch.equal(found.labels, joined.labels) and found.n_iter == joined.n_iter
        assert [c.shape for c in found.centroids] == [(7, 130), (7, 77)]
        assert error_ratio(torch.cat(found.centroids, dim=1), joined.centroids) < 1e-6
        assert found.inertia == pytest.approx(joined.inertia, rel=1e-6)
        seeded = lk.kmeans((torch.cat(A), [b.T for b in B]), 7, seed=5, space=space)
        assert seeded.inertia == pytest.approx(lk.kmeans(whole, 7, seed=5, space=space).inertia, rel=1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_scales_multiply_the_rows_of_each_part(isa, dtype):
    A, B = factors((16, 9), 60, 45, dtype)
    scales = torch.rand(2, 25, generator=generator(1)) + 0.5
    scaled = (torch.cat(A).float() * scales[0][:, None], torch.cat(B, dim=1).float().T * scales[1][:, None])
    for space in SPACES:
        found = lk.kmeans((A, [b.T for b in B]), 4, scales=scales, init=torch.arange(4), space=space)
        wanted = lk.kmeans(scaled, 4, init=torch.arange(4), space=space)
        assert torch.equal(found.labels, wanted.labels)
        for ours, exact in zip(found.centroids, wanted.centroids, strict=True):
            assert error_ratio(ours, exact) < 1e-6
        assert found.inertia == pytest.approx(wanted.inertia, rel=1e-5)


def ragged():
    """Problems of all kinds, with their k and weights."""
    A, B = factors((5, 16), 90, 40)
    problems = [noise(50, 64), (A, [b.T for b in B]), noise(7, 3000).half(), (noise(90, 33, 1), noise(90, 5, 2))]
    weights = [None, torch.rand(21, generator=generator(3)), None, torch.arange(90) % 3]
    return problems, [6, 4, 7, 11], weights


@pytest.mark.parametrize("space", [*SPACES, "auto"])
def test_a_ragged_batch_is_its_problems_one_by_one_for_any_number_of_threads(isa, space, threads_restored):
    problems, ks, weights = ragged()
    torch.set_num_threads(3)
    together = lk.kmeans(problems * 2, ks * 2, weights=weights * 2, n_init=3, seed=9, space=space)
    torch.set_num_threads(1)
    for i, (points, k, w) in enumerate(zip(problems, ks, weights, strict=True)):
        alone = lk.kmeans(points, k, weights=w, n_init=3, seed=9, space=space)
        assert equal(alone, together[i]) and equal(alone, together[i + len(problems)])


def test_threads_change_no_bit_of_a_large_problem(threads_restored):
    x = blobs(600, 5000, 20, spread=2.0)
    found = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        found.append([lk.kmeans(x, 24, n_init=2, space=space) for space in SPACES])
    for others in found[1:]:
        assert all(equal(a, b) for a, b in zip(others, found[0], strict=True))


def test_the_seed_decides():
    x = noise(100, 10)
    one, same, other = (lk.kmeans(x, 12, seed=seed, n_init=1) for seed in (1, 1, 2))
    assert equal(one, same) and not torch.equal(one.labels, other.labels)
    more = [lk.kmeans(x, 12, seed=1, n_init=runs).inertia for runs in (1, 5, 20)]
    assert more == sorted(more, reverse=True)


def test_auto_takes_the_cheaper_space(monkeypatch):
    module = importlib.import_module("lorakern.ops.kmeans")
    spaces = []
    gram, direct = module._in_gram_space, module._directly
    monkeypatch.setattr(module, "_in_gram_space", lambda *a: spaces.append("gram") or gram(*a))
    monkeypatch.setattr(module, "_directly", lambda *a: spaces.append("direct") or direct(*a))
    lk.kmeans([noise(128, 50), noise(1000, 4)], 8, n_init=1)
    assert spaces == ["gram", "direct"]
    spaces.clear()
    lk.kmeans(noise(500, 4), 8, n_init=10)
    lk.kmeans(noise(500, 4), 2, init=noise(2, 4), n_init=10)
    assert spaces == ["gram", "direct"]


@pytest.mark.parametrize("space", SPACES)
def test_iterations_and_tolerance(space):
    x = noise(120, 3)
    long, short = (lk.kmeans(x, 9, init=x[:9], max_iter=n, space=space) for n in (300, 2))
    assert short.n_iter == 2 < long.n_iter and short.inertia > long.inertia
    for tol in (0.0, 1e-3, 0.3):
        labels, _, inertia, iterations = lloyd(x, x[:9], tol=tol)
        found = lk.kmeans(x, 9, init=x[:9], tol=tol, space=space)
        assert (found.n_iter, found.labels.tolist()) == (iterations, labels.tolist())
        assert found.inertia == pytest.approx(inertia, rel=1e-6)


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 40), st.integers(1, 30), st.integers(0, 2**63), st.data())
def test_properties(n, d, seed, data):
    """Labels are those of the nearest centroid, the order of points does not matter, gram goes on where direct ended.

    From the same seeds the spaces may part: points closer than the rounding of inner products are one to gram space.
    """
    k = data.draw(st.integers(1, n))
    x = noise(n, d, seed % 1000)
    order = torch.randperm(n, generator=generator(seed % 1000))
    first = torch.arange(k)
    found = lk.kmeans(x, k, init=first, seed=seed)
    _, sqdist = lk.kmeans_assign(x, found.centroids)
    assert found.inertia == pytest.approx(float(sqdist.double().sum()), rel=1e-4, abs=1e-5)
    own = (x - found.centroids[found.labels]).square().sum(dim=1)
    assert (own <= torch.cdist(x, found.centroids).square().amin(dim=1) + 1e-4).all()
    still, moved = (lk.kmeans(points, k, init=x[first], space="direct") for points in (x, x[order]))
    assert moved.inertia == pytest.approx(still.inertia, rel=1e-4, abs=1e-5)
    again = lk.kmeans(x, k, init=still.centroids, space="gram")
    assert again.inertia <= still.inertia * (1 + 1e-4) + 1e-5


BAD = {
    "more clusters than points": (lambda x: lk.kmeans(x, 9), r"k must be at most the number of points .*8 in points"),
    "no cluster": (lambda x: lk.kmeans(x, 0), "k must be a positive integer; got 0"),
    "no points": (lambda x: lk.kmeans(x[:0], 1), "at least one point"),
    "no problem": (lambda x: lk.kmeans([], 1), "at least one problem; got an empty list"),
    "no part": (lambda x: lk.kmeans((), 1), "at least one part"),
    "three dimensions": (lambda x: lk.kmeans(x[None], 1), r"points must be \(N, D\).* got \(1, 8, 5\)"),
    "integers": (lambda x: lk.kmeans(x.int(), 1), "got .* int32"),
    "parts of different length": (lambda x: lk.kmeans((x, x[1:]), 1), r"a row for each in every part; got \[8, 7\]"),
    "blocks of different width": (lambda x: lk.kmeans(([x, x[:, 1:]],), 1), "points, part 0, must have rows of one"),
    "no data": (lambda x: lk.kmeans(x.to("meta"), 1), "points must have data"),
    "float64": (lambda x: lk.kmeans(x.double(), 1), "float32, float16 or bfloat16"),
    "init": (lambda x: lk.kmeans(x, 2, init="best"), "init must be 'k-means\\+\\+'.*got 'best'"),
    "too few centroids": (lambda x: lk.kmeans(x, 3, init=x[:2]), "init must have k = 3 centroids; got 2"),
    "centroids too short": (lambda x: lk.kmeans(x, 2, init=x[:2, 1:]), r"shape \(2, 5\)"),
    "indices out of range": (lambda x: lk.kmeans(x, 2, init=torch.tensor([0, 8])), "indices from 0 to 7"),
    "init for parts": (lambda x: lk.kmeans((x, x), 2, init=x[:2]), r"a tuple of \(k, 5\) and \(k, 5\)"),
    "n_init": (lambda x: lk.kmeans(x, 2, n_init=0), "n_init must be a positive integer; got 0"),
    "max_iter": (lambda x: lk.kmeans(x, 2, max_iter=2.5), "max_iter must be a positive integer; got 2.5"),
    "tol": (lambda x: lk.kmeans(x, 2, tol=math.nan), "tol must be a finite number"),
    "seed": (lambda x: lk.kmeans(x, 2, seed="0"), "seed must be an integer"),
    "space": (lambda x: lk.kmeans(x, 2, space="cpu"), "space must be 'auto'"),
    "weights": (lambda x: lk.kmeans(x, 2, weights=torch.ones(7)), r"weights of points must be .*\(8,\)"),
    "negative weights": (lambda x: lk.kmeans(x, 2, weights=-torch.ones(8)), "not negative, and not all 0"),
    "weights of 0": (lambda x: lk.kmeans(x, 2, weights=torch.eye(8)[0]), "number of points with weight, 1"),
    "scales": (lambda x: lk.kmeans((x, x), 2, scales=torch.ones(3, 8)), r"\(8,\) or \(2, 8\)"),
    "ks": (
        lambda x: lk.kmeans([x, x], [2, 2, 2]),
        "k must be one for all, or a list of 2 like points; got a list of 3",
    ),
    "a list for one": (lambda x: lk.kmeans(x, [2]), "k must be no list"),
    "one of several": (lambda x: lk.kmeans([x, x[:1]], 2), r"1 in points\[1\]; got 2"),
}


@pytest.mark.parametrize("call, message", BAD.values(), ids=BAD)
def test_bad_input_is_refused(call, message):
    with pytest.raises(lk.LorakernError, match=f"^kmeans: .*{message}|{message}"):
        call(noise(8, 5))


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_points_that_are_not_finite_are_refused(isa, space, dtype):
    for value in (math.nan, math.inf, -math.inf):
        x = noise(20, 150).to(dtype)
        x[17, 141] = value
        with pytest.raises(lk.LorakernError, match=r"points\[1\], part 0, must be finite; got 1 value"):
            lk.kmeans([(noise(20, 150).to(dtype),), (x, x[:, :3])], 2, space=space)
    if dtype != torch.float16:
        with pytest.raises(lk.LorakernError, match=r"points is too large: .* overflow float32"):
            lk.kmeans((1e30 * noise(20, 150)).to(dtype), 2, space=space)


def sklearn_kmeans(x, k, **options):
    cluster = pytest.importorskip("sklearn.cluster", reason="scikit-learn is not installed")
    return cluster.KMeans(k, **options).fit(x.numpy())


def test_given_centroids_lead_where_scikit_learn_goes():
    for seed in range(5):
        x, spread = noise(150, 30, seed), blobs(150, 30, 12, seed)
        for points in (x, spread):
            theirs = sklearn_kmeans(points, 12, init=points[:12].numpy(), n_init=1)
            for space in SPACES:
                ours = lk.kmeans(points, 12, init=points[:12], space=space)
                assert ours.labels.tolist() == theirs.labels_.tolist() and ours.n_iter == theirs.n_iter_
                assert ours.inertia == pytest.approx(theirs.inertia_, rel=1e-3)


def test_as_good_as_scikit_learn_on_random_problems():
    ratios = []
    for seed in range(20):
        x = noise(100, 5 + seed, seed) + 2 * blobs(100, 5 + seed, 8, seed)
        theirs = sklearn_kmeans(x, 8, n_init=10, random_state=seed)
        ratios.append(lk.kmeans(x, 8, seed=seed).inertia / theirs.inertia_)
    assert max(ratios) < 1.01, ratios
