"""What the machine can do at most, measured in the same run: bandwidth, and multiply-adds of two kinds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks import graphs
from benchmarks.timing import Effort, in_turns
from lorakern.backends import cpu as cpu_backend
from lorakern.errors import LorakernError

# The product whose FLOP/s count as the peak of torch.mm.
MM = {"cpu": (2048, 4096, 4096), "cuda": (8192, 8192, 8192)}
FMA_ROUNDS = 1 << 20
COPIED = 512 << 20  # bytes; several times the L2 of any GPU


def cache_bytes(device: str = "cpu") -> int:
    """The size of the last-level cache; 32 MiB where the system does not say."""
    if device == "cuda":
        return torch.cuda.get_device_properties(0).L2_cache_size
    found = 0
    for index in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = index.read_text().strip()
        if text.endswith("K"):
            found = max(found, int(text[:-1]) << 10)
        elif text.endswith("M"):
            found = max(found, int(text[:-1]) << 20)
    return found or 32 << 20


class ReadProbe:
    """Reads a buffer of four times the last-level cache, on all threads of a CPU."""

    kind = "read"

    def __init__(self, device: str):
        self.bytes = 4 * cache_bytes(device)
        self.buffer = torch.ones(self.bytes // 8, dtype=torch.int64, device=device)
        self.device = device
        if device == "cpu" and (reason := cpu_backend.missing()):
            raise LorakernError(f"bench: the read bandwidth needs the C++ module, and {reason}")

    def __call__(self) -> None:
        if self.device == "cuda":
            self.buffer.sum()
        else:
            cpu_backend._cpu.read_buffer(self.buffer.data_ptr(), self.bytes, torch.get_num_threads())


class CopyProbe:
    """Copies a large buffer on the device; its bytes are those read and those written."""

    kind = "copy"

    def __init__(self, device: str, size: int = COPIED):
        self.bytes, self.device = 2 * size, device
        # Not zeros, which some memories move faster than data.
        self.source = torch.randint(-(2**62), 2**62, (size // 8,), device=device)
        self.target = torch.empty_like(self.source)

    def __call__(self) -> None:
        self.target.copy_(self.source)


def bandwidth_probe(device: str) -> ReadProbe | CopyProbe:
    """What the bandwidth of the device's floors is measured by."""
    return CopyProbe(device) if device == "cuda" else ReadProbe(device)


def take_turns(device: str, functions: dict[str, Callable[[], object]], effort: Effort) -> dict[str, dict]:
    """Time functions in turns: by the clock on a CPU, by events around graph replays on a GPU."""
    return graphs.in_turns(functions, effort) if device == "cuda" else in_turns(functions, effort)


def mm_operations(device: str) -> int:
    m, k, n = MM[device]
    return 2 * m * k * n


def mm_product(device: str, dtype: str) -> Callable[[], object]:
    """The product by which the peak of torch.mm is known."""
    m, k, n = MM[device]
    a, b = torch.randn(m, k, device=device), torch.randn(k, n, device=device)
    a, b = a.to(getattr(torch, dtype)), b.to(getattr(torch, dtype))
    return lambda: torch.mm(a, b)


def measure(device: str, probe: ReadProbe | CopyProbe, effort: Effort) -> dict:
    """Bytes a second of the probe, and FLOP/s by dtype of torch.mm and of a loop of registers alone.

    Returns:
        {"read_bandwidth", "mm_flops": {dtype: FLOP/s}, "fma_flops": {instruction: FLOP/s}, "read": the samples}; on a
        GPU also "copy_bandwidth" and "launch_seconds", the time of a kernel on one element in a graph.
    """
    if device == "cuda":
        return _measure_cuda(probe, effort)
    dtypes, functions, instructions = ["float32", "bfloat16"], {"read": probe}, {}
    functions |= {f"mm {dtype}": mm_product(device, dtype) for dtype in dtypes}
    loop = cpu_backend._cpu.fma_loop
    for bf16 in (False, True):
        instruction, operations, _ = loop(bf16, FMA_ROUNDS, torch.get_num_threads())
        instructions[instruction] = operations
        functions[f"fma {instruction}"] = lambda bf16=bf16: loop(bf16, FMA_ROUNDS, torch.get_num_threads())
    timed = in_turns(functions, effort)
    return {
        "read_bandwidth": probe.bytes / timed["read"]["seconds"],
        "read": timed["read"],
        "mm_flops": {dtype: mm_operations(device) / timed[f"mm {dtype}"]["seconds"] for dtype in dtypes},
        "fma_flops": {name: count / timed[f"fma {name}"]["seconds"] for name, count in instructions.items()},
    }


def _measure_cuda(probe: CopyProbe, effort: Effort) -> dict:
    device, dtypes, one = probe.device, ("bfloat16", "float16", "float32"), torch.ones(1, device=probe.device)
    read = ReadProbe(device)
    functions = {"copy": probe, "read": read, "launch": lambda: one.add_(0)}
    functions |= {f"mm {dtype}": mm_product(device, dtype) for dtype in dtypes}
    timed = take_turns("cuda", functions, effort)
    return {
        "copy_bandwidth": probe.bytes / timed["copy"]["seconds"],
        "read_bandwidth": read.bytes / timed["read"]["seconds"],
        "launch_seconds": timed["launch"]["seconds"],
        "read": timed["read"],
        "mm_flops": {dtype: mm_operations("cuda") / timed[f"mm {dtype}"]["seconds"] for dtype in dtypes},
        "fma_flops": {},
    }


def mm_flops(floors: dict, dtype: str) -> float:
    """The peak that counts for a dtype; on a CPU, float16 is computed in float32."""
    return floors["mm_flops"].get(dtype, floors["mm_flops"]["float32"])
