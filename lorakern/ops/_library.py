"""Registration of ops with torch.library: one kernel per op for every device, which asks the backends."""

import os

import torch

from lorakern.backends import Layer, select

LIBRARY = torch.library.Library("lorakern", "DEF")
DEBUG = os.environ.get("LORAKERN_DEBUG", "0") not in ("", "0")


def define(schema, fake):
    """Register the decorated function as the op of that schema, with `fake` as its shape function."""

    def register(implementation):
        name = schema.partition("(")[0]
        LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
        torch.library.register_fake(f"lorakern::{name}", fake, lib=LIBRARY)
        return getattr(torch.ops.lorakern, name).default

    return register


def backend_for(op, tensor, r_max=0, choices=1):
    """The backend module that runs `op` for tensors like this one and weights of this many ranks."""
    return select(op, tensor.device, Layer(tensor.dtype, r_max, choices))


def mark_written(tensor):
    """Tell autograd that a kernel changed this tensor, so that a backward which needs its old values refuses to run."""
    if not tensor.is_inference():
        torch.autograd.graph.increment_version(tensor)
