"""How fast is rank-wise clustering? `python -m benchmarks.kmeans`.

Single problems beside scikit-learn's KMeans, the 224 modules of a merge of eight adapters for Llama-2-7B beside reading
them and multiplying them at the machine's peak, and both spaces on either side of where `space="auto"` changes.
"""

from __future__ import annotations

import argparse
import math
import sys
import warnings
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import torch

import lorakern as lk
from benchmarks.algebra import LAYER, LAYERS
from benchmarks.command import report
from benchmarks.floors import FMA_ROUNDS, ReadProbe
from benchmarks.report import duration
from benchmarks.timing import Effort, in_turns
from lorakern.backends import cpu as cpu_backend
from lorakern.errors import LorakernError
from lorakern.ops import _clustering
from lorakern.ops._points import collect, flat
from lorakern.ops._uniforms import uniforms

SINGLE = [(128, 8192, 8), (256, 8192, 16), (512, 15104, 64)]  # points, columns, clusters
SPACES = [(2000, 1024, 64), (1000, 4096, 16), (128, 8192, 8)]  # with one run, gram or direct
ADAPTERS, RANK, CLUSTERS, RUNS = 8, 16, 16, 10
OURS, RIVAL = Effort(2.0, 3, 9), Effort(0.1, 1, 3)


def points_of(n: int, d: int, k: int) -> torch.Tensor:
    """Noise around k centers that are twice as far from each other as it is wide."""
    generator = torch.Generator().manual_seed(n)
    centers = 2 * torch.randn(k, d, generator=generator)
    return (centers[torch.arange(n) % k] + torch.randn(n, d, generator=generator)) / d**0.5


def adapters_of(dtype: torch.dtype, layers: int) -> list[tuple[list[torch.Tensor], list[torch.Tensor]]]:
    """The points of every module: ranks of eight adapters, rows of A beside columns of B, that share some of them."""
    generator, problems = torch.Generator().manual_seed(0), []

    def randn(*shape):
        return torch.randn(*shape, generator=generator)

    for d_out, d_in in LAYER * layers:
        A, B = randn(RANK, d_in) / d_in**0.5, randn(d_out, RANK) / d_out**0.5
        own = [(A + randn(RANK, d_in) / d_in**0.5, B + randn(d_out, RANK) / d_out**0.5) for _ in range(ADAPTERS)]
        problems.append(([a.to(dtype) for a, _ in own], [b.to(dtype).T for _, b in own]))
    return problems


def check(points, found: lk.KMeansResult, name: str) -> None:
    """No speed is reported for a result that is wrong: labels must be the nearest, inertia their distances."""
    whole = points if isinstance(points, torch.Tensor) else torch.cat([torch.cat(part) for part in points], dim=1)
    centroids = found.centroids if isinstance(points, torch.Tensor) else torch.cat(found.centroids, dim=1)
    squares = torch.cdist(whole.double(), centroids.double(), compute_mode="donot_use_mm_for_euclid_dist").square()
    own, least = squares.gather(1, found.labels[:, None])[:, 0], squares.amin(dim=1)
    if not math.isclose(float(own.sum()), found.inertia, rel_tol=1e-5) or bool((own > least * (1 + 1e-4)).any()):
        raise LorakernError(f"bench: kmeans of {name} is wrong; its speed means nothing")


def scikit_learn(points: torch.Tensor, k: int) -> Callable[[], object] | None:
    """The rival on the same points, or None where it is not installed."""
    if find_spec("sklearn") is None:
        return None
    from sklearn.cluster import KMeans

    array = points.numpy()
    return lambda: KMeans(k, n_init=RUNS, random_state=0).fit(array)


def phases(points, k: int | list[int]) -> dict[str, Callable[[], object]]:
    """The steps of a clustering in Gram space, each on what the one before it leaves."""
    problems, _ = collect("bench", points, None, None)
    ks = [k] * len(problems)
    given, weights, trials = flat(problems), [p.weights for p in problems], [2 + int(math.log(k))] * len(problems)
    table = uniforms(0, RUNS, 1 + (k - 1) * trials[0])
    grams = _clustering.points_gram(*given)
    seeds, none = _clustering.seed(grams, weights, ks, trials, table), [torch.empty(0)] * len(ks)
    options = [n.long() for n in none], none, 300, [1e-4 / sum(p.columns) for p in problems]
    labels, members, _ = _clustering.lloyd(grams, weights, ks, seeds, *options)
    return {
        "points_gram": lambda: _clustering.points_gram(*given),
        "seed": lambda: _clustering.seed(grams, weights, ks, trials, table),
        "lloyd": lambda: _clustering.lloyd(grams, weights, ks, seeds, *options),
        "update": lambda: _clustering.update(*given, members, labels, weights, ks),
    }


def single(n: int, d: int, k: int) -> dict:
    """One problem with ten runs, beside scikit-learn."""
    points = points_of(n, d, k)
    found = lk.kmeans(points, k, n_init=RUNS)
    check(points, found, f"N = {n}")
    timed = in_turns({"ours": lambda: lk.kmeans(points, k, n_init=RUNS), **phases(points, k)}, OURS)
    record = {"case": "single", "n": n, "d": d, "k": k, "runs": RUNS, **timed.pop("ours"), "n_iter": found.n_iter}
    record["phases"] = {name: t["seconds"] for name, t in timed.items()}
    if rival := scikit_learn(points, k):
        theirs = rival()
        record["inertia_ratio"] = found.inertia / float(theirs.inertia_)
        if record["inertia_ratio"] > 1.01:
            raise LorakernError(f"bench: kmeans of N = {n} has {record['inertia_ratio']:.3f} of scikit-learn's inertia")
        record["rival_seconds"] = in_turns({"rival": rival}, RIVAL)["rival"]["seconds"]
    return record


def merge(dtype: torch.dtype, layers: int) -> dict:
    """All modules in one call; the floor is to read the adapters once and to multiply them at the peak."""
    problems = adapters_of(dtype, layers)
    found = lk.kmeans(problems, CLUSTERS, n_init=RUNS)
    for i in range(len(LAYER)):
        check(problems[i], found[i], f"module {i}")
    del found
    bf16, threads, probe = dtype == torch.bfloat16, torch.get_num_threads(), ReadProbe("cpu")
    loop = cpu_backend._cpu.fma_loop
    functions = {
        "ours": lambda: lk.kmeans(problems, CLUSTERS, n_init=RUNS),
        **phases(problems, CLUSTERS),
        "read": probe,
        "fma": lambda: loop(bf16, FMA_ROUNDS, threads),
    }
    timed = in_turns(functions, OURS)
    blocks = [block for problem in problems for part in problem for block in part]
    size = sum(block.numel() * block.element_size() for block in blocks)
    n = ADAPTERS * RANK
    operations = n * (n + 1) * sum(block.numel() for block in blocks) // n
    reading = size / (probe.bytes / timed["read"]["seconds"])
    instruction, *_ = loop(bf16, 1, threads)
    peak = loop(bf16, FMA_ROUNDS, threads)[1] / timed["fma"]["seconds"]
    record = {"case": "merge", "modules": len(problems), "n": n, "k": CLUSTERS, "runs": RUNS, **timed["ours"]}
    record["phases"] = {name: timed[name]["seconds"] for name in ("points_gram", "seed", "lloyd", "update")}
    record |= {"bytes": size, "operations": operations, "instruction": instruction, "peak": peak}
    return record | {"reading": reading, "multiplying": operations / peak, "floor": reading + operations / peak}


def spaces(n: int, d: int, k: int) -> dict:
    """One run in either space, and what the rule says: products of Gram space over those of the direct one."""
    points = points_of(n, d, k)
    for space in ("gram", "direct"):
        check(points, lk.kmeans(points, k, n_init=1, space=space), f"N = {n}, {space}")
    timed = in_turns({s: lambda s=s: lk.kmeans(points, k, n_init=1, space=s) for s in ("gram", "direct")}, OURS)
    rule = n / 2 / (k * (12 + math.log(k)))
    return {"case": "spaces", "n": n, "d": d, "k": k, "rule": rule, **{s: t["seconds"] for s, t in timed.items()}}


def measure(quick: bool) -> Iterator[dict]:
    """One record after the other."""
    for n, d, k in SINGLE[: 1 if quick else None]:
        yield single(n, d, k)
    for n, d, k in SPACES:
        yield spaces(n, d // 8 if quick else d, k)
    for dtype in (torch.float32, torch.bfloat16):
        yield {"dtype": str(dtype).removeprefix("torch."), **merge(dtype, 2 if quick else LAYERS)}


def lines(record: dict) -> list[str]:
    """A record, as it is printed."""
    if record["case"] == "spaces":
        ratio = record["gram"] / record["direct"]
        head = f"spaces N = {record['n']}, D = {record['d']}, k = {record['k']}, one run: "
        times = f"gram {duration(record['gram'])}, direct {duration(record['direct'])}"
        return [f"{head}{times}: gram takes {ratio:.2f} of direct, {record['rule']:.2f} by the rule"]
    spread = f"{duration(record['seconds'])} (n = {record['samples']}, least {duration(record['min'])})"
    if record["case"] == "single":
        out = [f"N = {record['n']}, D = {record['d']}, k = {record['k']}, {record['runs']} runs: {spread}"]
    else:
        size = f"{record['n']} ranks, k = {record['k']}, {record['runs']} runs"
        out = [f"merge of {record['modules']} modules, {record['dtype']}, {size}: {spread}"]
    out.append(" " * 11 + ", ".join(f"{name} {duration(t)}" for name, t in record["phases"].items()))
    if "rival_seconds" in record:
        times = record["rival_seconds"] / record["seconds"]
        inertia = f"our inertia is {record['inertia_ratio']:.4f} of its"
        out.append(f"{'':11}scikit-learn {duration(record['rival_seconds'])}, {times:.0f} times ours; {inertia}")
    if "floor" in record:
        read, products = duration(record["reading"]), duration(record["multiplying"])
        peak = f"{record['peak'] / 1e9:.0f} GFLOP/s of {record['instruction']}"
        out.append(f"{'':11}floor {duration(record['floor'])}: {read} to read, {products} to multiply at {peak}")
        out.append(f"{'':11}{record['seconds'] / record['floor']:.2f} times the floor")
    return out


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    made = argparse.ArgumentParser(prog="python -m benchmarks.kmeans", description=__doc__.partition("\n")[0])
    made.add_argument("--quick", action="store_true", help="the smallest problem, and two layers")
    made.add_argument("--json", type=Path, metavar="FILE", help="write the measurements as JSON lines")
    options = made.parse_args(arguments)
    warnings.filterwarnings("ignore", module="sklearn")
    if find_spec("sklearn") is None:
        print("scikit-learn is not installed: no rival")
    return report("benchmarks.kmeans", measure(options.quick), lines, options.json)


if __name__ == "__main__":
    sys.exit(main())
