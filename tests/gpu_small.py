"""A few small calls of the CUDA kernels, gradients too, for compute-sanitizer: odd sizes, checked against the CPU.

Triton's kernels are left out: to compile them under the sanitizer takes minutes.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from problems import TOLERANCES, error_ratio, problem

import lorakern as lk

SHAPES = [  # tokens, choices, slots, d_in, d_outs, r_max
    (5, 1, 3, 63, (5,), 8),
    (19, 2, 4, 136, (64, 33), 24),
    (40, 1, 3, 256, (128,), 64),
    (130, 1, 4, 96, (72,), 16),  # more pairs than a kernel groups without a plan
    (600, 1, 2, 264, (136,), 64),  # more than decode takes
]


def wrong_gradients(backend: str, device: str) -> int:
    """How many gradients of one small mixture are not those of the reference."""
    p = problem(torch.bfloat16, tokens=19, choices=2, slots=4, d_in=72, d_outs=(40, 24), r_max=20)

    def gradients(p):
        x, *A = (t.detach().requires_grad_() for t in (p.x, *p.A))
        gates = p.gates.detach().requires_grad_()
        delta = lk.lora_delta(x, A, p.B, p.indices, scale=p.scale, ranks=p.ranks, gates=gates)
        return torch.autograd.grad(delta.square().sum() / 2, (x, *A, gates))

    with lk.use_backend("reference"):
        exact = gradients(p.double())
    with lk.use_backend(backend):
        got = gradients(p if device == "cpu" else p.to(device))
    errors = [error_ratio(g.cpu(), e) for g, e in zip(got, exact, strict=True)]
    print(f"{backend} gradients: error ratios {', '.join(f'{error:.1e}' for error in errors)}", flush=True)
    return sum(not error < 2 * TOLERANCES[torch.bfloat16] for error in errors)


def main(device: str = "cuda", backends: tuple[str, ...] = ("cuda",)) -> int:
    """0 if every backend is usable and right on every shape."""
    wrong = 0
    for backend in backends:
        if reason := lk.info()["backends"][backend]:
            print(f"{backend}: {reason}")
            return 1
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
        wrong += wrong_gradients(backend, device)
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
