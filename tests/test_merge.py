"""lorakern.merge: properties that every method must have, and the methods on the factors against their formulas."""

import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from merging import ALL, RANDOM, SHAPES, SYMMETRIC, TOLERANCES, assert_update, factors, total, update
from merging_strategies import adapters as some_adapters
from merging_strategies import weights_for

import lorakern as lk
from lorakern.merge import methods

pytestmark = pytest.mark.usefixtures("one_thread")


def common_dtype(*modules):
    dtypes = [tensor.dtype for A, B, _ in modules for tensor in (A, B)]
    dtype = dtypes[0]
    for other in dtypes:
        dtype = torch.promote_types(dtype, other)
    return dtype


def test_every_method_is_tested_here():
    assert {name for name in methods if not name.startswith("doc_")} == ALL.keys()


@pytest.mark.parametrize("name", ALL)
@settings(deadline=None, max_examples=25)
@given(adapters=some_adapters(most=1))
def test_one_adapter_of_weight_one_is_the_identity(name, adapters):
    merged = lk.merge(adapters, method=name, **ALL[name])
    assert list(merged) == list(adapters[0])
    for module, own in adapters[0].items():
        assert merged[module].A.dtype == merged[module].B.dtype == common_dtype(own)
        assert_update(merged[module], update(own), TOLERANCES[common_dtype(own)])


@pytest.mark.parametrize("name", ["cat", "linear", "fedex"])
@settings(deadline=None, max_examples=50)
@given(st.data())
def test_exact_methods_equal_the_sum(name, data):
    adapters = data.draw(some_adapters())
    weights = data.draw(weights_for(len(adapters)))
    try:
        merged = lk.merge(adapters, method=name, weights=weights, dtype=torch.float64)
    except lk.LorakernError as error:
        assert name == "fedex" and "sum to zero" in str(error)
        return
    assert set(merged) == {module for adapter in adapters for module in adapter}
    for module, result in merged.items():
        largest = sum(abs(w) * update(a[module]).abs() for a, w in zip(adapters, weights, strict=True) if module in a)
        difference = (update(result) - total(adapters, weights, module)).norm()
        assert difference <= 1e-6 * largest.norm()


@settings(deadline=None, max_examples=50)
@given(st.data())
def test_svd_at_full_rank_equals_cat(data):
    adapters = data.draw(some_adapters())
    options = {"weights": data.draw(weights_for(len(adapters))), "dtype": torch.float64}
    cat, svd = lk.merge(adapters, "cat", **options), lk.merge(adapters, "svd", rank=99, **options)
    for module in cat:
        scale = sum(update(a[module]).norm() for a in adapters if module in a)
        assert (update(cat[module]) - update(svd[module])).norm() <= 1e-6 * scale


@pytest.mark.parametrize("name", SYMMETRIC)
@settings(deadline=None, max_examples=20, derandomize=True)
@given(st.data())
def test_order_of_the_adapters_does_not_matter(name, data):
    adapters = data.draw(some_adapters(least=2))
    weights = data.draw(weights_for(len(adapters)).filter(lambda weights: abs(sum(weights)) > 0.01))
    order = data.draw(st.permutations(range(len(adapters))))
    options = {**SYMMETRIC[name], "dtype": torch.float64}
    try:
        one = lk.merge(adapters, name, weights=weights, **options)
    except lk.LorakernError as error:
        assert name == "fedex" and "sum to zero" in str(error)
        return
    other = lk.merge([adapters[i] for i in order], name, weights=[weights[i] for i in order], **options)
    assert set(one) == set(other)
    for module in one:
        # a merge that cancels leaves rounding errors of what went in
        size = sum(update(a[module]).norm() for a in adapters if module in a)
        assert (update(one[module]) - update(other[module])).norm() <= 1e-5 * (size + update(one[module]).norm())


@pytest.mark.parametrize("name", ALL)
def test_seed_decides_and_modules_do_not_meet(name):
    adapters = [{m: factors(*SHAPES[m], 3, 0.5, seed=10 * i + len(m)) for m in SHAPES} for i in range(3)]
    options = {"density": 0.6} if "density" in methods[name].options else {}
    one = lk.merge(adapters, name, seed=5, **options)
    turned = [dict(reversed(adapter.items())) for adapter in adapters]
    alone = [{"q_proj": adapter["q_proj"]} for adapter in adapters]
    other = lk.merge(adapters, name, seed=6, **options)
    for again in (lk.merge(adapters, name, seed=5, **options), lk.merge(turned, name, seed=5, **options)):
        for module in SHAPES:
            assert torch.equal(again[module].A, one[module].A) and torch.equal(again[module].B, one[module].B)
    assert torch.equal(lk.merge(alone, name, seed=5, **options)["q_proj"].A, one["q_proj"].A)
    same = all(torch.equal(update(one[module]), update(other[module])) for module in SHAPES)
    # two seeds may find the same clusters, or not
    assert name == "lego" or same == (name not in RANDOM)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("rank", [1, 3, 6])
def test_rank_is_a_limit_and_inputs_are_left_alone(name, rank):
    ranks = (1, 2, 3) if rank == 3 else (rank, rank, rank)
    adapters = [{"p": factors(40, 31, r, 0.5, seed=i)} for i, r in enumerate(ranks)]
    before = pickle.dumps(adapters)
    if name == "cat":
        with pytest.raises(lk.LorakernError, match=r"p: cat: rank must be None or at least the sum of the ranks"):
            lk.merge(adapters, name, rank=rank)
    else:
        merged = lk.merge(adapters, name, rank=rank, **ALL[name])
        assert merged["p"].rank == rank
        assert update(merged["p"]).any()
    assert pickle.dumps(adapters) == before


def test_truncation_is_optimal():
    adapters = [{"p": factors(40, 31, 5, 0.5, seed=i)} for i in range(3)]
    exact = total(adapters, [1, -0.5, 2], "p")
    singular = torch.linalg.svdvals(exact)
    for name in ("linear", "svd"):
        merged = lk.merge(adapters, name, weights=[1, -0.5, 2], rank=6)["p"]
        assert merged.rank == 6
        assert (update(merged) - exact).norm().item() == pytest.approx(singular[6:].norm().item(), rel=1e-5)
    assert lk.merge(adapters, "svd")["p"].rank == 5 and lk.merge(adapters, "linear")["p"].rank == 15
    energy = singular.square().cumsum(0) / singular.square().sum()
    wanted = int((energy < 0.8).sum()) + 1
    assert lk.merge(adapters, "linear", weights=[1, -0.5, 2], rank=0.8)["p"].rank == wanted


def test_cat_keeps_bits():
    for dtype in TOLERANCES:
        adapters = [{"p": factors(5, 7, r, 0.3, dtype, seed=r)} for r in (2, 3)]
        A, B, scale = lk.merge(adapters, "cat", weights=[1.0, -1.0])["p"]
        assert scale == 0.3
        assert torch.equal(A, torch.cat([adapters[0]["p"][0], adapters[1]["p"][0]]))
        assert torch.equal(B, torch.cat([adapters[0]["p"][1], -adapters[1]["p"][1]], dim=1))


def test_fedex_puts_the_means_first():
    adapters = [{"p": factors(40, 31, r, s, torch.float64, seed=r)} for r, s in ((4, 0.5), (2, 2.0), (4, 1.0))]
    weights = [0.2, 0.5, 0.3]
    A, B, scale = lk.merge(adapters, "fedex", weights=weights)["p"]
    mean_A, mean_B = torch.zeros(4, 31, dtype=torch.float64), torch.zeros(40, 4, dtype=torch.float64)
    for weight, adapter in zip(weights, adapters, strict=True):
        a, b, s = adapter["p"]
        mean_A[: len(a)] += weight * a
        mean_B[:, : len(a)] += weight * s * b
    assert scale == 1.0 and A.shape[0] == 12
    assert torch.allclose(A[:4], mean_A) and torch.allclose(B[:, :4], mean_B)

    residual = torch.linalg.svdvals(total(adapters, weights, "p") - mean_B @ mean_A)
    A, B, _ = lk.merge(adapters, "fedex", weights=weights, rank=7)["p"]
    assert A.shape[0] == 7 and torch.allclose(A[:4], mean_A)
    assert (B @ A - total(adapters, weights, "p")).norm().item() == pytest.approx(residual[3:].norm().item(), rel=1e-5)
    assert torch.allclose(lk.merge(adapters, "fedex", weights=weights, rank=4)["p"].A, mean_A)
    with pytest.raises(lk.LorakernError, match="p: fedex: rank must be None or an integer of at least 4, got 3"):
        lk.merge(adapters, "fedex", rank=3)
    with pytest.raises(lk.LorakernError, match="p: fedex: weights must not sum to zero"):
        lk.merge(adapters, "fedex", weights=[1.0, 1.0, -2.0])


def dense_knots(adapters, weights, density):
    """KnOTS-TIES from dense updates in float64."""
    U, S, Vh = torch.linalg.svd(torch.cat([update(a["p"]) for a in adapters], dim=1), full_matrices=False)
    keep = S.gt(1e-9 * S[0])
    parts = torch.stack(Vh[keep].chunk(len(adapters), dim=1))
    parts[parts.abs() < 1e-9] = 0
    for part in parts:
        k = int(density * part.numel())
        part[part.abs() < part.abs().flatten().sort(descending=True).values[k - 1]] = 0
    elected = torch.where(parts.sum(0) >= 0, 1.0, -1.0)
    agrees = parts.sign() == elected
    column = torch.tensor(weights, dtype=torch.float64)[:, None, None]
    return U[:, keep] * S[keep] @ ((parts * column * agrees).sum(0) / agrees.sum(0).clamp(min=1))


@pytest.mark.parametrize("density", [1.0, 0.3])
@pytest.mark.parametrize("d_out, d_in, ranks", [(40, 31, (5, 2, 7)), (9, 50, (5, 5, 5)), (63, 5, (1, 2, 3))])
def test_knots_equals_the_dense_formula(density, d_out, d_in, ranks):
    adapters = [{"p": factors(d_out, d_in, r, 1.5 - i, torch.float64, seed=i)} for i, r in enumerate(ranks)]
    adapters.append({"p": adapters[0]["p"]})  # a direction twice: the basis has fewer than the sum of the ranks
    weights = [1.0, 0.5, -2.0, 0.25]
    merged = lk.merge(adapters, "knots", weights=weights, density=density)["p"]
    assert merged.rank == min(sum(ranks), d_out)
    assert_update(merged, dense_knots(adapters, weights, density), 1e-9)
