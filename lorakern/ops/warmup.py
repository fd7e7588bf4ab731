"""warmup: every kernel compiled and loaded before the first request."""

import torch

from lorakern.backends import Layer, select
from lorakern.ops import _checks as check


def warmup(
    layers,
    *,
    dtype=torch.bfloat16,
    device="cuda",
    max_choices=1,
    indices=torch.int64,
    ranks=torch.int64,
    scale=True,
    gates=False,
    accumulate=True,
    backward=False,
) -> int:
    """Compile and load the kernels that `bgmv` will use for these layers, so that none is compiled while serving.

    The kernels depend on the layer, the dtypes and which optional arguments there are, never on the batch or on the
    number of slots: one call covers batches of every size. A call whose x, y, A or B begins at an address that 16 bytes
    do not divide, or whose rows lie at a stride that 16 divides for the contiguous tensor and not for this one (or the
    other way round), still compiles a kernel of its own.

    Args:
        layers: (d_in, d_outs, r_max) of each layer; d_outs is a sequence with the d_out of each slice.
        dtype: of x, y, A and B: float16, bfloat16 or float32.
        device: the device that will serve, such as "cuda:0".
        max_choices: the largest number of choices K of a token; over 1 the kernels of mixtures are prepared too.
        indices: dtype of the indices, int32 or int64.
        ranks: dtype of the ranks, int32 or int64; None where no ranks will be given.
        scale, gates: whether they will be given.
        accumulate: as in `bgmv`.
        backward: prepare the gradients of `lora_delta` too, for a dy that is contiguous.

    Returns:
        The number of Triton kernels prepared. 0 on a CPU and where the CUDA backend serves: their kernels are compiled
        when the package is built, and those for CUDA are loaded here.

    Raises:
        LorakernError: a layer of another form, a dtype that is not served, or no backend for the device.

    >>> import torch, lorakern as lk
    >>> lk.warmup([(576, (576, 192, 192), 16)], dtype=torch.float32, device="cpu")
    0
    """
    device = torch.device(device)
    layers = [_layer(layer) for layer in layers]
    for name, given, allowed in (
        ("dtype", dtype, (torch.float16, torch.bfloat16, torch.float32)),
        ("indices", indices, (torch.int32, torch.int64)),
        ("ranks", ranks, (torch.int32, torch.int64, None)),
    ):
        if given not in allowed:
            check.fail("warmup", name, f"be one of {', '.join(map(str, allowed))}", repr(given))
    if not isinstance(max_choices, int) or max_choices < 1:
        check.fail("warmup", "max_choices", "be a positive integer", repr(max_choices))
    # a token with one choice takes another kernel than one with several; how many those are does not matter
    choices = (1,) if max_choices == 1 else (1, 2)
    ops = ("plan", "shrink", "expand", "bgmv", *(["backward"] if backward else []))
    served = {}
    for layer in layers:
        for count in choices:
            for op in ops:
                served.setdefault(select(op, device, Layer(dtype, layer[2], count)), {})[layer] = None
    return sum(
        backend.warmup(
            list(layers),
            dtype,
            device,
            choices=choices,
            indices=indices,
            ranks=ranks,
            scale=bool(scale),
            gates=bool(gates),
            accumulate=bool(accumulate),
            backward=bool(backward),
        )
        for backend, layers in served.items()
        if hasattr(backend, "warmup")
    )


def _layer(layer):
    """(d_in, d_outs, r_max) as positive integers."""
    try:
        d_in, d_outs, r_max = layer
        d_outs = (d_outs,) if isinstance(d_outs, int) else tuple(d_outs)
        sizes = (d_in, r_max, *d_outs)
        good = bool(d_outs) and all(isinstance(size, int) and size > 0 for size in sizes)
    except (TypeError, ValueError):
        good = False
    if not good:
        check.fail("warmup", "layers", "hold (d_in, d_outs, r_max) of positive integers", repr(layer))
    return d_in, d_outs, r_max
