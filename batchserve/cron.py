"""Times of a cron text in a time zone, as Debian's cron has them.

Two days of a year are special where clocks are set. A text whose minute and hour both begin with something else than
`*` names times of the day: one that the clocks skip occurs at the end of the gap, and one that they repeat occurs once,
the first time. Any other text names an interval, which runs by elapsed time: every hour stays every hour.
"""

import difflib
import zoneinfo
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from math import floor

from cronsim import CronSim, CronSimError

from batchserve.errors import InvalidOptions

__all__ = ["meaning_of", "next_after", "require_cron", "times_after", "zone_of"]

_FIELDS = ("minute", "hour", "day of month", "month", "day of week")
_COUNTS = {0: "none", 1: "one", 2: "two", 3: "three", 4: "four", 6: "six", 7: "seven"}
_HINTS = {6: ": there is no field for seconds or years", 1: ": `@daily` is written `0 0 * * *`"}
_DAY = 86400
"""Seconds in which the offset of a zone changes once at most."""
_ANY_DAY = datetime(2026, 1, 1, tzinfo=UTC)


def require_cron(text: str) -> str:
    """The text with single spaces. Raises InvalidOptions unless it has exactly five fields, each as cron has them."""
    fields = text.split()
    if len(fields) != len(_FIELDS):
        count = _COUNTS.get(len(fields), str(len(fields)))
        raise InvalidOptions(
            f"cron: expected five fields ({', '.join(_FIELDS)}), got {count} in {text[:100]!r}"
            + _HINTS.get(len(fields), "")
        )
    cron = " ".join(fields)
    _parsed(cron, _ANY_DAY)
    return cron


def meaning_of(cron: str) -> str:
    """The text as an English phrase, such as `At 02:00 every day`."""
    return str(_parsed(cron, _ANY_DAY).explain())


def zone_of(name: str) -> zoneinfo.ZoneInfo:
    """A time zone by its IANA name. Raises InvalidOptions, with the names that are close."""
    try:
        return zoneinfo.ZoneInfo(name)
    except (zoneinfo.ZoneInfoNotFoundError, ValueError, OSError):
        known = zoneinfo.available_timezones()
        close = difflib.get_close_matches(name[:64], sorted(known), 3)
        similar = f" (close: {', '.join(close)})" if close else ""
        expected = "expected a name such as Europe/Zurich or UTC"
        raise InvalidOptions(f"time_zone: {expected}, got {name[:100]!r}{similar}") from None


def times_after(cron: str, zone: zoneinfo.ZoneInfo, after: float) -> Iterator[float]:
    """The times after a moment, in seconds since the epoch, in their order. It ends when none comes for 50 years, and
    at the end of the calendar. Raises InvalidOptions."""
    if _is_interval(cron):
        yield from _interval_after(cron, zone, after)
        return
    last = after
    try:
        # Down to a second: `fromtimestamp` rounds to microseconds, perhaps up to a time that is still to come.
        for found in _parsed(cron, datetime.fromtimestamp(floor(after), zone)):
            # In an hour that is repeated, a time of the day has its first occurrence in the past.
            if (moment := found.timestamp()) > last:
                last = moment
                yield moment
    except OverflowError:
        return


def _is_interval(cron: str) -> bool:
    return any(field.startswith("*") for field in cron.split()[:2])


def _interval_after(cron: str, zone: zoneinfo.ZoneInfo, after: float) -> Iterator[float]:
    """Each minute whose local time is one of the text. While the offset of the zone holds, local time goes on as UTC
    does; where it changes, the search begins anew. (CronSim goes on in whole hours across a change, and misses minutes
    where that is one of half an hour, or not on the hour.)"""
    begin = known = floor(after)  # the offset holds until `known`
    try:
        offset = _offset(zone, begin)
        while True:
            for found in _parsed(cron, datetime.fromtimestamp(begin, UTC) + offset):
                moment = (found - offset).timestamp()
                while known < moment and _offset(zone, known + _DAY) == offset:
                    known += _DAY
                if known < moment and (change := _change_after(zone, known)) <= moment:
                    begin, known, offset = change - 1, change, _offset(zone, change)
                    break
                yield moment
            else:
                return
    except (OverflowError, ValueError):  # the end of the calendar
        return


def _offset(zone: zoneinfo.ZoneInfo, moment: float) -> timedelta:
    offset = datetime.fromtimestamp(moment, zone).utcoffset()
    assert offset is not None
    return offset


def _change_after(zone: zoneinfo.ZoneInfo, moment: int) -> int:
    """The second within the next day at which the offset changes."""
    before, low, high = _offset(zone, moment), moment, moment + _DAY
    while high - low > 1:
        middle = (low + high) // 2
        if _offset(zone, middle) == before:
            low = middle
        else:
            high = middle
    return high


def next_after(cron: str, zone: zoneinfo.ZoneInfo, after: float) -> float | None:
    return next(times_after(cron, zone, after), None)


def _parsed(cron: str, start: datetime) -> CronSim:
    try:
        return CronSim(cron, start)
    except CronSimError as error:
        what = str(error).removeprefix("Bad ").replace("-", " ")
        value = dict(zip(_FIELDS, cron.split(), strict=False)).get(what, cron)
        raise InvalidOptions(f"cron: the {what} cannot be {value[:100]!r}, in {cron[:100]!r}") from None
