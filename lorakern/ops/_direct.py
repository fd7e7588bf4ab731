"""k-means on the points themselves, one problem after the other, with the kernels of any backend."""

import torch

from lorakern.backends import clustering
from lorakern.ops import _clustering
from lorakern.ops._points import Points, flat


def seeds(problem: Points, k: int, trials: int, uniforms: torch.Tensor) -> torch.Tensor:
    """(runs, k) points by greedy k-means++."""

    def distances(indices):
        return _clustering.distances(*flat([problem]), [problem.rows(indices)])[0].double()

    return torch.stack([clustering.greedy_seeds(distances, problem.weights, k, u, trials) for u in uniforms])


def lloyd(problem: Points, k: int, starts: list[torch.Tensor], max_iterations: int, tol: float) -> tuple:
    """(labels, centroids (k, D), inertia, iterations) of the best of the runs from these centroids."""
    points, weights = flat([problem]), [problem.weights]
    zeros, ones = torch.zeros(problem.count, dtype=torch.int64, device=problem.device), torch.ones_like(problem.weights)
    _, _, spread = _clustering.update(*points, [zeros], [zeros], [ones], [1])
    least_shift = tol * float(spread) / problem.count / sum(problem.columns)

    def assign(centroids):
        labels, sqdist = _clustering.assign(*points, [centroids])
        return labels[0], sqdist[0].double()

    def update(members):
        return _clustering.update(*points, [members], [members[:0]], weights, [k])[0][0]

    def shift(old, new):
        return float((new.double() - old.double()).square().sum())

    def inertia(run):
        return float(problem.weights @ run[1])

    runs = (
        clustering.lloyd(assign, update, shift, start, problem.weights, k, max_iterations, least_shift)
        for start in starts
    )
    labels, _, _, centroids, iterations = best = min(runs, key=inertia)
    return labels, centroids, inertia(best), iterations
