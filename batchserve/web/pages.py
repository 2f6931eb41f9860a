"""Pages from templates, and how values are written in them."""

import math
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fastapi import Request, Response
from fastapi.responses import HTMLResponse
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from starlette.responses import RedirectResponse

from batchserve import __version__
from batchserve.access import Caller
from batchserve.api.schemas.times import time_of
from batchserve.web.tokens import token_of

__all__ = ["page", "see"]

UNKNOWN = "-"
_KEPT_PRIVATE = {"cache-control": "no-store", "referrer-policy": "same-origin"}


def page(request: Request, template: str, status: int = 200, **values: Any) -> Response:
    """A page, or the part of one that a template `_name.html` is."""
    caller: Caller = request.scope.get("caller", Caller())
    text = _TEMPLATES.get_template(template).render(
        values, request=request, path=request.scope["path"], caller=caller, may_change=caller.may_change,
        token=token_of(request), version=__version__,
    )  # fmt: skip
    return HTMLResponse(text, status, _KEPT_PRIVATE)


def see(request: Request, address: str) -> Response:
    """Leads to a page of this site: a browser at once, a script by a header, as it would read that page itself."""
    if request.headers.get("hx-request"):
        return Response(status_code=204, headers={"hx-redirect": address})
    return RedirectResponse(address, 303)


def count(number: float | None) -> str:
    """`1,234,567`."""
    return UNKNOWN if number is None else f"{number:,.0f}"


def duration(seconds: float | None) -> str:
    """`12.3 s`, `4 min 5 s`, `2 h 3 min`, `5 d 1 h`."""
    if seconds is None:
        return UNKNOWN
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours < 24 else f"{hours // 24} d {hours % 24} h"


def size(number: float | None) -> str:
    """`123 bytes`, `1.2 MB`: in units of thousands, as file managers show them."""
    if number is None:
        return UNKNOWN
    if number < 1000:
        return f"{number:,.0f} bytes"
    units = ["kB", "MB", "GB", "TB"]
    power = min(len(units), int(math.log10(number) // 3))
    return f"{number / 1000**power:.3g} {units[power - 1]}"


def time(moment: datetime | None) -> str:
    """`2026-11-30 14:05:09 UTC`; scripts show it in the time of the reader."""
    return UNKNOWN if moment is None else moment.astimezone(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


_TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).parent / "templates"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
_TEMPLATES.filters |= {"count": count, "duration": duration, "moment": time_of, "size": size, "time": time}
