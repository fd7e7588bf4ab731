"""`lorakern resize`: an adapter at another rank, each module the best approximation of its update."""

import math
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from lorakern.adapters import AdapterWriter
from lorakern.adapters.peft_files import WEIGHTS_NAME
from lorakern.commands.card import Input, card
from lorakern.commands.console import Console, kind, size, span
from lorakern.commands.sources import check_output, on_device, opened, sources
from lorakern.ops import delta_norm, truncate


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

    Reported for each module are the share of the energy ``sum sigma^2`` that is kept, and the error
    ``||D - D_r||_F / ||D||_F`` that this makes, both before rounding to the dtype. With `dry_run` all is computed and
    nothing written.

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
                    A, B, scale = on_device(adapter[module], device)
                    small = truncate([(A, B, scale)], rank, dtype=dtype)
                    if writer is not None:
                        writer.add(module, (small.A, small.B, 1.0))
                    kept = _kept(small.singular_values, delta_norm(A, B, scale))
                    ranks = {"rank_before": A.shape[0], "rank": small.A.shape[0]}
                    modules.append({"module": module, **ranks, "energy": kept, "error": math.sqrt(1.0 - kept)})
                    progress(done, len(adapter), module)
            if writer is not None:
                energy = f"{min(module['energy'] for module in modules):.6f}"
                writer.card = card(
                    "A LoRA adapter at another rank",
                    "Each module is the best approximation of its rank (truncated singular value decomposition).",
                    [Input(name, adapter.sha256())],
                    {"rank": rank, "least share of a module's energy that is kept": energy},
                    command,
                    base_model=adapter.config.base_model_name_or_path,
                )
        result = {"output": str(out), "written": not dry_run, "input": {"path": name, "sha256": adapter.sha256()}}
    written = 0 if dry_run else (out / WEIGHTS_NAME).stat().st_size
    result |= {"rank": rank, "modules": modules, "bytes": written}
    told = "nothing was written" if dry_run else size(written)
    console.report(result, _table(modules), f"{out}: {len(modules)} modules, {told}")


def _kept(sigma: torch.Tensor, norm: float) -> float:
    """The share of the energy of an update of that norm that these singular values hold."""
    return min(1.0, float(sigma.square().sum()) / norm**2) if norm else 1.0


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
