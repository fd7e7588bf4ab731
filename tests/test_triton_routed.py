"""Routed mixtures on the Triton backend against the reference: on a GPU, or on the CPU in Triton's interpreter."""

import pytest
import torch
from test_triton import DEVICE, DTYPE_IDS, DTYPES, INTERPRETED, assert_close, bits, make_case, used_rows

import lorakern as lk
from lorakern.backends import reference
from lorakern.backends import triton as backend

if not INTERPRETED:
    pytestmark = [
        pytest.mark.gpu,
        pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device; test_triton_aot.py interprets it"),
    ]

SHAPES = [  # tokens, d_in, d_outs, slots, r_max, choices, router_rank
    (1, 64, (64,), 1, 16, 1, 16),
    (5, 63, (5, 70), 3, 7, 3, 5),
    (3, 20, (9,), 2, 1, 2, 1),
    (19, 130, (70, 37, 64), 6, 33, 2, 17),
]


def make_routed(dtype, tokens, d_in, d_outs, slots, r_max, choices, router_rank, options="ranks scale"):
    case = make_case(tokens, d_in, d_outs, slots, r_max, dtype, choices=choices, options=options)
    case.pop("gates")
    g = torch.Generator().manual_seed(1)
    case["router_A"] = [(torch.randn(router_rank, d_in, generator=g) / d_in).to(DEVICE, dtype) for _ in d_outs]
    case["cores"] = [torch.randn(slots, router_rank, r_max, generator=g) / r_max**0.5 for _ in d_outs]
    for core in case["cores"]:
        for slot, rank in enumerate([] if case["ranks"] is None else case["ranks"].tolist()):
            core[slot, :, rank:] = torch.nan
    case["cores"] = [core.to(DEVICE) for core in case["cores"]]
    return case


def run(module, y, case, plan=(None, None), y_offset=0, accumulate=True):
    out = y.clone()
    module.routed_bgmv(out, **case, order=plan[0], starts=plan[1], y_offset=y_offset, accumulate=accumulate)
    return out


def gates_of(module, case):
    x, indices, router_A, cores, ranks = (case[key] for key in ("x", "indices", "router_A", "cores", "ranks"))
    h = torch.empty(len(cores), *indices.shape, cores[0].shape[2], device=DEVICE)
    gates = torch.full(h.shape[:3], torch.nan, device=DEVICE)
    module.shrink(h, x, case["A"], indices, ranks, None, None)
    module.attention_gates(gates, x, h, router_A, cores, indices, ranks)
    return gates


@pytest.mark.parametrize("options", ["ranks scale", ""])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_reference_in_float32(shape, options):
    check(*DTYPES[0], shape, options)


@pytest.mark.parametrize(("dtype", "bound"), DTYPES[1:], ids=DTYPE_IDS[1:])
def test_matches_reference_in_16_bits(dtype, bound):
    check(dtype, bound, SHAPES[1], "ranks scale")


def check(dtype, bound, shape, options):
    case = make_routed(dtype, *shape, options=options)
    y = torch.randn(shape[0], sum(shape[2]) + 5).to(DEVICE, dtype)
    accumulate = options != ""
    ours, theirs = (run(module, y, case, y_offset=2, accumulate=accumulate) for module in (backend, reference))
    assert_close("routed_bgmv", ours, theirs, bound)
    rest = ~used_rows(case)
    assert torch.equal(bits(ours[rest]), bits(y[rest]))
    assert torch.equal(ours[:, :2], y[:, :2]) and torch.equal(ours[:, -3:], y[:, -3:])
    ours, theirs = gates_of(backend, case), gates_of(reference, case)
    assert (ours - theirs).abs().max() < 1e-5
    absent = (case["indices"] < 0) | (case["indices"] >= shape[3])
    assert (ours[:, absent] == 0).all()


@pytest.mark.parametrize("shape", SHAPES[1:], ids=str)
def test_batched_is_row_by_row_bit_for_bit(shape):
    case = make_routed(torch.float32, *shape)
    y = torch.randn(shape[0], sum(shape[2])).to(DEVICE)
    whole = run(backend, y, case)
    assert torch.equal(whole, run(backend, y, case, plan=backend.plan(case["indices"], shape[3])))
    for t in range(0, shape[0], 6):
        row = case | {"x": case["x"][t : t + 1], "indices": case["indices"][t : t + 1]}
        assert torch.equal(bits(run(backend, y[t : t + 1], row)), bits(whole[t : t + 1]))


def test_one_choice_has_a_gate_of_one():
    case = make_routed(torch.float32, 20, 64, (48,), 4, 16, 1, 8, options="ranks")
    present = (case["indices"] >= 0) & (case["indices"] < 4)
    assert torch.equal(gates_of(backend, case)[0], present.float())


def test_gradients_match_reference():
    case = make_routed(torch.float32, 6, 40, (9, 20), 3, 5, 2, 3)
    case["indices"] = case["indices"].where((case["indices"] >= 0) & (case["indices"] < 3), -1)
    x, A, B, router_A, cores = (case[key] for key in ("x", "A", "B", "router_A", "cores"))
    leaves = [t.nan_to_num(0.0).requires_grad_() for t in (x, *A, *B, *router_A, *cores, case["scale"])]
    dy, found = torch.randn(6, 29).to(DEVICE), []
    for name in ("triton", "reference"):
        lists = [leaves[1 + 2 * i : 3 + 2 * i] for i in range(4)]
        with lk.use_backend(name):
            delta = lk.routed_delta(leaves[0], *lists, case["indices"], scale=leaves[-1], ranks=case["ranks"])
            found.append(torch.autograd.grad(delta, leaves, dy))
    for ours, theirs in zip(*found, strict=True):
        assert_close("gradient", ours, theirs, 1e-5)
