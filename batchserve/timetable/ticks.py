"""Ticks: planned, claimed, ended and forgotten.

A pending tick belongs to the process that has claimed it last, until `try_at`. Every write of that process has its
attempt as a guard, also in the transaction that queues a job: so of two that work on a tick, one is undone.
"""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

from sqlalchemy import Connection, and_, delete, exists, func, insert, or_, select, update
from sqlalchemy.sql import ColumnElement

from batchserve import rows
from batchserve.db.tables import jobs, schedules, tick_jobs, ticks
from batchserve.domain import JobState
from batchserve.errors import LeaseLost, UnreadableRow
from batchserve.recurring import Overlap, Schedule, Tick, TickState

__all__ = [
    "DELETED", "MOST_JOBS", "TickJobs", "add", "add_run", "blocker_of", "claim_if_pending", "count_pending", "due",
    "end_if_mine", "end_if_pending", "end_pending", "forget_before", "get", "jobs_of", "known_times",
    "last_of_several", "list_page", "next_moment", "note_jobs_if_mine", "note_reason", "postpone_if_mine",
    "renew_if_mine", "settle_before", "waiting",
]  # fmt: skip

MOST_JOBS = 100
"""Jobs of a tick that are listed by their IDs."""
_FAR = 86400.0
"""Seconds to the next try after which the clock must have been set back."""
DELETED = "deleted"
"""In the place of the state of a job that was deleted."""
_UNFINISHED = (JobState.QUEUED, JobState.RUNNING)
_READ = [ticks.c[name] for name in Tick.__dataclass_fields__]
_PENDING = ticks.c.state == TickState.PENDING


# --- planned ---------------------------------------------------------------------------------------------------------


def known_times(connection: Connection, schedule: Schedule, times: Sequence[float]) -> set[float]:
    """Those of these times that have a row: the clock was set back since."""
    query = select(ticks.c.at).where(ticks.c.schedule_id == schedule.id, ticks.c.run == 0, ticks.c.at.in_(times))
    return set(connection.scalars(query))


def add(
    connection: Connection,
    schedule: Schedule,
    at: float,
    now: float,
    *,
    late: bool = False,
    skipped: Mapping[str, Any] | None = None,
) -> None:
    """A due tick, pending; or with the reason why it is `skipped`."""
    values = _row(schedule, at, now) | {"late": late}
    if skipped is not None:
        values |= {"state": TickState.SKIPPED, "error": dict(skipped), "ended_at": now, "settled": True}
    connection.execute(insert(ticks).values(values))


def count_pending(connection: Connection, schedule: Schedule) -> int:
    query = select(func.count()).select_from(ticks).where(ticks.c.schedule_id == schedule.id, _PENDING)
    return connection.scalar(query) or 0


def add_run(connection: Connection, schedule: Schedule, number: int, at: float, now: float, until: float) -> Tick:
    """A run on request, claimed by its caller."""
    values = _row(schedule, at, now) | {"run": number, "attempt": 1, "try_at": until}
    row = connection.execute(insert(ticks).values(values).returning(*_READ)).mappings().one()
    return rows.tick(row)


def _row(schedule: Schedule, at: float, now: float) -> dict[str, Any]:
    return {"schedule_id": schedule.id, "at": at, "state": TickState.PENDING, "try_at": now, "created_at": now}


# --- claimed and ended -----------------------------------------------------------------------------------------------


def due(connection: Connection, now: float, most: int) -> list[Tick]:
    """The first pending tick of each schedule, where it may be tried and waits for nothing, and the runs on request.
    None of a paused schedule, except runs on request. Tenants take turns, each with its oldest first, so that none of
    them fills the list alone."""
    either = or_(ticks.c.run > 0, and_(_is_next(), ~_waits()))
    turn = func.row_number().over(partition_by=schedules.c.tenant, order_by=ticks.c.id).label("turn")
    both = ticks.join(schedules, ticks.c.schedule_id == schedules.c.id)
    found = select(*_READ, turn).select_from(both).where(_PENDING, _is_free(now), either).subquery()
    query = select(*(found.c[column.name] for column in _READ)).order_by(found.c.turn, found.c.id).limit(most)
    return _readable(connection.execute(query).mappings().all())


def waiting(connection: Connection, now: float, most: int, after: int) -> list[Tick]:
    """The ticks that would be due if they did not wait for earlier ones, from the first ID beyond `after` on."""
    guards = (_PENDING, _is_free(now), ticks.c.id > after, _is_next(), _waits())
    query = select(*_READ).join(schedules, ticks.c.schedule_id == schedules.c.id).where(*guards)
    return _readable(connection.execute(query.order_by(ticks.c.id).limit(most)).mappings().all())


def _is_next() -> ColumnElement[bool]:
    """Whether a tick is the first pending one of a schedule that is not paused."""
    first = select(func.min(ticks.c.id)).where(_PENDING, ticks.c.run == 0).group_by(ticks.c.schedule_id)
    return and_(ticks.c.id.in_(first), schedules.c.paused_at.is_(None))


def _waits() -> ColumnElement[bool]:
    """Whether a tick is to wait, and not to be skipped, and has a blocker (see `blocker_of`)."""
    earlier = ticks.alias("earlier")
    is_earlier = (
        earlier.c.schedule_id == ticks.c.schedule_id,
        earlier.c.settled.is_(False),
        earlier.c.id < ticks.c.id,
    )
    pending = exists(select(earlier.c.id).where(*is_earlier, earlier.c.state == TickState.PENDING))
    its_jobs = earlier.join(tick_jobs, tick_jobs.c.tick_id == earlier.c.id).join(jobs, jobs.c.id == tick_jobs.c.job_id)
    unfinished = select(earlier.c.id).select_from(its_jobs).where(*is_earlier, jobs.c.state.in_(_UNFINISHED))
    may_wait = or_(ticks.c.late, schedules.c.overlap == Overlap.QUEUE)
    return and_(may_wait, or_(pending, exists(unfinished)))


def next_moment(connection: Connection, now: float) -> float | None:
    """When the next pending tick may be tried, of those that may not be tried now."""
    found = connection.scalar(select(func.min(ticks.c.try_at)).where(_PENDING, ticks.c.try_at > now))
    return float(found) if isinstance(found, int | float) else None


def blocker_of(connection: Connection, tick: Tick) -> str | None:
    """What of an earlier tick of its schedule is unfinished, as a phrase; None: nothing. A run on request is blocked by
    nothing."""
    if tick.on_request:
        return None
    earlier = (ticks.c.schedule_id == tick.schedule_id, ticks.c.settled.is_(False), ticks.c.id < tick.id)
    if connection.scalar(select(ticks.c.id).where(*earlier, _PENDING).limit(1)) is not None:
        return "an earlier tick is pending"
    its_jobs = select(jobs.c.id, jobs.c.state).join(tick_jobs, tick_jobs.c.job_id == jobs.c.id)
    query = its_jobs.join(ticks, ticks.c.id == tick_jobs.c.tick_id).where(*earlier, jobs.c.state.in_(_UNFINISHED))
    row = connection.execute(query.order_by(jobs.c.id).limit(1)).one_or_none()
    return None if row is None else f"job {row.id} of an earlier tick is {row.state}"


def settle_before(connection: Connection, tick: Tick) -> None:
    """Notes which earlier ticks have no unfinished job, so that the next look need not read theirs."""
    its_jobs = select(tick_jobs.c.job_id).join(jobs, jobs.c.id == tick_jobs.c.job_id)
    unfinished = exists(its_jobs.where(tick_jobs.c.tick_id == ticks.c.id, jobs.c.state.in_(_UNFINISHED)))
    earlier = (ticks.c.schedule_id == tick.schedule_id, ticks.c.settled.is_(False), ticks.c.id < tick.id)
    connection.execute(update(ticks).where(*earlier, ~_PENDING, ~unfinished).values(settled=True))


def claim_if_pending(connection: Connection, tick: Tick, now: float, until: float) -> Tick | None:
    """The tick with a new attempt, of the caller alone until then. None: another process has claimed or ended it since
    it was read."""
    as_read = (ticks.c.id == tick.id, ticks.c.attempt == tick.attempt, _PENDING, _is_free(now))
    claimed = update(ticks).where(*as_read).values(attempt=tick.attempt + 1, try_at=until, error=None)
    if not connection.execute(claimed).rowcount:
        return None
    return replace(tick, attempt=tick.attempt + 1, try_at=until, error=None)


def renew_if_mine(connection: Connection, held: Sequence[Tick], until: float) -> None:
    """Prolongs the claims of those that were not claimed or ended by another process."""
    for tick in held:
        mine = (ticks.c.id == tick.id, ticks.c.attempt == tick.attempt, _PENDING)
        connection.execute(update(ticks).where(*mine).values(try_at=until))


def note_jobs_if_mine(connection: Connection, tick: Tick, job_ids: Sequence[str], until: float) -> None:
    """Adds jobs that this transaction queues, and prolongs the claim. Raises LeaseLost."""
    _write_if_mine(connection, tick, job_ids, try_at=until)


def end_if_mine(
    connection: Connection,
    tick: Tick,
    state: TickState,
    now: float,
    *,
    job_ids: Sequence[str] = (),
    error: Mapping[str, Any] | None = None,
) -> None:
    """pending -> queued, skipped or failed, together with the jobs that this transaction queues. Raises LeaseLost."""
    told = None if error is None else dict(error)
    _write_if_mine(connection, tick, job_ids, state=state, ended_at=now, error=told)


def postpone_if_mine(connection: Connection, tick: Tick, until: float, error: Mapping[str, Any]) -> None:
    """Gives it back, to be tried again at that time. Raises LeaseLost."""
    _write_if_mine(connection, tick, try_at=until, error=dict(error))


def end_if_pending(connection: Connection, tick: Tick, now: float, reason: Mapping[str, Any]) -> bool:
    """pending -> skipped, for a tick that was not claimed since it was read."""
    as_read = (ticks.c.id == tick.id, ticks.c.attempt == tick.attempt, _PENDING, _is_free(now))
    return _skip(connection, as_read, now, reason) > 0


def end_pending(connection: Connection, schedule: Schedule, now: float, reason: Mapping[str, Any]) -> int:
    """pending -> skipped, for all ticks of a schedule except runs on request; what works on one is undone."""
    return _skip(connection, (ticks.c.schedule_id == schedule.id, ticks.c.run == 0, _PENDING), now, reason)


def note_reason(connection: Connection, tick: Tick, reason: Mapping[str, Any]) -> None:
    """Shows why a pending tick waits, unless another process has claimed it since it was read."""
    as_read = (ticks.c.id == tick.id, ticks.c.attempt == tick.attempt, _PENDING)
    connection.execute(update(ticks).where(*as_read).values(error=dict(reason)))


def _skip(connection: Connection, guards: Iterable[ColumnElement[bool]], now: float, reason: Mapping[str, Any]) -> int:
    values = {"state": TickState.SKIPPED, "error": dict(reason), "ended_at": now}
    return connection.execute(update(ticks).where(*guards).values(values)).rowcount


def _write_if_mine(connection: Connection, tick: Tick, job_ids: Sequence[str] = (), **values: Any) -> None:
    mine = (ticks.c.id == tick.id, ticks.c.attempt == tick.attempt, _PENDING)
    written = update(ticks).where(*mine).values(**values, jobs=ticks.c.jobs + len(job_ids))
    if not connection.execute(written).rowcount:
        raise LeaseLost(f"another process has claimed or ended tick {tick.id}")
    if job_ids:
        connection.execute(insert(tick_jobs), [{"tick_id": tick.id, "job_id": job_id} for job_id in job_ids])


def _is_free(now: float) -> ColumnElement[bool]:
    return or_(ticks.c.try_at <= now, ticks.c.try_at > now + _FAR)


# --- the history -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class TickJobs:
    """The jobs of a tick: the first of them, and how many are in each state. A deleted job has none."""

    first: tuple[tuple[str, str | None], ...] = ()
    by_state: Mapping[str, int] = field(default_factory=dict)


def get(connection: Connection, tick_id: int) -> Tick | None:
    """None: it was deleted. Raises UnreadableRow."""
    row = connection.execute(select(*_READ).where(ticks.c.id == tick_id)).mappings().one_or_none()
    return None if row is None else rows.tick(row)


def list_page(
    connection: Connection,
    schedule_id: str,
    *,
    state: TickState | None = None,
    after: int | None = None,
    limit: int = 50,
) -> tuple[list[Tick], int | None]:
    """The readable ones, newest first, and the last ID if there are more. `after`: the last ID of the previous page."""
    guards = [ticks.c.schedule_id == schedule_id]
    guards += [] if state is None else [ticks.c.state == state]
    guards += [] if after is None else [ticks.c.id < after]
    query = select(*_READ).where(*guards).order_by(ticks.c.id.desc()).limit(limit + 1)
    found = connection.execute(query).mappings().all()
    return _readable(found[:limit]), found[limit - 1]["id"] if len(found) > limit else None


def last_of_several(connection: Connection, schedule_ids: Sequence[str]) -> dict[str, Tick]:
    """The newest tick of each of these schedules that has one."""
    newest = select(func.max(ticks.c.id)).where(ticks.c.schedule_id.in_(schedule_ids)).group_by(ticks.c.schedule_id)
    found = connection.execute(select(*_READ).where(ticks.c.id.in_(newest))).mappings().all()
    return {tick.schedule_id: tick for tick in _readable(found)}


def jobs_of(connection: Connection, tick_ids: Sequence[int]) -> dict[int, TickJobs]:
    """The jobs of each of these ticks that has any."""
    mine = tick_jobs.c.tick_id.in_(tick_ids)
    both = tick_jobs.outerjoin(jobs, jobs.c.id == tick_jobs.c.job_id)
    place = func.row_number().over(partition_by=tick_jobs.c.tick_id, order_by=tick_jobs.c.job_id).label("place")
    numbered = select(tick_jobs.c.tick_id, tick_jobs.c.job_id, jobs.c.state, place).select_from(both).where(mine)
    inner = numbered.subquery()
    first = connection.execute(select(inner).where(inner.c.place <= MOST_JOBS).order_by(inner.c.tick_id, inner.c.place))
    firsts: dict[int, list[tuple[str, str | None]]] = {}
    for row in first.mappings():
        firsts.setdefault(row["tick_id"], []).append((row["job_id"], row["state"]))
    counted = select(tick_jobs.c.tick_id, jobs.c.state, func.count().label("number")).select_from(both).where(mine)
    counts: dict[int, dict[str, int]] = {}
    for row in connection.execute(counted.group_by(tick_jobs.c.tick_id, jobs.c.state)).mappings():
        counts.setdefault(row["tick_id"], {})[row["state"] or DELETED] = row["number"]
    return {tick_id: TickJobs(tuple(found), counts[tick_id]) for tick_id, found in firsts.items()}


def forget_before(connection: Connection, before: float, most: int, after: float) -> int:
    """Deletes ended ticks that were planned before a moment, or `after` another, of the `most` oldest; returns their
    number. IDs increase with time, so no index by time is needed."""
    # What another worker deletes at this moment is skipped, in place of a wait for each other.
    oldest = select(ticks.c.id).where(~_PENDING).order_by(ticks.c.id).limit(most).with_for_update(skip_locked=True)
    found = connection.scalars(oldest).all()
    outside = or_(ticks.c.created_at < before, ticks.c.created_at > after)
    return connection.execute(delete(ticks).where(ticks.c.id.in_(found), outside)).rowcount


def _readable(found: Sequence[Any]) -> list[Tick]:
    readable = []
    for row in found:
        with suppress(UnreadableRow):
            readable.append(rows.tick(row))
    return readable
