"""What does a gated mixture of K adapters a token cost? K times the weights, and nothing more."""

from benchmarks.registry import Case, Target, companion, sweep, target

ONE = Case(64, 64, cold=True)
FOUR = Case(64, 256, choices=4, cold=True)

companion(FOUR, "K = 1", ONE)
target(
    "gates",
    Target(
        "bf16, gates K = 4, 64 tokens, 256 distinct adapters, rank 16, cold",
        "at most 1.15 times four times the time of K = 1 on 64 adapters",
        FOUR,
        "per_choice",
        1.15,
    ),
)
sweep(
    "gates",
    "64 tokens, 64 distinct adapters for each of K choices, cold",
    "K",
    {k: Case(64, 64 * k, choices=k, cold=True) for k in (1, 2, 4)},
)
sweep(
    "gates",
    "512 tokens, 8 adapters, rank 16, uniform, warm",
    "K",
    {k: Case(512, 8, choices=k, popularity="uniform", runs=True) for k in (1, 2, 4)},
)
