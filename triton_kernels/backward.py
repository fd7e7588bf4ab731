"""backward: the gradients of bgmv's sum, from dy = dL/dy. With f = gates[t, k] * scale[i] and p the pair (t, k):

    h[s, p] = A_s[i] @ x[t]        dh[s, p] = B_s[i]^T @ dy_s[t]        dots[p] = sum_s h[s, p] . dh[s, p]
    dx[t] = sum_k f * sum_s A_s[i]^T @ dh[s, p]
    dA_s[i] = sum_p f * dh[s, p] (x) x[t]      dgates[t, k] = scale[i] * dots[p]
    dB_s[i] = sum_p f * dy_s[t] (x) h[s, p]    dscale[i] = sum_p gates[t, k] * dots[p]

h and dh are float32 scratch. A slot's pairs are summed by one program in the order of the plan, and every element of a
gradient is written once, zeros too: there are no atomics, and the host needs to know nothing of the routing.
"""

import torch
import triton
import triton.language as tl

from .common import BLOCK_M, BLOCK_S, INTERPRET, Launch, find_pairs, load_ranks, pair_blocks, pick, row_stride, run
from .configs import SHARED_LIMIT, chunks, select
from .expand import expand_tile, find_columns, load_gates, load_scale, round_tf32
from .shrink import shrink_launch, shrink_ranks

# pairs that outer_kernel multiplies at a time
PAIRS = 32


@triton.jit(
    do_not_specialize=["step", "num_pairs", "num_slots", "choices"],
    do_not_specialize_on_alignment=["p_order", "p_starts", "p_ranks"],
)
def dh_kernel(
    p_dh,
    p_dy,
    p_b,
    p_order,
    p_starts,
    p_ranks,
    step,
    num_pairs,
    num_slots,
    choices,
    d_out,
    column,
    chunk,
    r_max,
    stride_yt,
    stride_yn,
    stride_bs,
    stride_bn,
    SLICES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_S: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """One program: BLOCK_M pairs of one slot, one tile of ranks of one slice, all of d_out. It is shrink by B^T."""
    i_b, i_r, i_s = tl.program_id(0), tl.program_id(1) * BLOCK_R, tl.program_id(2)
    slot, b_pair, m_p = find_pairs(p_order, p_starts, i_b, step, num_pairs, num_slots, BLOCK_M, BLOCK_S)
    rest = load_ranks(p_ranks, slot, num_slots, r_max) - i_r
    # ranks lie side by side in B: loads end at a multiple of 8, as vectors need
    loads = tl.minimum(tl.cdiv(rest, 8) * 8, r_max - i_r)
    stride_bn = tl.cast(pick(stride_bn, i_s, SLICES), tl.int64)
    p_b = pick(p_b, i_s, SLICES) + slot.to(tl.int64) * pick(stride_bs, i_s, SLICES) + i_r
    # [BLOCK_M, 1]
    p_dy = p_dy + (b_pair.to(tl.int32) // choices).to(tl.int64)[:, None] * stride_yt
    p_dy += pick(column, i_s, SLICES) * tl.cast(stride_yn, tl.int64)
    p_dh = p_dh + ((i_s.to(tl.int64) * num_pairs + b_pair) * r_max)[:, None] + i_r
    end, chunk = pick(d_out, i_s, SLICES), pick(chunk, i_s, SLICES)
    shrink_ranks(
        p_dh, p_dy, p_b, m_p, 0, end, chunk, rest, loads, stride_yn, 1, stride_bn, BLOCK_M, BLOCK_R, BLOCK_K, UPCAST
    )


@triton.jit(
    do_not_specialize=["num_tokens", "num_slots", "choices", "stride_it", "stride_ik", "stride_gt", "stride_gk"],
    do_not_specialize_on_alignment=["p_indices", "p_ranks", "p_scale", "p_gates"],
)
def dx_kernel(
    p_dx,
    p_dh,
    p_a,
    p_indices,
    p_ranks,
    p_scale,
    p_gates,
    num_tokens,
    num_slots,
    choices,
    d_in,
    r_max,
    stride_as,
    stride_ar,
    stride_it,
    stride_ik,
    stride_gt,
    stride_gk,
    SLICES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program: BLOCK_M neighbouring tokens, BLOCK_N columns of d_in; terms in the order of k, then of s."""
    o_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_n = o_n < d_in
    b_t = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    m_t = b_t < num_tokens
    b_dx = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for k in range(choices):
        b_slot = tl.load(p_indices + b_t * stride_it + k * stride_ik, mask=m_t, other=-1)
        b_rank = load_ranks(p_ranks, b_slot, num_slots, r_max)
        b_gate = load_gates(p_gates, b_t * stride_gt + k * stride_gk, m_t, BLOCK_M)
        # the slots of this k, smallest first; num_slots marks rows that are done
        b_slot = tl.where(b_rank > 0, b_slot, num_slots).to(tl.int32)
        slot = tl.min(b_slot, axis=0)
        while slot < num_slots:
            m_k = b_slot == slot
            rank = tl.max(tl.where(m_k, b_rank, 0), axis=0)
            b_term = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
            for i_s in range(SLICES):
                p_s = pick(p_a, i_s, SLICES) + slot.to(tl.int64) * pick(stride_as, i_s, SLICES) + o_n
                p_h = p_dh + ((tl.cast(i_s, tl.int64) * num_tokens + b_t) * choices + k) * r_max
                stride_sr = tl.cast(pick(stride_ar, i_s, SLICES), tl.int64)
                b_term += expand_tile(
                    p_h, m_k, p_s, m_n, rank, r_max, stride_sr, 0, 1, BLOCK_M, BLOCK_N, BLOCK_R, PRECISION
                )
            b_factor = b_gate * load_scale(p_scale, slot, num_slots)
            b_dx = tl.where(m_k[:, None], b_dx + b_factor[:, None] * b_term, b_dx)
            b_slot = tl.where(m_k, num_slots, b_slot)
            slot = tl.min(b_slot, axis=0)
    # [BLOCK_M, BLOCK_N]
    p_dx = p_dx + b_t[:, None] * d_in + o_n[None, :]
    tl.store(p_dx, b_dx.to(p_dx.dtype.element_ty), mask=m_t[:, None] & m_n[None, :])


@triton.jit(
    do_not_specialize=["tiles", "num_pairs", "num_slots", "choices", "stride_gt", "stride_gk"],
    do_not_specialize_on_alignment=["p_order", "p_starts", "p_ranks", "p_scale", "p_gates"],
)
def outer_kernel(
    p_out,
    p_h,
    p_x,
    p_order,
    p_starts,
    p_ranks,
    p_scale,
    p_gates,
    tiles,
    num_pairs,
    num_slots,
    choices,
    d,
    column,
    r_max,
    stride_xt,
    stride_xd,
    stride_gt,
    stride_gk,
    SLICES: tl.constexpr,
    RANKS_LAST: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program: BLOCK_R ranks and BLOCK_N columns of one slot and slice of sum_p f * h[s, p] (x) x[t, column:]."""
    slot, i_n, i_r = tl.program_id(0) // tiles, tl.program_id(0) % tiles, tl.program_id(1) * BLOCK_R
    i_s, i_tile, _ = find_columns(d, i_n, BLOCK_N, SLICES)
    rank = load_ranks(p_ranks, slot, num_slots, r_max)
    width = pick(d, i_s, SLICES)
    o_r, o_n, o_p = i_r + tl.arange(0, BLOCK_R), i_tile * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_P)
    m_r, m_n = o_r < rank, o_n < width
    start, stop = tl.load(p_starts + slot), tl.load(p_starts + slot + 1)
    # ranks beyond the slot's own are zeros: no pairs
    stop = tl.where(rank > i_r, stop, start)
    p_h = p_h + tl.cast(i_s, tl.int64) * num_pairs * r_max + o_r[:, None]
    p_x = p_x + (pick(column, i_s, SLICES) + o_n).to(tl.int64)[None, :] * stride_xd
    scale = load_scale(p_scale, slot, num_slots)
    b_out = tl.zeros([BLOCK_R, BLOCK_N], dtype=tl.float32)
    for o in range(start, stop, BLOCK_P):
        m_p = o_p < stop - o
        b_pair = tl.load(p_order + o + o_p, mask=m_p, other=0)
        b_t, b_k = (b_pair // choices).to(tl.int64), (b_pair % choices).to(tl.int64)
        b_factor = load_gates(p_gates, b_t * stride_gt + b_k * stride_gk, m_p, BLOCK_P) * scale
        # [BLOCK_R, BLOCK_P], [BLOCK_P, BLOCK_N]
        b_h = tl.load(p_h + b_pair.to(tl.int64)[None, :] * r_max, mask=m_r[:, None] & m_p[None, :], other=0.0)
        b_x = tl.load(p_x + b_t[:, None] * stride_xt, mask=m_p[:, None] & m_n[None, :], other=0.0).to(tl.float32)
        b_h *= b_factor[None, :]
        if PRECISION == "tf32":
            b_h = round_tf32(b_h)
        # fma and not +, which Triton folds into the dot: one sum over all pairs loses a digit in float32
        b_out = tl.fma(tl.dot(b_h, b_x, input_precision=PRECISION), 1.0, b_out)
    p_out = pick(p_out, i_s, SLICES) + slot.to(tl.int64) * r_max * width
    # of the layout of B or of A
    if RANKS_LAST:
        p_out = p_out + o_r[:, None] + o_n[None, :].to(tl.int64) * r_max
    else:
        p_out = p_out + o_r[:, None].to(tl.int64) * width + o_n[None, :]
    tl.store(p_out, b_out.to(p_out.dtype.element_ty), mask=(o_r < r_max)[:, None] & m_n[None, :])


@triton.jit(
    do_not_specialize=["num_pairs", "num_slots", "choices", "stride_it", "stride_ik"],
    do_not_specialize_on_alignment=["p_indices", "p_ranks", "p_scale"],
)
def dots_kernel(
    p_dots,
    p_dgates,
    p_h,
    p_dh,
    p_indices,
    p_ranks,
    p_scale,
    num_pairs,
    num_slots,
    choices,
    r_max,
    stride_it,
    stride_ik,
    SLICES: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """One program: the dots of BLOCK_P pairs, summed over slices and ranks, and what they make of dgates."""
    o_p = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    m_p = o_p < num_pairs
    b_t, b_k = (o_p // choices).to(tl.int64), (o_p % choices).to(tl.int64)
    b_slot = tl.load(p_indices + b_t * stride_it + b_k * stride_ik, mask=m_p, other=-1)
    b_rank = load_ranks(p_ranks, b_slot, num_slots, r_max)
    b_dot = tl.zeros([BLOCK_P, BLOCK_R], dtype=tl.float32)
    for i_s in range(SLICES):
        b_row = (tl.cast(i_s, tl.int64) * num_pairs + o_p) * r_max
        for o in range(0, r_max, BLOCK_R):
            o_r = o + tl.arange(0, BLOCK_R)
            # [BLOCK_P, BLOCK_R]
            o_h, m_h = b_row[:, None] + o_r[None, :], o_r[None, :] < b_rank[:, None]
            b_dot += tl.load(p_h + o_h, mask=m_h, other=0.0) * tl.load(p_dh + o_h, mask=m_h, other=0.0)
    b_sum = tl.sum(b_dot, axis=1)
    tl.store(p_dots + o_p, b_sum, mask=m_p)
    if p_dgates is not None:
        if p_scale is not None:
            b_sum *= tl.load(p_scale + b_slot, mask=b_rank > 0, other=0.0)
        tl.store(p_dgates + o_p, b_sum, mask=m_p)


@triton.jit(
    do_not_specialize=["choices", "stride_gt", "stride_gk"],
    do_not_specialize_on_alignment=["p_order", "p_starts", "p_gates"],
)
def dscale_kernel(p_dscale, p_dots, p_order, p_starts, p_gates, choices, stride_gt, stride_gk, BLOCK_P: tl.constexpr):
    """One program: the sum over the pairs of one slot."""
    slot = tl.program_id(0)
    start, stop = tl.load(p_starts + slot), tl.load(p_starts + slot + 1)
    b_sum = tl.zeros([BLOCK_P], dtype=tl.float32)
    for o in range(start, stop, BLOCK_P):
        o_p = o + tl.arange(0, BLOCK_P)
        m_p = o_p < stop
        b_pair = tl.load(p_order + o_p, mask=m_p, other=0)
        b_t, b_k = (b_pair // choices).to(tl.int64), (b_pair % choices).to(tl.int64)
        b_gate = load_gates(p_gates, b_t * stride_gt + b_k * stride_gk, m_p, BLOCK_P)
        b_sum += b_gate * tl.load(p_dots + b_pair, mask=m_p, other=0.0)
    tl.store(p_dscale + slot, tl.sum(b_sum, axis=0))


def dh_launch(dh, dy, B, choices, ranks, order, starts, shared=SHARED_LIMIT):
    """The launch that writes dh (slices, T, choices, r_max), contiguous float32, up to the ranks."""
    num_slots, _, r_max = B[0].shape
    num_pairs, d_out = order.shape[0], tuple(b.shape[1] for b in B)
    config = select("dh", dy.dtype, r_max, shared)
    blocks, step = pair_blocks(num_pairs, num_slots)
    arguments = {
        "p_dh": dh,
        "p_dy": dy,
        "p_b": tuple(B),
        "p_order": order,
        "p_starts": starts,
        "p_ranks": ranks,
        "step": step,
        "num_pairs": num_pairs,
        "num_slots": num_slots,
        "choices": choices,
        "d_out": d_out,
        "column": first_columns(d_out),
        "chunk": tuple(chunks(d)[1] for d in d_out),
        "r_max": r_max,
        "stride_yt": row_stride(dy),
        "stride_yn": dy.stride(1),
        "stride_bs": tuple(row_stride(b) for b in B),
        "stride_bn": tuple(b.stride(1) for b in B),
        "SLICES": len(B),
        "BLOCK_M": BLOCK_M,
        "BLOCK_R": config.block_r,
        "BLOCK_K": config.block,
        "BLOCK_S": BLOCK_S,
        "UPCAST": INTERPRET,
    }
    return Launch(dh_kernel, (blocks, triton.cdiv(r_max, config.block_r), len(B)), arguments, config)


def dx_launch(dx, dh, A, indices, scale, ranks, gates, shared=SHARED_LIMIT):
    """The launch that writes every element of dx (T, d_in), contiguous."""
    num_tokens, choices = indices.shape
    num_slots, r_max, d_in = A[0].shape
    config = select("dx", dx.dtype, r_max, shared)
    arguments = {
        "p_dx": dx,
        "p_dh": dh,
        "p_a": tuple(A),
        "p_indices": indices,
        "p_ranks": ranks,
        "p_scale": scale,
        "p_gates": gates,
        "num_tokens": num_tokens,
        "num_slots": num_slots,
        "choices": choices,
        "d_in": d_in,
        "r_max": r_max,
        "stride_as": tuple(row_stride(a) for a in A),
        "stride_ar": tuple(a.stride(1) for a in A),
        "stride_it": indices.stride(0),
        "stride_ik": indices.stride(1),
        **gate_strides(gates),
        "SLICES": len(A),
        "BLOCK_M": BLOCK_M,
        "BLOCK_R": config.block_r,
        "BLOCK_N": config.block,
        "PRECISION": precision(config),
    }
    grid = (triton.cdiv(num_tokens, BLOCK_M), triton.cdiv(d_in, config.block), 1)
    return Launch(dx_kernel, grid, arguments, config)


def outer_launch(out, h, x, scale, ranks, gates, order, starts, choices, ranks_last, shared=SHARED_LIMIT):
    """The launch that writes every element of out, contiguous: dA of dh and x, or (ranks_last) dB of h and dy."""
    num_slots, num_pairs, r_max = starts.shape[0] - 1, order.shape[0], h.shape[-1]
    d = tuple(o.shape[1 if ranks_last else 2] for o in out)
    config = select("outer", x.dtype, r_max, shared)
    tiles = sum(triton.cdiv(width, config.block) for width in d)
    arguments = {
        "p_out": tuple(out),
        "p_h": h,
        "p_x": x,
        "p_order": order,
        "p_starts": starts,
        "p_ranks": ranks,
        "p_scale": scale,
        "p_gates": gates,
        "tiles": tiles,
        "num_pairs": num_pairs,
        "num_slots": num_slots,
        "choices": choices,
        "d": d,
        "column": first_columns(d) if ranks_last else (0,) * len(d),
        "r_max": r_max,
        "stride_xt": row_stride(x),
        "stride_xd": x.stride(1),
        **gate_strides(gates),
        "SLICES": len(out),
        "RANKS_LAST": ranks_last,
        "BLOCK_P": PAIRS,
        "BLOCK_R": config.block_r,
        "BLOCK_N": config.block,
        "PRECISION": precision(config),
    }
    return Launch(outer_kernel, (num_slots * tiles, triton.cdiv(r_max, config.block_r), 1), arguments, config)


def dots_launch(dots, dgates, h, dh, indices, scale, ranks, num_slots):
    """The launch that writes dots (T * choices,) and, unless it is None, dgates (T, choices), contiguous float32."""
    config = select("dots", torch.float32)
    arguments = {
        "p_dots": dots,
        "p_dgates": dgates,
        "p_h": h,
        "p_dh": dh,
        "p_indices": indices,
        "p_ranks": ranks,
        "p_scale": scale,
        "num_pairs": dots.shape[0],
        "num_slots": num_slots,
        "choices": indices.shape[1],
        "r_max": h.shape[-1],
        "stride_it": indices.stride(0),
        "stride_ik": indices.stride(1),
        "SLICES": h.shape[0],
        "BLOCK_P": config.block,
        "BLOCK_R": 32,
    }
    return Launch(dots_kernel, (triton.cdiv(dots.shape[0], config.block), 1, 1), arguments, config)


def dscale_launch(dscale, dots, gates, order, starts, choices):
    """The launch that writes dscale (slots,), contiguous float32."""
    config = select("dscale", torch.float32)
    arguments = {
        "p_dscale": dscale,
        "p_dots": dots,
        "p_order": order,
        "p_starts": starts,
        "p_gates": gates,
        "choices": choices,
        **gate_strides(gates),
        "BLOCK_P": config.block,
    }
    return Launch(dscale_kernel, (dscale.shape[0], 1, 1), arguments, config)


def first_columns(widths):
    """The column at which each of several slices of these widths, side by side, begins."""
    return tuple(sum(widths[:s]) for s in range(len(widths)))


def gate_strides(gates):
    return {f"stride_g{axis}": 0 if gates is None else gates.stride(i) for i, axis in enumerate("tk")}


def precision(config):
    """tf32 holds float16 and bfloat16 exactly; the float32 operand is rounded to it."""
    return "ieee" if config.dtype == torch.float32 else "tf32"


def backward_launches(dy, x, A, B, indices, scale, ranks, gates, order, starts, shared=SHARED_LIMIT):
    """(the launches in their order, the gradients that they fill)."""
    num_slots, r_max, _ = A[0].shape
    choices = indices.shape[1]

    def empty(like, *shape, dtype=None):
        return torch.empty(*shape or like.shape, dtype=dtype or like.dtype, device=x.device)

    h, dh = (empty(x, len(A), *indices.shape, r_max, dtype=torch.float32) for _ in range(2))
    dx, dA, dB = empty(x), [empty(a) for a in A], [empty(b) for b in B]
    dscale, dgates = (None if value is None else empty(value) for value in (scale, gates))
    grouped = (order, starts)
    launches = [
        shrink_launch(h[None], x, A, choices, ranks, *grouped, False, shared),
        dh_launch(dh, dy, B, choices, ranks, *grouped, shared),
        dx_launch(dx, dh, A, indices, scale, ranks, gates, shared),
        outer_launch(dA, dh, x, scale, ranks, gates, *grouped, choices, False, shared),
        outer_launch(dB, h, dy, scale, ranks, gates, *grouped, choices, True, shared),
    ]
    if scale is not None or gates is not None:
        dots = empty(x, order.shape[0], dtype=torch.float32)
        launches.append(dots_launch(dots, dgates, h, dh, indices, scale, ranks, num_slots))
        if scale is not None:
            launches.append(dscale_launch(dscale, dots, gates, *grouped, choices))
    return launches, (dx, dA, dB, dscale, dgates)


def backward(dy, x, A, B, indices, scale, ranks, gates, order, starts, shared=SHARED_LIMIT):
    """Gradients of bgmv's sum by x, every A, every B, scale and gates (the last two None where the input is None)."""
    launches, gradients = backward_launches(dy, x, A, B, indices, scale, ranks, gates, order, starts, shared)
    for launch in launches:
        run(launch, x.device)
    return gradients
