"""Random adapters for the tests of merging, and what they are to be compared with."""

import torch
from hypothesis import strategies as st
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
SCALES = st.sampled_from([1.0, 0.5, 1 / 3, 16 / 5**0.5, -2.0, 1e-3, 0.0])
DTYPES = st.sampled_from(sorted(TOLERANCES, key=str))


@st.composite
def adapters(draw, least=1, most=4):
    """A list of adapters, each with some of the modules of SHAPES, at ranks, scales and dtypes of their own."""
    result = []
    for _ in range(draw(st.integers(least, most))):
        modules = draw(st.lists(st.sampled_from(sorted(SHAPES)), min_size=1, unique=True))
        adapter = {}
        for module in modules:
            rank, seed = draw(st.integers(1, 9)), draw(st.integers(0, 1000))
            adapter[module] = factors(*SHAPES[module], rank, draw(SCALES), draw(DTYPES), seed)
        result.append(adapter)
    return result


def weights_for(count):
    return st.lists(st.sampled_from([1.0, 0.5, -0.25, 2.0, 0.3]), min_size=count, max_size=count)
