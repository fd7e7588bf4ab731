"""The gradients and the plan of the CUDA backend against the reference on the same device.

LORAKERN_EMULATED_CUDA=1 runs it on CPU tensors and the emulator, as test_cuda.py.
"""

import os

import pytest
import torch
from test_cuda import DEVICE, DTYPES, EMULATED, gpu, make_case, moved, ratio, same_bits

from lorakern.backends import cuda, reference

FACTOR_TOLERANCE = 2e-5  # of dscale and dgates: sums of float32 products that cancel


def make_dy(case, seed=7):
    random = torch.Generator().manual_seed(seed)
    dy = torch.randn(case["x"].shape[0], sum(b.shape[1] for b in case["B"]), generator=random)
    return dy.to(case["x"].dtype).to(DEVICE)


def run(case, dy, order=None, starts=None):
    return cuda.backward(dy, **case, order=order, starts=starts)


def expected(case, dy):
    """The same in float64."""
    double = {name: case[name] if case[name] is None else case[name].double() for name in ("scale", "gates")}
    weights = {name: [w.double() for w in case[name]] for name in ("A", "B")}
    wide = {**case, "x": case["x"].double(), **weights, **double}
    return reference.backward(dy.double(), **wide, order=None, starts=None)


def flat(gradients):
    dx, dA, dB, dscale, dgates = gradients
    return [dx, *dA, *dB, *(d for d in (dscale, dgates) if d is not None)]


def same(left, right):
    return all(same_bits(a, b) for a, b in zip(flat(left), flat(right), strict=True))


def check(case, tolerance):
    dy = make_dy(case)
    got, want = run(case, dy), expected(case, dy)
    factors = sum(case[name] is not None for name in ("scale", "gates"))
    assert (got[3] is None, got[4] is None) == (case["scale"] is None, case["gates"] is None)
    bounds = [tolerance] * (1 + 2 * len(case["A"])) + [FACTOR_TOLERANCE] * factors
    for gradient, truth, bound in zip(flat(got), flat(want), bounds, strict=True):
        assert gradient.shape == truth.shape and gradient.is_contiguous()
        assert not gradient[truth == 0].any()  # of ranks that a slot does not have, and of unused slots
        assert not truth.any() or ratio(gradient, truth) < bound


@gpu
@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@pytest.mark.parametrize(
    ("tokens", "d_in", "d_outs", "slots", "r_max", "choices"),
    [
        (1, 64, (64,), 1, 8, 1),
        (5, 63, (5,), 3, 5, 2),
        (63, 1000, (100, 37, 1), 8, 24, 1),
        (9, 257, (129,), 4, 96, 4),
        (33, 136, (136, 8, 8, 1, 16, 8, 24, 8, 40, 5), 5, 16, 2),  # more slices than one call takes
        (2, 1, (1,), 2, 1, 1),
        (300, 64, (2100,), 3, 32, 1),  # more than one plane
        (64, 264, (200,), 64, 17, 1),
    ],
)
def test_matches_reference(tokens, d_in, d_outs, slots, r_max, choices, dtype, tolerance):
    check(make_case(tokens, d_in, d_outs, slots, r_max, dtype, choices=choices), tolerance)


@gpu
@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
def test_mixed_ranks(dtype, tolerance):
    case = make_case(150, 136, (72, 40), 5, 96, dtype, choices=2, absent=("ranks",))
    case["ranks"] = torch.tensor([24, 0, 1, 96, 5], device=DEVICE)
    for slot, rank in enumerate(case["ranks"].tolist()):
        for a, b in zip(case["A"], case["B"], strict=True):
            a[slot, rank:], b[slot, :, rank:] = torch.nan, torch.inf
    check(case, tolerance)


@gpu
@pytest.mark.parametrize(("popularity", "choices"), [("uniform", 1), ("identical", 1), ("distinct", 2), ("skewed", 3)])
@pytest.mark.parametrize("absent", [("ranks", "scale", "gates"), ("ranks", "scale"), ("gates",)])
def test_popularity_choices_and_optional_arguments(popularity, choices, absent):
    options = {"choices": choices, "absent": absent, "popularity": popularity}
    check(make_case(40, 140, (64, 33), 6, 16, torch.float32, **options), 1e-6)


@gpu
@pytest.mark.parametrize("dtype", [dtype for dtype, _ in DTYPES])
@pytest.mark.parametrize("choices", [1, 2])
def test_a_token_alone_and_in_any_batch_and_again(dtype, choices):
    case = make_case(137, 200, (1030, 40), 5, 24, dtype, choices=choices)
    dy = make_dy(case)
    whole = run(case, dy)
    assert same(run(case, dy), whole)
    for start, stop in ((0, 1), (17, 18), (30, 99), (5, 137)):
        part = {**case, **{name: case[name][start:stop] for name in ("x", "indices", "gates")}}
        dx, _, _, _, dgates = run(part, dy[start:stop])
        assert same_bits(dx, whole[0][start:stop]) and same_bits(dgates, whole[4][start:stop])


@gpu
@pytest.mark.parametrize("dtype", [dtype for dtype, _ in DTYPES])
def test_strides_and_alignment_do_not_change_a_bit(dtype):
    case = make_case(20, 72, (40, 24), 4, 24, dtype, choices=2)
    dy = make_dy(case)
    want = run(case, dy)

    def shifted(w):
        roomy = torch.full((*w.shape[:-1], w.shape[-1] + 3), torch.nan, dtype=dtype, device=DEVICE)
        roomy[..., 1:-2] = w
        return roomy[..., 1:-2]

    crooked = {name: [shifted(w) for w in case[name]] for name in ("A", "B")}
    assert same(run({**case, "x": shifted(case["x"]), **crooked}, shifted(dy)), want)
    assert same(run({**case, "x": case["x"].T.contiguous().T}, dy.repeat_interleave(2, dim=1)[:, ::2]), want)
    gates, scale = torch.zeros(2, 20, 2, device=DEVICE), torch.zeros(4, 3, device=DEVICE)
    gates[:, :, 1], scale[:, 2] = case["gates"].T, case["scale"]
    vectors = {"gates": gates[:, :, 1].T, "scale": scale[:, 2], "ranks": case["ranks"].long().repeat_interleave(2)[::2]}
    indices = case["indices"].long().repeat_interleave(2, dim=1)[:, ::2]
    indices = torch.where(indices < 0, 2**32, indices)  # slot 0 if it were cut to 32 bits
    assert same(run({**case, **vectors, "indices": indices}, dy), want)


@gpu
def test_stride_zero_weights():
    case = make_case(30, 72, (40,), 1, 8, torch.float32, absent=("ranks", "scale"))
    shared = {**case, "A": [case["A"][0].expand(6, -1, -1)], "B": [case["B"][0].expand(6, -1, -1)]}
    shared["indices"] = torch.arange(30, device=DEVICE)[:, None] % 7 - 1
    check(shared, 1e-6)


@gpu
@pytest.mark.parametrize("dtype", [dtype for dtype, _ in DTYPES])
def test_tokens_without_an_adapter_are_not_read(dtype):
    case = make_case(70, 136, (40, 24), 3, 8, dtype)
    absent = ~reference._has_adapter(case["indices"], 3, None)
    dy = make_dy(case)
    want = run(case, dy)
    case["x"][absent], dy[absent] = torch.nan, torch.inf
    got = run(case, dy)
    assert same(got, want) and not got[0][absent].any()


@gpu
@pytest.mark.parametrize("choices", [1, 3])
def test_infinities_of_other_adapters_do_not_spread(choices):
    """A block multiplies tokens of several adapters one after the other."""
    case = make_case(50, 136, (40,), 3, 8, torch.bfloat16, choices=choices, absent=("ranks",))
    dy, hit = make_dy(case), (case["indices"] == 2).any(dim=1)
    want = run(case, dy)
    case["A"][0][2], case["B"][0][2] = torch.inf, torch.nan
    got = run(case, dy)
    assert same_bits(got[0][~hit], want[0][~hit]) and same_bits(got[1][0][:2], want[1][0][:2])


@gpu
def test_infinities_of_tokens_stay_within_the_rank():
    case = make_case(20, 72, (40,), 3, 8, torch.bfloat16)
    case["ranks"], case["x"][:], dy = torch.tensor([5, 0, 3], device=DEVICE), torch.inf, make_dy(case)
    _, (dA,), (dB,), _, _ = run(case, dy)
    for slot, rank in enumerate(case["ranks"].tolist()):
        assert not dA[slot, rank:].any() and not dB[slot, :, rank:].any()


@gpu
def test_more_slots_than_blocks():
    """Blocks of the gradients of weights go from slot to slot."""
    check(make_case(300, 40, (24,), 2500, 4, torch.float16), 1e-3)


@gpu
def test_several_tiles_of_columns_to_a_block():
    """Many tokens: a block of dx takes two tiles of columns, and a batch of fewer tokens gives the same bits."""
    case = make_case(3872, 2056, (8,), 2, 4, torch.bfloat16)
    dy = make_dy(case)
    whole = run(case, dy)
    part = {**case, **{name: case[name][1000:1050] for name in ("x", "indices", "gates")}}
    dx, _, _, _, dgates = run(part, dy[1000:1050])
    assert same_bits(dx, whole[0][1000:1050]) and same_bits(dgates, whole[4][1000:1050])
    assert ratio(whole[0], expected(case, dy)[0]) < 8e-3


@gpu
def test_a_plan_of_other_indices_reads_nothing_outside():
    case = make_case(90, 72, (40,), 5, 8, torch.float16, choices=2)
    random = torch.Generator().manual_seed(1)
    for _ in range(3):
        order = torch.randint(-(2**31), 2**31, (180,), generator=random, dtype=torch.int64).int().to(DEVICE)
        starts = torch.randint(-(2**31), 2**31, (6,), generator=random, dtype=torch.int64).int().to(DEVICE)
        run(case, make_dy(case), order, starts)
    plan = reference.plan(case["indices"], 5)
    assert same(run(case, make_dy(case), *plan), run(case, make_dy(case)))


@gpu
def test_nothing_to_do():
    case = make_case(4, 32, (16,), 2, 8, torch.float32)
    none = {**case, **{name: case[name][:0] for name in ("x", "indices", "gates")}}
    for empty in (
        none,
        {**case, "indices": torch.full_like(case["indices"], -1)},
        {**case, "ranks": torch.zeros_like(case["ranks"])},
        {**case, "A": [case["A"][0][:, :0]], "B": [case["B"][0][:, :, :0]], "ranks": None},
        {**case, "A": [case["A"][0][:0]], "B": [case["B"][0][:0]], "ranks": None, "scale": None},
    ):
        assert not any(gradient.any() for gradient in flat(run(empty, make_dy(empty))))


@gpu
@pytest.mark.skipif(not EMULATED, reason="the emulator alone has an order of threads to choose")
def test_no_order_of_threads_matters(monkeypatch):
    case = make_case(70, 136, (40, 24), 3, 24, torch.bfloat16, choices=2)
    dy = make_dy(case)
    want = run(case, dy)
    for seed in (1, 2):
        monkeypatch.setitem(os.environ, "LORAKERN_EMULATOR_SEED", str(seed))
        assert same(run(case, dy), want)


@pytest.mark.gpu
def test_a_captured_graph_replays_with_new_routing():
    cases = [make_case(200, 256, (128, 64), 6, 24, torch.bfloat16, choices=2, seed=seed) for seed in range(3)]
    static, dy = moved(cases[0], DEVICE), make_dy(cases[0])
    static = {**static, "x": static["x"].clone(), **{name: static[name].clone() for name in ("indices", "gates")}}
    run(static, dy)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(static, dy)
    for case in (*cases, cases[0]):
        for name in ("x", "indices", "gates"):
            static[name].copy_(case[name])
        graph.replay()
        assert same(captured, run(static, dy))


@gpu
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize(
    ("shape", "slots"),
    [((0, 1), 5), ((1, 1), 1), ((63, 1), 5), ((20, 3), 5), ((5000, 2), 7), ((300, 1), 700), ((100, 1), 9000)],
)
def test_plan_is_that_of_the_reference(shape, slots, dtype):
    random = torch.Generator().manual_seed(0)
    indices = torch.randint(-2, slots + 2, shape, generator=random).to(dtype)
    indices[::9] = torch.iinfo(dtype).max
    indices = indices.T.contiguous().T.to(DEVICE)
    for got, want in zip(cuda.plan(indices, slots), reference.plan(indices, slots), strict=True):
        assert got.dtype == torch.int32 and torch.equal(got, want)
