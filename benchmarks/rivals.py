"""The rivals that run beside lorakern in the same process. Each is given what helps it; none of its code is copied."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache

import torch

from benchmarks.contenders import Call, Skipped, gradient
from benchmarks.inputs import Inputs

MOST_TEMPORARY = 3 << 30  # bytes


def _gathered_bytes(inputs: Inputs, element: int) -> int:
    case = inputs.case
    pairs = case.tokens * case.choices
    return pairs * case.r_max * max(case.d_in, *case.d_outs) * element


def _check_memory(inputs: Inputs, element: int) -> None:
    if (needed := _gathered_bytes(inputs, element)) > MOST_TEMPORARY:
        raise Skipped(f"gathers {needed / 2**30:.0f} GiB of weights a call")


def _columns(inputs: Inputs):
    """(slice, first column of y, columns) of every slice."""
    first = 0
    for s, d_out in enumerate(inputs.case.d_outs):
        yield s, first, d_out
        first += d_out


def gather_einsum(inputs: Inputs) -> Call:
    """Two einsums on weights gathered for each token (twice the memory where autograd keeps them)."""
    _check_memory(inputs, inputs.x.element_size())
    case, pairs = inputs.case, inputs.indices.flatten()

    def delta(x, A, B, gates):
        x = x if case.choices == 1 else x.repeat_interleave(case.choices, 0)
        parts = []
        for a, b in zip(A, B, strict=True):
            h = torch.einsum("prd,pd->pr", a[pairs], x)
            h = h if gates is None else h * gates.flatten()[:, None].to(h.dtype)
            part = torch.einsum("por,pr->po", b[pairs], h)
            parts.append(part if case.choices == 1 else part.view(case.tokens, case.choices, -1).sum(1))
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)

    if case.op == "backward":
        return gradient(inputs, delta)
    return lambda copy: inputs.y.add_(delta(inputs.x, inputs.A[copy], inputs.B[copy], inputs.gates))


def mm_loop(inputs: Inputs) -> Call:
    """For each adapter in use: index its rows, mm, mm, index_add. It knows the true ranks."""
    x, y, slices = inputs.x, inputs.y, list(_columns(inputs))
    if inputs.case.op == "backward":
        return _mm_loop_gradient(inputs)

    def run(copy):
        A, B = inputs.A[copy], inputs.B[copy]
        for slot, rank, tokens, gate in inputs.groups:
            rows = x.index_select(0, tokens)
            for s, first, columns in slices:
                h = torch.mm(rows, A[s][slot, :rank].T)
                h = h if gate is None else h * gate
                y.narrow(1, first, columns).index_add_(0, tokens, torch.mm(h, B[s][slot, :, :rank].T))

    return run


def _mm_loop_gradient(inputs: Inputs) -> Call:
    """Autograd through the loop as `mm_loop` writes it, on the weights of all slots as lorakern has them."""

    def delta(x, A, B, gates):
        out = torch.zeros_like(inputs.y)
        for slot, rank, tokens, _ in inputs.groups:
            h = torch.mm(x.index_select(0, tokens), A[0][slot, :rank].T)
            if gates is not None:
                h = h * _gates_of(inputs, gates, slot, tokens).to(h.dtype)
            out = out.index_add(0, tokens, torch.mm(h, B[0][slot, :, :rank].T))
        return out

    if len(inputs.case.d_outs) > 1:
        raise Skipped("backward is written for one slice")
    return gradient(inputs, delta)


def _gates_of(inputs: Inputs, gates: torch.Tensor, slot: int, tokens: torch.Tensor) -> torch.Tensor:
    """The gates of some tokens for one of their slots, as a column."""
    return gates[tokens, (inputs.indices[tokens] == slot).int().argmax(1)][:, None]


def mm_runs(inputs: Inputs) -> Call:
    """The mm loop on runs of tokens: slices instead of indices, and the addition fused into the second mm."""
    if not inputs.case.runs or inputs.case.choices > 1:
        raise Skipped("tokens do not come in runs")
    if inputs.case.op == "backward":
        return _mm_runs_gradient(inputs)
    x, y, slices = inputs.x, inputs.y, list(_columns(inputs))
    runs = [(slot, rank, int(tokens[0]), len(tokens)) for slot, rank, tokens, _ in inputs.groups]

    def run(copy):
        A, B = inputs.A[copy], inputs.B[copy]
        for slot, rank, start, length in runs:
            rows = x.narrow(0, start, length)
            for s, first, columns in slices:
                h = torch.mm(rows, A[s][slot, :rank].T)
                y[start : start + length, first : first + columns].addmm_(h, B[s][slot, :, :rank].T)

    return run


def _mm_runs_gradient(inputs: Inputs) -> Call:
    """No indexing at all, and each adapter's weights are leaves of their own: what autograd cannot be given cheaper."""
    if len(inputs.case.d_outs) > 1 or inputs.copies > 1:
        raise Skipped("backward on runs is written for one slice and warm weights")
    leaves = [
        [
            w.detach().contiguous().requires_grad_()
            for w in (inputs.A[0][0][slot, :rank], inputs.B[0][0][slot, :, :rank])
        ]
        for slot, rank, _, _ in inputs.groups
    ]
    x = inputs.x.detach().requires_grad_()
    rows = x.split([len(tokens) for _, _, tokens, _ in inputs.groups])
    out = torch.cat([torch.mm(torch.mm(part, a.T), b.T) for (a, b), part in zip(leaves, rows, strict=True)])
    wanted = [x, *(a for a, _ in leaves), *(b for _, b in leaves)]

    def run(copy):
        return torch.autograd.grad(out, wanted, inputs.dy, retain_graph=True)

    def stacked(gradients):
        """The gradients as lorakern returns them, to check them by."""
        dx, rest = gradients[0], gradients[1:]
        dA, dB = torch.zeros_like(inputs.A[0][0]), torch.zeros_like(inputs.B[0][0])
        for (slot, rank, _, _), da, db in zip(inputs.groups, rest, rest[len(leaves) :], strict=False):
            dA[slot, :rank], dB[slot, :, :rank] = da, db
        return [dx, dA, dB]

    run.stacked = stacked
    return run


@cache
def _vllm():
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    threads = torch.get_num_threads()
    try:
        from vllm.lora.ops import torch_ops
    except Exception as error:  # an installed vllm without what it depends on raises more than ImportError
        raise Skipped(f"vllm cannot be imported: {str(error).splitlines()[0] if str(error) else error!r}") from None
    finally:
        torch.set_num_threads(threads)
    return torch_ops


def vllm_cpu(inputs: Inputs) -> Call:
    """vLLM's CPU ops as its CPU wrapper calls them: the bgmv pair in decode, the sgmv pair in prefill, h in float32."""
    case = inputs.case
    if case.choices > 1 or case.op == "backward":
        raise Skipped("vllm has no mixtures" if case.choices > 1 else "vllm has no backward")
    if inputs.x.device.type != "cpu":
        raise Skipped("CPU ops")
    _check_memory(inputs, inputs.x.element_size() + 4)  # the gathered A, and A once more in float32
    ops = _vllm()
    x, y = inputs.x, inputs.y
    h = torch.zeros(case.tokens, case.r_max)
    prefill = "sgmv" if case.runs else "bgmv"
    shrink, expand = getattr(ops, f"{prefill}_shrink"), getattr(ops, f"{prefill}_expand")
    expand_slice = getattr(ops, f"{prefill}_expand_slice")
    routing = (inputs.indices,)
    if case.runs:
        lengths = torch.tensor([len(tokens) for _, _, tokens, _ in inputs.groups])
        slots = torch.arange(inputs.used)
        starts = lengths.cumsum(0) - lengths
        routing = (starts, lengths, slots, len(slots), int(lengths.max()), case.tokens)
    slices = list(_columns(inputs))

    def run(copy):
        for s, first, columns in slices:
            shrink(x, inputs.A[copy][s], h, *routing, 1.0)
            if len(slices) == 1:
                expand(h, inputs.B[copy][s], y, *routing, True)
            else:
                expand_slice(h, inputs.B[copy][s], y, *routing, first, columns, True)

    return run


def peft_mixed(inputs: Inputs) -> Call:
    """PEFT's LoRA layer given one adapter name a row; its base layer hands out y, so that only adapters take time."""
    case = inputs.case
    if case.op == "backward":
        raise Skipped("PEFT's mixed batch is for inference")
    if case.choices > 1 or len(case.d_outs) > 1:
        raise Skipped("PEFT's layer has one slice and one adapter a row")
    if inputs.used > 64:
        raise Skipped("more than 64 adapters")
    try:
        from peft import LoraConfig
        from peft.tuners.lora.layer import Linear
    except ImportError as error:
        raise Skipped(f"peft cannot be imported: {error}") from None

    class Ready(torch.nn.Linear):
        def forward(self, x):
            return inputs.y

    def layer(A, B):
        config = LoraConfig(r=case.r_max, lora_alpha=case.r_max, init_lora_weights=False)
        with torch.device("meta"):  # the weights come from the inputs
            made = Linear(
                Ready(case.d_in, case.d_outs[0], bias=False), "0", config, r=case.r_max, lora_alpha=case.r_max
            )
            for slot, rank, _, _ in inputs.groups:
                made.update_layer(str(slot), rank, lora_alpha=rank, config=config)
        for slot, rank, _, _ in inputs.groups:
            made.lora_A[str(slot)].weight = torch.nn.Parameter(A[slot, :rank], requires_grad=False)
            made.lora_B[str(slot)].weight = torch.nn.Parameter(B[slot, :, :rank], requires_grad=False)
        return made.eval()

    # Making a layer is slow. On a CPU fewer copies stay cold: the bandwidth probe that takes turns reads four caches in
    # between. On a GPU they may stay in the L2, to its advantage.
    copies = min(inputs.copies, 32 if inputs.x.device.type == "cpu" else 2)
    layers = [layer(inputs.A[copy][0], inputs.B[copy][0]) for copy in range(copies)]
    names = [str(slot) for slot in inputs.indices.tolist()]

    def run(copy):
        with torch.no_grad():
            layers[copy % copies](inputs.x, adapter_names=names)

    return run


RIVALS: dict[str, Callable[[Inputs], Call]] = {
    "mm loop": mm_loop,
    "mm loop on runs": mm_runs,
    "gather + einsum": gather_einsum,
    "peft mixed batch": peft_mixed,
    "vllm cpu": vllm_cpu,
}
