"""routed_bgmv and routed_delta: mixtures whose gates a router computes, token by token (RAMoLE)."""

import torch
from torch.compiler import is_dynamo_compiling

from lorakern.backends import FORCED, forced
from lorakern.ops import _checks as check
from lorakern.ops._fast import fast
from lorakern.ops._library import backend_for, define, mark_written
from lorakern.ops.bgmv import _lora_delta, _lora_delta_backward, _normalised, add_served, wants_gradient
from lorakern.ops.router import attention_gates_op, check_routers
from lorakern.ops.shrink_expand import _shrink

_ROUTED = (
    "Tensor x, Tensor[] A, Tensor[] B, Tensor[] router_A, Tensor[] cores, Tensor indices, Tensor? scale, Tensor? ranks"
)
_PLAN = "Tensor? order, Tensor? starts"


def _run(op, y, x, A, B, router_A, cores, indices, scale, ranks, order, starts, y_offset, accumulate):
    backend = backend_for("routed_bgmv", x, A[0].shape[1], indices.shape[1])
    check.validate(op, backend, y, y_offset, x, A, B, indices, ranks, *A[0].shape[:2])
    backend.routed_bgmv(y, x, A, B, router_A, cores, indices, scale, ranks, order, starts, y_offset, accumulate)


@define(f"routed_bgmv_(Tensor(a!) y, {_ROUTED}, {_PLAN}, SymInt y_offset, bool accumulate) -> ()", lambda *_: None)
def _routed_bgmv(y, x, A, B, router_A, cores, *rest):
    target = y.narrow(1, rest[-2], sum(b.shape[1] for b in B))
    routers = [("router_A", router_A), ("cores", cores)]
    check.check_overlap("routed_bgmv", target, [(name, tensor) for name, tensors in routers for tensor in tensors])
    _run("routed_bgmv", y, x, A, B, router_A, cores, *rest)
    mark_written(y)


def _fake_delta(x, A, B, *_):
    return x.new_empty(x.shape[0], sum(b.shape[1] for b in B))


@define(f"routed_delta({_ROUTED}, {_PLAN}) -> Tensor", _fake_delta)
def _routed_delta(x, A, B, *rest):
    y = x.new_zeros(x.shape[0], sum(b.shape[1] for b in B))
    _run("routed_delta", y, x, A, B, *rest, 0, False)
    return y


def _fake_backward(dy, x, A, B, router_A, cores, indices, scale, ranks, order, starts):
    def like(tensors):
        return [torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in tensors]

    dscale = x.new_empty(0, dtype=torch.float32) if scale is None else torch.empty_like(scale)
    return *like([x]), like(A), like(B), like(router_A), like(cores), dscale


@define(
    f"routed_delta_backward(Tensor dy, {_ROUTED}, {_PLAN}) -> (Tensor, Tensor[], Tensor[], Tensor[], Tensor[], Tensor)",
    _fake_backward,
)
def _routed_delta_backward(dy, x, A, B, router_A, cores, indices, scale, ranks, order, starts):
    r_max, wide = A[0].shape[1], check.accumulation_dtype(x.dtype)
    h = x.new_empty(len(A), *indices.shape, r_max, dtype=wide)
    _shrink(h, x, A, indices, ranks, order, starts)
    gates = attention_gates_op(x, h, router_A, cores, indices, ranks)
    dx = torch.zeros(x.shape, dtype=wide, device=x.device)
    dscale = x.new_zeros(0 if scale is None else scale.shape[0], dtype=wide)
    dA, dB, drouter, dcores, column, wide_x = [], [], [], [], 0, x.to(wide)
    for s, (a, b, router, core) in enumerate(zip(A, B, router_A, cores, strict=True)):
        part = dy.narrow(1, column, b.shape[1]).contiguous()
        column += b.shape[1]
        dx_update, da_update, db, dscale_update, dgates = _lora_delta_backward(
            part, x, [a], [b], indices, scale, ranks, gates[s], order, starts
        )
        weighted = gates[s] * dgates
        dlogits = (weighted - gates[s] * weighted.sum(dim=1, keepdim=True)) / router.shape[0] ** 0.5
        # sum_k dlogits[k] q^T C_i A_i x is the update of an adapter (A_i, C_i) with gates dlogits, times q
        wide_a, wide_router = [a.to(wide)], router.to(wide)
        q = wide_x @ wide_router.T
        dq = _lora_delta(wide_x, wide_a, [core], indices, None, ranks, dlogits, order, starts)
        dx_key, da_key, dcore, _, _ = _lora_delta_backward(
            q, wide_x, wide_a, [core], indices, None, ranks, dlogits, order, starts
        )
        dx += dx_update + dx_key + dq @ wide_router
        dA.append((da_update[0] + da_key[0]).to(a.dtype))
        dB.append(db[0])
        drouter.append((dq.T @ wide_x).to(router.dtype))
        dcores.append(dcore[0])
        if scale is not None:
            dscale += dscale_update
    return dx.to(x.dtype), dA, dB, drouter, dcores, dscale


def _save_inputs(ctx, inputs, output):
    x, *slices = inputs[:5]
    ctx.slices, ctx.backend = len(slices[0]), FORCED.get()
    ctx.save_for_backward(x, *(tensor for tensors in slices for tensor in tensors), *inputs[5:])


def _delta_gradients(ctx, dy):
    x, *rest = ctx.saved_tensors
    slices = [rest[i * ctx.slices : (i + 1) * ctx.slices] for i in range(4)]
    indices, scale, ranks, order, starts = rest[4 * ctx.slices :]
    with forced(ctx.backend):
        *gradients, dscale = _routed_delta_backward(dy, x, *slices, indices, scale, ranks, order, starts)
    return *gradients, None, None if scale is None else dscale, None, None, None


torch.library.register_autograd("lorakern::routed_delta", _delta_gradients, setup_context=_save_inputs)


def _checked(op, x, A, B, router_A, cores, indices, scale, ranks, plan):
    x, A, B, indices, scale, ranks, _, order, starts = _normalised(op, x, A, B, indices, scale, ranks, None, plan)
    router_A, cores = check_routers(op, router_A, cores, x, *A[0].shape[:2], len(A))
    return x, A, B, router_A, cores, indices, scale, ranks, order, starts


def routed_bgmv(
    y, x, A, B, router_A, cores, indices, *, scale=None, ranks=None, plan=None, y_offset=0, accumulate=True
):
    """Add to every row of y the mixture of its adapters that the router weighs, in place: shrink, gate, expand.

    ``y[t] (+)= sum_k gates[t, k] * scale[i] * B[i] @ (A[i] @ x[t])`` with i = indices[t, k] and the gates of
    `attention_gates`, which never leave the call; no update of a single adapter is formed.

    Args:
        y, x, A, B, scale, ranks, plan, y_offset, accumulate: as in `bgmv`.
        router_A: (r_r, d_in) of x's dtype, or a sequence of such, one per slice: each slice has its own gates.
        cores: (slots, r_r, r_max) float32, or a sequence of such: what `router_cores` made of B, the router's B and
            the same scale.
        indices: (T, K) int32 or int64: the slots among which each token chooses, -1 for none; (T,) for one.

    Returns:
        y. A token's result is bitwise the same alone and in any batch. Where an input requires a gradient the update
        is computed by `routed_delta` and then added.

    Raises:
        LorakernError: as `bgmv`, and for a router or cores of another shape, dtype or device. Nothing has been written
            then.

    The mixture is that of RAMoLE (arXiv 2406.16989).

    >>> import torch, lorakern as lk
    >>> A, B = torch.ones(2, 4, 8), torch.ones(2, 2, 4)
    >>> cores = lk.router_cores(B, torch.ones(2, 3))
    >>> lk.routed_bgmv(torch.zeros(2, 2), torch.ones(2, 8), A, B, torch.ones(3, 8), cores,
    ...                torch.tensor([[0, 1], [-1, -1]])).tolist()
    [[32.0, 32.0], [0.0, 0.0]]
    """
    if not is_dynamo_compiling():
        given = (y, x, A, B, router_A, cores, indices, scale, ranks, plan, y_offset, accumulate)
        if (done := fast.routed_bgmv(*given)) is not None:
            return done
    op = "routed_bgmv"
    arguments = _checked(op, x, A, B, router_A, cores, indices, scale, ranks, plan)
    x, A, B, router_A, cores, indices, scale, ranks, *_ = arguments
    check.check_output(op, "y", y, x.shape[0], sum(b.shape[1] for b in B), y_offset, x.dtype, x.device)
    if wants_gradient(y, x, *A, *B, *router_A, *cores, scale):
        return add_served(y, torch.ops.lorakern.routed_delta(*arguments), A, indices, ranks, y_offset, accumulate)
    torch.ops.lorakern.routed_bgmv_(y, *arguments, y_offset, accumulate)
    return y


def routed_delta(x, A, B, router_A, cores, indices, *, scale=None, ranks=None, plan=None):
    """The mixture alone, as a new tensor that autograd follows: what `routed_bgmv` adds to y.

    Args:
        x, A, B, router_A, cores, indices, scale, ranks, plan: as in `routed_bgmv`.

    Returns:
        (T, sum of d_out) of x's dtype, zero in rows without an adapter; differentiable by x, A, B, router_A, cores and
        scale, and so by the router's B through `router_cores`.

    Raises:
        LorakernError: as `routed_bgmv`.

    >>> import torch, lorakern as lk
    >>> A, B = torch.ones(2, 4, 8), torch.ones(2, 2, 4) * torch.tensor([0.1, 0.2])[:, None, None]
    >>> router_A, router_B = torch.full((1, 8), 0.1), torch.zeros(2, 1, requires_grad=True)
    >>> delta = lk.routed_delta(torch.ones(1, 8), A, B, router_A, lk.router_cores(B, router_B), torch.tensor([[0, 1]]))
    >>> delta.sum().backward()
    >>> [round(gradient, 3) for gradient in router_B.grad.flatten().tolist()]
    [4.096, 4.096]
    """
    return torch.ops.lorakern.routed_delta(
        *_checked("routed_delta", x, A, B, router_A, cores, indices, scale, ranks, plan)
    )
