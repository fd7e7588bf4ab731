"""How fast are the gradients of x, A, B and gates?"""

from benchmarks.registry import Case, Target, add, sweep, target

BACKWARD = Case(512, 4, runs=True, op="backward")

target(
    "backward",
    Target(
        "bf16, backward, 512 tokens, 4 adapters, rank 16",
        "at least 5 times autograd through the torch.mm loop",
        BACKWARD,
        "speedup",
        5,
        against="mm loop",
    ),
)
sweep(
    "backward",
    "backward, 4 adapters, rank 16, warm",
    "tokens",
    {n: BACKWARD.but(tokens=n) for n in (64, 512, 2048)},
)
sweep(
    "backward",
    "backward, 512 tokens, 4 adapters, warm",
    "rank",
    {r: BACKWARD.but(ranks=(r,)) for r in (4, 16, 64)},
)
add("backward", BACKWARD.but(dtype="float32"), BACKWARD.but(adapters=8, choices=2))
