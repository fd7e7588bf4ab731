"""shrink: h[s, t, k, :r] = A_s[i, :r] @ x[t] with i = indices[t, k]; zero beyond the rank and without an adapter."""

import triton
import triton.language as tl

from .common import BLOCK_M, BLOCK_S, INTERPRET, Launch, find_pairs, load_ranks, pair_blocks, pick, run
from .configs import select


@triton.jit(do_not_specialize=["step", "num_pairs", "num_slots", "choices"])
def shrink_kernel(
    p_h,
    p_x,
    p_a,
    p_order,
    p_starts,
    p_ranks,
    step,
    num_pairs,
    num_slots,
    choices,
    d_in,
    r_max,
    stride_xt,
    stride_xd,
    stride_as,
    stride_ar,
    SLICES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_S: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """One program: BLOCK_M pairs of one slot, one tile of ranks, one slice, all of d_in in steps of BLOCK_K."""
    i_b, i_r, i_s = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    slot, b_pair, m_p = find_pairs(p_order, p_starts, i_b, step, num_pairs, num_slots, BLOCK_M, BLOCK_S)
    rank = load_ranks(p_ranks, slot, num_slots, r_max)

    o_r = i_r * BLOCK_R + tl.arange(0, BLOCK_R)
    o_k = tl.arange(0, BLOCK_K)
    m_r = o_r < rank
    p_a = pick(p_a, i_s, SLICES) + slot.to(tl.int64) * pick(stride_as, i_s, SLICES)
    b_t = (b_pair.to(tl.int32) // choices).to(tl.int64)
    # [BLOCK_M, BLOCK_K], [BLOCK_K, BLOCK_R]
    p_x = p_x + b_t[:, None] * stride_xt + o_k[None, :].to(tl.int64) * stride_xd
    p_a = p_a + o_r[None, :].to(tl.int64) * pick(stride_ar, i_s, SLICES) + o_k[:, None]

    b_h = tl.zeros([BLOCK_M, BLOCK_R], dtype=tl.float32)
    # a tile beyond the rank, or of pairs without an adapter, takes no step and writes its zeros
    for o in range(0, tl.where(i_r * BLOCK_R < rank, d_in, 0), BLOCK_K):
        m_k = o_k < d_in - o
        b_x = tl.load(p_x, mask=m_p[:, None] & m_k[None, :], other=0.0)
        b_a = tl.load(p_a, mask=m_k[:, None] & m_r[None, :], other=0.0)
        if UPCAST:
            b_x, b_a = b_x.to(tl.float32), b_a.to(tl.float32)
        # fma and not +, which Triton folds into the dot: one sum over all of d_in loses a digit in float32
        b_h = tl.fma(tl.dot(b_x, b_a, input_precision="ieee"), 1.0, b_h)
        p_x += BLOCK_K * tl.cast(stride_xd, tl.int64)
        p_a += BLOCK_K

    # [BLOCK_M, BLOCK_R]
    p_h = p_h + (i_s * num_pairs + b_pair)[:, None] * r_max + o_r[None, :]
    tl.store(p_h, b_h, mask=m_p[:, None] & (o_r < r_max)[None, :])


def shrink_launch(h, x, A, choices, ranks, order, starts):
    """The launch that writes all of h (slices, T, choices, r_max), contiguous float32."""
    num_slots, r_max, d_in = A[0].shape
    num_pairs = order.shape[0]
    config = select("shrink", x.dtype, r_max)
    blocks, step = pair_blocks(num_pairs, num_slots)
    arguments = {
        "p_h": h,
        "p_x": x,
        "p_a": tuple(A),
        "p_order": order,
        "p_starts": starts,
        "p_ranks": ranks,
        "step": step,
        "num_pairs": num_pairs,
        "num_slots": num_slots,
        "choices": choices,
        "d_in": d_in,
        "r_max": r_max,
        "stride_xt": x.stride(0),
        "stride_xd": x.stride(1),
        "stride_as": tuple(a.stride(0) for a in A),
        "stride_ar": tuple(a.stride(1) for a in A),
        "SLICES": len(A),
        "BLOCK_M": BLOCK_M,
        "BLOCK_R": config.block_r,
        "BLOCK_K": config.block,
        "BLOCK_S": BLOCK_S,
        "UPCAST": INTERPRET,
    }
    return Launch(shrink_kernel, (blocks, triton.cdiv(r_max, config.block_r), len(A)), arguments, config)


def shrink(h, x, A, choices, ranks, order, starts):
    """h[s, t, k, :r] = A_s[i, :r] @ x[t]; every element of h is written."""
    run(shrink_launch(h, x, A, choices, ranks, order, starts), x.device)
