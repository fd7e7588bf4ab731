"""Which layer shapes? From SmolLM2-135M's 576 to the 14336 of an 8B model's MLP, and fused q, k, v."""

from benchmarks.registry import Case, sweep

SHAPES = [(576, 576), (576, 1536), (1536, 576), (2048, 2048), (4096, 14336), (14336, 4096), (14336, 14336)]
FUSED = {
    "q, k, v of 4096 -> 4096 + 1024 + 1024": (4096, 4096, 1024, 1024),
    "q, k, v of 576 -> 576 + 192 + 192": (576, 576, 192, 192),
    "gate, up of 4096 -> 14336 + 14336": (4096, 14336, 14336),
}


def _shaped(case: Case) -> dict:
    plain = {f"{d_in} -> {d_out}": case.but(d_in=d_in, d_outs=(d_out,)) for d_in, d_out in SHAPES}
    return plain | {label: case.but(d_in=d[0], d_outs=d[1:]) for label, d in FUSED.items()}


DECODE, PREFILL = Case(64, 64, cold=True), Case(512, 4, runs=True)
sweep("shapes", "64 tokens, 64 adapters, rank 16, cold", "layer", _shaped(DECODE), quick=("576 -> 1536",))
sweep("shapes", "512 tokens, 4 adapters, rank 16, warm", "layer", _shaped(PREFILL), quick=(next(iter(FUSED)),))
