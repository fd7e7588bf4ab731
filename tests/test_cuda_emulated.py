"""The CUDA kernels on the emulator of native/cuda, without a GPU or a CUDA toolkit; and what the emulator notices."""

import ctypes
import functools
import os
import re
import subprocess
import sys
from pathlib import Path

import emulated_cuda
import pytest
import test_cuda
import torch

ROOT = Path(__file__).resolve().parents[1]
SEEDS = range(3)
THREADS = 128
CASES = [  # tokens, d_in, d_outs, slots, r_max, choices: each kernel and each size of a group
    (1, 136, (72,), 1, 8, 1),
    (5, 63, (5, 40), 3, 24, 1),
    (8, 2072, (264,), 2, 16, 1),
    (9, 257, (129,), 4, 72, 2),
    (40, 64, (24,), 3, 12, 4),
    (150, 80, (24,), 3, 16, 1),
    (3, 2056, (136, 72), 2, 64, 1),
    (140, 136, (72, 8), 1, 64, 1),
    (1030, 16, (8,), 2, 8, 1),
]


@pytest.fixture(params=["late", "early"])
def copies(request, monkeypatch):
    monkeypatch.setenv("LORAKERN_EMULATOR_COPIES", request.param)
    return request.param


# ---- lorakern's kernels


@pytest.mark.parametrize("arch", [80, 90])
def test_everything_that_runs_on_a_gpu(arch):
    options = (
        "-q",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:xdist",
        "-o",
        "addopts=",
        "-k",
        "not missing",
    )
    environment = os.environ | {"LORAKERN_EMULATED_CUDA": "1", emulated_cuda.ARCH: str(arch), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", *options, "tests/test_cuda.py", "tests/test_cuda_backward.py"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    print(done.stdout, done.stderr, sep="\n")
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-4000:]


def test_each_arch_has_a_module_of_its_own(monkeypatch):
    planes = []
    for arch in (80, 90):
        emulated_cuda.install(monkeypatch, arch)
        sizes = {"sizes": (1, 1, 1, 16), "d_in": 4096, "num_slices": 1}
        planes.append(emulated_cuda.module(arch).planes(device=0, dtype=0, **sizes))
    assert planes == [16, 0]  # without clusters, blocks that share d_in meet in global memory


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("dtype", "tolerance"), test_cuda.DTYPES)
def test_no_order_of_threads_and_copies_matters(monkeypatch, copies, arch, seed, dtype, tolerance):
    emulated_cuda.install(monkeypatch, arch)
    monkeypatch.setattr(test_cuda, "DEVICE", "cpu")
    monkeypatch.setenv("LORAKERN_EMULATOR_SEED", str(seed))
    for tokens, d_in, d_outs, slots, r_max, choices in CASES:
        test_cuda.check(test_cuda.make_case(tokens, d_in, d_outs, slots, r_max, dtype, choices=choices), tolerance, 3)


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("at_end", [True, False])
@pytest.mark.parametrize(("dtype", "tolerance"), test_cuda.DTYPES)
def test_no_access_beyond_the_tensors(monkeypatch, copies, arch, at_end, dtype, tolerance):
    emulated_cuda.install(monkeypatch, arch)
    monkeypatch.setattr(test_cuda, "DEVICE", "cpu")
    for shape in CASES:
        case = test_cuda.make_case(*shape[:5], dtype, choices=shape[5])
        for name, value in case.items():
            many = isinstance(value, list)
            fenced = [emulated_cuda.fenced(v, at_end) for v in (value if many else [value])]
            case[name] = fenced if many else fenced[0]
        y, want = test_cuda.make_y(case), test_cuda.expected(case, test_cuda.make_y(case))
        assert test_cuda.ratio(test_cuda.run(case, emulated_cuda.fenced(y, at_end)), want) < tolerance


@pytest.mark.parametrize("r_max", [16, 32, 64])
@pytest.mark.parametrize("tokens", [40, 600])
def test_any_number_of_blocks_to_a_group_gives_the_same_bits(monkeypatch, tokens, r_max):
    """Fewer multiprocessors, fewer blocks to a group: 1 to 16 in decode, 1 to 4 in prefill."""
    monkeypatch.setattr(test_cuda, "DEVICE", "cpu")
    case, results = test_cuda.make_case(tokens, 1032, (136, 72), 2, r_max, torch.bfloat16), []
    for multiprocessors in (1, 12, 24, 132):
        with monkeypatch.context() as one:
            emulated_cuda.install(one, 90, multiprocessors)
            test_cuda.check(case, 8e-3)
            results.append(test_cuda.run(case, test_cuda.make_y(case)))
    assert all(test_cuda.same_bits(result, results[0]) for result in results)


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("r_max", [576, 704, 1024])
def test_ranks_that_almost_fill_the_shared_memory(monkeypatch, arch, r_max):
    emulated_cuda.install(monkeypatch, arch)
    monkeypatch.setattr(test_cuda, "DEVICE", "cpu")
    test_cuda.check(test_cuda.make_case(4, 16, (8,), 2, r_max, torch.float32, choices=256), 1e-6)


# ---- The emulator: mistakes


@functools.cache
def samples():
    return ctypes.CDLL(str(emulated_cuda.build.build_samples()))


def call(name, *arguments):
    """What CUDA has to say against a launch of native/cuda, or None."""
    function = getattr(samples(), name)
    function.restype = ctypes.c_char_p
    plain = [
        ctypes.c_void_p(a.data_ptr()) if isinstance(a, torch.Tensor) else a.encode() if isinstance(a, str) else a
        for a in arguments
    ]
    error = function(*plain)
    return error and error.decode()


WRONG_RESULTS = {  # and the copies with which they come
    "missing_barrier": ("late", "early"),
    "missing_second_barrier": ("late", "early"),
    "missing_wait": ("late",),
    "wait_for_too_few": ("late",),
    "wait_without_barrier": ("late", "early"),
    "copy_too_soon": ("late", "early"),
    "shuffle_from_outside": ("late", "early"),
    "missing_cluster_barrier": ("late", "early"),
}
FAILURES = {
    "divergent_collectives": r"(__syncwarp|__shfl_sync), while thread .* is at (__shfl_sync|__syncwarp) \(planted\.cu:",
    "divergent_product": r"planted\.cu:\d+: multiply<half>, while thread .* is at multiply<half> \(planted\.cu:\d+\)",
    "exited_lane": r"lane 5 has exited|deadlock",
    "exited_thread": r"deadlock:\n.*: 1 threads have exited, first \(77, 0, 0\)\n.* 127 threads wait at __syncthreads",
    "barrier_in_a_branch": r"__syncthreads, while thread .* of the block is at __syncthreads",
    "not_in_the_mask": r"lane 0 is not in its own mask fffffffe",
    "misaligned_copy": r"copy_async: misaligned global address",
    "copy_of_too_much": r"copy_async: 17 bytes",
    "copy_beyond_shared": r"copy_async: the address is not in shared memory \[.*, thread \(127, 0, 0\)\]",
    "misaligned_matrix_row": r"load_matrices: misaligned shared address",
    "misaligned_vector": r"misaligned address",
    "index_beyond_array": r"an index outside of its array.*\[block \(0, 0, 0\), thread \(127, 0, 0\)\]",
    "beyond_dynamic_shared": r"no memory at",
    "null_pointer": r"no memory at \(nil\)",
    "store_before_start": r"block [01] of the cluster may not have started",
    "store_after_exit": r"block [01] has exited",
}


def planted(name, wrong):
    """(the error or None, whether the result is right)"""
    numbers, out = torch.arange(2 * THREADS).float(), torch.full((THREADS,), torch.nan)
    error = call("planted", name, out, numbers, wrong)
    return error, torch.equal(out, numbers[:THREADS])


@pytest.mark.parametrize("name", [*WRONG_RESULTS, *FAILURES])
def test_a_right_kernel_is_right(monkeypatch, copies, name):
    for seed in SEEDS:
        monkeypatch.setenv("LORAKERN_EMULATOR_SEED", str(seed))
        assert planted(name, wrong=False) == (None, True)


@pytest.mark.parametrize("name", WRONG_RESULTS)
def test_a_planted_race_gives_a_wrong_result(monkeypatch, copies, name):
    right = []
    for seed in SEEDS:
        monkeypatch.setenv("LORAKERN_EMULATOR_SEED", str(seed))
        error, same = planted(name, wrong=True)
        assert error is None
        right.append(same)
    assert all(right) == (copies not in WRONG_RESULTS[name])


@pytest.mark.parametrize("name", FAILURES)
def test_a_planted_mistake_fails_the_launch(monkeypatch, copies, name):
    errors = []
    for seed in SEEDS:
        monkeypatch.setenv("LORAKERN_EMULATOR_SEED", str(seed))
        errors.append(planted(name, wrong=True)[0])
    assert any(error and re.search(FAILURES[name], error, re.DOTALL) for error in errors), errors


@pytest.mark.parametrize(
    ("arch", "grid", "threads", "shared", "cluster", "limit", "error"),
    [
        (90, 4, 128, 48 << 10, 0, 0, None),
        (90, 4, 128, (48 << 10) + 1, 0, 0, "invalid argument"),
        (90, 4, 128, 220 << 10, 4, 220 << 10, None),
        # The limit is of dynamic and static shared memory together.
        (90, 4, 128, 0, 0, 227 << 10, "invalid argument"),
        (80, 4, 128, 160 << 10, 0, 160 << 10, None),
        (80, 4, 128, 0, 0, 163 << 10, "invalid argument"),
        (80, 4, 128, 0, 2, 0, "operation not supported"),
        (90, 6, 128, 0, 4, 0, "invalid cluster size"),
        (90, 16, 128, 0, 16, 0, "invalid cluster size"),
        (90, 0, 128, 0, 0, 0, "invalid configuration argument"),
        (90, 4, 1025, 0, 0, 0, "invalid configuration argument"),
    ],
)
def test_limits_of_a_launch(monkeypatch, arch, grid, threads, shared, cluster, limit, error):
    monkeypatch.setenv(emulated_cuda.ARCH, str(arch))
    assert call("ask_for", torch.zeros(1024), grid, threads, shared, cluster, limit) == error


# ---- The emulator: instructions


def test_load_matrices():
    rows = torch.arange(256, dtype=torch.int16).view(4, 8, 8)
    out = torch.zeros(32, 4, 2, dtype=torch.int16)
    assert call("load_matrices", rows, out) is None
    assert torch.equal(out, rows.reshape(4, 8, 4, 2).permute(1, 2, 0, 3).reshape(32, 4, 2))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_multiply(dtype):
    a, b, c = torch.randn(16, 16).to(dtype), torch.randn(8, 16).to(dtype), torch.randn(16, 8)
    want = (c.double() + a.double() @ b.double().T).float()
    assert call("multiply_half" if dtype == torch.float16 else "multiply_bfloat16", a, b, c) is None
    torch.testing.assert_close(c, want, rtol=1e-7, atol=1e-6)


def tf32(values):
    """float32 rounded to 10 bits of mantissa, halves away from zero."""
    mantissa, exponent = torch.frexp(values.double())
    return torch.ldexp(torch.sign(mantissa) * torch.floor(mantissa.abs() * 2**11 + 0.5) / 2**11, exponent)


def test_multiply_tf32():
    a, b, c = torch.randn(16, 8), torch.randn(8, 8), torch.randn(16, 8)
    want = (c.double() + tf32(a) @ tf32(b)).float()
    assert call("multiply_tf32", a, b, c) is None
    torch.testing.assert_close(c, want, rtol=1e-7, atol=1e-6)


def test_shuffles_and_votes():
    out, lane = torch.zeros(12, 32, dtype=torch.int32), torch.arange(32)
    assert call("shuffles_and_votes", out) is None
    sources = [
        torch.full((32,), 5),
        lane // 8 * 8 + (lane + 1) % 8,
        lane ^ 16,
        lane ^ 3,
        torch.where(lane < 3, lane, lane - 3),
        torch.where(lane % 8 == 0, lane, lane - 1),
        torch.where(lane > 28, lane, lane + 3),
        torch.where(lane % 8 == 7, lane, lane + 1),
    ]
    assert torch.equal(out[:8], torch.stack(sources).int() + 100)
    thirds, odd = sum(1 << i for i in range(0, 32, 3)), 0xAAAAAAAA
    votes = torch.tensor([thirds, 1, 0]).view(3, 1).expand(3, 32)
    assert torch.equal(out[8:11].long() % 2**32, votes)
    assert torch.equal(out[11].long() % 2**32, torch.where(lane < 8, odd & 0xFF, odd & 0xFFFFFF00))


def test_votes_of_a_block():
    out = torch.zeros(3, 72, dtype=torch.int32)
    assert call("block_votes", out) is None
    assert torch.equal(out, torch.tensor([24, 1, 0], dtype=torch.int32)[:, None].expand(3, 72))


@pytest.mark.parametrize("cluster", [1, 2, 8])
@pytest.mark.parametrize("seed", SEEDS)
def test_blocks_of_a_cluster_write_to_each_other(monkeypatch, cluster, seed):
    monkeypatch.setenv("LORAKERN_EMULATOR_SEED", str(seed))
    out = torch.zeros(16 // cluster, cluster, 2, cluster)
    assert call("exchange_in_clusters", out, 16, cluster) is None
    blocks = torch.arange(1.0, 17.0).view(-1, 1, 1, cluster)
    assert torch.equal(out, torch.cat([blocks, 2 * blocks], dim=2).expand_as(out))


def test_conversions_bit_for_bit():
    every = torch.arange(2**16, dtype=torch.int32).short()
    bits = torch.cat([torch.arange(0, 2**32, 65_521), torch.arange(0x33000000, 0x33000100), torch.arange(2**16) << 16])
    halfway = torch.cat(
        [every.view(torch.float16).float().view(torch.int32).long() + d for d in (0xFFF, 0x1000, 0x1001)]
    )
    values = torch.cat([bits, halfway, halfway << 4]).int().view(torch.float32)
    halves, bfloats = (torch.zeros(len(values), dtype=torch.int16) for _ in range(2))
    rounded = torch.zeros(len(values), dtype=torch.int32)
    assert call("narrow_floats", values, halves, bfloats, rounded, len(values)) is None
    nan = values.isnan()
    for got, dtype in ((halves, torch.float16), (bfloats, torch.bfloat16)):
        assert torch.equal(got[~nan], values[~nan].to(dtype).view(torch.int16))
        assert (got[nan] == 0x7FFF).all()
    assert (rounded[nan] == 0x7FFFFFFF).all()
    plain = values.isfinite() & (values.abs() < 3e38) & ((values == 0) | (values.abs() > 1.2e-38))
    assert torch.equal(rounded.view(torch.float32)[plain].double(), tf32(values[plain]))
    wide = [torch.zeros(2**16) for _ in range(2)]
    assert call("widen_floats", *wide) is None
    for got, dtype in zip(wide, (torch.float16, torch.bfloat16), strict=True):
        torch.testing.assert_close(got, every.view(dtype).float(), rtol=0, atol=0, equal_nan=True)
