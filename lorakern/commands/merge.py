"""`lorakern merge`: adapters from their files, merged module by module, into a file."""

from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from lorakern.adapters import AdapterFile, AdapterWriter
from lorakern.adapters.json_file import show
from lorakern.adapters.peft_files import WEIGHTS_NAME
from lorakern.commands.card import Input, card
from lorakern.commands.console import Console, size, span
from lorakern.commands.plan import plan, plan_table
from lorakern.commands.sources import Source, base_model, check_output, opened
from lorakern.errors import LorakernError
from lorakern.merge.driver import PerModule, check_arguments, merge_modules
from lorakern.merge.inputs import Inputs, check_adapters, shared_config
from lorakern.merge.registry import find


@dataclass(frozen=True)
class Job:
    """A merge as a command line or a recipe describes it; the fields are the arguments of `lorakern.merge.merge`.

    `per_module` makes merge's argument of that name from the modules there are, as the number of layers is not known
    before; `recipe` is the text that the job was read from.
    """

    sources: tuple[Source, ...]
    method: str = "cat"
    weights: list[float] | None = None
    rank: int | float | None = None
    dtype: torch.dtype | None = None
    seed: int = 0
    normalize: bool = False
    missing: str = "zero"
    base_model: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    per_module: Callable[[Collection[str]], PerModule] | None = None
    recipe: str | None = None


def read_options(method: str, settings: Sequence[str], given: Mapping[str, Any]) -> dict[str, Any]:
    """The method's options from ``name=value`` words, read as the registry types them, and from flags of their own."""
    known = find(method).options
    options = {name: value for name, value in given.items() if value is not None}
    for setting in settings:
        name, equals, text = setting.partition("=")
        if not equals:
            raise LorakernError(f"--set must be name=value, such as --set density=0.5, got {show(setting)}")
        if name in options:
            raise LorakernError(f"--set {name} is given twice, or beside its own flag; give it once")
        options[name] = text
    return {
        name: known[name].parse(value) if name in known and isinstance(value, str) else value
        for name, value in options.items()
    }


def run(
    job: Job,
    out: Path,
    *,
    device: torch.device | None = None,
    force: bool = False,
    dry_run: bool = False,
    console: Console,
    command: str,
) -> None:
    """Merge the adapters of `job` into the folder `out`, or with `dry_run` only say what would come of it.

    Raises:
        LorakernError: an adapter that cannot be read or does not fit the others, arguments that the method does not
            take, or an `out` that exists (unless `force`) or is an input. `out` is as it was then.
    """
    check_output(out, job.sources, force)
    with opened(job.sources) as adapters, ThreadPoolExecutor(1) as hashing:
        how = "base_model in the recipe" if job.recipe else "--base-model"
        base = base_model(job.sources, adapters, job.base_model, how)
        check_adapters(adapters)
        config = shared_config(adapters, base or None)
        arguments, per_module = checked_arguments(job, adapters)
        told = described(job)
        result = {"output": str(out), "written": not dry_run, **told, "options": dict(job.options)}
        digests = [hashing.submit(adapter.sha256) for adapter in adapters]
        if dry_run:
            result["inputs"] = inputs_json(job, adapters, digests)
            with console.progress("checking") as progress:
                planned = plan(adapters, job.method, arguments, per_module, job.dtype, progress)
            result |= {"modules": [vars(module) for module in planned]}
            result["bytes"] = sum(module.bytes for module in planned)
            console.report(result, *plan_table(planned, job, out))
            return
        arguments["device"] = device
        ranks, dtypes = {}, set()
        with AdapterWriter(out, **config) as writer, console.progress("merging") as progress:
            merged = merge_modules(
                adapters, job.method, dtype=job.dtype, per_module=per_module, progress=progress, **arguments
            )
            for module, factors in merged:
                writer.add(module, factors)
                ranks[module] = factors.rank
                dtypes.add(str(factors.A.dtype).removeprefix("torch."))
            inputs = result["inputs"] = inputs_json(job, adapters, digests)
            writer.card = card(
                f"LoRA adapters merged by {job.method}",
                find(job.method).summary,
                [Input(source["path"], source["sha256"], _weight(source["weight"])) for source in inputs],
                {name: value for name, value in told.items() if value is not None} | dict(job.options),
                command,
                base_model=base,
                recipe=job.recipe,
            )
    written = (out / WEIGHTS_NAME).stat().st_size
    result |= {"modules": [{"module": module, "rank": rank} for module, rank in ranks.items()], "bytes": written}
    found = f"{len(ranks)} modules, rank {span(list(ranks.values()))}, {', '.join(sorted(dtypes))}, {size(written)}"
    console.report(result, f"{out}: {job.method} of {len(inputs)} adapters: {found}")


def checked_arguments(job: Job, adapters: Sequence[AdapterFile]) -> tuple[dict[str, Any], PerModule | None]:
    """The arguments of `merge_modules`, which were checked for every module, as were the shapes in the files."""
    method = find(job.method)
    shapes = [adapter.shapes() for adapter in adapters]
    modules = list(dict.fromkeys(module for adapter in shapes for module in adapter))
    inputs = Inputs(adapters, normalize=job.normalize, missing=job.missing, device=None)
    for module in modules:
        inputs.check(module, {i: adapter[module][1:] for i, adapter in enumerate(shapes) if module in adapter})
    given = {"weights": job.weights, "rank": job.rank, **job.options}
    per_module = job.per_module and job.per_module(modules)
    for module in modules if per_module else ():
        check_arguments(method, given | per_module(module), len(adapters))
    if per_module is None:
        check_arguments(method, given, len(adapters))
    settings = {"seed": job.seed, "normalize": job.normalize, "missing": job.missing}
    return given | settings, per_module


def described(job: Job) -> dict[str, Any]:
    """What the job asks for besides the method's options, as plain data."""
    dtype = None if job.dtype is None else str(job.dtype).removeprefix("torch.")
    told = {"method": job.method, "rank": job.rank, "dtype": dtype, "seed": job.seed}
    return told | {"normalize": job.normalize, "missing": job.missing}


def inputs_json(job: Job, adapters: Sequence[AdapterFile], digests: Sequence[Future[str]]) -> list[dict[str, Any]]:
    """The inputs as plain data; a weight that a recipe gives by module is None."""
    weights = job.weights or [None if job.per_module else 1.0] * len(adapters)
    return [
        {"path": source.name, "sha256": digest.result(), "modules": len(adapter), "weight": weight}
        for source, adapter, digest, weight in zip(job.sources, adapters, digests, weights, strict=True)
    ]


def _weight(weight: float | None) -> str:
    return "in the recipe" if weight is None else f"{weight:g}"
