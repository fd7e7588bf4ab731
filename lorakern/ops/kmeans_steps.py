"""kmeans_assign and kmeans_update: the two steps of Lloyd's iteration, each in one pass over the points."""

from typing import Any

import torch

from lorakern.ops import _checks as check
from lorakern.ops import _clustering
from lorakern.ops._points import Points, check_finite, collect, each, flat


def kmeans_assign(points: Any, centroids: Any, *, scales: Any = None) -> tuple[Any, Any]:
    """The nearest centroid of every point: ``labels_i = argmin_c ||x_i - centroid_c||^2``, and that minimum.

    Distances and minimum are fused: the (N, k) matrix of distances is never stored. Of equally near centroids the
    lowest is taken. Products are float32, the distance returned is summed from the differences themselves.

    Args:
        points: (N, D) of float16, bfloat16 or float32 and any strides; or a tuple of parts, ((N, D1), (N, D2), ...),
            the columns of one point side by side, which is never concatenated; a part may be a list of the matrices
            whose rows it has, one below the other. Or a list of such problems, of any sizes, on one device. Rows of A
            and columns of B are the points ``(A, B.T)``. (float64 on the reference backend.)
        centroids: (k, D) floats, or a tuple of parts like points; a list of them for a list of problems.
        scales: factors of the points before anything else, (N,), or (parts, N) with one for each part; a list of them
            for a list of problems.

    Returns:
        labels (N,) int64 and sqdist (N,) float32, in the units of the points squared; a list of each for a list of
        problems. No gradient is tracked.

    Raises:
        LorakernError: shapes, dtypes or devices that do not fit; points or centroids that are not finite (looked at on
            a CPU only).

    The assignment step of Lloyd (1982).

    >>> import torch, lorakern as lk
    >>> labels, sqdist = lk.kmeans_assign(torch.tensor([[0.0], [1.0], [4.0]]), torch.tensor([[0.0], [3.0]]))
    >>> labels.tolist(), sqdist.tolist()
    ([0, 0, 1], [0.0, 1.0, 1.0])
    """
    op = "kmeans_assign"
    problems, is_list = collect(op, points, None, scales)
    given = each(op, "centroids", centroids, len(problems), is_list)
    joined = [centroids_of(op, p, c, f"centroids of {p.name}") for p, c in zip(problems, given, strict=True)]
    labels, sqdist = _clustering.assign(*flat(problems), joined)
    check_finite(op, problems, sqdist, "distances")
    return (labels, sqdist) if is_list else (labels[0], sqdist[0])


def kmeans_update(points: Any, labels: Any, k: Any, *, weights: Any = None, scales: Any = None) -> tuple[Any, Any]:
    """Means of the points of each label: ``centroid_c = sum_i w_i x_i / counts_c``, ``counts_c = sum_i w_i``, i of c.

    Sums are float64 and in the order of the points, whatever the threads: the same bits on every run.

    Args:
        points, scales: as in `kmeans_assign`.
        labels: (N,) int32 or int64, each from 0 to k - 1; a list of them for a list of problems.
        k: how many clusters; a list of them, or one for all, for a list of problems.
        weights: (N,) numbers that are not negative; 1 by default. A list of them for a list of problems.

    Returns:
        centroids (k, D) float32, zero for a cluster without weight, a tuple of parts (k, D1), (k, D2), ... where
        points is one; and counts (k,) float64. A list of each for a list of problems. No gradient is tracked.

    Raises:
        LorakernError: shapes, dtypes or devices that do not fit, labels out of range, or points that are not finite
            (values are looked at on a CPU only).

    The update step of Lloyd (1982).

    >>> import torch, lorakern as lk
    >>> centroids, counts = lk.kmeans_update(torch.tensor([[0.0], [1.0], [4.0]]), torch.tensor([0, 0, 1]), 2)
    >>> centroids.tolist(), counts.tolist()
    ([[0.5], [4.0]], [2.0, 1.0])
    """
    op = "kmeans_update"
    problems, is_list = collect(op, points, weights, scales)
    ks = each(op, "k", k, len(problems), is_list)
    given = each(op, "labels", labels, len(problems), is_list)
    members = [_labels(op, p, label, count) for p, label, count in zip(problems, given, ks, strict=True)]
    none = [m[:0] for m in members]
    centroids, counts, _ = _clustering.update(*flat(problems), members, none, [p.weights for p in problems], ks)
    check_finite(op, problems, centroids, "sums")
    centroids = [split(p, c) for p, c in zip(problems, centroids, strict=True)]
    return (centroids, counts) if is_list else (centroids[0], counts[0])


def split(problem: Points, centroids: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, ...]:
    """Centroids (k, D) in the parts that the points have."""
    return centroids.split(problem.columns, dim=1) if problem.is_tuple else centroids


def centroids_of(op: str, problem: Points, centroids: Any, label: str) -> torch.Tensor:
    """Centroids as given for a problem, put together to (k, D)."""
    parts = centroids if isinstance(centroids, tuple) else (centroids,)
    shapes = [
        (len(parts[0]) if isinstance(parts[0], torch.Tensor) and parts[0].dim() else 0, d) for d in problem.columns
    ]
    if isinstance(centroids, tuple) != problem.is_tuple or len(parts) != len(shapes) or shapes[0][0] == 0:
        takes = " and ".join(f"(k, {d})" for d in problem.columns)
        check.fail(
            op, label, f"be {'a tuple of ' if problem.is_tuple else ''}{takes}, k at least 1", _describe(centroids)
        )
    for part, shape in zip(parts, shapes, strict=True):
        fits = isinstance(part, torch.Tensor) and part.shape == shape and part.is_floating_point()
        if not fits or part.device != problem.device:
            check.fail(op, label, f"be floats of shape {shape} on {problem.device}", check.describe(part))
    joined = torch.cat([part.detach().to(problem.dtype) for part in parts], dim=1).contiguous()
    if (joined.device.type == "cpu" or check.DEBUG) and not bool(joined.isfinite().all()):
        check.fail(op, label, f"be finite in {joined.dtype}", "NaN or infinity")
    return joined


def _describe(value):
    return f"a tuple of {len(value)}" if isinstance(value, tuple) else check.describe(value)


def _labels(op, problem, labels, k):
    if not isinstance(k, int) or isinstance(k, bool) or k < 1:
        check.fail(op, "k", "be a positive integer", repr(k))
    n = problem.count
    if (
        not isinstance(labels, torch.Tensor)
        or labels.shape != (n,)
        or labels.dtype not in (torch.int32, torch.int64)
        or labels.device != problem.device
    ):
        takes = f"be int32 or int64 of shape ({n},) on {problem.device}"
        check.fail(op, f"labels of {problem.name}", takes, check.describe(labels))
    if labels.device.type == "cpu" or check.DEBUG:
        low, high = (int(v) for v in labels.aminmax())
        if low < 0 or high >= k:
            got = f"values from {low} to {high}"
            check.fail(op, f"labels of {problem.name}", f"lie between 0 and k - 1 = {k - 1}", got)
    return labels.detach().long().contiguous()
