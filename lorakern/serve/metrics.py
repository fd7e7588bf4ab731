"""GET /metrics in Prometheus' text form, and the middleware that counts requests."""

import time
from collections.abc import Iterator
from typing import Any

from fastapi import APIRouter
from fastapi.responses import Response
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.types import ASGIApp, Message, Receive, Scope, Send

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_GAUGES = {
    "running": ("lorakern_requests_running", "Requests that are being decoded."),
    "waiting": ("lorakern_requests_waiting", "Requests that wait for a row."),
    "adapters": ("lorakern_adapters", "Adapters that new requests can have."),
    "loaded": ("lorakern_adapters_loaded", "Adapters in a slot."),
}
_COUNTERS = {
    "tokens": ("lorakern_generated_tokens", "Tokens that were decoded."),
    "prompt_tokens": ("lorakern_prompt_tokens", "Tokens of prompts."),
}


class Metrics:
    """The figures of one server, in a registry of its own."""

    def __init__(self, engine: Any) -> None:
        self._registry = CollectorRegistry()
        route = ["route", "status"]
        self.requests = Counter("lorakern_requests", "Answered requests.", route, registry=self._registry)
        self.seconds = Histogram(
            "lorakern_request_seconds",
            "From a request to the last byte of its answer.",
            ["route"],
            buckets=SECONDS,
            registry=self._registry,
        )
        self.refused = Counter(
            "lorakern_uploads_refused", "Uploads that were refused.", ["reason"], registry=self._registry
        )
        self._registry.register(_Engine(engine))

    def router(self) -> APIRouter:
        routes = APIRouter()

        @routes.get("/metrics")
        async def metrics() -> Response:
            return Response(generate_latest(self._registry), media_type=CONTENT_TYPE_LATEST)

        return routes


class _Engine(Collector):
    """What the engine counts itself, read when it is asked for."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine

    def collect(self) -> Iterator[Metric]:
        stats = self._engine.stats()
        for key, (name, text) in _GAUGES.items():
            yield GaugeMetricFamily(name, text, value=stats[key])
        for key, (name, text) in _COUNTERS.items():
            yield CounterMetricFamily(name, text, value=stats[key])

    def describe(self) -> list[Metric]:
        return []


class Counted:
    """Middleware: each request by the pattern of its route, until its last byte."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, status = time.perf_counter(), 500

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, watched)
        finally:
            # paths that are no route are of the clients' making, and would be without number
            route = getattr(scope.get("route"), "path", "other")
            self._metrics.requests.labels(route, status).inc()
            self._metrics.seconds.labels(route).observe(time.perf_counter() - began)
