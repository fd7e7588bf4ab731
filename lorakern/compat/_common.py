"""What the compat modules share: a row of y against the matrix of its own slot, by shrink or by expand alone."""

import torch

from lorakern.ops import _checks as check
from lorakern.ops import expand, shrink


def slots_first(op, name, weight):
    """(slots, rows, columns) of a weight that may have a dimension of one after the slots."""
    if not isinstance(weight, torch.Tensor) or not (weight.dim() == 3 or (weight.dim() == 4 and weight.shape[1] == 1)):
        check.fail(op, name, "be of shape (slots, rows, columns) or (slots, 1, rows, columns)", check.describe(weight))
    return weight.squeeze(1) if weight.dim() == 4 else weight


def segment_indices(op, name, starts, slots, tokens):
    """(tokens,) the slot of every row, where rows ``starts[i]:starts[i + 1]`` have slots[i]; -1 outside."""
    for label, tensor in ((name, starts), ("the slots", slots)):
        if not isinstance(tensor, torch.Tensor) or tensor.dim() != 1 or tensor.dtype not in (torch.int32, torch.int64):
            check.fail(op, label, "be an int32 or int64 tensor of one dimension", check.describe(tensor))
    if starts.shape[0] != slots.shape[0] + 1 or starts.device != slots.device:
        check.fail(op, name, f"name {slots.shape[0]} segments on {slots.device}", check.describe(starts))
    return torch.ops.lorakern.segment_indices(starts, slots, tokens)


def as_h(op, name, rows, r_max, dtype):
    """(slices, T, r_max) of any float dtype as the h of `expand` for outputs of `dtype`."""
    if not isinstance(rows, torch.Tensor) or rows.dim() != 3 or rows.shape[2] != r_max or not rows.is_floating_point():
        check.fail(
            op, name, f"be floats, {r_max} (the rank of the weights) in the last dimension", check.describe(rows)
        )
    return rows.detach().to(check.accumulation_dtype(dtype)).contiguous().unsqueeze(2)


@torch.no_grad()
def project(op, target, x, weight, indices, scale, accumulate):
    """``target[t] (+)= scale * weight[indices[t]] @ x[t]``; other rows keep their bits. One row of x serves all."""
    check.check_activations(op, "the output", target)
    if target.shape[1] != weight.shape[1] or target.shape[0] != x.shape[0] != 1:
        takes = f"have {x.shape[0]} rows and {weight.shape[1]} columns to write to"
        check.fail(op, "the output", takes, check.describe(target))
    if target.device != x.device:
        check.fail(op, "the output", f"be on {x.device} like the inputs", check.describe(target))
    h = shrink(x, weight, indices)
    if h.shape[2] != 1:
        check.fail(op, "the indices", "name one slot per row", check.describe(indices))
    values = h[0, :, 0] * scale
    values = (target + values if accumulate else values).to(target.dtype)
    served = (indices >= 0) & (indices < weight.shape[0])
    target.copy_(torch.where(served.reshape(-1, 1), values, target))


@torch.no_grad()
def spread(op, y, rows, weight, indices, offset, accumulate, scale=None):
    """``y[t, offset:] (+)= scale * weight[indices[t]] @ rows[t]`` with the weight in y's dtype."""
    check.check_activations(op, "the output", y)
    h = as_h(op, "inputs", rows.unsqueeze(0), weight.shape[2], y.dtype)
    expand(y, h, weight.to(y.dtype), indices, scale=scale, y_offset=offset, accumulate=accumulate)
