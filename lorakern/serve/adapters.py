"""POST, GET and DELETE /adapters."""

import asyncio
import errno

from fastapi import APIRouter, Depends, Request
from fastapi.responses import JSONResponse, Response

from lorakern.serve.catalogue import Catalogue
from lorakern.serve.errors import ApiError
from lorakern.serve.guards import KeyCheck
from lorakern.serve.incoming import Incoming, read
from lorakern.serve.metrics import Metrics
from lorakern.serve.record import Record
from lorakern.serve.settings import Settings


def router(catalogue: Catalogue, settings: Settings, metrics: Metrics) -> APIRouter:
    """The routes under /adapters; those that change something need the key."""
    routes, uploads = APIRouter(prefix="/adapters"), asyncio.Semaphore(settings.max_uploads)
    key = KeyCheck(settings.api_key)

    @routes.post("")
    async def upload(request: Request) -> JSONResponse:
        try:
            await key(request)
            await _turn(uploads, settings)
            try:
                record = await _receive(request, catalogue, settings)
            finally:
                uploads.release()
        except ApiError as error:
            metrics.refused.labels(error.code).inc()
            raise
        return JSONResponse(record.public(), 201)

    @routes.delete("/{name}", dependencies=[Depends(key)])
    async def delete(name: str) -> Response:
        await asyncio.to_thread(catalogue.delete, name)
        return Response(status_code=204)

    @routes.get("")
    async def adapters() -> JSONResponse:
        return JSONResponse({"adapters": catalogue.listed()})

    @routes.get("/{name}")
    async def adapter(name: str) -> JSONResponse:
        return JSONResponse(catalogue.shown(name))

    return routes


async def _turn(uploads: asyncio.Semaphore, settings: Settings) -> None:
    """Wait for one of the places; nothing of the body is read before."""
    try:
        async with asyncio.timeout(settings.read_seconds):
            await uploads.acquire()
    except TimeoutError:
        message = f"{settings.max_uploads} uploads are under way, as many as this server takes; try again"
        raise ApiError(429, message, "overloaded", headers={"Retry-After": "1"}) from None


async def _receive(request: Request, catalogue: Catalogue, settings: Settings) -> Record:
    store = catalogue.store
    quarantine = await asyncio.to_thread(store.new_quarantine)
    try:
        incoming = Incoming(request.headers.get("content-type", ""), quarantine, settings.max_weights)
        try:
            await read(request, incoming, settings.read_seconds)
            name, texts, replace, sha256 = incoming.finish()
        finally:
            incoming.close()
        return await asyncio.to_thread(catalogue.accept, quarantine, name, texts, sha256, replace=replace)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ApiError(507, "the server's disk is full; nothing of the upload was kept", "disk_full") from None
        raise
    finally:
        await asyncio.to_thread(store.discard, quarantine)
