"""routed_bgmv, attention_gates and router_cores: the reference against the direct formula, C++ against both."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from problems import TOLERANCES, error_ratio
from routed_problems import direct, routed

import lorakern as lk
from lorakern.backends import cpu
from lorakern.ops._fast import fast

DTYPES = list(TOLERANCES)
SHAPES = [  # tokens, choices, slots, d_in, d_outs, r_max, router_rank
    (1, 1, 1, 64, (64,), 16, 8),
    (5, 3, 3, 63, (5,), 1, 1),
    (63, 3, 9, 1000, (100, 37, 64), 24, 16),
    (64, 2, 64, 576, (192,), 5, 5),
    (200, 4, 6, 576, (576, 192), 33, 33),
    (70, 3, 4, 4096, (300,), 96, 16),
]


def build(dtype, shape, **options):
    *rest, router_rank = shape
    return routed(dtype, *rest, router_rank=router_rank, **options)


@pytest.fixture(params=cpu._cpu.usable_isas())
def isa(request):
    before = cpu._cpu.current_isa()
    cpu._cpu.force_isa(request.param)
    yield request.param
    cpu._cpu.force_isa(before)


def exact_direct(r):
    """The direct formula in float64, of the weights without what lies beyond their ranks."""
    p = r.double().lora.without_nan()
    return direct(p.x, p.A, p.B, r.double().router_A, r.double().router_B, p.indices, p.scale, p.ranks)


@pytest.mark.parametrize("options", [True, False])
def test_core_form_is_direct_form(options):
    """In float64, where only the order of the sums differs."""
    r = routed(torch.float64, 23, 3, 5, 40, (24, 9), 8, options=options, sharpness=3.0)
    r.lora.scale = None if r.lora.scale is None else r.lora.scale.double()
    r.cores = lk.router_cores(r.lora.B, r.router_B, **r.options)
    delta, gates = exact_direct(r)
    with lk.use_backend("reference"):
        assert (lk.routed_delta(*r.arguments, **r.options) - delta).abs().max() < 1e-6
        assert (r.gates() - gates).abs().max() < 1e-6


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_reference(isa, dtype, shape):
    r = build(dtype, shape)
    result, untouched = r.run(), ~r.lora.served()
    assert error_ratio(result, r.exact()) < TOLERANCES[dtype]
    assert torch.equal(result[untouched], r.lora.y[untouched])
    with lk.use_backend("reference"):
        exact = r.double().gates()
    assert (r.gates() - exact).abs().max() < 1e-5


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_the_direct_formula(isa, shape):
    r = build(torch.float32, shape, sharpness=3.0)
    assert error_ratio(lk.routed_delta(*r.arguments, **r.options), exact_direct(r)[0]) < 1e-5


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_choice_is_that_adapter_bit_for_bit(isa, dtype):
    r = routed(dtype, 40, 1, 5, 100, (64, 30), 12, sharpness=50.0)
    assert torch.equal(r.run(), r.lora.bgmv())
    gates = r.gates()
    assert torch.equal(gates, (r.lora.indices >= 0).float().expand(2, -1, -1))


def test_identical_experts_are_that_adapter(isa):
    r = routed(torch.float32, 30, 4, 1, 100, (64,), 12, absent=0.0, sharpness=5.0, options=False)
    a, b, core = (w.expand(4, -1, -1) for w in (r.lora.A[0], r.lora.B[0], r.cores[0]))
    indices = torch.arange(4).expand(30, 4)
    mixed = lk.routed_delta(r.lora.x, a, b, r.router_A, core, indices)
    one = lk.lora_delta(r.lora.x, a, b, indices[:, 0])
    assert error_ratio(mixed, one) < 1e-6


def test_zero_cores_are_the_mean_mixture(isa):
    r = routed(torch.float32, 30, 3, 5, 100, (64, 7), 12)
    zero = [torch.zeros_like(core) for core in r.cores]
    p = r.lora
    present = p.indices >= 0
    mean = present / present.sum(dim=1, keepdim=True).clamp_min(1)
    mixed = lk.routed_bgmv(p.y.clone(), p.x, p.A, p.B, r.router_A, zero, p.indices, y_offset=3, **r.options)
    assert (
        error_ratio(mixed, lk.bgmv(p.y.clone(), p.x, p.A, p.B, p.indices, gates=mean, y_offset=3, **r.options)) < 1e-6
    )


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_batched_and_masked_is_row_by_row_bit_for_bit(isa, dtype, shape):
    r = build(dtype, shape)
    whole, gates = r.run(), r.gates()
    assert torch.equal(whole, r.run())
    for t in range(0, len(r.lora.x), 3):
        alone = r.rows(t, t + 1)
        assert torch.equal(alone.run(), whole[t : t + 1])
        assert torch.equal(alone.gates(), gates[:, t : t + 1])
    half = len(r.lora.x) // 2
    assert torch.equal(r.rows(half, len(r.lora.x)).run(), whole[half:])


def test_masked_choices_may_as_well_not_be_there(isa):
    r = routed(torch.float32, 20, 2, 5, 64, (48,), 8, absent=0.0)
    padded = torch.cat([r.lora.indices, torch.full((20, 3), -1)], dim=1)
    p = r.lora
    wide = lk.routed_bgmv(p.y.clone(), p.x, p.A, p.B, r.router_A, r.cores, padded, y_offset=3, **r.options)
    assert torch.equal(wide, r.run())


def test_rows_without_adapter_keep_their_bits(isa):
    r = routed(torch.float32, 6, 2, 3)
    p = r.lora
    p.indices[:4], p.indices[4:] = -1, 2  # slot 2 has rank 0
    p.y[0], p.y[1], p.y[2], p.y[3], p.y[4] = -0.0, float("nan"), float("inf"), 1e-42, -0.0
    for accumulate in (True, False):
        assert torch.equal(r.run(accumulate=accumulate).view(torch.int32), p.y.view(torch.int32))
    assert r.gates()[0].tolist() == [[0.0, 0.0]] * 4 + [[0.5, 0.5]] * 2


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_routed_bgmv_is_its_three_parts_bit_for_bit(isa, dtype):
    r = build(dtype, SHAPES[2])
    p, plan = r.lora, lk.plan(r.lora.indices, 9)
    y, column, gates = p.y.clone(), 3, r.gates()
    for s, b in enumerate(p.B):
        lk.bgmv(y, p.x, p.A[s], b, p.indices, gates=gates[s], y_offset=column, **r.options)
        column += b.shape[1]
    assert torch.equal(y, r.run()) and torch.equal(y, r.run(plan=plan))
    assert torch.equal(
        lk.routed_delta(*r.arguments, **r.options), r.run(accumulate=False)[:, 3:204] * p.served()[:, None]
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_short_way_is_the_general_way(dtype):
    r = build(dtype, SHAPES[2])
    p = r.lora
    plan, general = lk.plan(p.indices, 9), p.y.clone()
    torch.ops.lorakern.routed_bgmv_(general, *r.arguments, p.scale, p.ranks, *plan, 3, True)
    for grouping in (None, plan):
        y = p.y.clone()
        assert fast.routed_bgmv(y, *r.arguments, p.scale, p.ranks, grouping, 3, True) is y
        assert torch.equal(y, general)


def test_the_short_way_takes_nothing_that_is_wrong():
    """Every error is raised by the general way: the short way declines, and writes nothing."""
    r = build(torch.float32, SHAPES[1])
    p, y = r.lora, r.lora.y.clone()
    right = [y, *r.arguments, p.scale, p.ranks, None, 3, True]
    wrong = {
        4: [r.router_A[0][:, :-1], r.router_A[0].half(), r.router_A[0][None], r.router_A * 2, "router"],
        5: [r.cores[0][:-1], r.cores[0][:, :0], r.cores[0].double(), r.cores[0][0], r.cores * 2, None],
        6: [p.indices + 3, p.indices[:-1], p.indices.float()],
    }
    wrong[0] = [y[:, :5], y.bfloat16(), y[:-1]]
    for position, values in wrong.items():
        for value in values:
            arguments = [*right[:position], value, *right[position + 1 :]]
            assert fast.routed_bgmv(*arguments) is None and torch.equal(y, p.y)
    leaf = r.router_A[0].clone().requires_grad_()
    assert fast.routed_bgmv(*right[:4], leaf, *right[5:]) is None
    with torch.no_grad():
        assert fast.routed_bgmv(*right[:4], leaf, *right[5:]) is y


def test_large_logits_choose_one():
    r = routed(torch.float32, 12, 3, 5, 64, (48,), 8, sharpness=1e6, absent=0.0, options=False)
    gates = r.gates()
    assert gates.isfinite().all() and error_ratio(r.run(), r.exact()) < 1e-5
    assert torch.equal(gates.sum(dim=2), torch.ones(1, 12))


def test_gates_have_the_dimensions_of_their_routers():
    r = routed(torch.float32, 4, 2, 5)
    h = lk.shrink(r.lora.x, r.lora.A, r.lora.indices, ranks=r.lora.ranks)
    one = lk.attention_gates(r.lora.x, h, r.router_A[0], r.cores[0], r.lora.indices, ranks=r.lora.ranks)
    assert one.shape == (4, 2) and torch.equal(one, r.gates()[0])


def test_non_contiguous_arguments():
    r = routed(torch.float32, 21, 3, 5, 64, (48,), 8)
    p = r.lora
    wide_y = torch.full((21, 2 * p.y.shape[1]), float("nan"))
    y = wide_y[:, ::2]
    y.copy_(p.y)
    core = torch.full((5, 6, 11), float("nan"))
    core[:, :4, :8] = r.cores[0]
    router = torch.cat([r.router_A[0], r.router_A[0]], dim=1)[:, :64]
    lk.routed_bgmv(
        y, p.x.t().contiguous().t(), p.A, p.B, router, core[:, :4, :8], p.indices.t().contiguous().t().int(),
        y_offset=3, **r.options,
    )  # fmt: skip
    assert torch.equal(y, r.run()) and wide_y[:, 1::2].isnan().all()


def test_empty_batch():
    r = routed(torch.float32, 0, 2, 5, popularity="identical")
    assert r.run().shape == r.lora.y.shape and r.gates().shape == (1, 0, 2)


@settings(max_examples=40, deadline=None)
@given(
    tokens=st.integers(1, 20),
    choices=st.integers(1, 4),
    slots=st.integers(1, 9),
    d_in=st.integers(1, 70),
    d_out=st.integers(1, 70),
    r_max=st.integers(1, 40),
    router_rank=st.integers(1, 40),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**16),
)
def test_any_shape(tokens, choices, slots, d_in, d_out, r_max, router_rank, dtype, seed):
    r = routed(dtype, tokens, choices, slots, d_in, (d_out,), r_max, router_rank=router_rank, seed=seed)
    result, gates, untouched = r.run(), r.gates(), ~r.lora.served()
    assert torch.equal(result[untouched], r.lora.y[untouched])
    assert torch.equal(result[:1], r.rows(0, 1).run())
    present = r.lora.indices >= 0
    assert (gates[0] == 0)[~present].all() and ((gates >= 0) & (gates <= 1)).all()
    assert ((gates[0].sum(1) - present.any(1).float()).abs() < 1e-5).all()


def test_cores_of_slices_and_ranks():
    r = routed(torch.bfloat16, 4, 2, 5, 40, (24, 9), 8)
    p = r.lora
    cores = lk.router_cores(p.B, r.router_B, scale=p.scale, ranks=p.ranks)
    for core, b, router in zip(cores, p.without_nan().B, r.router_B, strict=True):
        exact = p.scale[:, None, None].double() * (router.double().T @ b.double())
        assert core.dtype == torch.float32 and error_ratio(core, exact) < 1e-6
        assert all((core[slot, :, rank:] == 0).all() for slot, rank in enumerate(p.ranks.tolist()))
