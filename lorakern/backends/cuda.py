"""The CUDA backend: one bgmv for fp16, bf16 and fp32 (csrc/cuda), two launches on the current stream.

It follows `indices` itself and has no use for a plan. Whatever CUDA objects to (no code for this device, a bad launch,
an earlier fault) is raised as RuntimeError.
"""

import functools
import importlib

import torch

from lorakern.backends.reference import plan as plan  # plain torch, without waiting for the device
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
