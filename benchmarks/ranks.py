"""What does a rank cost, and do adapters of small rank pay for the widest one beside them?"""

from benchmarks.registry import Case, Target, companion, sweep, target

MIXED = (4, 8, 16, 32, 64)

for form, case in (
    ("1024 tokens, 8 adapters, prefill", Case(1024, 8, ranks=MIXED, runs=True)),
    ("64 tokens, 64 distinct adapters, cold", Case(64, 64, ranks=MIXED, cold=True)),
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
