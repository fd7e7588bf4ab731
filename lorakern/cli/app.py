"""The commands put together."""

from __future__ import annotations

from typing import Annotated

import typer

import lorakern
from lorakern.cli import files, learned, machine, serving

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


def _version(show: bool) -> None:
    if show:
        print(lorakern.__version__)
        raise typer.Exit


@app.callback()
def start(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it and exit.")
    ] = False,
) -> None:
    """Kernels for multi-LoRA math."""


on_files = (files.merge, files.resize, files.check, files.inspect, files.lego_map)
with_data = (learned.soups, learned.iteris, learned.lorahub, learned.router)
for function in (*on_files, *with_data, serving.serve, machine.info, machine.demo, machine.bench):
    app.command()(function)
