"""The pool of LoRA-LEGO: each rank of each adapter of a module is a unit, its row of A with its column of B."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch

from lorakern.errors import LorakernError
from lorakern.merge.registry import Term
from lorakern.ops.gram import gram


class Pool(NamedTuple):
    """The units of a module, ``u = [s_a a; s_b b]``, R of them; all that clustering needs are their inner products.

    Attributes:
        terms: the terms whose updates are not multiplied by zero; a are the rows of their A, b the columns of their B.
        places: the place of each among all terms of the module.
        scales: (2, R) float64, s_a and s_b.
        products: (2, R, R) float64, ``s_a a . s_a a`` and ``s_b b . s_b b`` of all pairs of units.
        weights: (R,) float64, above 0: how much a unit counts in a mean.
        shares: (R,) float64, which part of `factor` multiplies a unit's product; 1 if scales are folded into the units.
        factor: the sum of the updates is ``factor * sum_u shares_u (s_b b) (s_a a)^T``.
    """

    terms: list[Term]
    places: list[int]
    scales: torch.Tensor
    products: torch.Tensor
    weights: torch.Tensor
    shares: torch.Tensor
    factor: float

    @property
    def size(self) -> int:
        return self.weights.shape[0]

    @property
    def parts(self) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """The a and the b, rows of one matrix a term."""
        return [term.A for term in self.terms], [term.B.T for term in self.terms]

    def scaled(self, scales: torch.Tensor) -> "Pool":
        """The units with a multiplied by ``scales[0]`` and b by ``scales[1]``, of shape (2, R)."""
        products = scales[:, :, None] * self.products * scales[:, None, :]
        return self._replace(scales=self.scales * scales, products=products)

    def turned(self, signs: torch.Tensor) -> "Pool":
        """The same maps, (a, b) as (-a, -b) where ``signs`` (R,) is -1."""
        return self.scaled(signs.expand(2, -1))


def pools(
    modules: Mapping[str, Sequence[Term]], *, fold_scale: bool, weights_as: str, balance: bool, align_signs: bool
) -> Iterator[tuple[str, Pool]]:
    """The pools of all modules that have a unit.

    Raises `LorakernError` where the inner products overflow.
    """
    held = {module: [pair for pair in enumerate(terms) if pair[1].factor] for module, terms in modules.items()}
    held = {module: pairs for module, pairs in held.items() if pairs}
    parts = [part for pairs in held.values() for part in ([t.A for _, t in pairs], [t.B.T for _, t in pairs])]
    grams = gram(parts) if parts else []
    for (module, pairs), a, b in zip(held.items(), grams[::2], grams[1::2], strict=True):
        products = torch.stack([a, b])
        if not products.isfinite().all():
            raise LorakernError(
                f"{module}: lego: the squares of its factors overflow float64; make the factors smaller"
            )
        pool = _pool(pairs, products, fold_scale, weights_as)
        if balance:
            pool = _balanced(pool)
        if align_signs:
            pool = _one_sided(pool)
        yield module, pool


def _pool(pairs: list[tuple[int, Term]], products: torch.Tensor, fold_scale: bool, weights_as: str) -> Pool:
    """The largest factor is left to `Pool.factor`: equal scales change no bit of a unit."""
    terms = [term for _, term in pairs]
    samples = weights_as == "samples"
    factors = [math.copysign(1.0, term.weight) * term.scale if samples else term.factor for term in terms]
    ranks = torch.tensor([term.rank for term in terms])

    def spread(values: Sequence[float]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.float64).repeat_interleave(ranks).to(products.device)

    largest = max(map(abs, factors))
    weights = spread([abs(term.weight) if samples else 1.0 for term in terms])
    shares = spread([factor / largest for factor in factors])
    one = torch.ones_like(shares)
    pool = Pool(terms, [i for i, _ in pairs], one.expand(2, -1), products, weights, shares, largest)
    if not fold_scale:
        return pool
    root = shares.abs().sqrt()
    return pool.scaled(torch.stack([root, root * shares.sign()]))._replace(shares=one)


def _balanced(pool: Pool) -> Pool:
    """Every a and b of the same length."""
    lengths_a, lengths_b = pool.products.diagonal(dim1=1, dim2=2).sqrt()
    root = (lengths_b / lengths_a).sqrt()
    # a product of zero has no balance
    root = root.where(root.isfinite() & (root > 0), 1.0)
    return pool.scaled(torch.stack([root, 1 / root]))


def _one_sided(pool: Pool) -> Pool:
    """Every unit on the same side of their main axis, whichever that is."""
    axis = torch.linalg.eigh(pool.products.sum(0)).eigenvectors[:, -1]
    return pool.turned(torch.where(axis < 0, -1.0, 1.0).to(axis))
