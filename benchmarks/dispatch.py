"""What does a call cost beside its arithmetic? A layer so small that only the way from Python to the kernel counts."""

from benchmarks.registry import Case, Target, add, target

ONE = Case(1, 1, ranks=(4,), d_in=64, d_outs=(64,), dtype="float32", op="dispatch")

target("dispatch", Target("fp32, 1 token, d = 64, rank 4: lk.bgmv", "under 8 microseconds", ONE, "seconds", 8e-6))
add("dispatch", ONE.but(tokens=8, adapters=8), ONE.but(d_outs=(64, 64, 64)))
