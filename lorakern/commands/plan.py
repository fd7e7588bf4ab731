"""What a merge would give, without merging: every input is read and checked, ranks come from small stand-ins."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lorakern.adapters import AdapterFile
from lorakern.commands.console import Progress, kind, size, span
from lorakern.merge.driver import PerModule, merge_modules
from lorakern.merge.registry import find

if TYPE_CHECKING:
    from lorakern.commands.merge import Job

Shapes = Sequence[Mapping[str, tuple[int, int, int]]]  # of every adapter: module path to rank, d_in, d_out


@dataclass(frozen=True)
class Planned:
    """A module of the merged adapter: `ranks` are those of the adapters, None where one lacks the module.

    `rank` and `bytes` are what the merged module takes at most.
    """

    module: str
    d_in: int
    d_out: int
    ranks: list[int | None]
    rank: int
    dtype: str
    bytes: int


def plan(
    adapters: Sequence[AdapterFile],
    method: str,
    arguments: Mapping[str, Any],
    per_module: PerModule | None,
    dtype: torch.dtype | None,
    progress: Progress,
) -> list[Planned]:
    """What `merge_modules` would give for these arguments; raises for what it would refuse.

    All factors are read and looked through for NaN and infinity.
    """
    shapes = [adapter.shapes() for adapter in adapters]
    modules = list(dict.fromkeys(module for adapter in shapes for module in adapter))
    ranks = merged_ranks(shapes, method, arguments, per_module)
    planned = []
    for done, module in enumerate(modules, 1):
        dtypes = {t.dtype for adapter in adapters if module in adapter for t in adapter[module][:2]}
        result = dtype or reduce(torch.promote_types, dtypes)
        _, d_in, d_out = next(adapter[module] for adapter in shapes if module in adapter)
        inner = [adapter[module][0] if module in adapter else None for adapter in shapes]
        count = ranks[module] * (d_in + d_out) * result.itemsize
        planned.append(Planned(module, d_in, d_out, inner, ranks[module], str(result)[6:], count))
        progress(done, len(modules), module)
    return planned


def merged_ranks(
    shapes: Shapes, method: str, arguments: Mapping[str, Any], per_module: PerModule | None
) -> dict[str, int]:
    """Module path to the rank that the method gives it at most.

    The method itself is asked: it merges random factors of the true ranks, of no more inputs and outputs than those
    ranks need, one for all modules that are alike. A share of the energy is taken to reach the largest rank there can
    be: that of the update, or the sum of the ranks for a method of all modules at once.
    """
    modules = list(dict.fromkeys(module for adapter in shapes for module in adapter))
    alike: dict[str, list[str]] = {}
    bound = {}
    for module in modules:
        own = [adapter.get(module) for adapter in shapes]
        total = sum(shape[0] for shape in own if shape)
        sides = next(shape for shape in own if shape)[1:]
        bound[module] = total if find(method).whole else min(total, *sides)
        alike.setdefault(repr((own, per_module and sorted(per_module(module).items()))), []).append(module)
    generator = torch.Generator().manual_seed(0)
    stand_ins: list[dict[str, tuple]] = [{} for _ in shapes]
    for first, *_ in alike.values():
        total = sum(adapter[first][0] for adapter in shapes if first in adapter)
        for adapter, stand_in in zip(shapes, stand_ins, strict=True):
            if first in adapter:
                rank, d_in, d_out = adapter[first]
                A = torch.randn(rank, min(d_in, total + 1), generator=generator)
                stand_in[first] = A, torch.randn(min(d_out, total + 1), rank, generator=generator), 1.0
    found = dict(merge_modules(stand_ins, method, per_module=per_module, **arguments))
    ranks = {}
    for members in alike.values():
        first = members[0]
        rank = {**arguments, **(per_module(first) if per_module else {})}["rank"]
        ranks |= dict.fromkeys(members, bound[first] if isinstance(rank, float) else found[first].rank)
    return {module: ranks[module] for module in modules}


def plan_table(planned: Sequence[Planned], job: "Job", out: Path) -> list[Any]:
    """The plan for a reader: a line for each kind of module."""
    from rich.table import Table
    from rich.text import Text

    groups: dict[tuple, list[Planned]] = {}
    for module in planned:
        groups.setdefault((kind(module.module), module.d_out, module.d_in), []).append(module)
    table = Table("modules", "count", "d_out x d_in", "ranks in", "rank, at most", "size, at most")
    for (name, d_out, d_in), members in groups.items():
        by_adapter = zip(*(module.ranks for module in members), strict=True)
        inner = [span([rank for rank in ranks if rank]) if any(ranks) else "-" for ranks in by_adapter]
        rank, count = span([module.rank for module in members]), size(sum(module.bytes for module in members))
        table.add_row(Text(name), str(len(members)), f"{d_out} x {d_in}", ", ".join(inner), rank, count)
    told = f"{len(planned)} modules, {size(sum(module.bytes for module in planned))} at most; nothing was written"
    return [table, f"{out}: {job.method} of {len(job.sources)} adapters: {told}"]
