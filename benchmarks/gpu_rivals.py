"""The rivals that run on a GPU alone: the multi-LoRA kernels of serving engines, where their packages are installed.

None of their code is here; each is called as its engine calls it, and what depends on the routing alone is made before.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from types import SimpleNamespace

import torch

from benchmarks import alone
from benchmarks.contenders import Call, Skipped
from benchmarks.inputs import Inputs
from benchmarks.rivals import RIVALS


def _check(inputs: Inputs, dtypes: tuple[str, ...] = ("bfloat16", "float16")) -> None:
    if inputs.case.op != "forward" or inputs.case.choices > 1:
        raise Skipped("it has neither mixtures nor a backward")
    if inputs.case.dtype not in dtypes:
        raise Skipped(f"it has no kernels for {inputs.case.dtype}")


class _Platform:
    """What the kernels' files ask of vLLM about the device."""

    @staticmethod
    def is_cuda():
        return torch.cuda.is_available()

    @staticmethod
    def has_device_capability(wanted):
        major, minor = torch.cuda.get_device_capability()
        return 10 * major + minor >= wanted


@cache
def _vllm():
    import triton
    import triton.language

    def not_registered(*_, **__):
        raise AttributeError("the files then offer the plain functions, which need no dispatcher")

    def to_device(data, device=None, dtype=None):
        return torch.tensor(data, dtype=dtype, device=device)

    quiet = SimpleNamespace(warning_once=lambda *_: None, info_once=lambda *_: None)
    flags = dict.fromkeys(
        ("VLLM_BATCH_INVARIANT", "VLLM_LORA_ENABLE_DUAL_STREAM", "VLLM_LORA_DISABLE_PDL", "VLLM_TUNED_CONFIG_FOLDER")
    )
    stand_ins = {
        "vllm.envs": flags,
        "vllm.logger": {"init_logger": lambda _: quiet},
        "vllm.platforms": {"current_platform": _Platform},
        "vllm.triton_utils": {"tl": triton.language, "triton": triton},
        "vllm.utils.math_utils": {"next_power_of_2": triton.next_power_of_2},
        "vllm.utils.torch_utils": {"async_tensor_h2d": to_device, "direct_register_custom_op": not_registered},
    }
    ops = "vllm.lora.ops.triton_ops"
    names = [f"{ops}.{name}" for name in ("lora_kernel_metadata", "lora_shrink_op", "lora_expand_op", "utils")]
    return alone.load("vllm", names, stand_ins)


def vllm_triton(inputs: Inputs) -> Call:
    """vLLM's Triton shrink and expand, as its GPU wrapper calls them: h in float32, all slices in two launches."""
    _check(inputs)
    metadata, shrink, expand, utils = _vllm()
    for table in (utils._LORA_A_PTR_DICT, utils._LORA_B_PTR_DICT):
        table.clear()  # they know weights by address alone, and the addresses of an earlier case come again
    case, device = inputs.case, inputs.x.device
    meta = metadata.LoRAKernelMeta.make(case.adapters, case.tokens, device)
    meta.prepare_tensors(inputs.indices.int())
    routing = meta.meta_args(case.tokens, False)
    h = torch.empty(len(case.d_outs), case.tokens, case.r_max, dtype=torch.float32, device=device)

    def run(copy):
        shrink.lora_shrink(inputs.x, inputs.A[copy], h, *routing, 1.0)
        expand.lora_expand(h, inputs.B[copy], inputs.y, *routing, offset_start=0, add_inputs=True)

    return run


@cache
def _sglang():
    def as_it_is(*_):
        return lambda kernel: kernel

    off = SimpleNamespace(get=lambda: False)  # every switch of its environment, as by default
    switches = SimpleNamespace(SGLANG_ENABLE_LORA_CSGMV_SPLIT_K=off, SGLANG_ENABLE_DETERMINISTIC_INFERENCE=off)
    stand_ins = {
        "sglang.srt.environ": {"envs": switches},
        "sglang.srt.utils": {"cached_triton_kernel": as_it_is, "get_device_name": torch.cuda.get_device_name},
        "sglang.srt.lora.utils": {"LoRABatchInfo": object},
    }
    problems = []
    for folder in ("sglang.kernels.ops.lora.dense", "sglang.srt.lora.triton_ops"):
        names = [f"{folder}.chunked_sgmv_shrink", f"{folder}.chunked_sgmv_expand"]
        try:
            shrink, expand = alone.load("sglang", names, stand_ins)
            return shrink.chunked_sgmv_lora_shrink_forward, expand.chunked_sgmv_lora_expand_forward
        except Skipped as problem:
            problems.append(problem)
    raise problems[0]


def chunks(inputs: Inputs) -> SimpleNamespace:
    """The batch as SGLang's chunked backend lays it out: rows by adapter, in chunks of 16, 32 or 128."""
    case, device = inputs.case, inputs.x.device
    size = 16 if case.tokens < 64 else 32 if case.tokens < 256 else 128
    order, starts, slots = [], [0], []
    for slot, _, tokens, _ in inputs.groups:
        order.append(tokens)
        for first in range(0, len(tokens), size):
            starts.append(starts[-1] + min(size, len(tokens) - first))
            slots.append(slot)

    def integers(values):
        return torch.tensor(values, dtype=torch.int32, device=device)

    return SimpleNamespace(
        use_cuda_graph=False,
        bs=case.tokens,
        num_segments=len(slots),
        seg_indptr=integers(starts),
        weight_indices=integers(slots),
        lora_ranks=integers([inputs.rank_of(slot) for slot in range(case.adapters)]),
        scalings=torch.ones(case.adapters, device=device),
        max_len=size,
        seg_lens=None,
        permutation=torch.cat(order).int(),
        expected_tokens=case.tokens,
        has_active_lora=True,
        is_prefill=case.runs,
    )


def sglang_chunked(inputs: Inputs) -> Call:
    """SGLang's chunked kernels. The slices' weights are packed side by side, as it keeps them."""
    _check(inputs, ("bfloat16", "float16", "float32"))
    case = inputs.case
    slices = len(case.d_outs)
    if slices > 1 and len(case.ranks) > 1:
        raise Skipped("it packs slices by their true ranks")
    shrink, expand = _sglang()
    batch = chunks(inputs)
    offsets = [0]
    for d_out in case.d_outs:
        offsets.append(offsets[-1] + d_out)
    offsets = torch.tensor(offsets, dtype=torch.int32, device=inputs.x.device)
    A = [copy[0] if slices == 1 else torch.cat(copy, 1) for copy in inputs.A]
    B = [copy[0] if slices == 1 else torch.cat(copy, 1) for copy in inputs.B]

    def run(copy):
        h = shrink(inputs.x, A[copy], batch, slices)
        expand(h, B[copy], batch, offsets, max(case.d_outs), inputs.y)

    return run


def punica_bgmv(inputs: Inputs) -> Call:
    """Punica's BGMV pair, once a slice; it knows of no ranks, and takes the widths that it was compiled for."""
    _check(inputs)
    try:
        from punica.ops import add_lora_bgmv
    except Exception as error:  # a broken extension raises more than ImportError
        raise Skipped(f"punica cannot be imported: {error}") from None
    if len(inputs.case.d_outs) > 1:
        raise Skipped("it has no slices")
    indices = inputs.indices.long()

    def run(copy):
        # A layer dimension lies between the slots and the ranks.
        A, B = inputs.A[copy][0].unsqueeze(1), inputs.B[copy][0].unsqueeze(1)
        add_lora_bgmv(inputs.y, inputs.x, A, B, indices, 0, 1.0)

    return run


def rivals_on(device: str) -> dict[str, Callable[[Inputs], Call]]:
    """Name to maker of the rivals for a device."""
    if device == "cpu":
        return RIVALS
    everywhere = {name: make for name, make in RIVALS.items() if name != "vllm cpu"}
    return everywhere | {"vllm triton": vllm_triton, "sglang chunked": sglang_chunked, "punica bgmv": punica_bgmv}
