"""Puts the emulator of native/cuda under the CUDA backend, which then takes CPU tensors."""

import functools
import importlib.util
import os
import shutil
from contextlib import contextmanager
from pathlib import Path

from lorakern.backends import cuda

ARCH = "LORAKERN_EMULATOR_ARCH"
_specification = importlib.util.spec_from_file_location(
    "build_emulator", Path(__file__).parent / "native/cuda/build.py"
)
build = importlib.util.module_from_spec(_specification)
_specification.loader.exec_module(build)


@functools.cache
def module(arch):
    """The emulated lorakern._cuda: one for each arch, since csrc remembers what the device is like."""
    built = build.build_module()
    copy = built.parent / f"sm_{arch}" / f"{os.getpid()}{built.suffix}"
    copy.parent.mkdir(exist_ok=True)
    shutil.copy2(built, copy)
    try:
        return build.load(copy)
    finally:
        copy.unlink()


@contextmanager
def _on(tensor):
    assert tensor.device.type == "cpu"
    yield 0, 0


def install(monkeypatch, arch=None):
    """Until monkeypatch undoes it. arch: 80 or 90, by default LORAKERN_EMULATOR_ARCH."""
    arch = arch or int(os.environ.get(ARCH) or 90)
    monkeypatch.setenv(ARCH, str(arch))
    monkeypatch.setattr(cuda, "missing", lambda: None)
    monkeypatch.setattr(cuda, "_module", lambda: module(arch))
    monkeypatch.setattr(cuda, "_on", _on)
    monkeypatch.setattr(cuda, "_preloaded", functools.cache(cuda._preloaded.__wrapped__))
