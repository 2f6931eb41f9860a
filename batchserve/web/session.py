"""Who a page is for: a key in a cookie, which only pages read. Requests that change something carry a token of the
session as well, which no page of another site knows."""

from fastapi import Request, Response
from starlette.responses import RedirectResponse
from starlette.routing import Route

from batchserve.api.auth import Keyring, admit
from batchserve.errors import Unauthorized
from batchserve.web.forms import read_fields
from batchserve.web.pages import page
from batchserve.web.tokens import COOKIE, require_token

__all__ = ["ROUTES", "identify", "is_public"]


def is_public(path: str) -> bool:
    return path.startswith(("/static/", "/sign-in"))


async def identify(request: Request) -> None:
    """Notes the caller of a page as `api.auth` does that of a request. Raises Unauthorized, and Forbidden for a request
    that is to change something with a key that only reads, or without the token of its session."""
    keyring: Keyring = request.app.state.keyring
    key = request.cookies.get(COOKIE)
    await admit(request.scope, keyring, f"Bearer {key}" if key else None, await keyring.version())
    if request.method not in ("GET", "HEAD"):
        require_token(request)


async def sign_in(request: Request) -> Response:
    target = _local(request.query_params.get("next"))
    if request.method != "POST":
        return page(request, "sign_in.html", next=target)
    key = (await read_fields(request)).first("key").strip()
    keyring: Keyring = request.app.state.keyring
    try:
        await keyring.identify(f"Bearer {key}", await keyring.version())
    except Unauthorized as error:
        return page(request, "sign_in.html", 401, next=target, error=error.detail)
    answer = RedirectResponse(target, 303)
    answer.set_cookie(COOKIE, key, httponly=True, samesite="strict", secure=request.url.scheme == "https")
    return answer


async def sign_out(request: Request) -> Response:  # noqa: ARG001 - the form of a route
    answer = RedirectResponse("/sign-in", 303)
    answer.delete_cookie(COOKIE, httponly=True, samesite="strict")
    return answer


def _local(target: str | None) -> str:
    """A path of this site, and no other address: `//host` and `/\\host` are addresses of other hosts."""
    if not target or not target.startswith("/") or target[1:2] in ("/", "\\") or not target.isprintable():
        return "/"
    return target


ROUTES = [
    Route("/sign-in", sign_in, methods=["GET", "POST"]),
    Route("/sign-out", sign_out, methods=["POST"]),
]
