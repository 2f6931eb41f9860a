"""Transitions made by clients: creating, queueing, cancelling, retrying and deleting jobs."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from sqlalchemy import Connection, bindparam, delete, exists, insert, select, update
from sqlalchemy.sql import ColumnElement

from batchserve import rows
from batchserve.access import DEFAULT_TENANT
from batchserve.correlation import NONE, Correlation
from batchserve.db import notifications
from batchserve.db.connect import lock
from batchserve.db.notifications import Topic
from batchserve.db.prepared import Prepared
from batchserve.db.tables import chunks, inputs, jobs, models
from batchserve.domain import Attempt, Job, JobState, ModelVersion, Options, Result, ScoredChunk, StoredInput
from batchserve.errors import JobConflict, JobNotFound, ModelNotFound, UnreadableRow
from batchserve.jobs import contents, totals
from batchserve.jobs.ends import ending, ending_undated, finish, result_values
from batchserve.jobs.execution import account_of, add_attempt, add_scored
from batchserve.jobs.plan import done_chunks
from batchserve.jobs.queries import get, get_whole
from batchserve.jobs.statements import Owned, changed, owned


def create(
    connection: Connection,
    job_id: str,
    stored: Sequence[StoredInput],
    model: ModelVersion | None,
    now: float,
    tenant: str = DEFAULT_TENANT,
    traceparent: str | None = None,
) -> Job:
    """-> uploaded, for inputs that are stored durably, or small and stored here. `model`: the default of predict.
    `traceparent`: the span of the upload. Returns the job as it would be read."""
    row = {
        "id": job_id,
        "tenant": tenant,
        "state": JobState.UPLOADED,
        "inputs_total": len(stored),
        "inputs_bytes": total_bytes(stored),
        "options": {},
        "model_id": model.id if model else None,
        "metadata": {},
        "created_at": now,
        "upload_traceparent": traceparent,
    }
    _CREATE.send(connection, row)
    contents.add(connection, {one.key: one.content for one in stored if one.content is not None})
    _ADD_INPUTS.send(connection, *_input_rows(job_id, stored))
    as_read = tuple(replace(one, content=None) for one in stored)
    return Job(
        job_id,
        JobState.UPLOADED,
        as_read[:1],
        now,
        model=model,
        inputs_total=len(stored),
        inputs_bytes=total_bytes(stored),
        tenant=tenant,
        upload_traceparent=traceparent,
    )


def total_bytes(stored: Sequence[StoredInput]) -> int | None:
    sizes = [one.bytes for one in stored if one.bytes is not None]
    return sum(sizes) if len(sizes) == len(stored) else None


def create_on_inputs_of(connection: Connection, job_id: str, other: Job, now: float) -> None:
    """-> uploaded: a new job on the inputs of another, which are kept until neither needs them.

    Raises JobNotFound and JobConflict when the other job, or its input, was removed meanwhile.
    """
    lasting = select(jobs.c.input_removed_at).where(jobs.c.id == other.id).with_for_update(read=True)
    row = connection.execute(lasting).one_or_none()
    if row is None:
        raise JobNotFound(f"no job {other.id!r}")
    if row.input_removed_at is not None:
        raise JobConflict(f"job {other.id} cannot be predicted again: its input was removed; upload it again")
    its_inputs = get_whole(connection, other.id).inputs
    create(connection, job_id, its_inputs, other.model, now, other.tenant, other.upload_traceparent)


def enqueue_if_uploaded(
    connection: Connection,
    job_id: str,
    model: ModelVersion,
    options: Options,
    request_digest: str,
    *,
    metadata: Mapping[str, str],
    priority: int,
    run_after: float | None,
    expires_in: float | None = None,
    now: float,
    webhook: str | None = None,
    asked_by: Correlation = NONE,
) -> bool:
    """uploaded -> queued. False when the job is in any other state: nothing was changed.

    Raises UnreadableRow for values that could not be read again, and ModelNotFound when the model was deleted
    meanwhile.
    """
    asked = {
        "request_digest": request_digest,
        "metadata": dict(metadata),
        "priority": priority,
        "run_after": run_after,
        "webhook": webhook,
        "expires_in": expires_in,
        **_correlated(asked_by),
    }
    values = {"state": JobState.QUEUED, **_request(model, options, asked, now)}
    lock(connection, "models", shared=True)
    queued = _ENQUEUE.run(connection, {"job": job_id, "model": model.id, **values}) > 0
    if not queued and get(connection, job_id).state is JobState.UPLOADED:
        raise ModelNotFound(f"the model {model.reference} was deleted")
    return queued


def complete_if_uploaded(
    connection: Connection,
    job: Job,
    worker: str,
    result: Result,
    facts: Mapping[str, Any],
    now: float,
    *,
    only: ScoredChunk,
    small: Mapping[str, bytes],
) -> tuple[Job, Attempt] | None:
    """uploaded -> completed, for a job that was scored before it is queued: with its first attempt, as if it had been
    queued and claimed. See `execution.complete_if_mine`. Returns both as they would be read. None when it is in any
    other state, had an attempt, or its model was deleted: nothing was changed.

    `job`: as it was read while it was uploaded, with the request of its predict.
    """
    assert job.model is not None
    assert job.options is not None
    asked = {name: getattr(job, name) for name in _ASKED}
    values = _request(job.model, job.options, asked, now)
    lock(connection, "models", shared=True)
    taken: dict[str, Any] = {"attempt": 1, "worker": worker, "started_at": now}
    due = {"due_at": None if job.expires_in is None else now + job.expires_in}
    account, kept = account_of(only), result_values(result, facts)
    values |= {"job": job.id, "model": job.model.id, **account, **kept, **taken, **due}
    if not finish(connection, _COMPLETE_UPLOADED, JobState.COMPLETED, now, values):
        return None
    add_scored(connection, job.id, 1, only, small)
    done = Attempt(1, worker, started_at=now, finished_at=now, outcome=JobState.COMPLETED.value)
    add_attempt(connection, job.id, done)
    shown = {name: value for name, value in (account | kept | taken).items() if name in Job.__dataclass_fields__}
    return replace(job, state=JobState.COMPLETED, **shown, result=result, queued_at=now, finished_at=now), done


def complete_as_equal_if_queued(connection: Connection, job_id: str, equal: Job, now: float) -> bool:
    """queued -> completed, sharing the result of an equal job. False when it is not queued, or there is no result."""
    if equal.result is None:
        return False
    account = ("rows_planned", "rows_ok", "rows_failed", "chunks_total", "chunks_done")
    values = {
        "job": job_id,
        "planned": True,
        **{name: getattr(equal, name) for name in account},
        **result_values(equal.result, equal.facts),
        "reused_from": equal.reused_from or equal.id,
        "started_at": now,
    }
    return bool(finish(connection, _COMPLETE_QUEUED, JobState.COMPLETED, now, values))


def request_cancel(connection: Connection, job_id: str, now: float) -> Job | None:
    """uploaded, queued -> cancelled immediately; running: requests cancellation. None: no effect, because the job is
    finished, or its cancellation was requested before."""
    waits = ending(jobs.c.id == job_id, jobs.c.state.in_((JobState.UPLOADED, JobState.QUEUED)))
    ended = finish(connection, waits, JobState.CANCELLED, now, {"cancel_requested_at": now})
    running = (jobs.c.id == job_id, jobs.c.state == JobState.RUNNING, jobs.c.cancel_requested_at.is_(None))
    requested = changed(connection, update(jobs).where(*running).values(cancel_requested_at=now))
    if requested:
        notifications.send(connection, Topic.CANCEL, [job_id])
    job = get(connection, job_id)
    return job if ended or requested else None


def retry_if_stopped(connection: Connection, job_id: str, now: float, asked_by: Correlation = NONE) -> Job:
    """failed, cancelled -> queued, with the chunks that are done.

    Raises JobConflict in any other state, and when its input was removed or the model deleted meanwhile.
    """
    lock(connection, "models", shared=True)
    totals.note_gone(connection, [job_id], with_rows=False)
    retried = changed(
        connection,
        update(jobs)
        .where(
            jobs.c.id == job_id,
            jobs.c.state.in_((JobState.FAILED, JobState.CANCELLED)),
            jobs.c.queued_at.is_not(None),
            jobs.c.input_removed_at.is_(None),
            _is_registered(jobs.c.model_id),
        )
        .values(
            state=JobState.QUEUED,
            reason=None,
            error=None,
            crashes=0,
            cancel_requested_at=None,
            queued_at=now,
            finished_at=None,
            due_at=None,
            **_correlated(asked_by),
        ),
    )
    job = get(connection, job_id)
    if not retried:
        _require_input(job)
    if not retried and job.model and job.state in (JobState.FAILED, JobState.CANCELLED) and job.queued_at is not None:
        raise _model_is_gone(job)
    if not retried:
        raise JobConflict(f"job {job_id} is {job.state}: only a failed or cancelled job that was queued can be retried")
    connection.execute(update(chunks).where(chunks.c.job_id == job_id).values(crashes=0))
    notifications.send(connection, Topic.QUEUED, [job_id])
    return job


def require_failed_rows(job: Job) -> None:
    """Raises JobConflict unless the job is completed with failed records, and its input still exists."""
    _require_input(job)
    table = job.options.table if job.options is not None else None
    if table is not None and table.mode == "append":
        raise JobConflict(
            f"the rows of job {job.id} are in {table.shown}, to which a retry would add all of them again: score the "
            "failed records in a job of their own"
        )
    if job.state is not JobState.COMPLETED or not job.rows_failed or job.reused_from is not None:
        raise JobConflict(
            f"job {job.id} is {job.state} with {job.rows_failed} failed records: only the failed records of a "
            "completed job can be scored again"
        )


def require_read(job: Job) -> None:
    """Raises JobConflict for a job whose input is the rows of a query that were not read yet."""
    if job.input.is_unread:
        raise JobConflict(f"job {job.id} has not read the rows of its query yet: predict them when it has")


def create_retry_of_failed_rows(
    connection: Connection, job: Job, job_id: str, now: float, asked_by: Correlation = NONE
) -> None:
    """-> queued: a new job with the plan of a completed one, in which only chunks with failed records are open.

    The result of the completed job never changes; the new job's result is the merged one. It reads the same inputs; the
    parts of the chunks without errors have been copied. Raises JobConflict when nothing failed, or when the model was
    deleted meanwhile.
    """
    require_failed_rows(job)
    row = connection.execute(select(jobs).where(jobs.c.id == job.id).with_for_update(read=True)).mappings().one()
    lock(connection, "models", shared=True)
    if not connection.scalar(select(_is_registered(row["model_id"]))):
        raise _model_is_gone(job)
    own = {"id", "state", "attempt", "crashes", "worker", "lease_until", "lease_clock", "cancel_requested_at"}
    own |= {"rows_ok", "rows_failed", "chunks_done", "progress", "facts", "request_digest", *_correlated(asked_by)}
    own |= {name for name in jobs.c.keys() if name.endswith("_at") or name.startswith(("result_", "errors_"))}  # noqa: SIM118
    copied = {name: value for name, value in row.items() if name not in own}
    done = [committed.chunk for committed in done_chunks(connection, job.id) if not committed.errors_bytes]
    rows_ok = sum(chunk.records for chunk in done)
    connection.execute(
        insert(jobs).values(
            **copied,
            id=job_id,
            state=JobState.QUEUED,
            rows_ok=rows_ok,
            chunks_done=len(done),
            progress=0.99 * rows_ok / job.rows_planned,
            facts={"notes": [f"scores the failed records of job {job.id} again"]},
            created_at=now,
            queued_at=now,
            **_correlated(asked_by),
        )
    )
    notifications.send(connection, Topic.QUEUED, [job_id])
    _ADD_INPUTS.send(connection, *_input_rows(job_id, get_whole(connection, job.id).inputs))
    plan = connection.execute(select(chunks).where(chunks.c.job_id == job.id)).mappings().all()
    taken = {chunk.first_record for chunk in done}
    opened = dict.fromkeys(("attempt", "part_bytes", "part_sha256", "rows_failed", "errors_bytes", "facts"))
    connection.execute(
        insert(chunks),
        [{**row, **({} if row["first_record"] in taken else opened), "job_id": job_id, "crashes": 0} for row in plan],
    )


def delete_if_not_running(connection: Connection, job_id: str) -> Owned:
    """Deletes the row, and returns what it referenced. Raises JobConflict while a worker runs it: cancel it first. An
    unreadable row is deleted in any state: nothing else can be done with it, and a worker that runs it loses its lease.
    """
    found = owned(connection, jobs.c.id == job_id)
    if not found:
        raise JobNotFound(f"no job {job_id!r}")
    guards = [jobs.c.id == job_id]
    try:
        get(connection, job_id)
        guards.append(jobs.c.state != JobState.RUNNING)
    except UnreadableRow:
        pass
    totals.note_gone(connection, [job_id], with_rows=True)
    if not changed(connection, delete(jobs).where(*guards)):
        raise JobConflict(f"job {job_id} is running: cancel it before you delete it")
    contents.release(connection, found)
    return found[0]


def remove_whatever_its_state(connection: Connection, job_id: str) -> Owned | None:
    """Deletes the row of a job that cannot continue, and returns what it referenced; None when there is none."""
    found = owned(connection, jobs.c.id == job_id)
    if not found:
        return None
    totals.note_gone(connection, [job_id], with_rows=True)
    connection.execute(delete(jobs).where(jobs.c.id == job_id))
    contents.release(connection, found)
    return found[0]


def _input_rows(job_id: str, stored: Sequence[StoredInput]) -> list[dict[str, Any]]:
    return [
        {
            "job_id": job_id,
            "number": number,
            "key": one.key,
            "bytes": one.bytes,
            "sha256": one.sha256,
            "format": one.format,
            "delimiter": one.dialect.delimiter,
            "decimal": one.dialect.decimal,
            "filename": one.filename,
            "owned": one.owned,
            "version": one.version,
        }
        for number, one in enumerate(stored)
    ]


def _request(model: ModelVersion, options: Options, asked: Mapping[str, Any], now: float) -> dict[str, Any]:
    """The columns of a request. Raises UnreadableRow for values that could not be read again."""
    dumped = rows.options_adapter.dump_python(options, mode="json")
    values = {"model_id": model.id, "options": dumped, **asked, "queued_at": now}
    rows.require_written(values)
    return values


def _correlated(asked_by: Correlation) -> dict[str, str | None]:
    """The columns of the request that queues a job."""
    return {"request_id": asked_by.request_id, "traceparent": asked_by.traceparent}


def _is_registered(model_id: Any) -> ColumnElement[bool]:
    return exists().where(models.c.id == model_id, models.c.deleted_at.is_(None))


def _require_input(job: Job) -> None:
    if job.input_removed_at is not None:
        raise JobConflict(f"job {job.id} cannot be retried: its input was removed; upload it again")


def _model_is_gone(job: Job) -> JobConflict:
    name = job.model.reference if job.model else "none"
    return JobConflict(f"job {job.id} cannot be retried: its model {name} was deleted")


_ASKED = ("request_digest", "metadata", "priority", "run_after", "webhook", "expires_in", "request_id", "traceparent")
"""The columns of a request besides its model and options."""
_CREATE = Prepared(insert(jobs))
_ADD_INPUTS = Prepared(insert(inputs))
_ENQUEUE = Prepared(
    update(jobs).where(
        jobs.c.id == bindparam("job"), jobs.c.state == JobState.UPLOADED, _is_registered(bindparam("model"))
    )
)
_COMPLETE_UPLOADED = Prepared(
    ending_undated(
        jobs.c.id == bindparam("job"),
        jobs.c.state == JobState.UPLOADED,
        jobs.c.attempt == 0,
        _is_registered(bindparam("model")),
    )
)
_COMPLETE_QUEUED = Prepared(ending(jobs.c.id == bindparam("job"), jobs.c.state == JobState.QUEUED))
