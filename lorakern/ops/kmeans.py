"""kmeans: clusters of points, on the points themselves or on their inner products."""

import math
from typing import Any, NamedTuple

import torch

from lorakern.ops import _checks as check
from lorakern.ops import _clustering, _direct
from lorakern.ops._points import Points, check_finite, collect, each, flat
from lorakern.ops._uniforms import uniforms
from lorakern.ops.kmeans_steps import centroids_of, split

_ITERATIONS = 10  # that a run takes, more or less: what the choice of the space counts with
_MOST_GRAM = 4096  # points whose inner products are kept without being asked to: 64 MB of float32


class KMeansResult(NamedTuple):
    """What `kmeans` returns of a problem.

    Attributes:
        labels: (N,) int64, the nearest centroid of each point.
        centroids: (k, D) float32, or a tuple of parts (k, D1), (k, D2), ... where points is one.
        inertia: ``sum_i w_i ||x_i - centroids[labels_i]||^2``.
        n_iter: iterations of the run that was best.
    """

    labels: torch.Tensor
    centroids: torch.Tensor | tuple[torch.Tensor, ...]
    inertia: float
    n_iter: int


def kmeans(
    points: Any,
    k: Any,
    *,
    init: Any = "k-means++",
    n_init: int = 10,
    max_iter: int = 300,
    tol: float = 1e-4,
    seed: int = 0,
    weights: Any = None,
    scales: Any = None,
    space: str = "auto",
) -> Any:
    """Clusters of least inertia by Lloyd's algorithm: ``min sum_i w_i ||x_i - centroid_(label_i)||^2``.

    In Gram space everything but the centroids themselves comes from the (N, N) inner products G, with S_ic the sum of
    ``w_j G_ij`` over the members j of c, W_c that of w_j, and q_c that of ``w_i S_ic / W_c^2``:
    ``||x_i - c||^2 = G_ii - 2 S_ic / W_c + q_c``. The points are read twice in all, whatever the runs and iterations.
    A cluster that loses its last point is given the farthest one.

    Args:
        points, scales: as in `kmeans_assign`; a list is a ragged batch of problems, each clustered as if alone.
        k: how many clusters, at most the points that have weight; a list of them, or one for all, for a list.
        init: "k-means++" (greedy, 2 + floor(ln k) trials for each seed), "random" (distinct points), the first
            centroids like those of `kmeans_assign`, or the (k,) integer indices of the points that are; a list of
            these for a list.
        n_init: runs from new seeds, of which the one of least inertia is kept; 1 for given centroids or indices.
        max_iter: iterations of a run at most.
        tol: a run also ends where the squared shifts of its centroids sum to no more than tol times the mean variance
            of a column.
        seed: of a counter-based generator, which draws the same numbers on every backend and for every batch.
        weights: (N,) numbers that are not negative; 1 by default. A list of them for a list.
        space: "gram", "direct" (the kernels of `kmeans_assign` and `kmeans_update`), or "auto": gram where its
            products, N^2 D / 2, are fewer than those of all runs, about n_init N k D (10 + 2 + ln k).

    Returns:
        `KMeansResult`, or a list of them for a list. No gradient is tracked.

    Raises:
        LorakernError: shapes, dtypes or devices that do not fit, fewer points with weight than k, points that are not
            finite or so large that their squares are not, or an option that is none.

    Lloyd (1982), Arthur and Vassilvitskii (2007); options and stopping rule are those of scikit-learn's KMeans.

    >>> import torch, lorakern as lk
    >>> found = lk.kmeans(torch.tensor([[0.0, 0.0], [0.0, 2.0], [9.0, 9.0]]), 2)
    >>> sorted(found.centroids.tolist()), found.inertia
    ([[0.0, 1.0], [9.0, 9.0]], 2.0)
    """
    op = "kmeans"
    problems, is_list = collect(op, points, weights, scales)
    _check_options(op, n_init, max_iter, tol, seed, space)
    ks = each(op, "k", k, len(problems), is_list)
    inits = each(op, "init", init, len(problems), is_list)
    tasks = [_task(op, *given, n_init, space) for given in zip(problems, ks, inits, strict=True)]
    table = uniforms(seed, n_init, max(t.draws for t in tasks)).to(problems[0].device)
    results: list[Any] = [None] * len(tasks)
    by_gram = [i for i, t in enumerate(tasks) if t.in_gram_space]
    if by_gram:
        for i, result in zip(
            by_gram, _in_gram_space(op, [tasks[i] for i in by_gram], table, max_iter, tol), strict=True
        ):
            results[i] = result
    for i, t in enumerate(tasks):
        if not t.in_gram_space:
            results[i] = _directly(op, t, table, max_iter, tol)
    return results if is_list else results[0]


class _Task(NamedTuple):
    """One problem and how its runs start: by a method, from given seeds (runs, k), or from given centroids (k, D)."""

    points: Points
    k: int
    method: str
    seeds: torch.Tensor | None
    centroids: torch.Tensor | None
    in_gram_space: bool

    @property
    def trials(self):
        return _trials(self.k)

    @property
    def draws(self):
        return _draws(self.method, self.points.count, self.k)

    def random_seeds(self, table):
        return _random_seeds(table, self.points.weights, self.k)


def _trials(k):
    """Of greedy k-means++, for each seed."""
    return 2 + int(math.log(k))


def _draws(method, count, k):
    return {"k-means++": 1 + (k - 1) * _trials(k), "random": count}.get(method, 0)


def _random_seeds(table, weights, k):
    """Distinct points, drawn by weight: those with the largest log(u) / w (Efraimidis and Spirakis 2006)."""
    return (table[:, : len(weights)].log() / weights).topk(k, dim=1).indices


def labels_of_grams(
    grams: list[torch.Tensor],
    ks: list[int],
    weights: list[torch.Tensor],
    *,
    init: str,
    n_init: int,
    max_iter: int,
    seed: int,
    tol: float = 1e-4,
) -> list[torch.Tensor]:
    """The labels that `kmeans` gives N points in N dimensions of which the inner products are known, (N, N) float32.

    Weights are (N,) float64; the other arguments are those of `kmeans`, and nothing is checked.
    """
    table = uniforms(seed, n_init, max(_draws(init, len(g), k) for g, k in zip(grams, ks, strict=True)))
    table = table.to(grams[0].device)
    if init == "k-means++":
        seeds = _clustering.seed(grams, weights, ks, [_trials(k) for k in ks], table)
    else:
        seeds = [_random_seeds(table, w, k) for w, k in zip(weights, ks, strict=True)]
    labels, sqdist = table.new_empty(0, dtype=torch.int64), table.new_empty(0)
    starts = seeds, [labels] * len(ks), [sqdist] * len(ks)
    return _clustering.lloyd(grams, weights, ks, *starts, max_iter, [tol / len(g) for g in grams])[0]


def _check_options(op, n_init, max_iter, tol, seed, space):
    for name, value in (("n_init", n_init), ("max_iter", max_iter)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            check.fail(op, name, "be a positive integer", repr(value))
    if isinstance(tol, bool) or not isinstance(tol, int | float) or not 0 <= tol < math.inf:
        check.fail(op, "tol", "be a finite number that is not negative", repr(tol))
    if not isinstance(seed, int) or isinstance(seed, bool):
        check.fail(op, "seed", "be an integer", repr(seed))
    if space not in ("auto", "gram", "direct"):
        check.fail(op, "space", "be 'auto', 'gram' or 'direct'", repr(space))


def _task(op, points, k, init, n_init, space):
    if not isinstance(k, int) or isinstance(k, bool) or k < 1:
        check.fail(op, "k", "be a positive integer", repr(k))
    weighty = int((points.weights > 0).sum())
    if k > weighty:
        check.fail(op, "k", f"be at most the number of points with weight, {weighty} in {points.name}", str(k))
    method, seeds, centroids, runs = init, None, None, 1
    if isinstance(init, str):
        if init not in ("k-means++", "random"):
            check.fail(op, "init", "be 'k-means++', 'random', centroids, or indices of points", repr(init))
        runs = n_init
    elif isinstance(init, torch.Tensor) and init.dtype in (torch.int32, torch.int64):
        method, seeds = "seeds", _indices(op, points, init, k)[None]
    else:
        method, centroids = "centroids", centroids_of(op, points, init, "init")
        if len(centroids) != k:
            check.fail(op, "init", f"have k = {k} centroids", f"{len(centroids)}")
    n = points.count
    fewer = n / 2 < runs * k * (_ITERATIONS + 2 + math.log(k)) and n <= _MOST_GRAM
    return _Task(points, k, method, seeds, centroids, space == "gram" or (space == "auto" and fewer))


def _indices(op, points, init, k):
    if init.shape != (k,) or init.device != points.device:
        check.fail(op, "init", f"be of shape ({k},) on {points.device} where it holds indices", check.describe(init))
    low, high = (int(v) for v in init.aminmax())
    if low < 0 or high >= points.count:
        check.fail(op, "init", f"have indices from 0 to {points.count - 1}", f"values from {low} to {high}")
    return init.detach().long().contiguous()


def _in_gram_space(op, tasks, table, max_iter, tol):
    problems, ks = [t.points for t in tasks], [t.k for t in tasks]
    weights = [p.weights for p in problems]
    grams = _clustering.points_gram(*flat(problems))
    check_finite(op, problems, [g.diagonal() for g in grams], "inner products")
    # The variance of a column is that of the points over their columns.
    tolerances = [tol / sum(p.columns) for p in problems]
    starts = _starts(tasks, grams, table)
    labels, members, iterations = _clustering.lloyd(grams, weights, ks, *starts, max_iter, tolerances)
    centroids, _, inertia = _clustering.update(*flat(problems), members, labels, weights, ks)
    found = zip(problems, labels, centroids, inertia.tolist(), iterations.tolist(), strict=True)
    return [KMeansResult(label, split(p, c), total, n) for p, label, c, total, n in found]


def _starts(tasks, grams, table):
    """(seeds, first labels, first sqdist) of each task: seeds (runs, k), or what assigning to given centroids gives."""
    none = table.new_empty(0, dtype=torch.int64)
    seeds = [none[:, None] if t.seeds is None else t.seeds for t in tasks]
    labels, sqdist = [none] * len(tasks), [table.new_empty(0)] * len(tasks)
    if drawn := [i for i, t in enumerate(tasks) if t.method == "k-means++"]:
        given = [(grams[i], tasks[i].points.weights, tasks[i].k, tasks[i].trials) for i in drawn]
        for i, found in zip(drawn, _clustering.seed(*map(list, zip(*given, strict=True)), table), strict=True):
            seeds[i] = found
    for i, t in enumerate(tasks):
        if t.method == "random":
            seeds[i] = t.random_seeds(table)
    if given := [i for i, t in enumerate(tasks) if t.method == "centroids"]:
        found = _clustering.assign(*flat([tasks[i].points for i in given]), [tasks[i].centroids for i in given])
        for i, *of_problem in zip(given, *found, strict=True):
            labels[i], sqdist[i] = of_problem
    return seeds, labels, sqdist


def _directly(op, task, table, max_iter, tol):
    p = task.points
    norms = _clustering.distances(*flat([p]), [torch.zeros(1, sum(p.columns), dtype=p.dtype, device=p.device)])
    check_finite(op, [p], norms, "squares")
    if task.method == "centroids":
        starts = [task.centroids]
    elif task.method == "k-means++":
        starts = [p.rows(s) for s in _direct.seeds(p, task.k, task.trials, table)]
    else:
        starts = [p.rows(s) for s in (task.random_seeds(table) if task.method == "random" else task.seeds)]
    labels, centroids, inertia, iterations = _direct.lloyd(p, task.k, starts, max_iter, tol)
    return KMeansResult(labels, split(p, centroids), inertia, iterations)
