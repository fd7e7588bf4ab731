"""Stand-in for `lorakern.truncate`: the best rank-r factors of a sum of low-rank terms, in float64."""

import torch


def truncate(terms, rank):
    """(A, B, singular values) of sum_i scale_i B_i A_i: at most `rank` ranks, a share of the energy, or all of them."""
    B = torch.cat([B.double() * scale for _, B, scale in terms], dim=1)
    A = torch.cat([A.double() for A, _, _ in terms])
    left, core = torch.linalg.qr(B)
    right, other = torch.linalg.qr(A.T)
    U, S, Vh = torch.linalg.svd(core @ other.T, full_matrices=False)
    keep = int(S.gt(S[0] * max(B.shape[0], A.shape[1]) * 2**-52).sum())
    if isinstance(rank, float):
        energy = S.square().cumsum(0)
        keep = min(keep, 1 + int((energy < rank * energy[-1]).sum()))
    elif rank is not None:
        keep = min(keep, rank)
    keep = max(keep, 1)
    root = S[:keep].sqrt()
    return root[:, None] * (Vh[:keep] @ right.T), (left @ U[:, :keep]) * root, S[:keep]
