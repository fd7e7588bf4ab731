"""The Triton backend against the reference: on a GPU, or on the CPU in Triton's interpreter.

TRITON_INTERPRET must be set before triton is imported and holds for the whole process, so without a GPU this file is
run by test_triton_aot.py, in a process of its own.
"""

import mmap
import os
import sys

import pytest
import torch

from lorakern.backends import reference
from lorakern.backends import triton as backend
from lorakern.errors import LorakernError

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
if not INTERPRETED:
    pytestmark = [
        pytest.mark.gpu,
        pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device; test_triton_aot.py interprets it"),
    ]

# dtype and its bound on RMS(difference) / RMS(reference)
DTYPES = [(torch.float32, 1e-6), (torch.float16, 1e-3), (torch.bfloat16, 8e-3)]
DTYPE_IDS = ["fp32", "fp16", "bf16"]
RANKS = (24, 0, 1, 5, 16, 33)


def make_case(tokens, d_in, d_outs, slots, r_max, dtype, *, choices=1, options="ranks scale gates", seed=0):
    """Arguments of bgmv but y. With ranks, what lies beyond them is NaN; a quarter of the pairs has no adapter."""
    random = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=random)

    def uniform(*shape):
        return torch.rand(*shape, generator=random)

    A, B = [normal(slots, r_max, d_in) for _ in d_outs], [normal(slots, d, r_max) for d in d_outs]
    indices = torch.randint(0, slots, (tokens, choices), generator=random)
    outside = torch.tensor([-1, slots, -7, 2**32])[torch.randint(0, 4, (tokens, choices), generator=random)]
    indices = torch.where(uniform(tokens, choices) < 0.25, outside, indices)
    ranks = None
    if "ranks" in options:
        ranks = torch.tensor([min(RANKS[s % len(RANKS)], r_max) for s in range(slots)], dtype=torch.int32)
        for slot, rank in enumerate(ranks.tolist()):
            for a, b in zip(A, B, strict=True):
                a[slot, rank:], b[slot, :, rank:] = torch.nan, torch.nan
    return {
        "x": normal(tokens, d_in).to(DEVICE, dtype),
        "A": [a.to(DEVICE, dtype) for a in A],
        "B": [b.to(DEVICE, dtype) for b in B],
        "indices": indices.to(DEVICE),
        "scale": (uniform(slots) + 0.5).to(DEVICE) if "scale" in options else None,
        "ranks": None if ranks is None else ranks.to(DEVICE),
        "gates": normal(tokens, choices).to(DEVICE) if "gates" in options else None,
    }


def run(module, y, case, *, plan=(None, None), y_offset=0, accumulate=True):
    """bgmv of one backend into a copy of y that keeps its strides."""
    out = torch.empty_strided(y.shape, y.stride(), dtype=y.dtype, device=y.device).copy_(y)
    module.bgmv(out, **case, order=plan[0], starts=plan[1], y_offset=y_offset, accumulate=accumulate)
    return out


def bits(tensor):
    return tensor.contiguous().view(torch.int32 if tensor.element_size() == 4 else torch.int16)


def assert_close(name, ours, theirs, bound):
    assert torch.isfinite(ours).all(), f"{name}: not finite"
    difference, size = (ours.double() - theirs.double()).square().mean(), theirs.double().square().mean()
    error = (difference / size.clamp_min(1e-300)).sqrt().item()
    print(f"{name}: error ratio {error:.2e}")
    assert error < bound, f"{name}: error ratio {error:.2e} is not under {bound}"


def used_rows(case):
    slots = case["A"][0].shape[0]
    used = (case["indices"] >= 0) & (case["indices"] < slots)
    if case["ranks"] is not None:
        used &= case["ranks"][case["indices"].clamp(0, slots - 1)] > 0
    return used.any(dim=1)


def check_bgmv(case, y, bound, *, y_offset=0, accumulate=True):
    """Against the reference; rows without an adapter and columns outside keep their bits."""
    ours = run(backend, y, case, y_offset=y_offset, accumulate=accumulate)
    theirs = run(reference, y, case, y_offset=y_offset, accumulate=accumulate)
    rows, columns = used_rows(case), slice(y_offset, y_offset + sum(b.shape[1] for b in case["B"]))
    if rows.any():
        assert_close("y", ours[rows, columns], theirs[rows, columns], bound)
    kept = torch.ones_like(y, dtype=torch.bool)
    kept[rows, columns] = False
    assert torch.equal(bits(ours)[kept], bits(y)[kept])


@pytest.mark.parametrize(("dtype", "bound"), DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize(
    ("tokens", "d_in", "d_outs", "slots", "r_max", "choices", "options"),
    [
        (1, 64, (64,), 1, 16, 1, ""),
        (5, 63, (100,), 3, 8, 1, "scale"),
        (5, 1000, (63, 5), 6, 24, 1, "ranks scale"),
        (63, 63, (37,), 6, 33, 1, "ranks scale gates"),
        (19, 40, (20, 5), 2, 5, 2, "ranks scale gates"),
        (5, 63, (130, 7, 64), 6, 80, 4, "ranks scale gates"),
        (5, 63, (37,), 6, 1, 2, "gates"),
    ],
    ids=lambda value: str(value).replace(" ", "+") or "plain",
)
def test_bgmv(tokens, d_in, d_outs, slots, r_max, choices, options, dtype, bound):
    case = make_case(tokens, d_in, d_outs, slots, r_max, dtype, choices=choices, options=options)
    if tokens == 1:
        case["indices"].zero_()
    y = torch.randn(tokens, sum(d_outs) + 7, generator=torch.Generator().manual_seed(1)).to(DEVICE, dtype)
    check_bgmv(case, y, bound, y_offset=3)
    check_bgmv(case, torch.full_like(y, torch.nan), bound, y_offset=3, accumulate=False)


@pytest.mark.parametrize("choices", [1, 3])
def test_shrink(choices):
    case = make_case(19, 63, (8, 8), 6, 40, torch.float32, choices=choices)
    ours = torch.full((2, 19, choices, 40), torch.nan, device=DEVICE)
    theirs = ours.clone()
    for h, module in ((ours, backend), (theirs, reference)):
        module.shrink(h, case["x"], case["A"], case["indices"], case["ranks"], None, None)
    assert_close("h", ours, theirs, 1e-6)
    assert torch.equal(ours == 0, theirs == 0)


@pytest.mark.parametrize("choices", [1, 3])
def test_expand_reads_no_h_beyond_the_rank(choices):
    case = make_case(19, 8, (63, 5), 6, 40, torch.float32, choices=choices)
    h = torch.randn(2, 19, choices, 40, device=DEVICE)
    beyond = torch.zeros(19, choices, 40, dtype=torch.bool, device=DEVICE)
    for slot, rank in enumerate(case["ranks"].tolist()):
        beyond[case["indices"] == slot] = torch.arange(40, device=DEVICE) >= rank
    beyond[(case["indices"] < 0) | (case["indices"] >= 6)] = True
    options = [case[name] for name in ("B", "indices", "scale", "ranks", "gates")]
    ours, theirs = torch.full((2, 19, 68), torch.nan, device=DEVICE)
    backend.expand(ours, h.masked_fill(beyond, torch.nan), *options, None, None, 0, False)
    reference.expand(theirs, h, *options, None, None, 0, False)
    rows = used_rows(case)
    assert_close("y", ours[rows], theirs[rows], 1e-6)
    assert ours[~rows].isnan().all()


@pytest.mark.parametrize("choices", [1, 2])
def test_strides(choices):
    """Rows and columns of x and y apart, transposed x, one A for every slot."""
    case = make_case(9, 63, (37, 5), 6, 24, torch.float16, choices=choices, options="scale gates")
    wide = torch.zeros(9, 2, 63 * 3, device=DEVICE, dtype=torch.float16)
    wide[:, 1, ::3] = case["x"]
    y = torch.randn(9, 100, generator=torch.Generator().manual_seed(1)).to(DEVICE, torch.float16)
    for x in (wide[:, 1, ::3], case["x"].T.contiguous().T):
        for out in (y[:, ::2], y.T.contiguous().T):
            check_bgmv(case | {"x": x}, out, 1e-3, y_offset=2)
    gates, indices = case["gates"].T.contiguous().T, case["indices"].int().T.contiguous().T
    A = [a[:1].expand(6, -1, -1) for a in case["A"]]
    B = [torch.cat([b, b], dim=1)[:, ::2] for b in case["B"]]
    assert A[0].stride(0) == 0 and not B[0].is_contiguous()
    check_bgmv(case | {"A": A, "B": B, "gates": gates, "indices": indices.clamp(max=6)}, y, 1e-3)


@pytest.mark.parametrize("choices", [1, 2])
@pytest.mark.parametrize("dtype", [dtype for dtype, _ in DTYPES], ids=DTYPE_IDS)
def test_batch_invariance(dtype, choices):
    """A token alone, in a part of the batch and in the whole batch: the same bits; and twice the same."""
    case = make_case(70, 100, (130,), 3, 33, dtype, choices=choices)
    y = torch.randn(70, 130, generator=torch.Generator().manual_seed(1)).to(DEVICE, dtype)
    whole = run(backend, y, case)
    assert torch.equal(bits(whole), bits(run(backend, y, case)))
    for rows in (slice(0, 1), slice(17, 18), slice(69, 70), slice(30, 49)):
        part = case | {name: case[name][rows] for name in ("x", "indices", "gates")}
        assert torch.equal(bits(run(backend, y[rows], part)), bits(whole[rows]))


@pytest.mark.parametrize("tokens", [5, 40])
def test_many_slots(tokens, monkeypatch):
    """The search for a program's slot takes several loads; blocks numbered by position (5 tokens) and by slot (40)."""
    for name in ("shrink", "expand"):
        backend._kernels()
        monkeypatch.setattr(sys.modules[f"lorakern.triton_kernels.{name}"], "BLOCK_S", 4)
    case = make_case(tokens, 16, (16,), 11, 8, torch.float32)
    check_bgmv(case, torch.zeros(tokens, 16, device=DEVICE), 1e-6)
    alone = torch.where(case["indices"] % 2 == 0, 10, -1)
    check_bgmv(case | {"indices": alone}, torch.zeros(tokens, 16, device=DEVICE), 1e-6)


@pytest.mark.parametrize("shape", [(1, 1), (63, 1), (12, 4), (0, 1)])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_plan(shape, dtype):
    indices = torch.randint(-2, 9, shape, generator=torch.Generator().manual_seed(0)).to(DEVICE, dtype)
    indices = indices.T.contiguous().T
    ours, theirs = backend.plan(indices, 7), reference.plan(indices, 7)
    assert all(o.dtype == torch.int32 and torch.equal(o, t) for o, t in zip(ours, theirs, strict=True))
    case = make_case(shape[0], 16, (16,), 7, 8, torch.float32, choices=shape[1]) | {"indices": indices}
    y = torch.zeros(shape[0], 16, device=DEVICE)
    assert torch.equal(run(backend, y, case, plan=ours), run(backend, y, case))


def test_nothing_to_do():
    case = make_case(5, 16, (16,), 3, 8, torch.float32)
    y = torch.randn(5, 16, device=DEVICE)
    assert torch.equal(run(backend, y, case | {"indices": torch.full((5, 1), -1, device=DEVICE)}), y)
    assert torch.equal(run(backend, y, case | {"ranks": torch.zeros(3, dtype=torch.int32, device=DEVICE)}), y)
    empty = case | {name: case[name][:0] for name in ("x", "indices", "gates")}
    assert run(backend, y[:0], empty).shape == (0, 16)


def test_nan_stays_nan():
    """A NaN of a token's input reaches that token's output, and no other."""
    case = make_case(5, 16, (16,), 3, 8, torch.float16, options="")
    case["indices"].zero_()
    case["x"][2, 3] = torch.nan
    y = run(backend, torch.zeros(5, 16, dtype=torch.float16, device=DEVICE), case)
    assert y[2].isnan().all() and torch.isfinite(y[[0, 1, 3, 4]]).all()
    # the NaN of GPU arithmetic, whose bits are all ones
    h = torch.zeros(1, 5, 1, 8, device=DEVICE)
    h[0, 2] = torch.tensor(0x7FFFFFFF, dtype=torch.int32).view(torch.float32)
    y = torch.zeros(5, 16, dtype=torch.float16, device=DEVICE)
    backend.expand(y, h, case["B"], case["indices"], None, None, None, None, None, 0, True)
    assert y[2].isnan().all() and not y[[0, 1, 3, 4]].any()


def far_memory(monkeypatch):
    """A function that copies a tensor of 4 rows or slots to a place where they are 2**30 elements apart."""
    apart = 2**30 + 64
    if INTERPRETED:
        # address space without memory behind it, which the interpreter must not copy
        private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
        memory = torch.frombuffer(mmap.mmap(-1, 2 * (3 * apart + 2**15), flags=private), dtype=torch.float16)
        executor = sys.modules["triton.runtime.interpreter"].GridExecutor if backend.missing() is None else None
        monkeypatch.setattr(executor, "_restore_args_dev", lambda *_: None)
    else:
        memory = torch.empty(3 * apart + 2**15, dtype=torch.float16, device=DEVICE)

    def far(tensor, start):
        return memory.as_strided(tensor.shape, (apart, *tensor.stride()[1:]), start).copy_(tensor)

    return far


@pytest.mark.parametrize("choices", [1, 2])
def test_offsets_beyond_int32(choices, monkeypatch):
    """Slots of A and B and rows of x and y more than 2**31 elements away, by strides that fit in 32 bits."""
    far = far_memory(monkeypatch)
    case = make_case(4, 32, (16,), 4, 8, torch.float16, choices=choices, options="")
    case["indices"] = torch.tensor([[3, 1], [0, 3], [2, 2], [3, 0]], device=DEVICE)[:, :choices]
    y = torch.randn(4, 16, device=DEVICE).half()
    far_case = case | {"x": far(case["x"], 0), "A": [far(case["A"][0], 1024)], "B": [far(case["B"][0], 2048)]}
    out = far(y, 4096)
    backend.bgmv(out, **far_case, order=None, starts=None, y_offset=0, accumulate=True)
    assert_close("y", out, run(reference, y, case), 1e-3)


@pytest.mark.parametrize("choices", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
def test_planes_change_no_bit(dtype, choices, monkeypatch):
    """Chunks of d_in in planes, in one program, and by shrink and expand one after the other: the same bits."""
    case = make_case(4, 1100, (20,), 6, 40, dtype, choices=choices, seed=2)
    y = torch.randn(4, 20, generator=torch.Generator().manual_seed(1)).to(DEVICE, dtype)
    kernels = backend._kernels()
    results = {}
    for full_grid, planes in ((10**6, 2), (0, 1)):
        monkeypatch.setattr(sys.modules["lorakern.triton_kernels.shrink"], "FULL_GRID", full_grid)
        launched = record(monkeypatch)
        results[planes] = run(backend, y, case)
        assert [launch.arguments["p_h"].shape[0] for launch in launched[1:]] == [planes, planes]
    h = torch.full((1, 4, choices, 40), torch.nan, device=DEVICE)
    order, starts = kernels.plan(case["indices"], 6)
    backend.shrink(h, case["x"], case["A"], case["indices"], case["ranks"], order, starts)
    halves, options = y.clone(), [case[name] for name in ("B", "indices", "scale", "ranks", "gates")]
    backend.expand(halves, h, *options, order, starts, 0, True)
    assert torch.equal(bits(results[1]), bits(results[2])) and torch.equal(bits(halves), bits(results[1]))
    check_bgmv(case, y, 1e-6 if dtype == torch.float32 else 1e-3)


def record(monkeypatch):
    """The launches from here on, in their order; they run all the same."""
    launched, common = [], sys.modules["lorakern.triton_kernels.common"]

    def run_and_record(launch, device):
        launched.append(launch)
        common.run(launch, device)

    for name in ("backward", "bgmv", "shrink", "expand", "plan"):
        monkeypatch.setattr(sys.modules[f"lorakern.triton_kernels.{name}"], "run", run_and_record)
    return launched


@pytest.mark.parametrize("choices", [1, 2])
def test_two_launches_for_any_number_of_slices(choices, monkeypatch):
    case = make_case(3, 16, (8, 5, 3), 3, 8, torch.float32, choices=choices)
    y = torch.zeros(3, 16, device=DEVICE)
    launched = record(monkeypatch)
    plan = backend.plan(case["indices"], 3)
    run(backend, y, case, plan=plan)
    assert len(launched) == 1 + 2
    run(backend, y, case)
    assert len(launched) == 3 + 3


@pytest.mark.parametrize("choices", [1, 2])
def test_odd_and_large_ranks_in_one_batch(choices, monkeypatch):
    """Each slot takes tiles for its own rank; beyond it, in A, in B and in the scratch between, all is NaN."""
    monkeypatch.setattr(sys.modules[__name__], "RANKS", (1, 5, 24, 96, 256, 0, 17, 65))
    case = make_case(8, 24, (20,), 8, 256, torch.float16, choices=choices)
    case["indices"] = torch.arange(8, device=DEVICE)[:, None].repeat(1, choices)
    case["indices"][:, choices - 1] = case["indices"][:, choices - 1].roll(choices - 1)
    check_bgmv(case, torch.full((8, 20), 0.5, dtype=torch.float16, device=DEVICE), 1e-3)


def test_a_plan_is_refilled_in_place():
    """What a captured graph does: the same buffers, new routing."""
    case = make_case(20, 16, (16,), 5, 8, torch.float32)
    y = torch.zeros(20, 16, device=DEVICE)
    buffers = [torch.empty_like(part) for part in backend.plan(case["indices"], 5)]
    for shift in (0, 3, 11):
        case["indices"].copy_(case["indices"].roll(shift, dims=0))
        for buffer, part in zip(buffers, backend.plan(case["indices"], 5), strict=True):
            buffer.copy_(part)
        assert_close("y", run(backend, y, case, plan=buffers), run(reference, y, case), 1e-6)


def test_plan_of_more_pairs_than_are_counted(monkeypatch):
    monkeypatch.setattr(sys.modules["lorakern.triton_kernels.plan"], "MAX_PAIRS", 10)
    indices = torch.randint(-2, 9, (11, 1), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    for some in (indices, indices[:10]):
        for ours, theirs in zip(backend.plan(some, 7), reference.plan(some, 7), strict=True):
            assert torch.equal(ours, theirs)


def test_warmup_runs_every_launch():
    options = {"indices": torch.int64, "ranks": torch.int32, "scale": True, "gates": True, "accumulate": True}
    layers, device = [(24, (16, 5), 40)], torch.device(DEVICE)
    count = backend.warmup(layers, torch.float16, device, choices=(1, 2), **options)
    assert count >= 3
    assert backend.warmup(layers, torch.float16, device, choices=(1, 2), backward=True, **options) >= count + 5


def test_float64_is_refused():
    case = make_case(5, 16, (16,), 3, 8, torch.float64)
    with pytest.raises(LorakernError, match="float64"):
        run(backend, torch.zeros(5, 16, dtype=torch.float64, device=DEVICE), case)


@pytest.mark.skipif(INTERPRETED, reason="CUDA graphs need a device")
@pytest.mark.parametrize("choices", [1, 2])
def test_graph_replays_with_new_indices(choices):
    case = make_case(40, 128, (64,), 6, 24, torch.float16, choices=choices)
    y = torch.zeros(40, 64, dtype=torch.float16, device=DEVICE)
    run(backend, y, case)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run(backend, y, case)
    for shift in range(3):
        case["indices"].copy_(case["indices"].roll(shift, dims=0))
        graph.replay()
        assert torch.equal(out, run(backend, y, case))
