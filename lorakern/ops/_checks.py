"""Argument checks shared by the ops. All raise LorakernError before any kernel runs and before anything is written."""

import torch

from lorakern.backends import FORCED
from lorakern.errors import LorakernError
from lorakern.ops._library import DEBUG

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_INTEGERS = (torch.int32, torch.int64)


def fail(op, argument, takes, got):
    raise LorakernError(f"{op}: {argument} must {takes}; got {got}")


def describe(tensor):
    """What an error message says of a tensor."""
    if not isinstance(tensor, torch.Tensor):
        return f"{type(tensor).__name__} {tensor!r:.80}"
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')} on {tensor.device}"


def as_slices(op, name, weights):
    """A tensor, or a sequence of tensors (one per slice), as a list."""
    slices = [weights] if isinstance(weights, torch.Tensor) else weights
    if not isinstance(slices, (list, tuple)) or not slices or not all(isinstance(w, torch.Tensor) for w in slices):
        fail(op, name, "be a tensor or a non-empty sequence of tensors, one per slice", describe(weights))
    return list(slices)


def check_activations(op, name, tensor):
    if not isinstance(tensor, torch.Tensor) or tensor.dim() != 2:
        fail(op, name, "be a tensor of two dimensions (tokens, features)", describe(tensor))
    if tensor.dtype not in _DTYPES:
        fail(op, name, "be float16, bfloat16 or float32 (float64 on the reference backend)", describe(tensor))


def check_weights(op, name, slices, dtype, device, slots, r_max, rank_dim, dims):
    """Every slice has three dimensions, the dtype and device of x, `slots` and `r_max`; `dims` names the dimensions."""
    for s, weight in enumerate(slices):
        label = name if len(slices) == 1 else f"{name}[{s}]"
        if weight.dim() != 3 or weight.shape[0] != slots or weight.shape[rank_dim] != r_max:
            fail(op, label, f"be of shape {dims} with slots = {slots} and r_max = {r_max}", describe(weight))
        if weight.dtype != dtype or weight.device != device:
            takes = f"have the dtype and device of the activations ({str(dtype).removeprefix('torch.')} on {device})"
            fail(op, label, takes, describe(weight))
        if weight.shape[2] > 1 and weight.stride(2) != 1:
            fail(op, label, "be contiguous in its last dimension (use .contiguous())", f"strides {weight.stride()}")


def check_packed(op, B, ranks):
    """`packed` is understood by the CPU kernels and the reference, of whole slots whose ranks are known."""
    if B[0].device.type != "cpu" and FORCED.get() != "reference":
        fail(op, "packed", f"be False on {B[0].device.type}: only the CPU kernels read packed weights", "True")
    if ranks is None:
        fail(op, "ranks", "be given where B is packed", "None")
    for b in B:
        if b.shape[1] > 1 and b.stride(1) != b.shape[2]:
            fail(op, "B", "have contiguous slots where it is packed", f"strides {b.stride()} for {tuple(b.shape)}")


def accumulation_dtype(dtype):
    """The dtype of h, scale and gates: float32, or float64 for float64 inputs (reference backend only)."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def check_d_in(op, A, x):
    for s, a in enumerate(A):
        if a.shape[2] != x.shape[1]:
            label = "A" if len(A) == 1 else f"A[{s}]"
            fail(op, label, f"have d_in = {x.shape[1]} like x in its last dimension", describe(a))


def weight_dims(op, name, slices, rank_dim):
    """(slots, r_max) of the first slice, which the others must share."""
    if slices[0].dim() != 3:
        fail(op, name, "have three dimensions, slots first", describe(slices[0]))
    return slices[0].shape[0], slices[0].shape[rank_dim]


def check_indices(op, indices, tokens, device):
    """(T,) or (T, K) integers on the device; returned as (T, K)."""
    if not isinstance(indices, torch.Tensor) or indices.dtype not in _INTEGERS or indices.dim() not in (1, 2):
        fail(op, "indices", "be an int32 or int64 tensor of shape (T,) or (T, K)", describe(indices))
    if tokens is not None and indices.shape[0] != tokens:
        fail(op, "indices", f"have one row per token ({tokens})", describe(indices))
    if device is not None and indices.device != device:
        fail(op, "indices", f"be on {device} like the activations", describe(indices))
    indices = indices.unsqueeze(1) if indices.dim() == 1 else indices
    if indices.shape[1] == 0:
        fail(op, "indices", "have at least one choice per token (K >= 1)", describe(indices))
    return indices


def check_ranks(op, ranks, slots, device):
    if ranks is not None and (
        not isinstance(ranks, torch.Tensor)
        or ranks.dtype not in _INTEGERS
        or ranks.shape != (slots,)
        or ranks.device != device
    ):
        fail(op, "ranks", f"be an int32 or int64 tensor of shape ({slots},) on {device}", describe(ranks))


def check_scale(op, scale, slots, device, accumulation):
    """None, a number, or a (slots,) float tensor; returned as None or a tensor of the accumulation dtype."""
    if scale is None:
        return None
    if isinstance(scale, (int, float)):
        return torch.full((slots,), scale, dtype=accumulation, device=device)
    if (
        not isinstance(scale, torch.Tensor)
        or scale.shape != (slots,)
        or scale.device != device
        or not scale.is_floating_point()
    ):
        fail(op, "scale", f"be a number or a float tensor of shape ({slots},) on {device}", describe(scale))
    return scale if scale.dtype == accumulation else scale.to(accumulation)


def check_gates(op, gates, indices, accumulation):
    """None or floats of the shape of indices (T, K), or (T,) where K = 1; returned as (T, K)."""
    if gates is None:
        return None
    if isinstance(gates, torch.Tensor) and gates.dim() == 1 and indices.shape[1] == 1:
        gates = gates.unsqueeze(1)
    if (
        not isinstance(gates, torch.Tensor)
        or gates.shape != indices.shape
        or gates.device != indices.device
        or not gates.is_floating_point()
    ):
        fail(op, "gates", f"be a float tensor of shape {tuple(indices.shape)} on {indices.device}", describe(gates))
    return gates if gates.dtype == accumulation else gates.to(accumulation)


def check_output(op, name, y, tokens, columns, y_offset, dtype, device):
    check_activations(op, name, y)
    if y.dtype != dtype or y.device != device:
        takes = f"have the dtype and device of the weights ({str(dtype).removeprefix('torch.')} on {device})"
        fail(op, name, takes, describe(y))
    if y.shape[0] != tokens:
        fail(op, name, f"have one row per token ({tokens})", describe(y))
    if not isinstance(y_offset, (int, torch.SymInt)) or isinstance(y_offset, bool) or y_offset < 0:
        fail(op, "y_offset", "be an integer that is not negative", repr(y_offset))
    if y_offset + columns > y.shape[1]:
        fail(op, name, f"have at least y_offset + sum of d_out = {y_offset} + {columns} columns", describe(y))


def check_values(op, indices, slots, ranks, r_max):
    """Index and rank values; reads them on the host, so on a GPU only in debug mode (LORAKERN_DEBUG=1)."""
    if indices.device.type != "cpu" and not DEBUG:
        return
    if indices.numel():
        low, high = (int(v) for v in indices.aminmax())
        if low < -1 or high >= slots:
            takes = f"lie between -1 (no adapter) and slots - 1 = {slots - 1}"
            fail(op, "indices", takes, f"values from {low} to {high}")
    if ranks is not None and ranks.numel():
        low, high = (int(v) for v in ranks.aminmax())
        if low < 0 or high > r_max:
            fail(op, "ranks", f"lie between 0 and r_max = {r_max}", f"values from {low} to {high}")


def _extent(tensor):
    """First byte, and one past the last, that a tensor touches."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    start = tensor.data_ptr()
    return start, start + (last + 1) * tensor.element_size()


def _interleaved(y, other):
    """True where both are columns of one wide matrix that do not meet."""
    row = y.stride(0) * y.element_size()
    if row <= 0 or other.dim() != 2 or other.stride(0) * other.element_size() != row:
        return False
    if y.stride(1) != 1 or other.stride(1) != 1:
        return False
    width, other_width = y.shape[1] * y.element_size(), other.shape[1] * other.element_size()
    gap = (other.data_ptr() - y.data_ptr()) % row
    return gap >= width and gap + other_width <= row


def check_overlap(op, y, others):
    """y is written while `others`, (name, tensor) pairs, are read: none may share memory with it, nor y with itself."""
    if y.numel() == 0:
        return
    reach = 0
    for stride, size in sorted(zip(y.stride(), y.shape, strict=True)):
        if size > 1 and stride <= reach:
            fail(op, "y", "give every element its own memory", f"strides {y.stride()} for shape {tuple(y.shape)}")
        reach += stride * (size - 1)
    start, stop = _extent(y)
    for name, other in others:
        if other.numel() == 0:
            continue
        other_start, other_stop = _extent(other)
        if start < other_stop and other_start < stop and not _interleaved(y, other):
            fail(op, "y", f"not share memory with {name}", "overlapping memory (write to another tensor, or clone)")


def validate(op, backend, y, y_offset, x, A, B, indices, ranks, slots, r_max):
    """The checks of memory and values that a backend does not do itself: those that need real tensors."""
    if backend.VALIDATES and (y is None or y.stride(1) == 1) and (x is None or x.stride(1) == 1):
        return
    if y is not None:
        target = y.narrow(1, y_offset, sum(b.shape[1] for b in B))
        named = [("x", [] if x is None else [x]), ("A", A), ("B", B)]
        check_overlap(op, target, [(name, tensor) for name, tensors in named for tensor in tensors])
    check_values(op, indices, slots, ranks, r_max)
