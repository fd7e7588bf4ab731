"""The PyTorch LoRA ops of vLLM 0.32 (``vllm.lora.ops.torch_ops``), for any device that lorakern serves.

Names, argument order and results are vLLM's; nothing is returned, the output is written in place. Shared shapes:
inputs (T, columns), weights (slots, rows, columns) or (slots, 1, rows, columns), indices (T,) integers. Differences:

- an index of -1 leaves its row of the output bit for bit as it was (vLLM 0.32 used the last slot instead);
- sums are float32 and rounded once, where vLLM rounds the inputs to the dtype of the output first;
- no weight is copied, unless its dtype is neither that of the inputs (shrink) nor that of the output (expand).

All raise LorakernError for arguments that do not fit together, before anything is written.
"""

import torch

from lorakern.compat._common import project, segment_indices, slots_first, spread
from lorakern.ops import _checks as check

__all__ = ["bgmv_expand", "bgmv_expand_slice", "bgmv_shrink", "sgmv_expand", "sgmv_expand_slice", "sgmv_shrink"]


def bgmv_shrink(inputs, lora_b_weights, output_tensor, lora_indices_tensor, scaling=1.0):
    """``output[t, :r] = scaling * A[indices[t]] @ inputs[t]`` with A (slots, r, d_in), here named lora_b_weights.

    Signature of vLLM 0.32. Columns of the output beyond r stay; one row of inputs fills all rows of the output.
    """
    _shrink("bgmv_shrink", inputs, lora_b_weights, output_tensor, lora_indices_tensor, scaling)


def bgmv_expand(inputs, lora_b_weights, output_tensor, lora_indices_tensor, add_inputs=True):
    """``output[t] (+)= B[indices[t]] @ inputs[t]`` with B (slots, d_out, r); overwrites unless add_inputs.

    Signature of vLLM 0.32. Only the columns that both the output and B have are written; rows of inputs beyond
    those of the output are left out, and one row of inputs serves all rows of the output.
    """
    _expand("bgmv_expand", inputs, lora_b_weights, output_tensor, lora_indices_tensor, add_inputs)


def bgmv_expand_slice(
    inputs, lora_b_weights, output_tensor, lora_indices_tensor, slice_offset, slice_size, add_inputs=True
):
    """`bgmv_expand` into columns slice_offset to slice_offset + slice_size, which is the d_out of B. vLLM 0.32."""
    place = slice_offset, slice_size
    _expand("bgmv_expand_slice", inputs, lora_b_weights, output_tensor, lora_indices_tensor, add_inputs, place)


def sgmv_shrink(
    inputs,
    lora_a_weights,
    output_tensor,
    b_seq_start_loc,
    seq_len_tensor,
    lora_indices_tensor,
    batches,
    max_seq_length,
    token_nums,
    scaling,
):
    """`bgmv_shrink` for sequences: the next seq_len_tensor[b] rows use slot lora_indices_tensor[b].

    Signature of vLLM 0.32, which reads neither b_seq_start_loc nor the three counts after the indices.
    """
    indices = _indices("sgmv_shrink", inputs, seq_len_tensor, lora_indices_tensor)
    _shrink("sgmv_shrink", inputs, lora_a_weights, output_tensor, indices, scaling)


def sgmv_expand(
    inputs,
    lora_b_weights,
    output_tensor,
    b_seq_start_loc,
    seq_len_tensor,
    lora_indices_tensor,
    batches,
    max_seq_length,
    token_nums,
    add_inputs=False,
):
    """`bgmv_expand` for sequences, described as in `sgmv_shrink`; overwrites unless add_inputs. vLLM 0.32."""
    indices = _indices("sgmv_expand", inputs, seq_len_tensor, lora_indices_tensor)
    _expand("sgmv_expand", inputs, lora_b_weights, output_tensor, indices, add_inputs)


def sgmv_expand_slice(
    inputs,
    lora_b_weights,
    output_tensor,
    b_seq_start_loc,
    seq_len_tensor,
    lora_indices_tensor,
    batches,
    max_seq_length,
    token_nums,
    slice_offset,
    slice_size,
    add_inputs=False,
):
    """`bgmv_expand_slice` for sequences, described as in `sgmv_shrink`; overwrites unless add_inputs. vLLM 0.32."""
    indices = _indices("sgmv_expand_slice", inputs, seq_len_tensor, lora_indices_tensor)
    place = slice_offset, slice_size
    _expand("sgmv_expand_slice", inputs, lora_b_weights, output_tensor, indices, add_inputs, place)


def _indices(op, inputs, lengths, slots):
    check.check_activations(op, "inputs", inputs)
    if not isinstance(lengths, torch.Tensor) or lengths.dim() != 1:
        check.fail(op, "seq_len_tensor", "be a tensor of one dimension", check.describe(lengths))
    starts = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
    return segment_indices(op, "seq_len_tensor", starts, slots, inputs.shape[0])


def _checked(op, name, inputs, weights, output, indices):
    """(weights (slots, rows, columns), indices), with one index for every row of inputs."""
    check.check_activations(op, "inputs", inputs)
    check.check_activations(op, "output_tensor", output)
    weights = slots_first(op, name, weights)
    if not isinstance(indices, torch.Tensor) or indices.dim() != 1 or indices.shape[0] != inputs.shape[0]:
        takes = f"be a tensor of one dimension with a slot for each of the {inputs.shape[0]} rows of inputs"
        check.fail(op, "lora_indices_tensor", takes, check.describe(indices))
    return weights, indices


def _shrink(op, inputs, weights, output, indices, scaling):
    weights, indices = _checked(op, "the weights", inputs, weights, output, indices)
    common = torch.promote_types(inputs.dtype, weights.dtype)
    target = output[:, : weights.shape[1]]
    project(op, target, inputs.to(common), weights.to(common), indices, scaling, accumulate=False)


def _expand(op, inputs, weights, output, indices, add_inputs, place=None):
    weights, indices = _checked(op, "lora_b_weights", inputs, weights, output, indices)
    rows, offset = output.shape[0], 0
    if inputs.shape[0] == 1:
        inputs, indices = inputs.expand(rows, -1), indices.expand(rows)
    if place is None:
        inputs, indices = inputs[:rows], indices[:rows]
        weights = weights[:, : output.shape[1]]
    else:
        offset, size = place
        if size != weights.shape[1]:
            check.fail(op, "slice_size", f"be the d_out of the weights ({weights.shape[1]})", repr(size))
    spread(op, output, inputs, weights, indices, offset, bool(add_inputs))
