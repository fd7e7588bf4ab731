"""How fast is prefill? Runs of many tokens an adapter: operations count, and weights come from the caches."""

from benchmarks.registry import POPULARITIES, Case, Target, sweep, target

SMALL = Case(512, 4, runs=True)
LARGE = Case(2048, 8, ranks=(64,), runs=True)

row = "bf16, 512 tokens, 4 adapters, rank 16"
for rival, factor, text in (
    ("vllm cpu", 80, "at least 80 times vLLM's CPU op"),
    ("mm loop", 1.5, "at least 1.5 times the torch.mm loop"),
):
    target("prefill", Target(row, text, SMALL, "speedup", factor, against=rival))
    target("prefill", Target(row, text, SMALL.but(cold=True), "speedup", factor, against=rival, judged=False))
target(
    "prefill",
    Target(
        "bf16, 2048 tokens, 8 adapters, rank 64",
        "at least 70 % of torch's bf16 mm FLOP/s on one 2048 x 4096 x 4096 product",
        LARGE,
        "mm_flops",
        0.7,
    ),
)

sweep(
    "prefill",
    "8 adapters, rank 16, runs, warm",
    "tokens",
    {n: Case(n, 8, runs=True) for n in (128, 512, 1024, 2048, 4096)},
    quick=(1024,),
)
sweep(
    "prefill",
    "8 adapters, rank 64, fp32, runs, warm",
    "tokens",
    {n: Case(n, 8, ranks=(64,), runs=True, dtype="float32") for n in (128, 512, 2048)},
)
sweep(
    "prefill",
    "1024 tokens, rank 16, runs, warm",
    "adapters",
    {n: Case(1024, n, runs=True) for n in (1, 4, 16, 64)},
)
sweep(
    "prefill",
    "1024 tokens, 16 adapters, rank 16, runs",
    "popularity",
    {popularity: Case(1024, 16, popularity=popularity, runs=True) for popularity in POPULARITIES},
)
