"""Ends of jobs: each is written by `finish`, with its event, webhooks and a notification in the same transaction."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, Update, bindparam, delete, insert, select, update
from sqlalchemy.sql import ColumnElement

from batchserve.db import notifications
from batchserve.db.notifications import Topic
from batchserve.db.prepared import Prepared
from batchserve.db.tables import events, jobs
from batchserve.domain import JobState, Result
from batchserve.errors import BatchserveError, presentable
from batchserve.jobs.statements import outside
from batchserve.webhooks import outbox

_ENDED_AT = bindparam("ended_at", type_=jobs.c.due_at.type)
ENDS = (JobState.COMPLETED, JobState.FAILED, JobState.CANCELLED, JobState.EXPIRED)


@dataclass(frozen=True, slots=True)
class Ended:
    """A job that has just ended, and its latest attempt (0: none)."""

    id: str
    attempt: int


def ending(*guards: ColumnElement[bool]) -> Update:
    """The statement by which `finish` ends the jobs that satisfy all guards. A job with its own retention is due after
    it."""
    return ending_undated(*guards).values(due_at=_ENDED_AT + jobs.c.expires_in)


def ending_undated(*guards: ColumnElement[bool]) -> Update:
    """The same for jobs whose `due_at` is among the values of `finish`."""
    columns = (jobs.c.id, jobs.c.tenant, jobs.c.attempt, jobs.c.webhook, outbox.IS_HEARD)
    return update(jobs).where(*guards).returning(*columns)


def finish(
    connection: Connection, guarded: Update | Prepared, state: JobState, now: float, values: Mapping[str, Any]
) -> list[Ended]:
    """-> an end state, for the jobs that `guarded` (see `ending`) takes, each with an event and the deliveries
    of that. Returns these jobs.

    `values`: further columns, and the parameters of `guarded`. Columns that the statement itself sets take precedence.
    """
    assert state in ENDS, f"{state} is not an end state"
    dated = {} if "due_at" in values else {"ended_at": now}
    values = {"state": state, "finished_at": now, "lease_until": None, **dated, **values}
    if isinstance(guarded, Prepared):
        ended: Sequence[Mapping[Any, Any]] = guarded.rows(connection, values)
    else:
        ended = connection.execute(guarded, values).mappings().all()
    events_of = ({"job_id": row["id"], "tenant": row["tenant"], "state": state, "at": now} for row in ended)
    _ADD_EVENTS.send(connection, *events_of)
    if heard := [row["id"] for row in ended if row["is_heard"] or row["webhook"] is not None]:
        outbox.add(connection, heard, state, now)
    if ended:
        notifications.send(connection, Topic.ENDED, [row["id"] for row in ended])
    return [Ended(row["id"], row["attempt"]) for row in ended]


def result_values(result: Result, facts: Mapping[str, Any]) -> dict[str, Any]:
    """The columns of a completed job: its result, and facts about its rows."""
    return {
        "reason": None,
        "progress": 1.0,
        "result_key": result.key,
        "result_bytes": result.bytes,
        "result_sha256": result.sha256,
        "errors_key": result.errors_key,
        "errors_bytes": result.errors_bytes,
        "facts": presentable(facts),
    }


def error_values(error: BatchserveError) -> dict[str, Any]:
    """The columns of a failed job: its error."""
    return {"reason": error.code, "error": error.to_json()}


def forget_events(connection: Connection, before: float, most: int, after: float) -> int:
    """Deletes the events before a moment, or `after` another, of the `most` oldest; returns how many.

    IDs increase with time, so no index by time is needed: all events after the first kept one are later.
    """
    # What another worker deletes at this moment is skipped, in place of a wait for each other.
    oldest = select(events.c.id).order_by(events.c.id).limit(most).with_for_update(skip_locked=True)
    found = connection.scalars(oldest).all()
    return connection.execute(
        delete(events).where(events.c.id.in_(found), outside(events.c.at, before, after))
    ).rowcount


_ADD_EVENTS = Prepared(insert(events))
