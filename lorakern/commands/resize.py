"""`lorakern resize`: an adapter at another rank, each module the best approximation of its update."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from lorakern.adapters import AdapterWriter, LoraFactors
from lorakern.adapters.peft_files import WEIGHTS_NAME
from lorakern.commands.card import Input, card
from lorakern.commands.console import Console, kind, size, span
from lorakern.commands.sources import check_output, on_device, opened, sources
from lorakern.ops import delta_distance, delta_norm, truncate


def run(
    name: str,
    out: Path,
    rank: int | float,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
    force: bool = False,
    dry_run: bool = False,
    console: Console,
    command: str,
) -> None:
    """Write the adapter `name` at `rank`, or at the ranks that keep that share of the energy, into the folder `out`.

    A module that has no more ranks than that keeps its factors bit for bit. Reported for each module are the share of
    the energy ``sum sigma^2`` that is kept, and the error ``||D - D_r||_F / ||D||_F`` of the factors that are written,
    rounded to their dtype. With `dry_run` all is computed and nothing written.

    Raises `LorakernError` for an adapter that cannot be read, and for an `out` that exists (unless `force`) or is the
    input. `out` is as it was then.
    """
    found = sources([name])
    check_output(out, found, force)
    with opened(found) as (adapter,):
        fields = ("base_model_name_or_path", "fan_in_fan_out", "task_type")
        config = {field: getattr(adapter.config, field) for field in fields}
        modules: list[dict[str, Any]] = []
        with nullcontext() if dry_run else AdapterWriter(out, **config) as writer:
            with console.progress("resizing") as progress:
                for done, module in enumerate(adapter, 1):
                    factors = on_device(adapter[module], device)
                    small, energy = _resized(factors, rank, dtype)
                    if writer is not None:
                        writer.add(module, small)
                    ranks = {"rank_before": factors.rank, "rank": small.rank}
                    same = small.A is factors.A and small.B is factors.B
                    error = 0.0 if same else delta_distance([small], [factors])
                    modules.append({"module": module, **ranks, "energy": energy, "error": error})
                    progress(done, len(adapter), module)
            if writer is not None:
                least = f"{min(module['energy'] for module in modules):.6f}"
                writer.card = card(
                    "A LoRA adapter at another rank",
                    "Each module is the best approximation of its rank (truncated singular value decomposition).",
                    [Input(name, adapter.sha256())],
                    {"rank": rank, "least share of a module's energy that is kept": least},
                    command,
                    base_model=adapter.config.base_model_name_or_path,
                )
        result = {"output": str(out), "written": not dry_run, "input": {"path": name, "sha256": adapter.sha256()}}
    written = 0 if dry_run else (out / WEIGHTS_NAME).stat().st_size
    result |= {"rank": rank, "modules": modules, "bytes": written}
    told = "nothing was written" if dry_run else size(written)
    console.report(result, _table(modules), f"{out}: {len(modules)} modules, {told}")


def _resized(factors: LoraFactors, rank: int | float, dtype: torch.dtype | None) -> tuple[LoraFactors, float]:
    """The factors at that rank, and the share of the energy that they hold."""
    A, B, scale = factors
    if isinstance(rank, int) and factors.rank <= rank:
        return LoraFactors(A.to(dtype or A.dtype), B.to(dtype or B.dtype), scale), 1.0
    small, norm = truncate([factors], rank, dtype=dtype), delta_norm(A, B, scale)
    energy = min(1.0, float(small.singular_values.square().sum()) / norm**2) if norm else 1.0
    return LoraFactors(small.A, small.B, 1.0), energy


def _table(modules: list[dict[str, Any]]):
    """A line for each kind of module, with what the one that loses most keeps."""
    from rich.table import Table
    from rich.text import Text

    groups: dict[str, list[dict[str, Any]]] = {}
    for module in modules:
        groups.setdefault(kind(module["module"]), []).append(module)
    table = Table("modules", "count", "rank before", "rank", "energy kept, least", "error, largest")
    for name, members in groups.items():
        before, after = (span([module[key] for module in members]) for key in ("rank_before", "rank"))
        least = min(module["energy"] for module in members)
        worst = max(module["error"] for module in members)
        table.add_row(Text(name), str(len(members)), before, after, f"{least:.4%}", f"{worst:.2e}")
    return table
