"""The shipped configurations: one table, read by the launchers and by the ahead-of-time compile.

A row is chosen by op, dtype, r_max and the device's shared memory alone. Nothing depends on the batch, so a token's
sums have one order whatever stands beside it. BLOCK_M is 16 throughout: tl.dot then becomes mma.sync on every
architecture, never the wgmma with register operands that Triton miscompiles on Hopper (triton#9433), and a slot with
one token wastes least.
"""

from dataclasses import dataclass

import torch

BLOCK_M = 16
# bytes of shared memory a block may use on sm_86, sm_89 and sm_120, the smallest of sm_80 and up
SHARED_LIMIT = 99 * 1024
# the same on sm_90 and sm_100
LARGE_SHARED = 227 * 1024


@dataclass(frozen=True)
class Config:
    """One row: tiles of up to `block_r` ranks, and `block` elements of what the op walks or is divided along: d_in
    (shrink, dx), d_out (expand, dh), either of them (outer) or pairs (plan, dots, dscale).

    `mixture` is expand where a token has several choices; dh, dx, outer, dots and dscale are of backward. `shared` is
    what a device must offer: rows that differ in it alone compute the same bits. `registers` caps those of a thread:
    without a cap ptxas spills a few to fit one more block on a multiprocessor. 128 is the cap of 4 blocks of 4 warps,
    168 that of 3, and 255 all that there are; with triton 3.9 no row spills at its cap.
    """

    op: str
    dtype: torch.dtype
    block_r: int
    block: int
    num_warps: int
    num_stages: int
    registers: int | None = None
    shared: int = SHARED_LIMIT


CONFIGS = tuple(
    Config(op, dtype, *numbers)
    for op, dtypes, rows in (
        # a stage is 16 tokens and block_r rows of A: as many bytes under way as fit, A at its row's 256 or 512 bytes
        (
            "shrink",
            (torch.float16, torch.bfloat16),
            (
                (16, 256, 4, 4),
                (32, 256, 4, 3),
                (32, 256, 4, 5, None, LARGE_SHARED),
                (64, 128, 4, 4),
                (64, 128, 4, 6, None, LARGE_SHARED),
            ),
        ),
        # products by fma, not tensor cores: 64 elements of d_in keep the operands of a step in registers
        ("shrink", (torch.float32,), ((16, 64, 4, 3), (32, 64, 4, 3), (64, 64, 8, 3))),
        # one step is a whole rank tile, 4 or 8 KiB of B; at 64 ranks, 8 planes of h need the registers of 8 warps
        (
            "expand",
            (torch.float16, torch.bfloat16),
            ((16, 128, 4, 2), (32, 128, 4, 2), (64, 64, 8, 2, 255)),
        ),
        ("expand", (torch.float32,), ((16, 64, 4, 1, 128), (32, 64, 4, 2))),
        # half of expand's columns leave registers for the sum over k; slots differ, so there is nothing to stage
        (
            "mixture",
            (torch.float16, torch.bfloat16),
            ((16, 64, 4, 1, 168), (32, 64, 4, 1, 255), (64, 64, 8, 1, 255)),
        ),
        ("mixture", (torch.float32,), ((16, 64, 4, 1, 255), (32, 64, 4, 1, 255))),
        # dh: shrink by the transpose of B, whose rows are as short as the rank: 4 to 16 KiB of them a stage
        ("dh", (torch.float16, torch.bfloat16), ((16, 128, 4, 3), (32, 128, 4, 3, 128), (64, 128, 4, 3))),
        ("dh", (torch.float32,), ((16, 64, 4, 3), (32, 64, 4, 3), (64, 64, 8, 3))),
        # dx: as mixture, whose loops over choices and slots it has, and slices besides
        ("dx", (torch.float16, torch.bfloat16), ((16, 128, 4, 1, 168), (32, 64, 4, 1, 168), (64, 64, 8, 1, 255))),
        ("dx", (torch.float32,), ((16, 64, 4, 1, 168), (32, 64, 4, 1, 255))),
        # outer: the rows of its dot are ranks, and 64 of them would make it a wgmma; narrow tiles, since a batch of one
        # slot has no other programs than those
        ("outer", (torch.float16, torch.bfloat16), ((16, 64, 4, 2), (32, 64, 4, 2))),
        ("outer", (torch.float32,), ((16, 64, 4, 2), (32, 64, 8, 2))),
        # dots and dscale: bound by the latency of their loads; few registers, many loads under way
        ("dots", (torch.float32,), ((0, 32, 4, 1),)),
        ("dscale", (torch.float32,), ((0, 1024, 4, 1),)),
        # gates: tiles of a core, block ranks of the router by as many of the adapter
        ("gates", (torch.float32,), ((0, 16, 1, 1),)),
        # clustering: block_r points or centroids a tile, block columns a step; update has a row of columns at a time
        ("points_gram", (torch.float16, torch.bfloat16), ((32, 32, 4, 2, 255),)),
        ("points_gram", (torch.float32,), ((32, 16, 4, 2, 255),)),
        ("nearest", (torch.float16, torch.bfloat16, torch.float32), ((32, 32, 4, 2),)),
        ("own", (torch.float16, torch.bfloat16, torch.float32), ((16, 128, 4, 1),)),
        ("update", (torch.float16, torch.bfloat16, torch.float32), ((0, 512, 4, 1),)),
        # on inner products: one program a run, block points at most
        ("seed", (torch.float32,), ((0, 256, 4, 1, 255), (0, 1024, 4, 1, 255), (0, 2048, 8, 1, 255))),
        ("lloyd", (torch.float32,), ((0, 256, 4, 1, 255), (0, 1024, 4, 1, 255), (0, 2048, 8, 1, 255))),
        # counting is all registers: 32 pairs against 128 at a time
        ("plan", (torch.int32, torch.int64), ((0, 32, 4, 2),)),
    )
    for dtype in dtypes
    for numbers in rows
)
# the length of a chunk is a multiple of every step along d_in
_STEP = max(config.block for config in CONFIGS if config.op == "shrink")
# what expand is compiled for: how many planes of h it adds up
PLANES = (1, 2, 4, 8)


def select(op, dtype, r_max=0, shared=SHARED_LIMIT):
    """The row whose rank tile holds r_max; ranks over the largest tile are walked in several of it."""
    rows = [row for row in CONFIGS if row.op == op and row.dtype == dtype and row.shared <= shared]
    block_r = min((row.block_r for row in rows if r_max <= row.block_r), default=rows[-1].block_r)
    return max((row for row in rows if row.block_r == block_r), key=lambda row: row.shared)


def chunks(d_in):
    """(number, length) of the chunks in which d_in is summed: up to 8 of at least 512 elements."""
    number = max(count for count in PLANES if count == 1 or count * 512 <= d_in + 511)
    return number, -(-d_in // (number * _STEP)) * _STEP
