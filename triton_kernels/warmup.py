"""The launches that a layer needs, whatever the batch: run by warmup, compiled by aot.

No kernel is specialised on a number that the batch sets, so tensors of one token without an adapter stand for all
batches; what the batch does choose is whether h has planes.
"""

import torch

from .backward import backward_launches
from .bgmv import bgmv_launches
from .common import INTERPRET, run
from .configs import SHARED_LIMIT, chunks
from .plan import plan_launch
from .signature import key


def layer_launches(
    d_in,
    d_outs,
    r_max,
    dtype,
    device,
    *,
    choices,
    indices,
    ranks,
    scale,
    gates,
    accumulate,
    backward=False,
    shared=SHARED_LIMIT,
):
    """Every launch of bgmv for one layer: with a plan of its own, with planes and without; of its gradients if asked.

    `indices` and `ranks` are dtypes, ranks or None; `scale`, `gates` and `accumulate` say whether there are any.
    """

    def empty(*shape, dtype=torch.float32):
        return torch.empty(shape, dtype=dtype, device=device)

    pairs = torch.full((1, choices), -1, dtype=indices, device=device)
    order, starts = empty(choices, dtype=torch.int32), empty(2, dtype=torch.int32)
    yield plan_launch(order, starts, pairs)
    weights = [empty(1, r_max, d_in, dtype=dtype) for _ in d_outs], [empty(1, d, r_max, dtype=dtype) for d in d_outs]
    options = (
        pairs,
        empty(1) if scale else None,
        None if ranks is None else torch.zeros(1, dtype=ranks, device=device),
        empty(1, choices) if gates else None,
    )
    activations = empty(1, sum(d_outs), dtype=dtype), empty(1, d_in, dtype=dtype)
    for planes in sorted({1, chunks(d_in)[0]}):
        yield from bgmv_launches(*activations, *weights, *options, order, starts, accumulate, shared, planes)
    if backward:
        yield from backward_launches(*activations, *weights, *options, order, starts, shared)[0]


def warmup(layers, dtype, device, choices=(1,), **options):
    """Compile and load the kernels of every (d_in, d_outs, r_max) by launching each once; how many there are."""
    kernels = set()
    for d_in, d_outs, r_max in layers:
        for count in choices:
            for launch in layer_launches(d_in, d_outs, r_max, dtype, device, choices=count, **options):
                # layers of the same kind share their kernels; the interpreter has none and runs them all
                if (kernel := len(kernels) if INTERPRET else key(launch)) not in kernels:
                    run(launch, device)
                    kernels.add(kernel)
    return len(kernels)
