"""Compile every shipped configuration ahead of time, without a GPU: ``python -m lorakern.triton_kernels.aot``.

The launchers write their launches down for meta tensors, as they would for real ones; each is compiled for every
architecture, and what ptxas made of it is printed: registers a thread, bytes spilled, bytes of shared memory, time to
compile. The exit status is 1 if one fails or passes the limits of configs.py.
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
from triton.compiler import ASTSource

from .common import INTERPRET, Launch, options
from .configs import CONFIGS, SHARED_LIMIT, SPILL_LIMIT, Config, select
from .expand import expand_launch
from .shrink import shrink_launch

ARCHITECTURES = (80, 90, 100)
_TYPES = {
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
# sizes of a typical layer: triton specialises on what divides by 16, so these stand for all such sizes
TOKENS, SLOTS, D_IN, D_OUT = 64, 64, 4096, (4096, 1024, 1024)


def launches(config):
    """(name, launch) of every variant of a configuration: with every option, without any, and a mixture of adapters."""
    rank, dtype = config.block_r, config.dtype

    def empty(*shape, dtype=torch.float32):
        return torch.empty(shape, dtype=dtype, device="meta")

    def ints(*shape):
        return empty(*shape, dtype=torch.int32)

    for name, choices, slices in (("plain", 1, 1), ("full", 1, 3), ("mixture", 2, 3)):
        plain = name == "plain"
        plan = ints(TOKENS * choices), ints(SLOTS + 1)
        ranks = None if plain else ints(SLOTS)
        h = empty(slices, TOKENS, choices, rank)
        if config.op == "shrink" and name != "mixture":
            A = [empty(SLOTS, rank, D_IN, dtype=dtype) for _ in range(slices)]
            yield name, shrink_launch(h, empty(TOKENS, D_IN, dtype=dtype), A, choices, ranks, *plan)
        elif config.op == "expand":
            B = [empty(SLOTS, d_out, rank, dtype=dtype) for d_out in D_OUT[:slices]]
            y = empty(TOKENS, sum(D_OUT[:slices]), dtype=dtype)
            scale, gates = (None, None) if plain else (empty(SLOTS), empty(TOKENS, choices))
            yield name, expand_launch(y, h, B, ints(TOKENS, choices), scale, ranks, gates, *plan, not plain)


def source(launch: Launch):
    """What triton's own launcher would compile for these arguments."""
    signature, constants, attributes = {}, {}, {}

    def describe(path, value, specialize):
        if isinstance(value, tuple):
            return tuple(describe((*path, i), item, specialize) for i, item in enumerate(value))
        if value is None or (specialize and not isinstance(value, torch.Tensor) and value == 1):
            constants[path] = value
            return "constexpr"
        if isinstance(value, torch.Tensor) or (specialize and value % 16 == 0):
            attributes[path] = [["tt.divisibility", 16]]
        return _TYPES[value.dtype] if isinstance(value, torch.Tensor) else "i32"

    for i, parameter in enumerate(launch.kernel.params):
        value = launch.arguments[parameter.name]
        if parameter.is_constexpr:
            signature[parameter.name], constants[(i,)] = "constexpr", value
        else:
            signature[parameter.name] = describe((i,), value, not parameter.do_not_specialize)
    return ASTSource(launch.kernel, signature, constants, attributes)


def build(config: Config, name: str, arch: int):
    """Compile one variant: its numbers, or the error that stopped it."""
    launch = dict(launches(config))[name]
    start = time.perf_counter()
    row = {"op": config.op, "variant": name, "dtype": str(config.dtype)[6:], "rank": config.block_r, "arch": arch}
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
    everything = [(config, name, arch) for config in CONFIGS for name, _ in launches(config) for arch in ARCHITECTURES]
    if not subset:
        return everything
    architecture = {torch.float16: 80, torch.bfloat16: 90, torch.float32: 100}
    return [
        (config, name, arch)
        for config, name, arch in everything
        if config == select(config.op, config.dtype, 256) and name != "plain" and arch == architecture[config.dtype]
    ]


def report(row):
    """One line of the table, and whether the row is a failure."""
    head = f"{row['op']:7}{row['variant']:8}{row['dtype']:9} r{row['rank']:<4}sm_{row['arch']:<4}"
    if "error" in row:
        print(f"{head} FAILED  {row['error']}")
        return True
    failed = row["spills"] > SPILL_LIMIT or row["shared"] > SHARED_LIMIT
    numbers = f"{row['registers']:5} {row['spills']:6} {row['shared']:8} {row['ms']:8.0f}"
    print(f"{head}{numbers}{'  FAILED: over the limits of configs.py' if failed else ''}", flush=True)
    return failed


def main(arguments=None):
    parser = argparse.ArgumentParser(prog="lorakern.triton_kernels.aot", description=__doc__)
    parser.add_argument("--subset", action="store_true", help="each kernel, dtype and architecture once")
    parser.add_argument("--jobs", type=int, default=2, help="processes (default: 2)")
    arguments = parser.parse_args(arguments)
    if INTERPRET:
        parser.error("unset TRITON_INTERPRET: under it there is nothing to compile")
    print(f"triton {triton.__version__}, torch {torch.__version__}\n{'kernel':38}  regs spills   shared       ms")
    # a fresh cache: what is reported was compiled now
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        with ProcessPoolExecutor(arguments.jobs, mp_context=get_context("spawn")) as pool:
            failed = [report(row) for row in pool.map(build, *zip(*tasks(arguments.subset), strict=True))]
    print(f"{len(failed) - sum(failed)} of {len(failed)} kernels compiled within the limits")
    return 1 if any(failed) else 0


if __name__ == "__main__":
    sys.exit(main())
