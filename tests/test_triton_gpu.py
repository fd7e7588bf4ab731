"""What only a GPU can prove of the Triton backend: streams, graphs, large batches, compiled callers, no late JIT."""

import pytest
import torch
from problems import TOLERANCES, error_ratio, problem

import lorakern as lk

pytestmark = pytest.mark.gpu
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(autouse=True)
def on_triton():
    with lk.use_backend("triton"):
        yield


def gpu_problem(**options):
    return problem(device="cuda", **options)


def expected(p):
    """In float64, where the rows without an adapter keep what they hold."""
    with lk.use_backend("reference"):
        return p.double().bgmv()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("choices", [1, 3])
@pytest.mark.parametrize("tokens", [1, 63, 1000])
@pytest.mark.parametrize("r_max", [1, 5, 24, 96, 256])
def test_ranks_and_batches(r_max, tokens, choices, dtype):
    p = gpu_problem(dtype=dtype, tokens=tokens, choices=choices, d_in=1000, d_outs=(63, 130), r_max=r_max, absent=0.1)
    assert error_ratio(p.bgmv(), expected(p)) < TOLERANCES[dtype]


@pytest.mark.parametrize("choices", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_token_alone_and_in_batches_with_and_without_planes(dtype, choices):
    p = gpu_problem(dtype=dtype, tokens=5000, choices=choices, d_in=4096, d_outs=(256,), r_max=64, slots=12)
    whole = p.bgmv()
    for start, stop in ((0, 1), (7, 71), (100, 1100)):
        assert torch.equal(p.rows(start, stop).bgmv(), whole[start:stop])
    h = lk.shrink(p.x, p.A, p.indices, ranks=p.ranks)
    halves = lk.expand(p.y.clone(), h, p.B, p.indices, **p.options, y_offset=p.y_offset)
    assert torch.equal(halves, whole)


@pytest.mark.parametrize("choices", [1, 2])
def test_a_captured_graph_replays_with_new_routing_and_plan(choices):
    p = gpu_problem(dtype=torch.bfloat16, tokens=64, choices=choices, d_in=2048, d_outs=(256, 64), r_max=24, slots=9)
    static = torch.empty_like(p.y)

    def step():
        static.copy_(p.y)
        grouped = lk.plan(p.indices, 9)
        return lk.bgmv(static, p.x, p.A, p.B, p.indices, **p.options, plan=grouped, y_offset=3)

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for seed in range(4):
        random = torch.Generator().manual_seed(seed)
        p.indices.copy_(torch.randint(-1, 10, p.indices.shape, generator=random))
        p.x.copy_(torch.randn(p.x.shape, generator=random))
        graph.replay()
        assert torch.equal(static, p.bgmv())


def test_the_host_never_waits():
    p = gpu_problem(dtype=torch.float16, tokens=40, d_in=1024, d_outs=(64,))
    p.bgmv()
    torch.cuda.set_sync_debug_mode("error")
    try:
        p.bgmv()
        p.bgmv(plan=lk.plan(p.indices, 5))
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_concurrent_streams_do_not_share_scratch():
    problems = [
        gpu_problem(dtype=torch.bfloat16, tokens=64, d_in=4096, d_outs=(512,), r_max=64, seed=seed) for seed in range(4)
    ]
    alone = [p.bgmv() for p in problems]
    streams = [torch.cuda.Stream() for _ in problems]
    torch.cuda.synchronize()
    for _ in range(20):
        results = []
        for p, stream in zip(problems, streams, strict=True):
            with torch.cuda.stream(stream):
                results.append(p.bgmv())
        torch.cuda.synchronize()
        assert all(map(torch.equal, results, alone))


def backward(p, dy, plan=(None, None)):
    """Every gradient, in one list."""
    arguments = (p.x, p.A, p.B, p.indices, p.scale, p.ranks, p.gates, *plan)
    dx, dA, dB, *rest = torch.ops.lorakern.lora_delta_backward(dy, *arguments)
    return [dx, *dA, *dB, *rest]


@pytest.mark.parametrize("choices", [1, 2])
def test_backward_in_a_graph_and_without_waiting(choices):
    p = gpu_problem(dtype=torch.bfloat16, tokens=300, choices=choices, d_in=512, d_outs=(256, 64), r_max=40, slots=9)
    dy = torch.randn(300, 320, device="cuda").bfloat16()
    backward(p, dy)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        backward(p, dy)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        static = backward(p, dy, lk.plan(p.indices, 9))
    for seed in range(3):
        random = torch.Generator().manual_seed(seed)
        p.indices.copy_(torch.randint(-1, 10, p.indices.shape, generator=random))
        dy.copy_(torch.randn(dy.shape, generator=random))
        graph.replay()
        assert all(map(torch.equal, static, backward(p, dy)))


@pytest.mark.parametrize("choices", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_of_a_token_alone_and_in_any_batch_and_again(dtype, choices):
    p = gpu_problem(dtype=dtype, tokens=137, choices=choices, d_in=520, d_outs=(130, 64), r_max=24)
    dy = torch.randn(137, 194, device="cuda").to(dtype)
    whole = backward(p, dy)
    assert all(map(torch.equal, backward(p, dy), whole))
    for start, stop in ((0, 1), (17, 18), (136, 137), (30, 49), (0, 64), (5, 137)):
        some = backward(p.rows(start, stop), dy[start:stop])
        assert torch.equal(some[0], whole[0][start:stop]) and torch.equal(some[-1], whole[-1][start:stop])


def test_gradients_of_more_rows_than_int32_can_hold():
    """90,000 rows of 24,576 elements in dy and in dx; one row far behind gets what it gets alone."""
    if torch.cuda.mem_get_info()[0] < 16 * 2**30:
        pytest.skip("needs 16 GiB of device memory")
    tokens, wide = 90_000, 24_576
    torch.utils.deterministic.fill_uninitialized_memory = False
    x = torch.randn(tokens, wide, device="cuda", dtype=torch.float16)
    dy = torch.randn(tokens, wide, device="cuda", dtype=torch.float16)
    A, B = torch.randn(3, 8, wide, device="cuda").half(), torch.randn(3, wide, 8, device="cuda").half()
    indices = (torch.arange(tokens, device="cuda") % 4 - 1)[:, None]
    options = ([A], [B], indices, None, None, None, None, None)
    dx = torch.ops.lorakern.lora_delta_backward(dy, x, *options)[0]
    for rows in (slice(0, 64), slice(87_380, 87_444), slice(tokens - 64, tokens)):
        some = torch.ops.lorakern.lora_delta_backward(dy[rows], x[rows], [A], [B], indices[rows], *options[3:])[0]
        assert torch.equal(some, dx[rows]) and some.abs().sum() > 0


@pytest.mark.parametrize("wide", ["x", "y"])
def test_offsets_of_more_tokens_than_int32_can_hold(wide):
    """90,000 rows of 24,576 elements: the offset of the last rows is over 2**31."""
    if torch.cuda.mem_get_info()[0] < 12 * 2**30:
        pytest.skip("needs 12 GiB of device memory")
    tokens, large, small = 90_000, 24_576, 32
    d_in, d_out = (large, small) if wide == "x" else (small, large)
    x = torch.randn(tokens, d_in, device="cuda", dtype=torch.float16)
    y = torch.zeros(tokens, d_out, device="cuda", dtype=torch.float16)
    A = torch.randn(3, 8, d_in, device="cuda").mul(d_in**-0.5).half()
    B = torch.randn(3, d_out, 8, device="cuda").half()
    indices = torch.arange(tokens, device="cuda") % 4 - 1
    lk.bgmv(y, x, A, B, indices)
    for rows in (slice(0, 64), slice(87_380, 87_444), slice(tokens - 64, tokens)):
        part = torch.zeros(64, d_out, device="cuda", dtype=torch.float16)
        with lk.use_backend("reference"):
            lk.bgmv(part, x[rows], A, B, indices[rows])
        assert error_ratio(y[rows], part) < 2e-3


@pytest.mark.parametrize("shape", [(1, 1), (64, 2), (8192, 1), (8193, 1), (20_000, 3)])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_plans_that_are_counted_and_sorted(shape, dtype):
    indices = torch.randint(-2, 1003, shape, generator=torch.Generator().manual_seed(0)).to("cuda", dtype)
    ours = lk.plan(indices, 1000)
    with lk.use_backend("reference"):
        theirs = lk.plan(indices, 1000)
    assert all(map(torch.equal, ours, theirs))


def test_compiled_callers():
    def step(y, x, A, B, indices, scale, ranks, gates):
        grouped = lk.plan(indices, A[0].shape[0])
        return lk.bgmv(y + 1, x * 2, A, B, indices, scale=scale, ranks=ranks, gates=gates, plan=grouped, y_offset=3)

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, dynamic=True)
    for tokens in (6, 9, 31):
        p = gpu_problem(tokens=tokens, choices=2, d_outs=(24, 8), seed=tokens)
        arguments = (p.y, p.x, p.A, p.B, p.indices, p.scale, p.ranks, p.gates)
        assert error_ratio(compiled(*arguments), step(*arguments)) < 1e-6


@pytest.mark.parametrize("choices", [1, 2])
def test_opcheck(choices):
    p = gpu_problem(choices=choices, d_outs=(24, 8)).without_nan()
    grouped = lk.plan(p.indices, 5)
    arguments = (p.y, p.x, p.A, p.B, p.indices, p.scale, p.ranks, p.gates, *grouped, 3, True)
    torch.library.opcheck(torch.ops.lorakern.bgmv_.default, arguments)
    torch.library.opcheck(torch.ops.lorakern.plan.default, (p.indices, 5))


def test_nothing_is_compiled_after_warmup(monkeypatch):
    import triton

    assert lk.warmup([(2048, (256, 64), 24)], dtype=torch.bfloat16, max_choices=3, gates=True, backward=True) > 0
    compiled = []
    monkeypatch.setattr(triton.knobs.runtime, "jit_post_compile_hook", lambda **of: compiled.append(of["repr"]))
    for tokens in (1, 2, 17, 64, 700):
        for choices in (1, 2, 3):
            p = gpu_problem(dtype=torch.bfloat16, tokens=tokens, choices=choices, d_in=2048, d_outs=(256, 64), r_max=24)
            lk.bgmv(torch.zeros(tokens, 320, device="cuda").bfloat16(), p.x, p.A, p.B, p.indices, **p.options)
            backward(p, torch.ones(tokens, 320, device="cuda").bfloat16())
    assert compiled == []
