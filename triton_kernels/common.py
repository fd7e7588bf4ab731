"""What the kernels share: how a program finds its pairs, picks its slice, and is launched."""

from contextlib import nullcontext
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .configs import BLOCK_M, Config

# slots looked at in one load when a program searches its own
BLOCK_S = 256


@triton.jit
def pick(values, i, COUNT: tl.constexpr):
    """values[i] of a tuple, for an i that is known at run time only."""
    value = values[0]
    for j in tl.static_range(1, COUNT):
        value = tl.where(i == j, values[j], value)
    return value


@triton.jit
def find_pairs(p_order, p_starts, i_b, step, num_pairs, num_slots, BLOCK_M: tl.constexpr, BLOCK_S: tl.constexpr):
    """The slot of block i_b and its pairs: (slot, (BLOCK_M,) pair ids as int64, (BLOCK_M,) mask).

    Slot s owns the positions starts[s]:starts[s + 1] of order; slot num_slots stands for the pairs without an adapter.
    With step = BLOCK_M the blocks of slot s are numbered from starts[s] // BLOCK_M + s on, which leaves every slot as
    many numbers as it needs without a pass over the slots. With step = 1 a block's number is the position of its first
    pair. A number that is no block has an empty mask.
    """
    is_wide = (step > 1).to(tl.int32)
    # how many slots have a first number that is not past i_b
    slot = -1
    for o in range(0, num_slots + 1, BLOCK_S):
        o_s = o + tl.arange(0, BLOCK_S)
        m_s = o_s <= num_slots
        # [BLOCK_S]
        b_first = tl.load(p_starts + o_s, mask=m_s, other=0) // step + o_s * is_wide
        slot += tl.sum((m_s & (b_first <= i_b)).to(tl.int32), axis=0)
    start = tl.load(p_starts + slot)
    stop = tl.load(p_starts + slot + 1, mask=slot < num_slots, other=num_pairs)
    ahead = (i_b - (start // step + slot * is_wide)) * step
    o_p = start + ahead + tl.arange(0, BLOCK_M)
    m_p = o_p < tl.where(ahead % BLOCK_M == 0, stop, start)
    # [BLOCK_M]
    b_pair = tl.load(p_order + o_p, mask=m_p, other=0).to(tl.int64)
    return slot, b_pair, m_p


@triton.jit
def load_ranks(p_ranks, b_slot, num_slots, r_max):
    """True rank of each slot: 0 where there is no adapter, never over r_max."""
    m_slot = (b_slot >= 0) & (b_slot < num_slots)
    if p_ranks is None:
        b_rank = tl.where(m_slot, r_max, 0)
    else:
        b_rank = tl.minimum(tl.load(p_ranks + b_slot, mask=m_slot, other=0), r_max).to(tl.int32)
    return b_rank


def pair_blocks(num_pairs, num_slots):
    """(blocks, step) for find_pairs: numbers handed out by position, or by slot where that makes fewer."""
    by_slot = num_pairs // BLOCK_M + num_slots + 1
    return (by_slot, BLOCK_M) if by_slot < num_pairs else (num_pairs, 1)


def row_stride(tensor):
    """The stride of the first dimension. Where its size is 1 it may be any: the usual one then, for one kernel."""
    return tensor.stride(0) if tensor.shape[0] > 1 else tensor.shape[1:].numel()


class Launch(NamedTuple):
    """One launch, written down: run by `run`, compiled by aot."""

    kernel: object
    grid: tuple
    arguments: dict
    config: Config


# under TRITON_INTERPRET=1 triton.jit makes no JITFunction
INTERPRET = not isinstance(pick, triton.JITFunction)


def options(config):
    """The compiler options of a configuration; fp fusion is pinned, since its default changes in triton 3.10."""
    return {
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
        "maxnreg": config.registers,
        "enable_fp_fusion": True,
    }


def run(launch, device):
    """Start it on the current stream of the device; an empty grid is nothing to do."""
    if 0 in launch.grid:
        return
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        launch.kernel[launch.grid](**launch.arguments, **options(launch.config))
