"""Pages as a test reads them: with the blanks between lines and words as one."""

import re
from collections.abc import Mapping

from service import Api

__all__ = ["HTMX", "part_of", "shown", "text_of"]

HTMX = {"hx-request": "true"}
"""Headers by which a part of a page is asked for."""


def shown(api: Api, path: str, status: int = 200, /, **query: str) -> str:
    """The page at a path."""
    return _read(api, path, status, query, {})


def part_of(api: Api, path: str) -> str:
    """The part of a page at a path, as htmx asks for it."""
    return _read(api, path, 200, {}, HTMX)


def _read(api: Api, path: str, status: int, query: Mapping[str, str], headers: Mapping[str, str]) -> str:
    answer = api.http.get(path, params=query or None, headers=headers)
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    return text_of(answer.text)


def text_of(page: str) -> str:
    return re.sub(r"\s+", " ", page)
