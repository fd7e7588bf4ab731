"""The normal equations of one layer, and their solution."""

from typing import NamedTuple

import torch

from lorakern.merge.iteris.layers import Layer


class Equations:
    """``W (sum_i w_i G_i) = sum_i w_i W_i C_i`` of one layer, with alpha times their norms added to G_i and C_i.

    What is kept is D = sum_i w_i G_i, of each adapter's C_i only A_i C_i, as W_i is low-rank, and sum_i w_i C_i if
    W_i is the whole weight. The norm of C_i, which the regulariser takes, is not that of A_i C_i, nor a sum over
    batches: that is why C_i as such is added up first, of one adapter at a time.
    """

    def __init__(self, layer: Layer, full: bool) -> None:
        self._layer = layer
        self._full = full
        self._D = layer.weight.new_zeros(layer.d_in, layer.d_in, dtype=torch.float64)
        self._C = torch.zeros_like(self._D) if full else None
        self._AC: dict[int, torch.Tensor] = {}
        self._weights: dict[int, float] = {}
        self._ridges: dict[int, float] = {}
        self._ridge = 0.0

    def add(self, i: int, weight: float, alpha: float, C: torch.Tensor, G: torch.Tensor) -> None:
        """The term of adapter i, its weight being c_i lambda_i."""
        self._D.add_(G, alpha=weight)
        self._ridge += weight * alpha * float(torch.linalg.matrix_norm(G))
        self._AC[i] = self._layer.parts(i)[1] @ C
        if self._C is not None:
            self._C.add_(C, alpha=weight)
        self._weights[i] = weight
        self._ridges[i] = weight * alpha * float(torch.linalg.matrix_norm(C))

    def objective(self, update: torch.Tensor, energies: list[float]) -> float:
        """``sum_i w_i ||X_i W_i^T - X~_i W^T||^2`` of the update, given ``||X_i W_i^T||^2``."""
        W = update.to(self._D.device, torch.float64)
        if self._full:
            W = W + self._layer.weight
        constant = sum(weight * energies[i] for i, weight in self._weights.items())
        value = constant - 2 * float((self._right(0.0) * W).sum()) + float((W @ self._D * W).sum())
        # below zero by rounding where the fit is exact
        return max(value, 0.0) if value == value else value

    def solve(self, unit: float) -> tuple[torch.Tensor, int]:
        """The update (d_out, d_in) in float64, and how many directions the samples leave undetermined.

        Args:
            unit: the rounding error of the products that were added up.
        """
        D = self._D.clone()
        D.diagonal().add_(self._ridge)
        # Without a regulariser, what is below the rounding of the products is noise.
        noise = len(D) * unit
        pivots = len(D) * torch.finfo(torch.float64).eps if self._ridge else noise
        right = self._right(1.0)
        if self._full:
            # for W less the weight, so that undetermined directions keep what the weight has there
            right.addmm_(self._layer.weight.double(), D, alpha=-1)
        return solve_symmetric(D, right, pivots, noise)

    def _right(self, ridge: float) -> torch.Tensor:
        """``sum_i w_i W_i C_i``, with `ridge` times the regulariser of C_i in it."""
        right = torch.zeros(self._layer.weight.shape, dtype=torch.float64, device=self._D.device)
        for i, AC in self._AC.items():
            B, A = self._layer.parts(i)
            right.addmm_(B, AC * self._weights[i] + A * (ridge * self._ridges[i]))
        if self._C is not None:
            W = self._layer.weight.double()
            right.addmm_(W, self._C).add_(W, alpha=ridge * sum(self._ridges.values()))
        return right


def solve_symmetric(D: torch.Tensor, right: torch.Tensor, pivots: float, noise: float) -> tuple[torch.Tensor, int]:
    """W with ``W D = right`` by Cholesky, of least norm by eigenvectors where D is singular; and its null directions.

    Args:
        D: (n, n) float64, symmetric and positive semidefinite.
        right: (m, n) float64.
        pivots: of the triangle of D with ones on its diagonal; a smaller one, squared, makes it singular.
        noise: eigenvalues of a singular D below this share of the largest are zero.
    """
    size = D.diagonal().sqrt()
    if bool((size > 0).all()):
        triangle = cholesky((D / size).div_(size[:, None]))
        if triangle is not None and float(triangle.diagonal().amin()) ** 2 > pivots:
            return torch.cholesky_solve((right / size).T, triangle.T, upper=True).T / size, 0
    values, vectors = torch.linalg.eigh(D)
    kept = values > noise * values[-1]
    vectors = vectors[:, kept]
    return (right @ vectors / values[kept]) @ vectors.T, int((~kept).sum())


def cholesky(D: torch.Tensor, block: int = 256) -> torch.Tensor | None:
    """L with ``L L^T = D`` (n, n), in the place of D, whose upper part is left as it comes; None if it has none.

    By blocks of columns: torch clears the other triangle of its result with strides of a whole column, which takes
    longer than the decomposition where a matrix is larger than the cache.
    """
    for first in range(0, len(D), block):
        last = first + block
        D[first:, first:last].addmm_(D[first:, :first], D[first:last, :first].T, alpha=-1)
        corner, failed = torch.linalg.cholesky_ex(D[first:last, first:last])
        if failed:
            return None
        D[first:last, first:last] = corner
        below = D[last:, first:last]
        below.copy_(torch.linalg.solve_triangular(corner.T, below, upper=True, left=False))
    return D


class Energies(NamedTuple):
    """``||W_i||_F^2`` and ``||X_i W_i^T||_F^2`` of an adapter in a layer."""

    weight: float
    output: float


def energies(layer: Layer, i: int, G: torch.Tensor, full: bool, dtype: torch.dtype) -> Energies:
    """Those of the whole weight, or of what the adapter adds to it, from ``G = X_i^T X_i``, in that precision."""
    B, A = (factor.to(dtype) for factor in layer.parts(i))
    G = G.to(dtype)
    if full:
        W = layer.weight.to(dtype) + B @ A
        return Energies(float(W.square().sum()), float((W @ G * W).sum()))
    BB = B.T @ B
    return Energies(float((A @ A.T * BB).sum()), float((A @ G @ A.T * BB).sum()))
