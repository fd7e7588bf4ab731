"""Where one GPU backend was measured to be faster than the other.

A row depends on the op, the device and the layer, never on the batch: the bits of a token must not depend on who stands
beside it. Rows are made from the page that ``make gpu`` writes, which times the backends side by side. Where no row
fits, the order of `lorakern.backends` stands: CUDA, then Triton.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Layer:
    """What of a call may decide about its backend: dtype, the rank weights are allocated for, choices per token."""

    dtype: torch.dtype
    r_max: int = 0
    choices: int = 1


@dataclass(frozen=True)
class Crossover:
    """Calls of `op` on devices of this compute capability, in these ranges, are faster on `backend`."""

    op: str
    capability: tuple[int, int]
    backend: str
    dtypes: tuple[torch.dtype, ...] = (torch.float16, torch.bfloat16, torch.float32)
    r_max: range = range(1, 2**31)
    choices: range = range(1, 2**31)

    def covers(self, op, capability, layer):
        return (
            op == self.op
            and capability == self.capability
            and layer.dtype in self.dtypes
            and layer.r_max in self.r_max
            and layer.choices in self.choices
        )


_HALVES = (torch.float16, torch.bfloat16)

MEASURED: tuple[Crossover, ...] = (
    # An H200, 64 tokens, rank 16: 0.71 of CUDA's time with K = 2, 0.65 with K = 4 (benchmarks/results/gpu-h200.md).
    Crossover("bgmv", (9, 0), "triton", _HALVES, r_max=range(1, 17), choices=range(2, 5)),
)


def fastest(op, capability, layer):
    """The name of the backend that was measured to be the fastest for the layer, or None."""
    return next((row.backend for row in MEASURED if row.covers(op, capability, layer)), None)
