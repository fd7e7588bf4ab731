"""The Triton backend: any GPU from sm_80 on, or CPU tensors in Triton's interpreter (for tests)."""

import functools
from importlib.util import find_spec

import torch

from lorakern.backends import reference
from lorakern.errors import LorakernError

NAME = "triton"
VALIDATES = False


def missing():
    """None, or why this backend cannot run here. Triton itself is imported by the first kernel, not here."""
    if find_spec("triton") is None:
        return "triton is not installed: pip install triton"
    if not torch.cuda.is_available() and not _kernels().INTERPRET:
        return "needs a CUDA device or TRITON_INTERPRET=1"
    return None


def plan(indices, num_slots):
    """order (T*K,) and starts (num_slots + 1,) in one launch; by plain torch where that is too many to count."""
    kernels = _kernels()
    if kernels.countable(indices.numel(), num_slots) and (indices.is_cuda or kernels.INTERPRET):
        return kernels.plan(indices, num_slots)
    return reference.plan(indices, num_slots)


def shrink(h, x, A, indices, ranks, order, starts):
    """h[s, t, k, :r] = A[s][i, :r] @ x[t] with i = indices[t, k]; zero beyond the rank and without an adapter."""
    _check(x)
    if order is None:
        order, starts = plan(indices, A[0].shape[0])
    _kernels().shrink(h, x, A, indices.shape[1], ranks, order, starts, _shared(x.device))


def expand(y, h, B, indices, scale, ranks, gates, order, starts, y_offset, accumulate):
    """y[t] (+)= sum_k gates[t, k] * scale[i] * B[i, :, :r] @ h[t, k, :r], slices side by side from y_offset."""
    _check(y)
    if order is None and indices.shape[1] == 1:
        order, starts = plan(indices, B[0].shape[0])
    columns = y.narrow(1, y_offset, sum(b.shape[1] for b in B))
    _kernels().expand(columns, h, B, indices, scale, ranks, gates, order, starts, accumulate, _shared(y.device))


def bgmv(y, x, A, B, indices, scale, ranks, gates, order, starts, y_offset, accumulate):
    """expand(y, shrink(x)), bit for bit, in two launches; one more where there is no plan."""
    _check(x)
    if order is None:
        order, starts = plan(indices, A[0].shape[0])
    columns = y.narrow(1, y_offset, sum(b.shape[1] for b in B))
    _kernels().bgmv(columns, x, A, B, indices, scale, ranks, gates, order, starts, accumulate, _shared(x.device))


def backward(dy, x, A, B, indices, scale, ranks, gates, order, starts):
    """Gradients of bgmv's sum by x, every A, every B, scale and gates (the last two None where the input is None)."""
    _check(x)
    if order is None:
        order, starts = plan(indices, A[0].shape[0])
    return _kernels().backward(dy, x, A, B, indices, scale, ranks, gates, order, starts, _shared(x.device))


def attention_gates(gates, x, h, router_A, cores, indices, ranks):
    """gates[s, t] = softmax over k of (router_A[s] x[t])^T cores[s][i] h[s, t, k] / sqrt(router rank); 0 if i is -1."""
    _check(x)
    _kernels().attention_gates(gates, x, h, router_A, cores, indices, ranks, _shared(x.device))


def routed_bgmv(y, x, A, B, router_A, cores, indices, scale, ranks, order, starts, y_offset, accumulate):
    """bgmv with the attention gates of each slice: shrink, query, gates, and an expand for every slice."""
    _check(x)
    if order is None:
        order, starts = plan(indices, A[0].shape[0])
    columns = y.narrow(1, y_offset, sum(b.shape[1] for b in B))
    given = (columns, x, A, B, router_A, cores, indices, scale, ranks, order, starts, accumulate)
    _kernels().routed_bgmv(*given, _shared(x.device))


def points_gram(rows, blocks, parts, scales):
    """X X^T of each problem; of float32 points, X less its mean."""
    _check(rows[0])
    return _kernels().points_gram(rows, blocks, parts, scales)


def kmeans_assign(rows, blocks, parts, scales, centroids):
    """Nearest centroids and squared distances; the products are float32."""
    _check(rows[0])
    return _kernels().kmeans_assign(rows, blocks, parts, scales, centroids)


def kmeans_update(rows, blocks, parts, scales, members, labels, weights, ks):
    """Means, counts and inertia: float64, but for squared distances, of 128 columns at a time."""
    _check(rows[0])
    return _kernels().kmeans_update(rows, blocks, parts, scales, members, labels, weights, ks)


def kmeans_seed(grams, weights, ks, trials, uniforms):
    """Greedy k-means++, a program for each run; points beyond what one holds go to the reference."""
    _check(grams[0])
    if max(len(g) for g in grams) > _kernels().MOST_POINTS:
        return reference.kmeans_seed(grams, weights, ks, trials, uniforms)
    return _kernels().kmeans_seed(grams, weights, ks, trials, uniforms)


def kmeans_lloyd(grams, weights, ks, *arguments):
    """Lloyd's iterations, a program for each run; points beyond what one holds go to the reference."""
    _check(grams[0])
    if max(len(g) for g in grams) > _kernels().MOST_POINTS:
        return reference.kmeans_lloyd(grams, weights, ks, *arguments)
    return _kernels().kmeans_lloyd(grams, weights, ks, *arguments)


def kmeans_distances(rows, blocks, parts, scales, centroids):
    """By plain torch."""
    return reference.kmeans_distances(rows, blocks, parts, scales, centroids)


def warmup(layers, dtype, device, **options):
    """Compile and load what bgmv, and backward if asked for, launch for these layers; the number of kernels."""
    if device.type != "cuda" and not _kernels().INTERPRET:
        raise LorakernError(f"the triton backend takes CUDA devices unless TRITON_INTERPRET=1; got {device}")
    return _kernels().warmup(layers, dtype, device, shared=_shared(device), **options)


@functools.cache
def _shared(device):
    """Bytes of shared memory that a block may use on the device."""
    if device.type != "cuda":
        return _kernels().SHARED_LIMIT
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin


def _kernels():
    """The kernels, imported at the first use: triton may be absent, and its import takes a second."""
    from lorakern import triton_kernels

    return triton_kernels


def _check(tensor):
    if tensor.dtype == torch.float64:
        raise LorakernError("the triton backend takes float16, bfloat16 or float32; got float64")
    if tensor.device.type != "cuda" and not _kernels().INTERPRET:
        raise LorakernError(f"the triton backend takes CUDA tensors unless TRITON_INTERPRET=1; got {tensor.device}")
