"""Build of the compiled modules: `lorakern._cpu` always, `lorakern._cuda` where nvcc is found. Needs no torch.

Every ISA variant of the CPU kernels is compiled, whatever the machine that builds: which one runs is decided by cpuid.
"""

import os
import platform
import shutil
import subprocess
from pathlib import Path

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension
from setuptools import setup
from setuptools.command.build_ext import build_ext

CSRC = Path("csrc")
X86 = platform.machine().lower() in ("x86_64", "amd64")
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]
AVX512BF16 = [*AVX512, "-mavx512bf16"]
ISA_FLAGS = {
    "isa_avx2": AVX2,
    "isa_avx512": AVX512,
    "isa_avx512bf16": AVX512BF16,
    "isa_amx": [*AVX512BF16, "-mamx-tile", "-mamx-bf16"],
}
# tests/sanitize.py sets LORAKERN_SANITIZE=address,undefined or =thread.
SANITIZERS = os.environ.get("LORAKERN_SANITIZE")
SANITIZE = [f"-fsanitize={SANITIZERS}", "-fno-sanitize-recover=all"] if SANITIZERS else []
SANITIZE_COMPILE = [*SANITIZE, "-O1", "-g1", "-fno-omit-frame-pointer", "-include", "tests/native/masked.h"]
# In the kernels, checks inline or for what AddressSanitizer reports anyway would take four times the time to compile.
SANITIZE_KERNELS = [
    "--param=asan-instrumentation-with-call-threshold=0",
    "-fno-sanitize=null,object-size,pointer-overflow",
]
CUDA_TARGETS = [("compute_80", "sm_80"), ("compute_90a", "sm_90a"), ("compute_90", "compute_90")]


def nvcc() -> str | None:
    """The CUDA compiler, or None: then there is no CUDA module."""
    home = os.environ.get("CUDA_HOME")
    found = shutil.which("nvcc", path=f"{home}/bin") if home else None
    return found or shutil.which("nvcc")


def cpu_extension() -> Pybind11Extension:
    sources = [s for s in sorted((CSRC / "cpu").glob("*.cpp")) if X86 or s.stem not in ISA_FLAGS]
    # No fast-math and no contraction: results must not depend on what a compiler finds convenient.
    return Pybind11Extension(
        "lorakern._cpu",
        [str(CSRC / "bind_cpu.cpp"), str(CSRC / "fast_call.cpp"), *map(str, sources)],
        depends=[*map(str, CSRC.glob("*.h")), *map(str, CSRC.glob("cpu/*.h")), "tests/native/masked.h"],
        cxx_std=17,
        extra_compile_args=[
            "-O3",
            "-ffp-contract=off",
            "-fno-math-errno",
            "-Wall",
            "-Wextra",
            "-Wno-psabi",
            "-Wno-maybe-uninitialized",
            "-Wno-uninitialized",
            *(SANITIZE_COMPILE if SANITIZE else []),
        ],
        extra_link_args=SANITIZE,
        libraries=["dl"],
    )


def toolkit(compiler: str) -> Path:
    """The folder of the CUDA toolkit; nvcc itself says where, also when it was found through a wrapper script."""
    dry = subprocess.run([compiler, "--dryrun", "any.cu"], capture_output=True, text=True, check=False)
    top = [line.partition("=")[2] for line in dry.stderr.splitlines() if line.startswith("#$ TOP=")]
    return Path(top[0]).resolve() if top else Path(compiler).resolve().parents[1]


def cuda_extension(compiler: str) -> Pybind11Extension:
    root = toolkit(compiler)
    library_dirs = [str(d) for d in (root / "lib64", root / "lib", root / "targets/x86_64-linux/lib") if d.is_dir()]
    return Pybind11Extension(
        "lorakern._cuda",
        [str(CSRC / "bind_cuda.cpp"), *map(str, sorted((CSRC / "cuda").glob("*.cu")))],
        depends=[*map(str, CSRC.glob("*.h")), *map(str, CSRC.glob("cuda/*.*h"))],
        cxx_std=17,
        include_dirs=[str(d) for d in (root / "include", root / "targets/x86_64-linux/include") if d.is_dir()],
        library_dirs=library_dirs,
        libraries=["cudart_static", "dl", "rt", "pthread"],
    )


class Build(build_ext):
    """build_ext with flags per file, nvcc for .cu, and objects compiled side by side."""

    def build_extensions(self):
        self.compiler.src_extensions.append(".cu")
        compile_cpp = self.compiler._compile

        def compile_one(obj, src, ext, cc_args, extra_postargs, pp_opts):
            if ext == ".cu":
                targets = [f"-gencode=arch={arch},code={code}" for arch, code in CUDA_TARGETS]
                include = ["-Icsrc/cuda", *(arg for arg in pp_opts if arg.startswith("-I"))]
                threads = ["--threads", str(len(CUDA_TARGETS))]
                flags = ["-O3", "-std=c++17", *threads, "-Xcompiler", "-fPIC", "-Xptxas", "-v", *targets]
                subprocess.run([nvcc(), *flags, *include, "-c", src, "-o", obj], check=True)
            else:
                stem = Path(src).stem
                flags = ISA_FLAGS.get(stem, []) + (SANITIZE_KERNELS if SANITIZE and stem.startswith("isa_") else [])
                compile_cpp(obj, src, ext, cc_args, [*extra_postargs, *flags], pp_opts)

        self.compiler._compile = compile_one
        super().build_extensions()


extensions = [cpu_extension()]
if (compiler := nvcc()) and os.environ.get("LORAKERN_CUDA", "1") != "0":
    extensions.append(cuda_extension(compiler))

ParallelCompile().install()
setup(
    packages=[
        "lorakern",
        "lorakern.adapters",
        "lorakern.backends",
        "lorakern.cli",
        "lorakern.commands",
        "lorakern.compat",
        "lorakern.compat.punica",
        "lorakern.compat.vllm",
        "lorakern.demo",
        "lorakern.integrations",
        "lorakern.integrations.vllm",
        "lorakern.merge",
        "lorakern.merge.iteris",
        "lorakern.mixture",
        "lorakern.ops",
        "lorakern.serve",
        "lorakern.triton_kernels",
    ],
    # The folder triton_kernels/ must not become a top-level package: OpenAI's package of that name would be shadowed.
    package_dir={"lorakern.triton_kernels": "triton_kernels"},
    package_data={"lorakern.serve": ["page.html"]},
    ext_modules=extensions,
    cmdclass={"build_ext": Build},
)
