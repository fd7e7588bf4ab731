"""Clustering of points: inner products, nearest centroids, distances to given centroids, and centroids.

Every output is summed by one program, in an order that follows from its own problem: in float32 for some columns or
products at a time, then in float64.
"""

import torch
import triton
import triton.language as tl

from .common import INTERPRET, Launch
from .configs import select
from .point_tables import load_part, load_points, load_problem, load_scales

# columns that are summed in float32
CHUNK = 1024


@triton.jit
def gram_kernel(
    p_out,
    p_means,
    p_any,
    p_rows,
    p_steps,
    p_scales,
    p_parts,
    p_problems,
    p_tiles,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    CHUNK: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """One tile (i, j), i <= j, of X X^T of one problem; where means are given, of X less its mean."""
    p_tile = p_tiles + tl.program_id(0).to(tl.int64) * 3
    i_q = tl.load(p_tile)
    o_i, o_j = tl.load(p_tile + 1) + tl.arange(0, BLOCK), tl.load(p_tile + 2) + tl.arange(0, BLOCK)
    count = load_problem(p_problems, i_q, 2)
    m_i, m_j = o_i < count, o_j < count
    b_total = tl.zeros([BLOCK, BLOCK], dtype=tl.float64)
    for i_part in range(load_problem(p_problems, i_q, 0), load_problem(p_problems, i_q, 1)):
        row, columns, column = load_part(p_parts, i_part)
        b_si, b_sj = load_scales(p_scales, row + o_i, m_i), load_scales(p_scales, row + o_j, m_j)
        b_part = tl.zeros([BLOCK, BLOCK], dtype=tl.float64)
        for begin in range(0, columns, CHUNK):
            b_sum = tl.zeros([BLOCK, BLOCK], dtype=tl.float32)
            for o in range(begin, tl.minimum(begin + CHUNK, columns), BLOCK_K):
                o_k = o + tl.arange(0, BLOCK_K)
                m_k = o_k < columns
                b_x = load_points(p_any, p_rows, p_steps, row + o_i, m_i, o_k, m_k)
                b_y = load_points(p_any, p_rows, p_steps, row + o_j, m_j, o_k, m_k)
                if p_means is not None:
                    p_mean = p_means + load_problem(p_problems, i_q, 7) + column
                    b_mean = tl.load(p_mean + o_k, mask=m_k, other=0.0)
                    b_x = b_x * b_si[:, None] - b_mean[None, :]
                    b_y = b_y * b_sj[:, None] - b_mean[None, :]
                if UPCAST:
                    b_x, b_y = b_x.to(tl.float32), b_y.to(tl.float32)
                b_sum += tl.dot(b_x, tl.trans(b_y), input_precision="ieee")
            b_part += b_sum.to(tl.float64)
        if p_means is None:
            b_part = b_part * (b_si[:, None] * b_sj[None, :]).to(tl.float64)
        b_total += b_part
    b_out = b_total.to(tl.float32)
    m_out = m_i[:, None] & m_j[None, :] & (o_i[:, None] <= o_j[None, :])
    p_out += load_problem(p_problems, i_q, 9)
    tl.store(p_out + o_i[:, None] * count + o_j[None, :], b_out, mask=m_out)
    tl.store(p_out + o_j[None, :] * count + o_i[:, None], b_out, mask=m_out)


@triton.jit
def nearest_kernel(
    p_labels,
    p_centers,
    p_means,
    p_squares,
    p_any,
    p_rows,
    p_steps,
    p_scales,
    p_parts,
    p_problems,
    p_blocks,
    BLOCK: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Labels of BLOCK points: argmin_c ||center_c||^2 - 2 x . center_c, both less the mean of the centroids."""
    p_block = p_blocks + tl.program_id(0).to(tl.int64) * 2
    i_q, o_i = tl.load(p_block), tl.load(p_block + 1) + tl.arange(0, BLOCK)
    m_i = o_i < load_problem(p_problems, i_q, 2)
    k, width = load_problem(p_problems, i_q, 4), load_problem(p_problems, i_q, 6)
    p_centers += load_problem(p_problems, i_q, 8)
    p_squares += load_problem(p_problems, i_q, 5)
    b_best = tl.full([BLOCK], float("inf"), dtype=tl.float32)
    b_label = tl.zeros([BLOCK], dtype=tl.int64)
    for c in range(0, k, BLOCK_C):
        o_c = c + tl.arange(0, BLOCK_C)
        m_c = o_c < k
        b_dot = tl.zeros([BLOCK, BLOCK_C], dtype=tl.float32)
        for i_part in range(load_problem(p_problems, i_q, 0), load_problem(p_problems, i_q, 1)):
            row, columns, column = load_part(p_parts, i_part)
            b_scale = load_scales(p_scales, row + o_i, m_i)
            p_mean = p_means + load_problem(p_problems, i_q, 7) + column
            for o in range(0, columns, BLOCK_K):
                o_k = o + tl.arange(0, BLOCK_K)
                m_k = o_k < columns
                b_x = load_points(p_any, p_rows, p_steps, row + o_i, m_i, o_k, m_k).to(tl.float32)
                b_x = b_x * b_scale[:, None] - tl.load(p_mean + o_k, mask=m_k, other=0.0)[None, :]
                p_c = p_centers + o_c[None, :] * width + (column + o_k)[:, None]
                b_c = tl.load(p_c, mask=m_c[None, :] & m_k[:, None], other=0.0)
                b_dot += tl.dot(b_x, b_c, input_precision="ieee")
        b_square = tl.load(p_squares + o_c, mask=m_c, other=float("inf"))
        b_score = b_square[None, :] - 2.0 * b_dot
        b_least, b_which = tl.min(b_score, axis=1, return_indices=True)
        b_label = tl.where(b_least < b_best, c + b_which, b_label)
        b_best = tl.minimum(b_least, b_best)
    tl.store(p_labels + load_problem(p_problems, i_q, 3) + o_i, b_label, mask=m_i)


@triton.jit
def own_kernel(
    p_sqdist,
    p_labels,
    p_centroids,
    p_any,
    p_rows,
    p_steps,
    p_scales,
    p_parts,
    p_problems,
    p_blocks,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """||x - centroid||^2 of BLOCK points and the centroids of their labels, summed from the differences."""
    p_block = p_blocks + tl.program_id(0).to(tl.int64) * 2
    i_q, o_i = tl.load(p_block), tl.load(p_block + 1) + tl.arange(0, BLOCK)
    m_i = o_i < load_problem(p_problems, i_q, 2)
    o_point = load_problem(p_problems, i_q, 3) + o_i
    b_label = tl.load(p_labels + o_point, mask=m_i, other=0)
    p_own = p_centroids + load_problem(p_problems, i_q, 8) + b_label * load_problem(p_problems, i_q, 6)
    b_total = tl.zeros([BLOCK], dtype=tl.float64)
    for i_part in range(load_problem(p_problems, i_q, 0), load_problem(p_problems, i_q, 1)):
        row, columns, column = load_part(p_parts, i_part)
        b_scale = load_scales(p_scales, row + o_i, m_i)
        for o in range(0, columns, BLOCK_K):
            o_k = o + tl.arange(0, BLOCK_K)
            m_k = o_k < columns
            b_x = load_points(p_any, p_rows, p_steps, row + o_i, m_i, o_k, m_k).to(tl.float32) * b_scale[:, None]
            b_c = tl.load(p_own[:, None] + column + o_k[None, :], mask=m_i[:, None] & m_k[None, :], other=0.0)
            b_total += tl.sum((b_x - b_c) * (b_x - b_c), axis=1).to(tl.float64)
    tl.store(p_sqdist + o_point, b_total.to(tl.float32), mask=m_i)


@triton.jit
def update_kernel(
    p_centroids,
    p_counts,
    p_order,
    p_starts,
    p_weights,
    p_any,
    p_rows,
    p_steps,
    p_scales,
    p_parts,
    p_problems,
    p_pieces,
    BLOCK_K: tl.constexpr,
):
    """Some columns of one centroid: its members, order[starts[c]:starts[c + 1]], one after the other, in float64."""
    p_piece = p_pieces + tl.program_id(0).to(tl.int64) * 4
    i_q, cluster, i_part = tl.load(p_piece), tl.load(p_piece + 1), tl.load(p_piece + 2)
    o_k = tl.load(p_piece + 3) + tl.arange(0, BLOCK_K)
    row, columns, column = load_part(p_parts, i_part)
    m_k = o_k < columns
    point, centroid = load_problem(p_problems, i_q, 3), load_problem(p_problems, i_q, 5) + cluster
    b_sum = tl.zeros([BLOCK_K], dtype=tl.float64)
    b_total = tl.zeros([1], dtype=tl.float64)
    for o in range(tl.load(p_starts + centroid), tl.load(p_starts + centroid + 1)):
        i_point = tl.load(p_order + o)
        i_row = row + i_point - point
        weight = tl.load(p_weights + i_point)
        p_x = tl.load(p_rows + i_row).to(p_any.dtype) + o_k * tl.load(p_steps + i_row)
        b_x = tl.load(p_x, mask=m_k, other=0.0).to(tl.float64)
        if p_scales is not None:
            b_x = b_x * tl.load(p_scales + i_row).to(tl.float64)
        b_sum += weight * b_x
        b_total += weight
    # a cluster without weight has a sum of zero
    b_mean = b_sum / tl.where(b_total > 0.0, b_total, 1.0)
    p_out = p_centroids + load_problem(p_problems, i_q, 8) + cluster * load_problem(p_problems, i_q, 6) + column
    tl.store(p_out + o_k, b_mean.to(tl.float32), mask=m_k)
    o_one = tl.arange(0, 1)
    tl.store(p_counts + centroid + o_one, b_total, mask=tl.load(p_piece + 3) + column + o_one == 0)


def gram_launch(t, out, means):
    """Inner products of all problems into `out`, flat float32; float32 points less `means`, flat, of each column."""
    config = select("points_gram", t.points.dtype)
    size = config.block_r
    tiles = [(q, i, j) for q, n in enumerate(t.counts) for i in range(0, n, size) for j in range(i, n, size)]
    arguments = {
        "p_out": out,
        "p_means": means,
        **t.arguments(),
        "p_tiles": torch.tensor(tiles).to(out.device),
        "BLOCK": size,
        "BLOCK_K": config.block,
        "CHUNK": CHUNK,
        "UPCAST": INTERPRET,
    }
    return Launch(gram_kernel, (len(tiles), 1, 1), arguments, config)


def nearest_launch(t, labels, centers, means, squares):
    config = select("nearest", t.points.dtype)
    blocks = t.blocks(config.block_r)
    arguments = {
        "p_labels": labels,
        "p_centers": centers,
        "p_means": means,
        "p_squares": squares,
        **t.arguments(),
        "p_blocks": blocks,
        "BLOCK": config.block_r,
        "BLOCK_C": config.block_r,
        "BLOCK_K": config.block,
    }
    return Launch(nearest_kernel, (len(blocks), 1, 1), arguments, config)


def own_launch(t, sqdist, labels, centroids):
    config = select("own", t.points.dtype)
    blocks = t.blocks(config.block_r)
    arguments = {
        "p_sqdist": sqdist,
        "p_labels": labels,
        "p_centroids": centroids,
        **t.arguments(),
        "p_blocks": blocks,
        "BLOCK": config.block_r,
        "BLOCK_K": config.block,
    }
    return Launch(own_kernel, (len(blocks), 1, 1), arguments, config)


def update_launch(t, centroids, counts, order, starts, weights):
    config = select("update", t.points.dtype)
    pieces = []
    part = 0
    for q, (k, of_problem) in enumerate(zip(t.ks, t.widths, strict=True)):
        begins = [(part + p, b) for p, width in enumerate(of_problem) for b in range(0, width, config.block)]
        pieces += [(q, c, p, b) for c in range(k) for p, b in begins]
        part += len(of_problem)
    arguments = {
        "p_centroids": centroids,
        "p_counts": counts,
        "p_order": order,
        "p_starts": starts,
        "p_weights": weights,
        **t.arguments(),
        "p_pieces": torch.tensor(pieces).to(centroids.device),
        "BLOCK_K": config.block,
    }
    return Launch(update_kernel, (len(pieces), 1, 1), arguments, config)
