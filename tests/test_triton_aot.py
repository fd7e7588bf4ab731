"""What is proved of the Triton backend without a GPU: interpreted, compiled ahead of time, and never in the way."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")


def python(*arguments, **variables):
    """Run Python in the checkout, with TRITON_INTERPRET only where it is asked for: (exit status, output)."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | variables
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True)
    print(done.stdout, done.stderr, sep="\n")
    return done.returncode, done.stdout + done.stderr


@needs_triton
def test_kernels_in_the_interpreter():
    files = (
        "tests/test_triton.py",
        "tests/test_triton_backward.py",
        "tests/test_triton_kmeans.py",
        "tests/test_triton_routed.py",
    )
    options = ("-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-o", "addopts=")
    status, output = python("-m", "pytest", *options, *files, TRITON_INTERPRET="1")
    assert status == 0 and " passed" in output, output[-4000:]


@needs_triton
def test_lego_in_the_interpreter():
    options = ("-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-o", "addopts=")
    status, output = python("-m", "pytest", *options, "tests/test_triton_lego.py", TRITON_INTERPRET="1")
    assert status == 0 and " passed" in output, output[-4000:]


@needs_triton
def test_kernels_compile_ahead_of_time():
    status, output = python("-m", "lorakern.triton_kernels.aot", "--subset")
    assert status == 0, output[-4000:]
    assert all(f"sm_{arch}" in output for arch in (80, 90, 100))


@needs_triton
def test_no_wgmma_with_register_operands():
    """triton#9433 miscompiles wgmma whose A operand was converted in registers: every product must be mma.sync."""
    code = (
        "import torch, triton\n"
        "from triton.backends.compiler import GPUTarget\n"
        "from lorakern.triton_kernels import aot\n"
        "from lorakern.triton_kernels.configs import select\n"
        "variants = [('shrink', 'full'), ('expand', 'full-8'), ('mixture', 'mixture-8')]\n"
        "variants += [('dh', 'full'), ('dx', 'full'), ('outer', 'full'), ('outer', 'full-B')]\n"
        "for op, variant in variants:\n"
        "    config = select(op, torch.bfloat16, 64)\n"
        "    source = aot.source(dict(aot.launches(config))[variant])\n"
        "    asm = triton.compile(source, target=GPUTarget('cuda', 90, 32), options=aot.options(config)).asm\n"
        "    assert 'mma.sync' in asm['ptx'] and 'wgmma' not in asm['ptx'], op\n"
        "    assert 'warp_group_dot' not in asm['ttgir'], op\n"
    )
    status, output = python("-c", code)
    assert status == 0, output[-4000:]


def test_folder_refuses_to_be_a_top_level_package():
    folder = next(iter(find_spec("lorakern.triton_kernels").submodule_search_locations))
    status, output = python("-c", "import triton_kernels", PYTHONPATH=str(Path(folder).parent))
    assert status != 0 and "ImportError: this folder is lorakern.triton_kernels" in output


def test_backend_imports_without_triton():
    code = "import sys; sys.modules['triton'] = None; from lorakern.backends import triton; print(triton.missing())"
    status, output = python("-c", code)
    assert status == 0 and "triton is not installed: pip install triton" in output


@needs_triton
def test_missing_names_what_would_help():
    code = "import torch; from lorakern.backends import triton; print(torch.cuda.is_available(), triton.missing())"
    status, output = python("-c", code)
    assert status == 0 and output.strip() in ("True None", "False needs a CUDA device or TRITON_INTERPRET=1")
    assert python("-c", code, TRITON_INTERPRET="1")[1].strip().endswith("None")


@needs_triton
def test_sizes_of_one_compile():
    """Triton makes a constant of every number that is 1, which no longer takes part in what happens at run time."""
    code = (
        "import torch, triton\n"
        "from triton.backends.compiler import GPUTarget\n"
        "from lorakern.triton_kernels import aot\n"
        "from lorakern.triton_kernels.warmup import layer_launches\n"
        "for choices in (1, 2):\n"
        "    for launch in layer_launches(\n"
        "        1, (1, 3), 1, torch.float16, 'meta', choices=choices, indices=torch.int64, **aot.FULL\n"
        "    ):\n"
        "        options = aot.options(launch.config)\n"
        "        triton.compile(aot.source(launch), target=GPUTarget('cuda', 90, 32), options=options)\n"
    )
    status, output = python("-c", code)
    assert status == 0, output[-4000:]
