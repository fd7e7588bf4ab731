"""Compile every shipped configuration ahead of time, without a GPU: ``python -m lorakern.triton_kernels.aot``.

The launchers write their launches down for meta tensors, as they would for real ones; each is compiled for every
architecture, and what ptxas made of it is printed: registers a thread, bytes spilled, bytes of shared memory, time to
compile. The exit status is 1 if one fails, spills, or needs more shared memory than its row of configs.py offers.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import torch
import triton
from triton.backends.compiler import GPUTarget

from . import clustering, routed
from .common import INTERPRET, options
from .configs import CONFIGS, PLANES, Config
from .signature import source
from .warmup import layer_launches

# bytes of shared memory that a block may use
ARCHITECTURES = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
# sizes of a typical layer: triton specialises on what divides by 16, so these stand for all such sizes
D_OUT = (4096, 1024, 1024)


def launches(config):
    """(name, launch) of every variant of a configuration: with every option, without any, and a mixture of adapters."""
    if config.op == "plan":
        yield (
            "any",
            next(layer_launches(16, (16,), 16, torch.float32, "meta", choices=1, indices=config.dtype, **PLAIN)),
        )
        return
    if config.op == "gates":
        yield from routed.launches()
        return
    if config.op in CLUSTERING:
        yield from clustering.launches(config)
        return
    if config.op in BACKWARD:
        for name, slices, given in (("plain", 1, PLAIN), ("full", 3, FULL)):
            found = layer_launches(
                512,
                D_OUT[:slices],
                config.block_r,
                config.dtype,
                "meta",
                choices=1,
                indices=torch.int64,
                backward=True,
                **given,
            )
            # outer is launched twice, for dA and for dB
            mine = (launch for launch in found if launch.config == config)
            yield from zip((name, f"{name}-B"), mine, strict=False)
        return
    for planes in PLANES:
        for name, choices, slices, given in (("plain", 1, 1, PLAIN), ("full", 1, 3, FULL), ("mixture", 2, 3, FULL)):
            found = layer_launches(
                planes * 512,
                D_OUT[:slices],
                config.block_r,
                config.dtype,
                "meta",
                choices=choices,
                indices=torch.int64,
                shared=config.shared,
                **given,
            )
            # for one plane and for several: the last are of as many planes as asked for; shrink is the same for all
            *_, shrink, expand = found
            if config.op == "shrink" and name != "mixture" and planes == 1:
                yield name, shrink
            elif expand.config == config:
                yield f"{name}-{planes}", expand


BACKWARD = ("dh", "dx", "outer", "dots", "dscale")
CLUSTERING = ("points_gram", "nearest", "own", "update", "seed", "lloyd")
PLAIN = {"ranks": None, "scale": False, "gates": False, "accumulate": False}
FULL = {"ranks": torch.int32, "scale": True, "gates": True, "accumulate": True}


def build(config: Config, name: str, arch: int):
    """Compile one variant: its numbers, or the error that stopped it."""
    launch = dict(launches(config))[name]
    start = time.perf_counter()
    row = {"op": config.op, "variant": name, "dtype": str(config.dtype)[6:], "rank": config.block_r, "arch": arch}
    row["limit"] = config.shared
    try:
        compiled = triton.compile(source(launch), target=GPUTarget("cuda", arch, 32), options=options(config))
        row |= {"shared": compiled.metadata.shared, **resources(compiled.asm["cubin"])}
    except Exception as error:
        row["error"] = f"{type(error).__name__}: {error}".splitlines()[0]
    row["ms"] = (time.perf_counter() - start) * 1e3
    return row


def resources(cubin):
    """Registers per thread and bytes of stack (spills) of a compiled kernel, as cuobjdump reads them."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", text).groups()
    return {"registers": int(registers), "spills": int(stack)}


def tasks(subset=False):
    """Every (configuration, variant, architecture); the subset has each kernel, dtype and architecture once."""
    everything = [
        (config, name, arch)
        for config in CONFIGS
        for name, _ in launches(config)
        for arch, shared in ARCHITECTURES.items()
        if config.shared <= shared
    ]
    if not subset:
        return everything
    architecture = {torch.float16: 80, torch.bfloat16: 90, torch.float32: 100, torch.int32: 80, torch.int64: 90}
    largest = {(config.op, config.dtype): config for config in CONFIGS}.values()
    variants = ("any", "full", "full-B", f"full-{PLANES[-1]}", f"mixture-{PLANES[-1]}")
    return [
        row for row in everything if row[0] in largest and row[1] in variants and row[2] == architecture[row[0].dtype]
    ]


def report(row):
    """One line of the table, and whether the row is a failure."""
    head = f"{row['op']:12}{row['variant']:10}{row['dtype']:9} r{row['rank']:<4}sm_{row['arch']:<4}"
    if "error" in row:
        print(f"{head} FAILED  {row['error']}")
        return True
    failed = row["spills"] > 0 or row["shared"] > row["limit"]
    numbers = f"{row['registers']:5} {row['spills']:6} {row['shared']:8} {row['ms']:8.0f}"
    print(f"{head}{numbers}{'  FAILED: spills, or over its shared memory' if failed else ''}", flush=True)
    return failed


def main(arguments=None):
    parser = argparse.ArgumentParser(prog="lorakern.triton_kernels.aot", description=__doc__)
    parser.add_argument("--subset", action="store_true", help="each kernel, dtype and architecture once")
    parser.add_argument("--jobs", type=int, default=2, help="processes (default: 2)")
    arguments = parser.parse_args(arguments)
    if INTERPRET:
        parser.error("unset TRITON_INTERPRET: under it there is nothing to compile")
    print(f"triton {triton.__version__}, torch {torch.__version__}\n{'kernel':45}  regs spills   shared       ms")
    # a fresh cache: what is reported was compiled now
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        with ProcessPoolExecutor(arguments.jobs, mp_context=get_context("spawn")) as pool:
            failed = [report(row) for row in pool.map(build, *zip(*tasks(arguments.subset), strict=True))]
    print(f"{len(failed) - sum(failed)} of {len(failed)} kernels compiled without spills")
    return 1 if any(failed) else 0


if __name__ == "__main__":
    sys.exit(main())
