"""attention_gates and router_cores: how the router of RAMoLE weighs the adapters of a token."""

import torch
from torch.compiler import is_dynamo_compiling

from lorakern.ops import _checks as check
from lorakern.ops._library import backend_for, define


def _fake_gates(x, h, router_A, cores, indices, ranks):
    return h.new_empty(len(router_A), *indices.shape)


@define(
    "attention_gates(Tensor x, Tensor h, Tensor[] router_A, Tensor[] cores, Tensor indices, Tensor? ranks) -> Tensor",
    _fake_gates,
)
def attention_gates_op(x, h, router_A, cores, indices, ranks):
    slots, _, r_max = cores[0].shape
    backend = backend_for("attention_gates", x, r_max, indices.shape[1])
    check.validate("attention_gates", backend, None, 0, x, (), (), indices, ranks, slots, r_max)
    gates = _fake_gates(x, h, router_A, cores, indices, ranks)
    backend.attention_gates(gates, x, h, router_A, cores, indices, ranks)
    return gates


def check_routers(op, router_A, cores, x, slots, r_max, slices):
    """One router and one core per slice, of one router rank; returned as lists."""
    router_A, cores = check.as_slices(op, "router_A", router_A), check.as_slices(op, "cores", cores)
    accumulation = check.accumulation_dtype(x.dtype)
    for name, tensors in (("router_A", router_A), ("cores", cores)):
        if len(tensors) != slices:
            check.fail(op, name, f"have one tensor per slice ({slices})", f"{len(tensors)}")
    rank = router_A[0].shape[0] if router_A[0].dim() else 0
    for s, (router, core) in enumerate(zip(router_A, cores, strict=True)):
        label = "" if slices == 1 else f"[{s}]"
        if router.dim() != 2 or router.shape != (rank, x.shape[1]) or rank == 0:
            takes = f"be of shape (router rank, d_in = {x.shape[1]}), one router rank above 0 in all slices"
            check.fail(op, f"router_A{label}", takes, check.describe(router))
        if router.dtype != x.dtype or router.device != x.device:
            check.fail(
                op, f"router_A{label}", f"have the dtype and device of x {check.describe(x)}", check.describe(router)
            )
        if core.shape != (slots, rank, r_max):
            takes = f"be of shape (slots, router rank, r_max) = {(slots, rank, r_max)}, from router_cores"
            check.fail(op, f"cores{label}", takes, check.describe(core))
        if core.dtype != accumulation or core.device != x.device:
            check.fail(op, f"cores{label}", f"be {str(accumulation)[6:]} on {x.device}", check.describe(core))
        for name, tensor in (("router_A", router), ("cores", core)):
            if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
                takes = "be contiguous in its last dimension (use .contiguous())"
                check.fail(op, f"{name}{label}", takes, f"strides {tensor.stride()}")
    return router_A, cores


def attention_gates(x, h, router_A, cores, indices, *, ranks=None):
    """The weights with which a router mixes the adapters of every token.

    ``gates[t] = softmax over k of q^T C_i h[t, k] / sqrt(r_r)`` with ``q = router_A @ x[t]``, i = indices[t, k] and the
    core ``C_i = scale_i router_B^T B_i`` of `router_cores`: the attention of the query q to the key ``router_B^T v`` of
    each adapter's update v, without v.

    Args:
        x: (T, d_in) float16, bfloat16 or float32.
        h: (slices, T, K, r_max) float32, contiguous: what `shrink` returned.
        router_A: (r_r, d_in) of x's dtype, or a sequence of such, one per slice, all of one router rank r_r.
        cores: (slots, r_r, r_max) float32, or a sequence of such.
        indices: (T,) or (T, K) int32 or int64, the slot of each token (and choice), -1 for none: its gate is 0.
        ranks: (slots,) int32 or int64, the true ranks; None for r_max. What lies beyond is never read. A slot of rank
            0 has an update of zero, and takes part with a logit of 0.

    Returns:
        gates: (T, K) float32, (slices, T, K) where router_A is a sequence; rows sum to 1, or to 0 where all indices are
        -1. No gradient is tracked; see `routed_delta`.

    Raises:
        LorakernError: an argument of another shape, dtype or device, or (on the CPU) an index or rank out of range.

    The gate is that of RAMoLE (arXiv 2406.16989).

    >>> import torch, lorakern as lk
    >>> x, A, indices = torch.ones(1, 8), torch.ones(2, 4, 8), torch.tensor([[0, 1]])
    >>> cores = torch.stack([torch.zeros(2, 4), torch.full((2, 4), 0.01)])
    >>> gates = lk.attention_gates(x, lk.shrink(x, A, indices), torch.ones(2, 8), cores, indices)
    >>> [round(gate, 3) for gate in gates[0].tolist()]
    [0.026, 0.974]
    """
    op = "attention_gates"
    check.check_activations(op, "x", x)
    routers, tables = check.as_slices(op, "router_A", router_A), check.as_slices(op, "cores", cores)
    indices = check.check_indices(op, indices, x.shape[0], x.device)
    slots, r_max = check.weight_dims(op, "cores", tables, 2)
    routers, tables = check_routers(op, routers, tables, x, slots, r_max, len(routers))
    check.check_ranks(op, ranks, slots, x.device)
    shape, accumulation = (len(routers), *indices.shape, r_max), check.accumulation_dtype(x.dtype)
    if not isinstance(h, torch.Tensor) or h.shape != shape or h.dtype != accumulation or not h.is_contiguous():
        check.fail(
            op, "h", f"be a contiguous {str(accumulation)[6:]} tensor of shape {shape}, from shrink", check.describe(h)
        )
    if h.device != x.device:
        check.fail(op, "h", f"be on {x.device} like x", check.describe(h))
    gates = torch.ops.lorakern.attention_gates(x, h, routers, tables, indices, ranks)
    return gates[0] if isinstance(router_A, torch.Tensor) else gates


def _is_floats(tensor, device):
    return tensor.is_floating_point() and tensor.device == device


def router_cores(B, router_B, *, scale=None, ranks=None):
    """What the router needs of each adapter's B, made once when an adapter is loaded or the router changes.

    ``C_i = scale_i * router_B^T @ B_i``: with it the key of an adapter's update v is ``router_B^T v = C_i A_i x``.

    Args:
        B: (slots, d_out, r_max) float16, bfloat16 or float32 (float64 too), any strides; or a sequence of such, one
            per slice.
        router_B: (d_out, r_r) floats, any dtype and strides; a sequence where B is one.
        scale: a number, or (slots,) floats, as in `routed_bgmv`; None for 1.
        ranks: (slots,) int32 or int64, the true ranks; None for r_max. What lies beyond is never used; zero in cores.

    Returns:
        cores: (slots, r_r, r_max) float32 (float64 for a B of float64), or a list of such; differentiable by B,
        router_B and scale.

    Raises:
        LorakernError: an argument of another shape, dtype or device.

    From the key of RAMoLE (arXiv 2406.16989) by moving the router's B to the adapter's.

    >>> import torch, lorakern as lk
    >>> lk.router_cores(torch.ones(1, 3, 2), torch.ones(3, 1), scale=0.5, ranks=torch.tensor([1])).tolist()
    [[[1.5, 0.0]]]
    """
    op = "router_cores"
    tables, routers = check.as_slices(op, "B", B), check.as_slices(op, "router_B", router_B)
    if len(tables) != len(routers):
        check.fail(op, "router_B", f"have as many slices as B ({len(tables)})", f"{len(routers)}")
    slots, r_max = check.weight_dims(op, "B", tables, 2)
    device, dtype = tables[0].device, check.accumulation_dtype(tables[0].dtype)
    check.check_ranks(op, ranks, slots, device)
    scale = check.check_scale(op, scale, slots, device, dtype)
    for b, router in zip(tables, routers, strict=True):
        if b.dim() != 3 or (b.shape[0], b.shape[2]) != (slots, r_max) or not _is_floats(b, device):
            takes = f"be floats of shape (slots, d_out, r_max) with slots = {slots} and r_max = {r_max} on {device}"
            check.fail(op, "B", takes, check.describe(b))
        if router.dim() != 2 or router.shape[0] != b.shape[1] or not _is_floats(router, device):
            takes = f"be floats of shape (d_out = {b.shape[1]}, router rank) on {device}"
            check.fail(op, "router_B", takes, check.describe(router))
    if ranks is not None:
        # A traced tensor has no values; the ops that take the cores look at the ranks again when they run.
        if not is_dynamo_compiling():
            check.check_values(op, ranks.new_empty(0), slots, ranks, r_max)
        live = torch.arange(r_max, device=device) < ranks[:, None, None]
        tables = [b.where(live, 0.0) for b in tables]
    with torch.autocast(device.type, enabled=False):
        cores = [router.to(dtype).T @ b.to(dtype) for b, router in zip(tables, routers, strict=True)]
    if scale is not None:
        cores = [core * scale[:, None, None] for core in cores]
    return cores[0] if isinstance(B, torch.Tensor) else cores
