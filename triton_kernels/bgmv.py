"""bgmv: shrink, then expand; two launches for any number of slices, and nothing of either depends on the other."""

import torch

from .common import run
from .configs import SHARED_LIMIT, select
from .expand import expand_launch
from .shrink import plane_count, shrink_launch


def bgmv_launches(
    y, x, A, B, indices, scale, ranks, gates, order, starts, accumulate, shared=SHARED_LIMIT, planes=None
):
    """The two launches. The planes of h, one per chunk of d_in or one in all, are scratch between them."""
    if planes is None:
        planes = plane_count(order.shape[0], A, select("shrink", x.dtype, A[0].shape[1], shared))
    # from torch's allocator: per stream, and a captured graph keeps its own
    h = torch.empty(planes, len(A), *indices.shape, A[0].shape[1], dtype=torch.float32, device=x.device)
    return (
        shrink_launch(h, x, A, indices.shape[1], ranks, order, starts, False, shared),
        expand_launch(y, h, B, indices, scale, ranks, gates, order, starts, accumulate, shared),
    )


def bgmv(y, x, A, B, indices, scale, ranks, gates, order, starts, accumulate, shared=SHARED_LIMIT):
    """y[t] (+)= sum_k gates[t, k] * scale[i] * B_s[i, :, :r] @ (A_s[i, :r] @ x[t]), slices side by side in y."""
    for launch in bgmv_launches(y, x, A, B, indices, scale, ranks, gates, order, starts, accumulate, shared):
        run(launch, x.device)
