"""bgmv, sgmv, shrink, expand and plan on the CPU backend against the reference: the contract, line by line."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from problems import POPULARITIES, SHAPES, TOLERANCES, error_ratio, problem

import lorakern as lk
from lorakern.backends import cpu

DTYPES = list(TOLERANCES)


def build(dtype, shape, **options):
    tokens, choices, slots, d_in, d_outs, r_max = shape
    return problem(dtype, tokens, choices, slots, d_in, d_outs, r_max, **options)


@pytest.fixture(params=cpu._cpu.usable_isas())
def isa(request):
    before = cpu._cpu.current_isa()
    cpu._cpu.force_isa(request.param)
    yield request.param
    cpu._cpu.force_isa(before)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bgmv_matches_reference(isa, dtype, shape):
    p = build(dtype, shape)
    result, exact = p.bgmv(), p.exact()
    assert error_ratio(result, exact) < TOLERANCES[dtype]
    untouched = ~p.served()
    assert torch.equal(result[untouched], p.y[untouched])


@pytest.mark.parametrize("popularity", POPULARITIES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_popularity(dtype, popularity):
    p = problem(dtype, tokens=96, slots=48, d_in=200, d_outs=(136,), r_max=12, popularity=popularity)
    assert error_ratio(p.bgmv(), p.exact()) < TOLERANCES[dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_update_alone_is_as_precise(dtype):
    """Against a y of zeros the update cannot hide behind what was there."""
    p = problem(dtype, tokens=64, slots=4, d_in=4096, d_outs=(512,), r_max=16, absent=0.0)
    p.y.zero_()
    assert error_ratio(p.bgmv(), p.exact()) < TOLERANCES[dtype]


def test_overwrite_ignores_what_was_in_y():
    p = build(torch.float32, SHAPES[2])
    expected, served = p.exact(accumulate=False), p.served()
    p.y[:, 3 : 3 + 201] = float("nan")
    result = p.bgmv(accumulate=False)
    assert error_ratio(result[served, 3:204], expected[served, 3:204]) < 1e-6
    assert result[~served, 3:204].isnan().all()


def test_columns_outside_stay():
    p = build(torch.bfloat16, SHAPES[4])
    result = p.bgmv()
    assert torch.equal(result[:, :3], p.y[:, :3]) and torch.equal(result[:, 771:], p.y[:, 771:])


@pytest.mark.parametrize("choices", [1, 2])
def test_rows_without_adapter_keep_their_bits(choices):
    p = problem(tokens=6, choices=choices, slots=3, options=True)
    p.indices[:4] = -1
    p.indices[4:] = 2  # rank 0
    p.y[0], p.y[1], p.y[2], p.y[3], p.y[4] = -0.0, float("nan"), float("inf"), 1e-42, -0.0
    for accumulate in (True, False):
        result = p.bgmv(accumulate=accumulate)
        assert torch.equal(result.view(torch.int32), p.y.view(torch.int32))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_batch_invariant_and_deterministic(isa, dtype, shape):
    p = build(dtype, shape)
    whole = p.bgmv()
    assert torch.equal(whole, p.bgmv())
    alone = [p.rows(t, t + 1).bgmv() for t in range(0, len(p.x), 3)]
    assert torch.equal(whole[::3], torch.cat(alone))
    half = len(p.x) // 2
    assert torch.equal(whole[half:], p.rows(half, len(p.x)).bgmv())


@pytest.mark.parametrize("rank", [1, 15, 33, 100])
@pytest.mark.parametrize("d", [32, 70, 1536])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_do_not_depend_on_how_many_tokens_share_a_slot(isa, dtype, d, rank):
    """Around the sizes of tiles, with the tokens of the slot side by side, and with others between them."""
    p = problem(dtype, tokens=150, slots=2, d_in=d, d_outs=(d + 9,), r_max=rank, absent=0.0)
    for indices in (torch.zeros(150, dtype=torch.long), torch.arange(150) % 2):
        p.indices = indices
        whole = p.bgmv()
        assert error_ratio(whole, p.exact()) < TOLERANCES[dtype]
        for count in (1, 3, 15, 16, 17, 31, 33, 64, 65, 129):
            assert torch.equal(p.rows(7, 7 + count).bgmv(), whole[7 : 7 + count])


def test_tiles_of_others_are_left_as_they_were(isa):
    """torch's bfloat16 products use the same tiles of the same threads."""
    left, right = torch.randn(2, 256, 256).bfloat16()
    before = left @ right
    for tokens in (3, 70):
        problem(torch.bfloat16, tokens=tokens, slots=2, d_in=256, d_outs=(64,), r_max=16).bgmv()
        assert torch.equal(left @ right, before)


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shrink_then_expand_is_bgmv_bit_for_bit(shape, index_dtype):
    p = build(torch.bfloat16, shape)
    indices, ranks = p.indices.to(index_dtype), p.ranks.to(index_dtype)
    plan = lk.plan(indices, shape[2])
    h = lk.shrink(p.x, p.A, indices, ranks=ranks, plan=plan)
    y = lk.expand(p.y.clone(), h, p.B, indices, scale=p.scale, ranks=ranks, gates=p.gates, plan=plan, y_offset=3)
    assert torch.equal(y, p.bgmv())
    assert torch.equal(y, p.bgmv(plan=plan))


def test_shrink_matches_reference_and_zeroes_the_rest():
    p = build(torch.float32, SHAPES[4])
    out = torch.full((2, 200, 4, 33), float("nan"))
    h = lk.shrink(p.x, p.A, p.indices, ranks=p.ranks, out=out)
    with lk.use_backend("reference"):
        exact = lk.shrink(p.x, p.A, p.indices, ranks=p.ranks)
    assert h is out and error_ratio(h, exact) < 1e-6
    beyond = torch.arange(33) >= p.ranks[p.indices.clamp_min(0)][..., None]
    assert (h[:, beyond | (p.indices < 0)[..., None]] == 0).all()


def test_non_contiguous_arguments():
    p = problem(torch.float32, tokens=21, choices=2, slots=5, d_in=64, d_outs=(48,), r_max=8)
    exact = p.exact()
    wide_x = torch.empty(21, 200)
    wide_x[:, ::3][:, :64] = p.x
    wide_y = torch.full((21, 400), float("nan"))
    wide_y[:, ::2][:, : p.y.shape[1]] = p.y
    padded_a = torch.full((5, 10, 80), float("nan"))
    padded_a[:, :8, :64] = p.A[0]
    padded_b = torch.full((5, 50, 11), float("nan"))
    padded_b[:, :48, :8] = p.B[0]
    y = wide_y[:, ::2][:, : p.y.shape[1]]
    gates, indices = p.gates.t().contiguous().t(), p.indices.t().contiguous().t()
    lk.bgmv(
        y,
        wide_x[:, ::3][:, :64],
        padded_a[:, :8, :64],
        padded_b[:, :48, :8],
        indices,
        scale=torch.stack([p.scale, p.scale])[0],
        ranks=torch.stack([p.ranks, p.ranks], 1)[:, 0],
        gates=gates,
        y_offset=3,
    )
    assert error_ratio(y, exact) < 1e-6
    assert wide_y[:, 1::2].isnan().all()


def test_transposed_and_reversed_views():
    p = problem(torch.bfloat16, tokens=9, slots=3, d_in=32, d_outs=(16,), r_max=4)
    y = p.y.t().contiguous().t()
    lk.bgmv(y, p.x.t().contiguous().t(), p.A, p.B, p.indices, y_offset=3, **p.options)
    assert torch.equal(y, p.bgmv())


def test_stride_zero_weights_and_input():
    a, b, x = torch.randn(1, 4, 32), torch.randn(1, 16, 4), torch.randn(1, 32)
    y = lk.bgmv(torch.zeros(6, 16), x.expand(6, -1), a.expand(3, -1, -1), b.expand(3, -1, -1), torch.arange(6) % 3)
    assert error_ratio(y, (x.double() @ a[0].double().T @ b[0].double().T).expand(6, -1)) < 1e-6


def test_columns_of_one_matrix_may_be_input_and_output():
    buffer = torch.randn(8, 96)
    a, b, indices = torch.randn(2, 4, 32), torch.randn(2, 64, 4), torch.arange(8) % 2
    expected = lk.bgmv(buffer[:, 32:].clone(), buffer[:, :32].clone(), a, b, indices)
    assert torch.equal(lk.bgmv(buffer[:, 32:], buffer[:, :32], a, b, indices), expected)


def test_offsets_beyond_31_bits():
    """Slots, tokens and rows more than 2^31 elements apart; the memory between them is never touched."""
    torch.utils.deterministic.fill_uninitialized_memory = False
    far = 2**31 + 64
    a = torch.empty(far + 4 * 32, dtype=torch.bfloat16).as_strided((2, 4, 32), (far, 32, 1))
    a.copy_(torch.randn(2, 4, 32))
    b = torch.randn(2, 16, 4, dtype=torch.bfloat16)
    x = torch.empty(far + 32, dtype=torch.bfloat16).as_strided((2, 32), (far, 1))
    x.copy_(torch.randn(2, 32))
    y = torch.empty(far + 16, dtype=torch.bfloat16).as_strided((2, 16), (far, 1))
    y.zero_()
    indices = torch.tensor([0, 1])
    expected = lk.bgmv(torch.zeros(2, 16, dtype=torch.bfloat16), x.contiguous(), a.contiguous(), b, indices)
    assert torch.equal(lk.bgmv(y, x, a, b, indices), expected) and expected.abs().sum() > 0


def test_empty_batch():
    p = problem(tokens=0, popularity="identical")
    assert p.bgmv().shape == p.y.shape


@pytest.mark.parametrize("seg_starts", [[0, 3, 3, 10], [2, 5, 8, 9], [0, 10, 10, 10]])
def test_sgmv_is_bgmv_of_the_segments(seg_starts):
    p = problem(torch.bfloat16, tokens=10, slots=4, options=False)
    slots = torch.tensor([2, -1, 0])
    indices = torch.full((10,), -1)
    for s, slot in enumerate(slots.tolist()):
        indices[seg_starts[s] : seg_starts[s + 1]] = slot
    scale, ranks = torch.rand(4), torch.tensor([8, 3, 5, 0])
    expected = lk.bgmv(p.y.clone(), p.x, p.A, p.B, indices, scale=scale, ranks=ranks, y_offset=2)
    starts = torch.tensor(seg_starts)
    result = lk.sgmv(p.y.clone(), p.x, p.A, p.B, starts, slots, scale=scale, ranks=ranks, y_offset=2)
    assert torch.equal(result, expected) and not torch.equal(result, p.y)


def test_plan_groups_stably():
    plan = lk.plan(torch.tensor([[2, 0], [-1, 2], [0, 0]], dtype=torch.int32), 4)
    assert plan.order.tolist() == [1, 4, 5, 0, 3, 2] and plan.starts.tolist() == [0, 3, 3, 5, 5]
    with lk.use_backend("reference"):
        reference = lk.plan(torch.tensor([[2, 0], [-1, 2], [0, 0]]), 4)
    assert torch.equal(plan.order, reference.order) and torch.equal(plan.starts, reference.starts)


@settings(max_examples=40, deadline=None)
@given(
    tokens=st.integers(1, 20),
    choices=st.integers(1, 4),
    slots=st.integers(1, 9),
    d_in=st.integers(1, 70),
    d_out=st.integers(1, 70),
    r_max=st.integers(1, 40),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**16),
)
def test_any_shape(tokens, choices, slots, d_in, d_out, r_max, dtype, seed):
    p = problem(dtype, tokens, choices, slots, d_in, (d_out,), r_max, seed=seed)
    result, exact = p.bgmv(), p.exact()
    assert error_ratio(result, exact) < TOLERANCES[dtype]
    assert torch.equal(result[~p.served()], p.y[~p.served()])


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**16), rank=st.integers(2, 33))
def test_permuting_ranks_changes_nothing(seed, rank):
    p = problem(torch.float32, r_max=rank, seed=seed, options=False)
    order = torch.randperm(rank, generator=torch.Generator().manual_seed(seed))
    permuted = lk.bgmv(p.y.clone(), p.x, p.A[0][:, order], p.B[0][:, :, order].contiguous(), p.indices, y_offset=3)
    assert error_ratio(permuted, p.exact()) < 1e-6


def test_concatenated_ranks_are_the_sum_of_choices():
    p = problem(torch.float32, tokens=30, choices=2, slots=2, options=False, absent=0.0)
    p.indices[:] = torch.tensor([0, 1])
    a, b = torch.cat(list(p.A[0]))[None], torch.cat(list(p.B[0]), dim=1)[None]
    one = lk.bgmv(p.y.clone(), p.x, a, b, torch.zeros(30, dtype=torch.long), y_offset=3)
    assert error_ratio(one, p.exact()) < 1e-6
