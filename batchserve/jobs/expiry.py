"""Transitions of retention: jobs past it expire, release their input, and are deleted."""

import math
from collections.abc import Collection

from sqlalchemy import Connection, Float, and_, delete, func, literal, or_, select, update
from sqlalchemy.sql import ColumnElement

from batchserve.db.tables import chunks, jobs
from batchserve.domain import JobState
from batchserve.jobs import contents, totals
from batchserve.jobs.ends import ending_undated, finish
from batchserve.jobs.statements import ENDED, Owned, outside, owned


def find_over(
    connection: Connection, *, ended_before: float, uploaded_before: float, most: int, after: float = math.inf
) -> list[str]:
    """Up to `most` jobs that `expire_if_over` would take."""
    query = select(jobs.c.id).where(_is_over(ended_before, uploaded_before, after)).limit(most)
    return list(connection.scalars(query))


def expire_if_over(
    connection: Connection,
    job_ids: Collection[str],
    *,
    ended_before: float,
    uploaded_before: float,
    now: float,
    after: float = math.inf,
) -> list[Owned]:
    """completed, failed, cancelled -> expired for those of these jobs that ended before a moment; uploaded -> expired
    for those that were uploaded before another. A date `after` a third is of a wrong clock, and counts as old. The rows
    reference no bytes any more: the caller removes them. Returns what the expired jobs referenced.
    """
    return _expired(connection, job_ids, _is_over(ended_before, uploaded_before, after), now)


def find_due(connection: Connection, now: float, longest: float, most: int) -> list[str]:
    """Up to `most` jobs that `expire_if_due` would take."""
    return list(connection.scalars(select(jobs.c.id).where(*_due(now, longest)).order_by(jobs.c.due_at).limit(most)))


def expire_if_due(connection: Connection, job_ids: Collection[str], now: float, longest: float) -> list[Owned]:
    """The same for those of these jobs that are past a retention of their own, of at most `longest` seconds."""
    return _expired(connection, job_ids, and_(*_due(now, longest), jobs.c.state.in_(ENDED)), now)


def _expired(connection: Connection, job_ids: Collection[str], guard: ColumnElement[bool], now: float) -> list[Owned]:
    expired = owned(connection, jobs.c.id.in_(job_ids), guard)
    # These alone: one that has ended since would be locked behind others with higher IDs.
    ids = [job.id for job in expired]
    expiring = ending_undated(jobs.c.id.in_(ids)).values(
        finished_at=func.coalesce(jobs.c.finished_at, now),
        input_removed_at=func.coalesce(jobs.c.input_removed_at, now),
    )
    totals.note_gone(connection, ids, with_rows=False)
    values = {"result_key": None, "errors_key": None, "expires_at": now, "due_at": None}
    finish(connection, expiring, JobState.EXPIRED, now, values)
    connection.execute(delete(chunks).where(chunks.c.job_id.in_(ids)))
    contents.release(connection, expired)
    return expired


def find_with_input_over(connection: Connection, ended_before: float, most: int, after: float = math.inf) -> list[str]:
    """Up to `most` jobs that `drop_input_if_over` would take."""
    return list(connection.scalars(select(jobs.c.id).where(_has_input_over(ended_before, after)).limit(most)))


def drop_input_if_over(
    connection: Connection, job_ids: Collection[str], ended_before: float, now: float, after: float = math.inf
) -> list[Owned]:
    """Releases the inputs of those of these jobs that ended before a moment, which rules out a retry. State, result
    and, of failed and cancelled jobs, the parts stay. Returns what the affected jobs reference.
    """
    released = owned(connection, jobs.c.id.in_(job_ids), _has_input_over(ended_before, after))
    changed = jobs.c.id.in_([job.id for job in released])
    connection.execute(update(jobs).where(changed).values(input_removed_at=now))
    contents.release(connection, released)
    return released


def delete_expired_before(connection: Connection, before: float, most: int, after: float = math.inf) -> int:
    """Deletes up to `most` rows of jobs that expired before a moment, or `after` another; returns how many."""
    query = select(jobs.c.id).where(jobs.c.state == JobState.EXPIRED, outside(jobs.c.expires_at, before, after))
    # What another worker deletes at this moment is skipped, in place of a wait for each other.
    old = connection.scalars(query.order_by(jobs.c.id).limit(most).with_for_update(skip_locked=True)).all()
    totals.note_gone(connection, old, with_rows=True)
    return connection.execute(delete(jobs).where(jobs.c.id.in_(old), jobs.c.state == JobState.EXPIRED)).rowcount


def _is_over(ended_before: float, uploaded_before: float, after: float) -> ColumnElement[bool]:
    return or_(
        and_(jobs.c.state.in_(ENDED), outside(jobs.c.finished_at, ended_before, after)),
        and_(jobs.c.state == JobState.UPLOADED, outside(jobs.c.created_at, uploaded_before, after)),
    )


def _due(now: float, longest: float) -> tuple[ColumnElement[bool], ColumnElement[bool]]:
    """By the index of the few jobs that are `due_at` some time, all of which have ended. Next to their states, SQLite
    would read all jobs in these."""
    return jobs.c.due_at < now, jobs.c.expires_in <= literal(longest, Float())


def _has_input_over(ended_before: float, after: float) -> ColumnElement[bool]:
    ended = and_(jobs.c.state.in_(ENDED), outside(jobs.c.finished_at, ended_before, after))
    return and_(ended, jobs.c.input_removed_at.is_(None))
