"""Bodies about schedules and their ticks."""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Annotated, Any, Literal, get_args
from zoneinfo import ZoneInfo

from pydantic import BaseModel, ConfigDict, Field, field_validator

from batchserve.api import examples
from batchserve.api.schemas.times import time_of, time_or_none
from batchserve.cron import meaning_of, zone_of
from batchserve.errors import InvalidOptions
from batchserve.recurring import ActionKind, CatchUp, Overlap, Schedule, Tick, TickState
from batchserve.schedules.definition import Definition, next_times
from batchserve.timetable.ticks import MOST_JOBS, TickJobs
from batchserve.values import Plain, no_truth

_EARLIEST, _LATEST = datetime(1970, 1, 1, tzinfo=UTC), datetime(3000, 1, 1, tzinfo=UTC)
_MOST_CAUGHT_UP = 1000

State = Literal["pending", "queued", "skipped", "failed"]
assert set(get_args(State)) == set(TickState)


class ScheduleRequest(BaseModel):
    """A schedule as a client defines it."""

    model_config = ConfigDict(extra="forbid", json_schema_extra={"example": examples.SCHEDULE_REQUEST})

    name: Annotated[str, Plain] = Field(
        max_length=64, description="Unique in the tenant: letters, digits, `.`, `_` and `-`.", examples=["nightly"]
    )
    cron: Annotated[str, Plain] = Field(
        max_length=512,
        description="Five fields: minute, hour, day of month, month, day of week.",
        examples=["0 2 * * *"],
    )
    time_zone: Annotated[str, Plain] = Field("UTC", max_length=64, description="Its IANA name, as `Europe/Zurich`.")
    action: Literal["job", "uploaded"] = Field(
        "job", description="`job`: one job, as of `POST /v1/jobs`. `uploaded`: all inputs that wait in state uploaded."
    )
    request: dict[str, Any] = Field(
        description="The body of `POST /v1/jobs`, or the options of `POST /v1/jobs/predict`. In its texts "
        "`{date}`, `{date-1d}` and `{date:%Y%m}` stand for the date of a tick."
    )
    catch_up: Literal["none", "last", "all"] = Field(
        "last", description="Which ticks run later that were missed while no server or worker ran."
    )
    catch_up_limit: int = Field(100, ge=1, le=_MOST_CAUGHT_UP, description="Most ticks that `all` catches up.")
    overlap: Literal["skip", "queue"] = Field(
        "skip", description="What becomes of a tick while a job of an earlier one is unfinished; `queue`: it waits."
    )

    _numbers = field_validator("catch_up_limit", mode="before")(no_truth)

    def definition(self) -> Definition:
        return Definition(
            name=self.name,
            cron=self.cron,
            time_zone=self.time_zone,
            action=ActionKind(self.action),
            request=self.request,
            catch_up=CatchUp(self.catch_up),
            catch_up_limit=self.catch_up_limit,
            overlap=Overlap(self.overlap),
        )


class RunRequest(BaseModel):
    """A run on request."""

    model_config = ConfigDict(extra="forbid", json_schema_extra={"example": {"at": "2026-11-29T01:00:00Z"}})

    at: datetime | None = Field(
        None, description="The time whose dates the request has (RFC 3339): to repeat a tick. Default: now."
    )

    @field_validator("at")
    @classmethod
    def _has_zone(cls, moment: datetime | None) -> datetime | None:
        if moment is not None and moment.tzinfo is None:
            raise ValueError("expected a time with a zone, as in 2026-11-20T02:00:00Z")
        if moment is not None and not _EARLIEST <= moment < _LATEST:
            raise ValueError("expected a time of the years 1970 to 2999")
        return moment


class TickJob(BaseModel):
    id: str
    state: str | None = Field(description="Null: the job was deleted.")


class TickBody(BaseModel):
    """A tick. `state`: `pending`, `queued`, `skipped` or `failed`."""

    model_config = ConfigDict(json_schema_extra={"example": examples.TICK})

    id: int
    at: datetime = Field(description="When it was due, in the time zone of the schedule: the time of its dates.")
    kind: Literal["due", "late", "run"] = Field(description="`late`: it was missed, and caught up. `run`: on request.")
    state: State
    jobs: list[TickJob] = Field(description=f"Its jobs, of many the first {MOST_JOBS}.")
    jobs_total: int
    job_states: dict[str, int] = Field(description="How many of its jobs are in each state, or `deleted`.")
    error: dict[str, Any] | None = Field(
        description="`code` and `message`: why nothing was queued, or not everything; of a pending tick: why not yet."
    )
    attempt: int
    created_at: datetime
    ended_at: datetime | None


class TickList(BaseModel):
    model_config = ConfigDict(json_schema_extra={"example": examples.TICKS})

    ticks: list[TickBody]
    next: int | None = Field(description="Value of `after` for the next page; null on the last one.")


class ScheduleBody(BaseModel):
    """A schedule, with its next times and its last tick."""

    model_config = ConfigDict(json_schema_extra={"example": examples.SCHEDULE})

    id: str
    tenant: str
    name: str
    cron: str
    meaning: str | None = Field(description="The cron text as an English phrase.")
    time_zone: str
    action: Literal["job", "uploaded"]
    request: dict[str, Any]
    catch_up: Literal["none", "last", "all"]
    catch_up_limit: int
    overlap: Literal["skip", "queue"]
    paused: bool
    next: list[datetime] = Field(description="Its next five times; none while it is paused.")
    last: TickBody | None
    created_at: datetime
    changed_at: datetime
    paused_at: datetime | None
    links: dict[str, str]


class ScheduleList(BaseModel):
    model_config = ConfigDict(json_schema_extra={"example": examples.SCHEDULES})

    schedules: list[ScheduleBody]
    next: str | None = Field(description="Value of `after` for the next page; null on the last one.")


def tick_body(tick: Tick, its_jobs: TickJobs | None, zone: ZoneInfo) -> TickBody:
    """`its_jobs`: None where it has none."""
    found = its_jobs or TickJobs()
    return TickBody(
        id=tick.id,
        at=_local(tick.at, zone),
        kind="run" if tick.on_request else "late" if tick.late else "due",
        state=tick.state.value,
        jobs=[TickJob(id=job_id, state=state) for job_id, state in found.first],
        jobs_total=tick.jobs,
        job_states=dict(found.by_state),
        error=None if tick.error is None else dict(tick.error),
        attempt=tick.attempt,
        created_at=time_of(tick.created_at),
        ended_at=time_or_none(tick.ended_at),
    )


def tick_list(
    schedule: Schedule, ticks: Sequence[Tick], jobs: Mapping[int, TickJobs], following: int | None
) -> TickList:
    zone = zone_or_utc(schedule)
    return TickList(ticks=[tick_body(tick, jobs.get(tick.id), zone) for tick in ticks], next=following)


def schedule_body(schedule: Schedule, last: Tick | None = None, its_jobs: TickJobs | None = None) -> ScheduleBody:
    zone, self_ = zone_or_utc(schedule), f"/v1/schedules/{schedule.id}"
    return ScheduleBody(
        id=schedule.id,
        tenant=schedule.tenant,
        name=schedule.name,
        cron=schedule.cron,
        meaning=_meaning(schedule),
        time_zone=schedule.time_zone,
        action=schedule.action.value,
        request=dict(schedule.request),
        catch_up=schedule.catch_up.value,
        catch_up_limit=schedule.catch_up_limit,
        overlap=schedule.overlap.value,
        paused=schedule.paused_at is not None,
        next=[_local(at, zone) for at in next_times(schedule)],
        last=None if last is None else tick_body(last, its_jobs, zone),
        created_at=time_of(schedule.created_at),
        changed_at=time_of(schedule.changed_at),
        paused_at=time_or_none(schedule.paused_at),
        links={"self": self_} | {name: f"{self_}/{name}" for name in ("ticks", "run", "pause", "resume")},
    )


def zone_or_utc(schedule: Schedule) -> ZoneInfo:
    """UTC where this host does not know the time zone any more."""
    try:
        return zone_of(schedule.time_zone)
    except InvalidOptions:
        return ZoneInfo("UTC")


def _local(seconds: float, zone: ZoneInfo) -> datetime:
    try:
        return datetime.fromtimestamp(seconds, zone)
    except (OverflowError, ValueError):  # at the ends of the calendar
        return time_of(seconds)


def _meaning(schedule: Schedule) -> str | None:
    try:
        return meaning_of(schedule.cron)
    except InvalidOptions:
        return None
