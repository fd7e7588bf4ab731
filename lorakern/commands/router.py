"""`lorakern router`: what weighs adapters token by token, learned on data, into a file of routers."""

from pathlib import Path
from typing import Any

import torch

from lorakern.adapters import LoraAdapter
from lorakern.adapters.json_file import show
from lorakern.commands.console import Console, size
from lorakern.commands.learned import Clock, load_model
from lorakern.commands.plots import check_plot, write_plot
from lorakern.commands.soups import losses_png
from lorakern.commands.sources import sources
from lorakern.errors import LorakernError
from lorakern.mixture import train_router
from lorakern.mixture.routers import mode_named


def run(
    model_name: str,
    paths: list[str],
    data: Path,
    out: Path,
    options: dict[str, Any],
    console: Console,
    *,
    model_dtype: torch.dtype,
    device: torch.device | None,
    force: bool,
    plot: Path | None,
) -> None:
    """Train a router for adapters on a model and write it.

    Raises:
        LorakernError: as `lorakern.mixture.train_router`; and for adapters of one name, data that are not there and an
            OUT that may not be written, before the model is loaded.
    """
    check_plot(plot)
    if out.is_dir() or not out.absolute().parent.is_dir():
        raise LorakernError(f"{out}: --output must be a file in a directory that exists, such as router.safetensors")
    if out.exists() and not force:
        raise LorakernError(f"{out}: --output exists; give another file, or --force to replace it")
    if not data.is_file():
        raise LorakernError(f"--data {data} is no file; give a JSONL file, one record a line")
    if not mode_named(options["mode"]).learned:
        raise LorakernError(f"--mode {options['mode']} learns nothing; leave the training out")
    found = {source.name: source.path for source in sources(paths)}
    if len(found) < len(paths):
        raise LorakernError(f"ADAPTER: two have one name among {show(list(found))}; rename a directory")
    clock = Clock()
    adapters = {name: LoraAdapter.load(path) for name, path in found.items()}
    model, tokenizer = load_model(model_name, model_dtype)
    with console.progress("training") as progress:
        routers, losses = train_router(
            model.to(device or "cpu"),
            adapters,
            str(data),
            tokenizer=tokenizer,
            progress=lambda done, total, loss: progress(done, total, f"loss {loss:.4f}"),
            **options,
        )
    routers.save(out)
    if plot is not None:
        write_plot(plot, losses_png(tuple(losses)))
    written = out.stat().st_size
    result = {"output": str(out), "bytes": written, "layers": len(routers.layers), "adapters": list(adapters)}
    result |= {"options": options, "losses": losses, "seconds": clock.seconds}
    learned = f"{len(losses)} steps, loss {losses[0]:.4f} to {losses[-1]:.4f}, {clock.seconds:.1f} s"
    console.report(result, learned, f"{out}: {options['mode']}, {len(routers.layers)} layers, {size(written)}")
