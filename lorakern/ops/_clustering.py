"""Registration of the clustering ops, on which kmeans_assign, kmeans_update and kmeans stand.

All take a ragged batch of problems: points as `_points.flat` passes them, weights (N,) float64, k as `ks`.
  points_gram         inner products of the points of each problem, less any one point, (N, N)
  kmeans_assign       labels (N,) int64 and squared distances (N,) of the nearest centroids; centroids (k, D)
  kmeans_distances    squared distances to all centroids (N, k)
  kmeans_update       centroids (k, D), weights of the clusters (k,) float64, and inertia: 0 where labels are empty
  kmeans_seed         greedy k-means++ on inner products: (runs, k) int64 by uniforms (runs, draws) float64
  kmeans_lloyd        Lloyd's iterations on inner products: labels, members (N,) int64 and iterations of the best run
"""

from itertools import accumulate, pairwise

import torch

from lorakern.ops._library import backend_for, define

_POINTS = "Tensor[] rows, int[] blocks, int[] parts, Tensor[] scales"


def _shapes(rows, blocks, parts):
    """(N, columns) of each problem."""
    firsts = pairwise(accumulate(blocks, initial=0))
    of_parts = [(sum(r.shape[0] for r in rows[a:b]), rows[a].shape[1]) for a, b in firsts]
    problems = (of_parts[a:b] for a, b in pairwise(accumulate(parts, initial=0)))
    return [(problem[0][0], sum(columns for _, columns in problem)) for problem in problems]


def _dtype(rows):
    return torch.float64 if rows[0].dtype == torch.float64 else torch.float32


def _fake_gram(rows, blocks, parts, scales):
    return [rows[0].new_empty(n, n, dtype=_dtype(rows)) for n, _ in _shapes(rows, blocks, parts)]


def _fake_assign(rows, blocks, parts, scales, centroids):
    shapes = _shapes(rows, blocks, parts)
    labels = [rows[0].new_empty(n, dtype=torch.int64) for n, _ in shapes]
    return labels, [rows[0].new_empty(n, dtype=_dtype(rows)) for n, _ in shapes]


def _fake_distances(rows, blocks, parts, scales, centroids):
    shapes = _shapes(rows, blocks, parts)
    return [rows[0].new_empty(n, len(c), dtype=_dtype(rows)) for (n, _), c in zip(shapes, centroids, strict=True)]


def _fake_update(rows, blocks, parts, scales, members, labels, weights, ks):
    shapes = _shapes(rows, blocks, parts)
    centroids = [rows[0].new_empty(k, d, dtype=_dtype(rows)) for (_, d), k in zip(shapes, ks, strict=True)]
    counts = [rows[0].new_empty(k, dtype=torch.float64) for k in ks]
    return centroids, counts, rows[0].new_empty(len(ks), dtype=torch.float64)


def _fake_seed(grams, weights, ks, trials, uniforms):
    return [uniforms.new_empty(uniforms.shape[0], k, dtype=torch.int64) for k in ks]


def _fake_lloyd(grams, weights, ks, seeds, first_labels, first_sqdist, max_iterations, tolerances):
    labels, members = ([g.new_empty(g.shape[0], dtype=torch.int64) for g in grams] for _ in range(2))
    return labels, members, torch.empty(len(ks), dtype=torch.int64)


@define(f"points_gram({_POINTS}) -> Tensor[]", _fake_gram)
def points_gram(rows, *arguments):
    return backend_for("points_gram", rows[0]).points_gram(rows, *arguments)


@define(f"kmeans_assign({_POINTS}, Tensor[] centroids) -> (Tensor[], Tensor[])", _fake_assign)
def assign(rows, *arguments):
    return backend_for("kmeans_assign", rows[0]).kmeans_assign(rows, *arguments)


@define(f"kmeans_distances({_POINTS}, Tensor[] centroids) -> Tensor[]", _fake_distances)
def distances(rows, *arguments):
    return backend_for("kmeans_distances", rows[0]).kmeans_distances(rows, *arguments)


@define(
    f"kmeans_update({_POINTS}, Tensor[] members, Tensor[] labels, Tensor[] weights, int[] ks)"
    " -> (Tensor[], Tensor[], Tensor)",
    _fake_update,
)
def update(rows, *arguments):
    return backend_for("kmeans_update", rows[0]).kmeans_update(rows, *arguments)


@define(
    "kmeans_seed(Tensor[] grams, Tensor[] weights, int[] ks, int[] trials, Tensor uniforms) -> Tensor[]", _fake_seed
)
def seed(grams, *arguments):
    return backend_for("kmeans_seed", grams[0]).kmeans_seed(grams, *arguments)


@define(
    "kmeans_lloyd(Tensor[] grams, Tensor[] weights, int[] ks, Tensor[] seeds, Tensor[] first_labels,"
    " Tensor[] first_sqdist, int max_iterations, float[] tolerances) -> (Tensor[], Tensor[], Tensor)",
    _fake_lloyd,
)
def lloyd(grams, *arguments):
    return backend_for("kmeans_lloyd", grams[0]).kmeans_lloyd(grams, *arguments)
