"""Merge LoRA adapters into one, from their factors.

``lorakern.merge`` is this package, and calling it is calling `merge`: ``lk.merge([a, b], method="ties")``. Every method
is a file here, found by its name in `methods`; `method` (a decorator) and `register` add one. `soups.learn`,
`lorahub.search` and `iteris.solve` merge with a model and data, and have signatures of their own.
"""

import inspect
import sys
import types

from lorakern.merge import (  # noqa: F401  importing a method's file registers it
    cat,
    dare_linear,
    dare_ties,
    fedex,
    iteris,
    knots,
    lego,
    linear,
    lorahub,
    lorahub_linear,
    magnitude_prune,
    peft_dare_linear,
    peft_dare_ties,
    peft_linear,
    peft_magnitude_prune,
    peft_ties,
    soups,
    svd,
    ties,
)
from lorakern.merge.driver import merge, merge_modules, module_generator
from lorakern.merge.lego_map import lego_map
from lorakern.merge.lego_picture import lego_picture
from lorakern.merge.options import Densities, Density, Option, PerAdapter, Range, SignMethod
from lorakern.merge.registry import Method, Term, method, methods, register

__all__ = [
    "Densities",
    "Density",
    "Method",
    "Option",
    "PerAdapter",
    "Range",
    "SignMethod",
    "Term",
    "iteris",
    "lego_map",
    "lego_picture",
    "lorahub",
    "merge",
    "merge_modules",
    "method",
    "methods",
    "module_generator",
    "register",
    "soups",
]


class _MergePackage(types.ModuleType):
    """A package that can be called: importing lorakern.merge binds that name to the package, whatever lorakern says."""

    __signature__ = inspect.signature(merge)

    def __call__(self, *args, **kwargs):
        return merge(*args, **kwargs)


sys.modules[__name__].__class__ = _MergePackage
