"""Import single files of an engine's installed package without the engine: their kernels need little of it.

`vllm` and `sglang` import a serving engine's worth of packages before they hand out a kernel. Here the package's own
`__init__` files are passed over, and the few modules that the kernels' files ask for are small stand-ins.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import ModuleType

from benchmarks.contenders import Skipped


def load(package: str, names: Iterable[str], stand_ins: Mapping[str, Mapping[str, object]]) -> list[ModuleType]:
    """The named modules, made with `stand_ins` (module name to its attributes) in place of the real modules.

    Raises:
        Skipped: the package is not installed, or a module does not import.
    """
    try:
        spec = importlib.util.find_spec(package)
    except (ImportError, ValueError):
        spec = None
    if spec is None or not spec.submodule_search_locations:
        raise Skipped(f"{package} is not installed")
    root = Path(next(iter(spec.submodule_search_locations))).parent
    before = {name: module for name, module in sys.modules.items() if name.split(".")[0] == package}
    for name in before:
        del sys.modules[name]
    try:
        for name in [*stand_ins, *names]:
            parts = name.split(".")
            for depth in range(1, len(parts)):
                _package(".".join(parts[:depth]), root.joinpath(*parts[:depth]))
        for name, attributes in stand_ins.items():
            module = sys.modules.get(name) or ModuleType(name)
            vars(module).update(attributes)
            sys.modules[name] = module
            parent, _, child = name.rpartition(".")
            setattr(sys.modules[parent], child, module)
        return [importlib.import_module(name) for name in names]
    except Exception as error:  # the files of another version ask for something else
        raise Skipped(f"{package} cannot be imported: {' '.join(str(error).split())[:120]}") from None
    finally:
        for name in [name for name in sys.modules if name.split(".")[0] == package]:
            del sys.modules[name]
        sys.modules.update(before)


def _package(name: str, folder: Path) -> None:
    """A package whose __init__ is not run, but whose modules are found."""
    if name not in sys.modules:
        module = ModuleType(name)
        module.__path__ = [str(folder)]
        sys.modules[name] = module
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, module)
