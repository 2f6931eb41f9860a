"""Every request is counted and timed, also those that are refused before a route is found, and cached answers."""

import time
from collections.abc import Awaitable, Iterable, Mapping
from typing import Any

from starlette.routing import BaseRoute, Mount, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from batchserve.metrics import Metrics

__all__ = ["NO_ROUTE", "MeasuringMiddleware", "templates_of"]

NO_ROUTE = "none"
"""The route of requests that were refused before one was found, or for which there is none."""


def templates_of(routes: Iterable[BaseRoute]) -> dict[Any, str]:
    """The template of the paths of each endpoint, `/jobs/{job_id}`."""
    found: dict[Any, str] = {}
    for route in routes:
        if isinstance(route, Route):
            found[route.endpoint] = route.path_format
        elif isinstance(route, Mount):
            found[route.app] = route.path_format
    return found


class MeasuringMiddleware:
    """Comes directly behind RequestMiddleware, which is told the template. Takes some microseconds of each request."""

    def __init__(self, app: ASGIApp, metrics: Metrics, templates: Mapping[Any, str]) -> None:
        """`templates`: of endpoints whose route is not in the scope, where FastAPI puts its own."""
        self._app, self._metrics, self._templates = app, metrics, templates

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        metrics, began, exchange = self._metrics, time.perf_counter(), _Exchange(receive, send)
        metrics.requests_under_way += 1
        try:
            has_body = scope["method"] not in ("GET", "HEAD")
            await self._app(scope, exchange.receive if has_body else receive, exchange.send)
        finally:
            metrics.requests_under_way -= 1
            scope["template"] = template = self._template(scope)
            metrics.count_request(
                template,
                scope["method"],
                exchange.status,
                time.perf_counter() - began,
                exchange.received,
                exchange.sent,
            )

    def _template(self, scope: Scope) -> str:
        template: str | None = scope.get("template")
        if template is None:
            route = scope.get("route")
            template = self._templates.get(scope.get("endpoint")) if route is None else route.path_format
        return template or NO_ROUTE


class _Exchange:
    """The messages of a request, as they pass."""

    __slots__ = ("_receive", "_send", "received", "sent", "status")

    def __init__(self, receive: Receive, send: Send) -> None:
        self._receive, self._send = receive, send
        self.status: int | None = None
        self.received = self.sent = 0

    async def receive(self) -> Message:
        message = await self._receive()
        if message["type"] == "http.request":
            self.received += len(message.get("body", b""))
        return message

    def send(self, message: Message) -> Awaitable[None]:
        if message["type"] == "http.response.body":
            self.sent += len(message.get("body", b""))
        elif message["type"] == "http.response.start":
            self.status = message["status"]
        return self._send(message)
