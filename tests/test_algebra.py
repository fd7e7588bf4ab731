"""delta_norm, delta_distance and truncate against dense float64, and what they refuse."""

import math
from itertools import pairwise, product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import error_ratio

import lorakern as lk

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
SHAPES = [((1,), 1, 1), ((3, 2), 5, 63), ((16, 8, 1), 1000, 63), ((4,) * 5, 12, 9), ((16,) * 4, 200, 300)]


pytestmark = pytest.mark.usefixtures("one_thread")


def terms_of(ranks, d_out, d_in, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [
        ((torch.randn(r, d_in, generator=g)).to(dtype), torch.randn(d_out, r, generator=g).to(dtype), 0.5 - i)
        for i, r in enumerate(ranks)
    ]


def dense(terms):
    return sum(scale * b.double() @ a.double() for a, b, scale in terms)


def dense_of(truncated):
    return truncated.B.double() @ truncated.A.double()


def best(matrix, rank):
    """The best approximation of that rank, and the singular values."""
    U, sigma, Vt = torch.linalg.svd(matrix, full_matrices=False)
    return U[:, :rank] * sigma[:rank] @ Vt[:rank], sigma


def orthogonal(rows, columns, seed):
    """Orthonormal rows."""
    return torch.linalg.qr(torch.randn(columns, rows, generator=torch.Generator().manual_seed(seed)).double()).Q.T


# delta_norm


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_norm(dtype, shape):
    terms = terms_of(*shape, dtype)
    norms = [float(dense([term]).norm()) for term in terms]
    a, b, scale = map(list, zip(*terms, strict=True))
    assert [lk.delta_norm(*term) for term in terms] == pytest.approx(norms, rel=1e-12)
    batch = lk.delta_norm(a, b, scale)
    assert batch.dtype == torch.float64 and batch.tolist() == pytest.approx(norms, rel=1e-12)


def test_norm_of_a_product_that_cancels():
    a, b, _ = terms_of((8,), 300, 200)[0]
    twice = torch.cat([a, a + 1e-6 * torch.randn(a.shape, generator=torch.Generator().manual_seed(9))])
    against = torch.cat([b, -b], dim=1)
    exact = float((against.double() @ twice.double()).norm())
    assert exact < 1e-6 * lk.delta_norm(a, b)
    assert lk.delta_norm(twice, against) == pytest.approx(exact, rel=1e-6, abs=0)


def test_norm_of_a_batch_of_other_shapes_and_layouts():
    g = torch.Generator().manual_seed(3)
    a = [torch.randn(60, 9, generator=g)[::2].T, torch.randn(4, 1001, generator=g).half()[:, 1:]]
    b = [torch.randn(9, 70, generator=g).T, torch.randn(8, 7, generator=g).half().T[:, ::2]]
    exact = [float((x.double() @ y.double()).norm()) / 2 for x, y in zip(b, a, strict=True)]
    assert lk.delta_norm(a, b, 0.5).tolist() == pytest.approx(exact, rel=1e-12)
    assert lk.delta_norm(a, b, torch.tensor([0.5, -0.5])).tolist() == pytest.approx(exact, rel=1e-12)


def test_extreme_sizes():
    a, b = torch.full((1, 4), 3e38), torch.full((4, 1), 3e38)
    assert lk.delta_norm(a, b, 1e10) == pytest.approx(4 * float(a[0, 0]) ** 2 * 1e10)
    assert lk.delta_norm(torch.full((1, 4), 1e-40), torch.full((4, 1), 1e-40)) == pytest.approx(4e-80, rel=1e-4, abs=0)
    assert lk.delta_norm(torch.zeros(2, 4), torch.ones(4, 2)) == 0.0


# delta_distance


@pytest.mark.parametrize("exponent", range(0, 13, 2))
def test_small_distances_are_resolved(exponent):
    right = terms_of((16, 8), 300, 200, torch.float64)
    change = terms_of((24,), 300, 200, torch.float64, seed=5)[0]
    step = 10.0**-exponent
    left = [*right, (change[0], change[1], step)]
    exact = 2 * step * float(dense([change]).norm() / dense(right).norm())
    assert lk.delta_distance(left, right) == pytest.approx(exact, rel=1e-4 if exponent < 12 else 1e-2, abs=0)


def test_a_distance_of_1e_6_between_float32_factors():
    (a, b, scale) = terms_of((32,), 500, 400)[0]
    other = a * (1 + 1e-6 * torch.randn(a.shape, generator=torch.Generator().manual_seed(1)))
    exact = float((dense([(a, b, scale)]) - dense([(other, b, scale)])).norm() / dense([(other, b, scale)]).norm())
    assert 5e-7 < exact < 2e-6
    assert lk.delta_distance([(a, b, scale)], [(other, b, scale)]) == pytest.approx(exact, rel=1e-4)


@given(
    ranks=st.lists(st.integers(1, 6), min_size=1, max_size=4),
    d_out=st.integers(1, 40),
    d_in=st.integers(1, 40),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=60, deadline=None)
def test_concatenating_or_permuting_ranks_changes_nothing(ranks, d_out, d_in, dtype, seed):
    terms = terms_of(ranks, d_out, d_in, dtype, seed)
    order = torch.randperm(sum(ranks), generator=torch.Generator().manual_seed(seed))
    wide = torch.promote_types(dtype, torch.float32)
    A = torch.cat([a.to(wide) for a, _, _ in terms])[order]
    B = torch.cat([b.to(wide) * scale for _, b, scale in terms], dim=1)[:, order]
    magnitude = sum(lk.delta_norm(*term) for term in terms)
    size = float(dense(terms).norm())
    if size > 1e-6 * magnitude:
        assert lk.delta_distance(terms, [(A, B, 1.0)]) * size < 1e-7 * magnitude
        assert lk.delta_distance([(2 * A, B, 1.0)], terms) == pytest.approx(1, rel=1e-4)


def test_distance_of_mappings_and_of_nothing():
    terms = terms_of((2, 3), 8, 9)
    zero = [(torch.zeros(1, 9), torch.ones(8, 1), 1.0)]
    assert lk.delta_distance({"q": terms, "v": zero}, {"v": zero, "q": terms[::-1]}) == {
        "q": pytest.approx(0, abs=1e-14),
        "v": 0.0,
    }
    assert lk.delta_distance(terms, zero) == math.inf
    assert lk.delta_distance(zero, terms) == pytest.approx(1)


# truncate


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_truncate_is_the_best_of_its_rank(dtype, shape):
    ranks, d_out, d_in = shape
    terms, most = terms_of(*shape, dtype), min(sum(ranks), d_out, d_in)
    exact = dense(terms)
    for rank in {1, 2, most // 2 or 1, most}:
        wide = lk.truncate(terms, rank, dtype=torch.float64)
        wanted, sigma = best(exact, rank)
        assert wide.singular_values.dtype == torch.float64
        assert torch.allclose(wide.singular_values, sigma[: min(rank, most)], rtol=1e-8)
        assert error_ratio(dense_of(wide), wanted) < 1e-8
        own = lk.truncate(terms, rank)
        assert own.A.dtype == own.B.dtype == dtype
        tolerance = {torch.float16: 2e-3, torch.bfloat16: 2e-2, torch.float32: 1e-6, torch.float64: 1e-8}[dtype]
        assert error_ratio(dense_of(own), wanted) < tolerance


def test_the_root_of_the_singular_values_goes_to_each_side():
    A, B, sigma = lk.truncate(terms_of((5, 6), 40, 30), 4, dtype=torch.float64)
    assert torch.allclose(A @ A.T, torch.diag(sigma), atol=1e-9 * sigma[0])
    assert torch.allclose(B.T @ B, torch.diag(sigma), atol=1e-9 * sigma[0])
    assert A.is_contiguous() and B.is_contiguous()


def with_spectrum(sigma, d_out, d_in, ranks):
    """Terms whose sum has these singular values, by factors that are ill-conditioned with it."""
    U, V = orthogonal(len(sigma), d_out, 1), orthogonal(len(sigma), d_in, 2)
    mix = orthogonal(len(sigma), len(sigma), 3)
    A, B = mix * sigma.sqrt() @ V, U.T * sigma.sqrt() @ mix.T
    firsts = [0, *torch.tensor(ranks).cumsum(0).tolist()]
    return [(A[f:n], B[:, f:n], 1.0) for f, n in pairwise(firsts)]


@pytest.mark.parametrize("decades", [1, 3, 6, 9])
def test_small_singular_values_of_ill_conditioned_factors(decades):
    sigma = torch.logspace(0, -decades, 24, dtype=torch.float64)
    terms = with_spectrum(sigma, 100, 80, (8, 8, 8))
    found = lk.truncate(terms, None)
    assert torch.allclose(found.singular_values, sigma, rtol=1e-5)
    assert error_ratio(dense_of(found), dense(terms)) < 1e-12


def test_duplicates_zeros_and_ranks_beyond_the_sum():
    a, b, _ = terms_of((4,), 30, 20)[0]
    A, B, sigma = lk.truncate([(a, b, 1.0), (a, b, 2.0), (torch.zeros_like(a), b, 1.0)], 100)
    assert A.shape == (12, 20) and B.shape == (30, 12) and sigma.shape == (12,)
    assert error_ratio(B.double() @ A.double(), 3 * b.double() @ a.double()) < 1e-6
    assert sigma[4:].max() < 1e-12 * sigma[0] and sigma.isfinite().all()
    assert lk.truncate([(a, b, 1.0), (a, b, 2.0)], None).A.shape == (4, 20)
    assert lk.truncate(terms_of((5, 6), 3, 20), 9).A.shape == (3, 20)


@pytest.mark.parametrize("rank", [3, None, 0.5])
def test_an_update_of_zero(rank):
    a, b, _ = terms_of((4,), 30, 20)[0]
    for terms in ([(0 * a, b, 1.0)], [(a, b, 0.0)], [(a, 0 * b, 1.0), (0 * a, b, 1.0)]):
        A, B, sigma = lk.truncate(terms, rank)
        kept = 3 if rank == 3 else 1
        assert A.shape == (kept, 20) and B.shape == (30, kept)
        assert not A.any() and not B.any() and not sigma.any()


def test_a_sum_that_cancels_keeps_its_rest():
    a, b, _ = terms_of((16,), 200, 150)[0]
    rest = terms_of((2,), 200, 150, seed=7)[0]
    found = lk.truncate([(a, b, 1.0), (rest[0], rest[1], 1e-7), (a, b, -1.0)], None)
    assert found.A.shape[0] == 2
    assert error_ratio(dense_of(found), 1e-7 * dense([(rest[0], rest[1], 1.0)])) < 1e-5


def test_energy():
    sigma = torch.tensor([4.0, 2.0, 2.0, 1.0], dtype=torch.float64)
    terms = with_spectrum(sigma, 30, 20, (2, 2))
    for share, rank in ((0.1, 1), (0.63, 1), (0.65, 2), (0.79, 2), (0.81, 3), (0.95, 3), (0.97, 4), (0.999999, 4)):
        assert lk.truncate(terms, share).A.shape[0] == rank


def test_truncate_of_a_mapping_is_that_of_each_module():
    modules = {f"layers.{i}": terms_of(*shape, seed=i) for i, shape in enumerate(SHAPES)}
    together = lk.truncate(modules, 3)
    assert list(together) == list(modules)
    for name, terms in modules.items():
        alone = lk.truncate(terms, 3)
        assert all(torch.equal(x, y) for x, y in zip(alone, together[name], strict=True))


@given(seed=st.integers(0, 2**31), rank=st.integers(1, 12), d=st.tuples(st.integers(1, 30), st.integers(1, 30)))
@settings(max_examples=60, deadline=None)
def test_truncating_twice_is_truncating_once(seed, rank, d):
    terms = terms_of((3, 4, 2), *d, torch.float64, seed)
    once = lk.truncate(terms, rank)
    again = lk.truncate([(once.A, once.B, 1.0)], rank)
    assert torch.allclose(once.singular_values, again.singular_values, rtol=1e-9, atol=1e-12)
    norm = float(dense(terms).norm())
    tail = math.sqrt(max(norm**2 - float(once.singular_values.square().sum()), 0))
    assert float((dense(terms) - dense_of(once)).norm()) == pytest.approx(tail, abs=1e-6 * norm)


def test_gradients_are_not_tracked_and_inputs_not_changed():
    a, b, _ = terms_of((4,), 30, 20)[0]
    before = a.clone(), b.clone()
    factors = [(a.requires_grad_(), b.requires_grad_(), 2.0)]
    out = lk.truncate(factors, 2)
    assert not out.A.requires_grad and not out.B.requires_grad and lk.delta_norm(*factors[0]) > 0
    assert torch.equal(a.detach(), before[0]) and torch.equal(b.detach(), before[1])


# What is refused

A, B = torch.ones(2, 6), torch.ones(5, 2)
GOOD = (A, B, 1.0)
BAD_TERMS = {
    "empty": ([], "an empty list"),
    "none": (None, "non-empty list of terms"),
    "bare": (GOOD, "non-empty list of terms"),
    "string": ("abc", "non-empty list of terms"),
    "pair": ([(A, B)], r"term 0, must be a tuple \(A, B, scale\)"),
    "integers": ([(A.long(), B, 1.0)], "have A .r, d_in. of float16"),
    "vector": ([(A, B[0], 1.0)], "have B .d_out, r. of float16"),
    "list": ([(A, B.tolist(), 1.0)], "have B .d_out, r. of float16"),
    "no_rank": ([(A[:0], B[:, :0], 1.0)], "not empty"),
    "ranks": ([(A, B[:, :1], 1.0)], "have one rank r"),
    "d_in": ([GOOD, (A[:, :5], B, 1.0)], "term 1, must update a 5 x 6 matrix"),
    "d_out": ([GOOD, (A, B[:4], 1.0)], "term 1, must update a 5 x 6 matrix"),
    "scale": ([(A, B, None)], "a finite number as its scale"),
    "scale_nan": ([(A, B, math.nan)], "a finite number as its scale"),
    "meta": ([(A.to("meta"), B.to("meta"), 1.0)], "have data"),
    "nan": ([GOOD, (A, B * math.nan, 1.0)], "B of term 1 has 10 values that are NaN"),
    "infinity": ([(A.clone().index_fill_(1, torch.tensor(3), -math.inf), B, 1.0)], "A of term 0 has 2 values"),
    "overflow": ([(A.double() * 1e200, B.double(), 1.0)], "squares of its float64 factors overflow"),
}


@pytest.mark.parametrize(("op", "name"), list(product(["truncate", "delta_distance"], BAD_TERMS)))
def test_bad_terms(op, name):
    terms, message = BAD_TERMS[name]
    call = {
        "truncate": lambda t: lk.truncate(t, 2),
        "delta_distance": lambda t: lk.delta_distance(t, {"q_proj": [GOOD]} if isinstance(t, dict) else [GOOD]),
    }[op]
    with pytest.raises(lk.LorakernError, match=f"{op}: .*{message}"):
        call(terms)
    if terms is not None:
        with pytest.raises(lk.LorakernError, match=f"{op}: .*q_proj.*{message}"):
            call({"q_proj": terms})


@pytest.mark.parametrize("rank", [0, -1, 1.0, 0.0, 1.5, True, "8", math.nan])
def test_bad_ranks(rank):
    with pytest.raises(lk.LorakernError, match="truncate: rank must be"):
        lk.truncate([GOOD], rank)


def test_other_refusals():
    with pytest.raises(lk.LorakernError, match="dtype must be float16"):
        lk.truncate([GOOD], 1, dtype=torch.int8)
    with pytest.raises(lk.LorakernError, match="terms must name at least one module"):
        lk.truncate({}, 1)
    with pytest.raises(lk.LorakernError, match=r"module 'v': .*dtype = torch.float16 cannot hold"):
        lk.truncate({"v": [(A * 1e6, B * 1e6, 1.0)]}, 1, dtype=torch.float16)
    with pytest.raises(lk.LorakernError, match="both be lists of terms"):
        lk.delta_distance([GOOD], {"q": [GOOD]})
    with pytest.raises(lk.LorakernError, match="name the same modules; got 'k'"):
        lk.delta_distance({"q": [GOOD]}, {"q": [GOOD], "k": [GOOD]})
    with pytest.raises(lk.LorakernError, match=r"left and right of module 'q'.*update a 5 x 6 matrix"):
        lk.delta_distance({"q": [GOOD]}, {"q": [(A[:, :3], B, 1.0)]})
    with pytest.raises(lk.LorakernError, match="equally many; got 2 of A, 1 of B and 2 scales"):
        lk.delta_norm([A, A], [B])
    with pytest.raises(lk.LorakernError, match="A must be a matrix or a non-empty sequence"):
        lk.delta_norm([], [])
    with pytest.raises(lk.LorakernError, match="module '1': A of term 0 has 12 values"):
        lk.delta_norm([A, A * math.nan], [B, B])
