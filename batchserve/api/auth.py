"""Authentication of a request before its body is read: its API key, with tenant and scope."""

import asyncio
import hashlib
import re
from functools import partial
from typing import Annotated, Any

from fastapi import Depends, Request
from sqlalchemy import Connection
from starlette.types import ASGIApp, Receive, Scope, Send

from batchserve import keys
from batchserve.access import Caller
from batchserve.access import Scope as KeyScope
from batchserve.api import problems
from batchserve.api.head import headers_of
from batchserve.db.cache import VersionedCache
from batchserve.db.connect import Database
from batchserve.db.watcher import Version
from batchserve.errors import BatchserveError, Forbidden, Unauthorized, Unavailable
from batchserve.quotas.limits import Limits

PUBLIC = frozenset({"/docs", "/openapi.json", "/livez", "/readyz"})
"""Public paths, which expose no user data. All others need a key, once a key exists."""
_PUBLIC_FILES = "/docs/static/"
_READING_POSTS = re.compile(r"/v1/models/[^/]+/validate|/sign-out")
"""Paths whose POST a key that only reads may send."""
SIZE = 4096
_KEPT = ("/v1/jobs/", "/v1/models/")
"""Paths whose answers are kept while nothing is committed."""

SECURITY_SCHEMES = {
    "key": {
        "type": "http",
        "scheme": "bearer",
        "description": "An API key, created by `batchserve keys create`. Not required while the database has no key.",
    }
}


class Keyring:
    """Verified keys, each cached while nothing was committed, and beyond that until a probe of its row finds another
    state: so a revocation takes effect immediately."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._callers: VersionedCache[bytes, Caller] = VersionedCache(SIZE)
        self._unprobed: VersionedCache[bytes, Caller] = VersionedCache(SIZE)
        """The same by the version of the whole database: while nothing was committed, no probe is needed."""
        self._version: Version | None = None
        self._is_of_this_turn = False

    async def identify(self, authorization: str | None, version: Version | None) -> Caller:
        """The caller with this header. `version`: of the database, since the request came. Raises Unauthorized, and
        Unavailable when the database does not respond."""
        digest = _digest(authorization)
        caller = self._unprobed.get(digest, version)
        if caller is None:
            caller = await self._probed(digest, authorization)
            self._unprobed.put(digest, version, caller)
        return caller

    async def _probed(self, digest: bytes, authorization: str | None) -> Caller:
        state = await keys.state_of(self._database, _parts(authorization)[1])
        caller = self._callers.get(digest, state)
        if caller is None:
            caller = await self._database.fetch_one(partial(_look_up, authorization))
            self._callers.put(digest, state, caller)
        return caller

    async def version_for(self, path: str) -> Version | None:
        """The version of the database for a request; None for one that would ask a server for nothing but its key."""
        return await self.version() if self._database.is_inline or path.startswith(_KEPT) else None

    async def version(self) -> Version | None:
        """Of the database, see `Database.version`: where that is asked inline, once in a turn of the event loop, for
        all requests that it has received by then."""
        if not self._database.is_inline:
            return await self._database.version()
        if not self._is_of_this_turn:
            self._is_of_this_turn, self._version = True, None  # none, if it cannot be asked
            # Before the database is asked: a request that comes later is behind this in the queue of the loop.
            asyncio.get_running_loop().call_soon(self._end_turn)
            self._version = await self._database.version()
        return self._version

    def _end_turn(self) -> None:
        self._is_of_this_turn = False


def _digest(authorization: str | None) -> bytes:
    """The texts of keys are kept in memory only during their requests."""
    return hashlib.sha256(authorization.encode()).digest() if authorization else b""


def _look_up(authorization: str | None, connection: Connection) -> Caller:
    if not keys.exist(connection):
        return Caller()
    key = keys.find(connection, _bearer(authorization))
    if key is None:
        raise Unauthorized("this API key is unknown or revoked")
    return Caller(key.tenant, key.scope, key.name)


class AuthMiddleware:
    """Refuses requests without a valid key before the body is read."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and not is_public(scope["path"]):
            keyring: Keyring = scope["app"].state.keyring
            try:
                # Before the key is verified: an answer is for its caller.
                version = await keyring.version_for(scope["path"])
                await admit(scope, keyring, _given(scope), version)
            except BatchserveError as error:
                await problems.answer(Request(scope), error)(scope, receive, send)
                return
        await self._app(scope, receive, send)


async def admit(scope: Scope, keyring: Keyring, authorization: str | None, version: Version | None) -> None:
    """Notes the caller of a request, for the API and for pages alike. `version`: of the database, since it came. Raises
    what `Keyring.identify` does, Forbidden for a key that only reads and a request that is to do more, and
    QuotaExceeded for one request too many."""
    scope["database_version"], scope["authorization"] = version, authorization
    caller = scope["caller"] = await keyring.identify(authorization, version)
    await _limits_of(scope).admit(caller.tenant)
    if not caller.may_change and not _is_reading(scope["method"], scope["path"]):
        raise Forbidden(f"this request does more than read; the key sent has the scope {caller.scope}")


def _limits_of(scope: Scope) -> Limits:
    limits: Limits = scope["app"].state.limits
    return limits


def _is_reading(method: str, path: str) -> bool:
    return method in ("GET", "HEAD") or (method == "POST" and _READING_POSTS.fullmatch(path) is not None)


def is_public(path: str) -> bool:
    return path in PUBLIC or path.startswith(_PUBLIC_FILES)


def _given(scope: Scope) -> str | None:
    """The Authorization header."""
    given = headers_of(scope).get(b"authorization")
    return None if given is None else given.decode("latin-1")


async def require_key_still(request: Request, keyring: Keyring) -> None:
    """For long requests: raises Unauthorized once their key was revoked."""
    caller = await keyring.identify(request.scope["authorization"], await keyring.version())
    if caller != caller_of(request):
        raise Unauthorized("this API key was revoked during the request")


async def is_key_in_force(request: Request, keyring: Keyring) -> bool:
    """Whether the key of a request is still valid, by the current database version."""
    try:
        await require_key_still(request, keyring)
    except Unauthorized:
        return False
    except Unavailable:
        return True
    return True


def caller_of(request: Request) -> Caller:
    caller: Caller = request.scope["caller"]
    return caller


async def get_caller(request: Request) -> Caller:  # as a plain function it would take a thread, for each request
    return caller_of(request)


CallerDep = Annotated[Caller, Depends(get_caller)]


async def require_admin(caller: CallerDep) -> None:
    """Raises Forbidden."""
    if caller.scope is not KeyScope.ADMIN:
        raise Forbidden(f"this request needs an admin key; the one sent has the scope {caller.scope}")


ADMIN: list[Any] = [Depends(require_admin)]
"""Dependencies of a route for admin keys only."""


def _bearer(authorization: str | None) -> str:
    """The key in an Authorization header. Raises Unauthorized."""
    scheme, text = _parts(authorization)
    if scheme.lower() != "bearer":
        raise Unauthorized("an API key is needed: send it as `Authorization: Bearer bs_...`")
    if not keys.is_well_formed(text):
        raise Unauthorized("not an API key (truncated or mistyped?): a key begins with bs_ and has 52 characters")
    return text


def _parts(authorization: str | None) -> tuple[str, str]:
    """Scheme and key of an Authorization header."""
    scheme, _, text = (authorization or "").strip().partition(" ")
    return scheme, text.strip()
