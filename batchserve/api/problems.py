"""Every error as RFC 9457 `application/problem+json`."""

import errno
import http
import re
from collections.abc import Awaitable, Mapping
from reprlib import Repr
from typing import Any

import orjson
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.routing import Match
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from batchserve import correlation
from batchserve.errors import BatchserveError, Unavailable, presentable
from batchserve.logs import get_logger
from batchserve.storage.disk import outage_of

log = get_logger()
Expected = BatchserveError | RequestValidationError | HTTPException
"""Errors that are problems of a request, or of the state that it meets."""
RETRY_AFTER = {503: "1", 507: "30"}
_METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "CONNECT", "QUERY")
"""Methods registered for HTTP itself, in the order of the Allow header."""


def problem(request: Request, status: int, code: str, detail: str, **extra: Any) -> Response:
    headers = {"retry-after": RETRY_AFTER[status]} if status in RETRY_AFTER else {}
    if "retry_after" in extra:
        headers["retry-after"] = str(extra["retry_after"])
    if status == 401:
        headers["www-authenticate"] = 'Bearer realm="batchserve"'
    if status == 416 and "bytes" in extra:
        headers["content-range"] = f"bytes */{extra['bytes']}"
    if status == 408:
        headers["connection"] = "close"  # the rest of the body is not read
    body = {
        "type": f"/problems/{code}",
        "code": code,
        "title": code.replace("-", " ").capitalize(),
        "status": status,
        "detail": detail,
        "instance": request.scope["path"],
        **extra,
    }
    if (request_id := correlation.current().request_id) is not None:
        body["request_id"] = request_id
    return Response(_encoded(body), status, headers, "application/problem+json")


def _encoded(body: dict[str, Any]) -> bytes:
    try:
        return orjson.dumps(body, default=str)
    except TypeError:  # a lone surrogate or a long integer of the request is quoted
        return orjson.dumps(presentable(body))


def answer(request: Request, error: BatchserveError) -> Response:
    """The problem of an error; a server error is logged as well."""
    if error.status >= 500:
        log.error("Request has failed", action="request_error", path=request.scope["path"], code=error.code,
                  detail=error.detail)  # fmt: skip
    faults = {"errors": error.errors} if error.errors else {}
    return problem(request, error.status, error.code, error.detail, **faults, **error.extra)


def install(app: FastAPI) -> None:
    for kind in (BatchserveError, RequestValidationError, HTTPException):

        @app.exception_handler(kind)
        async def told(request: Request, error: Expected) -> Response:
            return problem_of(request, error)


def problem_of(request: Request, error: Expected) -> Response:
    """The problem of an error that a route may raise."""
    if isinstance(error, BatchserveError):
        return answer(request, error)
    if isinstance(error, RequestValidationError):
        faults = [_fault(fault) for fault in error.errors()]
        detail = "; ".join(_sentence(fault) for fault in faults)
        return problem(request, 422, "invalid-options", detail, errors=faults)
    if error.status_code == 405:
        return _not_allowed(request)
    phrase = http.HTTPStatus(error.status_code).phrase
    response = problem(
        request,
        error.status_code,
        phrase.lower().replace(" ", "-"),
        f"{request.method} {request.scope['path']}: {phrase}",
    )
    response.headers.update(error.headers or {})
    return response


class ErrorMiddleware:
    """Answers the errors that were not answered inside, and leaves the connection as after any other answer: Starlette
    would raise them once more, upon which the server closes a connection that the client has been told it may use
    again.

    Comes before all that may fail. An answer that has begun is broken off.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        begun = False

        def send_noted(message: Message) -> Awaitable[None]:
            nonlocal begun
            begun = True
            return send(message)

        try:
            await self._app(scope, receive, send_noted)
        except Exception as error:
            if begun or scope["type"] != "http":
                raise
            request = Request(scope)
            told = problem_of(request, error) if isinstance(error, Expected) else _unexpected(request, error)
            await told(scope, receive, send)


def _unexpected(request: Request, error: Exception) -> Response:
    if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
        return answer(request, Unavailable("too many files are open; try again in a moment", retry_after=1))
    if (outage := outage_of(error)) is not None:
        return answer(request, outage)
    log.error("Request meets an unexpected error", action="request_error", path=request.scope["path"], exc_info=error)
    return problem(request, 500, "internal-error", "an unexpected error; the server's log has the details")


def _not_allowed(request: Request) -> Response:
    """501 for an unknown method, 405 with the methods of this resource (Starlette lists those of one route only)."""
    if request.method not in _METHODS:
        names = ", ".join(_METHODS)
        return problem(request, 501, "not-implemented", f"there is no method {request.method[:100]}; known are {names}")
    routes = request.app.router.routes
    allowed = ", ".join(
        method
        for method in _METHODS
        if any(route.matches({**request.scope, "method": method})[0] is Match.FULL for route in routes)
    )
    detail = f"{request.method} {request.url.path}: Method Not Allowed; allowed are {allowed}"
    response = problem(request, 405, "method-not-allowed", detail)
    response.headers["allow"] = allowed
    return response


def _fault(fault: Mapping[str, Any]) -> dict[str, Any]:
    """One fault of pydantic, in the form of other errors."""
    place = [str(part) for part in fault["loc"] if not _SPOKEN_OF_TYPES.match(str(part))]
    message = _MESSAGES.get(fault["type"]) or fault["msg"].removeprefix("Value error, ")
    named = {"parameter": ".".join(place) or str(fault["loc"][0]), "message": message}
    return named if fault["type"] == "missing" else named | {"value": _shown.repr(fault.get("input"))[:200]}


def _sentence(fault: Mapping[str, Any]) -> str:
    came = f", got {fault['value']}" if "value" in fault else ""
    return f"{fault['parameter']}: {fault['message']}{came}"


_MESSAGES = {
    "missing": "must be given",
    "extra_forbidden": "there is no such option",
    "dict_type": "expected a JSON object",
    "string_unicode": "expected a text of whole characters, got a lone surrogate",
}
"""Replacements of pydantic's messages about Python types."""


_SPOKEN_OF_TYPES = re.compile(r"(query|body|path|header|constrained-\w+)$|(list|dict|literal|function-\w+)\[")
"""Elements of a fault's location that name its source or the alternative of a type."""

_shown = Repr()  # bounded, unlike `repr`, for deeply nested values
_shown.maxlevel, _shown.maxstring, _shown.maxother = 4, 200, 200
