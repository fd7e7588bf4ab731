"""warmup prepares every kernel that serving will use; what a GPU must prove of it is in test_triton_gpu.py."""

import os
from importlib.util import find_spec

import pytest
import torch

import lorakern as lk
from lorakern.errors import LorakernError

needs_kernels = pytest.mark.skipif(
    find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") == "1", reason="needs triton, not interpreted"
)
OPTIONS = {
    "indices": torch.int64,
    "ranks": torch.int32,
    "scale": True,
    "gates": True,
    "accumulate": True,
    "backward": True,
}


def serving_keys(d_in, d_outs, r_max, dtype, tokens, choices, slots, columns):
    """Keys of the kernels that a batch and its gradients would use, its x, y and dy being columns of wider tensors."""
    from lorakern.triton_kernels.backward import backward_launches
    from lorakern.triton_kernels.bgmv import bgmv_launches
    from lorakern.triton_kernels.plan import plan_launch
    from lorakern.triton_kernels.signature import key

    def empty(*shape, dtype=torch.float32):
        return torch.empty(shape, dtype=dtype, device="meta")

    indices = empty(tokens, 2 * choices, dtype=torch.int64)[:, ::2]
    order, starts = empty(tokens * choices, dtype=torch.int32), empty(slots + 1, dtype=torch.int32)
    arguments = (
        empty(tokens, sum(d_outs) + columns, dtype=dtype)[:, : sum(d_outs)],
        empty(tokens, d_in + columns, dtype=dtype)[:, :d_in],
        [empty(slots, r_max, d_in, dtype=dtype) for _ in d_outs],
        [empty(slots, d_out, r_max, dtype=dtype) for d_out in d_outs],
        indices,
        empty(slots),
        empty(slots, dtype=torch.int32),
        empty(tokens, choices + 1)[:, :choices],
        order,
        starts,
    )
    launches = *bgmv_launches(*arguments, True), *backward_launches(*arguments)[0]
    return {key(launch) for launch in (plan_launch(order, starts, indices), *launches)}


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("d_in", "d_outs", "r_max"), [(4096, (4096,), 16), (576, (576, 192, 192), 64), (1000, (37,), 5), (8192, (64,), 256)]
)
def test_no_batch_needs_another_kernel(d_in, d_outs, r_max, dtype):
    from lorakern.triton_kernels.signature import key
    from lorakern.triton_kernels.warmup import layer_launches

    for choices, mixtures in ((1, (1,)), (2, (2, 3, 16))):
        launches = layer_launches(d_in, d_outs, r_max, dtype, "meta", choices=choices, **OPTIONS)
        prepared, used = {key(launch) for launch in launches}, set()
        for tokens in (1, 2, 15, 16, 64, 257, 4096):
            for slots in (1, 7, 16, 1000):
                for count in mixtures:
                    used |= serving_keys(d_in, d_outs, r_max, dtype, tokens, count, slots, 0 if d_in % 16 else 48)
        assert used == prepared


@needs_kernels
def test_what_does_need_another_kernel_has_another_key():
    base = serving_keys(4096, (64,), 16, torch.bfloat16, 4, 1, 4, 0)
    assert base != serving_keys(4096, (64,), 16, torch.float16, 4, 1, 4, 0)
    assert base != serving_keys(4096, (64,), 32, torch.bfloat16, 4, 1, 4, 0)
    assert base != serving_keys(4096, (64,), 16, torch.bfloat16, 4, 1, 4, 1)


@needs_kernels
def test_the_table_follows_the_device_and_keeps_the_sums():
    from lorakern.triton_kernels.configs import CONFIGS, LARGE_SHARED, SHARED_LIMIT, chunks, select

    for row in CONFIGS:
        small, large = (select(row.op, row.dtype, row.block_r, limit) for limit in (SHARED_LIMIT, LARGE_SHARED))
        assert small.shared <= SHARED_LIMIT and (small.block_r, small.block) == (large.block_r, large.block)
    assert (
        select("shrink", torch.bfloat16, 64, LARGE_SHARED).num_stages > select("shrink", torch.bfloat16, 64).num_stages
    )
    for d_in in (1, 63, 512, 576, 1000, 1024, 1536, 4096, 11008, 14336, 28672):
        number, length = chunks(d_in)
        assert number in (1, 2, 4, 8) and number * length >= d_in and length % 256 == 0


def test_a_cpu_has_nothing_to_prepare():
    assert lk.warmup([(64, 64, 8), (64, (64, 32), 16)], dtype=torch.float32, device="cpu", max_choices=2) == 0


@pytest.mark.parametrize(
    ("argument", "options"),
    [
        ("layers", {"layers": [(64, 64)]}),
        ("layers", {"layers": [(64, (), 8)]}),
        ("layers", {"layers": [(64, (64, 0), 8)]}),
        ("dtype", {"dtype": torch.float64}),
        ("indices", {"indices": torch.int16}),
        ("ranks", {"ranks": torch.float32}),
        ("max_choices", {"max_choices": 0}),
    ],
)
def test_bad_arguments_are_named(argument, options):
    with pytest.raises(LorakernError, match=f"warmup: {argument} must"):
        lk.warmup(**({"layers": [(64, 64, 8)], "device": "cpu"} | options))
