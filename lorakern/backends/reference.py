"""The specification: every op in a few lines of plain PyTorch, computed in float64 and rounded once at the end.

Slow on purpose and meant to be checked by eye; every other backend is tested against it.
Shapes: x (T, d_in), A[s] (slots, r_max, d_in) and B[s] (slots, d_out, r_max) for slice s, indices and gates (T, K),
ranks and scale (slots,).
"""

import torch

from lorakern.backends.reference_kmeans import (
    kmeans_assign,
    kmeans_distances,
    kmeans_lloyd,
    kmeans_seed,
    kmeans_update,
    points_gram,
)

NAME = "reference"
VALIDATES = False
__all__ = [
    "attention_gates",
    "backward",
    "bgmv",
    "expand",
    "gram",
    "kmeans_assign",
    "kmeans_distances",
    "kmeans_lloyd",
    "kmeans_seed",
    "kmeans_update",
    "lines",
    "plan",
    "points_gram",
    "routed_bgmv",
    "shrink",
    "sketch",
]


def missing():
    """The reference runs wherever PyTorch does."""
    return None


def _stacked(rows, sizes):
    """X of each problem in float64: the next `size` of the (r, columns) matrices, one below the other."""
    rest = iter(rows)
    return [torch.cat([next(rest).double() for _ in range(size)]) for size in sizes]


def gram(rows, sizes):
    """X X^T of each problem."""
    return [x @ x.T for x in _stacked(rows, sizes)]


def sketch(rows, sizes, probes):
    """[X probes, ||X_r||^2] of each problem: (R, probes + 1)."""
    return [
        torch.cat([x @ p, x.square().sum(dim=1, keepdim=True)], dim=1)
        for x, p in zip(_stacked(rows, sizes), probes, strict=True)
    ]


def lines(rows, sizes, products, firsts, factors, allowed, ratios, steps):
    """(problems, 6): ||L||^2 / probes for L = X^T products, the same of the first rows' part, the worst line, which
    one; how many elements of the further rows are not ratios times the first ones, column * first + row of one."""
    out = []
    of_problem = zip(products, firsts, factors, allowed, ratios, steps, strict=True)
    for x, (p, first, f, a, ratio, step) in zip(_stacked(rows, sizes), of_problem, strict=True):
        squares = (x.T @ p).square().mean(dim=1)
        part = (x[:first].T @ p[:first]).square().mean(dim=1)
        excess, line = torch.where(squares > 0, squares / (a + x[first:].T.square() @ f[first:]), 0.0).max(dim=0)
        wanted = ratio[:, None] * x[: len(ratio)]
        off = (x[first : first + len(ratio)] - wanted).square() > wanted.square() / 16 + step**2
        where = off.T.flatten().int().argmax() if off.any() else line.new_zeros(())
        out.append(torch.stack([squares.sum(), part.sum(), excess, line.double(), off.sum().double(), where.double()]))
    return torch.stack(out)


def combine(out, rows, sizes, factors):
    """M X of each problem, M (n, R), into out (n, columns)."""
    for y, x, m in zip(out, _stacked(rows, sizes), factors, strict=True):
        y.copy_(m @ x)


def plan(indices, num_slots):
    """Group pairs by slot: ``order`` (T*K,) and ``starts`` (num_slots + 1,), both int32."""
    slots = indices.reshape(-1).long()
    slots = torch.where((slots < 0) | (slots >= num_slots), num_slots, slots)
    by_slot, order = torch.sort(slots, stable=True)
    starts = torch.searchsorted(by_slot, torch.arange(num_slots + 1, device=slots.device))
    return order.int(), starts.int()


def _slots(indices, num_slots, ranks, r_max):
    """Yield (slot, its rank, its tokens, their choice k) for every slot that a token uses."""
    for slot in indices.unique().tolist():
        if 0 <= slot < num_slots:
            token, choice = (indices == slot).nonzero(as_tuple=True)
            yield slot, r_max if ranks is None else int(ranks[slot]), token, choice


def _factor(slot, token, choice, scale, gates):
    """gates[t, k] * scale[slot], as a (tokens, 1) column."""
    factor = torch.ones(len(token), 1, dtype=torch.float64, device=token.device)
    if scale is not None:
        factor = factor * scale[slot].double()
    return factor if gates is None else factor * gates[token, choice].double()[:, None]


def _has_adapter(indices, num_slots, ranks):
    """(T,) bool: does any choice of the token name a slot whose rank is not 0?"""
    used = (indices >= 0) & (indices < num_slots)
    if ranks is not None:
        used &= ranks[indices.clamp(0, num_slots - 1).long()] > 0
    return used.any(dim=1)


def _write(y, delta, indices, num_slots, ranks, y_offset, accumulate):
    target = y.narrow(1, y_offset, delta.shape[1])
    rows = _has_adapter(indices, num_slots, ranks).nonzero(as_tuple=True)[0]
    target[rows] = (delta[rows] + target[rows].double() if accumulate else delta[rows]).to(y.dtype)


def _shrink(x, A, indices, ranks):
    slots, r_max, _ = A[0].shape
    h = torch.zeros(len(A), *indices.shape, r_max, dtype=torch.float64, device=x.device)
    for slot, r, token, choice in _slots(indices, slots, ranks, r_max):
        for s, a in enumerate(A):
            h[s, token, choice, :r] = x[token].double() @ a[slot, :r].double().T
    return h


def _expand(h, B, indices, scale, ranks, gates):
    slots, _, r_max = B[0].shape
    delta = torch.zeros(indices.shape[0], sum(b.shape[1] for b in B), dtype=torch.float64, device=h.device)
    for slot, r, token, choice in _slots(indices, slots, ranks, r_max):
        factor = _factor(slot, token, choice, scale, gates)
        parts = [factor * (h[s, token, choice, :r].double() @ b[slot, :, :r].double().T) for s, b in enumerate(B)]
        delta.index_add_(0, token, torch.cat(parts, dim=1))
    return delta


def unpacked(B, ranks):
    """B (slots, d_out, r_max), zero beyond each rank, from slots that begin with a (d_out, rank) matrix."""

    def unpack(b):
        parts = (b[slot].flatten()[: b.shape[1] * r].view(b.shape[1], r) for slot, r in enumerate(ranks.tolist()))
        return torch.stack([torch.nn.functional.pad(part, (0, b.shape[2] - part.shape[1])) for part in parts])

    return [unpack(b) for b in B]


def shrink(h, x, A, indices, ranks, order, starts):
    """h[s, t, k, :r] = A[s][i, :r] @ x[t] with i = indices[t, k]; zero beyond the rank and without an adapter."""
    h.copy_(_shrink(x, A, indices, ranks))


def expand(y, h, B, indices, scale, ranks, gates, order, starts, y_offset, accumulate, packed=False):
    """y[t] (+)= sum_k gates[t, k] * scale[i] * B[i, :, :r] @ h[t, k, :r], slices side by side from y_offset."""
    B = unpacked(B, ranks) if packed else B
    delta = _expand(h, B, indices, scale, ranks, gates)
    _write(y, delta, indices, B[0].shape[0], ranks, y_offset, accumulate)


def bgmv(y, x, A, B, indices, scale, ranks, gates, order, starts, y_offset, accumulate, packed=False):
    """expand(y, shrink(x)), with h kept in float64."""
    B = unpacked(B, ranks) if packed else B
    delta = _expand(_shrink(x, A, indices, ranks), B, indices, scale, ranks, gates)
    _write(y, delta, indices, A[0].shape[0], ranks, y_offset, accumulate)


def _attention_gates(x, h, router_A, cores, indices, ranks):
    slots, router_rank, r_max = cores[0].shape
    logits = torch.full(h.shape[:3], -torch.inf, dtype=torch.float64, device=x.device)
    for slot, r, token, choice in _slots(indices, slots, ranks, r_max):
        for s, core in enumerate(cores):
            q = x[token].double() @ router_A[s].double().T
            keys = h[s, token, choice, :r].double() @ core[slot, :, :r].double().T
            logits[s, token, choice] = (q * keys).sum(dim=1) / router_rank**0.5
    absent = (indices < 0) | (indices >= slots)
    return logits.softmax(dim=2).masked_fill(absent, 0.0)


def attention_gates(gates, x, h, router_A, cores, indices, ranks):
    """gates[s, t] = softmax over k of (router_A[s] x[t])^T cores[s][i] h[s, t, k] / sqrt(router rank); 0 if i is -1."""
    gates.copy_(_attention_gates(x, h, router_A, cores, indices, ranks))


def routed_bgmv(y, x, A, B, router_A, cores, indices, scale, ranks, order, starts, y_offset, accumulate):
    """bgmv with the attention gates of each slice, h and gates kept in float64."""
    h = _shrink(x, A, indices, ranks)
    gates = _attention_gates(x, h, router_A, cores, indices, ranks)
    parts = [_expand(h[s : s + 1], [b], indices, scale, ranks, gates[s]) for s, b in enumerate(B)]
    _write(y, torch.cat(parts, dim=1), indices, A[0].shape[0], ranks, y_offset, accumulate)


def backward(dy, x, A, B, indices, scale, ranks, gates, order, starts):
    """Gradients of bgmv's sum by x, every A, every B, scale and gates (the last two None where the input is None)."""
    slots, r_max, _ = A[0].shape
    h = _shrink(x, A, indices, ranks)
    dx = torch.zeros(x.shape, dtype=torch.float64, device=x.device)
    dA = [torch.zeros(a.shape, dtype=torch.float64, device=x.device) for a in A]
    dB = [torch.zeros(b.shape, dtype=torch.float64, device=x.device) for b in B]
    dscale = None if scale is None else torch.zeros(slots, dtype=torch.float64, device=x.device)
    dgates = None if gates is None else torch.zeros(gates.shape, dtype=torch.float64, device=x.device)
    for slot, r, token, choice in _slots(indices, slots, ranks, r_max):
        factor = _factor(slot, token, choice, scale, gates)
        column = 0
        for s, (a, b) in enumerate(zip(A, B, strict=True)):
            g = dy[token, column : column + b.shape[1]].double()
            column += b.shape[1]
            hs, back = h[s, token, choice, :r], g @ b[slot, :, :r].double()
            dot = (hs * back).sum(dim=1)
            dx.index_add_(0, token, factor * back @ a[slot, :r].double())
            dA[s][slot, :r] = (factor * back).T @ x[token].double()
            dB[s][slot, :, :r] = (factor * g).T @ hs
            if scale is not None:
                dscale[slot] += (dot if gates is None else dot * gates[token, choice].double()).sum()
            if gates is not None:
                dgates[token, choice] += dot if scale is None else dot * scale[slot].double()
    return (
        dx.to(x.dtype),
        [d.to(x.dtype) for d in dA],
        [d.to(x.dtype) for d in dB],
        None if scale is None else dscale.to(scale.dtype),
        None if gates is None else dgates.to(gates.dtype),
    )
