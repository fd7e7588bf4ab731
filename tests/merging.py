"""Random adapters for the tests of merging, and what they are to be compared with."""

import torch
from problems import error_ratio

TOLERANCES = {torch.float16: 2e-3, torch.bfloat16: 1.5e-2, torch.float32: 3e-6, torch.float64: 3e-6}
# Methods that neither draw random numbers nor care for the order of the adapters, with options that keep all entries.
SYMMETRIC = {
    "cat": {},
    "fedex": {},
    "knots": {"density": 1.0},
    "lego": {},
    "linear": {},
    "lorahub_linear": {},
    "magnitude_prune": {"density": 1.0},
    "peft_linear": {},
    "peft_magnitude_prune": {"density": 1.0},
    "peft_ties": {"density": 1.0},
    "svd": {},
    "ties": {"density": 1.0},
}
RANDOM = {"dare_linear": {"density": 1.0}, "dare_ties": {"density": 1.0}}
RANDOM |= {f"peft_{name}": options for name, options in RANDOM.items()}
ALL = SYMMETRIC | RANDOM


def factors(d_out, d_in, rank, scale=1.0, dtype=torch.float32, seed=0):
    """Random (A, B, scale), not contiguous."""
    g = torch.Generator().manual_seed(seed)
    A = torch.randn(d_in, rank, generator=g).to(dtype).T
    return A, torch.randn(rank, d_out, generator=g).to(dtype).T, scale


def update(module):
    """scale * B @ A in float64."""
    A, B, scale = module
    return scale * B.double() @ A.double()


def total(adapters, weights, module):
    """The weighted sum of the updates in float64; a missing module counts as zero."""
    return sum(w * update(adapter[module]) for adapter, w in zip(adapters, weights, strict=True) if module in adapter)


def assert_update(merged, exact, tolerance):
    """The update of `merged` is `exact` up to an error ratio."""
    result = update(merged)
    assert result.shape == exact.shape
    if exact.any():
        assert error_ratio(result, exact) < tolerance
    else:
        assert not result.any()


SHAPES = {"q_proj": (5, 7), "v_proj": (1, 9), "down_proj": (8, 3)}
