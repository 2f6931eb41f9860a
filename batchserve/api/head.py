"""The head of a request: its headers by name, put together once for all that read them, and its path."""

from starlette.types import Scope

__all__ = ["first_part", "header", "headers_of", "listed"]

_KEPT = "headers_by_name"


def headers_of(scope: Scope) -> dict[bytes, bytes]:
    """By lower-case name; of one that came several times the last."""
    kept: dict[bytes, bytes] | None = scope.get(_KEPT)
    if kept is None:
        kept = scope[_KEPT] = dict(scope["headers"])
    return kept


def header(scope: Scope, name: bytes) -> str | None:
    """A header; of one that came several times the first, as Starlette has it."""
    headers = headers_of(scope)
    value = headers.get(name)
    if value is None:
        return None
    if len(headers) != len(scope["headers"]):
        value = next(value for known, value in scope["headers"] if known == name)
    return value.decode("latin-1")


def listed(scope: Scope, name: bytes) -> str | None:
    """A header whose value is a list, which may come in several parts (RFC 9110, 5.3), as one."""
    if name not in headers_of(scope):
        return None
    return ", ".join(value.decode("latin-1") for known, value in scope["headers"] if known == name)


def first_part(path: str) -> str:
    """`jobs` of `/jobs/1`."""
    return path.lstrip("/").partition("/")[0]
