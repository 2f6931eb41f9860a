"""What a client defines as a schedule, checked as far as that is possible before its first tick."""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

import uuid_utils

from batchserve.cron import next_after, require_cron, times_after, zone_of
from batchserve.errors import InvalidOptions
from batchserve.recurring import ActionKind, CatchUp, Overlap, Schedule
from batchserve.schedules.claim import Actions
from batchserve.schedules.templates import Moment, filled
from batchserve.timetable.schedules import require_name

__all__ = ["Definition", "next_times", "request_of"]


@dataclass(frozen=True, slots=True)
class Definition:
    """A schedule as it is asked for."""

    name: str
    cron: str
    time_zone: str
    action: ActionKind
    request: Mapping[str, Any]
    catch_up: CatchUp
    catch_up_limit: int
    overlap: Overlap

    def check(self, tenant: str, actions: Actions, now: float) -> None:
        """Checks its request as its next tick would have it. Raises InvalidOptions for a text or template that cannot
        be used, and what the check of the action raises."""
        made = self.schedule(tenant, now)
        assert made.next_at is not None
        actions[self.action].check(tenant, request_of(made, made.next_at))

    def schedule(self, tenant: str, now: float, before: Schedule | None = None) -> Schedule:
        """The schedule with its next tick; in the place of the one `before`, it keeps its ID, and stays paused. Raises
        InvalidOptions."""
        require_name(self.name)
        cron, zone = require_cron(self.cron), zone_of(self.time_zone)
        next_at = next_after(cron, zone, now)
        if next_at is None:
            raise InvalidOptions(f"cron: {cron!r} has no time within 50 years")
        paused_at = before.paused_at if before else None
        return Schedule(
            id=before.id if before else str(uuid_utils.uuid7()),
            tenant=tenant,
            name=self.name,
            cron=cron,
            time_zone=self.time_zone,
            action=self.action,
            request=self.request,
            catch_up=self.catch_up,
            catch_up_limit=self.catch_up_limit,
            overlap=self.overlap,
            created_at=before.created_at if before else now,
            changed_at=now,
            planned_at=now,
            paused_at=paused_at,
            next_at=next_at if paused_at is None else None,
        )


def request_of(schedule: Schedule, at: float) -> dict[str, Any]:
    """The request of a tick, with its dates. Raises InvalidOptions."""
    return filled(schedule.request, Moment(at, zone_of(schedule.time_zone), schedule.name))


def next_times(schedule: Schedule, count: int = 5) -> list[float]:
    """The next ticks, none of a paused schedule. Also none where its cron text or time zone cannot be read any more."""
    if schedule.next_at is None:
        return []
    try:
        further = times_after(schedule.cron, zone_of(schedule.time_zone), schedule.next_at)
        return [schedule.next_at, *islice(further, count - 1)]
    except InvalidOptions:
        return []
