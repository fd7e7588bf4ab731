"""What this machine has, and why what is missing is missing."""

import os
import platform
import sys
from importlib import metadata

import torch

from lorakern.backends import BACKENDS, cpu


def _version(package):
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def info() -> dict:
    """Backends, instruction sets, threads, devices and versions, as plain data.

    Returns:
        A dict with "backends" (name to None, or the reason why it is missing), "isa" (the CPU kernels in use and those
        this CPU could run, slowest first; None without the C++ module), "threads", "devices" and "versions".

    >>> import lorakern as lk
    >>> lk.info()["backends"]["reference"] is None
    True
    """
    isa = None
    if cpu.missing() is None:
        isa = {"current": cpu._cpu.current_isa(), "usable": cpu._cpu.usable_isas()}
    devices = [f"cpu: {platform.processor() or platform.machine()}, {os.cpu_count()} cores"]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        memory = properties.total_memory / 2**30
        devices.append(f"cuda:{index}: {properties.name}, sm_{properties.major}{properties.minor}, {memory:.0f} GiB")
    return {
        "backends": {name: module.missing() for name, module in BACKENDS.items()},
        "isa": isa,
        "threads": {
            "torch": torch.get_num_threads(),
            "shared_pool": cpu.missing() is None and cpu._cpu.has_thread_pool(),
        },
        "devices": devices,
        "versions": {"python": sys.version.split()[0]}
        | {name: _version(name) for name in ("lorakern", "torch", "triton", "transformers", "peft", "numpy")},
    }
