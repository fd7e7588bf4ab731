"""Commands that learn from data on the model: soups, iteris, lorahub and router."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lorakern.cli.files import Device, Dtype, Force, Json, Output, Quiet, Seed

Model = Annotated[str, typer.Argument(metavar="MODEL", help="A directory or name of transformers, or smollm2.")]
Adapters = Annotated[list[str], typer.Argument(metavar="ADAPTER...", help="Directories, or .safetensors files.")]
Few = Annotated[
    Path, typer.Option("--data", metavar="FEW.jsonl", help='A record {"text"} or {"prompt", "answer"} a line.')
]
ModelDtype = Annotated[str, typer.Option(help="Of the model: float32, bfloat16 or float16.")]
Base = Annotated[str | None, typer.Option(help="To write where the adapters name different ones.")]
Rank = Annotated[str | None, typer.Option(help="Of the result, at most; or a share of the energy: 0.95.")]
Batch = Annotated[int, typer.Option(help="Examples a step.")]


def soups(
    context: typer.Context,
    model: Model,
    adapters: Adapters,
    data: Few,
    output: Output,
    parametrisation: Annotated[str, typer.Option(help="softmax (weights sum to 1) or free.")] = "softmax",
    init: Annotated[str, typer.Option(help="zero, a seed of N(0, 1), or a number for each adapter: 1 1.")] = "zero",
    lr: Annotated[float, typer.Option(help="The highest learning rate.")] = 1e-4,
    epochs: Annotated[int, typer.Option(help="Passes over the data.")] = 1,
    batch_size: Batch = 6,
    warmup: Annotated[int, typer.Option(help="Steps over which the learning rate rises.")] = 100,
    cutoff: Annotated[int, typer.Option(help="The most tokens of an example.")] = 256,
    seed: Seed = 0,
    rank: Rank = None,
    plot: Annotated[Path | None, typer.Option(help="Write the loss of every step as a PNG.")] = None,
    model_dtype: ModelDtype = "float32",
    dtype: Dtype = None,
    base_model: Base = None,
    device: Device = None,
    force: Force = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Learn a weight for each adapter in each module (LoRA Soups, CAT), and write the merged adapter.

    \b
    lorakern soups MODEL A B --data few.jsonl -o OUT --lr 0.01 --epochs 5

    \b
    Prompts and answers are taken as they are: put a chat template into them.
    Where a loss is not finite, OUT is left alone and OUT.last-good gets the
    weights of the last finite one.
    """
    from lorakern.commands import soups as work
    from lorakern.commands.sources import read_rank

    options = {"parametrisation": parametrisation, "init": _init(init), "lr": lr, "epochs": epochs}
    options |= {"batch_size": batch_size, "warmup": warmup, "cutoff": cutoff, "seed": seed}
    run = _run(context, model, adapters, [data], output, model_dtype, dtype, base_model, device, force, json, quiet)
    work.run(run, options, read_rank(rank), plot)


def lorahub(
    context: typer.Context,
    model: Model,
    adapters: Adapters,
    data: Few,
    output: Output,
    budget: Annotated[int, typer.Option(help="Candidates to score.")] = 40,
    bound: Annotated[float, typer.Option(help="The largest magnitude of a weight.")] = 1.5,
    l1: Annotated[float, typer.Option(help="The factor of the mean magnitude in the score.")] = 0.05,
    combine: Annotated[str, typer.Option(help="lorahub_linear, as published, or cat, without cross terms.")] = (
        "lorahub_linear"
    ),
    optimizer: Annotated[
        str, typer.Option(help="one-plus-one, or nevergrad (pip install nevergrad).")
    ] = "one-plus-one",
    batch_size: Batch = 6,
    cutoff: Annotated[int, typer.Option(help="The most tokens of an example.")] = 256,
    seed: Seed = 0,
    rank: Annotated[int | None, typer.Option(help="Of the result, at most; with --combine cat.")] = None,
    model_dtype: ModelDtype = "float32",
    dtype: Dtype = None,
    base_model: Base = None,
    device: Device = None,
    force: Force = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Search for a weight for each adapter on a few examples (LoraHub), and write the merged adapter.

    \b
    lorakern lorahub MODEL A B C --data few.jsonl -o OUT
    """
    from lorakern.commands import lorahub as work

    options = {"budget": budget, "bound": bound, "l1": l1, "combine": combine}
    options |= {"batch_size": batch_size, "cutoff": cutoff, "seed": seed}
    run = _run(context, model, adapters, [data], output, model_dtype, dtype, base_model, device, force, json, quiet)
    work.run(run, options, optimizer, rank)


def iteris(
    context: typer.Context,
    model: Model,
    adapters: Adapters,
    data: Annotated[
        list[Path], typer.Option("--data", metavar="A.jsonl B.jsonl ...", help="Samples of each adapter's task.")
    ],
    output: Output,
    rank: Rank = None,
    fold: Annotated[bool, typer.Option("--fold", help="Write the whole model, not an adapter.")] = False,
    regmean: Annotated[bool, typer.Option("--regmean", help="RegMean: one sweep, lambda = 1.")] = False,
    iterations: Annotated[int | None, typer.Option(help="Sweeps; else 10.")] = None,
    alpha: Annotated[float | None, typer.Option(help="The regulariser; else 1e-5, of RegMean 0.")] = None,
    lambda_source: Annotated[str | None, typer.Option(help="full, delta or none; else full.")] = None,
    target: Annotated[str, typer.Option(help="What is fitted: delta, or the full weight.")] = "delta",
    coefficients: Annotated[
        str | None, typer.Option(metavar="C1 C2 ...", help="A number of at least 0 for each adapter.")
    ] = None,
    max_memory: Annotated[str | None, typer.Option(help="Of the sums that are kept at once: 2GB.")] = None,
    max_length: Annotated[int, typer.Option(help="The most tokens of a sample.")] = 256,
    batch_size: Annotated[int, typer.Option(help="Samples in a batch.")] = 8,
    state: Annotated[Path | None, typer.Option(help="Keeps the last whole sweep; a killed run goes on there.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Write the objective of every sweep as a PNG.")] = None,
    model_dtype: ModelDtype = "float32",
    dtype: Dtype = None,
    base_model: Base = None,
    device: Device = None,
    force: Force = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Merge adapters so that each layer does on every task what its own adapter did (IterIS, RegMean).

    \b
    lorakern iteris MODEL A B C --data a.jsonl b.jsonl c.jsonl -o OUT --rank 32

    \b
    Some 50 samples a task are enough; those that go with the adapters, in their
    order: {"text"} or {"prompt", "answer"} a line, joined as they are.
    """
    from lorakern.commands import iteris as work
    from lorakern.commands.sources import read_rank, read_weights
    from lorakern.errors import LorakernError

    own = {"iterations": iterations, "lambda_source": lambda_source}
    options = {name: value for name, value in own.items() if value is not None}
    if regmean and options:
        flag = next(iter(options)).replace("_", "-")
        raise LorakernError(f"--{flag} does not go with --regmean, which has one sweep and lambda = 1")
    if lambda_source == "none":
        options["lambda_source"] = None
    options |= {} if alpha is None else {"alpha": alpha}
    options |= {"target": target, "max_length": max_length, "batch_size": batch_size}
    options |= {"coefficients": read_weights(coefficients, "--coefficients"), "max_memory": work.read_size(max_memory)}
    options |= {"state": None if state is None else str(state)}
    run = _run(context, model, adapters, data, output, model_dtype, dtype, base_model, device, force, json, quiet)
    work.run(run, options, regmean=regmean, rank=read_rank(rank), fold=fold, plot=plot)


def router(
    model: Model,
    adapters: Adapters,
    data: Few,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="OUT", help="The .safetensors file to write.")],
    mode: Annotated[str, typer.Option(help="ramole, or mole, lora_flow, meteora or milora.")] = "ramole",
    rank: Annotated[int, typer.Option(help="Of the router, for ramole.")] = 8,
    steps: Annotated[int, typer.Option(help="In all; the data are gone over as often as needed.")] = 100,
    batch_size: Batch = 8,
    lr: Annotated[float, typer.Option(help="The highest learning rate.")] = 5e-3,
    warmup: Annotated[int, typer.Option(help="Steps over which the learning rate rises.")] = 10,
    dropout: Annotated[float, typer.Option(help="The probability that an adapter is left out of a row.")] = 0.5,
    empty: Annotated[int, typer.Option(help="Adapters that add nothing in every row besides, for ramole.")] = 0,
    cutoff: Annotated[int, typer.Option(help="The most tokens of an example.")] = 256,
    seed: Seed = 0,
    state: Annotated[Path | None, typer.Option(help="Keeps what is learned; a killed run goes on there.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Write the loss of every step as a PNG.")] = None,
    model_dtype: ModelDtype = "float32",
    device: Device = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the file OUT.")] = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Train the router of a mixture (RAMoLE) on the tasks of its adapters, for `lorakern.mixture.MixtureModel`.

    \b
    lorakern router MODEL A B C --data mixed.jsonl -o router.safetensors

    \b
    The base model and the adapters are frozen. Adapters that come later need no
    training with mode ramole; the other modes are for the adapters given.
    """
    from lorakern.commands import router as work
    from lorakern.commands.console import Console
    from lorakern.commands.sources import read_device, read_dtype

    options = {"mode": mode, "rank": rank, "steps": steps, "batch_size": batch_size, "lr": lr, "warmup": warmup}
    options |= {"dropout": dropout, "empty": empty, "cutoff": cutoff, "seed": seed}
    options |= {"state": None if state is None else str(state)}
    work.run(
        model,
        adapters,
        data,
        output,
        options,
        Console(json=json, quiet=quiet),
        model_dtype=read_dtype(model_dtype, "--model-dtype"),
        device=read_device(device),
        force=force,
        plot=plot,
    )


def _run(context, model, adapters, data, output, model_dtype, dtype, base_model, device, force, json, quiet):
    from lorakern.commands.console import Console
    from lorakern.commands.learned import Run
    from lorakern.commands.sources import read_device, read_dtype

    return Run(
        model,
        adapters,
        data,
        output,
        Console(json=json, quiet=quiet),
        context.obj,
        model_dtype=read_dtype(model_dtype, "--model-dtype"),
        dtype=read_dtype(dtype),
        device=read_device(device),
        base_model=base_model,
        force=force,
    )


def _init(text: str) -> str | int | list[float]:
    """The start of the weights, as `lorakern.merge.soups.learn` takes it: one integer is a seed."""
    from lorakern.commands.sources import read_weights

    if text == "zero":
        return text
    try:
        return int(text)
    except ValueError:
        return read_weights(text, "--init")
