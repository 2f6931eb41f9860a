"""The terms of schedules as frozen dataclasses. Times: seconds since the epoch."""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

__all__ = ["ActionKind", "CatchUp", "Overlap", "Schedule", "Tick", "TickState"]


class ActionKind(StrEnum):
    """What a tick of a schedule queues."""

    JOB = "job"
    """One job, by the request of `POST /v1/jobs`."""
    UPLOADED = "uploaded"
    """All inputs that wait in state uploaded, by the options of `POST /v1/jobs/predict`."""


class CatchUp(StrEnum):
    """Which missed ticks run later: those that were due while no process looked, longer ago than the grace."""

    NONE = "none"
    LAST = "last"
    """The newest, unless one is due on time at that moment."""
    ALL = "all"
    """The newest `catch_up_limit`, one after another."""


class Overlap(StrEnum):
    """What becomes of a tick while a job of an earlier tick of its schedule is unfinished."""

    SKIP = "skip"
    QUEUE = "queue"
    """It waits for the end of that job."""


class TickState(StrEnum):
    """State of a tick. Only a pending one changes."""

    PENDING = "pending"
    """It will run, waits for an earlier one, or is tried again."""
    QUEUED = "queued"
    """Its jobs are queued, or completed already. An `error` says why others are not."""
    SKIPPED = "skipped"
    """Nothing was queued, as the policies of the schedule say; `error` has the reason."""
    FAILED = "failed"
    """Nothing was queued; `error` has the reason."""


@dataclass(frozen=True, slots=True)
class Schedule:
    """A request that is repeated at the times of a cron text."""

    id: str
    tenant: str
    name: str
    """Unique in its tenant."""
    cron: str
    time_zone: str
    action: ActionKind
    request: Mapping[str, Any]
    """A template: placeholders in its texts stand for the date of a tick."""
    catch_up: CatchUp
    catch_up_limit: int
    overlap: Overlap
    created_at: float
    changed_at: float
    planned_at: float
    """When `next_at` was computed."""
    paused_at: float | None = None
    next_at: float | None = None
    """Its next tick; None: there is none, or it is paused."""

    @property
    def definition(self) -> tuple[Any, ...]:
        """What a client defines."""
        policies = (self.catch_up, self.catch_up_limit, self.overlap)
        return (self.name, self.cron, self.time_zone, self.action, dict(self.request), *policies)


@dataclass(frozen=True, slots=True)
class Tick:
    """One time of a schedule, and what came of it."""

    id: int
    schedule_id: str
    at: float
    """The time whose dates its request has: when it was due."""
    run: int
    """0: due by the schedule. Otherwise the number of a run on request."""
    late: bool
    """Whether it was missed, and is caught up."""
    state: TickState
    attempt: int
    """Tries so far: the fencing token of its writes."""
    try_at: float
    """When it may be tried; while a scheduler works on it, when another one may."""
    jobs: int
    """Number of its jobs."""
    created_at: float
    ended_at: float | None = None
    error: Mapping[str, Any] | None = None
    """Why nothing, or not everything, is queued: `code` and `message`. Of a pending tick: why not yet."""

    @property
    def on_request(self) -> bool:
        return self.run > 0
