"""The CUDA backend: one bgmv for fp16, bf16 and fp32 (csrc/cuda), two launches on the current stream.

It follows `indices` itself and has no use for a plan. Whatever CUDA objects to (no code for this device, a bad launch,
an earlier fault) is raised as RuntimeError.
"""

import contextlib
import functools
import importlib

import torch

from lorakern.errors import LorakernError

NAME = "cuda"
VALIDATES = False  # the kernel skips what is out of range
_OLDEST = (8, 0)
_DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


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


def plan(indices, num_slots):
    order = torch.empty(indices.numel(), dtype=torch.int32, device=indices.device)
    starts = torch.empty(num_slots + 1, dtype=torch.int32, device=indices.device)
    with _on_device(indices) as (module, place):
        module.plan(
            **place,
            sizes=(*indices.shape, num_slots, 0, 0),
            indices=_indices(indices),
            order=order.data_ptr(),
            starts=starts.data_ptr(),
        )
    return order, starts


def bgmv(y, x, A, B, indices, scale, ranks, gates, order, starts, y_offset, accumulate):
    """expand(y, shrink(x)) with h in float32 scratch. Columns of x or y that do not lie side by side cost a copy."""
    if x.dtype not in _DTYPES:
        raise LorakernError(f"bgmv: x must be float16, bfloat16 or float32 on the CUDA backend; got {x.dtype}")
    columns = y.narrow(1, y_offset, sum(b.shape[1] for b in B))
    target = _rows(columns)
    _launch(target, _rows(x), A, B, indices, scale, ranks, gates, accumulate)
    if target is not columns:
        columns.copy_(target)


def _launch(y, x, A, B, indices, scale, ranks, gates, accumulate):
    (tokens, choices), (slots, r_max, d_in) = indices.shape, A[0].shape
    with torch.cuda.device(x.device):
        module = _preloaded(x.get_device())
        # From torch's allocator on this stream: no two streams share it, and a captured graph keeps its own.
        h = torch.empty(min(len(A), module.MAX_SLICES) * tokens * choices * r_max, dtype=torch.float32, device=x.device)
        column = 0
        for first in range(0, len(A), module.MAX_SLICES):
            some = slice(first, first + module.MAX_SLICES)
            module.bgmv(
                device=x.get_device(),
                stream=torch.cuda.current_stream().cuda_stream,
                dtype=_DTYPES[x.dtype],
                sizes=(tokens, choices, slots, r_max, d_in),
                y=(y.data_ptr() + column * y.element_size(), y.stride(0)),
                x=(x.data_ptr(), x.stride(0)),
                A=[_weight(a) for a in A[some]],
                B=[_weight(b) for b in B[some]],
                h=h.data_ptr(),
                indices=(*_pointer(indices), indices.dtype == torch.int64),
                scale=_pointer(scale) if scale is not None else (0, 0),
                ranks=(*_pointer(ranks), ranks.dtype == torch.int64) if ranks is not None else (0, 0, False),
                gates=_pointer(gates) if gates is not None else (0, 0, 0),
                accumulate=accumulate,
            )
            column += sum(b.shape[1] for b in B[some])


def backward(dy, x, A, B, indices, scale, ranks, gates, order, starts):
    """Gradients by x, every A, every B, scale and gates (the last two None where the input is None)."""
    _check_dtype("backward", x)
    dy, x = _rows(dy), _rows(x)
    (tokens, choices), (slots, r_max, d_in) = indices.shape, A[0].shape
    if order is None:
        order, starts = plan(indices, slots)

    def empty(*shape, dtype=torch.float32):
        return torch.empty(*shape, dtype=dtype, device=x.device)

    dx = empty(tokens, d_in, dtype=x.dtype)
    dA, dB = ([empty(w.shape, dtype=w.dtype) for w in weights] for weights in (A, B))
    dscale = None if scale is None else empty(slots)
    dgates = None if gates is None else empty(tokens, choices)
    with _on_device(x) as (module, place):
        calls = [slice(i, i + module.MAX_SLICES) for i in range(0, len(A), module.MAX_SLICES)]
        planes = _back_planes(max(b.shape[1] for b in B))
        factors = min(len(A), module.MAX_SLICES) * tokens * choices * r_max
        h, dh, dots = empty(factors), empty(planes * factors), empty(tokens * choices)
        dx_sum = empty(tokens, d_in) if len(calls) > 1 else None
        column = 0
        for some in calls:
            _shrink(h, x, A[some], indices, ranks, order, starts)
            module.backward(
                **place,
                dtype=_DTYPES[x.dtype],
                sizes=(tokens, choices, slots, r_max, d_in),
                dy=(dy.data_ptr() + column * dy.element_size(), dy.stride(0)),
                x=(x.data_ptr(), x.stride(0)),
                A=[_weight(a) for a in A[some]],
                B=[_weight(b) for b in B[some]],
                h=h.data_ptr(),
                dh=dh.data_ptr(),
                num_planes=planes,
                dots=dots.data_ptr(),
                dx_sum=_address(dx_sum),
                dx=dx.data_ptr(),
                dA=[_address(d) for d in dA[some]],
                dB=[_address(d) for d in dB[some]],
                dscale=_address(dscale),
                dgates=_address(dgates),
                **_routing(indices, scale, ranks, gates, order, starts),
                first_call=some is calls[0],
                last_call=some is calls[-1],
            )
            column += sum(b.shape[1] for b in B[some])
    return dx, dA, dB, dscale, dgates


def _back_planes(columns):
    """Into how many parts, each of a block, the sum over d_out is cut: by the weights alone, or bits would follow T."""
    return min(4, max(1, -(-columns // 1024)))


def _shrink(h, x, A, indices, ranks, order, starts):
    raise NotImplementedError


def _check_dtype(op, x):
    if x.dtype not in _DTYPES:
        raise LorakernError(f"{op}: x must be float16, bfloat16 or float32 on the CUDA backend; got {x.dtype}")


@contextlib.contextmanager
def _on_device(tensor):
    """The module, and the device and stream to give it; torch's current device comes back afterwards."""
    with torch.cuda.device(tensor.device):
        device = tensor.get_device()
        yield _preloaded(device), {"device": device, "stream": torch.cuda.current_stream().cuda_stream}


def _routing(indices, scale, ranks, gates, order, starts):
    return {
        "indices": _indices(indices),
        "scale": (0, 0) if scale is None else _pointer(scale),
        "ranks": (0, 0, False) if ranks is None else (*_pointer(ranks), ranks.dtype == torch.int64),
        "gates": (0, 0, 0) if gates is None else _pointer(gates),
        "plan": (_address(order), _address(starts)),
    }


def _indices(indices):
    return *_pointer(indices), indices.dtype == torch.int64


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
