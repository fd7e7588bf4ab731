"""plan: the pairs of a batch in the order of their slots, in one launch and without a sort.

The place of a pair is the number of pairs that come before it: those of smaller slots, and those of its own slot with
smaller ids. The start of a slot is the number of pairs of smaller slots. Every program counts for some pairs or some
slots, over all pairs; no program waits for another, and there are no atomics.
"""

import torch
import triton
import triton.language as tl

from .common import Launch, run
from .configs import select

# up to this many pairs counting, which is quadratic, takes the place of a sort
MAX_PAIRS = 8192


@triton.jit
def load_keys(p_indices, o_p, num_pairs, num_slots, choices, stride_it, stride_ik):
    """slot * num_pairs + id of the pairs o_p, which orders them; ids past the last pair come after all."""
    o_t = o_p // choices
    m_p = o_p < num_pairs
    b_slot = tl.load(
        p_indices + o_t.to(tl.int64) * stride_it + (o_p % choices).to(tl.int64) * stride_ik, mask=m_p, other=-1
    )
    b_slot = tl.where((b_slot >= 0) & (b_slot < num_slots), b_slot, num_slots).to(tl.int32)
    return tl.where(m_p, b_slot * num_pairs + o_p, 0x7FFFFFFF)


@triton.jit(
    do_not_specialize=["num_pairs", "num_slots", "choices", "pair_programs", "stride_it", "stride_ik"],
    do_not_specialize_on_alignment=["p_order", "p_starts", "p_indices"],
)
def plan_kernel(
    p_order,
    p_starts,
    p_indices,
    num_pairs,
    num_slots,
    choices,
    pair_programs,
    stride_it,
    stride_ik,
    BLOCK_P: tl.constexpr,
    BLOCK_Q: tl.constexpr,
):
    """One program: the places of BLOCK_P pairs, or the starts of BLOCK_P slots."""
    i_b = tl.program_id(0)
    is_slots = i_b >= pair_programs
    o_p = tl.where(is_slots, i_b - pair_programs, i_b) * BLOCK_P + tl.arange(0, BLOCK_P)
    if is_slots:
        # beyond the last start the product could pass 2**31; nothing is stored there
        b_key = tl.minimum(o_p, num_slots) * num_pairs
    else:
        b_key = load_keys(p_indices, o_p, num_pairs, num_slots, choices, stride_it, stride_ik)
    b_count = tl.zeros([BLOCK_P, BLOCK_Q], dtype=tl.int32)
    for o in range(0, num_pairs, BLOCK_Q):
        o_q = o + tl.arange(0, BLOCK_Q)
        b_other = load_keys(p_indices, o_q, num_pairs, num_slots, choices, stride_it, stride_ik)
        b_count += (b_other[None, :] < b_key[:, None]).to(tl.int32)
    b_place = tl.sum(b_count, axis=1)
    tl.store(p_starts + o_p, b_place, mask=o_p <= tl.where(is_slots, num_slots, -1))
    tl.store(p_order + b_place, o_p, mask=o_p < tl.where(is_slots, 0, num_pairs))


def countable(num_pairs, num_slots):
    """Whether `plan` takes that many: few enough to count, and keys of 32 bits."""
    return num_pairs <= MAX_PAIRS and (num_slots + 1) * num_pairs < 2**31


def plan_launch(order, starts, indices):
    """The launch that fills order (T * K,) and starts (slots + 1,), int32, for indices (T, K)."""
    num_pairs, num_slots = order.shape[0], starts.shape[0] - 1
    config = select("plan", indices.dtype)
    pair_programs = triton.cdiv(num_pairs, config.block)
    arguments = {
        "p_order": order,
        "p_starts": starts,
        "p_indices": indices,
        "num_pairs": num_pairs,
        "num_slots": num_slots,
        "choices": indices.shape[1],
        "pair_programs": pair_programs,
        "stride_it": indices.stride(0),
        "stride_ik": indices.stride(1),
        "BLOCK_P": config.block,
        "BLOCK_Q": 128,
    }
    return Launch(plan_kernel, (pair_programs + triton.cdiv(num_slots + 1, config.block), 1, 1), arguments, config)


def plan(indices, num_slots):
    """(order, starts) of indices (T, K): pair ids stably by slot, none last, and where each slot starts."""
    order = torch.empty(indices.numel(), dtype=torch.int32, device=indices.device)
    starts = torch.empty(num_slots + 1, dtype=torch.int32, device=indices.device)
    run(plan_launch(order, starts, indices), indices.device)
    return order, starts
