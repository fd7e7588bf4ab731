"""The backends, and the one place that picks among them.

Each backend module has NAME, missing() and, of ``plan shrink expand bgmv backward warmup gram sketch lines combine``
and the ``ROUTED`` and ``CLUSTERING`` ops, the functions that it implements; where it cannot take every layer also
refuses(op, layer), the reason why it leaves one to others.
Only `lorakern.ops` calls `select`. Nothing here falls back silently: a device whose backend is missing is an error.
"""

import functools
import os
from contextlib import contextmanager
from contextvars import ContextVar

import torch

from lorakern.backends import cpu, cuda, reference, triton
from lorakern.backends.crossover import Layer, fastest
from lorakern.errors import LorakernError

BACKENDS = {module.NAME: module for module in (cpu, cuda, triton, reference)}

CLUSTERING = ("points_gram", "kmeans_assign", "kmeans_distances", "kmeans_update", "kmeans_seed", "kmeans_lloyd")

_LORA = ("plan", "shrink", "expand", "bgmv", "backward")
_ALGEBRA = ("gram", "sketch", "lines", "combine")
ROUTED = ("attention_gates", "routed_bgmv")

# What serves each op by default, best first.
_ORDER = {
    "cpu": dict.fromkeys((*_LORA, *_ALGEBRA, *ROUTED, *CLUSTERING), (cpu,)),
    "cuda": {
        **dict.fromkeys(_LORA, (cuda, triton)),
        **dict.fromkeys((*ROUTED, *CLUSTERING), (triton,)),
        # No kernels of ours yet for these: torch.mm in float64.
        **dict.fromkeys(_ALGEBRA, (reference,)),
    },
}

FORCED: ContextVar[str | None] = ContextVar("lorakern_backend", default=os.environ.get("LORAKERN_BACKEND") or None)


@contextmanager
def use_backend(name: str):
    """Run the ops inside the block on one backend: "reference", "cpu", "triton" or "cuda".

    The environment variable ``LORAKERN_BACKEND`` does the same for a whole process.

    >>> import lorakern as lk
    >>> with lk.use_backend("reference"):
    ...     pass

    Raises:
        LorakernError: the name is unknown, or that backend is missing on this machine.
    """
    _usable(name)
    with forced(name):
        yield


@contextmanager
def forced(name: str | None):
    """The backend of the ops inside the block; None: the one that is in force anyway.

    A backward runs on the backend of its forward: autograd calls it in threads that know nothing of `use_backend`.
    """
    token = FORCED.set(name or FORCED.get())
    try:
        yield
    finally:
        FORCED.reset(token)


def _usable(name):
    if name not in BACKENDS:
        raise LorakernError(f"backend must be one of {', '.join(BACKENDS)}; got {name!r}")
    if reason := BACKENDS[name].missing():
        raise LorakernError(f"backend {name!r} is missing here: {reason}")
    return BACKENDS[name]


def select(op: str, device: torch.device, layer: Layer):
    """The backend module that runs `op` for a layer on a device."""
    if (name := FORCED.get()) is not None:
        backend = _usable(name)
        if not hasattr(backend, op):
            raise LorakernError(f"{op}: backend {name!r} does not implement it; leave the choice to lorakern")
        return backend
    if device.type not in _ORDER:
        raise LorakernError(f"{op}: tensors must be on {' or '.join(_ORDER)}; got {device.type}")
    candidates = _ORDER[device.type][op]
    if len(candidates) > 1 and (name := fastest(op, _capability(device), layer)):
        candidates = sorted(candidates, key=lambda backend: name != backend.NAME)
    reasons = []
    for backend in candidates:
        reason = backend.missing() or (backend.refuses(op, layer) if hasattr(backend, "refuses") else None)
        if reason is None:
            return backend
        reasons.append(f"{backend.NAME}: {reason}")
    raise LorakernError(
        f"{op}: no backend for {device.type} tensors ({'; '.join(reasons)}). use_backend('reference') works anywhere"
    )


@functools.cache
def _capability(device):
    return torch.cuda.get_device_capability(device) if torch.cuda.is_available() else None
