"""attention_gates and routed_bgmv: a kernel for logits and their softmax between the launches of shrink and expand.

    e[t, k] = q[s, t]^T cores_s[i] h[s, t, k] / sqrt(router rank)        gates[s, t] = softmax over k of e[t]

q = router_A_s x is a shrink, by the one adapter that every token has.
"""

import torch
import triton
import triton.language as tl

from .common import Launch, load_ranks, pick, row_stride, run
from .configs import SHARED_LIMIT, select
from .expand import expand_launch
from .shrink import shrink_launch


@triton.jit(
    do_not_specialize=["num_tokens", "num_slots", "choices", "stride_it", "stride_ik"],
    do_not_specialize_on_alignment=["p_indices", "p_ranks"],
)
def gates_kernel(
    p_gates,
    p_q,
    p_h,
    p_cores,
    p_indices,
    p_ranks,
    num_tokens,
    num_slots,
    choices,
    router_rank,
    r_max,
    stride_it,
    stride_ik,
    stride_cs,
    stride_cq,
    SLICES: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """One program: the gates of one token in one slice."""
    i_t, i_s = tl.program_id(0).to(tl.int64), tl.program_id(1)
    o_k, o_q, o_r = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_Q), tl.arange(0, BLOCK_R)
    stride_cq = tl.cast(pick(stride_cq, i_s, SLICES), tl.int64)
    i_row = i_s.to(tl.int64) * num_tokens + i_t
    root = tl.sqrt(tl.cast(router_rank, tl.float32))
    # [BLOCK_K]
    b_logit = tl.full([BLOCK_K], float("-inf"), dtype=tl.float32)
    for k in range(choices):
        slot = tl.load(p_indices + i_t * stride_it + k * stride_ik).to(tl.int64)
        if (slot >= 0) & (slot < num_slots):
            rank = load_ranks(p_ranks, slot, num_slots, r_max)
            p_core = pick(p_cores, i_s, SLICES) + slot * pick(stride_cs, i_s, SLICES)
            b_sum = tl.zeros([BLOCK_Q, BLOCK_R], dtype=tl.float32)
            for q in range(0, router_rank, BLOCK_Q):
                m_q = q + o_q < router_rank
                b_q = tl.load(p_q + i_row * router_rank + q + o_q, mask=m_q, other=0.0)
                for r in range(0, rank, BLOCK_R):
                    m_r = r + o_r < rank
                    b_h = tl.load(p_h + (i_row * choices + k) * r_max + r + o_r, mask=m_r, other=0.0)
                    # [BLOCK_Q, BLOCK_R]
                    o_c = (q + o_q)[:, None] * stride_cq + r + o_r[None, :]
                    b_core = tl.load(p_core + o_c, mask=m_q[:, None] & m_r[None, :], other=0.0)
                    b_sum += b_q[:, None] * b_core * b_h[None, :]
            b_logit = tl.where(o_k == k, tl.sum(tl.sum(b_sum, axis=1), axis=0) / root, b_logit)
    # a row without an adapter has no largest logit: any finite one gives it gates of 0
    most = tl.max(b_logit, axis=0)
    b_gate = tl.exp(b_logit - tl.where(most == float("-inf"), 0.0, most))
    total = tl.sum(b_gate, axis=0)
    b_gate = b_gate / tl.where(total == 0.0, 1.0, total)
    tl.store(p_gates + i_row * choices + o_k, b_gate, mask=o_k < choices)


def gates_launch(gates, q, h, cores, indices, ranks):
    """The launch that writes gates (slices, T, K) from q (slices, T, 1, router rank) and h (slices, T, K, r_max)."""
    num_tokens, choices = indices.shape
    num_slots, router_rank, r_max = cores[0].shape
    config = select("gates", torch.float32)
    arguments = {
        "p_gates": gates,
        "p_q": q,
        "p_h": h,
        "p_cores": tuple(cores),
        "p_indices": indices,
        "p_ranks": ranks,
        "num_tokens": num_tokens,
        "num_slots": num_slots,
        "choices": choices,
        "router_rank": router_rank,
        "r_max": r_max,
        "stride_it": indices.stride(0),
        "stride_ik": indices.stride(1),
        "stride_cs": tuple(row_stride(core) for core in cores),
        "stride_cq": tuple(core.stride(1) for core in cores),
        "SLICES": len(cores),
        "BLOCK_K": triton.next_power_of_2(choices),
        "BLOCK_Q": config.block,
        "BLOCK_R": config.block,
    }
    return Launch(gates_kernel, (num_tokens, len(cores), 1), arguments, config)


def query_launch(q, x, router_A, shared=SHARED_LIMIT):
    """The launch that writes q (slices, T, 1, router rank) = router_A_s x."""
    tokens = x.shape[0]
    order = torch.arange(tokens, dtype=torch.int32, device=x.device)
    # 0 and T, made on the device: a copy from the host could not be captured in a graph
    starts = torch.arange(2, dtype=torch.int32, device=x.device) * tokens
    return shrink_launch(q[None], x, [a[None] for a in router_A], 1, None, order, starts, False, shared)


def attention_gates(gates, x, h, router_A, cores, indices, ranks, shared=SHARED_LIMIT):
    """gates[s, t] = softmax over k of (router_A_s x[t])^T cores_s[i] h[s, t, k] / sqrt(router rank); 0 if i is -1."""
    q = torch.empty(len(cores), x.shape[0], 1, cores[0].shape[1], dtype=torch.float32, device=x.device)
    run(query_launch(q, x, router_A, shared), x.device)
    run(gates_launch(gates, q, h, cores, indices, ranks), x.device)


def routed_bgmv(y, x, A, B, router_A, cores, indices, scale, ranks, order, starts, accumulate, shared=SHARED_LIMIT):
    """bgmv with the attention gates of each slice, whose columns lie side by side in y."""
    h = torch.empty(len(A), *indices.shape, A[0].shape[1], dtype=torch.float32, device=x.device)
    gates = torch.empty(h.shape[:3], dtype=torch.float32, device=x.device)
    run(shrink_launch(h[None], x, A, indices.shape[1], ranks, order, starts, False, shared), x.device)
    attention_gates(gates, x, h, router_A, cores, indices, ranks, shared)
    column = 0
    for s, b in enumerate(B):
        part, column = y.narrow(1, column, b.shape[1]), column + b.shape[1]
        given = (part, h[None, s : s + 1], [b], indices, scale, ranks, gates[s], order, starts, accumulate)
        run(expand_launch(*given, shared), x.device)


def launches():
    """(name, launch) of the variants that aot compiles: one slice without ranks, three with, and two choices."""
    variants = ("plain", 1, 1, None), ("full", 3, 1, torch.int32), ("mixture", 3, 2, torch.int32)
    for name, slices, choices, ranks in variants:
        q, h = (torch.empty(slices, 1, count, 16, device="meta") for count in (1, choices))
        cores = [torch.empty(1, 16, 16, device="meta") for _ in range(slices)]
        indices = torch.empty(1, choices, dtype=torch.int64, device="meta")
        given = None if ranks is None else torch.empty(1, dtype=ranks, device="meta")
        yield name, gates_launch(torch.empty(slices, 1, choices, device="meta"), q, h, cores, indices, given)
