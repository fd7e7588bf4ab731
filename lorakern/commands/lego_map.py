"""`lorakern lego-map`: which adapter's ranks LoRA-LEGO puts into which cluster."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from lorakern.commands.console import Console, kind, span
from lorakern.commands.plots import check_plot, write_plot
from lorakern.commands.sources import Source, base_model, opened
from lorakern.merge.lego_map import lego_map
from lorakern.merge.lego_picture import lego_picture


def run(
    found: Sequence[Source],
    *,
    rank: int | float | None = None,
    weights: list[float] | None = None,
    seed: int = 0,
    missing: str = "zero",
    base: str | None = None,
    options: Mapping[str, Any],
    device: torch.device | None = None,
    every: bool = False,
    plot: Path | None = None,
    console: Console,
) -> None:
    """Report the clusters of a merge by `lego`: a line for each kind of module, or with `every` for each module.

    `base` settles what the base model is where the adapters name different ones.

    Raises `LorakernError` as the merge would, and for a `plot` that cannot be written.
    """
    check_plot(plot)
    with opened(found) as adapters, console.progress("clustering") as progress:
        base_model(found, adapters, base, "--base-model")
        result = lego_map(
            adapters,
            names=_names(found),
            rank=rank,
            weights=weights,
            seed=seed,
            missing=missing,
            device=device,
            progress=progress,
            **options,
        )
    if plot is not None:
        write_plot(plot, lego_picture(result))
    shared = f"{result['shared']:.1%} of the ranks share a cluster with another adapter"
    console.report(result, _modules(result, every), _pairs(result), shared)


def _names(found: Sequence[Source]) -> list[str]:
    """The last parts of the paths, where these tell the adapters apart."""
    ends = [source.path.name for source in found]
    return ends if len(set(ends)) == len(ends) else [source.name for source in found]


def _modules(result: Mapping[str, Any], every: bool):
    from rich.table import Table
    from rich.text import Text

    groups: dict[str, list[Mapping[str, Any]]] = {}
    for name, module in result["modules"].items():
        groups.setdefault(name if every else kind(name), []).append(module)
    table = Table("modules", "count", "ranks", "clusters", "of several adapters", "kept energy")
    for name, members in groups.items():
        ranks = [sum(map(len, module["labels"])) for module in members]
        several = [sum(count > 1 for count in _adapters_of_clusters(module)) for module in members]
        counts = [module["k"] for module in members]
        kept = span([module["kept_energy"] for module in members], "{:.1%}")
        table.add_row(Text(name), str(len(members)), span(ranks), span(counts), span(several), kept)
    return table


def _adapters_of_clusters(module: Mapping[str, Any]) -> list[int]:
    """How many adapters every cluster has ranks of."""
    return [sum(cluster in labels for labels in map(set, module["labels"])) for cluster in range(module["k"])]


def _pairs(result: Mapping[str, Any]):
    from rich.table import Table
    from rich.text import Text

    table = Table("ranks of", title="in a cluster with one of")
    for name in result["adapters"]:
        table.add_column(Text(name))
    for i, (name, row) in enumerate(zip(result["adapters"], result["pairs"], strict=True)):
        table.add_row(Text(name), *("" if i == j else f"{share:.1%}" for j, share in enumerate(row)))
    return table
