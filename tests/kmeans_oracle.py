"""k-means in NumPy float64, one plain loop after the other: what the tests of clustering compare with."""

import numpy as np


def _squares(x, centers):
    return np.array([[((point - center) ** 2).sum() for center in centers] for point in x])


def lloyd(x, centers, weights=None, max_iter=300, tol=1e-4):
    """(labels, centers, inertia, iterations) from given centers, by the rules of scikit-learn's KMeans."""
    x, centers = np.asarray(x, dtype=np.float64), np.asarray(centers, dtype=np.float64)
    weights = np.ones(len(x)) if weights is None else np.asarray(weights, dtype=np.float64)
    least_shift, old, iteration, stop = tol * x.var(axis=0).mean(), None, 0, False
    while iteration < max_iter and not stop:
        iteration += 1
        squares = _squares(x, centers)
        labels = squares.argmin(axis=1)
        if old is not None and (labels == old).all():
            break
        members, distance = labels.copy(), squares.min(axis=1)
        for c in range(len(centers)):
            if not ((members == c) & (weights > 0)).any():
                sizes = np.bincount(members[weights > 0], minlength=len(centers))
                spared = (weights > 0) & (sizes[members] > 1)
                farthest = np.where(spared, distance, -1).argmax()
                members[farthest], distance[farthest] = c, 0
        clusters = [members == c for c in range(len(centers))]
        new = np.array([np.average(x[of], axis=0, weights=weights[of]) for of in clusters])
        stop = ((new - centers) ** 2).sum() <= least_shift
        centers, old = new, labels
    squares = _squares(x, centers)
    labels = squares.argmin(axis=1)
    return labels, centers, float(weights @ squares.min(axis=1)), iteration


def plus_plus(x, k, generator):
    """k points of x by greedy k-means++ with draws of its own."""
    trials = 2 + int(np.log(k))
    seeds = [x[generator.integers(len(x))]]
    for _ in range(k - 1):
        nearest = _squares(x, seeds).min(axis=1)
        candidates = generator.choice(len(x), size=trials, p=nearest / nearest.sum())
        left = [np.minimum(nearest, ((x - x[c]) ** 2).sum(axis=1)).sum() for c in candidates]
        seeds.append(x[candidates[int(np.argmin(left))]])
    return np.array(seeds)


def best_of(x, k, runs, seed=0):
    """The least inertia of several runs from seeds of k-means++."""
    x, generator = np.asarray(x, dtype=np.float64), np.random.default_rng(seed)
    return min(lloyd(x, plus_plus(x, k, generator))[2] for _ in range(runs))
