"""The contract on a GPU, through the public ops, on each backend there; and, to test the tests, on the CPU backend.

What belongs to one backend alone is in test_cuda.py and test_triton.py.
"""

from contextlib import nullcontext

import pytest
import torch
from problems import POPULARITIES, SHAPES, TOLERANCES, error_ratio, problem

import lorakern as lk
from lorakern.backends import BACKENDS

DTYPES = list(TOLERANCES)
ON_A_GPU = [pytest.param(("cuda", backend), marks=pytest.mark.gpu, id=backend) for backend in ("cuda", "triton")]
ANY = [pytest.param(("cpu", "cpu"), id="cpu"), *ON_A_GPU]
# lorakern's own choice, in place of a backend's name; gradients come from whichever backend has them.
DEFAULT = [
    pytest.param(("cpu", None), id="cpu-default"),
    pytest.param(("cuda", None), marks=pytest.mark.gpu, id="gpu-default"),
]


@pytest.fixture
def place(request):
    """The device, with the ops of the test on one backend. A missing backend fails the test rather than skip it."""
    device, backend = request.param
    with lk.use_backend(backend) if backend else nullcontext():
        yield device


anywhere = pytest.mark.parametrize("place", ANY, indirect=True)
on_a_gpu = pytest.mark.parametrize("place", ON_A_GPU, indirect=True)
everywhere = pytest.mark.parametrize("place", ANY + DEFAULT, indirect=True)
by_default = pytest.mark.parametrize("place", DEFAULT, indirect=True)


def needs(op):
    """Skip where the backend in use leaves an op to others."""
    if (name := lk.backends.FORCED.get()) and not hasattr(BACKENDS[name], op):
        pytest.skip(f"the backend {name} has no {op}")


def build(dtype, shape, **options):
    tokens, choices, slots, d_in, d_outs, r_max = shape
    return problem(dtype, tokens, choices, slots, d_in, d_outs, r_max, **options)


def bits(tensor):
    return tensor.contiguous().view(torch.int32 if tensor.element_size() == 4 else torch.int16)


def same_bits(left, right):
    return torch.equal(bits(left), bits(right))


def check(p, place, **options):
    """Against the reference in float64 on the CPU; rows without an adapter keep their bits."""
    result, exact, served = p.to(place).bgmv(**options).cpu(), p.exact(**options), p.served()
    assert error_ratio(result[served], exact[served]) < TOLERANCES[p.x.dtype]
    assert same_bits(result[~served], p.y[~served])


@everywhere
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bgmv_matches_reference(place, dtype, shape):
    check(build(dtype, shape), place)


@anywhere
@pytest.mark.parametrize("popularity", POPULARITIES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_popularity(place, dtype, popularity):
    check(problem(dtype, tokens=96, slots=48, d_in=200, d_outs=(136,), r_max=12, popularity=popularity), place)


@anywhere
@pytest.mark.parametrize("rank", [1, 5, 24, 96, 256])
@pytest.mark.parametrize("tokens", [1, 33, 200])
def test_ranks_in_decode_and_prefill(place, tokens, rank):
    popularity = "identical" if tokens == 1 else "uniform"  # slot 0 has all ranks
    check(problem(torch.bfloat16, tokens, 1, 3, 512, (384,), rank, popularity, absent=0.0), place)


@anywhere
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_overwriting_reads_no_y(place, dtype):
    p = problem(dtype, tokens=20, choices=2, d_outs=(24, 9))
    exact, served = p.exact(accumulate=False), p.served()
    p.y[served, 3:36] = torch.nan
    result = p.to(place).bgmv(accumulate=False).cpu()[served, 3:36]
    assert error_ratio(result, exact[served, 3:36]) < TOLERANCES[dtype]


@anywhere
def test_a_plan_changes_no_bit(place):
    p = problem(torch.bfloat16, tokens=70, choices=2).to(place)
    assert same_bits(p.bgmv(plan=lk.plan(p.indices, 5)), p.bgmv())


@anywhere
@pytest.mark.parametrize("seg_starts", [[0, 3, 3, 10], [2, 5, 8, 9], [0, 10, 10, 10]])
def test_sgmv_is_bgmv_of_the_segments(place, seg_starts):
    p = problem(torch.bfloat16, tokens=10, slots=4, options=False).to(place)
    slots, indices = [2, -1, 0], torch.full((10,), -1)
    for s, slot in enumerate(slots):
        indices[seg_starts[s] : seg_starts[s + 1]] = slot
    options = {"scale": torch.rand(4).to(place), "ranks": torch.tensor([8, 3, 5, 0]).to(place), "y_offset": 2}
    expected = lk.bgmv(p.y.clone(), p.x, p.A, p.B, indices.to(place), **options)
    segments = torch.tensor(seg_starts).to(place), torch.tensor(slots).to(place)
    assert same_bits(lk.sgmv(p.y.clone(), p.x, p.A, p.B, *segments, **options), expected)


@anywhere
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_shrink_and_expand_are_the_halves_of_bgmv(place, dtype, shape):
    needs("shrink")
    p = build(dtype, shape)
    on_device, exact, served = p.to(place), p.exact(), p.served()
    h = lk.shrink(on_device.x, on_device.A, on_device.indices, ranks=on_device.ranks)
    y = on_device.y.clone()
    lk.expand(y, h, on_device.B, on_device.indices, y_offset=p.y_offset, **on_device.options)
    assert h.dtype == torch.float32 and torch.isfinite(h).all()
    assert error_ratio(y.cpu()[served], exact[served]) < TOLERANCES[dtype]


@everywhere
@pytest.mark.parametrize("choices", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_token_alone_and_in_any_batch_and_again(place, dtype, choices):
    p = problem(dtype, 137, choices, 5, 520, (130, 64), 24).to(place)
    y = p.bgmv()
    assert same_bits(p.bgmv(), y)
    for start, stop in ((0, 1), (17, 18), (136, 137), (30, 49), (0, 64), (5, 137)):
        assert same_bits(p.rows(start, stop).bgmv(), y[start:stop])


@anywhere
def test_inputs_that_are_not_contiguous(place):
    p = problem(torch.float16, tokens=9, slots=3, d_in=32, d_outs=(16,), r_max=4).to(place)
    wide = torch.zeros(9, 64, dtype=torch.float16, device=place)
    wide[:, ::2] = p.x
    for x in (p.x.T.contiguous().T, wide[:, ::2]):
        y = p.y.T.contiguous().T
        lk.bgmv(y, x, p.A, p.B, p.indices, y_offset=3, **p.options)
        assert same_bits(y, p.bgmv())
    shared = [w[0][:1].expand(3, -1, -1) for w in (p.A, p.B)]
    one = lk.bgmv(p.y.clone(), p.x, *shared, p.indices, y_offset=3)
    alone = lk.bgmv(p.y.clone(), p.x, p.A[0][:1], p.B[0][:1], p.indices.clamp(max=0), y_offset=3)
    assert same_bits(one, alone)


@on_a_gpu
def test_an_index_outside_of_the_slots_is_no_adapter(place):
    p = problem(torch.bfloat16, tokens=12, absent=0.0).to(place)
    outside = p.indices.clone()
    outside[::3] = torch.tensor([5, -7, 2**31 - 1, 2**32], device=place)[:, None]
    expected, p.indices = torch.where((outside < 0) | (outside >= 5), -1, outside), outside
    result = p.bgmv()
    p.indices = expected
    assert same_bits(result, p.bgmv())


@anywhere
def test_more_elements_of_y_than_31_bits_count(place):
    """More than 87,383 tokens of 24,576 columns."""
    tokens, columns = (90_001, 24_576) if place == "cuda" else (1001, 64)
    if place == "cuda" and torch.cuda.mem_get_info()[0] < 16 << 30:
        pytest.skip("needs 16 GiB of device memory")
    torch.utils.deterministic.fill_uninitialized_memory = False
    random = torch.Generator().manual_seed(0)
    A, B = torch.randn(3, 8, 32, generator=random), torch.randn(3, columns, 8, generator=random)
    A, B = (w.to(place, torch.bfloat16) for w in (A, B))
    x = torch.randn(tokens, 32, generator=random).to(place, torch.bfloat16)
    indices = (torch.arange(tokens) % 4 - 1).to(place)
    y = torch.zeros(tokens, columns, dtype=torch.bfloat16, device=place)
    lk.bgmv(y, x, A, B, indices)
    for rows in (slice(0, 50), slice(tokens // 2, tokens // 2 + 50), slice(tokens - 50, tokens)):
        part = lk.bgmv(torch.zeros_like(y[rows]), x[rows], A, B, indices[rows])
        assert same_bits(y[rows], part) and part.abs().sum() > 0


@on_a_gpu
def test_the_host_never_waits(place):
    p = problem(torch.bfloat16, tokens=16, choices=2).to(place)
    starts, slots = torch.tensor([0, 7, 16]).to(place), torch.tensor([1, 0]).to(place)

    def step():
        p.bgmv(plan=lk.plan(p.indices, 5))
        p.bgmv()
        lk.sgmv(p.y, p.x, p.A, p.B, starts, slots, y_offset=3)

    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@on_a_gpu
@pytest.mark.parametrize("choices", [1, 2])
@pytest.mark.parametrize("tokens", [1, 33, 300])
def test_a_captured_graph_replays_with_new_routing(place, tokens, choices):
    batches = [problem(torch.bfloat16, tokens, choices, 6, 256, (128, 64), 24, seed=seed) for seed in range(3)]
    static = batches[0].to(place)
    static.y, static.x, static.indices, static.gates = (
        t.clone() for t in (static.y, static.x, static.indices, static.gates)
    )
    start = static.y.clone()

    def step():
        plan = lk.plan(static.indices, 6)
        lk.bgmv(static.y, static.x, static.A, static.B, static.indices, plan=plan, y_offset=3, **static.options)

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for batch in (*batches, batches[0]):
        for name in ("x", "indices", "gates"):
            getattr(static, name).copy_(getattr(batch, name))
        static.y.copy_(start)
        graph.replay()
        replayed = static.y.clone()
        static.y.copy_(start)
        assert same_bits(replayed, static.bgmv())


@on_a_gpu
def test_concurrent_streams_do_not_share_scratch(place):
    cases = [problem(torch.bfloat16, 64, 1, 8, 1024, (512,), 64, seed=seed).to(place) for seed in range(2)]
    want = [p.bgmv() for p in cases]
    streams = [torch.cuda.Stream() for _ in cases]
    for _ in range(20):
        ys = [p.y.clone() for p in cases]
        torch.cuda.synchronize()
        for p, y, stream in zip(cases, ys, streams, strict=True):
            with torch.cuda.stream(stream):
                for _ in range(5):
                    y.copy_(p.y)
                    lk.bgmv(y, p.x, p.A, p.B, p.indices, y_offset=3, **p.options)
        torch.cuda.synchronize()
        assert all(same_bits(y, w) for y, w in zip(ys, want, strict=True))


def gradients(p, dy):
    """Of lora_delta by x, A, B, scale and gates."""
    leaves = [t.detach().clone().requires_grad_() for t in (p.x, *p.A, *p.B, p.scale, p.gates)]
    n = len(p.A)
    A, B, (scale, gates) = leaves[1 : n + 1], leaves[n + 1 : 2 * n + 1], leaves[-2:]
    delta = lk.lora_delta(leaves[0], A, B, p.indices, scale=scale, ranks=p.ranks, gates=gates)
    return torch.autograd.grad(delta, leaves, dy)


@everywhere
@pytest.mark.parametrize(
    "shape",
    [
        (7, 1, 3, 40, (24,), 8),
        (70, 3, 4, 129, (65, 30), 17),
        (300, 2, 5, 64, (48, 16), 32),
        (63, 1, 9, 1000, (100, 37, 64), 24),
        (33, 3, 4, 129, (65, 1), 256),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_backward_matches_reference(place, dtype, shape):
    needs("backward")
    p = build(dtype, shape)
    dy = torch.randn(shape[0], sum(shape[4])).to(dtype)
    got = gradients(p.to(place), dy.to(place))
    with lk.use_backend("reference"):
        exact = gradients(p.double(), dy.double())
    for place_in_list, (gradient, truth) in enumerate(zip(got, exact, strict=True)):
        # of scale and gates: sums of float32 products that cancel
        bound = TOLERANCES[dtype] if place_in_list < len(got) - 2 else 2e-5
        assert error_ratio(gradient.cpu(), truth) < bound


@by_default
@pytest.mark.parametrize("options", [False, True])
def test_opcheck(place, options):
    p = problem(torch.float32, tokens=6, choices=2, d_outs=(24, 8), options=options).without_nan().to(place)
    order, starts = lk.plan(p.indices, 5)
    lora = (p.x, p.A, p.B, p.indices, p.scale, p.ranks, p.gates, order, starts)
    leaves = (p.x.clone().requires_grad_(), [a.clone().requires_grad_() for a in p.A], *lora[2:])
    ops = torch.ops.lorakern
    torch.library.opcheck(ops.plan.default, (p.indices, 5))
    torch.library.opcheck(ops.lora_delta.default, lora)
    torch.library.opcheck(ops.lora_delta.default, leaves)
    torch.library.opcheck(ops.lora_delta_backward.default, (torch.randn(6, 32).to(place), *lora))
    torch.library.opcheck(ops.bgmv_.default, (p.y, *lora, 3, True))
    h = lk.shrink(p.x, p.A, p.indices, ranks=p.ranks)
    torch.library.opcheck(ops.shrink_.default, (h, p.x, p.A, p.indices, p.ranks, order, starts))
    expand = (p.y, h, p.B, p.indices, p.scale, p.ranks, p.gates, order, starts, 3, True)
    torch.library.opcheck(ops.expand_.default, expand)


def step(y, x, A, B, indices, scale, ranks, gates):
    """A layer's part of a serving step."""
    y = torch.relu(y)
    plan = lk.plan(indices, A[0].shape[0])
    lk.bgmv(y, x * 2, A, B, indices, scale=scale, ranks=ranks, gates=gates, plan=plan, y_offset=3)
    return y + 1


@anywhere
@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_fullgraph_without_recompiling_per_batch(place, compiler):
    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=compiler)
    batches = [problem(tokens=t, choices=2, d_outs=(24, 8), seed=t).to(place) for t in (6, 9, 31)]

    def run(function, p):
        return function(p.y.clone(), p.x, p.A, p.B, p.indices, p.scale, p.ranks, p.gates)

    assert error_ratio(run(compiled, batches[0]), run(step, batches[0])) < 1e-6
    with torch._dynamo.config.patch(error_on_recompile=True):
        for p in batches[1:]:
            assert error_ratio(run(compiled, p), run(step, p)) < 1e-6
