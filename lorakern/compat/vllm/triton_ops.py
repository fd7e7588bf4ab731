"""The Triton LoRA ops of vLLM 0.32 (``vllm.lora.ops.triton_ops``): lora_shrink, lora_expand and their metadata.

They run on every device that lorakern serves, the CPU too. Of the seven metadata tensors they read two: the slot of
each token and the flag that no token has one. float32 is taken as well as float16 and bfloat16, and any strides of the
weights whose last dimension is contiguous. The MoE and float8 ops of that module are not here.
"""

from lorakern.compat._common import as_h, slots_first
from lorakern.compat.vllm.metadata import LoRAKernelMeta
from lorakern.ops import _checks as check
from lorakern.ops import expand, shrink
from lorakern.ops._library import define

__all__ = ["LoRAKernelMeta", "lora_expand", "lora_shrink"]

_METADATA = (
    "Tensor token_lora_mapping, Tensor token_indices_sorted_by_lora_ids, Tensor num_tokens_per_lora,"
    " Tensor lora_token_start_loc, Tensor lora_ids, Tensor no_lora_flag_cpu, Tensor num_active_loras"
)


def _nothing(*_):
    return None


def lora_shrink(
    inputs,
    lora_a_weights,
    output_tensor,
    token_lora_mapping,
    token_indices_sorted_by_lora_ids,
    num_tokens_per_lora,
    lora_token_start_loc,
    lora_ids,
    no_lora_flag_cpu,
    num_active_loras,
    scaling,
):
    """``output[s, t] = scaling * A_s[i] @ inputs[t]`` with i = token_lora_mapping[t], and 0 where i is -1.

    Signature of vLLM 0.32; registered, so that torch.compile sees one op.

    Args:
        inputs: (T, d_in).
        lora_a_weights: one (slots, r, d_in) or (slots, 1, r, d_in) of inputs' dtype for each slice.
        output_tensor: (slices, T, r) float32 (other dtypes cost a copy), overwritten whole; left alone where the flag
            says that no token has an adapter.
        token_lora_mapping to num_active_loras: what `LoRAKernelMeta.meta_args` returned. The flag is on the CPU.
        scaling: a number.

    Raises:
        LorakernError: arguments that do not fit together. Nothing has been written then.
    """
    _lora_shrink(
        inputs,
        _slices("lora_shrink", "lora_a_weights", lora_a_weights),
        output_tensor,
        token_lora_mapping,
        token_indices_sorted_by_lora_ids,
        num_tokens_per_lora,
        lora_token_start_loc,
        lora_ids,
        no_lora_flag_cpu,
        num_active_loras,
        scaling,
    )


def lora_expand(
    inputs,
    lora_b_weights,
    output_tensor,
    token_lora_mapping,
    token_indices_sorted_by_lora_ids,
    num_tokens_per_lora,
    lora_token_start_loc,
    lora_ids,
    no_lora_flag_cpu,
    num_active_loras,
    offset_start=0,
    add_inputs=False,
):
    """``output[t] (+)= B_s[i] @ inputs[s, t]`` with i = token_lora_mapping[t], slices side by side from offset_start.

    Signature of vLLM 0.32; registered, so that torch.compile sees one op.

    Args:
        inputs: (slices, T, r) float32, float16 or bfloat16; float32 and contiguous costs no copy.
        lora_b_weights: one (slots, d_out, r) or (slots, 1, d_out, r) for each slice; d_out may differ. Weights of
            another dtype than the output are converted at every call.
        output_tensor: (T or more, offset_start + sum of d_out or more). Rows of tokens without an adapter and columns
            outside the slices stay bit for bit as they were.
        token_lora_mapping to num_active_loras: what `LoRAKernelMeta.meta_args` returned. The flag is on the CPU.
        offset_start: first column to write.
        add_inputs: add to the output (True) or overwrite it (False).

    Raises:
        LorakernError: arguments that do not fit together. Nothing has been written then.
    """
    _lora_expand(
        inputs,
        _slices("lora_expand", "lora_b_weights", lora_b_weights),
        output_tensor,
        token_lora_mapping,
        token_indices_sorted_by_lora_ids,
        num_tokens_per_lora,
        lora_token_start_loc,
        lora_ids,
        no_lora_flag_cpu,
        num_active_loras,
        offset_start,
        bool(add_inputs),
    )


def _slices(op, name, weights):
    return [slots_first(op, name, weight) for weight in check.as_slices(op, name, weights)]


@define(
    f"vllm_lora_shrink(Tensor inputs, Tensor[] lora_a_weights, Tensor(a!) output_tensor, {_METADATA},"
    " float scaling) -> ()",
    _nothing,
)
def _lora_shrink(inputs, A, output, mapping, order, counts, starts, lora_ids, no_lora, active, scaling):
    check.check_activations("lora_shrink", "inputs", inputs)
    if inputs.shape[0] == 0 or _skip("lora_shrink", inputs.shape[0], mapping, order, counts, starts, lora_ids, no_lora):
        return
    slices, tokens, rank = len(A), inputs.shape[0], A[0].shape[1]
    if output.dim() != 3 or output.shape[0] != slices or output.shape[1] < tokens or output.shape[2] < rank:
        check.fail("lora_shrink", "output_tensor", f"be of shape ({slices}, {tokens}, {rank})", check.describe(output))
    whole = output.shape == (slices, tokens, rank) and output.is_contiguous()
    if whole and output.dtype == check.accumulation_dtype(inputs.dtype):
        shrink(inputs, A, mapping, out=output.unsqueeze(2))
        if scaling != 1:
            output.mul_(scaling)
    else:
        h = shrink(inputs, A, mapping).squeeze(2)
        output.zero_()
        output[:, :tokens, :rank] = h * scaling


@define(
    f"vllm_lora_expand(Tensor inputs, Tensor[] lora_b_weights, Tensor(a!) output_tensor, {_METADATA},"
    " SymInt offset_start=0, bool add_inputs=False) -> ()",
    _nothing,
)
def _lora_expand(
    inputs, B, output, mapping, order, counts, starts, lora_ids, no_lora, active, offset_start=0, add_inputs=False
):
    check.check_activations("lora_expand", "output_tensor", output)
    h = as_h("lora_expand", "inputs", inputs, B[0].shape[2], output.dtype)
    if _skip("lora_expand", inputs.shape[1], mapping, order, counts, starts, lora_ids, no_lora):
        return
    B = [weight.to(output.dtype) for weight in B]
    expand(output[: inputs.shape[1]], h, B, mapping, y_offset=offset_start, accumulate=add_inputs)


def _skip(op, tokens, mapping, order, counts, starts, lora_ids, no_lora):
    """Whether the metadata says that no token has an adapter; it must be of one piece and of as many tokens."""
    if no_lora.numel() != 1 or no_lora.device.type != "cpu":
        check.fail(op, "no_lora_flag_cpu", "be one element on the CPU", check.describe(no_lora))
    if no_lora.item():
        return True
    if mapping.shape != (tokens,) or order.shape != (tokens,):
        takes = f"have one element per token ({tokens}), like token_indices_sorted_by_lora_ids"
        check.fail(op, "token_lora_mapping", takes, check.describe(mapping))
    if not lora_ids.shape[0] == counts.shape[0] == starts.shape[0] - 1:
        check.fail(op, "lora_ids", "have as many elements as num_tokens_per_lora", check.describe(lora_ids))
    return False
