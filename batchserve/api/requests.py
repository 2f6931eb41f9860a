"""Each request by its ID: in the response and in every line of the log, with a line for the request itself and a span,
where these are wanted. Comes before all other middlewares, so that each response has the ID.
"""

import logging
import time
from collections.abc import Awaitable, Callable

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from batchserve import correlation, tracing
from batchserve.access import Caller
from batchserve.api.head import headers_of
from batchserve.api.measured import NO_ROUTE
from batchserve.correlation import Correlation
from batchserve.logs import get_logger

__all__ = ["REQUEST_ID", "RequestMiddleware"]

log = get_logger()

REQUEST_ID = b"x-request-id"
_LEVELS = logging.getLevelNamesMapping()
_PROBES = frozenset({"/livez", "/readyz", "/metrics"})
"""Paths that are asked for again and again, by programs: of interest only where they fail."""


class RequestMiddleware:
    def __init__(self, app: ASGIApp, access_log: str = "off", log_level: str = "info") -> None:
        """`access_log`, `log_level`: BATCHSERVE_ACCESS_LOG and BATCHSERVE_LOG_LEVEL."""
        self._app = app
        wanted = access_log != "off" and _LEVELS[access_log.upper()] >= _LEVELS[log_level.upper()]
        self._level = _LEVELS[access_log.upper()] if wanted else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = headers_of(scope)
        request_id = correlation.request_id_of(headers.get(REQUEST_ID))
        named = (REQUEST_ID, request_id.encode())
        if self._level is not None or tracing.is_on():
            await self._watched(scope, receive, send, request_id, named)
            return
        # A caller's trace continues in a worker that exports its spans.
        correlation.enter(Correlation(request_id, _traceparent_of(headers)))

        def send_named(message: Message) -> Awaitable[None]:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], named]
            return send(message)

        await self._app(scope, receive, send_named)

    async def _watched(
        self, scope: Scope, receive: Receive, send: Send, request_id: str, named: tuple[bytes, bytes]
    ) -> None:
        """The same with a line and a span."""
        began, traceparent = time.perf_counter(), _traceparent_of(headers_of(scope))
        span, failed = None, False
        if scope["path"] not in _PROBES:
            span = tracing.begin(
                scope["method"], "server", parent=traceparent, http__request__method=scope["method"],
                url__path=_path_of(scope), client__address=_client_of(scope), batchserve__request_id=request_id,
            )  # fmt: skip
        correlation.enter(Correlation(request_id, span.traceparent if span else traceparent))
        watched = _Watched(send, named)
        try:
            await self._app(scope, receive, watched)
        except Exception:
            failed = True
            raise
        finally:
            if self._level is not None:
                self._tell(scope, watched, time.perf_counter() - began, self._level)
            if span is not None:
                _end(span, scope, watched, failed=failed)

    def _tell(self, scope: Scope, watched: "_Watched", seconds: float, level: int) -> None:
        """The line of a request: no query and no header, which may be secret."""
        caller: Caller | None = scope.get("caller")
        if scope["path"] in _PROBES and watched.status < 400:
            level = logging.DEBUG
        log.log(
            level, "Request is answered" if watched.is_complete else "Response was broken off", action="access",
            method=scope["method"], path=_path_of(scope), route=_route_of(scope), status=watched.status,
            bytes=0 if scope["method"] == "HEAD" else watched.bytes, seconds=round(seconds, 6),
            tenant=caller.tenant if caller else None, key=caller.key if caller else None, client=_client_of(scope),
        )  # fmt: skip


class _Watched:
    """Notes what is sent, and names the request in the head of the response."""

    __slots__ = ("_named", "_send", "bytes", "is_complete", "status")

    def __init__(self, send: Callable[[Message], Awaitable[None]], named: tuple[bytes, bytes]) -> None:
        self._send, self._named = send, named
        self.status = 0
        """0: no response has begun."""
        self.bytes = 0
        self.is_complete = False

    def __call__(self, message: Message) -> Awaitable[None]:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            message["headers"] = [*message["headers"], self._named]
        elif message["type"] == "http.response.body":
            self.bytes += len(message.get("body", b""))
            self.is_complete = not message.get("more_body", False)
        return self._send(message)


def _end(span: tracing.Span, scope: Scope, watched: _Watched, *, failed: bool) -> None:
    caller: Caller | None = scope.get("caller")
    route = _route_of(scope)
    error = f"status {watched.status}" if failed or watched.status >= 500 else None
    span.end(
        name=None if route is None else f"{scope['method']} {route}", error=error, http__route=route,
        http__response__status_code=watched.status or None, batchserve__tenant=caller.tenant if caller else None,
    )  # fmt: skip


def _traceparent_of(headers: dict[bytes, bytes]) -> str | None:
    given = headers.get(b"traceparent")
    return None if given is None else correlation.parsed_traceparent(given.decode("latin-1"))


def _path_of(scope: Scope) -> str:
    """As it was sent, in visible characters."""
    raw: bytes | None = scope.get("raw_path")
    given = scope["path"].encode() if raw is None else raw.partition(b"?")[0]
    return given.decode("ascii", "backslashreplace")


def _route_of(scope: Scope) -> str | None:
    """`/v1/jobs/{job_id}`, as MeasuringMiddleware has found it; None for a request that no route has answered."""
    template: str | None = scope.get("template")
    return None if template == NO_ROUTE else template


def _client_of(scope: Scope) -> str | None:
    client = scope.get("client")
    return None if client is None else str(client[0])
