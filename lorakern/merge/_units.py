"""The pool of LoRA-LEGO: each rank of each adapter of a module is a unit, its row of A with its column of B."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from lorakern.merge.registry import Term
from lorakern.ops.gram import gram


class Pool(NamedTuple):
    """The units of a module; the sum of its updates is ``factor * sum_u scale[u] b[u] a[u]^T``.

    They are sorted, the longest first, so that neither the order of the adapters nor that of their ranks matters.

    Attributes:
        a: (R, d_in) float32 or float64, rows of the A_i.
        b: (R, d_out) likewise, of any strides, columns of the B_i.
        scale: (R,) float64, 1 for all units if scales are folded into a and b.
        factor: what multiplies every product.
        weight: (R,) float64, above 0: how much a unit counts in a mean.
        term, rank: (R,) int64: of which term each is which rank.
    """

    a: torch.Tensor
    b: torch.Tensor
    scale: torch.Tensor
    factor: float
    weight: torch.Tensor
    term: torch.Tensor
    rank: torch.Tensor

    @property
    def size(self) -> int:
        return self.a.shape[0]

    @property
    def parts(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.a, self.b

    def signed(self, sign: torch.Tensor) -> "Pool":
        """The same products, each a and b multiplied by 1 or -1."""
        sign = sign.to(self.a.dtype)[:, None]
        return self._replace(a=self.a * sign, b=self.b * sign)


def pool_of(
    terms: Sequence[Term], *, fold_scale: bool, weights_as: str, balance: bool, align_signs: bool
) -> Pool | None:
    """The pool of the terms that are not multiplied by zero; None if all are.

    A unit's factor f is its adapter's scale, with the sign of the weight, whose magnitude counts in means
    (``weights_as="samples"``); or scale times weight, and all count alike ("scales"). ``fold_scale`` multiplies a by
    sqrt|f| and b by sgn(f) sqrt|f|. The largest |f| is left to `Pool.factor`, so equal scales change no bit.
    """
    held = [(i, term) for i, term in enumerate(terms) if term.factor]
    if not held:
        return None
    samples = weights_as == "samples"
    factors = [math.copysign(1.0, term.weight) * term.scale if samples else term.factor for _, term in held]
    weights = [abs(term.weight) if samples else 1.0 for _, term in held]
    device, ranks = held[0][1].A.device, torch.tensor([term.rank for _, term in held])

    def spread(values: Sequence[float]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.float64).repeat_interleave(ranks).to(device)

    largest = max(map(abs, factors))
    scale = spread([factor / largest for factor in factors])
    a, b = torch.cat([term.A for _, term in held]), torch.cat([term.B for _, term in held], dim=1)
    if fold_scale:
        root = scale.abs().sqrt()
        a, b, scale = a * root[:, None].to(a.dtype), b * (root * scale.sign()).to(b.dtype), torch.ones_like(scale)
    if balance:
        root = (_norms(b.T) / _norms(a)).sqrt()
        # a product of zero has no balance
        root = root.where(root.isfinite() & (root > 0), 1.0).to(a.dtype)
        a, b = a * root[:, None], b / root
    if align_signs:
        # on the side of the pool's main axis: which side that is does not matter, only that it is one for all
        gram_a, gram_b = gram([[a], [b.T]])
        axis = torch.linalg.eigh(gram_a + gram_b).eigenvectors[:, -1]
        sign = torch.where(axis < 0, -1.0, 1.0).to(a.dtype)
        a, b = a * sign[:, None], b * sign
    order = _order(a, b.T)
    term = torch.tensor([i for i, _ in held]).repeat_interleave(ranks)
    rank = torch.cat([torch.arange(count) for count in ranks.tolist()])
    return Pool(
        a[order], b[:, order].T, scale[order], largest, spread(weights)[order], term[order.cpu()], rank[order.cpu()]
    )


def _norms(rows: torch.Tensor) -> torch.Tensor:
    return torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64)


def _order(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Units by length, then by the sum of their entries: what no permutation of ranks or adapters changes."""
    # rounded, so that the last bits of a sum decide nothing
    length = torch.hypot(_norms(a), _norms(b)).float()
    total = (a.sum(1, dtype=torch.float64) + b.sum(1, dtype=torch.float64)).float()
    order = total.argsort(stable=True)
    return order[length[order].argsort(stable=True, descending=True)]
