"""expand: y[t] (+)= sum_k gates[t, k] * scale[i] * B_s[i, :, :r] @ h[s, t, k, :r], the slices side by side in y.

One kernel with two ways to choose a program's rows. With one choice per token, rows are the pairs of one slot, so each
B is read once per BLOCK_M tokens. With several, rows are neighbouring tokens, and for each k the slots among them are
taken in turn: a token gets exactly one term per k, its terms are added in float32 in the order of k, and y is rounded
and written once.
"""

import torch
import triton
import triton.language as tl

from .common import BLOCK_M, BLOCK_S, Launch, find_pairs, load_ranks, pair_blocks, pick, row_stride, run
from .configs import SHARED_LIMIT, select

# up to this many tokens a program of a mixture takes one token only, to fill the device
SINGLE_TOKENS = 64


@triton.jit
def find_columns(d_out, i_n, BLOCK_N: tl.constexpr, SLICES: tl.constexpr):
    """The slice of tile i_n, the tile's number within the slice, and the slice's first column in y."""
    i_s, i_tile, column = 0, i_n, 0
    for j in tl.static_range(SLICES - 1):
        tiles = tl.cdiv(d_out[j], BLOCK_N)
        is_past = (i_s == j) & (i_tile >= tiles)
        i_tile = tl.where(is_past, i_tile - tiles, i_tile)
        column = tl.where(is_past, column + d_out[j], column)
        i_s = tl.where(is_past, i_s + 1, i_s)
    return i_s, i_tile, column


@triton.jit
def load_gates(p_gates, o_g, m_t, BLOCK_M: tl.constexpr):
    """The gates of a program's rows, 1 without gates."""
    ones = tl.full([BLOCK_M], 1.0, dtype=tl.float32)
    b_gate = ones if p_gates is None else tl.load(p_gates + o_g, mask=m_t, other=0.0)
    return b_gate


@triton.jit
def load_scale(p_scale, slot, num_slots):
    """The scale of a slot, 1 without scales."""
    scale = 1.0 if p_scale is None else tl.load(p_scale + slot, mask=slot < num_slots, other=0.0)
    return scale


@triton.jit
def round_tf32(b_h):
    """float32 rounded to nearest to the 10 bits that tf32 keeps; the tensor core would cut them off."""
    b_bits = (b_h.to(tl.int32, bitcast=True) + 0x1000) & -0x2000
    # the sum would turn a NaN into a zero
    return tl.where(b_h == b_h, b_bits.to(tl.float32, bitcast=True), b_h)


@triton.jit
def expand_ranks(
    b_sum,
    p_h,
    m_t,
    p_b,
    m_n,
    rank,
    r_max,
    stride_br,
    plane,
    PLANES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    RANKS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """b_sum + B[:, :rank] @ h[:rank] for a rank <= RANKS; h is the sum of the planes, in their order."""
    o_r = tl.arange(0, RANKS)
    m_r = o_r < rank
    # loads end at a multiple of 8 ranks, as vectors need; what lies beyond the rank is dropped, whatever it holds
    m_load = o_r < tl.minimum(tl.cdiv(rank, 8) * 8, r_max)
    # [BLOCK_M, RANKS], [RANKS, BLOCK_N]
    p_h = p_h[:, None] + o_r[None, :]
    b_b = tl.load(p_b[None, :] + o_r[:, None] * stride_br, mask=m_load[:, None] & m_n[None, :], other=0.0)
    b_h = tl.zeros([BLOCK_M, RANKS], dtype=tl.float32)
    for _ in tl.static_range(PLANES):
        b_h += tl.load(p_h, mask=m_t[:, None] & m_load[None, :], other=0.0)
        p_h += plane
    # h stays float32 (it may pass float16's range); float16 and bfloat16 weights are exact in tf32
    b_h = tl.where(m_r[None, :], b_h, 0.0)
    b_b = tl.where(m_r[:, None], b_b, 0.0).to(tl.float32)
    if PRECISION == "tf32":
        b_h = round_tf32(b_h)
    return tl.dot(b_h, b_b, b_sum, input_precision=PRECISION)


@triton.jit
def expand_tile(
    p_h,
    m_t,
    p_b,
    m_n,
    rank,
    r_max,
    stride_br,
    plane,
    PLANES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """B[:, :rank] @ h[:rank] for rows at p_h (BLOCK_M,) and weights at p_b (BLOCK_N,): (BLOCK_M, BLOCK_N) float32."""
    b_sum = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    # whole tiles while more than half of one is left, then one of the smallest size that holds the rest
    # r_max, as a number of run time: where it is 1 Triton makes it a constant, which no loop can change
    width = tl.maximum(rank, r_max)
    for _ in range(0, rank - BLOCK_R // 2, BLOCK_R):
        b_sum = expand_ranks(
            b_sum,
            p_h,
            m_t,
            p_b,
            m_n,
            tl.minimum(rank, BLOCK_R),
            width,
            stride_br,
            plane,
            PLANES,
            BLOCK_M,
            BLOCK_R,
            PRECISION,
        )
        p_h += BLOCK_R
        p_b += BLOCK_R * stride_br
        rank -= BLOCK_R
        width -= BLOCK_R
    if BLOCK_R >= 64:  # noqa: SIM102, the one is known to the compiler, the other to the device
        if rank > 16:
            b_sum = expand_ranks(
                b_sum, p_h, m_t, p_b, m_n, rank, width, stride_br, plane, PLANES, BLOCK_M, 32, PRECISION
            )
    if (rank > 0) & (rank <= 16):
        b_sum = expand_ranks(b_sum, p_h, m_t, p_b, m_n, rank, width, stride_br, plane, PLANES, BLOCK_M, 16, PRECISION)
    return b_sum


@triton.jit(
    do_not_specialize=[
        "step",
        "num_tokens",
        "num_slots",
        "choices",
        "stride_it",
        "stride_ik",
        "stride_gt",
        "stride_gk",
    ],
    do_not_specialize_on_alignment=["p_order", "p_starts", "p_indices", "p_ranks", "p_scale", "p_gates"],
)
def expand_kernel(
    p_y,
    p_h,
    p_b,
    p_order,
    p_starts,
    p_indices,
    p_ranks,
    p_scale,
    p_gates,
    step,
    num_tokens,
    num_slots,
    choices,
    d_out,
    r_max,
    stride_yt,
    stride_yn,
    stride_bs,
    stride_bn,
    stride_it,
    stride_ik,
    stride_gt,
    stride_gk,
    SLICES: tl.constexpr,
    PLANES: tl.constexpr,
    MIXTURE: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_S: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program: up to BLOCK_M tokens (of one slot, or neighbours), BLOCK_N columns of one slice."""
    i_b, i_n = tl.program_id(0), tl.program_id(1)
    i_s, i_tile, column = find_columns(d_out, i_n, BLOCK_N, SLICES)
    o_n = i_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    m_n = o_n < pick(d_out, i_s, SLICES)
    # [BLOCK_N]
    p_b = pick(p_b, i_s, SLICES) + o_n.to(tl.int64) * pick(stride_bn, i_s, SLICES)
    stride_bs = pick(stride_bs, i_s, SLICES)
    if MIXTURE:
        o_m = tl.arange(0, BLOCK_M)
        b_t = i_b.to(tl.int64) * step + o_m
        m_t = (o_m < step) & (b_t < num_tokens)
    else:
        slot, b_t, m_t = find_pairs(p_order, p_starts, i_b, step, num_tokens, num_slots, BLOCK_M, BLOCK_S)
        rank = load_ranks(p_ranks, slot, num_slots, r_max)
        m_t = m_t & (tl.full([BLOCK_M], rank, dtype=tl.int32) > 0)

    # [BLOCK_M, BLOCK_N]
    p_y = p_y + b_t[:, None] * stride_yt + (column + o_n)[None, :].to(tl.int64) * stride_yn
    if ACCUMULATE:
        b_y = tl.load(p_y, mask=m_t[:, None] & m_n[None, :], other=0.0).to(tl.float32)
    else:
        b_y = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    # [BLOCK_M]
    p_h = p_h + (tl.cast(i_s, tl.int64) * num_tokens + b_t) * choices * r_max
    plane = tl.cast(num_tokens, tl.int64) * SLICES * choices * r_max

    if MIXTURE:
        m_used = tl.zeros([BLOCK_M], dtype=tl.int1)
        for k in range(choices):
            b_slot = tl.load(p_indices + b_t * stride_it + k * stride_ik, mask=m_t, other=-1)
            b_rank = load_ranks(p_ranks, b_slot, num_slots, r_max)
            b_gate = load_gates(p_gates, b_t * stride_gt + k * stride_gk, m_t, BLOCK_M)
            m_used = m_used | (b_rank > 0)
            # the slots of this k, smallest first; num_slots marks rows that are done
            b_slot = tl.where(b_rank > 0, b_slot, num_slots).to(tl.int32)
            slot = tl.min(b_slot, axis=0)
            while slot < num_slots:
                m_k = b_slot == slot
                rank = tl.max(tl.where(m_k, b_rank, 0), axis=0)
                p_s = p_b + slot.to(tl.int64) * stride_bs
                b_term = expand_tile(
                    p_h, m_k, p_s, m_n, rank, r_max, 1, plane, PLANES, BLOCK_M, BLOCK_N, BLOCK_R, PRECISION
                )
                b_factor = b_gate * load_scale(p_scale, slot, num_slots)
                b_y = tl.where(m_k[:, None], b_y + b_factor[:, None] * b_term, b_y)
                b_slot = tl.where(m_k, num_slots, b_slot)
                slot = tl.min(b_slot, axis=0)
            p_h += r_max
        m_t = m_used
    else:
        p_s = p_b + slot.to(tl.int64) * stride_bs
        b_term = expand_tile(p_h, m_t, p_s, m_n, rank, r_max, 1, plane, PLANES, BLOCK_M, BLOCK_N, BLOCK_R, PRECISION)
        b_factor = load_gates(p_gates, b_t * stride_gt, m_t, BLOCK_M) * load_scale(p_scale, slot, num_slots)
        b_y += b_factor[:, None] * b_term
    tl.store(p_y, b_y.to(p_y.dtype.element_ty), mask=m_t[:, None] & m_n[None, :])


def expand_launch(y, h, B, indices, scale, ranks, gates, order, starts, accumulate, shared=SHARED_LIMIT):
    """The launch that fills y (T, sum of d_out); order and starts only matter where indices is (T, 1).

    h is (planes, slices, T, choices, r_max).
    """
    num_tokens, choices = indices.shape
    num_slots, _, r_max = B[0].shape
    mixture = choices > 1
    config = select("mixture" if mixture else "expand", B[0].dtype, r_max, shared)
    if mixture:
        step = 1 if num_tokens <= SINGLE_TOKENS else BLOCK_M
        blocks, order, starts = triton.cdiv(num_tokens, step), None, None
    else:
        blocks, step = pair_blocks(num_tokens, num_slots)
    arguments = {
        "p_y": y,
        "p_h": h,
        "p_b": tuple(B),
        "p_order": order,
        "p_starts": starts,
        "p_indices": indices if mixture else None,
        "p_ranks": ranks,
        "p_scale": scale,
        "p_gates": gates,
        "step": step,
        "num_tokens": num_tokens,
        "num_slots": num_slots,
        "choices": choices,
        "d_out": tuple(b.shape[1] for b in B),
        "r_max": r_max,
        "stride_yt": row_stride(y),
        "stride_yn": y.stride(1),
        "stride_bs": tuple(row_stride(b) for b in B),
        "stride_bn": tuple(b.stride(1) for b in B),
        "stride_it": indices.stride(0) if mixture else 0,
        "stride_ik": indices.stride(1) if mixture else 0,
        "stride_gt": gates.stride(0) if gates is not None else 0,
        "stride_gk": gates.stride(1) if gates is not None else 0,
        "SLICES": len(B),
        "PLANES": h.shape[0],
        "MIXTURE": mixture,
        "ACCUMULATE": accumulate,
        "BLOCK_M": BLOCK_M,
        "BLOCK_R": config.block_r,
        "BLOCK_N": config.block,
        "BLOCK_S": BLOCK_S,
        "PRECISION": "ieee" if config.dtype == torch.float32 else "tf32",
    }
    tiles = sum(triton.cdiv(b.shape[1], config.block) for b in B)
    return Launch(expand_kernel, (blocks, tiles, 1), arguments, config)


def expand(y, h, B, indices, scale, ranks, gates, order, starts, accumulate, shared=SHARED_LIMIT):
    """y[t] (+)= sum_k gates[t, k] * scale[i] * B_s[i, :, :r] @ h[s, t, k, :r], one rounding; other rows untouched."""
    run(expand_launch(y, h[None], B, indices, scale, ranks, gates, order, starts, accumulate, shared), y.device)
