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
        self._d_in, self._device, self._same = d_in, device, same
        self._waiting: list[tuple[torch.Tensor, torch.Tensor]] = []
        # C, unless it is G, and the blocks of G on and right of its diagonal
        self._sums: list[torch.Tensor] = []

    def add(self, X: torch.Tensor, X_merged: torch.Tensor) -> None:
        """More rows of X and as many of X~; neither may change afterwards."""
        self._waiting.append((X, X_merged))
        if 2 * sum(len(rows) for rows, _ in self._waiting) >= self._d_in:
            self._multiply()

    def finish(self) -> tuple[torch.Tensor, torch.Tensor]:
        """C and G, once all rows are in: at least one piece, and none after this."""
        if self._waiting:
            self._multiply()
        G = torch.empty(self._d_in, self._d_in, dtype=torch.float64, device=self._device)
        for first in reversed(range(0, self._d_in, BLOCK)):
            block = self._sums.pop()
            G[first : first + BLOCK, first:] = block
            G[first:, first : first + BLOCK] = block.T
        return (G if self._same else self._sums.pop()), G

    def _multiply(self) -> None:
        X, X_merged = (parts[0] if len(parts) == 1 else torch.cat(parts) for parts in zip(*self._waiting, strict=True))
        self._waiting.clear()
        factors = [] if self._same else [(X, X_merged)]
        for first in range(0, self._d_in, BLOCK):
            factors.append((X_merged[:, first : first + BLOCK], X_merged[:, first:]))
        if not self._sums:
            self._sums = [(left.T @ right).double() for left, right in factors]
            return
        for total, (left, right) in zip(self._sums, factors, strict=True):
            total += left.T @ right
