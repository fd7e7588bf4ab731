"""What the machine can do at most, measured in the same run: read bandwidth, and multiply-adds of two kinds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.timing import Effort, in_turns
from lorakern.backends import cpu as cpu_backend
from lorakern.errors import LorakernError

MM = (2048, 4096, 4096)  # the product whose FLOP/s count as the peak of torch.mm
MM_OPERATIONS = 2 * MM[0] * MM[1] * MM[2]
FMA_ROUNDS = 1 << 20


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
    """Reads a buffer of four times the last-level cache, on all threads."""

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


def synchronizer(device: str) -> Callable[[], None] | None:
    return torch.cuda.synchronize if device == "cuda" else None


def mm_product(device: str, dtype: str) -> Callable[[], object]:
    """The product by which the peak of torch.mm is known."""
    m, k, n = MM
    a, b = torch.randn(m, k, device=device), torch.randn(k, n, device=device)
    a, b = a.to(getattr(torch, dtype)), b.to(getattr(torch, dtype))
    return lambda: torch.mm(a, b)


def measure(device: str, probe: ReadProbe, effort: Effort) -> dict:
    """Bytes a second of the probe, and FLOP/s by dtype of torch.mm and of a loop of registers alone.

    Returns:
        {"read_bandwidth", "mm_flops": {dtype: FLOP/s}, "fma_flops": {instruction: FLOP/s}, "read": the samples}.
    """
    dtypes = ["float32", "bfloat16"] + (["float16"] if device == "cuda" else [])
    functions, instructions = {"read": probe}, {}
    functions |= {f"mm {dtype}": mm_product(device, dtype) for dtype in dtypes}
    if device == "cpu":
        loop = cpu_backend._cpu.fma_loop
        for bf16 in (False, True):
            instruction, operations, _ = loop(bf16, FMA_ROUNDS, torch.get_num_threads())
            instructions[instruction] = operations
            functions[f"fma {instruction}"] = lambda bf16=bf16: loop(bf16, FMA_ROUNDS, torch.get_num_threads())
    timed = in_turns(functions, effort, synchronizer(device))
    return {
        "read_bandwidth": probe.bytes / timed["read"]["seconds"],
        "read": timed["read"],
        "mm_flops": {dtype: MM_OPERATIONS / timed[f"mm {dtype}"]["seconds"] for dtype in dtypes},
        "fma_flops": {name: count / timed[f"fma {name}"]["seconds"] for name, count in instructions.items()},
    }


def mm_flops(floors: dict, dtype: str) -> float:
    """The peak that counts for a dtype; on a CPU, float16 is computed in float32."""
    return floors["mm_flops"].get(dtype, floors["mm_flops"]["float32"])
