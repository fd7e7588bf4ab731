"""lego: the ranks of all adapters, clustered; each cluster becomes one rank."""

import math
from collections.abc import Callable, Mapping
from typing import Annotated, Literal

import torch

from lorakern.merge._clusters import Clusters, Options, clustered
from lorakern.merge._units import Pool
from lorakern.merge.options import Range
from lorakern.merge.registry import Term, method
from lorakern.ops import kmeans_update

# Of the members' norm: a centroid shorter than that is what rounding leaves of members that cancel.
CANCELLED = 1e-6
NORMS = {"inf": math.inf, "l2": 2.0}


@method("lego", whole=True)
def lego(
    modules: Mapping[str, list[Term]],
    ranks: Callable[[str], int | float | None],
    generators: Callable[[str], torch.Generator],
    *,
    norm: Literal["inf", "l2"] = "inf",
    parameter_reweight: bool = True,
    output_reweight: bool = True,
    reference_rank: Literal["mean", "max"] | Annotated[float, Range(0, above_low=True)] = "mean",
    fold_scale: bool = True,
    assign: Literal["raw", "normalised"] = "raw",
    align_signs: bool = False,
    balance: bool = False,
    weights_as: Literal["samples", "scales"] = "samples",
    share_of: Literal["energy", "inertia"] = "energy",
    init: Literal["k-means++", "random"] = "k-means++",
    n_init: Annotated[int, Range(1)] = 10,
    max_iter: Annotated[int, Range(1)] = 300,
):
    """LoRA-LEGO: all ranks of all adapters in k clusters, one rank from each: ``sqrt(r/k) sum_c rho_c^2 b_c a_c^T``.

    A unit ``u = [a; b]`` is a row of ``sqrt(s_i) A_i`` with the same column of ``sqrt(s_i) B_i``. K-means makes
    clusters C of the units of a module; with ``m = [a_c; b_c]`` the mean of the units in C,

    ``rho_c = mean_{u in C} ||u|| / ||m||`` (parameter reweighting: a mean is shorter than what it is the mean of),

    and the sum is multiplied by ``sqrt(r / k)`` (output reweighting: a sum of more ranks varies more). The order of
    the adapters, or of the ranks in them, does not matter. One adapter is pruned from rank r to k.

    Args:
        norm: of rho: the largest magnitude ("inf") or the Euclidean norm ("l2").
        parameter_reweight: whether to multiply by rho_c; where the members of a cluster cancel, it is 1.
        output_reweight: whether to multiply by sqrt(r / k).
        reference_rank: r: the "mean" or the "max" of the ranks of the adapters that have the module, or a number.
        fold_scale: False clusters the factors as they are; a rank then gets the mean scale of its members.
        assign: "normalised" scales a and b to length one for the clustering, though not for the means.
        align_signs: turn (a, b) to (-a, -b), the same map, where that brings it nearer to others; an extension.
        balance: scale (a, b) to (c a, b / c), the same map, of equal Euclidean norms; an extension.
        weights_as: "samples" counts an adapter of weight w as |w| times as many, so that weights matter as ratios;
            "scales" multiplies its update by w, as other methods do. A negative weight turns an update round in both.
        share_of: what a rank in (0, 1) is a share of: "energy", ``sum_u ||u||^2``, or "inertia", the same about the
            mean; k is the fewest clusters found by bisection that keep it.
        init: how k-means starts, "k-means++" or from "random" units.
        n_init: how often; the clusters of least inertia are taken.
        max_iter: the most iterations of each.

    ``rank`` is k: None for the largest rank among the adapters; more than there are units is lowered to that. Units
    that are equal can leave fewer clusters.

    LoRA-LEGO: arXiv 2409.16167, from secondary sources: the paper has no code. Its norm, reference rank and k-means++
    with 10 starts are what re-implementations chose.

    >>> import torch, lorakern as lk
    >>> a = {"proj": (torch.eye(4)[:2], torch.eye(4)[:, :2], 3.0)}
    >>> b = {"proj": (torch.eye(4)[1:3], torch.eye(4)[:, 1:3], 3.0)}
    >>> merged = lk.merge([a, b], method="lego", rank=3, output_reweight=False)["proj"]
    >>> (merged.scale * merged.B @ merged.A).diagonal().tolist()  # rank 1 is in both
    [3.0, 3.0, 3.0, 0.0]
    """
    options = Options(fold_scale, assign, align_signs, balance, weights_as, share_of, init, n_init, max_iter)
    for module, clusters in clustered(modules, ranks, generators, options):
        if clusters is None:
            term = modules[module][0]
            yield module, (term.A[:0], term.B[:, :0])
            continue
        A, B, scale = _assembled(clusters, norm if parameter_reweight else None)
        if output_reweight:
            scale *= math.sqrt(_reference(clusters.pool, reference_rank) / clusters.k)
        yield module, (A, B, scale)


def _assembled(clusters: Clusters, norm: str | None) -> tuple[torch.Tensor, torch.Tensor, float]:
    """(A, B, scale) of a module: the means of its clusters, reweighted in that norm."""
    pool, averages = clusters.pool, clusters.averages()
    a, b = _means(clusters)
    if norm is not None:
        members, means = averages @ _unit_norms(pool, norm), _joint(_norms(a, norm), _norms(b, norm), norm)
        rho = torch.where(means > CANCELLED * members, members / means, 1.0).to(a.dtype)[:, None]
        a, b = a * rho, b * rho
    return a, (b * (averages @ pool.shares).to(b.dtype)[:, None]).T.contiguous(), pool.factor


def _means(clusters: Clusters) -> tuple[torch.Tensor, torch.Tensor]:
    """(k, d_in) and (k, d_out), the means of the members of every cluster."""
    pool = clusters.pool
    if pool.terms[0].A.dtype == torch.float64:
        # the kernels take no float64
        averages = clusters.averages()
        return tuple(averages @ (torch.cat(part) * s[:, None]) for part, s in zip(pool.parts, pool.scales, strict=True))
    return kmeans_update(pool.parts, clusters.labels, clusters.k, weights=pool.weights, scales=pool.scales)[0]


def _unit_norms(pool: Pool, norm: str) -> torch.Tensor:
    """(R,) float64 norms of the units."""
    a, b = (torch.cat([_norms(block, norm) for block in part]) for part in pool.parts)
    return _joint(a * pool.scales[0].abs(), b * pool.scales[1].abs(), norm)


def _norms(rows: torch.Tensor, norm: str) -> torch.Tensor:
    """(R,) float64 norms of the rows."""
    if norm == "l2":
        return torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64)
    # several times as fast as torch's own infinity norm
    if rows.stride(0) == 1 < rows.stride(1):
        low, high = _extremes_of_columns(rows.T)
    else:
        low, high = rows.amin(1), rows.amax(1)
    return torch.maximum(high, -low).double()


def _extremes_of_columns(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(least, greatest) of each column; many rows are put side by side, since torch is slow on few columns."""
    rows, columns = matrix.shape
    together = max(1, min(256 // columns, rows))
    whole = rows // together * together
    wide = matrix[:whole].reshape(-1, together * columns)
    low, high = wide.amin(0).view(together, columns), wide.amax(0).view(together, columns)
    rest = matrix[whole:]
    return torch.cat([low, rest]).amin(0), torch.cat([high, rest]).amax(0)


def _joint(a: torch.Tensor, b: torch.Tensor, norm: str) -> torch.Tensor:
    """The norms of [a; b] from those of a and b."""
    return torch.linalg.vector_norm(torch.stack([a, b]), NORMS[norm], dim=0)


def _reference(pool: Pool, rank: str | float) -> float:
    """The rank r of the output reweighting."""
    ranks = [term.rank for term in pool.terms]
    return {"mean": sum(ranks) / len(ranks), "max": max(ranks)}.get(rank, rank)
