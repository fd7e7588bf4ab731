"""The clusters of LoRA-LEGO: the pools of many modules at once, at a number of clusters or at a share to be kept."""

from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import torch

from lorakern.merge._kmeans import kmeans
from lorakern.merge._units import Pool, pool_of
from lorakern.merge.registry import Term

# Numbers in the factors of the modules that are clustered in one call, unless one module has more.
_BATCH_NUMBERS = 1 << 26
_SIGN_ROUNDS = 10


class Options(NamedTuple):
    """How the units of a module are made and clustered; `lorakern.merge.lego.lego` says what they mean."""

    fold_scale: bool
    assign: str
    align_signs: bool
    balance: bool
    weights_as: str
    share_of: str
    init: str
    n_init: int
    max_iter: int


class Clusters(NamedTuple):
    """A pool and the cluster of each of its units: labels (R,) int64, from 0 to k - 1 by their first unit."""

    pool: Pool
    labels: torch.Tensor
    k: int
    inertia: float

    def averages(self) -> torch.Tensor:
        """(k, R) float64: row c times the units is their weighted mean in cluster c."""
        own = torch.zeros(self.k, self.pool.size, dtype=torch.float64, device=self.labels.device)
        own[self.labels, torch.arange(self.pool.size, device=self.labels.device)] = self.pool.weight
        return own / own.sum(1, keepdim=True)


def clustered(
    modules: Mapping[str, list[Term]],
    ranks: Callable[[str], int | float | None],
    generators: Callable[[str], torch.Generator],
    options: Options,
) -> Iterator[tuple[str, Clusters | None]]:
    """(module, clusters) of every module, None where no update has a factor other than zero."""
    batch, numbers = {}, 0
    for module, terms in modules.items():
        pool = pool_of(terms, **{name: getattr(options, name) for name in _OF_THE_POOL})
        if pool is None:
            yield module, None
            continue
        size = pool.a.numel() + pool.b.numel()
        if batch and numbers + size > _BATCH_NUMBERS:
            yield from _search(batch, generators, options).items()
            batch, numbers = {}, 0
        rank = ranks(module)
        batch[module] = pool, max(term.rank for term in terms if term.factor) if rank is None else rank
        numbers += size
    yield from _search(batch, generators, options).items()


_OF_THE_POOL = ("fold_scale", "weights_as", "balance", "align_signs")


def _search(
    batch: Mapping[str, tuple[Pool, int | float]], generators: Callable[[str], torch.Generator], options: Options
) -> dict[str, Clusters]:
    """The clusters at each module's rank, or at the fewest that a bisection finds to keep its share."""
    pools = {module: pool for module, (pool, _) in batch.items()}
    shares = {module: rank for module, (_, rank) in batch.items() if isinstance(rank, float)}
    allowed = {module: (1 - share) * _spread(pools[module], options) for module, share in shares.items()}
    low, high = dict.fromkeys(shares, 0), {module: pools[module].size for module in shares}
    # as many clusters as units keep everything
    found = {module: _apart(pools[module]) for module in shares}
    wanted = {module: min(rank, pool.size) for module, (pool, rank) in batch.items() if module not in shares}
    found |= _cluster(pools, wanted, generators, options)
    while wanted := {module: (low[module] + high[module]) // 2 for module in shares if high[module] - low[module] > 1}:
        for module, clusters in _cluster(pools, wanted, generators, options).items():
            if clusters.inertia <= allowed[module]:
                high[module], found[module] = wanted[module], clusters
            else:
                low[module] = wanted[module]
    return {module: found[module] for module in batch}


def _cluster(
    pools: Mapping[str, Pool],
    counts: Mapping[str, int],
    generators: Callable[[str], torch.Generator],
    options: Options,
) -> dict[str, Clusters]:
    """The clusters of the modules that `counts` names; units are turned round as long as that brings them nearer."""
    found, turning = {}, {module: pools[module] for module in counts}
    for _ in range(_SIGN_ROUNDS if options.align_signs else 1):
        if not turning:
            break
        points = {module: _points(pool, options) for module, pool in turning.items()}
        results = kmeans(
            list(points.values()),
            [counts[module] for module in turning],
            init=options.init,
            n_init=options.n_init,
            max_iter=options.max_iter,
            seed=[generators(module).initial_seed() for module in turning],
            weights=[pool.weight for pool in turning.values()],
        )
        pools, turning = turning, {}
        for (module, pool), result in zip(pools.items(), results, strict=True):
            found[module] = _numbered(pool, result.labels, result.inertia)
            if options.align_signs:
                opposite = _opposite(points[module], result.centroids)
                if opposite.any():
                    turning[module] = pool.signed(1.0 - 2.0 * opposite)
    return found


def _points(pool: Pool, options: Options) -> tuple[torch.Tensor, torch.Tensor]:
    """What is clustered: the units, or a and b each of length one."""
    if options.assign == "raw":
        return pool.parts
    return tuple(torch.nn.functional.normalize(part, dim=1) for part in pool.parts)


def _spread(pool: Pool, options: Options) -> float:
    """``sum_u weight_u ||point_u - c||^2``, c = 0 for the energy and the mean for the inertia."""
    total = 0.0
    for part in _points(pool, options):
        part = part.double()
        if options.share_of == "inertia":
            part = part - pool.weight @ part / pool.weight.sum()
        total += float(pool.weight @ part.square().sum(1))
    return total


def _apart(pool: Pool) -> Clusters:
    return Clusters(pool, torch.arange(pool.size, device=pool.a.device), pool.size, 0.0)


def _numbered(pool: Pool, labels: torch.Tensor, inertia: float) -> Clusters:
    """The clusters that have units, in the order of their first ones."""
    numbers: dict[int, int] = {}
    renamed = [numbers.setdefault(label, len(numbers)) for label in labels.tolist()]
    return Clusters(pool, torch.tensor(renamed, device=pool.a.device), len(numbers), float(inertia))


def _opposite(points: tuple[torch.Tensor, ...], centroids: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """(R,) whether a point's opposite is nearer to some centroid than the point is to any."""
    products = sum(x.double() @ mean.double().T for x, mean in zip(points, centroids, strict=True))
    squares = sum(mean.double().square().sum(1) for mean in centroids)
    here, there = ((squares - 2 * sign * products).amin(1) for sign in (1, -1))
    return there < here - 1e-9 * here.abs()
