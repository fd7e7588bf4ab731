"""How kernels find the points of a ragged batch of problems: tables, and what reads them.

For each point of each part there is the address of its row and the step between its columns, so that rows of A and
columns of B are read where they lie.
"""

from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
import triton
import triton.language as tl

# numbers in a row of `parts`: its first row in the tables, its columns, the first of them among those of a point
PART = tl.constexpr(3)
# numbers in a row of `problems`: parts first:last, points and the first of them among all, k and the first centroid
# among all, columns and the first of them among all, and the first element of all centroids and of all inner products
PROBLEM = tl.constexpr(10)


class Tables(NamedTuple):
    """A batch of problems on a device. int64, but for scales (float32, a row of each part, or None)."""

    points: torch.Tensor  # any matrix of points: the others have its dtype
    rows: torch.Tensor
    steps: torch.Tensor
    scales: torch.Tensor | None
    parts: torch.Tensor
    problems: torch.Tensor
    counts: list[int]
    widths: list[list[int]]  # columns of each part
    ks: list[int]
    kept: list[torch.Tensor]  # what the addresses point into

    def arguments(self):
        return {
            "p_any": self.points,
            "p_rows": self.rows,
            "p_steps": self.steps,
            "p_scales": self.scales,
            "p_parts": self.parts,
            "p_problems": self.problems,
        }

    def blocks(self, size):
        """(blocks, 2) int64: the problem and the first point of each block of `size` points."""
        found = [(q, i) for q, count in enumerate(self.counts) for i in range(0, count, size)]
        return torch.tensor(found).to(self.rows.device)


def tables(rows, blocks, parts, scales, ks):
    """The tables of points as `lorakern.ops` passes them, for k clusters each; matrices of mixed dtypes are copied."""
    device = rows[0].device
    if any(r.dtype != rows[0].dtype for r in rows):
        rows = [r.float() for r in rows]
    size = rows[0].element_size()
    lengths = torch.tensor([r.shape[0] for r in rows])
    starts, strides, steps = (torch.tensor(n) for n in zip(*((r.data_ptr(), *r.stride()) for r in rows), strict=True))
    within = torch.arange(int(lengths.sum())) - (lengths.cumsum(0) - lengths).repeat_interleave(lengths)
    addresses = starts.repeat_interleave(lengths) + within * strides.repeat_interleave(lengths) * size
    spans = list(pairwise(accumulate(blocks, initial=0)))
    of_parts = [(sum(r.shape[0] for r in rows[a:b]), rows[a].shape[1]) for a, b in spans]
    first_rows = list(accumulate((n for n, _ in of_parts), initial=0))
    part_rows, problem_rows, counts, widths = [], [], [], []
    point = centroid = place = element = product = 0
    for (a, b), k in zip(pairwise(accumulate(parts, initial=0)), ks, strict=True):
        before = list(accumulate((d for _, d in of_parts[a:b]), initial=0))
        part_rows += [(first_rows[p], of_parts[p][1], w) for p, w in zip(range(a, b), before, strict=False)]
        n, width = of_parts[a][0], before[-1]
        problem_rows.append((a, b, n, point, k, centroid, width, place, element, product))
        counts.append(n)
        widths.append([d for _, d in of_parts[a:b]])
        point, centroid, place, element, product = (
            point + n,
            centroid + k,
            place + width,
            element + k * width,
            product + n * n,
        )
    flat = None
    if any(len(s) for s in scales):
        ones = [torch.ones(p, n, device=device) for n, p in zip(counts, parts, strict=True)]
        flat = torch.cat([(s if len(s) else o).flatten() for s, o in zip(scales, ones, strict=True)])
    numbers = (addresses, steps.repeat_interleave(lengths), torch.tensor(part_rows), torch.tensor(problem_rows))
    addresses, steps, part_rows, problem_rows = (n.to(device) for n in numbers)
    return Tables(rows[0], addresses, steps, flat, part_rows, problem_rows, counts, widths, list(ks), rows)


@triton.jit
def load_problem(p_problems, i_problem, FIELD: tl.constexpr):
    return tl.load(p_problems + i_problem * PROBLEM + FIELD)


@triton.jit
def load_part(p_parts, i_part):
    """A part's first row in the tables, its columns, and the first of them among the columns of a point."""
    p_part = p_parts + i_part * PART
    return tl.load(p_part), tl.load(p_part + 1), tl.load(p_part + 2)


@triton.jit
def load_points(p_any, p_rows, p_steps, o_row, m_row, o_k, m_k):
    """Columns o_k of the points at o_row of the tables, [rows, columns], in the dtype of p_any."""
    b_row = tl.load(p_rows + o_row, mask=m_row, other=0).to(p_any.dtype)
    b_step = tl.load(p_steps + o_row, mask=m_row, other=0)
    return tl.load(b_row[:, None] + o_k[None, :] * b_step[:, None], mask=m_row[:, None] & m_k[None, :], other=0.0)


@triton.jit
def load_scales(p_scales, o_row, m_row):
    if p_scales is None:  # noqa: SIM108, an expression would compile both
        b_scale = tl.where(m_row, 1.0, 0.0)
    else:
        b_scale = tl.load(p_scales + o_row, mask=m_row, other=0.0)
    return b_scale
