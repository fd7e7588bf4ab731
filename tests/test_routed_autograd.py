"""Gradients of routed mixtures, the registration of the ops, torch.compile, and what is refused."""

import pytest
import torch
from problems import TOLERANCES, error_ratio
from routed_problems import direct, routed

import lorakern as lk

CASES = [  # tokens, choices, slots, d_in, d_outs, r_max, router_rank
    (7, 1, 3, 40, (24,), 8, 4),
    (70, 3, 4, 129, (65, 30), 17, 5),
    (150, 2, 3, 300, (200,), 33, 16),
]


def build(dtype, case, **options):
    *rest, router_rank = case
    r = routed(dtype, *rest, router_rank=router_rank, **options)
    r.lora = r.lora.without_nan()
    r.cores = [core.nan_to_num(0.0) for core in r.cores]
    return r


def gradients(r, dy, function):
    """Gradients of function(x, A, B, router_A, router_B, scale) by all of them."""
    p, n = r.lora, len(r.lora.A)
    leaves = [t.detach().clone().requires_grad_() for t in (p.x, *p.A, *p.B, *r.router_A, *r.router_B, p.scale)]
    lists = [leaves[1 + i * n : 1 + (i + 1) * n] for i in range(4)]
    return torch.autograd.grad(function(leaves[0], *lists, leaves[-1]), leaves, dy)


def by_lorakern(r):
    def delta(x, A, B, router_A, router_B, scale):
        cores = lk.router_cores(B, router_B, scale=scale, ranks=r.lora.ranks)
        return lk.routed_delta(x, A, B, router_A, cores, r.lora.indices, scale=scale, ranks=r.lora.ranks)

    return delta


def by_formula(r):
    return lambda *leaves: direct(*leaves[:-1], r.lora.indices, leaves[-1], r.lora.ranks)[0]


@pytest.mark.parametrize("choices", [1, 3])
def test_gradcheck_of_the_reference(choices):
    r = build(torch.float64, (4, choices, 3, 5, (3, 2), 3, 2), sharpness=3.0)
    p = r.lora
    tensors = [t.double().requires_grad_() for t in (p.x, *p.A, *p.B, *r.router_A, *r.cores, p.scale)]

    def delta(x, *rest):
        lists = [rest[2 * i : 2 * i + 2] for i in range(4)]
        return lk.routed_delta(x, *lists, p.indices, scale=rest[-1], ranks=p.ranks)

    with lk.use_backend("reference"):
        assert torch.autograd.gradcheck(delta, tensors)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", list(TOLERANCES), ids=str)
def test_gradients_are_those_of_the_direct_formula(dtype, case):
    r = build(dtype, case, sharpness=2.0)
    dy = torch.randn(case[0], sum(case[4]), generator=torch.Generator().manual_seed(3)).to(dtype)
    got, exact = gradients(r, dy, by_lorakern(r)), gradients(r.double(), dy.double(), by_formula(r))
    tolerance = max(TOLERANCES[dtype], 1e-5)
    for gradient, truth in zip(got, exact, strict=True):
        if truth.abs().max() > 1e-9:  # with one choice nothing depends on the router
            assert error_ratio(gradient, truth) < tolerance
        else:
            assert gradient.abs().max() < 1e-4


def test_backward_is_deterministic_and_independent_of_threads():
    r = build(torch.float32, (200, 3, 5, 200, (130,), 24, 8))
    dy, before, results = torch.randn(200, 130), torch.get_num_threads(), []
    for threads in (1, 2, 2):
        torch.set_num_threads(threads)
        results.append(gradients(r, dy, by_lorakern(r)))
    torch.set_num_threads(before)
    for _, second, third in zip(*results, strict=True):
        assert torch.equal(second, third)
    for first, second in zip(results[0], results[1], strict=True):
        assert error_ratio(first, second) < 1e-5


def test_only_what_is_asked_for_gets_a_gradient():
    r = build(torch.float32, CASES[1])
    router = [a.clone().requires_grad_() for a in r.router_A]
    x, A, B, _, cores, indices = r.arguments
    lk.routed_delta(x, A, B, router, cores, indices, **r.options).square().sum().backward()
    assert all(a.grad.abs().sum() > 0 for a in router) and x.grad is None and cores[0].grad is None


def test_routed_bgmv_in_place_carries_gradients():
    r = build(torch.float32, CASES[1])
    p = r.lora
    router_B = [b.clone().requires_grad_() for b in r.router_B]
    cores = lk.router_cores(p.B, router_B, scale=p.scale, ranks=p.ranks)
    y = lk.routed_bgmv(p.y.clone(), p.x, p.A, p.B, r.router_A, cores, p.indices, y_offset=3, **r.options)
    assert error_ratio(y, r.run()) < 1e-6
    assert torch.equal(y[~p.served()], p.y[~p.served()])
    got = torch.autograd.grad(y.square().sum(), router_B, retain_graph=True)
    delta = lk.routed_delta(p.x, p.A, p.B, r.router_A, cores, p.indices, **r.options)
    want = torch.autograd.grad((p.y + torch.nn.functional.pad(delta, (3, 4))).square().sum(), router_B)
    for gradient, expected in zip(got, want, strict=True):
        assert error_ratio(gradient, expected) < 1e-5


def test_in_place_update_of_a_saved_tensor_is_noticed():
    r = build(torch.float32, CASES[0])
    y, weight = r.lora.y.clone(), torch.randn(31, 3, requires_grad=True)
    out = y @ weight
    lk.routed_bgmv(y, *r.arguments, y_offset=3, **r.options)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.parametrize("options", [False, True])
def test_opcheck(options):
    r = build(torch.float32, (6, 2, 5, 40, (24, 8), 8, 4), options=options)
    x, A, B, router_A, cores, indices = r.arguments
    rest = (indices, r.lora.scale, r.lora.ranks, *lk.plan(indices, 5))
    h, ops = lk.shrink(x, A, indices, ranks=r.lora.ranks), torch.ops.lorakern
    leaves = [[t.clone().requires_grad_() for t in tensors] for tensors in (A, B, router_A, cores)]
    torch.library.opcheck(ops.attention_gates.default, (x, h, router_A, cores, indices, r.lora.ranks))
    torch.library.opcheck(ops.routed_bgmv_.default, (r.lora.y, x, A, B, router_A, cores, *rest, 3, True))
    torch.library.opcheck(ops.routed_delta.default, (x, A, B, router_A, cores, *rest))
    torch.library.opcheck(ops.routed_delta.default, (x.clone().requires_grad_(), *leaves, *rest))
    torch.library.opcheck(ops.routed_delta_backward.default, (torch.randn(6, 32), x, A, B, router_A, cores, *rest))


def test_compiles_without_recompiling_per_batch():
    torch._dynamo.reset()

    def step(y, x, A, B, router_A, router_B, indices, scale, ranks):
        cores = lk.router_cores(B, router_B, scale=scale, ranks=ranks)
        h = lk.shrink(x, A, indices, ranks=ranks)
        gates = lk.attention_gates(x, h, router_A, cores, indices, ranks=ranks)
        return lk.routed_bgmv(y, x * 2, A, B, router_A, cores, indices, scale=scale, ranks=ranks, y_offset=3), gates

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    batches = [build(torch.float32, (t, 2, 5, 40, (24, 8), 8, 4), seed=t) for t in (6, 9, 31)]
    for i, r in enumerate(batches):
        x, A, B, router_A, _, indices = r.arguments
        rest = (x, A, B, router_A, r.router_B, indices, r.lora.scale, r.lora.ranks)
        with torch._dynamo.config.patch(error_on_recompile=i > 0):
            got = compiled(r.lora.y.clone(), *rest)
        for result, expected in zip(got, step(r.lora.y.clone(), *rest), strict=True):
            assert error_ratio(result, expected) < 1e-6


def test_gradients_compile():
    torch._dynamo.reset()
    r = build(torch.float32, CASES[1])
    dy = torch.randn(70, 95)
    expected = gradients(r, dy, by_lorakern(r))
    got = gradients(r, dy, torch.compile(by_lorakern(r), fullgraph=True, backend="aot_eager"))
    for gradient, truth in zip(got, expected, strict=True):
        assert error_ratio(gradient, truth) < 1e-6
