"""The C++ backend: addresses and strides go to `lorakern._cpu`, which knows nothing of torch.

It uses the OpenMP runtime that torch has loaded and as many threads as `torch.get_num_threads()` says. Calls with
nothing unusual about them do not come here: `lorakern.ops._fast` is their shorter way to the same kernels.
"""

from itertools import accumulate, pairwise

import torch

from lorakern.errors import LorakernError

try:
    from lorakern import _cpu

    _MISSING = None
except ImportError as error:
    _cpu = None
    _MISSING = f"the C++ module was not built ({error}); install from source with a C++17 compiler: pip install ."

NAME = "cpu"
VALIDATES = True  # index and rank values, and that y shares no memory with an input
PROBES = 8  # columns of what `sketch` and `lines` multiply by
_DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_DTYPES_AND_DOUBLE = _DTYPES | {torch.float64: 3}


def missing():
    """None, or why the C++ module cannot be used."""
    return _MISSING


def _call(function, *arguments):
    try:
        return function(*arguments, torch.get_num_threads())
    except ValueError as error:
        raise LorakernError(str(error)) from None


def all_finite(tensor):
    """Whether a contiguous tensor holds neither NaN nor infinity; on the calling thread alone."""
    return _cpu.all_finite(tensor.data_ptr(), _DTYPES_AND_DOUBLE[tensor.dtype], tensor.numel())


def _rows(tensor):
    """A 2-D tensor whose last dimension is contiguous: itself, or a copy."""
    return tensor if tensor.stride(1) == 1 or tensor.shape[1] <= 1 else tensor.contiguous()


def _weights(slices):
    return [(w.data_ptr(), w.stride(0), w.stride(1), w.shape[1]) for w in slices]


def _indices(indices):
    return indices.data_ptr(), indices.element_size(), indices.stride(0), indices.stride(1)


def _sizes(dtype, indices, weight, r_max, d_in):
    if dtype not in _DTYPES:
        raise LorakernError(
            f"the cpu backend takes float32, float16 or bfloat16; got {dtype} (reference takes float64)"
        )
    tokens, choices = indices.shape
    return _DTYPES[dtype], tokens, choices, weight.shape[0], r_max, d_in


def _routing(scale, ranks, gates, order, starts, r_max):
    """Scale, ranks, gates and plan in the layout of the kernels: (their addresses, what must stay alive meanwhile)."""
    if ranks is not None and ranks.dtype != torch.int32:
        ranks = ranks.clamp(-1, r_max + 1).to(torch.int32)  # out of range stays out of range: the kernel refuses it
    kept = [t if t is None or t.is_contiguous() else t.contiguous() for t in (scale, ranks, gates, order, starts)]
    return tuple(0 if t is None else t.data_ptr() for t in kept), kept


def _write(y, columns, y_offset, run):
    """Call run(address, row stride) with the filled columns of y, or with a copy of them that is then written back."""
    if y.stride(1) == 1 or y.shape[1] <= 1:
        run((y.data_ptr() + y_offset * y.element_size(), y.stride(0)))
    else:
        target = y.narrow(1, y_offset, columns)
        copy = target.contiguous()
        run((copy.data_ptr(), copy.stride(0)))
        target.copy_(copy)


def _sets(matrices):
    for matrix in matrices:
        if matrix.device.type != "cpu":
            raise LorakernError(f"the cpu backend takes tensors on the CPU; got one on {matrix.device}")
    return [(m.data_ptr(), _DTYPES_AND_DOUBLE[m.dtype], m.shape[0], *m.stride()) for m in matrices]


def _row_sets(rows, sizes):
    """(address, dtype, rows and strides of each matrix; matrices and columns of each problem; its rows)."""
    firsts, sets = [0, *accumulate(sizes)], _sets(rows)
    counts = [sum(s[2] for s in sets[first:last]) for first, last in pairwise(firsts)]
    return sets, [(size, rows[first].shape[1]) for size, first in zip(sizes, firsts, strict=False)], counts


def gram(rows, sizes):
    sets, problems, counts = _row_sets(rows, sizes)
    out = [torch.empty(count, count, dtype=torch.float64) for count in counts]
    _call(_cpu.gram, sets, problems, [o.data_ptr() for o in out])
    return out


def sketch(rows, sizes, probes):
    sets, problems, counts = _row_sets(rows, sizes)
    out = [torch.empty(count, PROBES + 1, dtype=torch.float64) for count in counts]
    _call(_cpu.sketch, sets, problems, [p.data_ptr() for p in probes], [o.data_ptr() for o in out])
    return out


def lines(rows, sizes, products, firsts, factors, allowed, ratios, steps):
    sets, problems, _ = _row_sets(rows, sizes)
    out = torch.empty(len(sizes), 6, dtype=torch.float64)
    products, factors = [p.data_ptr() for p in products], [f.data_ptr() for f in factors]
    ratios = [r.data_ptr() if len(r) else 0 for r in ratios]
    arguments = list(zip(products, firsts, factors, allowed, ratios, steps, strict=True))
    _call(_cpu.lines, sets, problems, arguments, out.data_ptr())
    return out


def combine(out, rows, sizes, factors):
    sets, problems, _ = _row_sets(rows, sizes)
    _call(_cpu.combine, sets, problems, [f.data_ptr() for f in factors], _sets(out))


def _points(rows, blocks, parts, scales):
    """The first three arguments of the clustering kernels, the points of each problem, and what must stay alive."""
    if any(tensor.dtype not in _DTYPES for tensor in rows):
        raise LorakernError("the cpu backend takes points of float32, float16 or bfloat16 (reference takes float64)")
    sets, sizes, counts = _row_sets(rows, blocks)
    firsts = list(accumulate(parts, initial=0))[:-1]
    kept = [scale.contiguous() for scale in scales]
    problems = [(count, s.data_ptr() if len(s) else 0) for count, s in zip(parts, kept, strict=True)]
    return (sets, sizes, problems), [counts[first] for first in firsts], kept


def _addresses(tensors):
    return [t.data_ptr() if len(t) else 0 for t in tensors]


def points_gram(rows, blocks, parts, scales):
    points, counts, _kept = _points(rows, blocks, parts, scales)
    out = [torch.empty(count, count) for count in counts]
    _call(_cpu.points_gram, *points, _addresses(out))
    return out


def kmeans_assign(rows, blocks, parts, scales, centroids):
    points, counts, _kept = _points(rows, blocks, parts, scales)
    labels, sqdist = [torch.empty(n, dtype=torch.int64) for n in counts], [torch.empty(n) for n in counts]
    sizes = [len(c) for c in centroids]
    none = [0] * len(counts)
    given = zip(_addresses(centroids), sizes, _addresses(labels), _addresses(sqdist), none, strict=True)
    _call(_cpu.kmeans_assign, *points, list(given))
    return labels, sqdist


def kmeans_distances(rows, blocks, parts, scales, centroids):
    points, counts, _kept = _points(rows, blocks, parts, scales)
    out = [torch.empty(n, len(c)) for n, c in zip(counts, centroids, strict=True)]
    given = [(c.data_ptr(), len(c), 0, 0, o.data_ptr()) for c, o in zip(centroids, out, strict=True)]
    _call(_cpu.kmeans_assign, *points, given)
    return out


def kmeans_update(rows, blocks, parts, scales, members, labels, weights, ks):
    points, _, _kept = _points(rows, blocks, parts, scales)
    firsts = list(accumulate(blocks, initial=0))
    part_columns = [rows[first].shape[1] for first in firsts[:-1]]
    columns = [sum(part_columns[a:b]) for a, b in pairwise(accumulate(parts, initial=0))]
    centroids = [torch.empty(k, d) for k, d in zip(ks, columns, strict=True)]
    counts, inertia = [torch.empty(k, dtype=torch.float64) for k in ks], torch.empty(len(ks), dtype=torch.float64)
    given = zip(
        _addresses(members),
        _addresses(labels),
        _addresses(weights),
        ks,
        _addresses(centroids),
        _addresses(counts),
        [inertia.data_ptr() + 8 * i for i in range(len(ks))],
        strict=True,
    )
    _call(_cpu.kmeans_update, *points, list(given))
    return centroids, counts, inertia


def _clouds(grams, weights, ks):
    return list(zip(_addresses(grams), _addresses(weights), map(len, grams), ks, strict=True))


def kmeans_seed(grams, weights, ks, trials, uniforms):
    seeds = [torch.empty(len(uniforms), k, dtype=torch.int64) for k in ks]
    sizes = len(uniforms), uniforms.shape[1], trials
    _call(_cpu.kmeans_seed, _clouds(grams, weights, ks), uniforms.data_ptr(), *sizes, _addresses(seeds))
    return seeds


def kmeans_lloyd(grams, weights, ks, seeds, first_labels, first_sqdist, max_iterations, tolerances):
    labels, members = ([torch.empty(len(g), dtype=torch.int64) for g in grams] for _ in range(2))
    iterations, sqdist = torch.empty(len(ks), dtype=torch.int64), [s.double() for s in first_sqdist]
    given = zip(
        _addresses(seeds),
        [max(1, len(s)) for s in seeds],
        _addresses(first_labels),
        _addresses(sqdist),
        _addresses(labels),
        _addresses(members),
        [iterations.data_ptr() + 8 * i for i in range(len(ks))],
        strict=True,
    )
    _call(_cpu.kmeans_lloyd, _clouds(grams, weights, ks), list(given), max_iterations, tolerances)
    return labels, members, iterations


def plan(indices, num_slots):
    order = torch.empty(indices.numel(), dtype=torch.int32)
    starts = torch.empty(num_slots + 1, dtype=torch.int32)
    try:
        _cpu.plan(_indices(indices), *indices.shape, num_slots, order.data_ptr(), starts.data_ptr())
    except ValueError as error:
        raise LorakernError(str(error)) from None
    return order, starts


def shrink(h, x, A, indices, ranks, order, starts):
    x = _rows(x)
    _, r_max, d_in = A[0].shape
    routing, _kept = _routing(None, ranks, None, order, starts, r_max)
    sizes = _sizes(x.dtype, indices, A[0], r_max, d_in)
    _call(_cpu.shrink, h.data_ptr(), (x.data_ptr(), x.stride(0)), _weights(A), sizes, _indices(indices), routing)


def expand(y, h, B, indices, scale, ranks, gates, order, starts, y_offset, accumulate, packed=False):
    r_max = B[0].shape[2]
    routing, _kept = _routing(scale, ranks, gates, order, starts, r_max)
    sizes, weights = _sizes(y.dtype, indices, B[0], r_max, 0), _weights(B)

    def run(target):
        _call(_cpu.expand, target, h.data_ptr(), weights, sizes, _indices(indices), routing, accumulate, packed)

    _write(y, sum(w[3] for w in weights), y_offset, run)


def bgmv(y, x, A, B, indices, scale, ranks, gates, order, starts, y_offset, accumulate, packed=False):
    x = _rows(x)
    _, r_max, d_in = A[0].shape
    routing, _kept = _routing(scale, ranks, gates, order, starts, r_max)
    sizes, weights = _sizes(x.dtype, indices, A[0], r_max, d_in), _weights(B)
    source = x.data_ptr(), x.stride(0)

    def run(target):
        _call(_cpu.bgmv, target, source, _weights(A), weights, sizes, _indices(indices), routing, accumulate, packed)

    _write(y, sum(w[3] for w in weights), y_offset, run)


def _routers(router_A):
    return [(a.data_ptr(), 0, a.stride(0), a.shape[0]) for a in router_A]


def attention_gates(gates, x, h, router_A, cores, indices, ranks):
    x = _rows(x)
    r_max = cores[0].shape[2]
    routing, _kept = _routing(None, ranks, None, None, None, r_max)
    sizes, source = _sizes(x.dtype, indices, cores[0], r_max, x.shape[1]), (x.data_ptr(), x.stride(0))
    weights = _routers(router_A), _weights(cores)
    _call(_cpu.attention_gates, gates.data_ptr(), source, h.data_ptr(), *weights, sizes, _indices(indices), routing)


def routed_bgmv(y, x, A, B, router_A, cores, indices, scale, ranks, order, starts, y_offset, accumulate):
    x = _rows(x)
    _, r_max, d_in = A[0].shape
    routing, _kept = _routing(scale, ranks, None, order, starts, r_max)
    sizes, source = _sizes(x.dtype, indices, A[0], r_max, d_in), (x.data_ptr(), x.stride(0))
    weights = _weights(A), _weights(B), _routers(router_A), _weights(cores)

    def run(target):
        _call(_cpu.routed_bgmv, target, source, *weights, sizes, _indices(indices), routing, accumulate)

    _write(y, sum(b.shape[1] for b in B), y_offset, run)


def backward(dy, x, A, B, indices, scale, ranks, gates, order, starts):
    dy, x = _rows(dy), _rows(x)
    _, r_max, d_in = A[0].shape
    routing, _kept = _routing(scale, ranks, gates, order, starts, r_max)
    dx = torch.empty(x.shape, dtype=x.dtype)
    dA = [torch.empty(a.shape, dtype=a.dtype) for a in A]
    dB = [torch.empty(b.shape, dtype=b.dtype) for b in B]
    dscale = None if scale is None else torch.zeros(scale.shape, dtype=torch.float32)
    dgates = None if gates is None else torch.zeros(gates.shape, dtype=torch.float32)
    _call(
        _cpu.backward,
        (dy.data_ptr(), dy.stride(0)),
        (x.data_ptr(), x.stride(0)),
        _weights(A),
        _weights(B),
        _sizes(x.dtype, indices, A[0], r_max, d_in),
        _indices(indices),
        routing,
        dx.data_ptr(),
        [d.data_ptr() for d in dA],
        [d.data_ptr() for d in dB],
        0 if dscale is None else dscale.data_ptr(),
        0 if dgates is None else dgates.data_ptr(),
    )
    return dx, dA, dB, dscale, dgates
