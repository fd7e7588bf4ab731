"""How fast is decode? bgmv beside the two formulations in plain torch that it replaces.

    python -m benchmarks.decode [--device cpu|cuda] [--json FILE]

Weights rotate over copies that together exceed the caches where a case says cold. Every result is checked against the
reference before it is timed. The floor is the bytes a call must move over the read bandwidth measured in this run.
"""

import argparse
import json
import platform
import statistics
import time
from dataclasses import asdict, dataclass

import torch

import lorakern as lk


@dataclass(frozen=True)
class Case:
    dtype: torch.dtype
    tokens: int
    adapters: int
    rank: int
    d: int = 4096
    cold: bool = True


CASES = [
    Case(torch.bfloat16, 64, 64, 16),
    Case(torch.bfloat16, 64, 4, 16, cold=False),
    Case(torch.bfloat16, 64, 4, 64, cold=False),
    Case(torch.bfloat16, 1, 1, 16, cold=False),
    Case(torch.float16, 64, 64, 16),
    Case(torch.float32, 64, 64, 16),
    Case(torch.float32, 64, 4, 64, cold=False),
]
COLD_BYTES = 256 << 20


def gather_einsum(y, x, A, B, indices):
    y += torch.einsum("tor,tr->to", B[indices], torch.einsum("trd,td->tr", A[indices], x))


def mm_loop(y, x, A, B, indices):
    for slot in indices.unique().tolist():
        rows = (indices == slot).nonzero().squeeze(1)
        y[rows] += torch.mm(torch.mm(x[rows], A[slot].T), B[slot].T)


def backends(device):
    """Name to function for every backend that runs bgmv here, the default one first."""
    names = ["cpu"] if device == "cpu" else [n for n in ("cuda", "triton") if lk.info()["backends"][n] is None]

    def on(name):
        def run(*arguments):
            with lk.use_backend(name):
                lk.bgmv(*arguments)

        return run

    return {f"lorakern {name}": on(name) for name in names}


def seconds(function, device, repetitions=15):
    """Median wall time of a call; on a GPU, of ten calls in a row."""
    inner = 10 if device == "cuda" else 1
    times = []
    for repetition in range(repetitions + 3):
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(inner):
            function()
        if device == "cuda":
            torch.cuda.synchronize()
        if repetition >= 3:
            times.append((time.perf_counter() - start) / inner)
    return statistics.median(times)


def read_bandwidth(device):
    """Bytes a second of summing a buffer far larger than any cache, on all threads."""
    buffer = torch.ones((512 << 20) // 4, device=device)
    return buffer.numel() * 4 / seconds(lambda: buffer.sum(), device, 7)


def problem(case, device):
    element = torch.finfo(case.dtype).bits // 8
    weights = case.adapters * 2 * case.rank * case.d * element
    copies = max(1, COLD_BYTES // weights) if case.cold else 1
    x = torch.randn(case.tokens, case.d, device=device).to(case.dtype)

    def random(*shape):
        return [torch.randn(*shape, device=device).mul_(shape[-1] ** -0.5).to(case.dtype) for _ in range(copies)]

    A, B = random(case.adapters, case.rank, case.d), random(case.adapters, case.d, case.rank)
    indices = torch.arange(case.tokens, device=device) % case.adapters
    return x, A, B, indices, weights + 3 * case.tokens * case.d * element


def error(function, x, a, b, indices):
    y, exact = torch.zeros_like(x), torch.zeros(x.shape, dtype=torch.float64, device=x.device)
    function(y, x, a, b, indices)
    with lk.use_backend("reference"):
        lk.bgmv(exact, x.double(), a.double(), b.double(), indices)
    return ((y.double() - exact).norm() / exact.norm()).item()


def measure(case, device, bandwidth):
    x, A, B, indices, moved = problem(case, device)
    results = {}
    for name, function in (backends(device) | {"gather + einsum": gather_einsum, "mm loop": mm_loop}).items():
        wrong_by = error(function, x, A[0], B[0], indices)
        turn, y = iter(range(1 << 30)), torch.zeros_like(x)

        def call(function=function, turn=turn, y=y):
            i = next(turn) % len(A)
            function(y, x, A[i], B[i], indices)

        results[name] = {"error": wrong_by, "seconds": seconds(call, device) if wrong_by < 0.02 else None}
    return {"case": asdict(case) | {"dtype": str(case.dtype)}, "floor_seconds": moved / bandwidth, "results": results}


def show(row):
    case, floor = row["case"], row["floor_seconds"]
    kind = "cold" if case["cold"] else "warm"
    print(
        f"\n{case['dtype'].removeprefix('torch.')}, {case['tokens']} tokens on {case['adapters']} adapters, "
        f"rank {case['rank']}, d = {case['d']}, {kind}; floor {floor * 1e6:.1f} us"
    )
    first = next(iter(row["results"].values()))["seconds"]
    for name, result in row["results"].items():
        taken = result["seconds"]
        if taken is None:
            print(f"  {name:18} error {result['error']:.1e}: wrong, not timed")
            continue
        print(
            f"  {name:18} error {result['error']:.1e}  {taken * 1e6:9.1f} us  {floor / taken:6.1%} of the floor"
            f"  {taken / first:7.2f} x ours"
        )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--json", help="write the measurements to this file too")
    options = parser.parse_args()
    torch.manual_seed(0)
    info = lk.info()
    machine = {
        "devices": info["devices"],
        "isa": info["isa"],
        "threads": torch.get_num_threads(),
        "versions": info["versions"],
        "system": platform.platform(),
    }
    bandwidth = read_bandwidth(options.device)
    print(
        f"{machine['devices'][-1]}; {machine['threads']} threads; torch {torch.__version__}; "
        f"read bandwidth {bandwidth / 1e9:.1f} GB/s"
    )
    rows = []
    for case in CASES:
        rows.append(measure(case, options.device, bandwidth))
        show(rows[-1])
    if options.json:
        with open(options.json, "w") as file:
            json.dump({"machine": machine, "read_bandwidth": bandwidth, "rows": rows}, file, indent=1)


if __name__ == "__main__":
    main()
