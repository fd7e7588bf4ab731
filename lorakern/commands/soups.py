"""`lorakern soups`: one weight per adapter and module, learned on data, into an adapter."""

import statistics
from pathlib import Path
from typing import Any

import torch

from lorakern.commands.console import kind
from lorakern.commands.learned import Clock, Run, told
from lorakern.commands.plots import check_plot, write_plot
from lorakern.errors import LorakernError
from lorakern.merge import soups

TITLE = "LoRA adapters merged by LoRA Soups (CAT)"
WHAT = "The adapters one beside the other, with a weight for each in each module that was learned on data."


def run(run: Run, options: dict[str, Any], rank: int | float | None, plot: Path | None) -> None:
    """Learn the weights of the adapters and write the merged adapter.

    Raises:
        LorakernError: as `lorakern.merge.soups.learn`. Where a loss is not finite, the last weights of a finite one
            are written beside OUT, as OUT.last-good; OUT itself is as it was.
    """
    check_plot(plot)
    clock = Clock()
    model, tokenizer, adapters, inputs, base = run.load()
    try:
        with run.console.progress("learning") as progress:
            soup = soups.learn(
                model,
                adapters,
                str(run.data[0]),
                tokenizer=tokenizer,
                base_model_name_or_path=base,
                progress=lambda done, total, loss: progress(done, total, f"loss {loss:.4f}"),
                **options,
            )
    except LorakernError as error:
        if (last := getattr(error, "soup", None)) is None:
            raise
        beside = run.out.with_name(run.out.name + ".last-good")
        run.write(last.adapter(rank), TITLE, WHAT, inputs, described(run, options, last, rank), beside)
        raise LorakernError(f"{error} ({beside} holds them)") from None
    written = run.write(soup.adapter(rank), TITLE, WHAT, inputs, described(run, options, soup, rank), run.out)
    if plot is not None:
        write_plot(plot, losses_png(soup.losses))
    weights = {module: weights.tolist() for module, weights in soup.weights.items()}
    result = {"method": "soups", **written, "options": options, "weights": weights, "losses": list(soup.losses)}
    result |= {"inputs": [vars(source) for source in inputs], "seconds": clock.seconds}
    learned = f"{len(soup.losses)} steps, loss {soup.losses[0]:.4f} to {soup.losses[-1]:.4f}, {clock.seconds:.1f} s"
    run.console.report(result, _table(run, soup), learned, told(written))


def described(run: Run, options: dict[str, Any], soup: soups.Soup, rank: int | float | None) -> dict[str, Any]:
    """What the card says of the options and of what came out."""
    losses = f"{soup.losses[0]:.4f} to {soup.losses[-1]:.4f}" if soup.losses else "none"
    return {"model": run.model, "data": run.data[0], "rank": rank, **options, "steps": len(soup.losses), "loss": losses}


def _table(run: Run, soup: soups.Soup):
    """A line for each kind of module: the mean weight of every adapter over the modules that have it."""
    from rich.table import Table
    from rich.text import Text

    groups: dict[str, list[torch.Tensor]] = {}
    for module, weights in soup.weights.items():
        groups.setdefault(kind(module), []).append(weights)
    table = Table("modules", "count", title="mean weight")
    for name in run.adapters:
        table.add_column(Text(name))
    for name, members in groups.items():
        means = [statistics.mean(float(weights[i]) for weights in members) for i in range(len(run.adapters))]
        table.add_row(Text(name), str(len(members)), *(f"{mean:.3f}" for mean in means))
    return table


def losses_png(losses: tuple[float, ...]) -> bytes:
    """The loss of every step."""
    import io

    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 3.6), layout="constrained", dpi=150)
    axes = figure.subplots()
    axes.plot(range(1, len(losses) + 1), losses, color="#2f6db5", linewidth=1.2)
    axes.set_xlabel("step")
    axes.set_ylabel("loss")
    axes.spines[["top", "right"]].set_visible(False)
    image = io.BytesIO()
    figure.savefig(image, format="png")
    return image.getvalue()
