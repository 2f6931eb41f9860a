"""Which ticks of a schedule are due, and which of them run: a function of its times, its policies and the clock."""

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from itertools import islice, takewhile
from typing import Any
from zoneinfo import ZoneInfo

from batchserve.cron import next_after, times_after, zone_of
from batchserve.recurring import CatchUp, Schedule
from batchserve.schedules.claim import reason

__all__ = ["Plan", "Planned", "plan_of"]

_MOST_READ = 100_000
"""Times that are read at once: as many as a minutely schedule has in 69 days."""


@dataclass(frozen=True, slots=True)
class Planned:
    """A tick to write. `skipped`: the reason why it does not run."""

    at: float
    late: bool = False
    skipped: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class Plan:
    """What to write for a schedule: its due ticks, in their order, and its next time."""

    ticks: tuple[Planned, ...]
    next_at: float | None


def plan_of(schedule: Schedule, now: float, grace: float) -> Plan:
    """A tick that was due longer ago than `grace` seconds was missed: whether it runs is a matter of catch-up. All that
    are not caught up share one entry of the history. Raises InvalidOptions when the schedule cannot be read."""
    zone = zone_of(schedule.time_zone)
    next_at = next_after(schedule.cron, zone, now)
    if schedule.next_at is None or schedule.next_at > now:  # the clock was set back
        return Plan((), next_at)
    due = _due(schedule, zone, schedule.next_at, now, grace)
    caught, left = _caught_up(schedule, due)
    planned = [Planned(at, late=True) for at in caught] + [Planned(at) for at in due.on_time]
    if left:
        skipped = _missed(schedule, zone, left[-1], len(left) + due.more, is_exact=due.is_exact)
        planned.insert(0, Planned(left[-1], skipped=skipped))
    return Plan(tuple(planned), next_at)


@dataclass(frozen=True, slots=True)
class _Due:
    missed: list[float]
    """The newest ones."""
    on_time: list[float]
    more: int
    """Missed ones before those, as far as they were counted."""
    is_exact: bool
    """Whether all were counted."""


def _due(schedule: Schedule, zone: ZoneInfo, first: float, now: float, grace: float) -> _Due:
    """The ticks from the first until now."""
    missed: deque[float] = deque(maxlen=schedule.catch_up_limit + 1)
    on_time: list[float] = []
    count, begin, found, is_exact = 0, first, [first], True
    while found:
        for at in found:
            if at < now - grace:
                missed.append(at)
                count += 1
            else:
                on_time.append(at)
        following = islice(times_after(schedule.cron, zone, begin), _MOST_READ)
        found = list(takewhile(lambda at: at <= now, following))
        begin = found[-1] if found else now
        # Of so many, the older half of the rest is not read; but the newest are, as many as here.
        further = min(begin + (now - begin) / 2, now - grace - (found[-1] - found[0])) if found else begin
        if len(found) == _MOST_READ and further > begin:
            begin, is_exact = further, False
    return _Due(list(missed), on_time, count - len(missed), is_exact)


def _caught_up(schedule: Schedule, due: _Due) -> tuple[list[float], list[float]]:
    """The missed ticks that run, and the others."""
    most = 0
    if schedule.catch_up is CatchUp.ALL:
        most = schedule.catch_up_limit
    elif schedule.catch_up is CatchUp.LAST and not due.on_time:
        most = 1
    cut = max(0, len(due.missed) - most)
    return due.missed[cut:], due.missed[:cut]


def _missed(schedule: Schedule, zone: ZoneInfo, newest: float, count: int, *, is_exact: bool) -> dict[str, Any]:
    last = datetime.fromtimestamp(newest, zone).isoformat()
    ticks = f"the tick of {last} was" if count == 1 else f"{count:,} ticks up to {last} were"
    limit = f" with the limit {schedule.catch_up_limit}" if schedule.catch_up is CatchUp.ALL else ""
    least = "" if is_exact else "at least "
    message = f"{least}{ticks} missed: no server or worker ran then, and catch-up is {schedule.catch_up}{limit}"
    return reason("missed", message) | {"ticks": count}
