"""The clustering ops of the reference backend, in float64 from the points put together or their inner products.

Points of problem p come as matrices `rows`: of each part of its `parts[p]` the next `blocks`, stacked; `scales[p]`
(parts, N) multiplies the rows of each part, or is empty. weights (N,) are float64.
"""

import functools
from itertools import accumulate, pairwise

import torch

from lorakern.backends import clustering


def _points(rows, blocks, parts, scales):
    """The points of each problem, (N, columns) float64."""
    rest = iter(rows)
    stacked = [torch.cat([next(rest).double() for _ in range(count)]) for count in blocks]
    for (first, last), scale in zip(pairwise(accumulate(parts, initial=0)), scales, strict=True):
        whole = stacked[first:last]
        if len(scale):
            whole = [s.double()[:, None] * x for s, x in zip(scale, whole, strict=True)]
        yield torch.cat(whole, dim=1)


def _dtype(rows):
    return torch.float64 if rows[0].dtype == torch.float64 else torch.float32


def points_gram(rows, blocks, parts, scales):
    """X X^T of each problem, X its points less their mean."""
    centered = (x - x.mean(dim=0) for x in _points(rows, blocks, parts, scales))
    return [(x @ x.T).to(_dtype(rows)) for x in centered]


def kmeans_distances(rows, blocks, parts, scales, centroids):
    """||x_i - c||^2 of all points and centroids, (N, k)."""
    out = []
    for x, c in zip(_points(rows, blocks, parts, scales), centroids, strict=True):
        distance = torch.cdist(x, c.double(), compute_mode="donot_use_mm_for_euclid_dist")
        out.append(distance.square().to(_dtype(rows)))
    return out


def kmeans_assign(rows, blocks, parts, scales, centroids):
    """Of each point the nearest centroid, the lower of several, and its squared distance."""
    labels, sqdist = [], []
    for x, c in zip(_points(rows, blocks, parts, scales), centroids, strict=True):
        c = c.double()
        label = (c.square().sum(dim=1) - 2 * x @ c.T).argmin(dim=1)
        labels.append(label)
        sqdist.append((x - c[label]).square().sum(dim=1).to(_dtype(rows)))
    return labels, sqdist


def kmeans_update(rows, blocks, parts, scales, members, labels, weights, ks):
    """Weighted means of the members, their weights, and sum w_i ||x_i - mean of its label||^2: 0 without labels."""
    centroids, counts, inertia = [], [], []
    points = _points(rows, blocks, parts, scales)
    for x, member, label, w, k in zip(points, members, labels, weights, ks, strict=True):
        chosen = _one_hot(member, k) * w[:, None]
        count = chosen.sum(dim=0)
        mean = chosen.T @ x / torch.where(count > 0, count, 1.0)[:, None]
        centroids.append(mean.to(_dtype(rows)))
        counts.append(count)
        inertia.append(w[: len(label)] @ (x[: len(label)] - mean[label]).square().sum(dim=1))
    return centroids, counts, torch.stack(inertia)


def kmeans_seed(grams, weights, ks, trials, uniforms):
    """Seeds of greedy k-means++, (runs, k), by squared distances G_ii + G_jj - 2 G_ij."""
    out = []
    for gram, w, k, t in zip(grams, weights, ks, trials, strict=True):
        gram = gram.double()
        distances = (gram.diagonal()[:, None] + gram.diagonal() - 2 * gram).clamp_min(0)
        columns = functools.partial(torch.index_select, distances, 1)
        seeds = [clustering.greedy_seeds(columns, w, k, u, t) for u in uniforms]
        out.append(torch.stack(seeds))
    return out


def kmeans_lloyd(grams, weights, ks, seeds, first_labels, first_sqdist, max_iterations, tolerances):
    """(labels, members, iterations) of each problem's run of least inertia.

    Runs start from the rows of seeds (runs, k), or, if there are none, one from the labels and squared distances to
    centroids that may be anywhere.
    """
    out = []
    problems = zip(grams, weights, ks, seeds, first_labels, first_sqdist, tolerances, strict=True)
    for gram, w, k, seed, *first, tolerance in problems:
        cloud = _Cloud(gram.double(), w, k)
        starts = [_one_hot(s, len(gram)) for s in seed] or [first]
        least_shift = tolerance * cloud.variance()
        steps = cloud.assign, cloud.mixture, cloud.shift
        runs = [clustering.lloyd(*steps, start, w, k, max_iterations, least_shift) for start in starts]
        out.append(min(runs, key=lambda run: float(run[1] @ w)))
    labels, _, members, _, iterations = map(list, zip(*out, strict=True))
    return labels, members, torch.tensor(iterations)


def _one_hot(labels, count):
    return torch.nn.functional.one_hot(labels, count).double()


class _Cloud:
    """Points X of which G = X X^T is known. Centroids are M X, row c of M (k, N) being w_i / sum of w of its members:

    ||x_i - c||^2 = G_ii - 2 (G M^T)_ic + (M G M^T)_cc.
    """

    def __init__(self, gram, weights, k):
        self.gram, self.weights, self.k = gram, weights, k

    def variance(self):
        n = len(self.gram)
        return ((self.gram.trace() - self.gram.sum() / n) / n).clamp_min(0)

    def mixture(self, members):
        chosen = _one_hot(members, self.k).T * self.weights
        return chosen / chosen.sum(dim=1, keepdim=True)

    def assign(self, M):
        if isinstance(M, list):
            return M[0], M[1].double()
        scores = self._squares(M) - 2 * self.gram @ M.T
        return scores.argmin(dim=1), (self.gram.diagonal() + scores.amin(dim=1)).clamp_min(0)

    def shift(self, M, new):
        if not isinstance(M, list):
            return self._squares(new - M).clamp_min(0).sum()
        labels, sqdist = M
        if not torch.equal(new, self.mixture(labels)):  # a cluster was reseeded
            return torch.inf
        # What the distances to the old centroid exceed those to the mean by, on average, is its squared shift.
        cross = (self.gram @ new.T).gather(1, labels[:, None])[:, 0]
        to_mean = self.gram.diagonal() - 2 * cross + self._squares(new)[labels]
        return (new.gather(0, labels[None])[0] * (sqdist - to_mean)).sum().clamp_min(0)

    def _squares(self, M):
        return ((M @ self.gram) * M).sum(dim=1)
