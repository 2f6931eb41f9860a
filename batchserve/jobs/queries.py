"""Queries on jobs and the queue; none changes a row."""

from collections.abc import Collection, Iterable, Sequence
from contextlib import suppress
from typing import Any

from sqlalchemy import Connection, and_, bindparam, case, func, or_, select, union_all
from sqlalchemy.sql import ColumnElement

from batchserve import rows
from batchserve.access import DEFAULT_TENANT, EVERY_TENANT
from batchserve.db.prepared import Prepared
from batchserve.db.tables import attempts, inputs, jobs, models
from batchserve.domain import Attempt, Job, JobState, StoredInput
from batchserve.errors import JobNotFound, UnreadableRow
from batchserve.jobs.statements import INPUT_COLUMNS, JOBS, JOBS_OF, due, further_inputs, job_from_row, readable
from batchserve.storage import ERRORS_SUFFIX

STATES = [state.value for state in JobState]


def get(connection: Connection, job_id: str) -> Job:
    """Raises JobNotFound, and UnreadableRow."""
    row = _JOB.row(connection, {"job_id": job_id})
    if row is None:
        raise JobNotFound(f"no job {job_id!r}")
    return job_from_row(row)


def get_whole(connection: Connection, job_id: str) -> Job:
    """A job with all its inputs. Raises JobNotFound, and UnreadableRow."""
    row = _JOB.row(connection, {"job_id": job_id})
    if row is None:
        raise JobNotFound(f"no job {job_id!r}")
    return job_from_row(row, further_inputs(connection, [row]).get(row["id"], ()))


def state_of(connection: Connection, job_id: str) -> JobState:
    """Raises JobNotFound."""
    state = _STATE.scalar(connection, {"job_id": job_id})
    if state is None:
        raise JobNotFound(f"no job {job_id!r}")
    if state not in STATES:
        return get(connection, job_id).state  # raises UnreadableRow
    return JobState(state)


def require_seen(connection: Connection, job_id: str, tenant: str) -> None:
    """Raises JobNotFound unless the job exists and belongs to the tenant: another tenant's job looks exactly like a
    missing one."""
    of_job = None if "\0" in job_id else _TENANT.scalar(connection, {"job_id": job_id})
    if of_job is None or tenant not in (of_job, EVERY_TENANT):
        raise JobNotFound(f"no job {job_id!r}")


def find_equal(connection: Connection, request_digest: str, tenant: str = DEFAULT_TENANT) -> Job | None:
    """The latest completed job of a tenant with the same input bytes, model and options. Its result is not removed
    before this transaction, of `Database.write()`, ends."""
    values = {"digest": request_digest, "its_tenant": tenant}
    row = _LATEST_EQUAL.row(connection, values)
    if row is None:
        return None
    try:
        return job_from_row(row)
    except UnreadableRow:
        return next(readable(connection.execute(_EQUAL.limit(_MOST_EQUAL), values).mappings().all()), None)


def find_on_input(connection: Connection, key: str, request_digest: str, tenant: str) -> list[Job]:
    """The readable jobs of a tenant on this input with the same model and options, the newest first."""
    guards = (inputs.c.key == key, jobs.c.request_digest == request_digest, jobs.c.tenant == tenant)
    return list(readable(connection.execute(JOBS.where(*guards)).mappings().all()))


def inputs_of(connection: Connection, job_id: str, first: int, limit: int) -> list[tuple[int, StoredInput]]:
    """The inputs of a job from the number `first` on, each with its number. Raises UnreadableRow."""
    query = select(inputs.c.job_id, inputs.c.number, *INPUT_COLUMNS).where(
        inputs.c.job_id == job_id, inputs.c.number >= first
    )
    found = connection.execute(query.order_by(inputs.c.number).limit(limit)).mappings().all()
    return [(row["number"], rows.stored_input(row)) for row in found]


def get_several(connection: Connection, job_ids: Collection[str]) -> list[Job]:
    """Those of these jobs that exist and can be read, the oldest first."""
    found = connection.execute(JOBS_OF, {"job_ids": list(job_ids)}).mappings().all()
    return sorted(readable(found), key=lambda job: job.id)


def uploaded_for(connection: Connection, model: str, tenant: str = DEFAULT_TENANT) -> list[str]:
    """The IDs of the uploaded jobs that were uploaded for a model of this name, or for none; the oldest first."""
    for_it = or_(jobs.c.model_id.is_(None), jobs.c.model_id.in_(select(models.c.id).where(models.c.name == model)))
    query = select(jobs.c.id).where(jobs.c.state == JobState.UPLOADED, for_it)
    if tenant != EVERY_TENANT:
        query = query.where(jobs.c.tenant == tenant)
    return sorted(connection.scalars(query))


def attempts_of(connection: Connection, job_id: str) -> list[Attempt]:
    """In order, without unreadable ones."""
    found = []
    for row in _ATTEMPTS.rows(connection, {"job_id": job_id}):
        with suppress(UnreadableRow):
            found.append(rows.attempt(row))
    return found


def attempts_of_several(connection: Connection, job_ids: Collection[str]) -> dict[str, list[Attempt]]:
    """The readable attempts at each of these jobs, in one query."""
    found: dict[str, list[Attempt]] = {job_id: [] for job_id in job_ids}
    if found:
        for row in connection.execute(_ATTEMPTS_OF, {"job_ids": list(found)}).mappings():
            with suppress(UnreadableRow):
                found[row["job_id"]].append(rows.attempt(row))
    return found


def named_results(connection: Connection, keys: Collection[str]) -> set[str]:
    """Those of these keys of results and errors lists that a job references. The others will never be referenced."""
    if not keys:
        return set()
    # An errors list is found by its result, whose key has an index.
    results = {key.removesuffix(ERRORS_SUFFIX) for key in keys}
    named = connection.execute(select(jobs.c.result_key, jobs.c.errors_key).where(jobs.c.result_key.in_(results)))
    return {key for row in named for key in row if key is not None}


def named_inputs(connection: Connection, keys: Collection[str]) -> set[str]:
    """Those of these keys of inputs that a job references which has kept its input."""
    if not keys:
        return set()
    kept = and_(jobs.c.id == inputs.c.job_id, jobs.c.input_removed_at.is_(None))
    return set(connection.scalars(select(inputs.c.key).join(jobs, kept).where(inputs.c.key.in_(keys))))


def count_by_state(connection: Connection, tenant: str = EVERY_TENANT) -> dict[str, int]:
    counting = select(jobs.c.state, func.count().label("jobs"))
    if tenant != EVERY_TENANT:  # with both columns, an index is read and no row
        counting = counting.where(jobs.c.state.in_(STATES), jobs.c.tenant == tenant)
    counted = connection.execute(counting.group_by(jobs.c.state))
    return {row["state"]: row["jobs"] for row in counted.mappings()}


def queue_position(connection: Connection, job: Job, now: float, most: int = 2**31) -> int | None:
    """Number of due jobs of its tenant ahead of this one. None when it is not queued, and when counting would read more
    than `most` queued jobs."""
    if job.state is not JobState.QUEUED:
        return None
    values = {
        "now": now,
        "its_tenant": job.tenant,
        "its_priority": job.priority,
        "since": job.queued_at,
        "job": job.id,
        "most": most + 1,
    }
    found = _COUNT_AHEAD.row(connection, values)
    assert found is not None
    return int(found["due"] or 0) if found["ahead"] <= most else None


def queue_of(connection: Connection, tenant: str) -> Iterable[Sequence[Any]]:
    """The priority, moment of queueing, ID and `run_after` of each queued job of a tenant, in order."""
    return connection.execute(_QUEUE, {"its_tenant": tenant})


def longest_wait(connection: Connection, now: float) -> float:
    """Seconds since the longest-waiting job became startable."""
    return max(longest_waits(connection, now).values(), default=0.0)


def longest_waits(connection: Connection, now: float) -> dict[str, float]:
    """The same for each tenant with a due job. A job does not wait before its `run_after`; its wait restarts when an
    attempt releases it.
    """
    given_back = select(func.max(attempts.c.finished_at)).where(attempts.c.job_id == jobs.c.id).scalar_subquery()
    waits = select(
        jobs.c.tenant, _later(jobs.c.queued_at, jobs.c.run_after).label("since"), given_back.label("given_back")
    )
    plausible = jobs.c.queued_at.between(rows.EARLIEST, rows.LATEST)  # an unreadable job hides no other
    waiting = waits.where(*due(now), plausible).subquery()
    oldest = select(waiting.c.tenant, func.min(_later(waiting.c.since, waiting.c.given_back)).label("oldest"))
    found = connection.execute(oldest.group_by(waiting.c.tenant)).mappings()
    return {
        row["tenant"]: max(0.0, now - row["oldest"]) if isinstance(row["oldest"], int | float) else 0.0 for row in found
    }


def _later(first: ColumnElement[Any], second: ColumnElement[Any]) -> ColumnElement[Any]:
    """The later of two times, of which the second may be null."""
    return case((second > first, second), else_=first)


_JOB = Prepared(JOBS.where(jobs.c.id == bindparam("job_id")))
_TENANT = Prepared(select(jobs.c.tenant).where(jobs.c.id == bindparam("job_id")))
_STATE = Prepared(select(jobs.c.state).where(jobs.c.id == bindparam("job_id")))
# Only among the latest: otherwise each predict would read thousands of equal queued jobs in its transaction.
_ALIKE = (
    select(jobs.c.id, jobs.c.state)
    .where(jobs.c.request_digest == bindparam("digest"), jobs.c.tenant == bindparam("its_tenant"))
    .order_by(jobs.c.id.desc())
    .limit(1000)
    .subquery()
)
_EQUAL = JOBS.where(
    jobs.c.id.in_(select(_ALIKE.c.id).where(_ALIKE.c.state == JobState.COMPLETED)), jobs.c.state == JobState.COMPLETED
).with_for_update(read=True, of=jobs)
_LATEST_EQUAL = Prepared(
    JOBS.where(
        jobs.c.id == select(func.max(_ALIKE.c.id)).where(_ALIKE.c.state == JobState.COMPLETED).scalar_subquery(),
        jobs.c.state == JobState.COMPLETED,  # again: it may have expired while this statement waited for its row
    ).with_for_update(read=True, of=jobs)
)
_MOST_EQUAL = 100
"""Equal jobs that are tried when the latest of them is unreadable."""
_ATTEMPTS = Prepared(select(attempts).where(attempts.c.job_id == bindparam("job_id")).order_by(attempts.c.number))
_ATTEMPTS_OF = (
    select(attempts)
    .where(attempts.c.job_id.in_(bindparam("job_ids", expanding=True)))
    .order_by(attempts.c.job_id, attempts.c.number)
)
_ITS_QUEUE = and_(jobs.c.state == JobState.QUEUED, jobs.c.tenant == bindparam("its_tenant"))


def _ahead(*guards: ColumnElement[bool]) -> Any:
    found = select(jobs.c.run_after).where(_ITS_QUEUE, *guards).limit(bindparam("most")).subquery()
    return select(found.c.run_after)


# Two ranges of the index, each read from its beginning and no further than `most`. With OR in one condition, SQLite
# would read the whole queue.
_AHEAD = union_all(
    _ahead(jobs.c.priority > bindparam("its_priority")),
    _ahead(
        jobs.c.priority == bindparam("its_priority"),
        jobs.c.queued_at <= bindparam("since"),
        or_(jobs.c.queued_at < bindparam("since"), jobs.c.id < bindparam("job")),
    ),
).subquery()
_COUNT_AHEAD = Prepared(
    select(
        func.count().label("ahead"),
        func.sum(case((or_(_AHEAD.c.run_after.is_(None), _AHEAD.c.run_after <= bindparam("now")), 1), else_=0)).label(
            "due"
        ),
    )
)
_QUEUE = (
    select(jobs.c.priority, jobs.c.queued_at, jobs.c.id, jobs.c.run_after)
    .where(_ITS_QUEUE)
    .order_by(jobs.c.priority.desc(), jobs.c.queued_at, jobs.c.id)
)
