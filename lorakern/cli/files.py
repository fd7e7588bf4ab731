"""Commands on adapter files: merge, resize, check, inspect and lego-map. Their work is done in lorakern.commands."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lorakern.errors import LorakernError
from lorakern.merge import methods

METHODS = ", ".join(sorted(methods))

Output = Annotated[Path, typer.Option("--output", "-o", metavar="OUT", help="The directory to write.")]
Device = Annotated[str | None, typer.Option(help="Where to compute: cpu (the default), cuda, cuda:1.")]
Dtype = Annotated[str | None, typer.Option(help="Of the result: float16, bfloat16, float32 or float64.")]
Weights = Annotated[
    str | None, typer.Option(metavar="W1 W2 ...", help="A number for each adapter; else 1: a sum, no mean.")
]
Force = Annotated[bool, typer.Option("--force", help="Replace the adapter that OUT holds.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Check everything, say what would come, write nothing.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as one JSON object.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")]
All = Annotated[bool, typer.Option("--all", help="A line for every module.")]
Seed = Annotated[int, typer.Option(help="Of everything random.")]


def merge(
    context: typer.Context,
    adapters: Annotated[list[str], typer.Argument(metavar="ADAPTER... | RECIPE.yaml", help="Files or directories.")],
    output: Output,
    method: Annotated[str | None, typer.Option("--method", "-m", help=f"{METHODS}; else cat.")] = None,
    weights: Weights = None,
    rank: Annotated[str | None, typer.Option(help="Of the result, at most; or a share of the energy: 0.95.")] = None,
    density: Annotated[str | None, typer.Option(help="Share of entries that TIES and the like keep.")] = None,
    majority_sign: Annotated[str | None, typer.Option(help="How TIES elects signs: total or frequency.")] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="Any option of the method."),
    ] = None,
    dtype: Dtype = None,
    seed: Annotated[int | None, typer.Option(help="Of everything random; else 0.")] = None,
    missing: Annotated[str | None, typer.Option(help="What a lacking module is: zero, skip or error.")] = None,
    normalize: Annotated[bool, typer.Option("--normalize", help="Divide the weights by their sum.")] = False,
    base_model: Annotated[str | None, typer.Option(help="To write where the adapters name different ones.")] = None,
    device: Device = None,
    force: Force = False,
    dry_run: DryRun = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Merge adapters into one, from their files and without the base model.

    \b
    lorakern merge A B C -o OUT --method ties --weights 0.5 0.3 0.2 \\
        --rank 16 --density 0.5

    \b
    An ADAPTER is a PEFT directory, or a .safetensors file of PEFT, kohya or
    diffusers. OUT becomes a PEFT directory with a model card. A RECIPE says the
    same in YAML, where a parameter may differ by model, layer and module:

    \b
    merge_method: ties
    models:
      - model: adapters/math              # relative to the recipe
        parameters: {weight: 0.5, density: 0.4}
      - model: adapters/poet
        parameters: {weight: [0.2, 0.8]}  # first layer to last, a gradient
    parameters:                           # rank, normalize, the method's own
      rank: 16
      density: [{filter: mlp, value: 0.2}, {value: 0.5}]   # by parts of names
    dtype: bfloat16                       # also: seed, missing, base_model
    """
    from lorakern.commands import merge as work
    from lorakern.commands import sources

    described = {
        "method": method,
        "weights": weights,
        "rank": rank,
        "density": density,
        "majority-sign": majority_sign,
        "set": set_ or None,
        "dtype": dtype,
        "seed": seed,
        "missing": missing,
        "normalize": normalize or None,
        "base-model": base_model,
    }
    if recipes := [name for name in adapters if name.endswith((".yaml", ".yml"))]:
        if len(adapters) > 1:
            raise LorakernError(f"{recipes[0]}: a recipe names all adapters itself; give it alone")
        if given := [name for name, value in described.items() if value is not None]:
            raise LorakernError(f"{recipes[0]}: --{given[0]} belongs in the recipe; write it there")
        from lorakern.commands.recipe import read_recipe

        job = read_recipe(recipes[0])
    else:
        method = "cat" if method is None else method
        flags = {"density": density, "majority_sign_method": majority_sign}
        job = work.Job(
            sources.sources(adapters),
            method,
            weights=sources.read_weights(weights),
            rank=None if rank is None else sources.read_rank(rank),
            dtype=sources.read_dtype(dtype),
            seed=seed or 0,
            normalize=normalize,
            missing="zero" if missing is None else missing,
            base_model=base_model,
            options=work.read_options(method, set_ or [], flags),
        )
    at = sources.read_device(device)
    console = _console(json, quiet)
    work.run(job, output, device=at, force=force, dry_run=dry_run, console=console, command=context.obj)


def resize(
    context: typer.Context,
    adapter: Annotated[str, typer.Argument(help="A directory, or a .safetensors file.")],
    output: Output,
    rank: Annotated[str, typer.Option(help="Ranks to keep, or the share of the energy to keep: 0.95.")],
    dtype: Dtype = None,
    device: Device = None,
    force: Force = False,
    dry_run: DryRun = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write an adapter at another rank: each module the best approximation, by singular value decomposition."""
    from lorakern.commands import resize as work
    from lorakern.commands import sources

    options = {"dtype": sources.read_dtype(dtype), "device": sources.read_device(device)}
    flags = {"force": force, "dry_run": dry_run, "console": _console(json, quiet), "command": context.obj}
    work.run(adapter, output, sources.read_rank(rank), **options, **flags)


def check(
    adapters: Annotated[list[str], typer.Argument(help="Directories, or .safetensors files.")],
    merged: Annotated[str, typer.Option(metavar="OUT", help="The adapter that is to be their weighted sum.")],
    weights: Weights = None,
    rtol: Annotated[float | None, typer.Option(help="Allow this relative error, not that of rounding.")] = None,
    probe: Annotated[bool, typer.Option("--probe", help="Also run random inputs through the serving kernels.")] = False,
    seed: Seed = 0,
    device: Device = None,
    all: All = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Check that a merged adapter is the weighted sum of others, module by module; exit 1 if it is not."""
    from lorakern.commands import check as work
    from lorakern.commands import sources

    options = {"weights": sources.read_weights(weights), "rtol": rtol, "probe": probe, "seed": seed}
    where = {"device": sources.read_device(device), "every": all, "console": _console(json, quiet)}
    if not work.run(adapters, merged, **options, **where):
        raise typer.Exit(1)


def inspect(
    adapter: Annotated[str, typer.Argument(help="A directory, or a .safetensors file.")],
    plot: Annotated[Path | None, typer.Option(help="Write norms, effective ranks and spectra as a PNG.")] = None,
    device: Device = None,
    all: All = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Show an adapter's ranks, scales, norms, spectra and effective ranks."""
    from lorakern.commands import inspect as work
    from lorakern.commands import sources

    work.run(adapter, device=sources.read_device(device), every=all, plot=plot, console=_console(json, quiet))


def lego_map(
    adapters: Annotated[list[str], typer.Argument(help="Directories, or .safetensors files.")],
    rank: Annotated[str | None, typer.Option(help="Clusters, or the share of the energy to keep: 0.95.")] = None,
    weights: Weights = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="Any option of the method lego."),
    ] = None,
    seed: Seed = 0,
    missing: Annotated[str, typer.Option(help="What a lacking module is: zero, skip or error.")] = "zero",
    base_model: Annotated[str | None, typer.Option(help="Theirs, where the adapters name different ones.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Write the clusters of every module as a PNG.")] = None,
    device: Device = None,
    all: All = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Show which adapter's ranks a merge by LoRA-LEGO puts into which cluster; nothing is merged."""
    from lorakern.commands import lego_map as work
    from lorakern.commands import sources
    from lorakern.commands.merge import read_options

    work.run(
        sources.sources(adapters),
        rank=None if rank is None else sources.read_rank(rank),
        weights=sources.read_weights(weights),
        seed=seed,
        missing=missing,
        base=base_model,
        options=read_options("lego", set_ or [], {}),
        device=sources.read_device(device),
        every=all,
        plot=plot,
        console=_console(json, quiet),
    )


def _console(json: bool, quiet: bool):
    from lorakern.commands.console import Console

    return Console(json=json, quiet=quiet)
