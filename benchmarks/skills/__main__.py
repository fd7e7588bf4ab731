"""`python -m benchmarks.skills`: train the skill adapters, score them alone, merged and composed, list them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from benchmarks.skills.recipes import FIRST, RECIPES
from benchmarks.skills.tasks import held_out_items

app = typer.Typer(no_args_is_help=True, add_completion=False, help=__doc__)
console = Console()
HERE = Path(__file__).parent
ADAPTERS = HERE / "adapters"
SCORES = HERE / "scores.json"
Names = Annotated[list[str] | None, typer.Argument(metavar="[SKILL]...", help="Skills to work on; all by default.")]
FewNames = Annotated[
    list[str] | None, typer.Argument(metavar="[SKILL]...", help="Skills to merge; by default all but reworded ones.")
]


def _chosen(names: list[str] | None, default: Iterable[str] = RECIPES) -> list[str]:
    unknown = [name for name in names or [] if name not in RECIPES]
    if unknown:
        raise typer.BadParameter(f"{', '.join(unknown)}; it takes {', '.join(RECIPES)}")
    return names or list(default)


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description:14}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total} {task.fields[note]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
    )


@app.command()
def train(
    names: Names = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")] = "cpu",
    threads: Annotated[int, typer.Option(help="CPU threads; 0 leaves torch's choice.")] = 0,
    runs: Annotated[Path, typer.Option(help="Where checkpoints live; a killed run continues from there.")] = Path(
        "runs"
    ),
) -> None:
    """Train adapters and export them to benchmarks/skills/adapters."""
    from benchmarks.skills.train import export
    from benchmarks.skills.train import train as train_skill
    from lorakern.integrations import smollm2

    if threads:
        torch.set_num_threads(threads)
    for name in _chosen(names):
        recipe = RECIPES[name]
        model, tokenizer = smollm2.load(torch.bfloat16)
        # On a CPU the fused attention's backward is slower than plain matmuls at these lengths.
        model.set_attn_implementation("eager")
        with _progress() as progress:
            bar = progress.add_task(name, total=recipe.steps, note="")

            def report(step: int, loss: float, exact: float, progress=progress, bar=bar, name=name) -> None:
                note = f"loss {loss:.3f} exact {exact:.2f}"
                progress.update(bar, completed=step, note=note)
                if step % 25 == 0:
                    progress.console.print(f"{name} step {step} {note}")

            adapter = train_skill(name, recipe, model, tokenizer, run_dir=runs / name, device=device, report=report)
        export(adapter, ADAPTERS / name, recipe.kept)
        console.print(f"{name}: exported to {ADAPTERS / name}")


@app.command("eval")
def evaluate(
    names: Names = None,
    count: Annotated[int, typer.Option(help="Held-out items a skill.")] = 200,
    threads: Annotated[int, typer.Option(help="CPU threads; 0 leaves torch's choice.")] = 0,
) -> None:
    """Score the adapters on held-out items; writes scores.json, scores.md and adapters/prompts.json."""
    from benchmarks.skills.evaluate import demo_prompts, score, table
    from lorakern.integrations import smollm2

    if threads:
        torch.set_num_threads(threads)
    chosen = _chosen(names)
    model, tokenizer = smollm2.load()
    with _progress() as progress:
        for name in chosen:
            bar = progress.add_task(name, total=2 * count, note="")
            row = score(
                model,
                tokenizer,
                name,
                ADAPTERS / name,
                count=count,
                on_batch=lambda done, bar=bar: progress.update(bar, completed=done),
            )
            progress.update(bar, note=f"base {row['base_exact_match']:.1%} adapter {row['adapter_exact_match']:.1%}")
            scores = (json.loads(SCORES.read_text()) if SCORES.exists() else {}) | {name: row}
            scores = {skill: scores[skill] for skill in RECIPES if skill in scores}
            SCORES.write_text(json.dumps(scores, indent=2) + "\n")
    SCORES.with_suffix(".md").write_text(table(scores))
    (ADAPTERS / "prompts.json").write_text(json.dumps(demo_prompts(list(scores)), indent=2) + "\n")


@app.command()
def merges(
    names: FewNames = None,
    count: Annotated[int, typer.Option(min=1, help="Held-out questions a skill and seed.")] = 10,
    seeds: Annotated[int, typer.Option(min=1, help="Seeds of the questions, of LEGO and of DARE.")] = 3,
    pairs: Annotated[int, typer.Option(min=1, help="Pairs of skills at most; skills take turns in them.")] = 20,
    out: Annotated[Path, typer.Option(help="Folder for merges.json, .md and .png; a run goes on there.")] = HERE,
    threads: Annotated[int, typer.Option(help="CPU threads; 0 leaves torch's choice.")] = 0,
) -> None:
    """Score every merge method on pairs of skills and on all that are named; a run that was stopped goes on."""
    from benchmarks.skills import merges as work
    from benchmarks.skills import merges_page
    from lorakern import LoraAdapter
    from lorakern.integrations import smollm2

    if threads:
        torch.set_num_threads(threads)
    chosen = _chosen(names, FIRST)
    if len(chosen) < 2:
        raise typer.BadParameter("it takes two skills or more")
    out.mkdir(parents=True, exist_ok=True)
    results = work.Results(out / "merges.json", work.settings(chosen, count, seeds, pairs))
    adapters = {name: LoraAdapter.load(ADAPTERS / name) for name in chosen}
    model, tokenizer = smollm2.load(torch.bfloat16)
    with _progress() as progress:
        bar = progress.add_task("answers", total=work.total(results.settings), note="")
        work.run(results, model, tokenizer, adapters, lambda n, note: progress.update(bar, advance=n, note=note))
    console.print(f"{merges_page.write(out, results)} is written")


@app.command()
def iteris(
    names: FewNames = None,
    sets: Annotated[int, typer.Option(min=1, help="Sets of four skills; skills take turns in them.")] = 2,
    samples: Annotated[int, typer.Option(min=1, help="Training questions a skill.")] = 50,
    count: Annotated[int, typer.Option(min=1, help="Held-out questions a skill and seed.")] = 25,
    seeds: Annotated[int, typer.Option(min=1, help="Seeds of the samples and of the questions.")] = 3,
    out: Annotated[Path, typer.Option(help="Folder for iteris.json, .md and .png; a run goes on there.")] = HERE,
    threads: Annotated[int, typer.Option(help="CPU threads; 0 leaves torch's choice.")] = 0,
) -> None:
    """Merge four skills by IterIS, RegMean and without data; a run that was stopped goes on."""
    from benchmarks.skills import iteris as work
    from benchmarks.skills import iteris_page
    from lorakern import LoraAdapter
    from lorakern.integrations import smollm2

    if threads:
        torch.set_num_threads(threads)
    chosen = _chosen(names, FIRST)
    if len(chosen) < 4:
        raise typer.BadParameter("it takes four skills or more")
    out.mkdir(parents=True, exist_ok=True)
    results = work.Results(out / "iteris.json", work.settings(chosen, sets, samples, count, seeds))
    adapters = {name: LoraAdapter.load(ADAPTERS / name) for name in chosen}
    model, tokenizer = smollm2.load()
    scorer, _ = smollm2.load(torch.bfloat16)
    with _progress() as progress:
        bar = progress.add_task("runs", total=sets * seeds, note="")
        work.run(
            results,
            adapters,
            model,
            scorer,
            tokenizer,
            lambda note: progress.update(bar, completed=len(results.runs), note=note),
        )
    console.print(f"{iteris_page.write(out, results)} is written")


@app.command()
def composites(
    names: Annotated[
        list[str] | None,
        typer.Argument(metavar="[COMPOSITE]...", help="Composites to ask; the committed ones by default."),
    ] = None,
    count: Annotated[int, typer.Option(min=1, help="Held-out questions a composite and seed.")] = 40,
    own: Annotated[int, typer.Option(min=1, help="Held-out questions of each skill alone, a composite and seed.")] = 20,
    seeds: Annotated[int, typer.Option(min=1, help="Seeds of the questions, the examples and the methods.")] = 3,
    quick: Annotated[
        bool, typer.Option(help="One seed, few questions, examples and steps: minutes, not an hour.")
    ] = False,
    out: Annotated[Path, typer.Option(help="Folder for composites.json, .md and .png; a run goes on there.")] = HERE,
    runs: Annotated[Path, typer.Option(help="Where learned adapters live; a killed run continues from there.")] = Path(
        "runs/composites"
    ),
    threads: Annotated[int, typer.Option(help="CPU threads; 0 leaves torch's choice.")] = 0,
) -> None:
    """Score every way to compose two skills on questions that take both; a run that was stopped goes on."""
    from benchmarks.skills import composites_page
    from benchmarks.skills import composites_run as work
    from benchmarks.skills.composites import ASKED, COMPOSITES
    from lorakern import LoraAdapter
    from lorakern.integrations import smollm2

    unknown = [name for name in names or [] if name not in COMPOSITES]
    if unknown:
        raise typer.BadParameter(f"{', '.join(unknown)}; it takes {', '.join(map(repr, COMPOSITES))}")
    if quick and out == HERE:
        raise typer.BadParameter("--quick needs an --out of its own: it would not continue the committed results")
    if threads:
        torch.set_num_threads(threads)
    chosen = tuple(names or ASKED)
    wanted = work.quick(chosen) if quick else work.Settings(chosen, count, own, seeds)
    out.mkdir(parents=True, exist_ok=True)
    results = work.Results(out / "composites.json", wanted)
    skills = {skill for name in chosen for skill in COMPOSITES[name].skills}
    adapters = {skill: LoraAdapter.load(ADAPTERS / skill) for skill in skills}
    model, tokenizer = smollm2.load(torch.bfloat16)
    with _progress() as progress:
        bar = progress.add_task("answers", total=wanted.answers * len(wanted.parts()), note="")

        def report(answers: int, note: str) -> None:
            progress.update(bar, advance=answers, note=note)

        for _ in work.run(results, model, tokenizer, adapters, runs, report):
            progress.console.print(f"{composites_page.write(out, results)}: {len(results.missing())} parts to go")
    console.print(f"{composites_page.write(out, results)} is written")


@app.command()
def ramole(
    names: Names = None,
    count: Annotated[int, typer.Option(min=1, help="Held-out questions a skill and seed.")] = 10,
    seeds: Annotated[int, typer.Option(min=1, help="Seeds of what is trained on, of samples and of questions.")] = 3,
    steps: Annotated[int, typer.Option(min=1, help="Steps of the router.")] = 60,
    rate: Annotated[float, typer.Option(help="Learning rate of the router.")] = 4e-3,
    dropout: Annotated[float, typer.Option(help="The probability that an adapter is left out of a row.")] = 0.0,
    empty: Annotated[int, typer.Option(help="Adapters that add nothing in every row of the router.")] = 7,
    out: Annotated[Path, typer.Option(help="Folder for ramole.json, .md and .png; a run goes on there.")] = HERE,
    runs: Annotated[Path, typer.Option(help="Where what is trained lives; a killed run continues from there.")] = Path(
        "runs/ramole"
    ),
    threads: Annotated[int, typer.Option(help="CPU threads; 0 leaves torch's choice.")] = 0,
) -> None:
    """Retrieve adapters for questions and compose them in every way; a run that was stopped goes on."""
    from benchmarks.skills import ramole as work
    from benchmarks.skills import ramole_page
    from lorakern.integrations import smollm2

    if threads:
        torch.set_num_threads(threads)
    chosen = _chosen(names)
    if len(chosen) < 5:
        raise typer.BadParameter("it takes five skills or more, two of them to train on")
    pools = tuple(size for size in (4, 8, 12) if size < len(chosen))
    wanted = work.Settings(tuple(chosen), count, seeds, pools, 60, 100, steps, 60, 8, rate, dropout, empty)
    out.mkdir(parents=True, exist_ok=True)
    results = work.Results(out / "ramole.json", wanted)
    router_model, tokenizer = smollm2.load()
    model, _ = smollm2.load(torch.bfloat16)
    with _progress() as progress:
        bar = progress.add_task("seeds", total=seeds, note="")
        work.run(
            results,
            ADAPTERS,
            runs,
            model,
            router_model,
            tokenizer,
            lambda note: progress.update(bar, completed=len(results.runs), note=note),
        )
    console.print(f"{ramole_page.write(out, results)} is written")


@app.command("list")
def list_skills() -> None:
    """Show every skill, its adapter's shape and one held-out item."""
    table = Table("skill", "rank", "alpha", "targets", "prompt", "answer")
    for name, recipe in RECIPES.items():
        prompt, answer = held_out_items(name, 1)[0]
        targets = " ".join(target.removesuffix("_proj") for target in recipe.targets)
        table.add_row(name, str(recipe.rank), str(recipe.alpha), targets, prompt, answer)
    console.print(table)


if __name__ == "__main__":
    app()
