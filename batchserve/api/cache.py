"""Cached responses about jobs: polling clients send the same request many times a second."""

from fastapi import Request, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from batchserve.access import Caller
from batchserve.api import conditional
from batchserve.api.head import headers_of
from batchserve.db.cache import VersionedCache

MAX_AGE = 0.25
SIZE = 256
_NOT_HERE = conditional.HEADERS - {b"if-none-match"}
"""Preconditions that may fail: left to their route."""
_TEMPLATE = "/v1/jobs/{job_id}"
"""The only route that fills the cache."""


class AnswerCache(VersionedCache[tuple[str, str], Response]):
    """The latest responses by tenant and path. Values that change with time alone (speed, time left, the place in the
    queue behind jobs that become due) are a quarter of a second old at most."""

    def __init__(self) -> None:
        super().__init__(SIZE, MAX_AGE)


class CacheMiddleware:
    """Serves cached responses to plain polls of authenticated callers (AuthMiddleware). All others pass to their route,
    which fills the cache."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await (_kept_answer(scope) or self._app)(scope, receive, send)


def _kept_answer(scope: Scope) -> Response | None:
    # Only routes of jobs fill the cache. A query, or a preference, may ask to wait.
    if (
        scope["type"] != "http"
        or scope["method"] != "GET"
        or scope["query_string"]
        or not scope["path"].startswith("/v1/jobs/")
    ):
        return None
    headers = headers_of(scope)
    if b"prefer" in headers or not _NOT_HERE.isdisjoint(headers):
        return None
    answers: AnswerCache = scope["app"].state.answers
    caller: Caller = scope["caller"]
    answer = answers.get((caller.tenant, scope["path"]), scope["database_version"])
    if answer is not None:
        scope["template"] = _TEMPLATE
    if answer is None or b"if-none-match" not in headers:
        return answer
    return conditional.answered(Request(scope), answer.headers["etag"]) or answer
