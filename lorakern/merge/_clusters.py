"""The clusters of LoRA-LEGO: many modules at once, at a number of clusters or at a share to be kept.

Everything here comes from inner products, see `Pool.products`: the factors are not read.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import torch

from lorakern.merge._units import Pool, pools
from lorakern.merge.registry import Term
from lorakern.ops.kmeans import labels_of_grams

# Numbers in the factors of the modules that are clustered in one call, unless one module has more.
_BATCH_NUMBERS = 1 << 26
_SIGN_ROUNDS = 10

Rank = int | float | None


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
    """A pool, the inner products (R, R) of what was clustered of it, and the clusters.

    Attributes:
        labels: (R,) int64, the cluster of each unit, from 0 to k - 1 with no number left out.
    """

    pool: Pool
    points: torch.Tensor
    labels: torch.Tensor
    k: int

    def averages(self) -> torch.Tensor:
        """(k, R) float64: row c times the units is their weighted mean in cluster c."""
        own = self.pool.weights.new_zeros(self.k, self.pool.size)
        own[self.labels, torch.arange(self.pool.size, device=own.device)] = self.pool.weights
        return own / own.sum(1, keepdim=True)

    def energy(self) -> float:
        """``sum_u w_u ||u||^2``."""
        return float(self.pool.weights @ self.points.diagonal())

    def inertia(self) -> float:
        """``sum_u w_u ||u - m_u||^2`` with m_u the mean of u's cluster: what of the energy is lost."""
        averages = self.averages()
        kept = (averages @ self.points * averages).sum(1)
        return max(0.0, self.energy() - float(kept[self.labels] @ self.pool.weights))

    def opposite(self) -> torch.Tensor:
        """(R,) whether a unit's opposite is nearer to some mean than the unit is to any."""
        averages = self.averages()
        products = self.points @ averages.T
        squares = (averages @ products).diagonal()
        here, there = ((squares - 2 * sign * products).amin(1) for sign in (1, -1))
        return there < here - 1e-9 * self.points.diagonal()


def clustered(
    modules: Mapping[str, list[Term]],
    ranks: Callable[[str], Rank],
    generators: Callable[[str], torch.Generator],
    options: Options,
) -> Iterator[tuple[str, Clusters | None]]:
    """(module, clusters) of all modules, None where all updates are multiplied by zero."""
    # one seed for all modules, whichever they are
    seed = generators("").initial_seed()
    batch, numbers, device = {}, 0, None
    for module, terms in modules.items():
        size = sum(term.A.numel() + term.B.numel() for term in terms)
        if batch and (numbers + size > _BATCH_NUMBERS or terms[0].A.device != device):
            yield from _search(batch, ranks, seed, options)
            batch, numbers = {}, 0
        batch[module], device = terms, terms[0].A.device
        numbers += size
    yield from _search(batch, ranks, seed, options)


def _search(
    batch: Mapping[str, list[Term]], ranks: Callable[[str], Rank], seed: int, options: Options
) -> Iterator[tuple[str, Clusters | None]]:
    """The clusters at each module's rank, or the fewest that a bisection finds to keep its share.

    As many clusters as units keep everything, equal units too.
    """
    own = {name: getattr(options, name) for name in ("fold_scale", "weights_as", "balance", "align_signs")}
    pool_of = dict(pools(batch, **own))
    wanted, low, high, found, allowed = {}, {}, {}, {}, {}
    for module, pool in pool_of.items():
        rank = max(term.rank for term in pool.terms) if ranks(module) is None else ranks(module)
        apart = torch.arange(pool.size, device=pool.weights.device)
        found[module] = clusters = Clusters(pool, _points(pool, options), apart, pool.size)
        if isinstance(rank, float):
            low[module], high[module] = 0, pool.size
            allowed[module] = (1 - rank) * _total(clusters, options)
        elif rank < pool.size:
            wanted[module] = rank
    found |= _cluster(pool_of, wanted, seed, options)
    while wanted := {module: (low[module] + high[module]) // 2 for module in low if high[module] - low[module] > 1}:
        for module, clusters in _cluster(pool_of, wanted, seed, options).items():
            if clusters.inertia() <= allowed[module]:
                high[module], found[module] = wanted[module], clusters
            else:
                low[module] = wanted[module]
    yield from ((module, found.get(module)) for module in batch)


def _cluster(
    pool_of: Mapping[str, Pool], counts: Mapping[str, int], seed: int, options: Options
) -> dict[str, Clusters]:
    """The clusters of the modules that `counts` names; units are turned as long as that brings them nearer."""
    found, turning = {}, {module: pool_of[module] for module in counts}
    for _ in range(_SIGN_ROUNDS if options.align_signs else 1):
        if not turning:
            break
        points = [_points(pool, options) for pool in turning.values()]
        orders = [_order(products) for products in points]
        results = labels_of_grams(
            [_scaled(products[order][:, order]) for products, order in zip(points, orders, strict=True)],
            [counts[module] for module in turning],
            [pool.weights[order] for pool, order in zip(turning.values(), orders, strict=True)],
            init=options.init,
            n_init=options.n_init,
            max_iter=options.max_iter,
            seed=seed,
        )
        before, turning = turning, {}
        for (module, pool), products, order, result in zip(before.items(), points, orders, results, strict=True):
            labels, k = _numbered(result)
            found[module] = clusters = Clusters(pool, products, labels[order.argsort()], k)
            if options.align_signs and (opposite := clusters.opposite()).any():
                turning[module] = pool.turned(1.0 - 2.0 * opposite)
    return found


def _points(pool: Pool, options: Options) -> torch.Tensor:
    """Inner products (R, R) of what is clustered: the units, or a and b each of length one."""
    if options.assign == "raw":
        return pool.products.sum(0)
    lengths = pool.products.diagonal(dim1=1, dim2=2).sqrt()
    return pool.scaled((1 / lengths).where(lengths > 0, 0.0)).products.sum(0)


def _order(products: torch.Tensor) -> torch.Tensor:
    """The longest first, an order that no permutation of the units changes.

    K-means draws places in it: so neither the order of the adapters nor that of their ranks matters.
    """
    # rounded, so that the last bits decide nothing
    length, total = products.diagonal().float(), products.sum(1).float()
    order = total.argsort(stable=True)
    return order[length[order].argsort(stable=True, descending=True)]


def _scaled(products: torch.Tensor) -> torch.Tensor:
    """As float32, by a factor that makes the longest as long as one."""
    return (products / (products.diagonal().amax() or 1.0)).float()


def _total(clusters: Clusters, options: Options) -> float:
    """What a share is of: the energy, or the inertia about the mean of all units."""
    if options.share_of == "energy":
        return clusters.energy()
    return clusters._replace(labels=torch.zeros_like(clusters.labels), k=1).inertia()


def _numbered(labels: torch.Tensor) -> tuple[torch.Tensor, int]:
    """The labels that occur, numbered in the order in which they do, and how many there are."""
    numbers: dict[int, int] = {}
    renamed = [numbers.setdefault(label, len(numbers)) for label in labels.tolist()]
    return torch.tensor(renamed, device=labels.device), len(numbers)
