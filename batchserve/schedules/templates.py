"""Placeholders in the texts of a request: `{date}`, `{date-1d}`, `{date-1mo:%Y%m}`, `{time}`, `{schedule}`.

    place   = "{" name *offset [":" format] "}"
    name    = "date" / "time" / "schedule"
    offset  = ("+" / "-") number ("h" / "d" / "w" / "mo" / "y")
    format  = text with the directives of strftime that are the same everywhere

Dates are those of a tick in the time zone of its schedule. Days, weeks, months and years are of the calendar: a day
before 02:00 is 02:00, also when clocks were set; a month before 31 March is the last of February. An hour is an hour.
`{{` and `}}` are braces.
"""

import calendar
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any
from zoneinfo import ZoneInfo

from batchserve.errors import InvalidOptions

__all__ = ["Moment", "filled"]

_PLACE = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]")
_PARTS = re.compile(r"(?P<name>\w+?)(?P<offsets>(?:[+-]\d{1,5}(?:mo|[hdwy]))*)(?::(?P<format>.*))?", re.ASCII)
_OFFSET = re.compile(r"([+-]\d{1,5})(mo|[hdwy])")
_DIRECTIVE = re.compile(r"%(.?)", re.DOTALL)
_DIRECTIVES = "YmdHMSyjGVu%"
"""Those of strftime that depend neither on the language nor on the system."""
_DEFAULTS = {"date": "%Y-%m-%d", "time": "%H%M"}
_OF_RESULTS = frozenset({"stem"})
"""Placeholders in the output of a job, which it replaces itself."""
_MOST_LEVELS = 16


@dataclass(frozen=True, slots=True)
class Moment:
    """What the placeholders of a tick stand for."""

    at: float
    zone: ZoneInfo
    schedule: str


def filled(request: Mapping[str, Any], moment: Moment) -> dict[str, Any]:
    """The request with its placeholders replaced, in the texts of all values. Raises InvalidOptions, which names the
    place of an unknown one."""
    return {name: _filled(value, moment, ("request", name)) for name, value in request.items()}


def _filled(value: Any, moment: Moment, place: tuple[str, ...]) -> Any:
    if len(place) > _MOST_LEVELS:
        raise InvalidOptions(f"{'.'.join(place)}: expected at most {_MOST_LEVELS} levels")
    if isinstance(value, str):
        return _PLACE.sub(lambda found: _replaced(found, moment, place), value)
    if isinstance(value, dict):
        return {name: _filled(part, moment, (*place, str(name))) for name, part in value.items()}
    if isinstance(value, list):
        return [_filled(part, moment, (*place, str(number))) for number, part in enumerate(value)]
    return value


def _replaced(found: re.Match[str], moment: Moment, place: tuple[str, ...]) -> str:
    if found[0] in ("{{", "}}"):
        return found[0][0]
    if found[1] is None:
        raise _refused(place, f"{found[0]!r} is alone; a brace itself is written {2 * found[0]!r}", found[0])
    if "output" in place and found[1] in _OF_RESULTS:
        return found[0]
    parts = _PARTS.fullmatch(found[1])
    if parts is None or parts["name"] not in (*_DEFAULTS, "schedule"):
        expected = "expected {date}, {time} or {schedule}, with offsets and a format as in {date-1d:%Y%m%d}"
        raise _refused(place, f"there is no placeholder {found[0]!r}; {expected}", found[0])
    if parts["name"] == "schedule":
        if parts["offsets"] or parts["format"] is not None:
            raise _refused(place, f"{found[0]!r}: a name has no offset and no format", found[0])
        return moment.schedule
    format = _DEFAULTS[parts["name"]] if parts["format"] is None else parts["format"]
    if unknown := [one for one in _DIRECTIVE.findall(format) if not one or one not in _DIRECTIVES]:
        known = ", ".join(f"%{one}" for one in _DIRECTIVES)
        raise _refused(place, f"{found[0]!r}: there is no directive '%{unknown[0]}'; expected {known}", found[0])
    try:
        return _moved(moment, parts["offsets"]).strftime(format)
    except (OverflowError, ValueError):
        raise _refused(place, f"{found[0]!r} leads out of the calendar", found[0]) from None


def _moved(moment: Moment, offsets: str) -> datetime:
    """Raises OverflowError and ValueError."""
    local = datetime.fromtimestamp(moment.at, moment.zone)
    for number, unit in _OFFSET.findall(offsets):
        count = int(number)
        if unit == "h":
            local = (local.astimezone(UTC) + timedelta(hours=count)).astimezone(moment.zone)
        elif unit in "dw":
            local += timedelta(days=count * (7 if unit == "w" else 1))  # of the calendar: the time of the day stays
        else:
            local = _months_later(local, count * (12 if unit == "y" else 1))
    return local


def _months_later(moment: datetime, months: int) -> datetime:
    year, month = divmod(12 * moment.year + moment.month - 1 + months, 12)
    if not 1 <= year <= 9999:
        raise OverflowError(year)
    last = calendar.monthrange(year, month + 1)[1]
    return moment.replace(year=year, month=month + 1, day=min(moment.day, last))


def _refused(place: tuple[str, ...], message: str, found: str) -> InvalidOptions:
    name = ".".join(place)
    return InvalidOptions(f"{name}: {message}", errors=[{"parameter": name, "message": message, "value": found}])
