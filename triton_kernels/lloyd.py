"""k-means on inner products: greedy k-means++ and Lloyd's iterations, a program for each run of each problem.

All points of a problem are one vector, so there is no reduction across programs. Sums are float64.
"""

import torch
import triton
import triton.language as tl

from .common import Launch
from .configs import CONFIGS

# numbers in a row of `clouds`: points, k, trials, the first point, inner product and centroid among all
CLOUD = tl.constexpr(6)
MOST_POINTS = max(config.block for config in CONFIGS if config.op == "lloyd")


@triton.jit
def draw(b_upto, total, share):
    """The first index whose running sum exceeds `share` of the total."""
    first = tl.sum((b_upto <= share * total).to(tl.int32), axis=0)
    last = tl.sum((b_upto < total).to(tl.int32), axis=0)
    return tl.minimum(first, last)


@triton.jit
def nearer(p_gram, b_nearest, b_square, i_point, count, o_n, m_n):
    """Squared distances to the nearest seed if point i were one too."""
    b_row = tl.load(p_gram + i_point.to(tl.int64) * count + o_n, mask=m_n, other=0.0).to(tl.float64)
    own = tl.sum(tl.where(o_n == i_point, b_square, 0.0), axis=0)
    return tl.minimum(b_nearest, tl.maximum(b_square + own - 2.0 * b_row, 0.0))


@triton.jit(do_not_specialize=["runs", "draws"])
def seed_kernel(p_seeds, p_gram, p_weights, p_uniforms, p_clouds, runs, draws, BLOCK: tl.constexpr):
    """One run of greedy k-means++."""
    i_q, i_run = (tl.program_id(0) // runs).to(tl.int64), (tl.program_id(0) % runs).to(tl.int64)
    p_cloud = p_clouds + i_q * CLOUD
    count, k, trials = tl.load(p_cloud), tl.load(p_cloud + 1), tl.load(p_cloud + 2)
    p_gram += tl.load(p_cloud + 4)
    p_seeds += tl.load(p_cloud + 5) * runs + i_run * k
    p_uniforms += i_run * draws
    o_n = tl.arange(0, BLOCK)
    m_n = o_n < count
    b_weight = tl.load(p_weights + tl.load(p_cloud + 3) + o_n, mask=m_n, other=0.0)
    b_square = tl.load(p_gram + o_n * (count + 1), mask=m_n, other=0.0).to(tl.float64)
    b_upto = tl.cumsum(b_weight, axis=0)
    i_seed = draw(b_upto, tl.max(b_upto, axis=0), tl.load(p_uniforms))
    tl.store(p_seeds, i_seed.to(tl.int64))
    b_nearest = tl.where(m_n, float("inf"), 0.0).to(tl.float64)
    b_nearest = nearer(p_gram, b_nearest, b_square, i_seed, count, o_n, m_n)
    for c in range(1, k):
        b_upto = tl.cumsum(b_weight * b_nearest, axis=0)
        total = tl.max(b_upto, axis=0)
        least = total + float("inf")
        best = i_seed
        for t in range(trials):
            i_point = draw(b_upto, total, tl.load(p_uniforms + 1 + (c - 1) * trials + t))
            left = tl.sum(b_weight * nearer(p_gram, b_nearest, b_square, i_point, count, o_n, m_n), axis=0)
            best = tl.where(left < least, i_point, best)
            least = tl.minimum(left, least)
        b_nearest = nearer(p_gram, b_nearest, b_square, best, count, o_n, m_n)
        tl.store(p_seeds + c, best.to(tl.int64))


@triton.jit
def nearest_centroids(p_sums, p_numbers, b_square, k, o_n, BLOCK: tl.constexpr):
    """(labels, squared distances): argmin_c q_c - 2 S_ic / W_c, and that plus G_ii."""
    b_best = tl.full([BLOCK], float("inf"), dtype=tl.float64)
    b_label = tl.zeros([BLOCK], dtype=tl.int64)
    for c in range(k):
        b_sum = tl.load(p_sums + c * BLOCK + o_n)
        b_score = tl.load(p_numbers + k + c) - 2.0 / tl.load(p_numbers + c) * b_sum
        b_label = tl.where(b_score < b_best, c, b_label)
        b_best = tl.minimum(b_score, b_best)
    return b_label, tl.maximum(b_best + b_square, 0.0)


@triton.jit
def reseed(b_member, b_sqdist, b_weight, k, o_n, BLOCK: tl.constexpr):
    """Members, after every cluster without one that has weight took the farthest point that can be spared."""
    b_size = tl.zeros([BLOCK], dtype=tl.int32)
    for c in range(k):
        m_c = b_member == c
        b_size = tl.where(m_c, tl.sum((m_c & (b_weight > 0.0)).to(tl.int32), axis=0), b_size)
    for c in range(k):
        if tl.sum(((b_member == c) & (b_weight > 0.0)).to(tl.int32), axis=0) == 0:
            farthest = tl.argmax(tl.where((b_weight > 0.0) & (b_size > 1), b_sqdist, -1.0), axis=0)
            left = tl.sum(tl.where(o_n == farthest, b_member, 0), axis=0)
            b_size = tl.where(b_member == left, b_size - 1, b_size)
            b_size = tl.where(o_n == farthest, 1, b_size)
            b_member = tl.where(o_n == farthest, c, b_member)
            b_sqdist = tl.where(o_n == farthest, 0.0, b_sqdist)
    return b_member


@triton.jit
def move_points(p_sums, p_gram, b_member, b_old, b_weight, count, o_n, m_n, BLOCK: tl.constexpr):
    """S of the members, from what it was: w_j G_j goes from one row to another for each point j that moves."""
    m_move = m_n & (b_member != b_old) & (b_weight != 0.0)
    moves = tl.sum(m_move.to(tl.int32), axis=0)
    for _ in range(moves):
        j = tl.argmax(m_move.to(tl.int32), axis=0)
        m_move = m_move & (o_n != j)
        weight = tl.sum(tl.where(o_n == j, b_weight, 0.0), axis=0)
        source, target = tl.sum(tl.where(o_n == j, b_old, 0), axis=0), tl.sum(tl.where(o_n == j, b_member, 0), axis=0)
        b_row = weight * tl.load(p_gram + j.to(tl.int64) * count + o_n, mask=m_n, other=0.0).to(tl.float64)
        if source >= 0:
            p_source = p_sums + source * BLOCK + o_n
            tl.store(p_source, tl.load(p_source) - b_row)
        p_target = p_sums + target * BLOCK + o_n
        tl.store(p_target, tl.load(p_target) + b_row)


@triton.jit(do_not_specialize=["runs", "max_iterations"])
def lloyd_kernel(
    p_labels,
    p_members,
    p_iterations,
    p_inertia,
    p_sums,
    p_numbers,
    p_gram,
    p_weights,
    p_seeds,
    p_first_labels,
    p_first_sqdist,
    p_tolerances,
    p_clouds,
    runs,
    max_iterations,
    BLOCK: tl.constexpr,
):
    """One run, from seeds or, where there are none, from labels and distances to centroids that are anywhere.

    p_sums is scratch for S (k, BLOCK) of each run, p_numbers for W, q, and those of the iteration before with the
    inner products of old and new centroids: 5 k.
    """
    i_q, i_run = (tl.program_id(0) // runs).to(tl.int64), (tl.program_id(0) % runs).to(tl.int64)
    p_cloud = p_clouds + i_q * CLOUD
    count, k, point, centroid = tl.load(p_cloud), tl.load(p_cloud + 1), tl.load(p_cloud + 3), tl.load(p_cloud + 5)
    p_gram += tl.load(p_cloud + 4)
    p_sums += (centroid * runs + i_run * k) * BLOCK
    p_numbers += (centroid * runs + i_run * k) * 5
    o_n = tl.arange(0, BLOCK)
    m_n = o_n < count
    b_weight = tl.load(p_weights + point + o_n, mask=m_n, other=0.0)
    b_square = tl.load(p_gram + o_n * (count + 1), mask=m_n, other=0.0).to(tl.float64)
    trace, total = tl.sum(b_square, axis=0), 0.0 * tl.sum(b_square, axis=0)
    for i in range(count):
        total += tl.sum(tl.load(p_gram + i * count + o_n, mask=m_n, other=0.0).to(tl.float64), axis=0)
    least_shift = tl.load(p_tolerances + i_q) * tl.maximum((trace - total / count) / count, 0.0)
    for c in range(k):
        if p_seeds is None:
            b_row = tl.zeros([BLOCK], dtype=tl.float64)
            own = trace
        else:
            seed = tl.load(p_seeds + centroid * runs + i_run * k + c)
            b_row = tl.load(p_gram + seed * count + o_n, mask=m_n, other=0.0).to(tl.float64)
            own = tl.load(p_gram + seed * (count + 1)).to(tl.float64)
        tl.store(p_sums + c * BLOCK + o_n, b_row)
        tl.store(p_numbers + c, 1.0)
        tl.store(p_numbers + k + c, own)
    b_old = tl.full([BLOCK], -1, dtype=tl.int64)
    b_old_label = b_old
    b_label = b_old
    b_sqdist = b_square
    iteration = 0
    # 1: the centroids moved too little; 2: no label changed
    state = 0
    while (state == 0) & (iteration < max_iterations):
        tl.debug_barrier()
        b_label, b_sqdist = nearest_centroids(p_sums, p_numbers, b_square, k, o_n, BLOCK)
        if p_seeds is None:  # noqa: SIM102, the one is known to the compiler, the other to the device
            if iteration == 0:
                b_label = tl.load(p_first_labels + point + o_n, mask=m_n, other=0)
                b_sqdist = tl.load(p_first_sqdist + point + o_n, mask=m_n, other=0.0)
        b_label = tl.where(m_n, b_label, -1)
        iteration += 1
        if tl.sum((b_label != b_old_label).to(tl.int32), axis=0) == 0:
            state = 2
        else:
            b_member = reseed(b_label, b_sqdist, b_weight, k, o_n, BLOCK)
            for c in range(k):
                b_sum = tl.load(p_sums + c * BLOCK + o_n)
                cross = tl.sum(tl.where(b_member == c, b_weight * b_sum, 0.0), axis=0)
                tl.store(p_numbers + 2 * k + c, tl.load(p_numbers + c))
                tl.store(p_numbers + 3 * k + c, tl.load(p_numbers + k + c))
                tl.store(p_numbers + 4 * k + c, cross)
                if iteration == 1:
                    tl.store(p_sums + c * BLOCK + o_n, tl.zeros([BLOCK], dtype=tl.float64))
            tl.debug_barrier()
            move_points(p_sums, p_gram, b_member, b_old, b_weight, count, o_n, m_n, BLOCK)
            tl.debug_barrier()
            shift = 0.0 * trace
            from_first = 0.0 * trace
            for c in range(k):
                m_c = b_member == c
                weight = tl.sum(tl.where(m_c, b_weight, 0.0), axis=0)
                b_sum = tl.load(p_sums + c * BLOCK + o_n)
                square = tl.sum(tl.where(m_c, b_weight * b_sum, 0.0), axis=0) / (weight * weight)
                old_weight, old_square = tl.load(p_numbers + 2 * k + c), tl.load(p_numbers + 3 * k + c)
                cross = tl.load(p_numbers + 4 * k + c)
                shift += tl.maximum(square + old_square - 2.0 * cross / (weight * old_weight), 0.0)
                off = tl.sum(tl.where(b_label == c, b_weight * (b_sqdist - b_square), 0.0), axis=0)
                from_first += off / weight + square
                tl.store(p_numbers + c, weight)
                tl.store(p_numbers + k + c, square)
            if p_seeds is None:  # noqa: SIM102, as above
                if iteration == 1:
                    shift = tl.maximum(from_first, 0.0)
                    if tl.sum((b_member != b_label).to(tl.int32), axis=0) > 0:
                        shift = float("inf") + shift
            b_old = b_member
            b_old_label = b_label
            if shift <= least_shift:
                state = 1
    tl.debug_barrier()
    if state != 2:
        b_label, b_sqdist = nearest_centroids(p_sums, p_numbers, b_square, k, o_n, BLOCK)
    i_out = i_q * runs + i_run
    tl.store(p_labels + point * runs + i_run * count + o_n, b_label, mask=m_n)
    tl.store(p_members + point * runs + i_run * count + o_n, b_old, mask=m_n)
    tl.store(p_iterations + i_out, iteration.to(tl.int64))
    tl.store(p_inertia + i_out, tl.sum(b_weight * b_sqdist, axis=0))


def clouds(counts, ks, trials):
    """The table `p_clouds`."""
    point = product = centroid = 0
    out = []
    for n, k, t in zip(counts, ks, trials, strict=True):
        out.append((n, k, t, point, product, centroid))
        point, product, centroid = point + n, product + n * n, centroid + k
    return torch.tensor(out)


def block_of(op, counts):
    """The row of configs.py whose vector holds all points of every problem."""
    rows = [config for config in CONFIGS if config.op == op and config.block >= max(counts)]
    return min(rows, key=lambda config: config.block)


def seed_launch(seeds, gram, weights, uniforms, table, counts):
    """Seeds (sum of k * runs) of all problems: flat inner products and weights, uniforms (runs, draws)."""
    config = block_of("seed", counts)
    runs, draws = uniforms.shape
    arguments = {
        "p_seeds": seeds,
        "p_gram": gram,
        "p_weights": weights,
        "p_uniforms": uniforms,
        "p_clouds": table,
        "runs": runs,
        "draws": draws,
        "BLOCK": config.block,
    }
    return Launch(seed_kernel, (len(counts) * runs, 1, 1), arguments, config)


def lloyd_launch(outputs, gram, weights, seeds, first, tolerances, table, counts, ks, runs, max_iterations):
    """`outputs`: labels and members (sum of n * runs), iterations and inertia (problems, runs)."""
    config = block_of("lloyd", counts)
    labels, members, iterations, inertia = outputs
    arguments = {
        "p_labels": labels,
        "p_members": members,
        "p_iterations": iterations,
        "p_inertia": inertia,
        "p_sums": weights.new_empty(sum(ks) * runs * config.block),
        "p_numbers": weights.new_empty(sum(ks) * runs * 5),
        "p_gram": gram,
        "p_weights": weights,
        "p_seeds": seeds,
        "p_first_labels": first[0],
        "p_first_sqdist": first[1],
        "p_tolerances": tolerances,
        "p_clouds": table,
        "runs": runs,
        "max_iterations": max_iterations,
        "BLOCK": config.block,
    }
    return Launch(lloyd_kernel, (len(counts) * runs, 1, 1), arguments, config)
