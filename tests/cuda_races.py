"""Run by sanitize.py under ThreadSanitizer: the CUDA kernels on the emulator, whose threads it takes for its own.

With the argument `planted`, kernels with a race instead, one after the other; with `right`, the same without it.
"""

import sys

import pytest
import test_cuda
from emulated_cuda import install
from test_cuda_emulated import CASES, planted

# Races that ThreadSanitizer sees: between threads of a block. missing_wait is none, but is wrong whatever the order.
PLANTED = ("missing_barrier", "missing_second_barrier", "wait_without_barrier", "copy_too_soon")


def kernels():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(test_cuda, "DEVICE", "cpu")
        for arch in (80, 90):
            install(patch, arch)
            for dtype, tolerance in test_cuda.DTYPES:
                for *shape, choices in CASES[:-1]:  # the last one has too many blocks
                    test_cuda.check(test_cuda.make_case(*shape, dtype, choices=choices), tolerance, 3)


def samples(wrong):
    for name in PLANTED:
        print(name, file=sys.stderr, flush=True)
        planted(name, wrong)


if __name__ == "__main__":
    kernels() if len(sys.argv) == 1 else samples(sys.argv[1] == "planted")
