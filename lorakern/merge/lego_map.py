"""lego_map: which adapter's ranks LoRA-LEGO puts into which cluster."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from lorakern.errors import LorakernError
from lorakern.merge._clusters import Clusters, Options, clustered
from lorakern.merge.driver import PerModule, Progress, Rank, run_method
from lorakern.merge.inputs import Factors, Inputs, check_adapters
from lorakern.merge.registry import Method, Term, find


def lego_map(
    adapters: Sequence[Factors],
    *,
    names: Sequence[str] | None = None,
    weights: Sequence[float] | None = None,
    rank: Rank | Mapping[str, Rank] = None,
    seed: int = 0,
    missing: str = "zero",
    device: torch.device | str | None = None,
    per_module: PerModule | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> dict[str, Any]:
    """The clusters of ``merge(adapters, "lego", ...)`` of the same arguments, without the merge.

    A rank is shared if a rank of another adapter is in its cluster; kept energy is ``1 - inertia / sum_u w_u ||u||^2``.

    Args:
        adapters, weights, rank, seed, missing, device, per_module, progress, options: as in `merge` and `lego`.
        names: what to call the adapters; their places by default.

    Returns:
        Plain data: ``adapters``, the names; ``modules``, for each module path its number of clusters ``k``,
        ``kept_energy``, and ``labels``, for each adapter the cluster of each of its ranks (none where it lacks the
        module or its update is multiplied by zero); ``pairs``, in row i and column j the share of adapter i's ranks
        that have one of adapter j's in their cluster; and ``shared``, the share of all ranks that are.

    Raises:
        LorakernError: as `merge`, or another number of names than of adapters.

    LoRA-LEGO: arXiv 2409.16167.

    >>> import torch, lorakern as lk
    >>> from lorakern.merge import lego_map
    >>> a = {"proj": (torch.eye(4)[:2], torch.eye(4)[:, :2], 3.0)}
    >>> b = {"proj": (torch.eye(4)[1:3], torch.eye(4)[:, 1:3], 3.0)}
    >>> found = lego_map([a, b], names=["a", "b"], rank=3)
    >>> labels = found["modules"]["proj"]["labels"]
    >>> labels[0][1] == labels[1][0], labels[0][0] == labels[1][1], found["shared"]
    (True, False, 0.5)
    """
    check_adapters(adapters)
    names = [str(i) for i in range(len(adapters))] if names is None else list(names)
    if len(names) != len(adapters):
        raise LorakernError(f"names must be None or one for each of {len(adapters)} adapters, got {len(names)}")
    inputs = Inputs(adapters, normalize=False, missing=missing, device=device)
    found = Method("lego", _clusters, True, find("lego").options)
    arguments = {"weights": weights, "rank": rank, **options}
    modules, clusters = run_method(found, inputs, adapters, arguments, seed, per_module)
    told = {}
    for done, (module, of_module) in enumerate(clusters, 1):
        holders = [i for i, adapter in enumerate(adapters) if module in adapter]
        told[module] = _told(of_module, holders, len(adapters))
        if progress is not None:
            progress(done, len(modules), module)
    return {"adapters": names, "modules": {module: told[module] for module in modules}, **_shares(told, len(adapters))}


def _clusters(
    modules: Mapping[str, list[Term]],
    ranks: Callable[[str], Rank],
    generators: Callable[[str], torch.Generator],
    **given: Any,
) -> Iterator[tuple[str, Clusters | None]]:
    """What `lego` makes its ranks of."""
    options = {name: option.default for name, option in find("lego").options.items()} | given
    yield from clustered(modules, ranks, generators, Options(**{name: options[name] for name in Options._fields}))


def _told(clusters: Clusters | None, holders: Sequence[int], count: int) -> dict[str, Any]:
    """A module of the map; `holders` are the adapters that have it."""
    labels: list[list[int]] = [[] for _ in range(count)]
    if clusters is None:
        return {"k": 0, "kept_energy": 1.0, "labels": labels}
    pool, energy = clusters.pool, clusters.energy()
    parts = clusters.labels.split([term.rank for term in pool.terms])
    for place, part in zip(pool.places, parts, strict=True):
        labels[holders[place]] = part.tolist()
    return {"k": clusters.k, "kept_energy": 1 - clusters.inertia() / energy if energy else 1.0, "labels": labels}


def _shares(modules: Mapping[str, Mapping[str, Any]], count: int) -> dict[str, Any]:
    """`pairs` and `shared` of the map."""
    together, ranks, shared = [[0] * count for _ in range(count)], [0] * count, 0
    for module in modules.values():
        sets = [set(labels) for labels in module["labels"]]
        for i, labels in enumerate(module["labels"]):
            ranks[i] += len(labels)
            others = set().union(*(clusters for j, clusters in enumerate(sets) if j != i))
            shared += sum(label in others for label in labels)
            for j, clusters in enumerate(sets):
                together[i][j] += sum(label in clusters for label in labels)
    pairs = [[n / max(1, total) for n in row] for row, total in zip(together, ranks, strict=True)]
    return {"pairs": pairs, "shared": shared / max(1, sum(ranks))}
