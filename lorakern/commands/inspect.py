"""`lorakern inspect`: ranks, scales, norms and spectra of an adapter, module by module."""

import io
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from lorakern.adapters.json_file import show
from lorakern.commands.console import Console, kind, span
from lorakern.commands.plots import check_plot, write_plot
from lorakern.commands.sources import on_device, opened, sources
from lorakern.ops import truncate


def run(
    name: str,
    *,
    device: torch.device | None = None,
    every: bool = False,
    plot: Path | None = None,
    console: Console,
) -> None:
    """Report on the adapter `name`: a line for each kind of module, or with `every` for each module.

    With the singular values sigma of scale * B @ A: ``norm = sqrt(sum sigma^2)``; the effective rank is
    ``exp(-sum p log p)`` for ``p = sigma / sum sigma`` (Roy and Vetterli, 2007); rank_90 and rank_99 are the fewest
    ranks that hold those shares of the energy ``sum sigma^2``.

    Raises `LorakernError` for an adapter that cannot be read and a `plot` that cannot be written.
    """
    check_plot(plot)
    with opened(sources([name])) as (adapter,):
        modules = []
        with console.progress("reading") as progress:
            for done, module in enumerate(adapter, 1):
                A, B, scale = on_device(adapter[module], device)
                sigma = truncate([(A, B, scale)], A.shape[0], dtype=torch.float64).singular_values
                shape = {"rank": A.shape[0], "d_in": A.shape[1], "d_out": B.shape[0], "scale": scale}
                dtype = str(torch.promote_types(A.dtype, B.dtype)).removeprefix("torch.")
                modules.append({"module": module, **shape, "dtype": dtype} | spectrum(sigma))
                progress(done, len(adapter), module)
        config, digest = adapter.config, adapter.sha256()
    parameters = sum(module["rank"] * (module["d_in"] + module["d_out"]) for module in modules)
    norm = math.sqrt(sum(module["norm"] ** 2 for module in modules))
    facts = {
        "path": name,
        "sha256": digest,
        "base_model": config.base_model_name_or_path,
        "use_rslora": config.use_rslora,
        "parameters": parameters,
        "norm": norm,
    }
    if plot is not None:
        write_plot(plot, _image(name, modules))
    told = [
        f"base model: {config.base_model_name_or_path or 'not named'}",
        f"{len(modules)} modules, {parameters:,} parameters, {_values(modules, 'dtype')}, norm {norm:.4g}",
        f"SHA-256 {digest}",
    ]
    console.report(facts | {"modules": modules}, _table(modules, every), f"{name}: {'; '.join(told)}")


def spectrum(sigma: torch.Tensor) -> dict[str, Any]:
    """What the singular values, in descending order, say of an update.

    >>> found = spectrum(torch.tensor([1.0, 1.0, 0.0, 0.0], dtype=torch.float64))
    >>> round(found["norm"], 4), round(found["effective_rank"], 4), found["rank_90"], found["rank_99"]
    (1.4142, 2.0, 2, 2)
    """
    energy = sigma.square()
    total = float(energy.sum())
    shares = sigma / sigma.sum() if total else sigma
    ranks = {
        f"rank_{share:.0%}".rstrip("%"): int((energy.cumsum(0) < share * total).sum()) + 1 if total else 0
        for share in (0.90, 0.99)
    }
    effective = math.exp(-float(torch.special.xlogy(shares, shares).sum())) if total else 0.0
    found = {"norm": math.sqrt(total), "effective_rank": effective, **ranks}
    return found | {"singular_values": sigma.tolist()}


def _table(modules: Sequence[dict[str, Any]], every: bool):
    from rich.table import Table
    from rich.text import Text

    groups: dict[tuple, list[dict[str, Any]]] = {}
    for module in modules:
        name = module["module"] if every else kind(module["module"])
        groups.setdefault((name, module["d_out"], module["d_in"]), []).append(module)
    columns = ("modules", "count", "d_out x d_in", "rank", "scale", "norm", "largest sigma", "smallest")
    table = Table(*columns, "effective rank", "90 %", "99 %")
    for (name, d_out, d_in), members in groups.items():
        largest, smallest = ([module["singular_values"][end] for module in members] for end in (0, -1))
        table.add_row(
            Text(name),
            str(len(members)),
            f"{d_out} x {d_in}",
            _values(members, "rank"),
            _values(members, "scale", "{:.4g}"),
            _values(members, "norm", "{:.3g}"),
            span(largest, "{:.3g}"),
            span(smallest, "{:.1e}"),
            _values(members, "effective_rank", "{:.1f}"),
            _values(members, "rank_90"),
            _values(members, "rank_99"),
        )
    return table


def _values(modules: Sequence[dict[str, Any]], key: str, form: str = "{}") -> str:
    return span([module[key] for module in modules], form)


def _image(name: str, modules: Sequence[dict[str, Any]]) -> bytes:
    """A PNG: norms and effective ranks over the layers, and spectra, in a colour for each kind of module."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    groups: dict[str, list[dict[str, Any]]] = {}
    for module in modules:
        groups.setdefault(kind(module["module"]), []).append(module)
    figure = Figure(figsize=(13, 4.2), layout="constrained", dpi=130)
    norms, ranks, spectra = figure.subplots(1, 3)
    colors = colormaps["tab10" if len(groups) <= 10 else "turbo"]
    for place, (label, members) in enumerate(groups.items()):
        color = colors(place if len(groups) <= 10 else place / (len(groups) - 1))
        # files are often in the order of the letters: layers 1, 10, 11, 2
        placed = sorted(enumerate(members), key=lambda item: _layer(item[1]["module"], item[0]))
        layers, members = [_layer(module["module"], number) for number, module in placed], [m for _, m in placed]
        style = {"color": color, "marker": "o", "markersize": 3, "linewidth": 1}
        norms.plot(layers, [module["norm"] for module in members], label=label, **style)
        ranks.plot(layers, [module["effective_rank"] for module in members], **style)
        for module in members:
            values = module["singular_values"]
            spectra.plot(range(1, len(values) + 1), values, color=color, alpha=0.35, linewidth=0.8)
    for axes, title, below in (
        (norms, "Frobenius norm of the update", "layer"),
        (ranks, "effective rank", "layer"),
        (spectra, "singular values, a line for each module", "rank"),
    ):
        axes.set_title(title, fontsize=10)
        axes.set_xlabel(below)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(True, axis="y", color="#e4e4e4", linewidth=0.7)
    if any(value > 0 for module in modules for value in module["singular_values"]):
        spectra.set_yscale("log")
    figure.suptitle(show(name).strip("'"), fontsize=10, parse_math=False)
    figure.legend(loc="outside lower center", ncols=min(4, len(groups)), frameon=False, fontsize=8)
    image = io.BytesIO()
    figure.savefig(image, format="png")
    return image.getvalue()


def _layer(module: str, otherwise: int) -> int:
    """The first number in the path, or the place in the file."""
    found = re.search(r"(?<![^._])\d+(?![^._])", module)
    return int(found[0]) if found else otherwise
