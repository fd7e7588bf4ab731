"""How fast is decode? Few tokens, each its own request: the weights are what must be read."""

from benchmarks.registry import POPULARITIES, Case, Target, add, sweep, target

DECODE = Case(64, 64, cold=True)
FOUR = Case(64, 4, ranks=(64,))

for dtype, short, speedup in (("bfloat16", "bf16", 80), ("float32", "fp32", 10)):
    streamed, shared = DECODE.but(dtype=dtype), FOUR.but(dtype=dtype)
    target(
        "decode",
        Target(
            f"{short}, 64 tokens, 64 distinct adapters, rank 16, cold",
            "at least 80 % of the measured read bandwidth",
            streamed,
            "bandwidth",
            0.8,
        ),
    )
    row = f"{short}, 64 tokens, 4 adapters, rank 64"
    vllm = f"at least {speedup} times vLLM's CPU op"
    target("decode", Target(row, vllm, shared, "speedup", speedup, against="vllm cpu"))
    target("decode", Target(row, vllm, shared.but(cold=True), "speedup", speedup, against="vllm cpu", judged=False))
    if dtype == "bfloat16":
        loop = "at least 2 times the torch.mm loop"
        target("decode", Target(row, loop, shared, "speedup", 2, against="mm loop"))
        target("decode", Target(row, loop, shared.but(cold=True), "speedup", 2, against="mm loop", judged=False))

sweep(
    "decode",
    "distinct adapters, rank 16, cold",
    "tokens",
    {n: DECODE.but(tokens=n, adapters=n) for n in (1, 4, 16, 64, 256)},
    quick=(1, 16, 256),
)
sweep(
    "decode",
    "4 adapters, rank 16, warm",
    "tokens",
    {n: Case(n, 4, runs=n > 256) for n in (1, 4, 16, 64, 256, 1024, 4096)},
    quick=(1, 16, 256),
)
sweep(
    "decode",
    "64 tokens, rank 16, cold",
    "adapters",
    {n: DECODE.but(adapters=n) for n in (1, 2, 4, 8, 16, 32, 64)},
    quick=(1, 8),
)
sweep(
    "decode",
    "64 tokens, 64 adapters, rank 16, cold",
    "popularity",
    {popularity: DECODE.but(popularity=popularity) for popularity in POPULARITIES},
    quick=("zipf",),
)
add("decode", DECODE.but(dtype="float16"), FOUR.but(dtype="float16"))
