"""The gradients of the Triton backend against the reference: on a GPU, or on the CPU in Triton's interpreter.

Without a GPU this file, like test_triton.py, is run by test_triton_aot.py.
"""

import sys

import pytest
import test_triton
import torch
from test_triton import DEVICE, DTYPE_IDS, DTYPES, assert_close, bits, far_memory, make_case, record

import lorakern as lk
from lorakern.backends import reference
from lorakern.backends import triton as backend
from lorakern.errors import LorakernError

pytestmark = getattr(test_triton, "pytestmark", [])


def make_dy(case, *, seed=1):
    shape = case["x"].shape[0], sum(b.shape[1] for b in case["B"])
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, case["x"].dtype)


def gradients(module, dy, case, plan=(None, None)):
    """Every gradient by its name."""
    dx, dA, dB, dscale, dgates = module.backward(dy, **case, order=plan[0], starts=plan[1])
    named = {"x": dx, "scale": dscale, "gates": dgates}
    named |= {f"{name}{s}": d for name, slices in (("A", dA), ("B", dB)) for s, d in enumerate(slices)}
    return {name: d for name, d in named.items() if d is not None}


def check_backward(case, dy, bound):
    """Against the reference; what is zero there, such as ranks beyond a slot's own, is zero here."""
    ours, theirs = gradients(backend, dy, case), gradients(reference, dy, case)
    assert ours.keys() == theirs.keys()
    for name, truth in theirs.items():
        assert ours[name].shape == truth.shape and ours[name].dtype == truth.dtype
        assert ours[name].is_contiguous()
        # of scale and gates: sums of float32 products that cancel
        assert_close(name, ours[name], truth, bound if name[0] in "xAB" else 2e-5)
        if name[0] in "AB":
            unused = (truth == 0).all(dim=2 if name[0] == "A" else 1)
            assert not ours[name].transpose(1, 2 if name[0] == "B" else 1)[unused].any()
    return ours


@pytest.mark.parametrize(("dtype", "bound"), DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize(
    ("tokens", "d_in", "d_outs", "slots", "r_max", "choices", "options"),
    [
        (1, 64, (64,), 1, 16, 1, ""),
        (5, 63, (37,), 6, 33, 1, "ranks scale gates"),
        (19, 40, (20, 5), 2, 5, 2, "ranks scale gates"),
        (6, 70, (130, 7), 6, 70, 3, "ranks scale gates"),
        (5, 63, (37,), 6, 1, 2, "gates"),
        # several steps of pairs, rows of blocks and chunks of d_out in one slot
        (70, 24, (1030,), 1, 24, 1, "scale"),
    ],
    ids=lambda value: str(value).replace(" ", "+") or "plain",
)
def test_backward(tokens, d_in, d_outs, slots, r_max, choices, options, dtype, bound):
    case = make_case(tokens, d_in, d_outs, slots, r_max, dtype, choices=choices, options=options)
    if tokens == 1:
        case["indices"].zero_()
    check_backward(case, make_dy(case), bound)


def test_odd_and_large_ranks_in_one_batch(monkeypatch):
    """Beyond a slot's rank all is NaN, in A, in B and in the scratch, and its gradients are zeros."""
    ranks = (1, 5, 24, 96, 256, 0, 17, 65)
    monkeypatch.setattr(test_triton, "RANKS", ranks)
    case = make_case(8, 24, (20,), 8, 256, torch.float16)
    case["indices"] = torch.arange(8, device=DEVICE)[:, None]
    ours = check_backward(case, make_dy(case), 1e-3)
    for slot, rank in enumerate(ranks):
        assert not ours["A0"][slot, rank:].any() and not ours["B0"][slot, :, rank:].any()


@pytest.mark.parametrize("choices", [1, 2])
@pytest.mark.parametrize("dtype", [dtype for dtype, _ in DTYPES], ids=DTYPE_IDS)
def test_batch_invariance(dtype, choices):
    """dx and dgates of a token alone, in a part of the batch and in the whole batch: the same bits; and all twice."""
    case = make_case(40, 100, (30, 20), 3, 33, dtype, choices=choices)
    dy = make_dy(case)
    whole = gradients(backend, dy, case)
    for name, again in gradients(backend, dy, case).items():
        assert torch.equal(bits(whole[name]), bits(again))
    for rows in (slice(0, 1), slice(17, 18), slice(20, 39)):
        part = case | {name: case[name][rows] for name in ("x", "indices", "gates")}
        some = gradients(backend, dy[rows], part)
        for name in ("x", "gates"):
            assert torch.equal(bits(some[name]), bits(whole[name][rows]))


def test_a_plan_changes_no_bit(monkeypatch):
    """And the search for a program's slot takes several loads."""
    case = make_case(20, 16, (16,), 11, 8, torch.float32)
    alone = gradients(backend, make_dy(case), case)
    monkeypatch.setattr(sys.modules["lorakern.triton_kernels.backward"], "BLOCK_S", 4)
    for name, d in gradients(backend, make_dy(case), case, backend.plan(case["indices"], 11)).items():
        assert torch.equal(bits(d), bits(alone[name]))


def test_nothing_but_zeros():
    """No token, tokens without an adapter, slots of rank 0: every gradient is written, with zeros."""
    case = make_case(5, 16, (16, 3), 3, 8, torch.float16)
    empty = case | {name: case[name][:0] for name in ("x", "indices", "gates")}
    absent = case | {"indices": torch.full((5, 1), -1, device=DEVICE)}
    no_ranks = case | {"ranks": torch.zeros(3, dtype=torch.int32, device=DEVICE)}
    for some in (empty, absent, no_ranks):
        assert all((d == 0).all() for d in gradients(backend, make_dy(some), some).values())
    unused = case | {"indices": torch.full((5, 1), 2, device=DEVICE)}
    ours = gradients(backend, make_dy(unused), unused)
    assert all((ours[name][:2] == 0).all() for name in ("A0", "A1", "B0", "B1", "scale")) and ours["A0"][2].any()


def test_strides():
    """Rows and columns of x and dy apart, dy of stride 0, transposed routing, one A for every slot."""
    case = make_case(9, 63, (37, 5), 6, 24, torch.float16, choices=2, options="scale gates")
    dy = make_dy(case)
    wide = torch.zeros(9, 2, 63 * 3, device=DEVICE, dtype=torch.float16)
    wide[:, 1, ::3] = case["x"]
    check_backward(case | {"x": wide[:, 1, ::3]}, dy.T.contiguous().T, 1e-3)
    check_backward(case | {"x": case["x"].T.contiguous().T}, dy[:1, :1].expand(9, 42), 1e-3)
    gates, indices = case["gates"].T.contiguous().T, case["indices"].clamp(max=6).int().T.contiguous().T
    A = [a[:1].expand(6, -1, -1) for a in case["A"]]
    B = [torch.cat([b, b], dim=1)[:, ::2] for b in case["B"]]
    assert A[0].stride(0) == 0 and not B[0].is_contiguous()
    check_backward(case | {"A": A, "B": B, "gates": gates, "indices": indices}, dy, 1e-3)


def test_offsets_beyond_int32(monkeypatch):
    """Slots of A and B and rows of x and dy more than 2**31 elements away, by strides that fit in 32 bits."""
    far = far_memory(monkeypatch)
    case = make_case(4, 32, (16,), 4, 8, torch.float16, options="")
    case["indices"] = torch.tensor([[3], [0], [2], [3]], device=DEVICE)
    dy = make_dy(case)
    there = case | {"x": far(case["x"], 0), "A": [far(case["A"][0], 1024)], "B": [far(case["B"][0], 2048)]}
    ours, theirs = gradients(backend, far(dy, 4096), there), gradients(reference, dy, case)
    for name, truth in theirs.items():
        assert_close(name, ours[name], truth, 1e-3)


@pytest.mark.parametrize(("options", "count"), [("", 5), ("gates", 6), ("scale gates", 7)])
def test_launches_do_not_depend_on_slices(options, count, monkeypatch):
    case = make_case(3, 16, (8, 5, 3), 3, 8, torch.float32, choices=2, options=options)
    plan = backend.plan(case["indices"], 3)
    launched = record(monkeypatch)
    gradients(backend, make_dy(case), case, plan)
    assert len(launched) == count


def test_autograd_runs_it():
    case = make_case(7, 24, (16, 9), 3, 8, torch.float32, choices=2, options="scale gates")
    case["indices"] = case["indices"].clamp(-1, 2)
    leaves = [case["x"], *case["A"], *case["B"], case["scale"], case["gates"]]
    options = {name: case[name] for name in ("scale", "gates")}
    results = []
    for name in ("triton", "reference"):
        for leaf in leaves:
            leaf.requires_grad_().grad = None
        with lk.use_backend(name):
            # whose dy has stride 0
            lk.lora_delta(case["x"], case["A"], case["B"], case["indices"], **options).sum().backward()
        results.append([leaf.grad for leaf in leaves])
    for ours, theirs in zip(*results, strict=True):
        assert_close("gradient", ours, theirs, 2e-6)


def test_float64_is_refused():
    case = make_case(5, 16, (16,), 3, 8, torch.float64)
    with pytest.raises(LorakernError, match="float64"):
        gradients(backend, make_dy(case), case)
