"""K-means in Gram space, float64."""

from typing import NamedTuple

import torch

from lorakern.ops.gram import gram


class KMeansResult(NamedTuple):
    labels: torch.Tensor
    centroids: tuple[torch.Tensor, ...]
    inertia: float
    n_iter: int


def kmeans(points, k, *, init, n_init, max_iter, seed, weights):
    return [_one(p, count, init, n_init, max_iter, seed, w) for p, count, w in zip(points, k, weights, strict=True)]


def kmeans_update(points, labels, k, *, weights, scales):
    M = _means(labels, k, weights)
    dtype = points[0][0].dtype
    parts = [torch.cat(part) * s[:, None] for part, s in zip(points, scales, strict=True)]
    return tuple((M @ part).to(dtype) for part in parts), M.sum(1)


def _one(points, k, init, n_init, max_iter, seed, weight):
    (G,) = gram([[points]])
    generator = torch.Generator().manual_seed(seed)
    runs = (_lloyd(G, _seeds(G, k, init, weight, generator), k, weight, max_iter) for _ in range(n_init))
    return min(runs, key=_inertia)


def _inertia(result):
    return result.inertia


def _means(labels, k, weight):
    M = torch.zeros(k, len(labels), dtype=torch.float64)
    M[labels, torch.arange(len(labels))] = weight
    return M / M.sum(1, keepdim=True).clamp_min(1e-300)


def _seeds(G, k, init, weight, generator):
    if init == "random":
        return torch.randperm(len(G), generator=generator)[:k]
    chosen = [int(torch.multinomial(weight, 1, generator=generator))]
    square = G.diagonal()
    nearest = (square + square[chosen[0]] - 2 * G[chosen[0]]).clamp_min(0)
    for _ in range(k - 1):
        mass = weight * nearest
        mass[chosen] = 0
        if not mass.any():
            mass = torch.ones_like(mass)
            mass[chosen] = 0
        tries = torch.multinomial(mass, 2 + k.bit_length(), replacement=True, generator=generator)
        options = torch.minimum(nearest, (square + square[tries, None] - 2 * G[tries]).clamp_min(0))
        best = int((options @ weight).argmin())
        chosen.append(int(tries[best]))
        nearest = options[best]
    return torch.tensor(chosen)


def _lloyd(G, seeds, k, weight, max_iter):
    M = torch.zeros(k, len(G), dtype=torch.float64)
    M[torch.arange(k), seeds] = 1
    labels = None
    for _ in range(max_iter):
        S = M @ G
        distance = G.diagonal() - 2 * S + (S * M).sum(1, keepdim=True)
        new = distance.argmin(0)
        near = distance.amin(0)
        for empty in set(range(k)) - set(new.tolist()):
            counts = torch.bincount(new, minlength=k)
            far = torch.where(counts[new] > 1, near, -torch.inf).argmax()
            new[far], near[far] = empty, 0
        if labels is not None and torch.equal(new, labels):
            break
        labels = new
        M = _means(labels, k, weight)
    S = M @ G
    distance = G.diagonal() - 2 * S + (S * M).sum(1, keepdim=True)
    own = distance[labels, torch.arange(len(G))].clamp_min(0)
    return KMeansResult(labels, (), float(own @ weight), 0)
