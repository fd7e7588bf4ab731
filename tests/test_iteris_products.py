"""Inner products of features that come in pieces, against float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import error_ratio

from lorakern.merge.iteris.products import BLOCK, Products


def features(pieces, d_in, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(2, rows, d_in, generator=generator, dtype=dtype) + 0.5 for rows in pieces]


def products(pieces, d_in, same):
    sums = Products(d_in, torch.device("cpu"), same=same)
    for X, X_merged in pieces:
        sums.add(X, X if same else X_merged)
    return sums.finish()


@pytest.mark.parametrize("same", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-14)])
@pytest.mark.parametrize("d_in", [1, 63, BLOCK, BLOCK + 1, 2 * BLOCK, 576])
@pytest.mark.parametrize("rows", [[1], [5, 0, 200, 3], [700], [300, 300, 1]], ids=str)
def test_they_are_those_of_all_rows_at_once(same, dtype, tolerance, d_in, rows):
    pieces = features(rows, d_in, dtype)
    X, X_merged = torch.cat(pieces, dim=1).double()
    C, G = products(pieces, d_in, same)
    assert C.dtype == G.dtype == torch.float64
    assert (C is G) == same
    right = X if same else X_merged
    assert error_ratio(G, right.T @ right) < tolerance
    assert error_ratio(C, X.T @ right) < tolerance
    assert error_ratio(G, G.T) < tolerance


@settings(max_examples=20, deadline=None)
@given(rows=st.lists(st.integers(0, 90), min_size=1, max_size=8), d_in=st.sampled_from([1, 7, 40, BLOCK + 9]))
def test_how_the_rows_are_cut_changes_rounding_alone(rows, d_in):
    whole = features([sum(rows)], d_in)
    cut = whole[0].split(rows, dim=1)
    for exact, got in zip(products(whole, d_in, False), products(cut, d_in, False), strict=True):
        assert (got - exact).norm() <= 1e-5 * exact.norm()


def test_no_rows_give_zeros():
    C, G = products([torch.empty(2, 0, 5)], 5, False)
    assert C.shape == G.shape == (5, 5) and not C.any() and not G.any()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_seen_in_both(bad):
    piece = torch.ones(2, 4, BLOCK + 3)
    piece[1, 2, -1] = bad
    C, G = products([piece], BLOCK + 3, False)
    assert not torch.isfinite(C.sum()) and not torch.isfinite(G.sum())
