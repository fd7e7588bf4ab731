"""shrink and expand: the two halves of bgmv, for callers that need what lies between them."""

import torch
from torch.compiler import is_dynamo_compiling

from lorakern.ops import _checks as check
from lorakern.ops._fast import fast
from lorakern.ops._library import backend_for, define, mark_written
from lorakern.ops.plan import check_plan


def _nothing(*_):
    return None


@define(
    "shrink_(Tensor(a!) h, Tensor x, Tensor[] A, Tensor indices, Tensor? ranks, Tensor? order, Tensor? starts) -> ()",
    _nothing,
)
def _shrink(h, x, A, indices, ranks, order, starts):
    backend = backend_for("shrink", x, A[0].shape[1], indices.shape[1])
    check.validate("shrink", backend, None, 0, x, A, (), indices, ranks, *A[0].shape[:2])
    backend.shrink(h, x, A, indices, ranks, order, starts)
    mark_written(h)


@define(
    "expand_(Tensor(a!) y, Tensor h, Tensor[] B, Tensor indices, Tensor? scale, Tensor? ranks, Tensor? gates,"
    " Tensor? order, Tensor? starts, SymInt y_offset, bool accumulate, bool packed=False) -> ()",
    _nothing,
)
def _expand(y, h, B, indices, scale, ranks, gates, order, starts, y_offset, accumulate, packed=False):
    slots, _, r_max = B[0].shape
    backend = backend_for("expand", y, r_max, indices.shape[1])
    check.validate("expand", backend, y, y_offset, None, (), B, indices, ranks, slots, r_max)
    layout = {"packed": True} if packed else {}
    backend.expand(y, h, B, indices, scale, ranks, gates, order, starts, y_offset, accumulate, **layout)
    mark_written(y)


def shrink(x, A, indices, *, ranks=None, plan=None, out=None):
    """Project every token onto the ranks of its adapters: ``h[s, t, k, :r] = A_s[i, :r] @ x[t]``, i = indices[t, k].

    Args:
        x: (T, d_in) float16, bfloat16 or float32.
        A: (slots, r_max, d_in) of x's dtype, or a sequence of such (one per slice); last dimension contiguous.
        indices: (T,) or (T, K) int32 or int64; -1 for no adapter.
        ranks: (slots,) int32 or int64, the true rank of each slot; None for r_max everywhere. What lies beyond a rank
            is never read.
        plan: what `lorakern.plan` returned for these indices; made here if None.
        out: (slices, T, K, r_max) float32, contiguous, to write to; allocated if None.

    Returns:
        h: (slices, T, K, r_max) float32, zero beyond a slot's rank and where a token has no adapter. No gradient is
        tracked; see `lora_delta`.

    Raises:
        LorakernError: an argument of another shape, dtype or device, or (on the CPU) an index or rank out of range.

    The split is that of Punica (arXiv 2310.18547).

    >>> import torch, lorakern as lk
    >>> h = lk.shrink(torch.ones(2, 8), torch.ones(3, 4, 8), torch.tensor([2, -1]), ranks=torch.tensor([4, 4, 1]))
    >>> h[0, :, 0].tolist()
    [[8.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]]
    """
    if not is_dynamo_compiling():
        h = fast.shrink(x, A, indices, ranks, plan, out)
        if h is not None:
            return h
    check.check_activations("shrink", "x", x)
    A = check.as_slices("shrink", "A", A)
    slots, r_max = check.weight_dims("shrink", "A", A, 1)
    check.check_weights("shrink", "A", A, x.dtype, x.device, slots, r_max, 1, "(slots, r_max, d_in)")
    check.check_d_in("shrink", A, x)
    indices = check.check_indices("shrink", indices, x.shape[0], x.device)
    check.check_ranks("shrink", ranks, slots, x.device)
    order, starts = check_plan("shrink", plan, indices, slots)
    shape = (len(A), *indices.shape, r_max)
    if out is None:
        out = x.new_empty(shape, dtype=check.accumulation_dtype(x.dtype))
    elif (
        not isinstance(out, torch.Tensor)
        or out.shape != shape
        or out.dtype != check.accumulation_dtype(x.dtype)
        or out.device != x.device
        or not out.is_contiguous()
    ):
        check.fail(
            "shrink", "out", f"be a contiguous float32 tensor of shape {shape} on {x.device}", check.describe(out)
        )
    _shrink(out, x, A, indices, ranks, order, starts)
    return out


def expand(
    y, h, B, indices, *, scale=None, ranks=None, gates=None, plan=None, y_offset=0, accumulate=True, packed=False
):
    """Add what the ranks make of h: ``y[t] (+)= sum_k gates[t, k] * scale[i] * B_s[i, :, :r] @ h[s, t, k, :r]``.

    Args:
        y: (T, columns), written in place from column y_offset on; any strides (a last dimension that is not contiguous
            costs a copy). Rows without an adapter stay bit for bit as they were.
        h: (slices, T, K, r_max) float32, contiguous: what `shrink` returned.
        B: (slots, d_out, r_max) of y's dtype, or a sequence of such (one per slice); the slices fill y side by side.
        indices, ranks, plan: as in `shrink`.
        scale: a number, or (slots,) floats; None for 1.
        gates: floats of the shape of indices; None for 1.
        y_offset: first column to fill.
        accumulate: add to y (True) or overwrite the rows that have an adapter (False).
        packed: slot i of B holds a contiguous (d_out, ranks[i]) matrix at its beginning, as in `bgmv`.

    Returns:
        y.

    Raises:
        LorakernError: as `shrink`; also where y shares memory with an input.

    >>> import torch, lorakern as lk
    >>> y, h = torch.zeros(2, 3), torch.ones(1, 2, 1, 4)
    >>> lk.expand(y, h, torch.ones(3, 3, 4), torch.tensor([2, -1]), scale=0.5).tolist()
    [[2.0, 2.0, 2.0], [0.0, 0.0, 0.0]]
    """
    if not is_dynamo_compiling():
        done = fast.expand(y, h, B, indices, scale, ranks, gates, plan, y_offset, accumulate, packed)
        if done is not None:
            return done
    check.check_activations("expand", "y", y)
    B = check.as_slices("expand", "B", B)
    slots, r_max = check.weight_dims("expand", "B", B, 2)
    check.check_weights("expand", "B", B, y.dtype, y.device, slots, r_max, 2, "(slots, d_out, r_max)")
    indices = check.check_indices("expand", indices, y.shape[0], y.device)
    check.check_ranks("expand", ranks, slots, y.device)
    if packed:
        check.check_packed("expand", B, ranks)
    accumulation = check.accumulation_dtype(y.dtype)
    shape = (len(B), *indices.shape, r_max)
    if not isinstance(h, torch.Tensor) or h.shape != shape or h.dtype != accumulation or not h.is_contiguous():
        check.fail("expand", "h", f"be a contiguous float32 tensor of shape {shape}, from shrink", check.describe(h))
    if h.device != y.device:
        check.fail("expand", "h", f"be on {y.device} like y", check.describe(h))
    check.check_output("expand", "y", y, y.shape[0], sum(b.shape[1] for b in B), y_offset, y.dtype, y.device)
    scale = check.check_scale("expand", scale, slots, y.device, accumulation)
    gates = check.check_gates("expand", gates, indices, accumulation)
    order, starts = check_plan("expand", plan, indices, slots)
    _expand(y, h, B, indices, scale, ranks, gates, order, starts, y_offset, accumulate, packed)
    return y
