"""The clustering ops on a batch of problems: tables, launches, and what lies between them in plain torch."""

from itertools import accumulate

import torch

from .common import run
from .lloyd import clouds, lloyd_launch, seed_launch
from .point_tables import tables
from .points import gram_launch, nearest_launch, own_launch, update_launch


def _split(flat, sizes):
    return list(flat.split(sizes))


def _means(t, labels, weights):
    """Centroids (flat float32) and their weights (flat float64)."""
    firsts = list(accumulate(t.ks, initial=0))
    keys = torch.cat([label + first for label, first in zip(labels, firsts, strict=False)])
    device = keys.device
    order = torch.argsort(keys, stable=True)
    starts = torch.searchsorted(keys[order], torch.arange(firsts[-1] + 1, device=device))
    elements = sum(k * sum(widths) for k, widths in zip(t.ks, t.widths, strict=True))
    centroids = torch.empty(elements, dtype=torch.float32, device=device)
    counts = torch.empty(firsts[-1], dtype=torch.float64, device=device)
    run(update_launch(t, centroids, counts, order, starts, weights), device)
    return centroids, counts


def _own(t, labels, centroids):
    sqdist = torch.empty(sum(t.counts), dtype=torch.float32, device=labels.device)
    run(own_launch(t, sqdist, labels, centroids), labels.device)
    return sqdist


def points_gram(rows, blocks, parts, scales):
    t = tables(rows, blocks, parts, scales, [1] * len(parts))
    device, means = rows[0].device, None
    if t.points.dtype == torch.float32:
        zeros = [torch.zeros(n, dtype=torch.int64, device=device) for n in t.counts]
        means, _ = _means(t, zeros, torch.ones(sum(t.counts), dtype=torch.float64, device=device))
    out = torch.empty(sum(n * n for n in t.counts), dtype=torch.float32, device=device)
    run(gram_launch(t, out, means), device)
    return [g.view(n, n) for g, n in zip(_split(out, [n * n for n in t.counts]), t.counts, strict=True)]


def kmeans_assign(rows, blocks, parts, scales, centroids):
    t = tables(rows, blocks, parts, scales, [len(c) for c in centroids])
    means = [c.mean(dim=0) for c in centroids]
    centers = [c - mean for c, mean in zip(centroids, means, strict=True)]
    squares = torch.cat([c.double().square().sum(dim=1) for c in centers]).float()
    labels = torch.empty(sum(t.counts), dtype=torch.int64, device=rows[0].device)
    launch = nearest_launch(t, labels, torch.cat([c.flatten() for c in centers]), torch.cat(means), squares)
    run(launch, labels.device)
    sqdist = _own(t, labels, torch.cat([c.flatten() for c in centroids]))
    return _split(labels, t.counts), _split(sqdist, t.counts)


def kmeans_update(rows, blocks, parts, scales, members, labels, weights, ks):
    t = tables(rows, blocks, parts, scales, ks)
    flat_weights = torch.cat(weights)
    centroids, counts = _means(t, members, flat_weights)
    inertia = torch.zeros(len(ks), dtype=torch.float64, device=centroids.device)
    if all(len(label) for label in labels):
        sqdist = _own(t, torch.cat(labels), centroids).double()
        inertia = torch.stack([(w * s).sum() for w, s in zip(weights, _split(sqdist, t.counts), strict=True)])
    sizes = [k * sum(widths) for k, widths in zip(ks, t.widths, strict=True)]
    shaped = [c.view(k, -1) for c, k in zip(_split(centroids, sizes), ks, strict=True)]
    return shaped, _split(counts, list(ks)), inertia


def _flat(tensors):
    return torch.cat([t.flatten() for t in tensors])


def kmeans_seed(grams, weights, ks, trials, uniforms):
    counts, device = [len(g) for g in grams], uniforms.device
    seeds = torch.empty(sum(ks) * len(uniforms), dtype=torch.int64, device=device)
    table = clouds(counts, ks, trials).to(device)
    run(seed_launch(seeds, _flat(grams), _flat(weights), uniforms, table, counts), device)
    return [s.view(len(uniforms), k) for s, k in zip(_split(seeds, [k * len(uniforms) for k in ks]), ks, strict=True)]


def kmeans_lloyd(grams, weights, ks, seeds, first_labels, first_sqdist, max_iterations, tolerances):
    """Problems are launched together by how many runs they have, and whether these start from seeds."""
    labels, members, iterations = [None] * len(ks), [None] * len(ks), [0] * len(ks)
    kinds = [len(s) for s in seeds]
    for runs in sorted(set(kinds)):
        chosen = [i for i, kind in enumerate(kinds) if kind == runs]
        found = _lloyd(
            *(
                [given[i] for i in chosen]
                for given in (grams, weights, ks, seeds, first_labels, first_sqdist, tolerances)
            ),
            max_iterations,
        )
        for i, *of_problem in zip(chosen, *found, strict=True):
            labels[i], members[i], iterations[i] = of_problem
    return labels, members, torch.stack(iterations).cpu()


def _lloyd(grams, weights, ks, seeds, first_labels, first_sqdist, tolerances, max_iterations):
    counts, runs, device = [len(g) for g in grams], max(1, len(seeds[0])), grams[0].device
    labels, members = (torch.empty(sum(counts) * runs, dtype=torch.int64, device=device) for _ in range(2))
    iterations = torch.empty(len(ks), runs, dtype=torch.int64, device=device)
    inertia = torch.empty(len(ks), runs, dtype=torch.float64, device=device)
    has_seeds = len(seeds[0]) > 0
    first = (None, None) if has_seeds else (_flat(first_labels), _flat(first_sqdist).double())
    launch = lloyd_launch(
        (labels, members, iterations, inertia),
        _flat(grams),
        _flat(weights),
        _flat(seeds) if has_seeds else None,
        first,
        torch.tensor(tolerances, dtype=torch.float64).to(device),
        clouds(counts, ks, [0] * len(ks)).to(device),
        counts,
        ks,
        runs,
        max_iterations,
    )
    run(launch, device)
    best = inertia.argmin(dim=1)
    sizes = [n * runs for n in counts]

    def of_best(flat):
        whole = [part.view(runs, n) for part, n in zip(_split(flat, sizes), counts, strict=True)]
        return [part.index_select(0, b[None])[0] for part, b in zip(whole, best, strict=True)]

    return of_best(labels), of_best(members), list(iterations.gather(1, best[:, None])[:, 0])


def launches(config):
    """(name, launch) of every variant of a configuration of the clustering ops, for tensors without memory."""

    def empty(*shape, dtype=torch.float32):
        return torch.empty(shape, dtype=dtype, device="meta")

    n, k, columns = config.block if config.op in ("seed", "lloyd") else 64, 16, 4096
    labels, numbers, table = empty(n, dtype=torch.int64), empty(n, dtype=torch.float64), empty(1, 6, dtype=torch.int64)
    seeds = empty(k, dtype=torch.int64)
    if config.op == "seed":
        yield "full", seed_launch(seeds, empty(n, n), numbers, numbers.view(1, n), table, [n])
        return
    if config.op == "lloyd":
        for name, start, first in (("full", seeds, (None, None)), ("plain", None, (labels, numbers))):
            outputs = labels, labels, seeds, numbers
            yield name, lloyd_launch(outputs, empty(n, n), numbers, start, first, numbers, table, [n], [k], 1, 300)
        return
    means = empty(columns) if config.dtype == torch.float32 else None
    for name, scales in (("plain", empty(0, 0)), ("full", empty(1, n))):
        t = tables([empty(n, columns, dtype=config.dtype)], [1], [1], [scales], [k])
        yield (
            name,
            {
                "points_gram": lambda t=t: gram_launch(t, empty(n, n), means),
                "nearest": lambda t=t: nearest_launch(t, labels, empty(k, columns), empty(columns), empty(k)),
                "own": lambda t=t: own_launch(t, empty(n), labels, empty(k, columns)),
                "update": lambda t=t: update_launch(t, empty(k, columns), numbers, labels, labels, numbers),
            }[config.op](),
        )
