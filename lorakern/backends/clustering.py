"""k-means in terms of what differs between its two spaces: how points are assigned and how centroids are made.

The reference runs it on inner products, `lorakern.ops` on points with the kernels of any backend. Everything is
float64; the points of a cluster are called its members, and they are those of its label but for reseeded clusters.
"""

import torch


def draw(values, uniforms):
    """Indices drawn in proportion to `values` (N,): the first whose running sum exceeds each uniform's share."""
    upto = values.cumsum(0)
    found = torch.searchsorted(upto, uniforms * upto[-1], right=True)
    return torch.minimum(found, torch.searchsorted(upto, upto[-1:]))


def greedy_seeds(distances, weights, k, uniforms, trials):
    """(k,) points by greedy k-means++; distances(points) are the squared ones of all points to those, (N, t).

    Of `trials` points drawn by their weighted squared distance to the nearest seed, the one that leaves the least
    sum of these is the next (Arthur and Vassilvitskii 2007, section 6).
    """
    seeds = [draw(weights, uniforms[:1])]
    nearest = distances(seeds[0])[:, 0]
    for c in range(k - 1):
        candidates = draw(weights * nearest, uniforms[1 + c * trials : 1 + (c + 1) * trials])
        after = torch.minimum(nearest[:, None], distances(candidates))
        best = (weights @ after).argmin(dim=0, keepdim=True)
        seeds.append(candidates[best])
        nearest = after[:, best[0]]
    return torch.cat(seeds)


def members_of(labels, sqdist, weights, k):
    """The labels, but every cluster without a point that has weight takes the farthest such point to be spared."""
    sizes = torch.bincount(labels[weights > 0], minlength=k)
    empty = (sizes == 0).nonzero()
    if not len(empty):
        return labels
    members, sqdist = labels.clone(), sqdist.clone()
    for c in empty[:, 0]:
        spared = (weights > 0) & (sizes[members] > 1)
        farthest = torch.where(spared, sqdist, -1.0).argmax()
        sizes[members[farthest]] -= 1
        sizes[c] = 1
        members[farthest], sqdist[farthest] = c, 0.0
    return members


def lloyd(assign, update, shift, centroids, weights, k, max_iterations, least_shift):
    """Lloyd's iterations until no label changes, or the centroids move by no more than `least_shift`, squared.

    assign(centroids) gives (labels, sqdist), update(members) the centroids, shift(old, new) the sum of squared moves.
    Returns (labels, sqdist, members, centroids, iterations).
    """
    old = members = None
    for iteration in range(1, max_iterations + 1):
        labels, sqdist = assign(centroids)
        if old is not None and torch.equal(labels, old):
            return labels, sqdist, members, centroids, iteration
        members = members_of(labels, sqdist, weights, k)
        previous, centroids, old = centroids, update(members), labels
        if shift(previous, centroids) <= least_shift:
            break
    return *assign(centroids), members, centroids, iteration
