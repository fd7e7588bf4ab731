"""lorakern as the benchmarks call it, the public way, and what a call is made of.

A contender is made from `Inputs` and is a function of the number of a copy of the weights. Forward it adds to
`inputs.y`; backward it returns the gradients. What depends on the routing alone (the plan; a rival's rows of each
adapter) is made once, outside of the timed calls: a serving step does it once for all layers.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

import lorakern as lk
from benchmarks.inputs import Inputs
from lorakern.backends import cpu as cpu_backend
from lorakern.errors import LorakernError

Call = Callable[[int], object]


class Skipped(Exception):
    """A contender that does not run here, with the reason in one line."""


def ours(device: str) -> dict[str, Callable[[Inputs], Call]]:
    """Name to maker of lorakern as it chooses by itself and, on a GPU, of each of its backends there."""
    if device == "cpu":
        return {"lorakern": lorakern_call}
    known = lk.info()["backends"]

    def on(backend):
        def make(inputs):
            with lk.use_backend(backend):
                call = lorakern_call(inputs)

            def run(copy):
                with lk.use_backend(backend):
                    return call(copy)

            return run

        return make

    usable = [name for name in ("cuda", "triton") if known[name] is None]
    if not usable:
        reasons = "; ".join(f"{name}: {known[name]}" for name in ("cuda", "triton"))
        raise LorakernError(f"bench: --device cuda needs the backend cuda or triton, and both are missing ({reasons})")
    return {"lorakern": lorakern_call} | {f"lorakern {name}": on(name) for name in usable}


def lorakern_call(inputs: Inputs) -> Call:
    """lk.bgmv with a plan; backward, autograd through lk.lora_delta."""
    x, y, indices = inputs.x, inputs.y, inputs.indices
    options = {"ranks": inputs.ranks, "gates": inputs.gates}
    if inputs.case.op == "dispatch":
        A, B = inputs.A[0], inputs.B[0]
        A, B = (A[0], B[0]) if len(A) == 1 else (A, B)
        return lambda copy: lk.bgmv(y, x, A, B, indices)
    options["plan"] = lk.plan(indices, inputs.case.adapters)
    if inputs.case.op == "forward":
        return lambda copy: lk.bgmv(y, x, inputs.A[copy], inputs.B[copy], indices, **options)
    return gradient(inputs, lambda x, A, B, gates: lk.lora_delta(x, A, B, indices, **(options | {"gates": gates})))


def gradient(inputs: Inputs, forward: Callable) -> Call:
    """The backward alone of forward(x, A, B, gates), from dy to the gradients of all of them.

    The forward runs once per copy, outside of the timed calls; what it saves for the backward is the contender's gain.
    """

    def leaf(tensor):
        return tensor.detach().requires_grad_()

    graphs = []
    for A, B in zip(inputs.A, inputs.B, strict=True):
        x, A, B = leaf(inputs.x), [leaf(a) for a in A], [leaf(b) for b in B]
        gates = None if inputs.gates is None else leaf(inputs.gates)
        wanted = [x, *A, *B, *([] if gates is None else [gates])]
        graphs.append((forward(x, A, B, gates), wanted))

    def run(copy):
        delta, wanted = graphs[copy]
        return torch.autograd.grad(delta, wanted, inputs.dy, retain_graph=True)

    return run


def fast_entry(inputs: Inputs) -> Call:
    """The one C function through which a plain call of lk.bgmv goes."""
    from lorakern.ops._fast import fast

    slices = inputs.A[0], inputs.B[0]
    A, B = slices if len(inputs.case.d_outs) > 1 else (slices[0][0], slices[1][0])

    def run(copy):
        return fast.bgmv(inputs.y, inputs.x, A, B, inputs.indices, None, None, None, None, 0, True, False)

    if run(0) is None:
        raise Skipped("the fast entry declines this call")
    return run


def registered_op(inputs: Inputs) -> Call:
    """The op in torch's dispatcher, with the arguments that lk.bgmv passes to it."""
    from lorakern.ops.bgmv import _normalised

    op = torch.ops.lorakern.bgmv_
    arguments = _normalised("bgmv", inputs.x, inputs.A[0], inputs.B[0], inputs.indices, None, None, None, None)
    return lambda copy: op(inputs.y, *arguments, 0, True)


def native_call(inputs: Inputs) -> Call:
    """The call into the C++ module that the registered op ends in, with the same arguments."""
    module, made = cpu_backend._cpu, []

    class Recorder:
        def __getattr__(self, name):
            attribute = getattr(module, name)
            if not callable(attribute):
                return attribute

            def record(*arguments):
                made.append((attribute, arguments))
                return attribute(*arguments)

            return record

    cpu_backend._cpu = Recorder()
    try:
        registered_op(inputs)(0)
    finally:
        cpu_backend._cpu = module
    if not made:
        raise Skipped("the registered op no longer calls lorakern._cpu through lorakern.backends.cpu")
    function, arguments = made[-1]
    return lambda copy: function(*arguments)


# Where the time of a dispatch case goes, outermost first.
PARTS = {"fast entry": fast_entry, "registered op": registered_op, "C++ call": native_call}
