"""The command that serves: `lorakern serve`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lorakern.cli.learned import ModelDtype

MB = 1 << 20


def serve(
    adapters: Annotated[Path, typer.Option(help="The folder of uploaded adapters; made if it is not there.")],
    model: Annotated[str, typer.Option(help="A directory or name of transformers, or smollm2.")] = "smollm2",
    host: Annotated[str, typer.Option(help="Beyond this machine only with a key.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
    mode: Annotated[
        str | None, typer.Option(help="How adapters are composed: selection, fusion, mixture or arrow; else mixture.")
    ] = None,
    k: Annotated[int, typer.Option(min=1, help="Adapters a request.")] = 3,
    router: Annotated[Path | None, typer.Option(help="What `lorakern router` learned; it says the mode.")] = None,
    dtype: ModelDtype = "float32",
    api_key: Annotated[
        str | None,
        typer.Option(envvar="LORAKERN_API_KEY", show_default=False, help="What uploads and deletions need."),
    ] = None,
    max_upload: Annotated[int, typer.Option(min=1, help="Megabytes of an adapter's weights.")] = 256,
    max_requests: Annotated[int, typer.Option(min=1, help="Completions that run or wait at once.")] = 256,
) -> None:
    """Serve a model over HTTP with adapters that come and go: OpenAI's API, and a page.

    \b
    lorakern serve --adapters adapters
    curl -F name=poet -F config=@adapter_config.json \\
      -F weights=@adapter_model.safetensors http://127.0.0.1:8000/adapters

    \b
    A request names its model: an adapter, "base", or "auto", which finds the
    adapters that the prompt needs by the sample texts they were uploaded with.
    """
    import lorakern.serve as server
    from lorakern.commands.sources import read_dtype
    from lorakern.serve import engine, guards, run

    run.limit_arenas()
    guards.check_start(host, api_key)
    run.check_folder(adapters)
    run.log_to_stderr()
    built, retriever, template = engine.build(model, read_dtype(dtype, "--dtype"), mode=mode, k=k, routers=router)
    settings = server.Settings(api_key=api_key, max_weights=max_upload * MB, max_requests=max_requests)
    app = server.create_app(built, retriever, adapters, template, settings)
    run.serve(app, host, port, lambda address: print(f"{len(built.names)} adapters on {address}", flush=True))
