"""make sanitize: csrc under AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer; any report fails.

The CUDA kernels run on the emulator of native/cuda, where ThreadSanitizer tells the threads of a block apart.

Each build first has to report errors planted in every ISA variant, so that its silence afterwards means something.
Leaks are looked for in the C++ program only: in Python, torch's and the interpreter's own would drown ours.
"""

import os
import re
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CXX = os.environ.get("CXX", sysconfig.get_config_var("CXX")).split()
PROGRAM = ["tests/native/concurrent.cpp", "-std=c++17", "-Icsrc", "-O1", "-g1", "-rdynamic", "-Wall", "-Wextra"]
TESTS = [
    "bgmv",
    "autograd",
    "routed",
    "routed_autograd",
    "gram",
    "kmeans",
    "kmeans_steps",
    "dispatch",
    "errors",
    "threads",
    "transformers",
]  # the others never reach csrc, or by the same calls
UNSEEN = re.compile(r"_mm\d*_\w*(?:mask\w*(?:load|store)|gather|scatter|stream|lddqu|broadcast_[sp][sd]\()\w*")


def fail(message):
    sys.exit(f"sanitize: {message}")


def run(*command, **environment):
    return subprocess.run(command, cwd=ROOT, env=os.environ | environment).returncode


def runtime(name):
    """The path of a library of the compiler."""
    path = subprocess.run([*CXX, f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
    if not os.path.isabs(path):
        fail(f"{CXX[0]} has no {name}; set CXX to a GCC with its sanitizer runtimes")
    return path


def build(folder, sanitizers):
    """The whole package in folder/lib with a sanitized _cpu, and the C++ program folder/concurrent."""
    setup = [sys.executable, "setup.py", "--quiet", "build", "--build-base", folder, "--build-lib", f"{folder}/lib"]
    if run(*setup, "--build-temp", f"{folder}/temp", LORAKERN_SANITIZE=sanitizers, LORAKERN_CUDA="0"):
        fail(f"no build with -fsanitize={sanitizers}")
    objects = [f"{folder}/temp/{s.relative_to(ROOT).with_suffix('.o')}" for s in ROOT.glob("csrc/cpu/*.cpp")]
    objects = [o for o in objects if (ROOT / o).exists()]  # a machine without AVX has fewer
    flags = [f"-fsanitize={sanitizers}", "-fno-sanitize-recover=all", "-o", f"{folder}/concurrent"]
    if run(*CXX, *PROGRAM, *objects, "-ldl", *flags):
        fail(f"concurrent.cpp does not build with -fsanitize={sanitizers}")


def check_masked():
    """Every load or store that GCC leaves uninstrumented is replaced in masked.h."""
    used = {m for s in ROOT.glob("csrc/**/*.[ch]*") for m in UNSEEN.findall(s.read_text())}
    replaced = set(re.findall(r"#define (\w+)", (ROOT / "tests/native/masked.h").read_text()))
    if used - replaced:
        fail(f"GCC's sanitizers do not see {', '.join(sorted(used - replaced))}: replace them in tests/native/masked.h")


def report_of(call):
    """What a child process prints to stderr while it runs call()."""
    with tempfile.TemporaryFile() as stderr:
        if (child := os.fork()) == 0:
            os.dup2(stderr.fileno(), 2)
            call()
            os._exit(0)
        os.waitpid(child, 0)
        stderr.seek(0)
        return stderr.read().decode(errors="replace")


def planted_errors():
    """Memory beyond a tensor, read or written, and a misaligned float must be reported in every ISA variant."""
    import numpy as np
    import torch

    import lorakern as lk
    from lorakern.backends.cpu import _cpu

    def matrix(dtype, rows, columns, missing):
        """A matrix of zeros whose last elements lie beyond its memory."""
        storage = torch.zeros(rows * columns - missing, dtype=torch.int32 if dtype.itemsize == 4 else torch.int16)
        strides = columns * dtype.itemsize, dtype.itemsize
        return torch.from_numpy(np.lib.stride_tricks.as_strided(storage.numpy(), (rows, columns), strides)).view(dtype)

    torch.set_num_threads(1)  # the children are forked
    crooked = torch.from_numpy(np.frombuffer(bytearray(13), dtype=np.float32, offset=1))[:, None]
    indices = torch.zeros(3, 1, dtype=torch.long)
    for isa in _cpu.usable_isas():
        _cpu.force_isa(isa)
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            a, b = torch.zeros(1, 4, 33, dtype=dtype), torch.zeros(1, 33, 4, dtype=dtype)
            for error, y_missing, x_missing, gates in (
                (None, 0, 0, None),
                ("heap-buffer-overflow", 0, 1, None),
                ("heap-buffer-overflow", 1, 0, None),
                ("misaligned address", 0, 0, crooked),
            ):
                y, x = matrix(dtype, 3, 33, y_missing), matrix(dtype, 3, 33, x_missing)
                report = report_of(lambda: lk.bgmv(y, x, a, b, indices, gates=gates))  # noqa: B023 (called at once)
                if report if error is None else error not in report or "csrc/" not in report:
                    fail(f"{isa}, {dtype}: expected a report of {error or 'nothing'}; got:\n{report or 'nothing'}")


def python_tests(lib):
    """Run inside the sanitized environment: the planted errors, then the tests, in one process and one module."""
    import pytest

    from lorakern.backends.cpu import _cpu

    if not Path(_cpu.__file__).is_relative_to(ROOT / lib):
        fail(f"the module under test is {_cpu.__file__}, not the one in {lib}")
    planted_errors()
    print(
        "planted errors are reported; the CPU tests under AddressSanitizer and UndefinedBehaviorSanitizer:", flush=True
    )
    sys.exit(pytest.main(["-q", "-o", "pythonpath=", "-m", "not gpu", *(f"tests/test_{t}.py" for t in TESTS)]))


def cuda_races(fixed):
    """Races between CUDA threads: all planted ones are reported, none in kernels without a mistake."""
    races = {"LORAKERN_EMULATOR_RACES": "1", "OMP_NUM_THREADS": "1"}
    if run(sys.executable, "tests/native/cuda/build.py", **races):
        fail("the CUDA kernels do not build with -fsanitize=thread")

    def reports(*arguments):
        command = [*fixed, sys.executable, "tests/cuda_races.py", *arguments]
        environment = (
            os.environ
            | races
            | {"LD_PRELOAD": runtime("libtsan.so"), "TSAN_OPTIONS": "exitcode=0 suppress_equal_addresses=0"}
        )
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        if done.returncode:
            fail(f"tests/cuda_races.py {' '.join(arguments)} fails:\n{done.stderr}")
        return done.stderr

    planted = re.split(r"^(?=\w+$)", reports("planted"), flags=re.MULTILINE)[1:]
    if not planted or not all("ThreadSanitizer: data race" in report for report in planted):
        fail(f"a planted CUDA race was not reported: {[report[:200] for report in planted]}")
    print("planted CUDA races are reported; the CUDA kernels under ThreadSanitizer:", flush=True)
    for silent in (reports("right"), reports()):
        if "ThreadSanitizer" in silent:
            fail(f"CUDA threads race:\n{silent}")


def thread_sanitizer():
    """The C++ program and the CUDA kernels."""
    build("build/tsan", "thread")
    # ThreadSanitizer's shadow memory has fixed addresses, which some kernels' address randomisation hits.
    fixed = ["setarch", "-R"] if run("sh", "-c", "setarch -R true 2> /dev/null") == 0 else []
    planted = subprocess.run([*fixed, "build/tsan/concurrent", "race"], cwd=ROOT, capture_output=True, text=True)
    if "ThreadSanitizer: data race" not in planted.stderr:
        fail(f"the planted data race was not reported:\n{planted.stderr}")
    print("the planted data race is reported; concurrent calls under ThreadSanitizer:", flush=True)
    if run(*fixed, "build/tsan/concurrent"):
        fail("concurrent calls are not clean under ThreadSanitizer")
    cuda_races(fixed)


def address_sanitizer():
    """The C++ program and the Python tests."""
    preload = f"{runtime('libasan.so')} {runtime('libstdc++.so')}"  # libstdc++: ASan wraps its throw when it starts
    build("build/asan", "address,undefined,float-divide-by-zero,float-cast-overflow")
    print("concurrent calls under AddressSanitizer, UndefinedBehaviorSanitizer and LeakSanitizer:", flush=True)
    if run("build/asan/concurrent", ASAN_OPTIONS="detect_leaks=1:detect_stack_use_after_return=1"):
        fail("concurrent calls are not clean under AddressSanitizer")
    lib = "build/asan/lib"
    options = {"ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=1", "UBSAN_OPTIONS": "print_stacktrace=1"}
    paths = {"LD_PRELOAD": preload, "PYTHONPATH": lib, "PYTHONSAFEPATH": "1"}
    if run(sys.executable, __file__, lib, **options, **paths):
        fail("the CPU tests are not clean")


def main():
    runtime("libubsan.so"), runtime("libtsan.so")
    check_masked()
    with ThreadPoolExecutor() as pool:  # most of each is one thread's work
        for chain in [pool.submit(address_sanitizer), pool.submit(thread_sanitizer)]:
            chain.result()


if __name__ == "__main__":
    python_tests(sys.argv[1]) if len(sys.argv) > 1 else main()
