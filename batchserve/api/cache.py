"""Answers about jobs, kept while they are true: clients that poll ask the same thing many times a second."""

import time
from dataclasses import dataclass

from fastapi import Request, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from batchserve.api import conditional
from batchserve.domain import Caller

MAX_AGE = 0.25
SIZE = 256
_NOT_HERE = conditional.HEADERS - {b"if-none-match"}
"""Preconditions that may fail: their route tells so."""


@dataclass(frozen=True, slots=True)
class _Kept:
    answer: Response
    version: int
    until: float
    """On the monotonic clock."""


class AnswerCache:
    """The latest answers by tenant and path, each until anything is committed to the database by anybody, or MAX_AGE
    seconds.

    So a commit is never missed, and what the clock alone changes (speed, time left, the place in the queue behind
    jobs that become due) is a quarter of a second old at most. Keeps nothing where the database has no version.
    """

    def __init__(self) -> None:
        self._kept: dict[tuple[str, str], _Kept] = {}

    def keep(self, tenant: str, path: str, answer: Response, version: int | None) -> None:
        """`version`: of the database, before what the answer tells was read."""
        if version is None:
            return
        self._kept.pop((tenant, path), None)
        self._kept[tenant, path] = _Kept(answer, version, time.monotonic() + MAX_AGE)
        if len(self._kept) > SIZE:
            del self._kept[next(iter(self._kept))]  # the oldest

    def get(self, tenant: str, path: str, version: int | None) -> Response | None:
        """`version`: of the database now."""
        kept = self._kept.get((tenant, path))
        if kept is None or kept.until < time.monotonic() or kept.version != version:
            return None
        return kept.answer


class CacheMiddleware:
    """Gives kept answers to plain polls of callers that are known (AuthMiddleware). All others go on to their route,
    which answers the same, and keeps it."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await (_kept_answer(scope) or self._app)(scope, receive, send)


def _kept_answer(scope: Scope) -> Response | None:
    # Only routes of jobs keep answers. A query, or a preference, may ask to wait.
    if (
        scope["type"] != "http"
        or scope["method"] != "GET"
        or scope["query_string"]
        or not scope["path"].startswith("/v1/jobs/")
    ):
        return None
    names = {name for name, _ in scope["headers"]}
    if b"prefer" in names or not names.isdisjoint(_NOT_HERE):
        return None
    answers: AnswerCache = scope["app"].state.answers
    caller: Caller = scope["caller"]
    answer = answers.get(caller.tenant, scope["path"], scope["database_version"])
    if answer is None or b"if-none-match" not in names:
        return answer
    return conditional.answered(Request(scope), answer.headers["etag"]) or answer
