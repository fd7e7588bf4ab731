"""torch.compile(fullgraph=True): no graph break, no recompilation from batch to batch, gradients included."""

import pytest
import torch
from problems import error_ratio, problem

import lorakern as lk


def step(y, x, A, B, indices, scale, ranks, gates):
    y = torch.relu(y)
    plan = lk.plan(indices, A[0].shape[0])
    lk.bgmv(y, x * 2, A, B, indices, scale=scale, ranks=ranks, gates=gates, plan=plan, y_offset=3)
    return y + 1


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def test_fullgraph_without_recompiling_per_batch():
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    batches = [problem(tokens=t, choices=2, d_outs=(24, 8), seed=t) for t in (6, 9, 31)]

    def run(function, p):
        return function(p.y.clone(), p.x, p.A, p.B, p.indices, p.scale, p.ranks, p.gates)

    assert error_ratio(run(compiled, batches[0]), run(step, batches[0])) < 1e-6
    with torch._dynamo.config.patch(error_on_recompile=True):
        for p in batches[1:]:
            assert error_ratio(run(compiled, p), run(step, p)) < 1e-6


def test_sgmv_and_the_two_halves_compile():
    def function(y, x, A, B, indices, seg_starts, slots):
        h = lk.shrink(x, A, indices)
        lk.expand(y, h, B, indices, scale=0.5)
        return lk.sgmv(y, x, A, B, seg_starts, slots)

    p = problem(tokens=8, options=False)
    arguments = (p.x, p.A[0], p.B[0], p.indices, torch.tensor([0, 3, 8]), torch.tensor([1, 2]))
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert error_ratio(compiled(p.y.clone(), *arguments), function(p.y.clone(), *arguments)) < 1e-6


def test_gradients_compile():
    p = problem(tokens=12, choices=2).without_nan()

    def loss(x, a, b, gates):
        return lk.lora_delta(x, a, b, p.indices, scale=p.scale, ranks=p.ranks, gates=gates).square().sum()

    inputs = [t.clone().requires_grad_() for t in (p.x, p.A[0], p.B[0], p.gates)]
    expected = torch.autograd.grad(loss(*inputs), inputs)
    got = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(*inputs), inputs)
    for gradient, truth in zip(got, expected, strict=True):
        assert error_ratio(gradient, truth) < 1e-6


def test_inductor_generates_code_around_the_op():
    """The default compiler of torch, once: it needs a C++ compiler and some seconds."""
    p = problem(tokens=6, choices=1)
    arguments = (p.x, p.A, p.B, p.indices, p.scale, p.ranks, p.gates)
    assert (
        error_ratio(torch.compile(step, fullgraph=True)(p.y.clone(), *arguments), step(p.y.clone(), *arguments)) < 1e-6
    )
