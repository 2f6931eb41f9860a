"""Protection against requests of foreign web pages, before authentication and routing.

A foreign page runs in the browser of a user who can reach this server. It must not reach the server under another name
(DNS rebinding), nor send cross-site requests, nor show its responses. Programs other than browsers send neither Origin
nor Sec-Fetch-Site, and are not affected.
"""

import ipaddress
import re
from collections import Counter
from collections.abc import Awaitable, Iterable, Mapping
from types import MappingProxyType

from fastapi import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from batchserve.api import problems
from batchserve.api.head import first_part, headers_of
from batchserve.errors import BadRequest, BatchserveError, CrossOrigin, MisdirectedRequest

SIZE = 256
_HOST = re.compile(r"(?P<name>\[[0-9a-f:.]+\]|[a-z0-9_.-]+?)\.?(?::(?P<port>[0-9]{0,5}))?", re.IGNORECASE | re.ASCII)
_LONGEST = 255 + len(":65535")
_PORTS = {"http": 80, "https": 443}

_READ = (b"host", b"origin", b"sec-fetch-site")
_NOTHING = "default-src 'none'; frame-ancestors 'none'; sandbox"
"""A page of uploaded content runs no script, loads nothing, and is isolated from the server's origin."""


class OriginMiddleware:
    """Answers 421 to a foreign Host and 403 to requests from pages of another origin."""

    def __init__(
        self,
        app: ASGIApp,
        allowed: str = "",
        listens_on: str = "127.0.0.1",
        policies: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        """`allowed`: BATCHSERVE_ALLOWED_HOSTS. `listens_on`: the address that clients reach. `policies`:
        Content-Security-Policy by path, or by its first part (`/jobs/`) for all paths that begin with it; all other
        responses get the strictest one."""
        self._app = app
        self._hosts = Hosts(allowed, listens_on)
        self._seals = {path: _seal(policy) for path, policy in policies.items()}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
            return
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        seal = self._seals.get(scope["path"]) or self._seals.get(f"/{first_part(scope['path'])}/", _SEAL)

        def sealed(message: Message) -> Awaitable[None]:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], *seal]
            return send(message)

        try:
            self._check(scope)
        except BatchserveError as error:
            await problems.answer(Request(scope), error)(scope, receive, sealed)
            return
        await self._app(scope, receive, sealed)

    def _check(self, scope: Scope) -> None:
        """Raises BadRequest, MisdirectedRequest or CrossOrigin."""
        headers = headers_of(scope)
        if len(headers) != len(scope["headers"]):
            _require_single(scope["headers"])
        host, origin, site = headers.get(b"host"), headers.get(b"origin"), headers.get(b"sec-fetch-site")
        if host is not None:
            self._hosts.require(host)
        elif scope["http_version"] != "1.0":
            raise BadRequest("the request has no Host: HTTP/1.1 needs one (RFC 9112, 3.2)")
        if origin is not None:
            _require_own_origin(origin, host or b"", scope["scheme"])
        if site is not None and site not in (b"same-origin", b"none") and not _is_followed_link(scope):
            raise CrossOrigin(
                f"a page of another site sent this request (Sec-Fetch-Site: {_shown(site)}): expected same-origin or "
                "none. Pages of other sites cannot use this API from a browser"
            )


class Hosts:
    """The accepted hosts: addresses, which do not depend on DNS, and names in the settings."""

    def __init__(self, allowed: str = "", listens_on: str = "127.0.0.1") -> None:
        entries = [entry.strip().lower() for entry in allowed.split(",") if entry.strip()]
        self._any = "*" in entries
        self._names = {"localhost", *(entry.strip("[]") for entry in entries if not entry.startswith("*"))}
        self._parents = tuple(entry[1:] for entry in entries if entry.startswith("*."))
        listened = _address(listens_on)
        # A page with DNS rebinding never sends an address as Host. A server that other hosts reach has any number of
        # addresses: of this host, of a port forwarder, of a cluster's probe.
        self._any_address = not (listened.is_loopback if listened else listens_on.lower() == "localhost")
        if listened is None:
            self._names.add(listens_on.lower().removesuffix("."))
        self._known: set[bytes] = set()

    def require(self, host: bytes) -> None:
        """Raises BadRequest for an invalid host, MisdirectedRequest for a foreign one."""
        if host in self._known:
            return
        name, _ = _parted(host)
        if name is None:
            raise BadRequest(f"Host is {_shown(host)!r}: expected one name or address, with or without a port")
        if not self._allows(name):
            raise MisdirectedRequest(
                f"this server does not accept the host {name!r}: to allow it, start the server with "
                f"BATCHSERVE_ALLOWED_HOSTS={name} (a list, with commas)"
            )
        if len(self._known) >= SIZE:
            self._known.clear()
        self._known.add(host)

    def _allows(self, name: str) -> bool:
        if self._any or name.strip("[]") in self._names or name.endswith(self._parents):
            return True
        address = _address(name)
        return address is not None and (self._any_address or address.is_loopback)


def _parted(host: bytes) -> tuple[str | None, int | None]:
    """The name, in lower case and without a final dot, and the port of a Host; an empty name for an invalid host."""
    found = _HOST.fullmatch(host.decode("latin-1")) if len(host) <= _LONGEST else None
    if found is None or int(found["port"] or 0) > 65535:
        return None, None
    if (name := found["name"].lower()).startswith("[") and _address(name) is None:
        return None, None
    return name, int(found["port"]) if found["port"] else None


def _address(name: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        address = ipaddress.ip_address(name.strip("[]"))
    except ValueError:
        return None
    return (address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None) or address


def _require_own_origin(origin: bytes, host: bytes, scheme: str) -> None:
    """Raises CrossOrigin unless the page came from the same host and port as the request. A TLS proxy turns `https`
    into `http`, never the reverse.
    """
    text = origin.decode("latin-1").lower()
    its_scheme, _, authority = text.partition("://")
    default = _PORTS.get(its_scheme)
    name, port = _parted(authority.encode("latin-1"))
    own_name, own_port = _parted(host)
    same = name is not None and (name, port or default) == (own_name, own_port or default)
    if default is None or not same or (scheme == "https" and its_scheme == "http"):
        raise CrossOrigin(
            f"a page of {_shown(origin)} sent this request to the host {_shown(host)!r}: expected a page of the same "
            "origin. A proxy in front of this server must forward the Host, with its port"
        )


def _is_followed_link(scope: Scope) -> bool:
    """Whether the request is a top-level navigation from another site to a readable resource."""
    headers = headers_of(scope)
    return (
        scope["method"] in ("GET", "HEAD")
        and headers.get(b"sec-fetch-mode") == b"navigate"
        and headers.get(b"sec-fetch-dest") == b"document"
    )


def _require_single(headers: Iterable[tuple[bytes, bytes]]) -> None:
    """Raises BadRequest when a checked header is repeated, which is ambiguous."""
    counts = Counter(name for name, _ in headers)
    for name in _READ:
        if counts[name] > 1:
            raise BadRequest(f"the header {name.decode()} came {counts[name]} times: expected it once")


def _seal(policy: str) -> list[tuple[bytes, bytes]]:
    """Response headers: same origin only, no content sniffing, no framing."""
    return [
        (b"cross-origin-resource-policy", b"same-origin"),
        (b"x-content-type-options", b"nosniff"),
        (b"content-security-policy", policy.encode()),
    ]


def _shown(value: bytes) -> str:
    return value[:200].decode("latin-1")


_SEAL = _seal(_NOTHING)
