"""The shipped configurations: one table, read by the launchers and by the ahead-of-time compile.

A row is chosen by op, dtype and r_max alone. Nothing depends on the batch, so a token's sums have one order whatever
stands beside it. BLOCK_M is 16 throughout: tl.dot then becomes mma.sync on every architecture, never the wgmma with
register operands that Triton miscompiles on Hopper (triton#9433), and a slot with one token wastes least.
Shared memory of every row stays below SHARED_LIMIT, so that no device from sm_80 on needs a row of its own.
"""

from dataclasses import dataclass

import torch

BLOCK_M = 16
# bytes of shared memory a block may use on sm_86, sm_89 and sm_120, the smallest of sm_80 and up
SHARED_LIMIT = 99 * 1024
# bytes a thread may spill: ptxas gives up a few scalars for occupancy, more is a tile that is too large
SPILL_LIMIT = 64


@dataclass(frozen=True)
class Config:
    """One row: tiles of `block_r` ranks; `block` is the step along d_in (shrink) or the tile along d_out (expand)."""

    op: str
    dtype: torch.dtype
    block_r: int
    block: int
    num_warps: int
    num_stages: int


CONFIGS = tuple(
    Config(op, dtype, *numbers)
    for op, dtypes, rows in (
        ("shrink", (torch.float16, torch.bfloat16), ((16, 256, 4, 4), (32, 256, 4, 3), (64, 128, 4, 4))),
        ("shrink", (torch.float32,), ((16, 64, 4, 3), (32, 64, 4, 3), (64, 64, 4, 3))),
        ("expand", (torch.float16, torch.bfloat16), ((16, 128, 4, 2), (32, 128, 4, 2), (64, 64, 4, 2))),
        ("expand", (torch.float32,), ((16, 64, 4, 2), (32, 64, 4, 2))),
    )
    for dtype in dtypes
    for numbers in rows
)


def select(op, dtype, r_max):
    """The row whose rank tile holds r_max; ranks over the largest tile are walked in several of it."""
    rows = [config for config in CONFIGS if config.op == op and config.dtype == dtype]
    return next((config for config in rows if r_max <= config.block_r), rows[-1])
