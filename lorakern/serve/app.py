"""The server put together."""

import asyncio
import logging
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import APIRouter, FastAPI
from fastapi.responses import JSONResponse

import lorakern
from lorakern.mixture import LoraRetriever
from lorakern.serve import adapters, completions, errors, page
from lorakern.serve.catalogue import Catalogue
from lorakern.serve.desk import Desk, check_engine
from lorakern.serve.guards import LocalOnly
from lorakern.serve.metrics import Counted, Metrics
from lorakern.serve.settings import Settings
from lorakern.serve.store import AdapterStore
from lorakern.serve.template import Template

log = logging.getLogger("lorakern.serve")


def create_app(
    engine: Any,
    retriever: LoraRetriever,
    folder: str | os.PathLike[str],
    template: Template,
    settings: Settings = Settings(),  # noqa: B008 (it is frozen)
) -> FastAPI:
    """The server as an ASGI app; the adapters of the folder are in the engine when this returns.

    Args:
        engine: a `MixtureModel`; it is closed when the app shuts down.
        retriever: the engine's own.
        folder: of the adapters; made if it is not there.
        template: chat messages to token ids.
        settings: limits and the key.

    Raises:
        LorakernError: another server has the folder, or it cannot be written.
    """
    store = AdapterStore(folder, log.warning)
    desk, metrics = Desk(engine, settings.max_requests), Metrics(engine)
    catalogue = Catalogue(engine, retriever, store, log.warning)
    catalogue.restore()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(engine.close)
        store.close()

    app = FastAPI(title="lorakern", version=lorakern.__version__, lifespan=lifespan, openapi_url=None)
    errors.install(app)
    if settings.api_key is None:
        app.add_middleware(LocalOnly)
    app.add_middleware(Counted, metrics=metrics)
    app.include_router(adapters.router(catalogue, settings, metrics))
    app.include_router(completions.router(desk, engine, template))
    app.include_router(metrics.router())
    app.include_router(page.router())
    app.include_router(_health(engine, settings))
    return app


def _health(engine: Any, settings: Settings) -> APIRouter:
    routes = APIRouter()

    @routes.get("/health")
    async def health() -> JSONResponse:
        check_engine(engine)
        about = {"mode": engine.mode, "k": engine.k, "needs_key": settings.api_key is not None}
        return JSONResponse({"status": "ok"} | about | engine.stats())

    return routes
