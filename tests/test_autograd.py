"""Gradients: the formulas by gradcheck on the reference, the C++ backward against it, the registration of the ops."""

import pytest
import torch
from problems import TOLERANCES, error_ratio, problem

import lorakern as lk

CASES = [  # tokens, choices, slots, d_in, d_outs, r_max
    (7, 1, 3, 40, (24,), 8),
    (70, 3, 4, 129, (65, 30), 17),
    (150, 1, 2, 576, (1000,), 70),
    (300, 2, 5, 64, (48, 16, 16), 32),
]


def leaves(p):
    """The differentiable inputs of a problem, flattened, and a function of them."""
    tensors = [t.detach().clone().requires_grad_() for t in (p.x, *p.A, *p.B, p.scale, p.gates)]

    def delta(x, *rest):
        n = len(p.A)
        A, B, (scale, gates) = rest[:n], rest[n : 2 * n], rest[2 * n :]
        return lk.lora_delta(x, A, B, p.indices, scale=scale, ranks=p.ranks, gates=gates)

    return tensors, delta


@pytest.mark.parametrize("choices", [1, 2])
def test_gradcheck_of_the_reference(choices):
    p = problem(torch.float64, 4, choices, 3, 5, (3, 2), 3).without_nan()
    p.scale, p.gates = p.scale.double(), p.gates.double()
    tensors, delta = leaves(p)
    with lk.use_backend("reference"):
        assert torch.autograd.gradcheck(delta, tensors)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", list(TOLERANCES), ids=str)
def test_cpu_backward_matches_reference(dtype, case):
    p = problem(dtype, *case)
    tensors, delta = leaves(p)
    dy = torch.randn(case[0], sum(case[4])).to(dtype)
    gradients = torch.autograd.grad(delta(*tensors), tensors, dy)
    exact_tensors, exact_delta = leaves(p.double())
    with lk.use_backend("reference"):
        exact = torch.autograd.grad(exact_delta(*exact_tensors), exact_tensors, dy.double())
    assert [g.dtype for g in gradients] == [t.dtype for t in tensors]
    for gradient, truth in zip(gradients[:-2], exact[:-2], strict=True):
        assert error_ratio(gradient, truth) < TOLERANCES[dtype]
    for gradient, truth in zip(gradients[-2:], exact[-2:], strict=True):
        assert error_ratio(gradient, truth) < 2e-5  # of scale and gates: sums of float32 products that cancel


def test_backward_is_deterministic_and_independent_of_threads():
    p = problem(torch.float32, 300, 2, 5, 200, (130,), 24).without_nan()
    tensors, delta = leaves(p)
    before, results = torch.get_num_threads(), []
    for threads in (1, 2, 2):
        torch.set_num_threads(threads)
        results.append(torch.autograd.grad(delta(*tensors).square().sum(), tensors))
    torch.set_num_threads(before)
    for first, second, third in zip(*results, strict=True):
        assert torch.equal(first, second) and torch.equal(second, third)


@pytest.mark.parametrize("choices", [1, 3])
@pytest.mark.parametrize("dtype", list(TOLERANCES), ids=str)
def test_gradients_of_a_token_do_not_depend_on_the_batch(dtype, choices):
    p = problem(dtype, 137, choices, 5, 520, (130, 64), 24)  # with 3 choices, some tokens have a slot twice
    dy = torch.randn(137, 194).to(dtype)

    def gradients(p, dy):
        (x, *_, gates), delta = leaves(p)
        return torch.autograd.grad(delta(x, *p.A, *p.B, p.scale, gates), (x, gates), dy)

    whole = gradients(p, dy)
    for start, stop in ((0, 1), (17, 18), (136, 137), (30, 49), (0, 64), (5, 137)):
        part = gradients(p.rows(start, stop), dy[start:stop])
        assert all(torch.equal(ours, theirs[start:stop]) for ours, theirs in zip(part, whole, strict=True))


def test_bgmv_in_place_carries_gradients():
    p = problem(torch.float32, tokens=9, choices=2).without_nan()
    tensors, delta = leaves(p)
    base = p.y.clone().requires_grad_()
    x, A, B, scale, gates = tensors
    y = lk.bgmv(base * 2, x, A, B, p.indices, scale=scale, ranks=p.ranks, gates=gates, y_offset=3)
    assert error_ratio(y, p.y * 2 + torch.nn.functional.pad(delta(*tensors), (3, 4))) < 1e-6
    untouched = ~p.served()
    assert torch.equal(y[untouched], p.y[untouched] * 2)
    got = torch.autograd.grad(y.square().sum(), [base, *tensors])
    want = torch.autograd.grad(
        (base * 2 + torch.nn.functional.pad(delta(*tensors), (3, 4))).square().sum(), [base, *tensors]
    )
    for gradient, expected in zip(got, want, strict=True):
        assert error_ratio(gradient, expected) < 1e-5


def test_sgmv_carries_gradients():
    x = torch.randn(6, 8, requires_grad=True)
    a, b = torch.randn(2, 4, 8), torch.randn(2, 5, 4)
    y = lk.sgmv(torch.zeros(6, 5), x, a, b, torch.tensor([0, 4, 6]), torch.tensor([1, -1]))
    (gradient,) = torch.autograd.grad(y.sum(), x)
    expected = torch.cat([(torch.ones(4, 5) @ b[1] @ a[1]), torch.zeros(2, 8)])
    assert error_ratio(gradient, expected) < 1e-6


def test_only_what_is_asked_for_gets_a_gradient():
    p = problem(torch.float32, options=False)
    gates = torch.rand(p.indices.shape, requires_grad=True)
    lk.lora_delta(p.x, p.A, p.B, p.indices, gates=gates).sum().backward()
    assert gates.grad is not None and p.x.grad is None and p.A[0].grad is None


def test_in_place_update_of_a_saved_tensor_is_noticed():
    p = problem(torch.float32)
    y = p.y.clone()
    weight = torch.randn(y.shape[1], 3, requires_grad=True)
    out = y @ weight
    lk.bgmv(y, p.x, p.A, p.B, p.indices, y_offset=3, **p.options)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.parametrize("options", [False, True])
def test_opcheck(options):
    p = problem(torch.float32, tokens=6, choices=2, d_outs=(24, 8), options=options).without_nan()
    order, starts = lk.plan(p.indices, 5)
    lora = (p.x, p.A, p.B, p.indices, p.scale, p.ranks, p.gates, order, starts)
    gradients = (p.x.clone().requires_grad_(), [a.clone().requires_grad_() for a in p.A], *lora[2:])
    h = lk.shrink(p.x, p.A, p.indices, ranks=p.ranks)
    ops = torch.ops.lorakern
    torch.library.opcheck(ops.plan.default, (p.indices, 5))
    torch.library.opcheck(ops.lora_delta.default, lora)
    torch.library.opcheck(ops.lora_delta.default, gradients)
    torch.library.opcheck(ops.lora_delta_backward.default, (torch.randn(6, 32), *lora))
    torch.library.opcheck(ops.bgmv_.default, (p.y, *lora, 3, True))
    torch.library.opcheck(ops.shrink_.default, (h, p.x, p.A, p.indices, p.ranks, order, starts))
    torch.library.opcheck(
        ops.expand_.default, (p.y, h, p.B, p.indices, p.scale, p.ranks, p.gates, order, starts, 3, True)
    )
    segments = (torch.tensor([0, 2, 6]), torch.tensor([1, 0]), 6)
    torch.library.opcheck(ops.segment_indices.default, segments)
