"""bgmv, sgmv and lora_delta: every token of a batch through its own adapter, or a gated mixture of several."""

import torch
from torch.compiler import is_dynamo_compiling

from lorakern.backends import FORCED, forced
from lorakern.backends.reference import unpacked
from lorakern.ops import _checks as check
from lorakern.ops._fast import fast
from lorakern.ops._library import backend_for, define, mark_written
from lorakern.ops.plan import check_plan

_LORA = "Tensor x, Tensor[] A, Tensor[] B, Tensor indices, Tensor? scale, Tensor? ranks, Tensor? gates"
_PLAN = "Tensor? order, Tensor? starts"


@define(
    f"bgmv_(Tensor(a!) y, {_LORA}, {_PLAN}, SymInt y_offset, bool accumulate, bool packed=False) -> ()", lambda *_: None
)
def _bgmv(y, x, A, B, indices, scale, ranks, gates, order, starts, y_offset, accumulate, packed=False):
    backend = backend_for("bgmv", x, A[0].shape[1], indices.shape[1])
    check.validate("bgmv", backend, y, y_offset, x, A, B, indices, ranks, *A[0].shape[:2])
    layout = {"packed": True} if packed else {}
    backend.bgmv(y, x, A, B, indices, scale, ranks, gates, order, starts, y_offset, accumulate, **layout)
    mark_written(y)


def _fake_delta(x, A, B, *_):
    return x.new_empty(x.shape[0], sum(b.shape[1] for b in B))


@define(f"lora_delta({_LORA}, {_PLAN}) -> Tensor", _fake_delta)
def _lora_delta(x, A, B, indices, scale, ranks, gates, order, starts):
    backend = backend_for("bgmv", x, A[0].shape[1], indices.shape[1])
    check.validate("lora_delta", backend, None, 0, x, A, B, indices, ranks, *A[0].shape[:2])
    y = x.new_zeros(x.shape[0], sum(b.shape[1] for b in B))
    backend.bgmv(y, x, A, B, indices, scale, ranks, gates, order, starts, 0, False)
    return y


def _gradient_like(tensor, x):
    """An op returns a tensor for every output: an empty one where there is no input to differentiate by."""
    if tensor is None:
        return x.new_empty(0, dtype=torch.float32)
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


def _fake_backward(dy, x, A, B, indices, scale, ranks, gates, order, starts):
    return (
        torch.empty_like(x, memory_format=torch.contiguous_format),
        [torch.empty_like(a, memory_format=torch.contiguous_format) for a in A],
        [torch.empty_like(b, memory_format=torch.contiguous_format) for b in B],
        _gradient_like(scale, x),
        _gradient_like(gates, x),
    )


@define(
    f"lora_delta_backward(Tensor dy, {_LORA}, {_PLAN}) -> (Tensor, Tensor[], Tensor[], Tensor, Tensor)", _fake_backward
)
def _lora_delta_backward(dy, x, A, B, indices, scale, ranks, gates, order, starts):
    backend = backend_for("backward", x, A[0].shape[1], indices.shape[1])
    dx, dA, dB, dscale, dgates = backend.backward(dy, x, A, B, indices, scale, ranks, gates, order, starts)
    return (
        dx,
        dA,
        dB,
        _gradient_like(None, x) if scale is None else dscale,
        _gradient_like(None, x) if gates is None else dgates,
    )


def _save_inputs(ctx, inputs, output):
    x, A, B, *rest = inputs
    ctx.slices, ctx.backend = len(A), FORCED.get()
    ctx.save_for_backward(x, *A, *B, *rest)


def _delta_gradients(ctx, dy):
    x, *rest = ctx.saved_tensors
    A, B, rest = rest[: ctx.slices], rest[ctx.slices : 2 * ctx.slices], rest[2 * ctx.slices :]
    indices, scale, ranks, gates, order, starts = rest
    with forced(ctx.backend):
        gradients = _lora_delta_backward(dy, x, A, B, indices, scale, ranks, gates, order, starts)
    dx, dA, dB, dscale, dgates = gradients
    return (
        dx,
        dA,
        dB,
        None,
        None if scale is None else dscale,
        None,
        None if gates is None else dgates,
        None,
        None,
    )


torch.library.register_autograd("lorakern::lora_delta", _delta_gradients, setup_context=_save_inputs)


def _normalised(op, x, A, B, indices, scale, ranks, gates, plan):
    """Check what all ops of this file share, and return it in the form that the registered ops take."""
    check.check_activations(op, "x", x)
    A, B = check.as_slices(op, "A", A), check.as_slices(op, "B", B)
    if len(A) != len(B):
        check.fail(op, "B", f"have as many slices as A ({len(A)})", f"{len(B)}")
    slots, r_max = check.weight_dims(op, "A", A, 1)
    check.check_weights(op, "A", A, x.dtype, x.device, slots, r_max, 1, "(slots, r_max, d_in)")
    check.check_weights(op, "B", B, x.dtype, x.device, slots, r_max, 2, "(slots, d_out, r_max)")
    check.check_d_in(op, A, x)
    indices = check.check_indices(op, indices, x.shape[0], x.device)
    check.check_ranks(op, ranks, slots, x.device)
    scale = check.check_scale(op, scale, slots, x.device, check.accumulation_dtype(x.dtype))
    gates = check.check_gates(op, gates, indices, check.accumulation_dtype(x.dtype))
    order, starts = check_plan(op, plan, indices, slots)
    return x, A, B, indices, scale, ranks, gates, order, starts


def wants_gradient(*tensors):
    return torch.is_grad_enabled() and any(isinstance(t, torch.Tensor) and t.requires_grad for t in tensors)


def add_served(y, delta, A, indices, ranks, y_offset, accumulate):
    """Add an update that autograd follows to y, in place: rows without an adapter keep their bits."""
    slots = A[0].shape[0]
    served = (indices >= 0) & (indices < slots)
    if ranks is not None:
        served = served & (ranks[indices.clamp(0, slots - 1)] > 0)
    target = y.narrow(1, y_offset, delta.shape[1])
    new = target + delta if accumulate else delta
    target.copy_(torch.where(served.any(dim=1, keepdim=True), new, target))
    return y


def _bgmv_checked(op, y, arguments, y_offset, accumulate, packed=False):
    x, A, B, indices, scale, ranks, gates, _, _ = arguments
    if packed:
        check.check_packed(op, B, ranks)
    check.check_output(op, "y", y, x.shape[0], sum(b.shape[1] for b in B), y_offset, x.dtype, x.device)
    if wants_gradient(y, x, *A, *B, scale, gates):
        B = unpacked(B, ranks) if packed else B
        delta = torch.ops.lorakern.lora_delta(x, A, B, *arguments[3:])
        return add_served(y, delta, A, indices, ranks, y_offset, accumulate)
    torch.ops.lorakern.bgmv_(y, *arguments, y_offset, accumulate, packed)
    return y


def bgmv(
    y, x, A, B, indices, *, scale=None, ranks=None, gates=None, plan=None, y_offset=0, accumulate=True, packed=False
):
    """Add to every row of y the update of that row's own adapters, in place.

    ``y[t] (+)= sum_k gates[t, k] * scale[i] * B[i] @ (A[i] @ x[t])`` with i = indices[t, k]; for several slices the
    columns of y are filled side by side from y_offset on.

    Args:
        y: (T, columns) of x's dtype, written in place; any strides (a last dimension that is not contiguous costs a
            copy). Rows without an adapter (index -1, or a slot of rank 0) stay bit for bit as they were.
        x: (T, d_in) float16, bfloat16 or float32; any strides (likewise). Must not share memory with y.
        A: (slots, r_max, d_in) of x's dtype, or a sequence of such, one per slice; last dimension contiguous, other
            strides free.
        B: (slots, d_out, r_max) likewise; d_out may differ between slices.
        indices: (T,) or (T, K) int32 or int64: the slot of each token (and choice), -1 for none. On a GPU an index
            outside the slots counts as -1 (LORAKERN_DEBUG=1 raises instead).
        scale: a number, or (slots,) floats; None for 1.
        ranks: (slots,) int32 or int64, the true rank of each slot; None for r_max. What lies beyond is never read.
        gates: floats of the shape of indices; None for 1.
        plan: what `lorakern.plan(indices, slots)` returned; made here if None.
        y_offset: first column of y to fill.
        accumulate: add to y (True), or overwrite the rows that have an adapter (False).
        packed: B is (slots, d_out, r_max) in size, but slot i holds a contiguous (d_out, ranks[i]) matrix at its
            beginning: no cache line of padding is read for a small rank. On the CPU, with ranks; same bits as unpacked.

    Returns:
        y. Sums are float32 and y is rounded once (bfloat16 on hardware that multiplies it: A x is rounded to bfloat16
        too before B multiplies it); a token's result is bitwise the same alone and in any batch. Where an input
        requires a gradient the update is computed by `lora_delta` and then added.

    Raises:
        LorakernError: an argument of another shape, dtype or device, y that shares memory with an input, or (on the
            CPU) an index or rank out of range. Nothing has been written then.

    The operation is BGMV of Punica (arXiv 2310.18547), with gates, true ranks and several slices.

    >>> import torch, lorakern as lk
    >>> x, y = torch.ones(3, 8), torch.zeros(3, 2)
    >>> A, B = torch.ones(2, 4, 8), torch.ones(2, 2, 4)
    >>> lk.bgmv(y, x, A, B, torch.tensor([0, 1, -1]), scale=torch.tensor([1.0, 0.5])).tolist()
    [[32.0, 32.0], [16.0, 16.0], [0.0, 0.0]]
    """
    if not is_dynamo_compiling():
        done = fast.bgmv(y, x, A, B, indices, scale, ranks, gates, plan, y_offset, accumulate, packed)
        if done is not None:
            return done
    arguments = _normalised("bgmv", x, A, B, indices, scale, ranks, gates, plan)
    return _bgmv_checked("bgmv", y, arguments, y_offset, accumulate, packed)


def sgmv(y, x, A, B, seg_starts, slots, *, scale=None, ranks=None, y_offset=0, accumulate=True):
    """`bgmv` for runs of tokens: rows ``seg_starts[s]:seg_starts[s + 1]`` use slot ``slots[s]``.

    Args:
        seg_starts: (S + 1,) int32 or int64, not decreasing, between 0 and T. Rows outside all segments have no adapter.
        slots: (S,) integers; -1 for no adapter.
        y, x, A, B, scale, ranks, y_offset, accumulate: as in `bgmv`.

    Raises:
        LorakernError: as `bgmv`; on the CPU also where seg_starts decreases or leaves the rows of x.

    The operation is SGMV of Punica (arXiv 2310.18547).

    >>> import torch, lorakern as lk
    >>> x, y = torch.ones(3, 8), torch.zeros(3, 2)
    >>> A, B = torch.ones(2, 4, 8), torch.ones(2, 2, 4)
    >>> lk.sgmv(y, x, A, B, torch.tensor([0, 2, 3]), torch.tensor([1, -1])).tolist()
    [[32.0, 32.0], [32.0, 32.0], [0.0, 0.0]]
    """
    if not is_dynamo_compiling():
        done = fast.sgmv(y, x, A, B, seg_starts, slots, scale, ranks, y_offset, accumulate)
        if done is not None:
            return done
    check.check_activations("sgmv", "x", x)
    for name, tensor in (("seg_starts", seg_starts), ("slots", slots)):
        if not isinstance(tensor, torch.Tensor) or tensor.dim() != 1 or tensor.dtype not in (torch.int32, torch.int64):
            check.fail("sgmv", name, "be an int32 or int64 tensor of one dimension", check.describe(tensor))
        if tensor.device != x.device:
            check.fail("sgmv", name, f"be on {x.device} like x", check.describe(tensor))
    if seg_starts.shape[0] != slots.shape[0] + 1:
        check.fail(
            "sgmv", "seg_starts", f"have one element more than slots ({slots.shape[0]})", check.describe(seg_starts)
        )
    indices = torch.ops.lorakern.segment_indices(seg_starts, slots, x.shape[0])
    arguments = _normalised("sgmv", x, A, B, indices, scale, ranks, None, None)
    return _bgmv_checked("sgmv", y, arguments, y_offset, accumulate)


@define(
    "segment_indices(Tensor seg_starts, Tensor slots, SymInt tokens) -> Tensor",
    lambda seg_starts, slots, tokens: slots.new_empty(tokens),
)
def _segment_indices(seg_starts, slots, tokens):
    if seg_starts.device.type == "cpu" or check.DEBUG:
        values = seg_starts.tolist()
        if values[0] < 0 or values[-1] > tokens or values != sorted(values):
            takes = f"not decrease and lie between 0 and the rows of x ({tokens})"
            check.fail("sgmv", "seg_starts", takes, f"{values[:8]}")
    if slots.shape[0] == 0:
        return slots.new_full((tokens,), -1)
    rows = torch.arange(tokens, device=slots.device, dtype=seg_starts.dtype)
    segment = torch.searchsorted(seg_starts, rows, right=True) - 1
    inside = (segment >= 0) & (segment < slots.shape[0])
    return torch.where(inside, slots[segment.clamp(0, slots.shape[0] - 1)], -1)


def lora_delta(x, A, B, indices, *, scale=None, ranks=None, gates=None, plan=None):
    """The update alone, as a new tensor that autograd follows: what `bgmv` adds to y.

    Args:
        x, A, B, indices, scale, ranks, gates, plan: as in `bgmv`.

    Returns:
        (T, sum of d_out) of x's dtype, zero in rows without an adapter; differentiable by x, A, B, scale and gates.

    Raises:
        LorakernError: as `bgmv`.

    >>> import torch, lorakern as lk
    >>> gates = torch.tensor([[0.25, 0.75]], requires_grad=True)
    >>> A, B = torch.ones(2, 4, 8), torch.ones(2, 2, 4)
    >>> lk.lora_delta(torch.ones(1, 8), A, B, torch.tensor([[0, 1]]), gates=gates).sum().backward()
    >>> gates.grad.tolist()
    [[64.0, 64.0]]
    """
    if not is_dynamo_compiling():
        delta = fast.lora_delta(x, A, B, indices, scale, ranks, gates, plan)
        if delta is not None:
            return delta
    return torch.ops.lorakern.lora_delta(*_normalised("lora_delta", x, A, B, indices, scale, ranks, gates, plan))
