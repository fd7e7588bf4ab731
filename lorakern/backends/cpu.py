"""The C++ backend: addresses and strides go to `lorakern._cpu`, which knows nothing of torch.

It uses the OpenMP runtime that torch has loaded and as many threads as `torch.get_num_threads()` says.
"""

import torch

from lorakern.errors import LorakernError

try:
    from lorakern import _cpu

    _MISSING = None
except ImportError as error:
    _cpu = None
    _MISSING = f"the C++ module was not built ({error}); install from source with a C++17 compiler: pip install ."

NAME = "cpu"
CHECKS_VALUES = True  # indices and ranks, while the plan is made
_DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


def missing():
    """None, or why the C++ module cannot be used."""
    return _MISSING


def _call(function, *arguments):
    try:
        return function(*arguments)
    except ValueError as error:
        raise LorakernError(str(error)) from None


def _rows(tensor):
    """A 2-D tensor whose last dimension is contiguous: itself, or a copy."""
    return tensor if tensor.shape[1] <= 1 or tensor.stride(1) == 1 else tensor.contiguous()


def _matrix(tensor):
    return tensor.data_ptr(), tensor.stride(0)


def _weights(slices):
    return [(w.data_ptr(), w.stride(0), w.stride(1), w.shape[1]) for w in slices]


def _indices(indices):
    return indices.data_ptr(), indices.element_size(), indices.stride(0), indices.stride(1)


def _address(tensor):
    return 0 if tensor is None else tensor.data_ptr()


def _sizes(dtype, indices, weight, r_max, d_in):
    if dtype not in _DTYPES:
        raise LorakernError(f"the cpu backend takes float32, float16 or bfloat16; got {dtype} (reference takes float64)")
    return _DTYPES[dtype], indices.shape[0], indices.shape[1], weight.shape[0], r_max, d_in


class _Routing:
    """Scale, ranks, gates and plan in the layout of the kernels; keeps copies alive during the call."""

    def __init__(self, scale, ranks, gates, order, starts):
        self.scale = None if scale is None else scale.contiguous()
        self.ranks = None if ranks is None else ranks.to(torch.int32).contiguous()
        self.gates = None if gates is None else gates.contiguous()
        self.order = None if order is None else order.contiguous()
        self.starts = None if starts is None else starts.contiguous()

    def addresses(self):
        return tuple(_address(t) for t in (self.scale, self.ranks, self.gates, self.order, self.starts))


def _check_rank_values(ranks, r_max):
    # A rank of int64 is narrowed on the way to the kernel, which then checks it: values must survive that.
    if ranks is not None and ranks.dtype == torch.int64 and ranks.numel():
        low, high = (int(v) for v in ranks.aminmax())
        if low < 0 or high > r_max:
            raise LorakernError(f"ranks must lie between 0 and r_max = {r_max}; got values from {low} to {high}")


def _into(y, columns, y_offset, run):
    """Call run(target), where target is the filled columns of y, or a copy of them that is written back."""
    target = y.narrow(1, y_offset, columns)
    direct = _rows(target)
    run(direct)
    if direct is not target:
        target.copy_(direct)


def plan(indices, num_slots):
    order = torch.empty(indices.numel(), dtype=torch.int32)
    starts = torch.empty(num_slots + 1, dtype=torch.int32)
    _call(_cpu.plan, _indices(indices), *indices.shape, num_slots, order.data_ptr(), starts.data_ptr())
    return order, starts


def shrink(h, x, A, indices, ranks, order, starts):
    x = _rows(x)
    _check_rank_values(ranks, A[0].shape[1])
    routing = _Routing(None, ranks, None, order, starts)
    sizes = _sizes(x.dtype, indices, A[0], *A[0].shape[1:])
    _call(
        _cpu.shrink,
        h.data_ptr(),
        _matrix(x),
        _weights(A),
        sizes,
        _indices(indices),
        routing.addresses(),
        torch.get_num_threads(),
    )


def expand(y, h, B, indices, scale, ranks, gates, order, starts, y_offset, accumulate):
    _check_rank_values(ranks, B[0].shape[2])
    routing = _Routing(scale, ranks, gates, order, starts)
    sizes = _sizes(y.dtype, indices, B[0], B[0].shape[2], 0)

    def run(target):
        _call(
            _cpu.expand,
            _matrix(target),
            h.data_ptr(),
            _weights(B),
            sizes,
            _indices(indices),
            routing.addresses(),
            accumulate,
            torch.get_num_threads(),
        )

    _into(y, sum(b.shape[1] for b in B), y_offset, run)


def bgmv(y, x, A, B, indices, scale, ranks, gates, order, starts, y_offset, accumulate):
    x = _rows(x)
    _check_rank_values(ranks, A[0].shape[1])
    routing = _Routing(scale, ranks, gates, order, starts)
    sizes = _sizes(x.dtype, indices, A[0], *A[0].shape[1:])

    def run(target):
        _call(
            _cpu.bgmv,
            _matrix(target),
            _matrix(x),
            _weights(A),
            _weights(B),
            sizes,
            _indices(indices),
            routing.addresses(),
            accumulate,
            torch.get_num_threads(),
        )

    _into(y, sum(b.shape[1] for b in B), y_offset, run)


def backward(dy, x, A, B, indices, scale, ranks, gates, order, starts):
    dy, x = _rows(dy), _rows(x)
    _check_rank_values(ranks, A[0].shape[1])
    routing = _Routing(scale, ranks, gates, order, starts)
    dx = torch.zeros_like(x, memory_format=torch.contiguous_format)
    dA = [torch.zeros(a.shape, dtype=a.dtype) for a in A]
    dB = [torch.zeros(b.shape, dtype=b.dtype) for b in B]
    dscale = None if scale is None else torch.zeros(scale.shape, dtype=torch.float32)
    dgates = None if gates is None else torch.zeros(gates.shape, dtype=torch.float32)
    _call(
        _cpu.backward,
        _matrix(dy),
        _matrix(x),
        _weights(A),
        _weights(B),
        _sizes(x.dtype, indices, A[0], *A[0].shape[1:]),
        _indices(indices),
        routing.addresses(),
        dx.data_ptr(),
        [d.data_ptr() for d in dA],
        [d.data_ptr() for d in dB],
        _address(dscale),
        _address(dgates),
        torch.get_num_threads(),
    )
    return dx, dA, dB, dscale, dgates
