"""Query parameters that lists have in common: several values, times, the order."""

import re
from collections.abc import Mapping
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any

from fastapi import Query

from batchserve.errors import InvalidOptions


class Direction(StrEnum):
    """Of a list."""

    DESC = "desc"
    ASC = "asc"


def comma_separated(values: Any) -> Any:
    """The values of a query parameter that is repeated, or given once with commas."""
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        return values
    return [part.strip() for value in values for part in value.split(",")]


def moment_query(description: str) -> Any:
    """A query parameter for `moments`."""
    return Query(
        description=f"{description} RFC 3339, a date, or an age such as `30min`, `12h` or `7d`.",
        max_length=64,
        examples=["2026-11-20T02:00:00Z", "7d"],
    )


def moments(times: Mapping[str, str], now: float) -> dict[str, Any]:
    """The times of these parameters, in seconds since the epoch. Raises InvalidOptions."""
    found = {}
    for name, text in times.items():
        try:
            found[name] = moment_of(text, now)
        except ValueError as error:
            raise InvalidOptions(f"{name}: {error}, got {text!r}") from None
    return found


def moment_of(text: str, now: float) -> float:
    """A time or an age, before `now`, in seconds since the epoch. Without a zone it is in UTC. Raises ValueError."""
    if found := _AGO.fullmatch(text):
        return now - int(found[1]) * _SECONDS[found[2]]
    try:
        moment = datetime.fromisoformat(text)
        return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp() - _ROUNDED
    except (ValueError, OverflowError):
        raise ValueError("expected an age such as 30min, 12h or 7d, or a date such as 2026-11-30") from None


_ROUNDED = 5e-7
"""Times of answers are rounded to microseconds: one that was rounded up is not before the time that is shown."""
_SECONDS = {"s": 1, "min": 60, "m": 60, "h": 3600, "d": 86_400, "w": 7 * 86_400}
_AGO = re.compile(r"(\d{1,9})(s|min|m|h|d|w)", re.ASCII)
