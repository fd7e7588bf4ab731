"""What does a rank cost, and do adapters of small rank pay for the widest one beside them?"""

from benchmarks.registry import Case, Target, companion, sweep, target

MIXED = (4, 8, 16, 32, 64)

# Judged where sums bound the time. In longer batches x and y, which no rank makes smaller, come from memory; in cold
# decode a row of B at a small rank still costs its cache line.
for form, case, judged in (
    ("512 tokens, 8 adapters, prefill", Case(512, 8, ranks=MIXED, runs=True), True),
    ("1024 tokens, 8 adapters, prefill", Case(1024, 8, ranks=MIXED, runs=True), False),
    ("64 tokens, 64 distinct adapters, cold decode", Case(64, 64, ranks=MIXED, cold=True), True),
):
    companion(case, "all of rank 64", case.but(ranks=(64,)))
    target(
        "ranks",
        Target(
            "bf16, mixed ranks 4..64 against all padded to 64",
            f"time proportional to the true ranks within 25 % ({form})",
            case,
            "proportional",
            1.25,
            judged=judged,
        ),
    )

sweep(
    "ranks",
    "64 tokens, 64 adapters, cold",
    "rank",
    {r: Case(64, 64, ranks=(r,), cold=True) for r in (4, 8, 16, 32, 64, 128, 256)},
    quick=(4, 64),
)
sweep(
    "ranks",
    "512 tokens, 4 adapters, runs, warm",
    "rank",
    {r: Case(512, 4, ranks=(r,), runs=True) for r in (4, 16, 64, 256)},
    quick=(4, 64),
)
