"""The wheel and the editable install, each in a fresh virtual environment: names, contents, and no torch to build."""

import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# What an engine does to find OpenAI's package of that name, from a folder that is not the checkout.
LOOK_FOR_TRITON_KERNELS = """
import importlib.util, sys
assert importlib.util.find_spec("triton_kernels") is None, importlib.util.find_spec("triton_kernels")
import lorakern
spec = importlib.util.find_spec("lorakern.triton_kernels")
assert spec is not None and spec.origin.endswith("__init__.py"), spec
assert importlib.util.find_spec("triton_kernels") is None
assert lorakern.info()["backends"]["cpu"] is None, lorakern.info()
import torch
y = lorakern.bgmv(torch.zeros(2, 3), torch.ones(2, 4), torch.ones(1, 2, 4), torch.ones(1, 3, 2), torch.tensor([0, -1]))
assert y.tolist() == [[8.0] * 3, [0.0] * 3]
print(lorakern.__file__)
"""


def run(*command, cwd, **environment):
    clean = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTEST_CURRENT_TEST")}
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, env=clean | environment)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def environment_with(packages, at):
    """A virtual environment that sees only the named packages of this one (by links), and its interpreter."""
    run(sys.executable, "-m", "venv", "--without-pip", str(at), cwd=at.parent)
    here = Path(sysconfig.get_paths()["purelib"])
    there = next(at.glob("lib/python3*/site-packages"))
    for path in here.iterdir():
        name = path.name.lower()
        if any(name == p or name.startswith((f"{p}-", f"{p}.", f"_{p}")) for p in packages):
            target = there / path.name
            if not target.exists():
                target.symlink_to(path)
    return at / "bin" / "python"


@pytest.fixture(scope="module")
def copy_of_the_sources(tmp_path_factory):
    """What git would clone, without what was built here."""
    tree = tmp_path_factory.mktemp("checkout")
    files = run("git", "ls-files", "--cached", "--others", "--exclude-standard", cwd=ROOT).splitlines()
    for name in files:
        if not name.startswith(("benchmarks/", "tests/")) and (ROOT / name).is_file():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            (tree / name).write_bytes((ROOT / name).read_bytes())
    return tree


BUILDERS = ("setuptools", "distutils-precedence", "distutils_hack", "wheel", "pybind11", "packaging")
USERS = (
    *("torch", "torchgen", "functorch", "numpy", "safetensors", "filelock", "typing_extensions", "sympy", "mpmath"),
    *("networkx", "jinja2", "markupsafe", "fsspec", "setuptools"),
)


def pip(python, command, *arguments, cwd, **environment):
    """pip of this environment, at work in another one: no index, nothing but what is linked there."""
    options = ("--quiet", "--no-deps", "--no-index", "--no-build-isolation")
    run(sys.executable, "-m", "pip", "--python", str(python), command, *options, *arguments, cwd=cwd, **environment)


@pytest.fixture(scope="module")
def wheel(copy_of_the_sources, tmp_path_factory):
    """The wheel, built where neither torch nor numpy can be imported."""
    place = tmp_path_factory.mktemp("wheel")
    python = environment_with(BUILDERS, place / "venv")
    run(str(python), "-c", "import importlib.util as u; assert u.find_spec('torch') is None", cwd=place)
    pip(python, "wheel", "-w", str(place), str(copy_of_the_sources), cwd=place, LORAKERN_CUDA="0")
    return next(place.glob("lorakern-*.whl"))


def test_wheel_contents(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    top = {name.split("/")[0] for name in names}
    assert {name for name in top if not name.endswith(".dist-info")} == {"lorakern"}
    assert any(name.startswith("lorakern/_cpu.") for name in names)
    modules = ("triton_kernels/__init__.py", "ops/bgmv.py", "demo/__init__.py", "integrations/transformers.py")
    modules += (
        "merge/ties.py",
        "merge/iteris/solver.py",
        "cli/app.py",
        "commands/merge.py",
        "serve/app.py",
        "serve/page.html",
    )
    for module in (*modules, "compat/punica/ops.py", "compat/vllm/triton_ops.py"):
        assert f"lorakern/{module}" in names


def test_wheel_does_not_shadow_triton_kernels(wheel, tmp_path):
    python = environment_with(USERS, tmp_path / "venv")
    pip(python, "install", str(wheel), cwd=tmp_path)
    assert "site-packages" in run(str(python), "-c", LOOK_FOR_TRITON_KERNELS, cwd=tmp_path)


def test_editable_install_does_not_shadow_triton_kernels(copy_of_the_sources, tmp_path):
    python = environment_with((*USERS, *BUILDERS), tmp_path / "venv")
    pip(python, "install", "--editable", str(copy_of_the_sources), cwd=tmp_path, LORAKERN_CUDA="0")
    location = run(str(python), "-c", LOOK_FOR_TRITON_KERNELS, cwd=tmp_path)
    assert str(copy_of_the_sources) in location


def test_the_folder_refuses_to_be_a_top_level_package():
    code = "import triton_kernels"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode != 0 and "lorakern.triton_kernels" in done.stderr
