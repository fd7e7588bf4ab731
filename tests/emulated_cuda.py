"""Puts the emulator of native/cuda under the CUDA backend, which then takes CPU tensors."""

import ctypes
import functools
import importlib.util
import mmap
import os
import shutil
from contextlib import contextmanager
from pathlib import Path

import torch

from lorakern.backends import cuda

ARCH = "LORAKERN_EMULATOR_ARCH"
_specification = importlib.util.spec_from_file_location(
    "build_emulator", Path(__file__).parent / "native/cuda/build.py"
)
build = importlib.util.module_from_spec(_specification)
_specification.loader.exec_module(build)


@functools.cache
def module(arch, multiprocessors=None):
    """The emulated lorakern._cuda: one for each device, since csrc remembers what it is like."""
    built = build.build_module()
    name = f"sm_{arch}" if multiprocessors is None else f"sm_{arch}_{multiprocessors}"
    copy = built.parent / name / f"{os.getpid()}{built.suffix}"
    copy.parent.mkdir(exist_ok=True)
    shutil.copy2(built, copy)
    try:
        return build.load(copy, name)
    finally:
        copy.unlink()


@contextmanager
def _on(tensor):
    assert tensor.device.type == "cpu"
    yield 0, 0


def install(monkeypatch, arch=None, multiprocessors=None):
    """Until monkeypatch undoes it. arch: 80 or 90, else LORAKERN_EMULATOR_ARCH. multiprocessors: of the device."""
    arch = arch or int(os.environ.get(ARCH) or 90)
    monkeypatch.setenv(ARCH, str(arch))
    if multiprocessors is not None:
        monkeypatch.setenv("LORAKERN_EMULATOR_MULTIPROCESSORS", str(multiprocessors))
    monkeypatch.setattr(cuda, "missing", lambda: None)
    monkeypatch.setattr(cuda, "_module", lambda: module(arch, multiprocessors))
    monkeypatch.setattr(cuda, "_on", _on)
    monkeypatch.setattr(cuda, "_preloaded", functools.cache(cuda._preloaded.__wrapped__))


def fenced(tensor, at_end):
    """A contiguous copy that ends (or begins) where memory does: beyond it, the emulator reports a fault."""
    size = tensor.numel() * tensor.element_size()
    if size == 0:
        return tensor
    pages = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, pages + 2 * mmap.PAGESIZE)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for fence in (start, start + mmap.PAGESIZE + pages):
        assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(fence), ctypes.c_size_t(mmap.PAGESIZE), 0) == 0
    offset = mmap.PAGESIZE + (pages - size if at_end else 0)
    return (
        torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=offset)
        .view(tensor.shape)
        .copy_(tensor)
    )
