"""The short way through the ops: C functions that read the tensors, check, run, and mark what was written.

Each takes the arguments of its op by position and returns what the op returns; None, with nothing written, where
anything is unusual or wrong: another kind of tensor than plain ones on the CPU, a gradient that is wanted, a forced
backend, calls that are watched or transformed, a bad argument. The op then goes the general way.
"""

from types import SimpleNamespace

import torch

from lorakern.backends import FORCED, cpu
from lorakern.ops.plan import Plan

_NAMES = ("bgmv", "sgmv", "lora_delta", "shrink", "expand", "routed_bgmv")


def _declined(*_):
    return None


def _make():
    """The functions by name; none where C++ is missing, or torch (before 2.10) lets no one read its tensors from C."""
    if cpu.missing():
        return {}
    try:
        watchers = (
            torch._C._len_torch_function_stack,
            torch._C._len_torch_dispatch_stack,
            torch._C._functorch.maybe_current_level,
            torch._C._is_tracing,
            torch._C._autograd._profiler_enabled,
        )
        return cpu._cpu.make_fast_calls(
            torch.Tensor.__dlpack_c_exchange_api__,
            torch.Tensor,
            torch.nn.Parameter,
            Plan,
            FORCED,
            watchers,
            torch.is_grad_enabled,
            torch.get_num_threads,
            torch._C._increment_version,
            torch.Tensor.is_neg,
            torch.float32,
        )
    except AttributeError:
        return {}


fast = SimpleNamespace(**(dict.fromkeys(_NAMES, _declined) | _make()))
