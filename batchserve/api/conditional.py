"""Preconditions of requests, evaluated in the order of RFC 9110, section 13.2.2."""

import re
from collections.abc import Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

from fastapi import Request, Response
from starlette.datastructures import Headers

from batchserve.errors import PreconditionFailed

__all__ = ["HEADERS", "answered", "is_conditional", "require"]

HEADERS = frozenset({b"if-match", b"if-unmodified-since", b"if-none-match", b"if-modified-since"})
"""Headers that make a request conditional, as in an ASGI scope. If-Range only chooses between 206 and 200."""
_TAG = re.compile(r'(?:W/)?"[\x21\x23-\x7e\x80-\xff]*"')
_SAFE = ("GET", "HEAD")


def answered(
    request: Request, etag: str | None, headers: Mapping[str, str] | None = None, modified: datetime | None = None
) -> Response | None:
    """304 with `headers` when the client already has this representation; None when the request must be answered.

    `etag` None: there is a representation, without a tag. Raises PreconditionFailed.
    """
    status = _unmet(request, etag, modified, exists=True)
    if status == 412:
        raise _failed(request, etag)
    tag = {"etag": etag} if etag else {}
    return Response(status_code=304, headers={**(headers or {}), **tag}) if status == 304 else None


def is_conditional(request: Request) -> bool:
    return any(name in HEADERS for name, _ in request.headers.raw)


def require(request: Request, etag: str | None, *, exists: bool) -> None:
    """Checks a request that changes or creates the resource of `etag`. Raises PreconditionFailed."""
    if _unmet(request, etag, None, exists=exists) is not None:
        raise _failed(request, etag)


def _unmet(request: Request, etag: str | None, modified: datetime | None, *, exists: bool) -> int | None:
    """The status of a failed precondition; None: all hold."""
    headers, is_safe = request.headers, request.method in _SAFE
    wanted = _tags(headers, "if-match")
    if wanted is not None:
        if not exists or (wanted != ["*"] and not (etag in wanted and not _is_weak(etag))):
            return 412
    elif modified is not None and (moment := _date(headers, "if-unmodified-since")) and modified > moment:
        return 412
    known = _tags(headers, "if-none-match")
    if known is not None:
        if exists and (known == ["*"] or _opaque(etag) in map(_opaque, known)):
            return 304 if is_safe else 412
    elif is_safe and modified is not None and (moment := _date(headers, "if-modified-since")) and modified <= moment:
        return 304
    return None


def _tags(headers: Headers, name: str) -> list[str] | None:
    """The entity tags of a list, or `*`; None without the header. An invalid tag matches nothing."""
    if name not in headers:
        return None
    text = ",".join(headers.getlist(name))
    return ["*"] if text.strip() == "*" else _TAG.findall(text)


def _opaque(etag: str | None) -> str | None:
    """The part of a tag that the weak comparison compares."""
    return etag.removeprefix("W/") if etag is not None else None


def _is_weak(etag: str | None) -> bool:
    return etag is None or etag.startswith("W/")


def _date(headers: Headers, name: str) -> datetime | None:
    """An invalid date is ignored, as by the RFC."""
    try:
        found = parsedate_to_datetime(headers[name])
        return found.astimezone(UTC) if found.tzinfo else found.replace(tzinfo=UTC)
    except (KeyError, ValueError, OverflowError):
        return None


def _failed(request: Request, etag: str | None) -> PreconditionFailed:
    now = f"its ETag is {etag}" if etag is not None else "it has no ETag, or does not exist"
    return PreconditionFailed(f"a precondition of the request does not hold for {request.url.path}: {now}")
