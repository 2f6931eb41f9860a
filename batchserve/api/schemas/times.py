"""Times as answers give them."""

from datetime import UTC, datetime


def time_of(seconds: float) -> datetime:
    """The moment, in UTC, so many seconds after the epoch."""
    return datetime.fromtimestamp(seconds, UTC)


def time_or_none(seconds: float | None) -> datetime | None:
    return None if seconds is None else time_of(seconds)
