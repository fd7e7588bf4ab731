"""Builds csrc/cuda for the CPU, on the emulator in this folder. As a script it prints what it has built.

No CUDA toolkit is needed. What is newer than its object is compiled again.
"""

import importlib.machinery
import importlib.util
import os
import shlex
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
RACES = os.environ.get("LORAKERN_EMULATOR_RACES") == "1"  # a build for ThreadSanitizer, see races.h
BUILD = ROOT / "build" / ("emulator_races" if RACES else "emulator")
CXX = shlex.split(os.environ.get("CXX", "g++"))
FLAGS = [
    "-std=c++17",
    "-O1",
    "-g1",
    "-fPIC",
    "-fvisibility=hidden",
    "-ffp-contract=off",
    # A misaligned vector or an index outside of an array stops the kernel; no runtime library is needed for that.
    "-fsanitize=alignment,bounds",
    "-fsanitize-undefined-trap-on-error",
    "-Wall",
    "-Wextra",
    "-Wno-unknown-pragmas",
]
if RACES:
    FLAGS.append("-DLORAKERN_RACES")
INCLUDE = [f"-I{HERE}", f"-I{ROOT / 'csrc'}"]
EMULATOR = [HERE / f"{name}.cpp" for name in ("emulator", "faults", "fiber", "instructions", "runtime")]


def outdated(target):
    """Is an object older than a file that it was made from, or not there?"""
    includes = target.with_suffix(".d")
    if not target.exists() or not includes.exists():
        return True
    sources = includes.read_text().replace("\\\n", " ").partition(":")[2].split()
    made = target.stat().st_mtime
    return any(not os.path.exists(s) or os.path.getmtime(s) > made for s in (*sources, __file__))


def build(sources, name):
    """A shared library build/emulator/`name` of these sources and the emulator, compiled two at a time."""
    import pybind11

    sources = [*sources, *EMULATOR]
    BUILD.mkdir(parents=True, exist_ok=True)
    python = [f"-I{sysconfig.get_path('include')}", f"-I{pybind11.get_include()}"]

    def compile_one(source):
        target = BUILD / f"{source.name}.o"
        if outdated(target):
            own = ["-O3", "-fno-sanitize=all"] if source in EMULATOR else ["-fsanitize=thread"] if RACES else []
            partial, includes = BUILD / f"{source.name}.{os.getpid()}", ["-MMD", "-MF", str(target.with_suffix(".d"))]
            command = [*CXX, *FLAGS, *own, *INCLUDE, *python, *includes, "-x", "c++", "-c", str(source)]
            subprocess.run([*command, "-o", str(partial)], check=True)
            partial.replace(target)
        return target

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_one, sources))
    library = BUILD / name
    if not library.exists() or library.stat().st_mtime < max(o.stat().st_mtime for o in objects):
        partial = library.with_suffix(f".{os.getpid()}")
        subprocess.run([*CXX, "-shared", *map(str, objects), "-ldl", "-lpthread", "-o", str(partial)], check=True)
        partial.replace(library)
    return library


def build_module():
    """The path of the emulated lorakern._cuda."""
    sources = [ROOT / "csrc" / "bind_cuda.cpp", *sorted((ROOT / "csrc" / "cuda").glob("*.cu"))]
    return build(sources, f"_cuda{sysconfig.get_config_var('EXT_SUFFIX')}")


def build_samples():
    """The path of the emulator's own kernels, for ctypes: right ones and wrong ones."""
    return build([HERE / "planted.cu", HERE / "primitives.cu"], "samples.so")


def load(path, package):
    """The module at a path. pybind11 hands out the one that it has of a name, so each copy needs a package's name."""
    loader = importlib.machinery.ExtensionFileLoader(f"{package}._cuda", str(path))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader(loader.name, loader))
    loader.exec_module(module)
    return module


if __name__ == "__main__":
    print(build_module(), build_samples(), sep="\n")
