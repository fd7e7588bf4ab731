"""The inner products of one layer's features, added up as they come."""

import torch

# Columns of a symmetric product that are computed at once, from the diagonal on.
BLOCK = 192


class Products:
    """``C = X^T X~`` and ``G = X~^T X~``, (d_in, d_in) in float64, of features (rows, d_in) that come in pieces.

    X is the input in a task model and X~ that in the merged one; where both are the same, so are C and G, one tensor.
    Products are made in the features' own precision, of at least d_in / 2 rows at once: of fewer, adding them to the
    sums would take as long as making them. Half of G is enough, as it is symmetric.

    >>> import torch
    >>> from lorakern.merge.iteris.products import Products
    >>> sums = Products(2, torch.device("cpu"), same=False)
    >>> sums.add(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 4.0]]))
    >>> C, G = sums.finish()
    >>> C.tolist(), G.tolist()
    ([[3.0, 4.0], [6.0, 8.0]], [[9.0, 12.0], [12.0, 16.0]])
    """

    def __init__(self, d_in: int, device: torch.device, *, same: bool) -> None:
        self._G = torch.zeros(d_in, d_in, dtype=torch.float64, device=device)
        self._C = self._G if same else torch.zeros_like(self._G)
        self._waiting: list[tuple[torch.Tensor, torch.Tensor]] = []

    def add(self, X: torch.Tensor, X_merged: torch.Tensor) -> None:
        """More rows of X and as many of X~; neither may change afterwards."""
        self._waiting.append((X, X_merged))
        if 2 * sum(len(rows) for rows, _ in self._waiting) >= len(self._G):
            self._multiply()

    def finish(self) -> tuple[torch.Tensor, torch.Tensor]:
        """C and G, once all rows are in."""
        if self._waiting:
            self._multiply()
        for first in range(BLOCK, len(self._G), BLOCK):
            self._G[first:, first - BLOCK : first] = self._G[first - BLOCK : first, first:].T
        return self._C, self._G

    def _multiply(self) -> None:
        X, X_merged = (parts[0] if len(parts) == 1 else torch.cat(parts) for parts in zip(*self._waiting, strict=True))
        self._waiting.clear()
        for first in range(0, len(self._G), BLOCK):
            last = first + BLOCK
            self._G[first:last, first:].add_(X_merged[:, first:last].T @ X_merged[:, first:])
        if self._C is not self._G:
            self._C.add_(X.T @ X_merged)
