"""The CUDA backend (csrc/cuda): bgmv in one launch where a token has one adapter, else in two, on the current stream.

Gradients take h = A x by the same kernels and up to five launches more; a plan is one. Up to 128 pairs are grouped by
the kernels themselves; beyond that they follow a plan, which is made here if there is none. Whatever CUDA objects to
(no code for this device, a bad launch, an earlier fault) is raised as RuntimeError.
"""

import functools
import importlib
from contextlib import contextmanager

import torch

from lorakern.backends.crossover import Layer
from lorakern.errors import LorakernError

NAME = "cuda"
VALIDATES = False  # the kernel skips what is out of range
_OLDEST = (8, 0)
_DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
# What fits the shared memory of every device from sm_80 on.
MAX_RANK = 1024
MAX_CHOICES = 256


@functools.cache
def missing():
    """None, or why this backend cannot be used here, in one line."""
    try:
        module = _module()
    except ModuleNotFoundError:
        return "the CUDA module was not built: no nvcc when lorakern was installed"
    except ImportError as error:
        return f"the CUDA module does not load: {error}"
    if torch.version.cuda is None or not torch.cuda.is_available():
        return "torch sees no CUDA device"
    if problem := module.problem():
        return f"the CUDA module does not run here: {problem}"
    newest = max(torch.cuda.get_device_capability(device) for device in range(torch.cuda.device_count()))
    if newest < _OLDEST:
        return "device sm_{}{} is older than sm_{}{}".format(*newest, *_OLDEST)
    return None


def refuses(op, layer):
    """None, or why a layer is left to another backend."""
    if op == "plan":
        return None
    if layer.dtype not in _DTYPES:
        return f"takes float16, bfloat16 or float32; got {layer.dtype}"
    for name, size, most in (
        ("a rank r_max", layer.r_max, MAX_RANK),
        ("a number K of choices", layer.choices, MAX_CHOICES),
    ):
        if size > most:
            return f"takes {name} up to {most}; got {size}"
    return None


def warmup(layers, dtype, device, **options):
    """Load the kernels on the device; none is compiled."""
    with torch.cuda.device(device):
        _preloaded(torch.cuda.current_device())
    return 0


def plan(indices, num_slots):
    """Group pairs by slot, in one launch."""
    order, starts = (torch.empty(n, dtype=torch.int32, device=indices.device) for n in (indices.numel(), num_slots + 1))
    with _on(indices) as (device, stream):
        _preloaded(device).plan(
            device=device,
            stream=stream,
            routing=_routing((*indices.shape, num_slots, 0), indices, None, None, None, None, None),
            order=order.data_ptr(),
            starts=starts.data_ptr(),
        )
    return order, starts


def bgmv(y, x, A, B, indices, scale, ranks, gates, order, starts, y_offset, accumulate):
    """expand(y, shrink(x)). Columns of x or y that do not lie side by side cost a copy."""
    _run("bgmv", x, A, y, B, None, indices, scale, ranks, gates, order, starts, y_offset, accumulate)


def shrink(h, x, A, indices, ranks, order, starts):
    """h[s, t, k, :r] = A[s][i, :r] @ x[t] with i = indices[t, k]; zero beyond the rank and without an adapter."""
    h.zero_()
    _run("shrink", x, A, None, (), h, indices, None, ranks, None, order, starts, 0, False)


def expand(y, h, B, indices, scale, ranks, gates, order, starts, y_offset, accumulate):
    """y[t] (+)= sum_k gates[t, k] * scale[i] * B[i, :, :r] @ h[t, k, :r], slices side by side from y_offset."""
    _run("expand", None, (), y, B, h, indices, scale, ranks, gates, order, starts, y_offset, accumulate)


def _run(op, x, A, y, B, h, indices, scale, ranks, gates, order, starts, y_offset, accumulate):
    """The launches for x and A, y and B, or both; h is the caller's where one of the two is None."""
    tensor = y if x is None else x
    (tokens, choices), weights = indices.shape, A or B
    slots, r_max = weights[0].shape[0], A[0].shape[1] if A else B[0].shape[2]
    if reason := refuses(op, Layer(tensor.dtype, r_max, choices)):
        raise LorakernError(f"{op}: the cuda backend {reason}")
    if x is not None:
        x = _rows(x)
    columns = target = None
    if y is not None:
        columns = y.narrow(1, y_offset, sum(b.shape[1] for b in B))
        target = _rows(columns)
    with _on(tensor) as (device, stream):
        module = _preloaded(device)
        if choices > 1 and x is None:
            order = starts = None
        elif order is None and tokens * choices > module.UNPLANNED_PAIRS:
            order, starts = plan(indices, slots)
        sizes, dtype, d_in = (tokens, choices, slots, r_max), _DTYPES[tensor.dtype], 0 if x is None else x.shape[1]
        routing = _routing(sizes, indices, scale, ranks, gates, order, starts)
        column = 0
        for first in range(0, len(weights), module.MAX_SLICES):
            some = slice(first, first + module.MAX_SLICES)
            if h is None:
                slices = len(weights[some])
                planes = module.planes(device=device, dtype=dtype, sizes=sizes, d_in=d_in, num_slices=slices)
                # From torch's allocator on this stream: no two streams share it, and a captured graph keeps its own.
                scratch = torch.empty(planes * slices * tokens * choices * r_max, dtype=torch.float32, device=x.device)
            else:
                planes, scratch = 1, h[some]
            module.bgmv(
                device=device,
                stream=stream,
                dtype=dtype,
                routing=routing,
                d_in=d_in,
                x=(0, 0) if x is None else (x.data_ptr(), x.stride(0)),
                A=[_weight(a) for a in A[some]],
                y=(0, 0) if y is None else (target.data_ptr() + column * target.element_size(), target.stride(0)),
                B=[_weight(b) for b in B[some]],
                h=scratch.data_ptr(),
                num_planes=planes,
                accumulate=accumulate,
            )
            column += sum(b.shape[1] for b in B[some])
    if target is not columns:
        columns.copy_(target)


def backward(dy, x, A, B, indices, scale, ranks, gates, order, starts):
    """Gradients by x, every A, every B, scale and gates (the last two None where the input is None)."""
    (tokens, choices), (slots, r_max, d_in) = indices.shape, A[0].shape
    dy, x = _rows(dy), _rows(x)

    def empty(*shape, dtype=torch.float32):
        return torch.empty(*shape, dtype=dtype, device=x.device)

    dx = empty(tokens, d_in, dtype=x.dtype)
    dA, dB = ([empty(w.shape, dtype=w.dtype) for w in weights] for weights in (A, B))
    dscale = None if scale is None else empty(slots)
    dgates = None if gates is None else empty(tokens, choices)
    if order is None:
        order, starts = plan(indices, slots)
    h = empty(len(A), tokens, choices, r_max)
    _run("backward", x, A, None, (), h, indices, None, ranks, None, order, starts, 0, False)
    with _on(x) as (device, stream):
        module = _preloaded(device)
        parts = [slice(i, i + module.MAX_SLICES) for i in range(0, len(A), module.MAX_SLICES)]
        planes = _back_planes(max(b.shape[1] for b in B))
        dh, dots = empty(planes, *h[parts[0]].shape), empty(tokens, choices)
        dx_sum = empty(tokens, d_in) if len(parts) > 1 else None
        column = 0
        for part in parts:
            module.backward(
                device=device,
                stream=stream,
                dtype=_DTYPES[x.dtype],
                routing=_routing((tokens, choices, slots, r_max), indices, scale, ranks, gates, order, starts),
                d_in=d_in,
                x=(x.data_ptr(), x.stride(0)),
                A=[_weight(a) for a in A[part]],
                dy=(dy.data_ptr() + column * dy.element_size(), dy.stride(0)),
                B=[_weight(b) for b in B[part]],
                h=h[part].data_ptr(),
                dh=dh.data_ptr(),
                num_planes=planes,
                dots=dots.data_ptr(),
                dx_sum=_address(dx_sum),
                dx=dx.data_ptr(),
                dA=[d.data_ptr() for d in dA[part]],
                dB=[d.data_ptr() for d in dB[part]],
                dscale=_address(dscale),
                dgates=_address(dgates),
                first_call=part is parts[0],
                last_call=part is parts[-1],
            )
            column += sum(b.shape[1] for b in B[part])
    return dx, dA, dB, dscale, dgates


def _back_planes(columns):
    """Into how many parts, each of a block, the sum over d_out is cut: by the weights alone, or bits would follow T."""
    return min(4, max(1, -(-columns // 1024)))


@contextmanager
def _on(tensor):
    """Makes the tensor's device the current one: (its index, the address of its current stream)."""
    with torch.cuda.device(tensor.device):
        yield tensor.get_device(), torch.cuda.current_stream().cuda_stream


def _routing(sizes, indices, scale, ranks, gates, order, starts):
    return (
        sizes,
        (*_pointer(indices), indices.dtype == torch.int64),
        _pointer(scale) if scale is not None else (0, 0),
        (*_pointer(ranks), ranks.dtype == torch.int64) if ranks is not None else (0, 0, False),
        _pointer(gates) if gates is not None else (0, 0, 0),
        (_address(order), _address(starts)),
    )


def _address(tensor):
    return 0 if tensor is None else tensor.data_ptr()


def _rows(matrix):
    """The matrix itself where the elements of a row lie side by side, else a copy."""
    return matrix if matrix.shape[1] <= 1 or matrix.stride(1) == 1 else matrix.contiguous()


def _weight(w):
    return w.data_ptr(), w.stride(0), w.stride(1), w.shape[1]


def _pointer(tensor):
    return tensor.data_ptr(), *tensor.stride()


def _module():
    return importlib.import_module("lorakern._cuda")


@functools.cache
def _preloaded(device):
    """The module, with its kernels loaded on the device: inside a graph capture it would be too late."""
    module = _module()
    module.preload(device)
    return module
