"""LoRA-LEGO: its identities, its formula on clusters that can be told apart, and what must not matter."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from merging import SHAPES, assert_update, factors, total, update
from merging_strategies import adapters as some_adapters
from problems import error_ratio

import lorakern as lk
from lorakern.merge import _clusters, merge_modules

PLAIN = {"parameter_reweight": False, "output_reweight": False}
D_IN, D_OUT = 31, 40


pytestmark = pytest.mark.usefixtures("one_thread")


def adapter(rank, scale=1.0, seed=0, dtype=torch.float32, module="p"):
    return {module: factors(D_OUT, D_IN, rank, scale, dtype, seed)}


def mixed(adapter, seed):
    """The same adapter with its ranks in another order."""
    order = torch.randperm(adapter["p"][0].shape[0], generator=torch.Generator().manual_seed(seed))
    A, B, scale = adapter["p"]
    return {"p": (A[order], B[:, order], scale)}


def families(sizes, noise=0.01, seed=0):
    """Units (R, D_IN + D_OUT) float64 near as many far points as there are sizes, and the family of each."""
    g = torch.Generator().manual_seed(seed)
    family = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    centres = torch.randn(len(sizes), D_IN + D_OUT, generator=g, dtype=torch.float64)
    units = centres[family] + noise * torch.randn(len(family), D_IN + D_OUT, generator=g, dtype=torch.float64)
    return units, family


def dealt(units, ranks, scales, dtype=torch.float64):
    """Adapters of those ranks and scales whose units, with the scale folded in, are these."""
    parts = units.split(ranks)
    return [
        {"p": ((u[:, :D_IN] / abs(s) ** 0.5).to(dtype), (u[:, D_IN:].T / math.copysign(abs(s) ** 0.5, s)).to(dtype), s)}
        for u, s in zip(parts, scales, strict=True)
    ]


def expected(units, family, weights=None, *, norm="inf", parameter_reweight=True, factor=1.0):
    """The update of LoRA-LEGO from its formula, cluster by cluster, in float64."""
    order = {"inf": torch.inf, "l2": 2}[norm]
    weights = torch.ones(len(units), dtype=torch.float64) if weights is None else weights
    result = torch.zeros(D_OUT, D_IN, dtype=torch.float64)
    for members in (family == c for c in family.unique()):
        w = weights[members] / weights[members].sum()
        mean = w @ units[members]
        if parameter_reweight:
            mean = mean * (w @ units[members].norm(order, dim=1)) / mean.norm(order)
        result += torch.outer(mean[D_IN:], mean[:D_IN])
    return factor * result


# the identities


@pytest.mark.parametrize("options", [{}, PLAIN, {"norm": "l2"}, {"assign": "normalised"}, {"balance": True}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("rank, count", [(1, 1), (5, 1), (5, 4), (16, 7)])
def test_identical_adapters_are_that_adapter(rank, count, dtype, options):
    one = adapter(rank, 0.5, dtype=dtype)
    merged = lk.merge([mixed(one, i) for i in range(count)], "lego", rank=rank, **options)["p"]
    assert merged.rank == rank and merged.A.dtype == dtype
    tolerance = 1e-6 if dtype.itemsize >= 4 or "balance" not in options else 8e-3
    assert_update(merged, update(one["p"]), tolerance)
    if "balance" not in options:
        rows, own = (torch.tensor(sorted(A.tolist())) for A in (merged.A, one["p"][0]))
        assert torch.allclose(rows, own, rtol=1e-6, atol=0)


@pytest.mark.parametrize("ranks, scales", [((4, 4, 4), (1.0, 1.0, 1.0)), ((1, 5, 2), (0.5, 3.0, -2.0))])
def test_as_many_clusters_as_units_are_the_concatenation(ranks, scales):
    adapters = [adapter(r, s, seed=r + 10 * i) for i, (r, s) in enumerate(zip(ranks, scales, strict=True))]
    exact, R = total(adapters, [1.0] * 3, "p"), sum(ranks)
    for options in ({}, {"norm": "l2"}, {"fold_scale": False}, {"assign": "normalised"}, {"align_signs": True}):
        plain = lk.merge(adapters, "lego", rank=R, **PLAIN, **options)["p"]
        assert plain.rank == R
        assert_update(plain, exact, 1e-6)
        # a cluster of one keeps its length: all that is left is sqrt(r / k), with equal ranks 1 / sqrt(adapters)
        whole = lk.merge(adapters, "lego", rank=R, **options)["p"]
        assert_update(whole, exact * math.sqrt(R / 3 / R), 1e-6)
    if len(set(scales)) == 1:
        rows = {tuple(row) for one in adapters for row in one["p"][0].tolist()}
        assert set(map(tuple, lk.merge(adapters, "lego", rank=R, **PLAIN)["p"].A.tolist())) == rows


def test_more_clusters_than_units_are_lowered_to_these():
    adapters = [adapter(4, seed=1), adapter(2, seed=2)]
    merged = lk.merge(adapters, "lego", rank=99)["p"]
    assert merged.rank == 6
    assert torch.equal(merged.A, lk.merge(adapters, "lego", rank=6)["p"].A)


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_order_of_ranks_and_adapters_does_not_matter(data):
    adapters = [
        adapter(
            data.draw(st.integers(1, 6)),
            data.draw(st.sampled_from([1.0, 0.5, -2.0])),
            seed=data.draw(st.integers(0, 9)),
        )
        for _ in range(data.draw(st.integers(1, 4)))
    ]
    options = data.draw(
        st.sampled_from([{}, {"norm": "l2"}, {"assign": "normalised"}, {"align_signs": True}, {"fold_scale": False}])
    )
    rank = data.draw(st.integers(1, 8))
    weights = data.draw(
        st.lists(st.sampled_from([1.0, 0.5, 2.0, -1.0]), min_size=len(adapters), max_size=len(adapters))
    )
    order = data.draw(st.permutations(range(len(adapters))))
    one = lk.merge(adapters, "lego", rank=rank, weights=weights, **options)["p"]
    shuffled = [mixed(adapters[i], data.draw(st.integers(0, 99))) for i in order]
    other = lk.merge(shuffled, "lego", rank=rank, weights=[weights[i] for i in order], **options)["p"]
    size = sum(update(a["p"]).norm() for a in adapters)
    assert (update(one) - update(other)).norm() <= 1e-5 * size


# the formula


@pytest.mark.parametrize("norm", ["inf", "l2"])
@pytest.mark.parametrize("parameter_reweight", [True, False])
@pytest.mark.parametrize("output_reweight", [True, False])
@pytest.mark.parametrize("noise", [0.01, 0.3])
def test_formula(norm, parameter_reweight, output_reweight, noise):
    units, family = families([3, 1, 4, 2, 5], noise)
    shuffle = torch.randperm(15, generator=torch.Generator().manual_seed(1))
    units, family = units[shuffle], family[shuffle]
    adapters = dealt(units, [4, 9, 2], [0.5, 3.0, -1.0])
    merged = lk.merge(
        adapters,
        "lego",
        rank=5,
        norm=norm,
        parameter_reweight=parameter_reweight,
        output_reweight=output_reweight,
    )["p"]
    factor = math.sqrt(5 / 5) if output_reweight else 1.0
    formula = {"norm": norm, "parameter_reweight": parameter_reweight}
    assert_update(merged, expected(units, family, factor=factor, **formula), 1e-6)


@pytest.mark.parametrize("reference, r", [("mean", 5), ("max", 9), (8, 8), (0.5, 0.5)])
def test_reference_rank(reference, r):
    units, family = families([3, 5, 7])
    adapters = dealt(units, [4, 9, 2], [1.0, 1.0, 1.0])
    merged = lk.merge(adapters, "lego", rank=3, reference_rank=reference)["p"]
    assert_update(merged, expected(units, family, factor=math.sqrt(r / 3)), 1e-6)


def test_weights_count_units_or_scale_updates():
    units, family = families([3, 5, 7], noise=0.3)
    ranks, weights = [4, 9, 2], [2.0, 0.5, 1.0]
    adapters = dealt(units, ranks, [1.0, 1.0, 1.0])
    spread = torch.tensor(weights, dtype=torch.float64).repeat_interleave(torch.tensor(ranks))
    merged = lk.merge(adapters, "lego", rank=3, weights=weights, reference_rank=3)["p"]
    assert_update(merged, expected(units, family, spread), 1e-6)
    # weights are ratios: the whole of them does not matter
    again = lk.merge(adapters, "lego", rank=3, weights=[10 * w for w in weights], reference_rank=3)["p"]
    assert_update(again, update(merged), 1e-6)

    scaled = lk.merge(adapters, "lego", rank=15, weights=weights, weights_as="scales", **PLAIN)["p"]
    assert_update(scaled, total(adapters, weights, "p"), 1e-6)
    merged = lk.merge(adapters, "lego", rank=3, weights=weights, weights_as="scales", reference_rank=3)["p"]
    assert_update(merged, expected(units * spread.sqrt()[:, None], family), 1e-6)


@pytest.mark.parametrize("weights_as", ["samples", "scales"])
@pytest.mark.parametrize("fold_scale", [True, False])
def test_negative_and_zero_weights(weights_as, fold_scale):
    adapters = [adapter(3, 0.5, seed=1), adapter(2, seed=2), adapter(4, seed=3)]
    options = {"weights_as": weights_as, "fold_scale": fold_scale}
    merged = lk.merge(adapters, "lego", rank=9, weights=[1.0, -1.0, 1.0], **PLAIN, **options)["p"]
    assert_update(merged, total(adapters, [1.0, -1.0, 1.0], "p"), 1e-6)
    without = lk.merge(adapters[::2], "lego", rank=3, **options)["p"]
    assert_update(lk.merge(adapters, "lego", rank=3, weights=[1.0, 0.0, 1.0], **options)["p"], update(without), 1e-6)
    assert not update(lk.merge(adapters, "lego", weights=[0.0] * 3, **options)["p"]).any()


def test_unfolded_scales_are_averaged():
    units, family = families([2, 3], noise=0.0)
    adapters = dealt(units, [2, 3], [1.0, 1.0])
    adapters = [{"p": (*one["p"][:2], scale)} for one, scale in zip(adapters, [3.0, -1.0], strict=True)]
    merged = lk.merge(adapters, "lego", rank=2, fold_scale=False, **PLAIN)["p"]
    parts = [expected(units[family == c], family[family == c], parameter_reweight=False) for c in (0, 1)]
    assert_update(merged, 3.0 * parts[0] - parts[1], 1e-6)


def test_normalised_assignment_leaves_the_means_raw():
    """Directions decide, lengths do not: two families on the same two rays, near and far."""
    g = torch.Generator().manual_seed(0)
    directions = torch.randn(2, D_IN + D_OUT, generator=g, dtype=torch.float64)
    lengths = torch.tensor([1.0, 1.1, 30.0, 31.0], dtype=torch.float64)
    units = (directions[:, None] * lengths[:, None]).reshape(8, -1)
    adapters = dealt(units, [4, 4], [1.0, 1.0])
    by_ray = lk.merge(adapters, "lego", rank=2, assign="normalised", reference_rank=2)["p"]
    assert_update(by_ray, expected(units, torch.arange(2).repeat_interleave(4)), 1e-6)
    raw = lk.merge(adapters, "lego", rank=2, reference_rank=2)["p"]
    assert error_ratio(update(raw), update(by_ray)) > 0.01


def test_members_that_cancel_stay_finite():
    u = families([1])[0]
    merged = lk.merge(dealt(torch.cat([u, -u]), [1, 1], [1.0, 1.0]), "lego", rank=1)["p"]
    assert not update(merged).any()
    # up to rounding, which the reweighting must not blow up
    merged = lk.merge(dealt(torch.cat([u, -u * (1 + 1e-9)]), [1, 1], [1.0, 1.0]), "lego", rank=1)["p"]
    assert update(merged).norm() < 1e-12 * u.square().sum()


# the extensions


def turned(one, signs):
    """The same update, some ranks as (-a, -b)."""
    A, B, scale = one["p"]
    signs = torch.tensor(signs, dtype=A.dtype)
    return {"p": (A * signs[:, None], B * signs, scale)}


@pytest.mark.parametrize("seed", range(5))
def test_signs_do_not_matter_when_aligned(seed):
    g = torch.Generator().manual_seed(seed)
    units, family = families([3, 5, 7], noise=0.2, seed=seed)
    adapters = dealt(units[torch.randperm(15, generator=g)], [4, 9, 2], [1.0, 2.0, 1.0])
    flipped = [turned(a, (torch.randint(0, 2, (a["p"][0].shape[0],), generator=g) * 2 - 1).tolist()) for a in adapters]
    one, other = (lk.merge(a, "lego", rank=3, align_signs=True)["p"] for a in (adapters, flipped))
    assert_update(other, update(one), 1e-6)
    assert_update(one, expected(units, family, factor=math.sqrt(5 / 3)), 1e-6)
    plain = lk.merge(flipped, "lego", rank=3)["p"]
    assert error_ratio(update(plain), update(one)) > 0.1


@pytest.mark.parametrize("options", [{}, {"align_signs": True}, {"assign": "normalised"}])
def test_balance_of_a_and_b_does_not_matter_when_balanced(options):
    units, _ = families([3, 5, 7], noise=0.2)
    adapters = dealt(units, [4, 9, 2], [1.0, 2.0, 1.0])
    g = torch.Generator().manual_seed(0)
    tilted = []
    for one in adapters:
        A, B, scale = one["p"]
        c = torch.rand(len(A), generator=g, dtype=A.dtype) * 4 + 0.1
        tilted.append({"p": (A * c[:, None], B / c, scale)})
    one, other = (lk.merge(a, "lego", rank=3, balance=True, **options)["p"] for a in (adapters, tilted))
    assert_update(other, update(one), 1e-6)
    assert error_ratio(update(lk.merge(tilted, "lego", rank=3, **options)["p"]), update(one)) > 0.1


@pytest.mark.parametrize("half", ["A", "B"])
def test_balance_leaves_products_of_zero_alone(half):
    A, B, scale = adapter(3)["p"]
    A, B = A.clone(), B.clone()
    (A if half == "A" else B.T)[1] = 0
    merged = lk.merge([{"p": (A, B, scale)}], "lego", balance=True, align_signs=True)["p"]
    assert_update(merged, update((A, B, scale)), 1e-6)


# the number of clusters


@pytest.mark.parametrize("options", [{}, {"share_of": "inertia"}, {"align_signs": True}])
def test_a_share_takes_as_many_clusters_as_there_are_families(options):
    units, family = families([4, 3, 6, 2, 1], noise=0.001)
    adapters = dealt(units, [4, 9, 3], [1.0, 2.0, 1.0])
    merged = lk.merge(adapters, "lego", rank=0.999, **options)["p"]
    assert merged.rank == 5
    assert_update(merged, expected(units, family, factor=math.sqrt(16 / 3 / 5)), 1e-5)


def test_share_is_kept_and_grows_with_the_rank():
    adapters = [adapter(8, seed=i) for i in range(3)]
    units = torch.cat([torch.cat([a["p"][0], a["p"][1].T], dim=1) for a in adapters]).double()
    energy, ranks = units.square().sum(), []
    for share in (0.1, 0.5, 0.9, 0.999999):
        merged = lk.merge(adapters, "lego", rank=share, **PLAIN)["p"]
        means = torch.cat([merged.A, merged.B.T], dim=1).double()
        inertia = torch.cdist(units, means).amin(1).square().sum()
        assert inertia <= (1 - share) * energy * 1.0001
        ranks.append(merged.rank)
    assert ranks == sorted(ranks) and ranks[0] < ranks[2] <= 24


def test_share_of_the_inertia_leaves_the_mean_out():
    units, _ = families([4, 3, 6], noise=0.001)
    adapters = dealt(units + 100.0, [4, 7, 2], [1.0, 1.0, 1.0])
    assert lk.merge(adapters, "lego", rank=0.99)["p"].rank == 1
    assert lk.merge(adapters, "lego", rank=0.99, share_of="inertia")["p"].rank == 3


def test_ranks_by_module_and_missing_modules():
    a = {m: factors(*SHAPES[m], 3, 0.5, seed=1) for m in ("q_proj", "v_proj")}
    b = {m: factors(*SHAPES[m], 5, 2.0, seed=2) for m in ("q_proj", "down_proj")}
    merged = lk.merge([a, b], "lego")
    assert {m: merged[m].rank for m in merged} == {"q_proj": 5, "v_proj": 3, "down_proj": 5}
    for module, own in (("v_proj", a), ("down_proj", b)):
        assert_update(merged[module], update(own[module]), 1e-6)
    ranks = {"q_proj": 7, "down_proj": 2}
    merged = lk.merge([a, b], "lego", rank=ranks)
    assert {m: merged[m].rank for m in merged} == {"q_proj": 7, "v_proj": 3, "down_proj": 2}
    # other methods take such a mapping as well
    merged = lk.merge([a, b], "svd", rank=ranks)
    assert {m: merged[m].rank for m in merged} == {"q_proj": 5, "v_proj": 1, "down_proj": 2}
    options = {"q_proj": {"rank": 2, "norm": "l2"}, "v_proj": {"weights": [1.0, 5.0]}, "down_proj": {"rank": 1}}
    merged = lk.merge([a, b], "lego", per_module=options.__getitem__)
    for module in merged:
        own = [{module: x[module]} if module in x else {"other": x["q_proj"]} for x in (a, b)]
        alone = lk.merge(own, "lego", **options[module])
        assert torch.equal(alone[module].A, merged[module].A)
    with pytest.raises(lk.LorakernError, match="rank must be of modules that the adapters have, got 'k_proj'"):
        lk.merge([a, b], "lego", rank={"k_proj": 3})
    with pytest.raises(lk.LorakernError, match="q_proj: rank must be None, a positive integer, or a share"):
        lk.merge([a, b], "lego", rank={"q_proj": 0})


def test_pruning_one_adapter():
    units, family = families([3, 1, 4], noise=0.01)
    (one,) = dealt(units, [8], [0.5])
    merged = lk.merge([one], "lego", rank=3)["p"]
    assert merged.rank == 3
    assert_update(merged, expected(units, family, factor=math.sqrt(8 / 3)), 1e-6)


# batches and seeds


def test_batches_do_not_matter(monkeypatch):
    modules = [f"layers.{i}.p" for i in range(7)]
    adapters = [
        {m: factors(D_OUT + i, D_IN, 3 + (i + j) % 3, 0.5, seed=10 * i + j) for i, m in enumerate(modules)}
        for j in range(3)
    ]
    whole = lk.merge(adapters, "lego", rank=4)
    looked_up = []

    class Lazy(dict):
        def __getitem__(self, module):
            looked_up.append(module)
            return super().__getitem__(module)

    monkeypatch.setattr(_clusters, "_BATCH_NUMBERS", 2000)
    stream = merge_modules([Lazy(one) for one in adapters], "lego", rank=4)
    first, merged = next(stream)
    assert first == modules[0] and len(set(looked_up)) < 4
    assert torch.equal(merged.A, whole[first].A) and torch.equal(merged.B, whole[first].B)
    for module, merged in stream:
        assert torch.equal(merged.A, whole[module].A) and torch.equal(merged.B, whole[module].B)


def test_seeds():
    adapters = [adapter(16, seed=i) for i in range(3)]
    found = [lk.merge(adapters, "lego", rank=9, n_init=1, init="random", seed=seed)["p"].A for seed in (0, 0, 1, 2)]
    assert torch.equal(found[0], found[1])
    assert not all(torch.equal(found[0], other) for other in found[2:])


def test_more_starts_are_no_worse():
    adapters = [adapter(16, seed=i) for i in range(3)]
    units = torch.cat([torch.cat([a["p"][0], a["p"][1].T], dim=1) for a in adapters]).double()

    def inertia(n_init):
        A, B, _ = lk.merge(adapters, "lego", rank=9, n_init=n_init, **PLAIN)["p"]
        return torch.cdist(units, torch.cat([A, B.T], dim=1).double()).square().amin(1).sum()

    assert inertia(20) < inertia(1)


@pytest.mark.parametrize("size", [1e-18, 1e17])
def test_size_does_not_matter(size):
    units, family = families([3, 5, 7])
    adapters = dealt(units, [4, 9, 2], [1.0, 1.0, 1.0], torch.float32)
    sized = [{"p": (A * size, B * size, s)} for A, B, s in (a["p"] for a in adapters)]
    A, B, scale = lk.merge(sized, "lego", rank=3)["p"]
    assert_update((A.double() / size, B.double() / size, scale), expected(units, family, factor=math.sqrt(5 / 3)), 1e-6)


def test_overflow_names_the_module():
    huge = {"p": (torch.full((2, 5), 1e200, dtype=torch.float64), torch.ones(4, 2, dtype=torch.float64), 1.0)}
    with pytest.raises(lk.LorakernError, match="p: lego: the squares of its factors overflow float64"):
        lk.merge([huge], "lego", rank=1)


@settings(deadline=None, max_examples=30)
@given(st.data())
def test_any_adapters_merge(data):
    adapters = data.draw(some_adapters())
    rank = data.draw(st.sampled_from([None, 1, 4, 0.5, 0.95]))
    options = data.draw(st.sampled_from([{}, {"balance": True}, {"align_signs": True}, {"assign": "normalised"}]))
    merged = lk.merge(adapters, "lego", rank=rank, **options)
    assert set(merged) == {module for one in adapters for module in one}
    for module, (A, B, _) in merged.items():
        pool = sum(one[module][0].shape[0] for one in adapters if module in one)
        assert A.shape[0] <= (rank if isinstance(rank, int) else pool)
        assert A.isfinite().all() and B.isfinite().all()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"rank": 0}, "rank must be None, a positive integer"),
        ({"norm": "l1"}, "lego: norm must be 'inf' or 'l2', got 'l1'"),
        ({"n_init": 0}, "lego: n_init must be an integer at least 1, got 0"),
        ({"n_init": 2.0}, "lego: n_init must be an integer"),
        ({"reference_rank": 0}, "lego: reference_rank must be 'mean' or 'max' or a number above 0, got 0"),
        ({"assign": "cosine"}, "lego: assign must be 'raw' or 'normalised'"),
        ({"weights_as": "both"}, "lego: weights_as must be 'samples' or 'scales'"),
        ({"init": "kmeans"}, "lego: init must be 'k-means\\+\\+' or 'random'"),
        ({"fold_scale": 1}, "lego: fold_scale must be True or False"),
        ({"density": 0.5}, "lego: there is no option 'density'"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(lk.LorakernError, match=message):
        lk.merge([adapter(2)], "lego", **options)
