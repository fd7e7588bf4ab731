"""Methods on true updates: thresholds, masks and merged rows against dense formulas and PEFT; the low-rank step."""

import math
import os
import subprocess
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from merging import factors
from problems import error_ratio

import lorakern as lk
from lorakern.merge import Term, _streamed, dare_linear, dare_ties, magnitude_prune, module_generator, ties
from lorakern.merge._sparsify import CounterMask
from lorakern.merge._streamed import StreamedUpdate, thresholds

merge_utils = pytest.importorskip("peft.utils.merge_utils")

SHAPES = [(1, 1), (1, 300), (300, 1), (5, 63), (63, 5), (130, 129), (64, 1000)]
SIGNS = ["total", "frequency"]


pytestmark = pytest.mark.usefixtures("one_thread")


def problem(d_out, d_in, count=4):
    """Terms of different ranks, scales and weights, a negative scale and a negative weight among them."""
    scales, weights = (0.5, 2.0, -1.0, 0.7, 1.0), (1.0, -0.5, 0.3, 2.0, 1.0)
    pairs = [factors(d_out, d_in, rank, seed=10 * d_out + rank)[:2] for rank in (3, 1, 8, 5, 2)]
    return [Term(A, B, s, w) for (A, B), s, w in zip(pairs, scales, weights, strict=True)][:count]


def deltas(terms, dtype=torch.float64):
    return [term.scale * (term.B.to(dtype) @ term.A.to(dtype)) for term in terms]


# the formulas, dense and in float64


def trimmed(delta, density):
    k = int(density * delta.numel())
    order = delta.abs().flatten().argsort(descending=True)
    result = torch.zeros_like(delta).flatten()
    result[order[:k]] = delta.flatten()[order[:k]]
    return result.view_as(delta)


def summed(parts, weights):
    return sum(w * part for w, part in zip(weights, parts, strict=True))


def elected_mean(parts, weights, how):
    result = torch.zeros_like(parts[0])
    for i in range(result.shape[0]):
        for j in range(result.shape[1]):
            values = [part[i, j].item() for part in parts]
            votes = sum(values) if how == "total" else sum((v > 0) - (v < 0) for v in values)
            sign = 1 if votes >= 0 else -1
            agree = [w * v for w, v in zip(weights, values, strict=True) if v * sign > 0]
            result[i, j] = sum(agree) / max(len(agree), 1)
    return result


@pytest.mark.parametrize("density", [0.05, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_trimming_methods_equal_the_dense_formulas(shape, density):
    terms = problem(*shape)
    weights = [term.weight for term in terms]
    parts = [trimmed(delta, density) for delta in deltas(terms)]
    merged = [(magnitude_prune.update(terms, density), summed(parts, weights))]
    if math.prod(shape) < 20_000:
        merged += [(ties.update(terms, density, how), elected_mean(parts, weights, how)) for how in SIGNS]
    for result, exact in merged:
        assert result.shape == shape and result.dense().shape == shape
        if exact.any():
            assert error_ratio(result.dense(), exact) < 1e-5
        else:
            assert not result.dense().any()


@pytest.mark.parametrize("density", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_dropping_methods_equal_the_dense_formulas(shape, density):
    terms = problem(*shape)
    weights = [term.weight for term in terms]
    generator = module_generator(3, "p")
    masks = [torch.ones(shape)] * len(terms)
    if density < 1:
        masks = [CounterMask(shape, density, generator, "cpu").rows(0, shape[0]) for _ in terms]
    parts = [mask.double() * delta / density for mask, delta in zip(masks, deltas(terms), strict=True)]
    merged = [(dare_linear.update(terms, module_generator(3, "p"), density), summed(parts, weights))]
    if math.prod(shape) < 20_000:
        for how in SIGNS:
            result = dare_ties.update(terms, module_generator(3, "p"), density, how)
            merged.append((result, elected_mean(parts, weights, how)))
    for result, exact in merged:
        if exact.any():
            assert error_ratio(result.dense(), exact) < 1e-5
        else:
            assert not result.dense().any()


@pytest.mark.filterwarnings("ignore:The density")
@pytest.mark.parametrize("density", [0.2, 0.7, 1.0])
@pytest.mark.parametrize("shape", [(63, 40), (130, 129)])
@pytest.mark.parametrize("how", SIGNS)
def test_updates_equal_pefts_before_truncation(shape, density, how, monkeypatch):
    """PEFT's functions on dense updates; its DARE draws the masks that ours draws."""
    terms = problem(*shape)
    dense, weights = deltas(terms, torch.float32), torch.tensor([term.weight for term in terms])

    def generator():
        return module_generator(0, "p")

    g = generator()
    masks = [CounterMask(shape, density, g, "cpu").rows(0, shape[0]) for _ in terms] if density < 1 else []
    draws = iter(masks * 2)
    monkeypatch.setattr(torch, "bernoulli", lambda probabilities: next(draws))
    for ours, theirs in [
        (ties.update(terms, density, how), merge_utils.ties(dense, weights, density, how)),
        (magnitude_prune.update(terms, density), merge_utils.magnitude_prune(dense, weights, density)),
        (dare_linear.update(terms, generator(), density), merge_utils.dare_linear(dense, weights, density)),
        (dare_ties.update(terms, generator(), density, how), merge_utils.dare_ties(dense, weights, density, how)),
    ]:
        assert error_ratio(ours.dense(), theirs) < 1e-5


# thresholds

VALUES = st.floats(-(2.0**100), 2.0**100, width=32) | st.sampled_from([0.0, 1.0, -1.0, 1.0000001, 1e-38, 1e-45])


def kept(values, density):
    """What magnitude_prune keeps of an update with these float32 values."""
    A = torch.tensor([values], dtype=torch.float32)
    return magnitude_prune.update([Term(A, torch.ones(1, 1), 1.0, 1.0)], density).dense()[0].tolist()


@settings(deadline=None, max_examples=200)
@given(
    st.lists(
        st.floats(-(2.0**100), 2.0**100, width=32) | st.sampled_from([0.0, 1.0, -1.0, 1.0000001, 1e-38, 1e-45]),
        min_size=1,
    ),
    st.floats(0.01, 1),
)
def test_threshold_is_the_kth_largest_magnitude(values, density):
    term = Term(torch.tensor([values], dtype=torch.float32), torch.ones(1, 1), 1.0, 1.0)
    # what a GEMM makes of them: it may flush the smallest numbers to zero
    made = (torch.ones(1, 1) @ term.A)[0].abs().sort(descending=True).values
    k = int(density * len(values))
    expected = math.inf if k == 0 else 0.0 if density == 1 else made[k - 1].item()
    assert thresholds([term], density) == [expected]


def test_equal_magnitudes_are_kept_together():
    assert kept([1.0, -2.0, 2.0, -1.0, 3.0, 0.5], 0.34) == [0, -2.0, 2.0, 0, 3.0, 0]
    assert kept([0.0, 0.0, 0.0, 5.0], 0.75) == [0.0, 0.0, 0.0, 5.0]
    assert kept([1.0, 2.0, 3.0], 0.2) == [0.0, 0.0, 0.0]


def test_every_update_has_its_own_threshold():
    terms = problem(130, 129)
    limits = thresholds(terms, 0.3)
    stack = torch.cat([stack.clone() for _, stack in _streamed._stacks(_streamed._scaled(terms))], dim=1)
    k = int(0.3 * 130 * 129)
    for limit, update in zip(limits, stack, strict=True):
        assert limit == update.abs().flatten().sort(descending=True).values[k - 1].item()
        assert int((update.abs() >= limit).sum()) == k


# masks


def test_mask_is_the_hash_it_says():
    shape, density = (37, 53), 0.3
    mask = CounterMask(shape, density, module_generator(1, "p"), "cpu")
    keys = torch.randint(-(2**31), 2**31, (37 + 53,), generator=module_generator(1, "p")).numpy().astype(np.uint32)
    with np.errstate(over="ignore"):
        bits = keys[:37, None] + keys[None, 37:]
        bits = (bits ^ (bits >> np.uint32(16))) * np.uint32(0x85EBCA6B)
        bits = (bits ^ (bits >> np.uint32(13))) * np.uint32(0xC2B2AE35)
    # the sign bit is turned, as the comparison is one of signed numbers
    expected = (bits ^ np.uint32(1 << 31)) < np.uint32(int(density * 2**32))
    assert np.array_equal(mask.rows(0, 37).numpy().astype(bool), expected)
    assert torch.equal(mask.rows(5, 9), mask.rows(0, 37)[5:9])


@pytest.mark.parametrize("density", [0.01, 0.5, 0.9])
def test_masks_look_random(density):
    n = 1000
    generator = module_generator(0, "p")
    one, other = (CounterMask((n, n), density, generator, "cpu").rows(0, n).double() - density for _ in range(2))
    spread = (density * (1 - density)) ** 0.5
    assert abs(one.mean()) < 5 * spread / n
    for sums in (one.sum(0), one.sum(1)):  # of independent entries, they spread as n binomials do
        assert sums.std().item() == pytest.approx(spread * n**0.5, rel=0.15)
    for shifted in (one.roll(1, 0), one.roll(1, 1), one.roll((1, 1), (0, 1)), one.T, other):
        assert abs((one * shifted).mean()) < 5 * spread**2 / n
    # the four corners of a rectangle, which share their keys in pairs
    corners = one * one.roll(1, 0) * one.roll(1, 1) * one.roll((1, 1), (0, 1))
    assert abs(corners.mean()) < 5 * spread**4 / n


def tiles_of(rows, monkeypatch):
    monkeypatch.setattr(_streamed, "TILE_NUMEL", 0)
    monkeypatch.setattr(_streamed, "LEAST_ROWS", rows)


@pytest.mark.parametrize("tile", [1, 7, 1000])
def test_tiles_do_not_show(tile, monkeypatch):
    terms = problem(130, 129)
    makers = [
        lambda: ties.update(terms, 0.3, "total"),
        lambda: magnitude_prune.update(terms, 0.3),
        lambda: dare_linear.update(terms, module_generator(0, "p"), 0.3),
        lambda: dare_ties.update(terms, module_generator(0, "p"), 0.3, "frequency"),
    ]
    usual = [make().dense() for make in makers]
    tiles_of(tile, monkeypatch)
    for make, expected in zip(makers, usual, strict=True):
        update = make()
        assert [start for start, _ in update.tiles()] == list(range(0, 130, tile))
        assert error_ratio(update.dense(), expected) < 1e-6
        assert torch.equal(update.dense() == 0, expected == 0)


# the low-rank step


def low_rank_error(update, rank):
    """Error of the factors over the least possible one, and over the norm."""
    A, B = update.low_rank(rank, torch.Generator().manual_seed(0))
    assert A.shape[0] == B.shape[1] <= rank
    dense = update.dense().double()
    error = (dense - B.double() @ A.double()).norm()
    optimal = torch.linalg.svdvals(dense)[rank:].norm()
    return (error / optimal.clamp_min(1e-300)).item(), (error / dense.norm()).item()


@pytest.mark.parametrize("shape", [(700, 500), (300, 1000), (2000, 140)])
@pytest.mark.parametrize("rank", [1, 5, 40])
def test_iteration_is_nearly_optimal(shape, rank):
    """Random factors: their spectra are as flat as any, and what was dropped is a flat tail."""
    assert math.prod(shape) > _streamed.DENSE_NUMEL
    terms = problem(*shape)
    for update in (
        ties.update(terms, 0.2, "total"),
        magnitude_prune.update(terms, 0.2),
        dare_linear.update(terms, module_generator(0, "p"), 0.1),
        dare_ties.update(terms, module_generator(0, "p"), 0.5, "frequency"),
    ):
        assert low_rank_error(update, rank)[0] < 1.003


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", [1, 3, 200])
def test_small_updates_are_decomposed_exactly(shape, rank):
    update = magnitude_prune.update(problem(*shape), 0.5)
    if update.dense().any():
        ratio, relative = low_rank_error(update, rank)
        assert ratio < 1 + 1e-6 or relative < 1e-6


@pytest.mark.parametrize("shape", SHAPES[1:])
@pytest.mark.parametrize("rank", [17, 200])
def test_iteration_finds_what_has_low_rank(shape, rank, monkeypatch):
    """Also where the subspace has no room to grow, and where there are fewer directions than columns."""
    monkeypatch.setattr(_streamed, "DENSE_NUMEL", 0)
    assert low_rank_error(magnitude_prune.update(problem(*shape), 1.0), rank)[1] < 2e-6


def test_iteration_of_a_zero_update(monkeypatch):
    monkeypatch.setattr(_streamed, "DENSE_NUMEL", 0)
    nothing = {"p": (torch.zeros(3, 40), torch.zeros(50, 3), 1.0)}
    A, B, scale = lk.merge([nothing], "ties")["p"]
    assert not (scale * B @ A).any()


def test_rank_is_the_largest_of_the_adapters_unless_given():
    adapters = [{"p": factors(700, 500, rank, seed=rank)} for rank in (3, 6)]
    for options, rank in (({}, 6), ({"rank": 2}, 2), ({"rank": 9}, 9)):
        assert lk.merge(adapters, "ties", **options)["p"].rank == rank


def test_tiles_are_never_all_there(monkeypatch):
    """One tile at a time: what `merge_rows` is given is all that exists of the updates."""
    tiles_of(64, monkeypatch)
    terms, seen = problem(1000, 300), []

    def merge_rows(stack, start):
        seen.append((start, tuple(stack.shape)))
        return stack.sum(0)

    StreamedUpdate(terms, merge_rows).low_rank(4, torch.Generator().manual_seed(0))
    starts = list(range(0, 1000, 64))
    assert [start for start, _ in seen] == starts * (_streamed.STEPS + 1)
    assert max(shape for _, shape in seen) == (4, 64, 300)


PEAK = r"""
import re, torch
import lorakern as lk
torch.set_num_threads(1)
adapters = [{"p": (torch.randn(16, 11008), torch.randn(4096, 16), 1.0)} for _ in range(8)]
rank = lk.merge(adapters, "METHOD", density=0.2)["p"].rank
# ru_maxrss would be that of the process which started this one, where it had more.
print(rank, re.search(r"VmHWM:\s+(\d+) kB", open("/proc/self/status").read())[1])
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ties", "dare_ties"])
def test_memory_of_a_large_module(name):
    """The whole process at 4096 x 11008 with 8 adapters; one of their updates alone is 180 MB."""
    root = str(Path(__file__).resolve().parents[1])
    environment = {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", PEAK.replace("METHOD", name)]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    rank, peak = map(int, done.stdout.split())
    assert rank == 16
    assert peak * 1024 < 1e9
