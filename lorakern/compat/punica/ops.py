"""The LoRA ops of Punica (``punica.ops`` of commit 591b5989), on any device, of any rank and width.

Names, argument order and results are Punica's: all add to y in place, and between the two products of a LoRA h is
rounded to the dtype of x.

One difference: the arguments that end in ``_ptr`` take the weights, not their addresses. Give a sequence with one
tensor (layers, rows, columns) per segment, such as `utils.BatchedLoraWeight` has (one layer of it is stacked at every
call), or one tensor (segments, layers, rows, columns). An address says nothing of the size, the dtype or the life of
what it points to, so nothing could be checked and a stale one would read freed memory: integers are refused.

Attention, norm and the unfinished add_lora_sgmv of that module are not here.

All raise LorakernError for arguments that do not fit together, before anything is written.
"""

import torch

from lorakern.compat._common import project, segment_indices, spread
from lorakern.ops import _checks as check
from lorakern.ops import expand, shrink

__all__ = ["add_lora_bgmv", "add_lora_sgmv_custom_cutlass", "add_lora_sgmv_cutlass", "bgmv", "sgmv", "sgmv_cutlass"]


def bgmv(y, x, w_T_all, indicies, layer_idx, scale):
    """``y[t] += scale * w_T_all[indicies[t], layer_idx] @ x[t]``. Signature of Punica 591b5989.

    Args:
        y: (T, d_out).
        x: (T, d_in) of y's dtype.
        w_T_all: (slots, layers, d_out, d_in) of that dtype.
        indicies: (T,) int32 or int64; -1 leaves the row of y as it was.
        layer_idx, scale: numbers.
    """
    weights = _of_layer("bgmv", "w_T_all", w_T_all, layer_idx)
    _add_product("bgmv", y, x, weights, indicies, scale)


def add_lora_bgmv(y, x, wa_T_all, wb_T_all, indicies, layer_idx, scale):
    """``y[t] += scale * B @ (A @ x[t])``, A and B of slot indicies[t] and layer_idx. Signature of Punica 591b5989.

    Args:
        wa_T_all: (slots, layers, r, d_in).
        wb_T_all: (slots, layers, d_out, r).
        y, x, indicies, layer_idx, scale: as in `bgmv`.
    """
    A = _of_layer("add_lora_bgmv", "wa_T_all", wa_T_all, layer_idx)
    B = _of_layer("add_lora_bgmv", "wb_T_all", wb_T_all, layer_idx)
    _add_lora("add_lora_bgmv", y, x, A, B, indicies, scale)


def sgmv(y, x, w_ptr, s, layer_idx):
    """``y[s[i]:s[i+1]] += x[s[i]:s[i+1]] @ w_ptr[i][layer_idx].T``. Signature of Punica 591b5989.

    Args:
        y: (T, d_out).
        x: (T, d_in) of y's dtype.
        w_ptr: for each segment (layers, d_out, d_in). Punica has this for d_out < d_in only.
        s: (segments + 1,) int32 or int64, not decreasing.
        layer_idx: a number.
    """
    _segments("sgmv", y, x, _of_layer("sgmv", "w_ptr", w_ptr, layer_idx), s)


def sgmv_cutlass(y, x, w_ptr, s, layer_idx):
    """``y[s[i]:s[i+1]] += x[s[i]:s[i+1]] @ w_ptr[i][layer_idx]``: `sgmv` with weights (layers, d_in, d_out).

    Signature of Punica 591b5989. A weight that is not a transposed view of a contiguous one is copied.
    """
    _segments("sgmv_cutlass", y, x, _of_layer("sgmv_cutlass", "w_ptr", w_ptr, layer_idx, transpose=True), s)


def add_lora_sgmv_cutlass(y, x, wa_ptr, wb_ptr, s, layer_idx, lora_rank):
    """``y[s[i]:s[i+1]] += x[s[i]:s[i+1]] @ wa_ptr[i][layer_idx] @ wb_ptr[i][layer_idx]``. Punica 591b5989.

    Args:
        wa_ptr: for each segment (layers, d_in, r).
        wb_ptr: for each segment (layers, r, d_out).
        lora_rank: r.
        y, x, s, layer_idx: as in `sgmv`.
    """
    A = _of_layer("add_lora_sgmv_cutlass", "wa_ptr", wa_ptr, layer_idx, transpose=True)
    _add_segments("add_lora_sgmv_cutlass", y, x, A, wb_ptr, s, layer_idx, lora_rank)


def add_lora_sgmv_custom_cutlass(y, x, wa_ptr, wb_ptr, s, layer_idx, lora_rank):
    """`add_lora_sgmv_cutlass` with wa_ptr (layers, r, d_in), the layout of `utils.LoraWeight`. Punica 591b5989."""
    A = _of_layer("add_lora_sgmv_custom_cutlass", "wa_ptr", wa_ptr, layer_idx)
    _add_segments("add_lora_sgmv_custom_cutlass", y, x, A, wb_ptr, s, layer_idx, lora_rank)


def _of_layer(op, name, weights, layer_idx, transpose=False):
    """(slots, rows, columns) of one layer, rows contiguous: a view where the memory allows it."""
    if isinstance(weights, torch.Tensor):
        if not weights.is_floating_point():
            takes = "hold the weights themselves, one tensor per segment; raw addresses cannot be checked"
            check.fail(op, name, takes, check.describe(weights))
        shape, pick = weights.shape[1:], weights.transpose(0, 1) if weights.dim() == 4 else None
    else:
        weights = check.as_slices(op, name, weights)
        shape, first = weights[0].shape, weights[0]
        if any((w.shape, w.dtype, w.device) != (shape, first.dtype, first.device) for w in weights):
            check.fail(
                op, name, "have the same shape, dtype and device in every segment", str([w.shape for w in weights])
            )
        pick = weights
    if len(shape) != 3:
        check.fail(op, name, "have a dimension of layers and two of the matrix", f"shape {tuple(shape)}")
    if isinstance(layer_idx, bool) or not isinstance(layer_idx, int) or not 0 <= layer_idx < shape[0]:
        check.fail(op, "layer_idx", f"lie between 0 and {shape[0] - 1}", repr(layer_idx))
    if isinstance(pick, list):
        layer = [w[layer_idx].mT if transpose else w[layer_idx] for w in pick]
        if all(w is pick[0] for w in pick):
            return layer[0].contiguous().expand(len(layer), -1, -1)
        return torch.stack(layer)
    layer = pick[layer_idx].mT if transpose else pick[layer_idx]
    return layer if layer.stride(2) == 1 else layer.contiguous()


def _check_widths(op, y, weights):
    check.check_activations(op, "y", y)
    if y.shape[1] != weights.shape[1]:
        check.fail(op, "y", f"have as many columns as the weights give ({weights.shape[1]})", check.describe(y))


def _add_segments(op, y, x, A, wb_ptr, s, layer_idx, lora_rank):
    B = _of_layer(op, "wb_ptr", wb_ptr, layer_idx, transpose=True)
    check.check_activations(op, "x", x)
    if A.shape[1] != lora_rank:
        check.fail(op, "lora_rank", f"be the rank of the weights ({A.shape[1]})", repr(lora_rank))
    _add_lora(op, y, x, A, B, _indices(op, x, s, A.shape[0]), None)


@torch.no_grad()
def _add_lora(op, y, x, A, B, indices, scale):
    """Both halves, with h rounded in between as Punica does: one fused call would be closer to the exact sum."""
    _check_widths(op, y, B)
    h = shrink(x, A, indices)
    expand(y, h.to(x.dtype).to(h.dtype), B, indices, scale=scale)


def _indices(op, x, s, segments):
    return segment_indices(op, "s", s, torch.arange(segments, device=x.device), x.shape[0])


def _segments(op, y, x, weights, s):
    check.check_activations(op, "x", x)
    _add_product(op, y, x, weights, _indices(op, x, s, weights.shape[0]), 1.0)


def _add_product(op, y, x, weights, indices, scale):
    """One matrix a row, by the half of a LoRA that it resembles."""
    check.check_activations(op, "x", x)
    _check_widths(op, y, weights)
    if x.shape[0] != y.shape[0] or not x.dtype == y.dtype == weights.dtype:
        takes = f"have the rows of y ({y.shape[0]}) and the dtype of y and of the weights ({y.dtype}, {weights.dtype})"
        check.fail(op, "x", takes, check.describe(x))
    if x.shape[1] < y.shape[1]:
        spread(op, y, x, weights, indices, 0, True, scale)
    else:
        project(op, y, x, weights, indices, scale, accumulate=True)
