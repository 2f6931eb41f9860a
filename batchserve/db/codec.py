"""Everything written to the database can be read again, and an unreadable value is a value like others.

JSON goes through `dumps` and `loads`, texts and times through the column types below. Both sides refuse the same
values: infinities, NaN, lone surrogates, the character NUL, integers beyond 64 bits. A value that was not written by
them (but by hand, an older release or a failing disk) is read as `UNREADABLE`, so that it fails its own row only.
"""

import json
import math
import re
from collections.abc import Callable
from typing import Any, Final

import orjson
from sqlalchemy import Dialect, Float, String
from sqlalchemy.exc import DontWrapMixin
from sqlalchemy.types import TypeDecorator

from batchserve.errors import InvalidOptions

__all__ = ["UNREADABLE", "Number", "Unwritable", "Words", "dumps", "loads"]

_SUSPECT = re.compile(r"\\u0000|[0-9]{19}")


class Unwritable(InvalidOptions, DontWrapMixin):
    """A value that the database could not return unchanged. The transaction is rolled back."""


class _Unreadable:
    def __repr__(self) -> str:
        return "not readable"


UNREADABLE: Final = _Unreadable()
"""Replaces invalid JSON. No column has values of its type."""


def dumps(value: Any) -> str:
    """JSON with unescaped texts, so that a search finds them. Raises Unwritable."""
    if value == {}:  # as the metadata of most jobs
        return "{}"
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
        orjson.loads(text)
    except (ValueError, TypeError, RecursionError) as error:  # of orjson for a lone surrogate, too
        raise Unwritable(f"a value cannot be stored as JSON: {_ascii(error)}") from None
    if _SUSPECT.search(text):
        _require_plain(value)
    return text


def loads(text: str | bytes) -> Any:
    """The value; UNREADABLE for JSON that `dumps` never writes."""
    try:
        return orjson.loads(text)
    except ValueError:
        return UNREADABLE


class Words(TypeDecorator[str]):
    """Text that can be read again."""

    impl = String
    cache_ok = True

    def bind_processor(self, dialect: Dialect) -> Callable[[str | None], str | None]:  # noqa: ARG002
        return _checked_text


class Number(TypeDecorator[float]):
    """A finite number. SQLite would store NaN as null."""

    impl = Float
    cache_ok = True

    def bind_processor(self, dialect: Dialect) -> Callable[[float | None], float | None]:  # noqa: ARG002
        return _checked_number


def _checked_text(value: str | None) -> str | None:
    if isinstance(value, str):
        _require_text(value)
    return value


def _checked_number(value: float | None) -> float | None:
    if value is not None and not math.isfinite(value):
        raise Unwritable(f"expected a finite number, got {value}")
    return value


def _require_plain(value: Any) -> None:
    """Raises Unwritable for a NUL or an integer beyond 64 bits, which JSON allows and other readers do not."""
    if isinstance(value, str):
        _require_text(value)
    elif isinstance(value, int) and not -(2**63) <= value < 2**64:
        raise Unwritable("expected integers of at most 64 bits, got a longer one")
    elif isinstance(value, dict):
        for name, part in value.items():
            _require_plain(name)
            _require_plain(part)
    elif isinstance(value, list | tuple):
        for part in value:
            _require_plain(part)


def _require_text(text: str) -> None:
    if "\0" in text:
        raise Unwritable(f"a text contains the character NUL: {_ascii(text)}")
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:
            raise Unwritable(f"a text contains a lone surrogate, which is not a character: {_ascii(text)}") from None


def _ascii(shown: object) -> str:
    return ascii(str(shown))[1:-1][:200]
