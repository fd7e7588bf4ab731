"""knots: TIES in the subspace that the adapters share."""

import torch

from lorakern.merge._padded import at_rank
from lorakern.merge._sparsify import disjoint_mean, keep_largest, per_term
from lorakern.merge.options import Densities, SignMethod
from lorakern.merge.registry import Term, method

# Relative to the largest singular value: that of float32 factors.
ROUNDING = 1e-6
# What float64 leaves of a coordinate that is zero, at the smallest singular value kept; it must not vote.
NO_COORDINATE = 1e-9


@method("knots")
def knots(
    terms: list[Term],
    rank: int | float | None,
    generator: torch.Generator,
    *,
    density: Densities = 0.5,
    majority_sign_method: SignMethod = "total",
):
    """KnOTS-TIES: the updates in one common basis, TIES on their coordinates: ``[D_1 .. D_T] = U S [V_1 .. V_T]``.

    ``D_i = s_i B_i A_i``; the V_i (R, d_in) are merged as `ties` merges updates, trim, election and weighted disjoint
    mean, and the merged update is ``U S V``, of rank R at most. R is the rank of ``[D_1 .. D_T]``, at most the sum of
    the ranks: directions whose singular value is rounding error are left out before the trim, and a coordinate that
    is rounding error is zero: it neither votes nor counts.

    U, S and V come from a QR of ``[B_1 .. B_T]`` and of every ``A_i^T`` and the singular value decomposition of an
    (R, R) matrix, in float64; no update is formed.

    Args:
        density: the share of entries that each V_i keeps, those of largest magnitude, in (0, 1].
            A list has one for each adapter.
        majority_sign_method: "total" elects signs by the sum of the trimmed values, "frequency" by their number.

    A rank below R truncates the result. KnOTS: arXiv 2410.19735.

    >>> import torch, lorakern as lk
    >>> a, b = ({"proj": (torch.ones(1, 8), torch.full((6, 1), value), 1.0)} for value in (3.0, -1.0))
    >>> merged = lk.merge([a, b], method="knots", density=1.0)["proj"]
    >>> merged.rank, round((merged.scale * merged.B @ merged.A)[0, 0].item(), 4)
    (1, 3.0)
    """
    left, core = torch.linalg.qr(torch.cat([term.B.double() * term.scale for term in terms], dim=1))
    rights = [torch.linalg.qr(term.A.double().T) for term in terms]
    columns = core.split([term.rank for term in terms], dim=1)
    blocks = [block @ triangle.T for block, (_, triangle) in zip(columns, rights, strict=True)]
    U, S, Vh = torch.linalg.svd(torch.cat(blocks, dim=1), full_matrices=False)
    keep = int(S.gt(S[0] * ROUNDING).sum())
    parts = Vh[:keep].split([block.shape[1] for block in blocks], dim=1)
    coordinates = [part @ basis.T for part, (basis, _) in zip(parts, rights, strict=True)]
    aligned = [
        keep_largest(V.where(V.abs() > NO_COORDINATE, 0.0), kept)
        for V, kept in zip(coordinates, per_term(density, terms), strict=True)
    ]
    weights = torch.tensor([term.weight for term in terms], dtype=torch.float64, device=left.device)
    A = disjoint_mean(torch.stack(aligned), weights, majority_sign_method)
    return at_rank(A, left @ (U[:, :keep] * S[:keep]), 1.0, rank)
