"""How fast is it on a GPU? Decode from memory, prefill, mixtures, mixed ranks and gradients; the targets first."""

from benchmarks.registry import SUITES, Case, Target, add, companion, sweep, target

DECODE = Case(64, 64, cold=True)
EIGHT = Case(32, 8, cold=True)
WIDE = DECODE.but(ranks=(64,), d_in=8192, d_outs=(8192,))
PREFILL = Case(8192, 8, ranks=(64,), runs=True)
MIXED = DECODE.but(ranks=(8, 16, 32, 64))

for case, microseconds in ((Case(1, 1, cold=True), 3), (EIGHT, 4), (DECODE, 7)):
    row = f"bf16, {case.tokens} tokens, {case.adapters} adapters, 4096 x 4096, rank 16, cold"
    target("gpu", Target(row, f"under {microseconds} microseconds", case, "seconds", microseconds * 1e-6))
target(
    "gpu",
    Target(
        "bf16, 64 tokens, 64 adapters, 8192 x 8192, rank 64, cold",
        "at least 85 % of the byte floor at the measured copy bandwidth",
        WIDE,
        "bandwidth",
        0.85,
    ),
    Target(
        "bf16, prefill, 8192 tokens, 8 adapters, 4096 x 4096, rank 64",
        "at most 1.15 times cuBLAS on the same products with one adapter",
        PREFILL,
        "companion",
        1.15,
    ),
    Target(
        "bf16, mixed ranks 8..64 against all padded to 64, 64 tokens, 64 adapters, cold",
        "time, and so bytes, proportional to the true ranks within 25 %",
        MIXED,
        "proportional",
        1.25,
    ),
)
companion(PREFILL, "cuBLAS, one adapter", PREFILL.but(adapters=1), by="mm loop on runs")
companion(MIXED, "all of rank 64", MIXED.but(ranks=(64,)))

sweep(
    "gpu",
    "GPU decode, distinct adapters, rank 16, cold",
    "tokens",
    {n: DECODE.but(tokens=n, adapters=n) for n in (1, 4, 16, 64, 256)},
)
sweep("gpu", "GPU decode, 8 adapters, rank 16, cold", "tokens", {n: EIGHT.but(tokens=n) for n in (8, 32, 128)})
sweep("gpu", "GPU decode, 64 tokens, rank 16, cold", "adapters", {n: DECODE.but(adapters=n) for n in (1, 8, 64)})
sweep(
    "gpu",
    "GPU decode, 64 tokens, 64 adapters, cold",
    "rank",
    {r: DECODE.but(ranks=(r,)) for r in (8, 16, 32, 64, 128)},
)
sweep(
    "gpu",
    "GPU decode, 64 tokens, 64 adapters, rank 16, cold",
    "layer",
    {
        "q, k, v of 4096 -> 4096 + 1024 + 1024": DECODE.but(d_outs=(4096, 1024, 1024)),
        "4096 -> 14336": DECODE.but(d_outs=(14336,)),
        "14336 -> 4096": DECODE.but(d_in=14336),
        "8192 -> 28672": DECODE.but(d_in=8192, d_outs=(28672,)),
    },
)
sweep(
    "gpu",
    "GPU decode, 64 tokens on up to 64 adapters, rank 16, cold",
    "popularity",
    {popularity: DECODE.but(popularity=popularity) for popularity in ("identical", "uniform", "zipf")},
)
sweep("gpu", "GPU prefill, 8 adapters, rank 64, runs", "tokens", {n: PREFILL.but(tokens=n) for n in (512, 2048, 8192)})
sweep(
    "gpu",
    "GPU decode, 64 tokens, 64 distinct adapters for each of K choices, rank 16, cold",
    "K",
    {k: DECODE.but(adapters=64 * k, choices=k) for k in (1, 2, 4)},
)
BACKWARD = Case(2048, 4, runs=True, op="backward")
sweep("gpu", "GPU backward, 4 adapters, rank 16", "tokens", {n: BACKWARD.but(tokens=n) for n in (64, 512, 2048)})
add(
    "gpu",
    BACKWARD.but(ranks=(64,)),
    DECODE.but(dtype="float16"),
    DECODE.but(dtype="float32"),
    PREFILL.but(ranks=(16,)),
    DECODE.but(cold=False),
)

for case in SUITES["gpu"]:
    # vLLM has neither mixtures nor kernels for float32.
    if case.cold and case.choices == 1 and case.dtype != "float32":
        promise = "at least 1.5 times vLLM's Triton pair"
        target("gpu", Target(f"decode, {case.name}", promise, case, "speedup", 1.5, against="vllm triton"))
