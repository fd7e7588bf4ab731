"""A few small calls of every GPU backend, for compute-sanitizer: odd sizes, checked against the CPU."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from problems import TOLERANCES, error_ratio, problem

import lorakern as lk

SHAPES = [  # tokens, choices, slots, d_in, d_outs, r_max
    (5, 1, 3, 63, (5,), 8),
    (19, 2, 4, 136, (64, 33), 24),
    (40, 1, 3, 256, (128,), 64),
]


def main(device: str = "cuda", backends: tuple[str, ...] = ("cuda", "triton")) -> int:
    """0 if every usable backend is right on every shape."""
    wrong = 0
    for backend in backends:
        if reason := lk.info()["backends"][backend]:
            print(f"{backend}: left out: {reason}")
            continue
        for dtype in TOLERANCES:
            for shape in SHAPES:
                tokens, choices, slots, d_in, d_outs, r_max = shape
                p = problem(dtype, tokens, choices, slots, d_in, d_outs, r_max)
                exact = p.exact()
                on_device = p if device == "cpu" else p.to(device)
                with lk.use_backend(backend):
                    error = error_ratio(on_device.bgmv().cpu(), exact)
                print(f"{backend} {dtype} {shape}: error ratio {error:.1e}", flush=True)
                wrong += not error < TOLERANCES[dtype]
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
