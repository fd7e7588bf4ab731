"""Exact search is brute force: random and clustered vectors, near ties, all scales; faiss finds most of it."""

import math
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import lorakern as lk
from lorakern.backends import cpu
from lorakern.mixture import LoraRetriever
from lorakern.mixture._scores import best, exact_scores
from lorakern.mixture.exact_index import ExactIndex
from lorakern.mixture.store import Store


def brute_force(vectors, queries, k):
    return [best(exact_scores(query, vectors), torch.arange(len(vectors)), k) for query in queries]


def searched(store, queries, k):
    return [[(int(name), score) for name, score in row] for row in store.snapshot.search(queries, [k] * len(queries))]


def store_of(vectors, index=ExactIndex):
    store = Store(vectors.shape[1], index)
    store.add([str(i) for i in range(len(vectors))], vectors, False)
    return store


def clustered(count, dim, spread, generator):
    """Copies of few centres, `spread` away: at 1e-7 the float32 neighbours of each other, at 0 all equal."""
    centres = torch.randn(7, dim, generator=generator)[torch.arange(count) % 7]
    return centres + spread * torch.randn(count, dim, generator=generator)


@pytest.mark.parametrize("spread", [None, 1e-1, 1e-4, 1e-7, 0.0])
def test_twenty_thousand_vectors(spread):
    generator = torch.Generator().manual_seed(0)
    count, dim = 20_000, 48
    rows = torch.randn(count, dim, generator=generator) if spread is None else clustered(count, dim, spread, generator)
    rows = torch.nn.functional.normalize(rows, dim=1)
    queries = torch.cat([torch.nn.functional.normalize(torch.randn(3, dim, generator=generator), dim=1), rows[-2:]])
    assert searched(store_of(rows), queries, 5) == brute_force(rows, queries, 5)


def test_the_first_pass_leaves_few_rows():
    generator = torch.Generator().manual_seed(1)
    rows = torch.nn.functional.normalize(torch.randn(20_000, 384, generator=generator), dim=1)
    index = ExactIndex(384).append(rows, 0)
    found = index.candidates(rows[:50] + 0, 3, len(rows), torch.empty(0, dtype=torch.int64))
    assert sum(map(len, found)) < 50 * 8


@settings(max_examples=80, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 70), st.integers(1, 2100), st.integers(1, 6), st.integers(-30, 30))
def test_any_shape_and_scale(seed, dim, count, k, power):
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(count, dim, generator=generator) * 10.0**power
    # rows of very different length, some of them zero or subnormal in float16
    rows *= torch.rand(count, 1, generator=generator).pow(8).mul(2).sub(0.01).clamp(min=0)
    queries = torch.randn(3, dim, generator=generator) * 10.0 ** (power // 2)
    store = Store(dim, ExactIndex)
    for first in range(0, count, 700):
        part = rows[first : first + 700]
        store.add([str(first + i) for i in range(len(part))], part, False)
    assert searched(store, queries, k) == brute_force(rows, queries, k)


@pytest.fixture(params=[*cpu._cpu.usable_isas(), "reference"])
def kernels(request):
    """Each instruction set of this CPU, and the specification."""
    if request.param == "reference":
        with lk.use_backend("reference"):
            yield
        return
    before = cpu._cpu.current_isa()
    cpu._cpu.force_isa(request.param)
    yield
    cpu._cpu.force_isa(before)


@pytest.mark.parametrize("dim", [7, 48, 384])
def test_every_kernel_keeps_the_bound(kernels, dim):
    generator = torch.Generator().manual_seed(dim)
    rows = clustered(3000, dim, 1e-3, generator) * torch.rand(3000, 1, generator=generator).pow(6)
    queries = torch.randn(5, dim, generator=generator)
    assert searched(store_of(rows), queries, 4) == brute_force(rows, queries, 4)


def test_removed_rows_are_not_found_and_a_longer_row_rescales():
    generator = torch.Generator().manual_seed(2)
    rows = torch.randn(500, 33, generator=generator)
    store = store_of(rows)
    queries = torch.randn(4, 33, generator=generator)
    old = store.snapshot
    for i in range(0, 500, 3):
        store.remove(str(i))
    store.add(["500"], 1e6 * rows[:1], False)
    left = [i for i in range(500) if i % 3] + [500]
    vectors = torch.cat([rows, 1e6 * rows[:1]])[left]
    expected = [[(left[i], score) for i, score in row] for row in brute_force(vectors, queries, 7)]
    assert searched(store, queries, 7) == expected
    # who took a snapshot before still sees what was
    assert [[(int(n), s) for n, s in row] for row in old.search(queries, [7] * 4)] == brute_force(rows, queries, 7)


@pytest.mark.parametrize("dim", [1, 2, 5, 63, 384, 1000])
def test_exact_scores_against_exact_sums(dim):
    generator = torch.Generator().manual_seed(dim)
    rows, query = torch.randn(9, dim, generator=generator), torch.randn(dim, generator=generator)
    scores = exact_scores(query, rows)
    for row, score in zip(rows.double(), scores.tolist(), strict=True):
        terms = (row * query.double()).tolist()
        bound = math.ceil(math.log2(dim) + 1) * 2.0**-53 * math.fsum(map(abs, terms))
        assert abs(score - math.fsum(terms)) <= bound
    assert torch.equal(scores, torch.cat([exact_scores(query, row[None]) for row in rows]))


def test_faiss_behind_the_same_interface(tmp_path):
    pytest.importorskip("faiss")
    generator = torch.Generator().manual_seed(3)
    rows = clustered(3000, 32, 0.5, generator)
    exact, graph = LoraRetriever(), LoraRetriever(index="faiss")
    for i, row in enumerate(rows):
        exact.add_embedding(str(i), row)
        graph.add_embedding(str(i), row)
    for i in range(0, 3000, 5):
        exact.remove(str(i))
        graph.remove(str(i))
    queries = torch.randn(60, 32, generator=generator)
    pairs = list(zip(exact.search(queries, k=3), graph.search(queries, k=3), strict=True))
    scores = dict(enumerate(map(dict, exact.search(queries, k=2400))))
    assert all(len(found) == 3 and all(scores[i][n] == s for n, s in found) for i, (_, found) in enumerate(pairs))
    assert sum(len({n for n, _ in a} & {n for n, _ in b}) for a, b in pairs) >= 0.9 * 180
    graph.save(tmp_path)
    assert LoraRetriever.load(tmp_path).names == exact.names
    for i in range(3000):
        if i % 5:
            graph.remove(str(i))
    assert graph.search(queries[:1]) == [[]]


def test_without_faiss_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(ValueError, match="pip install faiss-cpu"):
        LoraRetriever(index="faiss").add_embedding("a", torch.ones(3))
