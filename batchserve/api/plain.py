"""Hot routes, called without FastAPI: finding a route among all, solving its dependencies and wrapping its call take
longer than what most of these routes do.

A plain route is declared to FastAPI like any other, which documents it and answers other methods of its path. `plain`
says how a request becomes the arguments of its function, which FastAPI would otherwise find out each time.
"""

from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import Any, TypeVar

from fastapi import APIRouter, Request, Response
from fastapi.routing import APIRoute
from starlette.types import ASGIApp, Receive, Scope, Send

__all__ = ["PlainMiddleware", "plain"]

Call = Callable[[Request], Awaitable[Response | None]]
F = TypeVar("F", bound=Callable[..., Awaitable[Response]])

_calls: dict[Callable[..., Any], Call] = {}
"""How each function of a plain route is called."""


def plain(call: Call) -> Callable[[F], F]:
    """Declares the route of the decorated function, below the decorator of the route, to be plain: `call` calls it for
    a request. It checks everything that the dependencies of the route would check, which are not solved. None, before
    it has read the body: FastAPI is to call it."""

    def declared(function: F) -> F:
        _calls[function] = call
        return function

    return declared


class PlainMiddleware:
    """Answers requests for plain routes. Comes directly before FastAPI, behind all other middlewares, of which
    `problems.ErrorMiddleware` answers what they raise."""

    def __init__(self, app: ASGIApp, routers: Sequence[APIRouter]) -> None:
        self._app = app
        self._routes: dict[tuple[str, str], list[tuple[APIRoute, Call]]] = {}
        """By method, and by the beginning of the path."""
        for router in routers:
            for route, call in _plain_routes(router):
                for method in route.methods or ():
                    self._routes.setdefault((method, _beginning(route.path)), []).append((route, call))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and not scope.get("root_path"):
            path = scope["path"]
            for route, call in self._routes.get((scope["method"], _beginning(path)), ()):
                if (match := route.path_regex.match(path)) is not None:
                    scope.update(route=route, endpoint=route.endpoint, path_params=match.groupdict())
                    if (response := await call(Request(scope, receive, send))) is not None:
                        await response(scope, receive, send)
                        return
                    break
        await self._app(scope, receive, send)


def _plain_routes(router: APIRouter) -> Iterator[tuple[APIRoute, Call]]:
    for route in router.routes:
        if isinstance(route, APIRoute) and (call := _calls.get(route.endpoint)) is not None:
            yield route, call


def _beginning(path: str) -> str:
    """The first two parts of a path, of which no route has a parameter: `/v1/jobs`."""
    return "/".join(path.split("/", 3)[:3])
