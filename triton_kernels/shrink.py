"""shrink: h[s, t, k, :r] = A_s[i, :r] @ x[t] with i = indices[t, k]; zero beyond the rank and without an adapter.

d_in is summed in chunks whose number and length follow from d_in alone (`configs.chunks`). Where the batch leaves the
device idle every chunk has programs of its own, which write their sums to planes of h that `expand` adds up; else one
program takes all chunks and adds them itself. The additions are the same ones in the same order, so a token's bits do
not depend on which of the two it was.
"""

import triton
import triton.language as tl

from .common import BLOCK_M, BLOCK_S, INTERPRET, Launch, find_pairs, load_ranks, pair_blocks, pick, row_stride, run
from .configs import SHARED_LIMIT, chunks, select

# a grid of fewer programs leaves multiprocessors idle, and its chunks are spread over programs of their own
FULL_GRID = 264


@triton.jit
def shrink_tile(
    p_h,
    p_x,
    p_a,
    m_p,
    begin,
    end,
    chunk,
    rank,
    loads,
    stride_xd,
    stride_ar,
    stride_ad,
    BLOCK_M: tl.constexpr,
    RANKS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Rows at p_x (BLOCK_M, 1) times the first rank <= RANKS rows at p_a, begin:end of d_in, stored at p_h.

    `loads` >= rank rows of A are loaded; what those beyond the rank hold does not matter.
    """
    o_r, o_k = tl.arange(0, RANKS), tl.arange(0, BLOCK_K)
    m_r, m_load = o_r < rank, o_r < loads
    # [BLOCK_M, BLOCK_K], [BLOCK_K, RANKS]
    p_x = p_x + (begin + o_k)[None, :].to(tl.int64) * stride_xd
    p_a = p_a + o_r[None, :].to(tl.int64) * stride_ar + (begin + o_k)[:, None] * stride_ad
    b_h = tl.zeros([BLOCK_M, RANKS], dtype=tl.float32)
    b_sum = tl.zeros([BLOCK_M, RANKS], dtype=tl.float32)
    for o in range(begin, end, BLOCK_K):
        m_k = o_k < end - o
        b_x = tl.load(p_x, mask=m_p[:, None] & m_k[None, :], other=0.0)
        b_a = tl.load(p_a, mask=m_k[:, None] & m_load[None, :], other=0.0)
        if UPCAST:
            b_x, b_a = b_x.to(tl.float32), b_a.to(tl.float32)
        # fma and not +, which Triton folds into the dot: one sum over all of a chunk loses a digit in float32
        b_sum = tl.fma(tl.dot(b_x, b_a, input_precision="ieee"), 1.0, b_sum)
        # one loop over the chunks, not two nested ones, so that the loads of the next chunk are under way
        is_last = (o + BLOCK_K) % chunk == 0
        b_h = tl.where(is_last, b_h + b_sum, b_h)
        b_sum = tl.where(is_last, 0.0, b_sum)
        p_x += BLOCK_K * tl.cast(stride_xd, tl.int64)
        p_a += BLOCK_K * stride_ad
    tl.store(p_h + o_r[None, :], b_h + b_sum, mask=m_p[:, None] & m_r[None, :])


@triton.jit
def shrink_ranks(
    p_h,
    p_x,
    p_a,
    m_p,
    begin,
    end,
    chunk,
    rank,
    loads,
    stride_xd,
    stride_ar,
    stride_ad,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """shrink_tile of the smallest tile <= BLOCK_R that holds the rank; without ranks there is nothing to do."""
    if (rank > 0) & (rank <= 16):
        shrink_tile(
            p_h,
            p_x,
            p_a,
            m_p,
            begin,
            end,
            chunk,
            rank,
            loads,
            stride_xd,
            stride_ar,
            stride_ad,
            BLOCK_M,
            16,
            BLOCK_K,
            UPCAST,
        )
    if BLOCK_R >= 32:  # noqa: SIM102, the one is known to the compiler, the other to the device
        if (rank > 16) & (rank <= 32):
            shrink_tile(
                p_h,
                p_x,
                p_a,
                m_p,
                begin,
                end,
                chunk,
                rank,
                loads,
                stride_xd,
                stride_ar,
                stride_ad,
                BLOCK_M,
                32,
                BLOCK_K,
                UPCAST,
            )
    if BLOCK_R >= 64:  # noqa: SIM102
        if rank > 32:
            shrink_tile(
                p_h,
                p_x,
                p_a,
                m_p,
                begin,
                end,
                chunk,
                rank,
                loads,
                stride_xd,
                stride_ar,
                stride_ad,
                BLOCK_M,
                64,
                BLOCK_K,
                UPCAST,
            )


@triton.jit(
    do_not_specialize=["planes", "fill", "step", "num_pairs", "num_slots", "choices"],
    do_not_specialize_on_alignment=["p_order", "p_starts", "p_ranks"],
)
def shrink_kernel(
    p_h,
    p_x,
    p_a,
    p_order,
    p_starts,
    p_ranks,
    planes,
    fill,
    step,
    num_pairs,
    num_slots,
    choices,
    d_in,
    chunk,
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
    """One program: BLOCK_M pairs of one slot, one tile of ranks of one slice, and one chunk of d_in or all of it."""
    i_b, i_r = tl.program_id(0), tl.program_id(1) * BLOCK_R
    i_s, i_plane = tl.program_id(2) // planes, tl.program_id(2) % planes
    slot, b_pair, m_p = find_pairs(p_order, p_starts, i_b, step, num_pairs, num_slots, BLOCK_M, BLOCK_S)
    rank = load_ranks(p_ranks, slot, num_slots, r_max)

    begin = i_plane * chunk
    end = tl.where(planes > 1, tl.minimum(begin + chunk, d_in), d_in)
    p_a = pick(p_a, i_s, SLICES) + slot.to(tl.int64) * pick(stride_as, i_s, SLICES)
    stride_ar = pick(stride_ar, i_s, SLICES)
    p_a += i_r * tl.cast(stride_ar, tl.int64)
    # [BLOCK_M, 1]
    p_x = p_x + (b_pair.to(tl.int32) // choices).to(tl.int64)[:, None] * stride_xt
    p_h = p_h + (((i_plane * SLICES + i_s).to(tl.int64) * num_pairs + b_pair) * r_max)[:, None] + i_r

    # beyond the slot's rank there is nothing to do
    rest = rank - i_r
    shrink_ranks(
        p_h, p_x, p_a, m_p, begin, end, chunk, rest, rest, stride_xd, stride_ar, 1, BLOCK_M, BLOCK_R, BLOCK_K, UPCAST
    )
    if fill > 0:
        o_r = tl.arange(0, BLOCK_R)
        m_r = (o_r >= rest) & (o_r < r_max - i_r)
        b_zero = tl.zeros([BLOCK_M, BLOCK_R], dtype=tl.float32)
        tl.store(p_h + o_r[None, :], b_zero, mask=m_p[:, None] & m_r[None, :])


def plane_count(num_pairs, A, config):
    """How many planes of h a batch gets: one per chunk of d_in, or one where it fills the device anyway."""
    num_slots, r_max, d_in = A[0].shape
    blocks = pair_blocks(num_pairs, num_slots)[0] * triton.cdiv(r_max, config.block_r) * len(A)
    return chunks(d_in)[0] if blocks < FULL_GRID else 1


def shrink_launch(h, x, A, choices, ranks, order, starts, fill, shared=SHARED_LIMIT):
    """The launch that writes h (planes, slices, T, choices, r_max), contiguous float32; beyond the ranks if `fill`."""
    num_slots, r_max, d_in = A[0].shape
    num_pairs, planes = order.shape[0], h.shape[0]
    config = select("shrink", x.dtype, r_max, shared)
    blocks, step = pair_blocks(num_pairs, num_slots)
    arguments = {
        "p_h": h,
        "p_x": x,
        "p_a": tuple(A),
        "p_order": order,
        "p_starts": starts,
        "p_ranks": ranks,
        "planes": planes,
        "fill": int(fill),
        "step": step,
        "num_pairs": num_pairs,
        "num_slots": num_slots,
        "choices": choices,
        "d_in": d_in,
        "chunk": chunks(d_in)[1],
        "r_max": r_max,
        "stride_xt": row_stride(x),
        "stride_xd": x.stride(1),
        "stride_as": tuple(row_stride(a) for a in A),
        "stride_ar": tuple(a.stride(1) for a in A),
        "SLICES": len(A),
        "BLOCK_M": BLOCK_M,
        "BLOCK_R": config.block_r,
        "BLOCK_K": config.block,
        "BLOCK_S": BLOCK_S,
        "UPCAST": INTERPRET,
    }
    grid = (blocks, triton.cdiv(r_max, config.block_r), len(A) * planes)
    return Launch(shrink_kernel, grid, arguments, config)


def shrink(h, x, A, choices, ranks, order, starts, shared=SHARED_LIMIT):
    """h[s, t, k, :r] = A_s[i, :r] @ x[t]; every element of h is written."""
    run(shrink_launch(h[None], x, A, choices, ranks, order, starts, True, shared), x.device)
