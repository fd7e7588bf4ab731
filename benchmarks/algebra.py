"""How fast is exact low-rank algebra beside the dense updates it replaces? `python -m benchmarks.algebra`.

Norms, truncations and the concatenation = summation check on 224 modules of the shapes of Llama-2-7B. The dense rivals
are too slow for all of them: they run on the seven modules of one layer, and are taken times the layers.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

import lorakern as lk
from benchmarks.command import report
from benchmarks.floors import ReadProbe
from benchmarks.report import duration
from benchmarks.timing import Effort, in_turns
from lorakern.errors import LorakernError

LAYER = [(4096, 4096)] * 4 + [(11008, 4096)] * 2 + [(4096, 11008)]  # (d_out, d_in) of q, k, v, o, gate, up and down
LAYERS, RANK, WEIGHTS = 32, 16, (0.5, 0.3, 0.2, 0.7)
OURS, DENSE = Effort(2.0, 3, 9), Effort(0.1, 3, 3)
FLIPS = 100


@dataclass(frozen=True)
class Merge:
    """Made-up adapters of rank 16, and their weighted sum as terms."""

    adapters: list[dict]
    terms: dict[str, list]

    def layer(self, index: int) -> Merge:
        """The modules of one layer."""
        names = [name for name in self.terms if name.startswith(f"{index}.")]
        return Merge([{n: a[n] for n in names} for a in self.adapters], {n: self.terms[n] for n in names})

    def merged(self) -> dict[str, tuple]:
        """The adapters one below the other, weights and scales in A."""
        out = {}
        for name, terms in self.terms.items():
            A = torch.cat([(scale * a.float()).to(a.dtype) for a, _, scale in terms])
            out[name] = A, torch.cat([b for _, b, _ in terms], dim=1), 1.0
        return out

    @property
    def bytes(self) -> int:
        """Of the adapters' factors."""
        return sum(t.numel() * t.element_size() for a in self.adapters for f in a.values() for t in f[:2])


def make(dtype: torch.dtype, layers: int) -> Merge:
    generator = torch.Generator().manual_seed(0)

    def randn(*shape):
        return torch.randn(*shape, generator=generator)

    adapters, terms = [{} for _ in WEIGHTS], {}
    for name, (d_out, d_in) in ((f"{i}.{j}", s) for i in range(layers) for j, s in enumerate(LAYER)):
        for adapter in adapters:
            A, B = (randn(RANK, d_in) / d_in**0.5).to(dtype), (randn(d_out, RANK) / RANK**0.5).to(dtype)
            adapter[name] = A, B, 2.0
        terms[name] = [(a[name][0], a[name][1], w * 2.0) for w, a in zip(WEIGHTS, adapters, strict=True)]
    return Merge(adapters, terms)


def dense_sum(terms: list) -> torch.Tensor:
    """The update, in the dtype of its factors."""
    out = torch.zeros(terms[0][1].shape[0], terms[0][0].shape[1], dtype=terms[0][0].dtype)
    for A, B, scale in terms:
        out.addmm_(B, A, alpha=scale)
    return out


def dense_check(layer: Merge, merged: dict) -> None:
    """What the check does, on updates that are formed."""
    for name, terms in layer.terms.items():
        wanted = dense_sum(terms)
        wanted.norm(), wanted.sub_(dense_sum([merged[name]])).norm()


def dense_forming(layer: Merge, merged: dict) -> None:
    """The two updates alone."""
    for name, terms in layer.terms.items():
        dense_sum(terms), dense_sum([merged[name]])


def once(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def peak_of(function: Callable[[], object]) -> float:
    """GB of resident memory at most while the function runs, with all that is there before; Linux only."""
    Path("/proc/self/clear_refs").write_text("5")
    function()
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024 / 1e9


def _refuse_if(wrong: bool, what: str) -> None:
    """No speed is reported for a result that is wrong."""
    if wrong:
        raise LorakernError(f"bench: {what} is wrong; its speed means nothing")


def truncation(merge: Merge) -> dict:
    """All modules to rank 16; the floor is to read the adapters twice."""
    memory, probe = peak_of(lambda: lk.truncate(merge.terms, RANK)), ReadProbe("cpu")
    found = lk.truncate(merge.terms, RANK)
    for name in list(merge.terms)[: len(LAYER)]:
        A, B, _ = found[name]
        sigma = lk.truncate(merge.terms[name], None, dtype=torch.float64).singular_values
        wanted = float(sigma[:RANK].norm() / sigma.norm()), float(sigma[RANK:].norm() / sigma.norm())
        got = lk.delta_norm(A, B) / float(sigma.norm()), lk.delta_distance([(A, B, 1.0)], merge.terms[name])
        wrong = max(abs(x - y) for x, y in zip(got, wanted, strict=True))
        _refuse_if(wrong > torch.finfo(A.dtype).eps, f"truncate of {name}")
    del found
    timed = in_turns({"ours": lambda: lk.truncate(merge.terms, RANK), "read": probe}, OURS)
    floor = 2 * merge.bytes / (probe.bytes / timed["read"]["seconds"])
    return {"case": "truncate", "modules": len(merge.terms), **timed["ours"], "floor": floor, "peak_gb": memory}


def checking(merge: Merge, merged: dict) -> dict:
    """The check of the concatenation of all adapters, and what it does instead; the floor is to read both twice."""

    def check():
        return lk.check_concat_sum(merge.adapters, merged, weights=WEIGHTS)

    memory, probe, report = peak_of(check), ReadProbe("cpu"), check()
    _refuse_if(not report.passed, "check_concat_sum")
    layer, layers = merge.layer(0), len(merge.terms) // len(LAYER)
    timed = in_turns({"ours": check, "read": probe}, OURS)
    rivals = in_turns(
        {"all": lambda: dense_check(layer, merged), "forming": lambda: dense_forming(layer, merged)}, DENSE
    )
    floor = 4 * merge.bytes / (probe.bytes / timed["read"]["seconds"])
    return {
        "case": "check_concat_sum",
        "modules": len(merge.terms),
        **timed["ours"],
        "floor": floor,
        "worst_error": report.worst.error,
        "worst_bound": report.worst.bound,
        "dense_seconds": rivals["all"]["seconds"] * layers,
        "dense_forming_seconds": rivals["forming"]["seconds"] * layers,
        "peak_gb": memory,
    }


def distances(merge: Merge) -> dict:
    """Norms of all adapters' modules in one call."""
    A = [f[0] for adapter in merge.adapters for f in adapter.values()]
    B = [f[1] for adapter in merge.adapters for f in adapter.values()]
    norms = lk.delta_norm(A, B, 2.0)
    exact = float((2.0 * B[0].double() @ A[0].double()).norm())
    _refuse_if(abs(float(norms[0]) - exact) > 1e-12 * exact, "delta_norm")
    return {
        "case": "delta_norm",
        "modules": len(A),
        **in_turns({"ours": lambda: lk.delta_norm(A, B, 2.0)}, OURS)["ours"],
    }


def one_module(merge: Merge, quick: bool) -> dict:
    """One 4096 x 4096 module beside the decomposition of the dense sum, which is the reference as well."""
    terms = next(iter(merge.terms.values()))
    if quick:
        terms = [(A[:, :1024], B[:1024], scale) for A, B, scale in terms]
    matrix = sum(scale * B.double() @ A.double() for A, B, scale in terms)
    U, sigma, Vt = torch.linalg.svd(matrix, full_matrices=False)
    best = U[:, :RANK] * sigma[:RANK] @ Vt[:RANK]
    del U, Vt
    found = lk.truncate(terms, RANK, dtype=torch.float32)
    values = float(((found.singular_values - sigma[:RANK]) / sigma[:RANK]).abs().max())
    update = float((found.B.double() @ found.A.double() - best).norm() / best.norm())
    _refuse_if(max(values, update) > 1e-5, "truncate")
    narrow = matrix.float()
    dense = once(lambda: torch.linalg.svd(narrow, full_matrices=False))
    timed = in_turns({"ours": lambda: lk.truncate(terms, RANK, dtype=torch.float32)}, OURS)["ours"]
    size = f"{matrix.shape[0]} x {matrix.shape[1]}"
    return {"case": f"truncate {size}", **timed, "values": values, "update": update, "dense_seconds": dense}


def flips(merge: Merge, merged: dict) -> dict:
    """How many of the flips of one random bit in the exponent of one random weight are found."""
    name, generator = next(iter(merge.terms)), torch.Generator().manual_seed(1)
    adapters, (A, B, scale) = [{name: a[name]} for a in merge.adapters], merged[name]
    narrow = A.dtype.itemsize == 2
    found = 0
    for trial in range(FLIPS):
        factors = [A.clone(), B.clone()]
        bits = factors[trial % 2].view(torch.int16 if narrow else torch.int32).view(-1)
        place, bit = (int(torch.randint(n, (), generator=generator)) for n in (bits.numel(), 8))
        bits[place] ^= 1 << bit + (7 if narrow else 23)
        found += not lk.check_concat_sum(adapters, {name: (*factors, scale)}, weights=WEIGHTS).passed
    return {"case": "flipped bits", "found": found, "of": FLIPS}


def measure(dtype: torch.dtype, quick: bool) -> Iterator[dict]:
    """One record after the other."""
    merge = make(dtype, 2 if quick else LAYERS)
    yield truncation(merge)
    yield distances(merge)
    merged = merge.merged()
    yield checking(merge, merged)
    yield flips(merge, merged)
    yield one_module(merge, quick)


def lines(record: dict) -> list[str]:
    """A record, as it is printed."""
    title = f"{record['dtype']:9} {record['case']}" + (f", {record['modules']} modules" if "modules" in record else "")
    if "found" in record:
        return [f"{title}: {record['found']} of {record['of']} found"]
    out = [f"{title}: {duration(record['seconds'])} (n = {record['samples']}, least {duration(record['min'])})"]
    if "floor" in record:
        out.append(f"{'':11}floor of reading the factors {duration(record['floor'])}")
    if "peak_gb" in record:
        out.append(f"{'':11}resident memory at most {record['peak_gb']:.2f} GB, factors and results included")
    if "worst_error" in record:
        out.append(f"{'':11}worst error {record['worst_error']:.1e}, {record['worst_bound']:.1e} is allowed")
    if "values" in record:
        errors = f"singular values {record['values']:.1e}, update {record['update']:.1e}"
        out.append(f"{'':11}errors against a float64 decomposition of the dense sum: {errors}")
    for key, what in (("dense_seconds", "dense"), ("dense_forming_seconds", "forming both updates alone")):
        if key in record:
            out.append(f"{'':11}{what}: {duration(record[key])}, {record[key] / record['seconds']:.0f} times ours")
    return out


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    made = argparse.ArgumentParser(prog="python -m benchmarks.algebra", description=__doc__.partition("\n")[0])
    made.add_argument("--quick", action="store_true", help="two layers, and a decomposition of 1024 x 1024")
    made.add_argument("--dtype", action="append", choices=["float32", "bfloat16", "float16"], help="float32, bfloat16")
    made.add_argument("--json", type=Path, metavar="FILE", help="write the measurements as JSON lines")
    options = made.parse_args(arguments)
    dtypes = options.dtype or ["float32", "bfloat16"]
    records = ({"dtype": d, **record} for d in dtypes for record in measure(getattr(torch, d), options.quick))
    return report("benchmarks.algebra", records, lines, options.json)


if __name__ == "__main__":
    sys.exit(main())
