"""The cookie with the key of a session, and the token of its forms, which no page of another site knows."""

import hashlib
import hmac

from fastapi import Request

from batchserve.errors import Forbidden

__all__ = ["COOKIE", "require_token", "token_of"]

COOKIE = "batchserve-key"


def token_of(request: Request) -> str:
    """Of the session; empty where there are no keys, and so nothing that a session would allow."""
    key = request.cookies.get(COOKIE)
    return hmac.new(key.encode(), b"batchserve form", hashlib.sha256).hexdigest() if key else ""


def require_token(request: Request) -> None:
    """Raises Forbidden."""
    given = request.query_params.get("token", "")
    if not hmac.compare_digest(given.encode(), token_of(request).encode()):
        raise Forbidden("this form is of another session: go back, load the page again, and repeat")
