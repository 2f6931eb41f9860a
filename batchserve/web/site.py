"""The site: its routes, its callers, and its errors as pages."""

from pathlib import Path
from urllib.parse import quote

import orjson
from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.datastructures import State
from starlette.exceptions import HTTPException
from starlette.responses import RedirectResponse
from starlette.routing import BaseRoute, Mount, Router
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Receive, Scope, Send

from batchserve.api import problems
from batchserve.api.head import first_part
from batchserve.errors import BatchserveError, Unauthorized
from batchserve.web import admissions, fit, home, job, jobs, models, quotas, schedules, session, system, trial, webhooks
from batchserve.web.pages import page

__all__ = ["POLICIES", "ROUTES", "WebMiddleware", "is_page"]

_STATIC = Path(__file__).parent / "static"
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
ROUTES: list[BaseRoute] = [
    *home.ROUTES,
    *jobs.ROUTES,
    *job.ROUTES,
    *fit.ROUTES,
    *admissions.ROUTES,
    *models.ROUTES,
    *trial.ROUTES,
    *schedules.ROUTES,
    *system.ROUTES,
    *webhooks.ROUTES,
    *quotas.ROUTES,
    *session.ROUTES,
    Mount("/static", StaticFiles(directory=_STATIC)),
]
_FOLDERS = frozenset(
    {"jobs", "schedules", "upload", "system", "keys", "webhooks", "sign-in", "sign-out", "static", "models"}
)
"""The first parts of the paths of pages; all other paths but / belong to the API."""
POLICIES = dict.fromkeys(["/", *(f"/{folder}/" for folder in _FOLDERS)], _POLICY)
"""The Content-Security-Policy of pages, for `OriginMiddleware`."""


def is_page(path: str) -> bool:
    return path == "/" or first_part(path) in _FOLDERS


class WebMiddleware:
    """Answers requests for pages; all others go on to the API."""

    def __init__(self, app: ASGIApp, state: State) -> None:
        """`state`: of the application, whose service the pages read."""
        self._app, self._site = app, Site(state)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        is_for_people = scope["type"] == "http" and is_page(scope["path"])
        await (self._site if is_for_people else self._app)(scope, receive, send)


class Site:
    """The pages as an application of their own, in which an error is a page."""

    def __init__(self, state: State) -> None:
        self.state = state
        self.admissions: admissions.UnderWay = {}
        self.router = Router(ROUTES, redirect_slashes=False)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope["app"] = self
        request = Request(scope, receive, send)
        try:
            if not session.is_public(scope["path"]):
                await session.identify(request)
            await self.router(scope, receive, send)
        except (BatchserveError, RequestValidationError, HTTPException) as error:
            await _answer(request, error)(scope, receive, send)


def _answer(request: Request, error: problems.Expected) -> Response:
    """The page of an error; for a request of a part of a page, that part."""
    if isinstance(error, Unauthorized) and request.method in ("GET", "HEAD"):
        return RedirectResponse(f"/sign-in?next={quote(request.url.path)}", 303)
    told = problems.problem_of(request, error)
    return page(request, "error.html", told.status_code, problem=orjson.loads(bytes(told.body)))
