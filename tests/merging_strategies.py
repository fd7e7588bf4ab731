"""Adapters and weights for hypothesis to draw; what they are merged with is in merging.py, which needs torch alone."""

from hypothesis import strategies as st
from merging import SHAPES, TOLERANCES, factors

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
