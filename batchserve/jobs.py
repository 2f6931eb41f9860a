"""Every state transition of a job and its chunks: one function each, the guard in its name and in its WHERE.

Functions take a Connection of `Database.write()` (or `read()`), so that a caller can join several in one transaction.
A worker's writes name its attempt number, the fencing token: when another attempt owns the job, no row matches and
LeaseLost is raised, which rolls the transaction back.
"""

import math
import random
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from sqlalchemy import (
    Column,
    Connection,
    Float,
    RowMapping,
    String,
    Text,
    and_,
    bindparam,
    case,
    cast,
    delete,
    exists,
    func,
    insert,
    literal,
    or_,
    select,
    union_all,
    update,
)
from sqlalchemy.sql import ColumnElement

from batchserve import rows
from batchserve.db.connect import Moment
from batchserve.db.tables import attempts, chunks, jobs, models
from batchserve.domain import (
    DEFAULT_TENANT,
    EVERY_TENANT,
    Attempt,
    Chunk,
    Dialect,
    Job,
    JobState,
    ModelVersion,
    Options,
    Result,
    ScoredChunk,
)
from batchserve.errors import (
    BatchserveError,
    JobConflict,
    JobNotFound,
    LeaseLost,
    ModelNotFound,
    UnreadableRow,
    WorkerCrashed,
    presentable,
)
from batchserve.registry import model_columns, model_from_row
from batchserve.storage import ERRORS_SUFFIX
from batchserve.storage import input_key as input_key_of

STATES = [state.value for state in JobState]


@dataclass(frozen=True, slots=True)
class NewInput:
    """An input that is stored durably and waits for its job row."""

    job_id: str
    key: str
    bytes: int
    sha256: str
    format: str
    dialect: Dialect
    filename: str | None


# --- what clients do -------------------------------------------------------------------------------------------------


def create(
    connection: Connection, new: NewInput, model: ModelVersion | None, now: float, tenant: str = DEFAULT_TENANT
) -> None:
    """-> uploaded. `model`: the one that predict takes when it names none."""
    row = {
        "id": new.job_id,
        "tenant": tenant,
        "state": JobState.UPLOADED,
        "input_key": new.key,
        "input_bytes": new.bytes,
        "input_sha256": new.sha256,
        "input_format": new.format,
        "input_delimiter": new.dialect.delimiter,
        "input_filename": new.filename,
        "options": {},
        "model_id": model.id if model else None,
        "metadata": {},
        "created_at": now,
    }
    connection.execute(_CREATE, row)


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
    now: float,
) -> bool:
    """uploaded -> queued. False when the job is in any other state: nothing was changed.

    Raises UnreadableRow for what could not be read again, and ModelNotFound when the model was deleted meanwhile.
    """
    values = {
        "state": JobState.QUEUED,
        "model_id": model.id,
        "options": rows.options_adapter.dump_python(options, mode="json"),
        "result_format": options.format,
        "request_digest": request_digest,
        "metadata": dict(metadata),
        "priority": priority,
        "run_after": run_after,
        "queued_at": now,
    }
    rows.require_written(values)
    queued = _changed(connection, _ENQUEUE, {"job": job_id, "model": model.id, **values})
    if not queued and get(connection, job_id).state is JobState.UPLOADED:
        raise ModelNotFound(f"the model {model.reference} was deleted")
    return queued


def find_equal(connection: Connection, request_digest: str, tenant: str = DEFAULT_TENANT) -> Job | None:
    """The latest completed job of a tenant with the same input bytes, model and options."""
    values = {"digest": request_digest, "its_tenant": tenant}
    row = connection.execute(_LATEST_EQUAL, values).mappings().one_or_none()
    if row is None:
        return None
    try:
        return _job(row)
    except UnreadableRow:
        return next(_readable(connection.execute(_EQUAL.limit(_MOST_EQUAL), values).mappings().all()), None)


def complete_as_equal_if_queued(connection: Connection, job_id: str, equal: Job, now: float) -> bool:
    """queued -> completed, sharing the result of an equal job."""
    return _changed(
        connection,
        update(jobs)
        .where(jobs.c.id == job_id, jobs.c.state == JobState.QUEUED)
        .values(
            state=JobState.COMPLETED,
            planned=True,
            rows_planned=equal.rows_planned,
            rows_ok=equal.rows_ok,
            rows_failed=equal.rows_failed,
            chunks_total=equal.chunks_total,
            chunks_done=equal.chunks_done,
            progress=1.0,
            result_key=equal.result_key,
            result_bytes=equal.result_bytes,
            result_sha256=equal.result_sha256,
            errors_key=equal.errors_key,
            errors_bytes=equal.errors_bytes,
            reused_from=equal.reused_from or equal.id,
            notes=list(equal.notes),
            started_at=now,
            finished_at=now,
        ),
    )


def require_seen(connection: Connection, job_id: str, tenant: str) -> None:
    """Raises JobNotFound unless the job is there, and one of the tenant: a foreign job is told from none by nobody."""
    of_job = None if "\0" in job_id else connection.scalar(_TENANT, {"job_id": job_id})
    if of_job is None or tenant not in (of_job, EVERY_TENANT):
        raise JobNotFound(f"no job {job_id!r}")


def get(connection: Connection, job_id: str) -> Job:
    """Raises JobNotFound, and UnreadableRow."""
    row = connection.execute(_JOB, {"job_id": job_id}).mappings().one_or_none()
    if row is None:
        raise JobNotFound(f"no job {job_id!r}")
    return _job(row)


def state_of(connection: Connection, job_id: str) -> JobState:
    """Raises JobNotFound."""
    state = connection.scalar(_STATE, {"job_id": job_id})
    if state is None:
        raise JobNotFound(f"no job {job_id!r}")
    if state not in STATES:
        return get(connection, job_id).state  # raises UnreadableRow
    return JobState(state)


def list_page(
    connection: Connection,
    tenant: str = DEFAULT_TENANT,
    *,
    state: JobState | None = None,
    model: str | None = None,
    search: str | None = None,
    after: str | None = None,
    limit: int = 50,
) -> list[Job]:
    """Newest first, but for jobs that cannot be read. `after`: the last ID of the page before. `search`: part of an ID,
    file name or metadata value."""
    guards: list[ColumnElement[bool]] = []
    if tenant != EVERY_TENANT:
        guards.append(jobs.c.tenant == tenant)
    if state is not None:
        guards.append(jobs.c.state == state)
    if model is not None:
        name, _, version = model.partition("@")
        guards.append(models.c.name == name)
        if version:
            guards.append(cast(models.c.version, String) == version)
    if search:
        texts = (jobs.c.id, jobs.c.input_filename, cast(jobs.c.metadata, Text))
        guards.append(or_(*(text.icontains(search, autoescape=True) for text in texts)))
    page: list[Job] = []
    while len(page) < limit:
        beyond = [] if after is None else [jobs.c.id < after]
        found = connection.execute(_JOBS.where(*guards, *beyond).limit(limit)).mappings().all()
        page += _readable(found)
        if len(found) < limit:
            break
        after = found[-1]["id"]
    return page[:limit]


def uploaded_for(connection: Connection, model: str, tenant: str = DEFAULT_TENANT) -> list[str]:
    """The IDs of the uploaded jobs that were uploaded for a model of this name, or for none; the oldest first."""
    for_it = or_(jobs.c.model_id.is_(None), jobs.c.model_id.in_(select(models.c.id).where(models.c.name == model)))
    query = select(jobs.c.id).where(jobs.c.state == JobState.UPLOADED, for_it)
    if tenant != EVERY_TENANT:
        query = query.where(jobs.c.tenant == tenant)
    return sorted(connection.scalars(query))


def get_several(connection: Connection, job_ids: Collection[str]) -> list[Job]:
    """Those of these jobs that are there and can be read, the oldest first."""
    found = connection.execute(_JOBS_OF, {"job_ids": list(job_ids)}).mappings().all()
    return sorted(_readable(found), key=lambda job: job.id)


def attempts_of(connection: Connection, job_id: str) -> list[Attempt]:
    """In their order, but for those that cannot be read."""
    found = []
    for row in connection.execute(_ATTEMPTS, {"job_id": job_id}).mappings().all():
        with suppress(UnreadableRow):
            found.append(rows.attempt(row))
    return found


def attempts_of_several(connection: Connection, job_ids: Collection[str]) -> dict[str, list[Attempt]]:
    """The attempts at each of these jobs that can be read, in one query."""
    found: dict[str, list[Attempt]] = {job_id: [] for job_id in job_ids}
    if found:
        for row in connection.execute(_ATTEMPTS_OF, {"job_ids": list(found)}).mappings():
            with suppress(UnreadableRow):
                found[row["job_id"]].append(rows.attempt(row))
    return found


def queue_position(connection: Connection, job: Job, now: float, most: int = 2**31) -> int | None:
    """How many queued jobs of its tenant that are due are ahead of this one. None when it does not queue, and when
    more than `most` queued jobs would have to be read to tell."""
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
    ahead, due = connection.execute(_COUNT_AHEAD, values).one()
    return int(due or 0) if ahead <= most else None


def queue_of(connection: Connection, tenant: str) -> Iterable[Sequence[Any]]:
    """The priority, moment of queueing, ID and `run_after` of each queued job of a tenant, in their order."""
    return connection.execute(_QUEUE, {"its_tenant": tenant})


def count_by_state(connection: Connection) -> dict[str, int]:
    counted = connection.execute(select(jobs.c.state, func.count().label("jobs")).group_by(jobs.c.state))
    return {row["state"]: row["jobs"] for row in counted.mappings()}


def count_rows(connection: Connection) -> tuple[int, int]:
    """Rows that were scored, and rows that failed, of all jobs that are kept."""
    ok, failed = connection.execute(select(_plausible_sum(jobs.c.rows_ok), _plausible_sum(jobs.c.rows_failed))).one()
    return int(ok or 0), int(failed or 0)


def _plausible_sum(counts: Column[int]) -> ColumnElement[int]:
    """Without numbers that no job can have, over which a sum would overflow."""
    return func.sum(case((counts.between(0, 2**48), counts), else_=0))


def longest_wait(connection: Connection, now: float) -> float:
    """Seconds for which the job that has waited longest could have been started."""
    return max(longest_waits(connection, now).values(), default=0.0)


def longest_waits(connection: Connection, now: float) -> dict[str, float]:
    """The same for each tenant that has a job which is due.

    A job does not wait before its `run_after`, and waits anew when an attempt gives it back.
    """
    given_back = select(func.max(attempts.c.finished_at)).where(attempts.c.job_id == jobs.c.id).scalar_subquery()
    due = select(
        jobs.c.tenant, _later(jobs.c.queued_at, jobs.c.run_after).label("since"), given_back.label("given_back")
    )
    plausible = jobs.c.queued_at.between(rows.EARLIEST, rows.LATEST)  # a job that cannot be read hides no other
    waiting = due.where(*_due(now), plausible).subquery()
    oldest = select(waiting.c.tenant, func.min(_later(waiting.c.since, waiting.c.given_back)).label("oldest"))
    found = connection.execute(oldest.group_by(waiting.c.tenant)).mappings()
    return {
        row["tenant"]: max(0.0, now - row["oldest"]) if isinstance(row["oldest"], int | float) else 0.0 for row in found
    }


def request_cancel(connection: Connection, job_id: str, now: float) -> Job:
    """uploaded, queued -> cancelled at once; running: the worker is asked to stop. No effect on a finished job."""
    connection.execute(
        update(jobs)
        .where(jobs.c.id == job_id, jobs.c.state.in_((JobState.UPLOADED, JobState.QUEUED)))
        .values(state=JobState.CANCELLED, cancel_requested_at=now, finished_at=now)
    )
    connection.execute(
        update(jobs)
        .where(jobs.c.id == job_id, jobs.c.state == JobState.RUNNING, jobs.c.cancel_requested_at.is_(None))
        .values(cancel_requested_at=now)
    )
    return get(connection, job_id)


def retry_if_stopped(connection: Connection, job_id: str, now: float) -> Job:
    """failed, cancelled -> queued, with the chunks that are done.

    Raises JobConflict in any other state, and when its input was removed or the model deleted meanwhile.
    """
    changed = _changed(
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
        ),
    )
    job = get(connection, job_id)
    if not changed:
        _require_input(job)
    if not changed and job.model and job.state in (JobState.FAILED, JobState.CANCELLED) and job.queued_at is not None:
        raise _model_is_gone(job)
    if not changed:
        raise JobConflict(f"job {job_id} is {job.state}: only a failed or cancelled job that was queued can be retried")
    connection.execute(update(chunks).where(chunks.c.job_id == job_id).values(crashes=0))
    return job


def require_failed_rows(job: Job) -> None:
    """Raises JobConflict unless the job is completed, some of its records failed, and its input is still there."""
    _require_input(job)
    if job.state is not JobState.COMPLETED or not job.rows_failed or job.reused_from is not None:
        raise JobConflict(
            f"job {job.id} is {job.state} with {job.rows_failed} failed records of its own: failed records can be "
            "scored again when a job is completed and some failed"
        )


def create_retry_of_failed_rows(connection: Connection, job: Job, job_id: str, input_key: str, now: float) -> None:
    """-> queued: a new job with the plan of a completed one, in which only chunks with failed records are open.

    The result of the completed job never changes; the new job's result is the merged one. The parts of the chunks
    without errors have been copied. Raises JobConflict when nothing failed, or when the model was deleted meanwhile.
    """
    require_failed_rows(job)
    row = connection.execute(select(jobs).where(jobs.c.id == job.id)).mappings().one()
    if not connection.scalar(select(_is_registered(row["model_id"]))):
        raise _model_is_gone(job)
    own = {"id", "state", "attempt", "crashes", "worker", "lease_until", "lease_clock", "cancel_requested_at"}
    own |= {"input_key", "rows_ok", "rows_failed", "chunks_done", "progress", "notes", "request_digest"}
    own |= {name for name in jobs.c.keys() if name.endswith("_at") or name.startswith(("result_", "errors_"))}  # noqa: SIM118
    copied = {name: value for name, value in row.items() if name not in own}
    done = [entry for entry in done_chunks(connection, job.id) if not entry[3]]
    rows_ok = sum(chunk.records for chunk, *_ in done)
    connection.execute(
        insert(jobs).values(
            **copied,
            id=job_id,
            state=JobState.QUEUED,
            input_key=input_key,
            result_format=job.result_format,
            rows_ok=rows_ok,
            chunks_done=len(done),
            progress=0.99 * rows_ok / job.rows_planned,
            notes=[f"scores the failed records of job {job.id} again"],
            created_at=now,
            queued_at=now,
        )
    )
    plan = connection.execute(select(chunks).where(chunks.c.job_id == job.id)).mappings().all()
    taken = {chunk.first_record for chunk, *_ in done}
    opened = dict.fromkeys(("attempt", "part_bytes", "part_sha256", "rows_failed", "errors_bytes"))
    connection.execute(
        insert(chunks),
        [{**row, **({} if row["first_record"] in taken else opened), "job_id": job_id, "crashes": 0} for row in plan],
    )


@dataclass(frozen=True, slots=True)
class Owned:
    """The bytes that a job leaves, as its row names them; `state`: before it was removed, or expired."""

    id: str
    state: str
    input_key: str
    result_key: str | None
    errors_key: str | None


def delete_if_not_running(connection: Connection, job_id: str) -> Owned:
    """Removes the row, and returns what it named. Raises JobConflict while a worker has it: cancel it first.

    A row that cannot be read goes in any state: there is no other way out for it, and a worker that has it finds that
    it lost its lease.
    """
    row = connection.execute(_OWNED.where(jobs.c.id == job_id)).mappings().one_or_none()
    if row is None:
        raise JobNotFound(f"no job {job_id!r}")
    guards = [jobs.c.id == job_id]
    try:
        get(connection, job_id)
        guards.append(jobs.c.state != JobState.RUNNING)
    except UnreadableRow:
        pass
    if not _changed(connection, delete(jobs).where(*guards)):
        raise JobConflict(f"job {job_id} is running: cancel it before you delete it")
    return _owned(row)


def remove_whatever_its_state(connection: Connection, job_id: str) -> Owned | None:
    """Removes the row of a job that cannot go on, and returns what it named; None when there is none."""
    row = connection.execute(_OWNED.where(jobs.c.id == job_id)).mappings().one_or_none()
    if row is None or not _changed(connection, delete(jobs).where(jobs.c.id == job_id)):
        return None
    return _owned(row)


def named_results(connection: Connection, keys: Collection[str]) -> set[str]:
    """Those of these keys, of results and of errors lists, that a job has. Nobody ever names the others."""
    # An errors list goes by its result, whose key has an index.
    results = {key.removesuffix(ERRORS_SUFFIX) for key in keys}
    named = connection.execute(select(jobs.c.result_key, jobs.c.errors_key).where(jobs.c.result_key.in_(results)))
    return {key for row in named for key in row if key is not None}


# --- what retention does ----------------------------------------------------------------------------------------------


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
    for those that were uploaded before another. A date `after` a third is of a clock that went wrong, and old.

    They name no bytes any more: whoever calls removes them. Returns what the jobs that expired named before.
    """
    over = (jobs.c.id.in_(job_ids), _is_over(ended_before, uploaded_before, after))
    before = [_owned(row) for row in connection.execute(_OWNED.where(*over)).mappings()]
    expired = {
        "state": JobState.EXPIRED,
        "result_key": None,
        "errors_key": None,
        "finished_at": func.coalesce(jobs.c.finished_at, now),
        "expires_at": now,
        "input_removed_at": func.coalesce(jobs.c.input_removed_at, now),
    }
    changed = connection.scalars(update(jobs).where(*over).values(expired).returning(jobs.c.id)).all()
    connection.execute(delete(chunks).where(chunks.c.job_id.in_(changed)))
    return [owned for owned in before if owned.id in changed]


def find_with_input_over(connection: Connection, ended_before: float, most: int, after: float = math.inf) -> list[str]:
    """Up to `most` jobs that `drop_input_if_over` would take."""
    return list(connection.scalars(select(jobs.c.id).where(_has_input_over(ended_before, after)).limit(most)))


def drop_input_if_over(
    connection: Connection, job_ids: Collection[str], ended_before: float, now: float, after: float = math.inf
) -> list[Owned]:
    """Lets those of these jobs that ended before a moment give up their input, and with it any retry.

    State, result and, of failed and cancelled jobs, the parts stay. Returns what the jobs that had one name.
    """
    over = (jobs.c.id.in_(job_ids), _has_input_over(ended_before, after))
    changed = connection.scalars(update(jobs).where(*over).values(input_removed_at=now).returning(jobs.c.id)).all()
    return [_owned(row) for row in connection.execute(_OWNED.where(jobs.c.id.in_(changed))).mappings()]


def delete_expired_before(connection: Connection, before: float, most: int, after: float = math.inf) -> int:
    """Deletes up to `most` rows of jobs that expired before a moment, or `after` another; returns how many."""
    old = select(jobs.c.id).where(jobs.c.state == JobState.EXPIRED, _outside(jobs.c.expires_at, before, after))
    old = old.limit(most)
    return connection.execute(delete(jobs).where(jobs.c.id.in_(old), jobs.c.state == JobState.EXPIRED)).rowcount


# --- what workers do -------------------------------------------------------------------------------------------------


def is_due(connection: Connection, now: float, most: int = 1) -> bool:
    """Whether `claim_due` would find a job, or nearly so. Costs less than to claim in vain, and waits for no lock."""
    if most > 0:
        return connection.scalar(_IS_DUE, {"now": now}) is not None
    return 0 in _waiting_tenants(connection).values()


def claim_due(connection: Connection, worker: str, lease: float, now: Moment, most: int) -> list[Job]:
    """queued -> running for up to `most` jobs that are due, each with a new attempt number and a lease of `lease`
    seconds; and beyond `most`, for one job of each tenant of which none is running.

    Tenants take turns: the one of which fewer jobs are running comes first, chance decides between equals. The jobs
    of a tenant go by priority and age. A job that cannot be read ends failed at once, and is never met again.
    """
    running = _waiting_tenants(connection)
    claimed: list[str] = []
    while running:
        room = most - len(claimed)
        tenant, its_running = min(running.items(), key=lambda entry: (entry[1], random.random()))  # noqa: S311
        if room <= 0 and its_running:
            break
        share = max(room, 1) if len(running) == 1 else 1  # with nobody to take turns with, all at once
        values = {
            "now": now.wall,
            "its_tenant": tenant,
            "most": share,
            "taker": worker,
            "until": now.steady + lease,
            "of_clock": now.clock,
        }
        its_jobs = connection.scalars(_CLAIM, values).all()
        claimed += its_jobs
        running[tenant] += len(its_jobs)
        if len(its_jobs) < share:
            del running[tenant]
    if not claimed:
        return []
    taken = _taken(connection, claimed, now.wall)
    if not taken:
        return []
    begun = [
        {
            "job_id": job.id,
            "number": job.attempt,
            "worker": worker,
            "started_at": now.wall,
            "rows_before": job.rows_done,
        }
        for job in taken
    ]
    connection.execute(_BEGIN_ATTEMPT, begun)
    return taken


def _taken(connection: Connection, claimed: list[str], now: float) -> list[Job]:
    """The claimed jobs in the order of the queue. Those that cannot be read fail."""
    taken = []
    for row in connection.execute(_JOBS_OF, {"job_ids": claimed}).mappings().all():
        try:
            taken.append(_job(row))
        except UnreadableRow as error:
            values = {"state": JobState.FAILED, "reason": error.code, "error": error.to_json()}
            plain = {"finished_at": now, "worker": None, "lease_until": None}
            connection.execute(update(jobs).where(jobs.c.id == row["id"]).values(**values, **plain))
    return sorted(taken, key=lambda job: (-job.priority, job.queued_at or 0.0, job.id))


def renew_lease_if_mine(connection: Connection, job_id: str, attempt: int, lease: float, now: Moment) -> None:
    _require_mine(
        connection, job_id, attempt, {"lease_until": now.steady + lease, "lease_clock": now.clock}, "renew the lease of"
    )


def cancel_requests(connection: Connection, job_ids: Iterable[str]) -> set[str]:
    """Which of these jobs a client wants cancelled."""
    return set(connection.scalars(_CANCEL_REQUESTS, {"job_ids": list(job_ids)}))


def add_chunks_if_mine(
    connection: Connection, job_id: str, attempt: int, planned: Sequence[Chunk], complete: bool
) -> None:
    """Appends to the plan. A stored chunk never changes its range, so that a resumed job has the same chunks."""
    _require_mine(
        connection,
        job_id,
        attempt,
        {
            "rows_planned": jobs.c.rows_planned + sum(chunk.records for chunk in planned),
            "chunks_total": jobs.c.chunks_total + len(planned),
            "planned": complete,
        },
        "plan",
    )
    if planned:
        connection.execute(_ADD_CHUNKS, [_chunk_row(job_id, chunk) for chunk in planned])


def last_chunk(connection: Connection, job_id: str) -> Chunk | None:
    query = select(chunks).where(chunks.c.job_id == job_id).order_by(chunks.c.first_record.desc()).limit(1)
    row = connection.execute(query).mappings().one_or_none()
    return rows.chunk(row) if row else None


def chunk_before(connection: Connection, job_id: str, first_record: int) -> Chunk | None:
    query = select(chunks).where(chunks.c.job_id == job_id, chunks.c.first_record < first_record)
    row = connection.execute(query.order_by(chunks.c.first_record.desc()).limit(1)).mappings().one_or_none()
    return rows.chunk(row) if row else None


def pending_chunks(connection: Connection, job_id: str) -> list[Chunk]:
    """The planned chunks that no attempt has committed, in order."""
    query = select(chunks).where(chunks.c.job_id == job_id, chunks.c.attempt.is_(None))
    return [rows.chunk(row) for row in connection.execute(query.order_by(chunks.c.first_record)).mappings().all()]


def commit_chunk_if_mine(
    connection: Connection, job_id: str, attempt: int, scored: ScoredChunk, progress: float
) -> None:
    """Makes a part count, once and for ever. Progress never goes back."""
    done = _changed(
        connection,
        update(chunks)
        .where(
            chunks.c.job_id == job_id,
            chunks.c.first_record == scored.first_record,
            chunks.c.records == scored.records,
            chunks.c.attempt.is_(None),
        )
        .values(_part_values(scored, attempt)),
    )
    if not done:
        raise LeaseLost(f"chunk at record {scored.first_record} of job {job_id} was committed by another attempt")
    _require_mine(
        connection,
        job_id,
        attempt,
        {
            "rows_ok": jobs.c.rows_ok + scored.records - scored.rows_failed,
            "rows_failed": jobs.c.rows_failed + scored.rows_failed,
            "chunks_done": jobs.c.chunks_done + 1,
            "crashes": 0,
            "progress": case((jobs.c.progress < progress, progress), else_=jobs.c.progress),
        },
        "commit a chunk of",
    )


def count_crash_if_mine(connection: Connection, job_id: str, attempt: int, first_record: int) -> int:
    """Counts a crash of the process that scored this chunk; returns how many there were."""
    _require_mine(connection, job_id, attempt, {"worker": jobs.c.worker}, "count a crash of")
    crashes: int = connection.execute(
        update(chunks)
        .where(chunks.c.job_id == job_id, chunks.c.first_record == first_record)
        .values(crashes=chunks.c.crashes + 1)
        .returning(chunks.c.crashes)
    ).scalar_one()
    return crashes


def split_chunk_if_mine(connection: Connection, job_id: str, attempt: int, whole: Chunk, halves: list[Chunk]) -> None:
    """Puts two chunks, with the crashes of the whole, in the place of one that crashed."""
    _require_mine(connection, job_id, attempt, {"chunks_total": jobs.c.chunks_total + len(halves) - 1}, "split")
    guard = and_(chunks.c.job_id == job_id, chunks.c.first_record == whole.first_record, chunks.c.attempt.is_(None))
    crashes = connection.execute(delete(chunks).where(guard).returning(chunks.c.crashes)).scalar_one_or_none()
    if crashes is None:
        raise LeaseLost(f"chunk at record {whole.first_record} of job {job_id} was committed by another attempt")
    connection.execute(insert(chunks), [{**_chunk_row(job_id, half), "crashes": crashes} for half in halves])


def done_chunks(connection: Connection, job_id: str) -> list[tuple[Chunk, int, int, int]]:
    """The committed chunks in order, each with the attempt of its part, the part's bytes and its errors' bytes."""
    query = select(chunks).where(chunks.c.job_id == job_id, chunks.c.attempt.is_not(None))
    done = connection.execute(query.order_by(chunks.c.first_record)).mappings().all()
    return [(rows.chunk(row), row["attempt"], row["part_bytes"], row["errors_bytes"]) for row in done]


def complete_if_mine(
    connection: Connection, job_id: str, attempt: int, result: Result, notes: Sequence[str], now: float
) -> None:
    """running -> completed. Before this commit the result exists for nobody; after it, it never changes.

    Guarded by the row account as well: every planned record has its row.
    """
    _require_mine(
        connection,
        job_id,
        attempt,
        {
            "state": JobState.COMPLETED,
            "progress": 1.0,
            **_result_values(result, notes),
            "lease_until": None,
            "finished_at": now,
        },
        "complete",
        jobs.c.planned,
        jobs.c.chunks_done == jobs.c.chunks_total,
        jobs.c.rows_ok + jobs.c.rows_failed == jobs.c.rows_planned,
    )
    _end_attempt(connection, job_id, attempt, "completed", None, now)


def complete_small_if_mine(
    connection: Connection,
    job_id: str,
    attempt: int,
    chunk: Chunk,
    scored: ScoredChunk,
    result: Result,
    notes: Sequence[str],
    now: float,
) -> None:
    """running -> completed for a job that was planned, scored and assembled in one call: `add_chunks_if_mine`,
    `commit_chunk_if_mine` and `complete_if_mine` at once. Raises LeaseLost also when it was planned before."""
    values = {
        "state": JobState.COMPLETED,
        "progress": 1.0,
        "planned": True,
        "rows_planned": chunk.records,
        "rows_ok": scored.records - scored.rows_failed,
        "rows_failed": scored.rows_failed,
        "chunks_total": 1,
        "chunks_done": 1,
        "crashes": 0,
        **_result_values(result, notes),
        "lease_until": None,
        "finished_at": now,
    }
    done = chunk.records == scored.records and _changed(
        connection, _COMPLETE_SMALL, {"job": job_id, "mine": attempt, **values}
    )
    if not done:
        raise LeaseLost(f"attempt {attempt} may not complete job {job_id}: it is not the job's attempt any more")
    connection.execute(_ADD_CHUNKS, [_chunk_row(job_id, chunk) | _part_values(scored, attempt)])
    _end_attempt(connection, job_id, attempt, "completed", None, now)


def fail_if_mine(connection: Connection, job_id: str, attempt: int, error: BatchserveError, now: float) -> None:
    """running -> failed."""
    values = {"state": JobState.FAILED, "reason": error.code, "error": error.to_json()}
    _stop(connection, job_id, attempt, values, "failed", error.to_json(), now)


def cancel_if_mine(connection: Connection, job_id: str, attempt: int, now: float) -> None:
    """running -> cancelled."""
    _stop(connection, job_id, attempt, {"state": JobState.CANCELLED}, "cancelled", None, now)


def release_if_mine(connection: Connection, job_id: str, attempt: int, now: float) -> None:
    """running -> queued, at once and for any worker: this one is stopping. -> cancelled when that was asked for."""
    asked = jobs.c.cancel_requested_at.is_not(None)
    values = {
        "state": case((asked, JobState.CANCELLED.value), else_=JobState.QUEUED.value),
        "finished_at": case((asked, now)),
        "worker": None,
        "lease_until": None,
    }
    _require_mine(connection, job_id, attempt, values, "release")
    _end_attempt(connection, job_id, attempt, "released", None, now)


def rescue_expired(connection: Connection, crashes: int, now: Moment) -> tuple[list[str], list[str]]:
    """running -> queued for jobs whose lease lapsed; -> failed when `crashes` attempts in a row made no progress;
    -> cancelled when that was asked for.

    Returns the IDs of those queued and those failed. A lease of another boot of the host has lapsed, whatever it says.
    """
    lapsed = and_(
        jobs.c.state == JobState.RUNNING,
        or_(jobs.c.lease_until < now.steady, jobs.c.lease_clock != now.clock),
    )
    error = WorkerCrashed(
        f"{crashes} workers in a row died while they ran this job, without finishing a chunk. Look at their logs and "
        "memory, then retry the job: it goes on where it stopped."
    )

    def move(*guards: ColumnElement[bool], **values: Any) -> list[str]:
        """Jobs first, then their attempts: an attempt whose lease is renewed at this moment is not lost."""
        moved = connection.execute(
            update(jobs).where(lapsed, *guards).values(lease_until=None, **values).returning(jobs.c.id, jobs.c.attempt)
        ).all()
        for job_id, attempt in moved:
            lost = {"code": "worker-lost", "message": "lease lapsed"}
            _end_attempt(connection, job_id, attempt, "lost", lost, now.wall)
        return [job_id for job_id, _ in moved]

    move(jobs.c.cancel_requested_at.is_not(None), state=JobState.CANCELLED, finished_at=now.wall)
    failed = move(
        jobs.c.crashes + 1 >= crashes,
        state=JobState.FAILED,
        reason=error.code,
        error=error.to_json(),
        finished_at=now.wall,
    )
    queued = move(state=JobState.QUEUED, crashes=jobs.c.crashes + 1, worker=None)
    return queued, failed


# --- shared by the transitions ---------------------------------------------------------------------------------------


def _changed(connection: Connection, statement: Any, values: Mapping[str, Any] | None = None) -> bool:
    return bool(connection.execute(statement, values).rowcount)


def _waiting_tenants(connection: Connection) -> dict[str, int]:
    """The tenants that have queued jobs, due or not, each with the number of its running ones."""
    waiting = connection.execute(_WAITING_TENANTS).mappings()
    return {row["tenant"]: row["running"] for row in waiting}


def _due(now: Any) -> tuple[ColumnElement[bool], ColumnElement[bool]]:
    return jobs.c.state == JobState.QUEUED, or_(jobs.c.run_after.is_(None), jobs.c.run_after <= now)


_ENDED = (JobState.COMPLETED, JobState.FAILED, JobState.CANCELLED)


def _is_over(ended_before: float, uploaded_before: float, after: float) -> ColumnElement[bool]:
    return or_(
        and_(jobs.c.state.in_(_ENDED), _outside(jobs.c.finished_at, ended_before, after)),
        and_(jobs.c.state == JobState.UPLOADED, _outside(jobs.c.created_at, uploaded_before, after)),
    )


def _has_input_over(ended_before: float, after: float) -> ColumnElement[bool]:
    ended = and_(jobs.c.state.in_(_ENDED), _outside(jobs.c.finished_at, ended_before, after))
    return and_(ended, jobs.c.input_removed_at.is_(None))


def _outside(moment: ColumnElement[Any], before: float, after: float) -> ColumnElement[bool]:
    """Never when `before` is that of the epoch: then nothing is over, however it is dated."""
    early, late = literal(before, Float()), literal(after, Float())  # may be infinite, as no time in a row is
    return or_(moment < early, and_(moment > late, early > 0.0))


def _later(first: ColumnElement[Any], second: ColumnElement[Any]) -> ColumnElement[Any]:
    """The later of two times, of which the second may be null."""
    return case((second > first, second), else_=first)


def _is_registered(model_id: Any) -> ColumnElement[bool]:
    return exists().where(models.c.id == model_id, models.c.deleted_at.is_(None))


def _require_input(job: Job) -> None:
    if job.input_removed_at is not None:
        raise JobConflict(f"job {job.id} cannot be retried: its input was removed; upload it again to predict it anew")


def _model_is_gone(job: Job) -> JobConflict:
    name = job.model.reference if job.model else "none"
    return JobConflict(f"job {job.id} cannot be retried: its model {name} was deleted")


def _require_mine(
    connection: Connection,
    job_id: str,
    attempt: int,
    values: Mapping[str, Any],
    verb: str,
    *guards: ColumnElement[bool],
) -> None:
    mine = (jobs.c.id == job_id, jobs.c.state == JobState.RUNNING, jobs.c.attempt == attempt)
    if not _changed(connection, update(jobs).where(*mine, *guards).values(**values)):
        raise LeaseLost(f"attempt {attempt} may not {verb} job {job_id}: it is not the job's attempt any more")


def _stop(
    connection: Connection,
    job_id: str,
    attempt: int,
    values: Mapping[str, Any],
    outcome: str,
    error: dict[str, Any] | None,
    now: float,
) -> None:
    _require_mine(connection, job_id, attempt, {**values, "lease_until": None, "finished_at": now}, "stop")
    _end_attempt(connection, job_id, attempt, outcome, error, now)


def _end_attempt(
    connection: Connection, job_id: str, number: int, outcome: str, error: dict[str, Any] | None, now: float
) -> None:
    values = {"outcome": outcome, "error": error, "finished_at": now}
    connection.execute(_END_ATTEMPT, {"job": job_id, "mine": number, **values})


def _chunk_row(job_id: str, chunk: Chunk) -> dict[str, Any]:
    return {
        "job_id": job_id,
        "first_record": chunk.first_record,
        "records": chunk.records,
        "start": chunk.start,
        "stop": chunk.stop,
    }


def _part_values(scored: ScoredChunk, attempt: int) -> dict[str, Any]:
    return {
        "attempt": attempt,
        "part_bytes": scored.part_bytes,
        "part_sha256": scored.part_sha256,
        "rows_failed": scored.rows_failed,
        "errors_bytes": scored.errors_bytes,
    }


def _result_values(result: Result, notes: Sequence[str]) -> dict[str, Any]:
    return {
        "result_key": result.key,
        "result_bytes": result.bytes,
        "result_sha256": result.sha256,
        "errors_key": result.errors_key,
        "errors_bytes": result.errors_bytes,
        "notes": presentable(list(notes)),
    }


# Statements of every job and every poll. Building one costs more than running it: these are built once. Parameters
# with the name of a column are its new value.

_JOB_FIELDS = frozenset(Job.__dataclass_fields__) - {"model"}
_JOBS = (
    select(*(column for column in jobs.c if column.name in _JOB_FIELDS), *model_columns)
    .select_from(jobs.outerjoin(models, jobs.c.model_id == models.c.id))
    .order_by(jobs.c.id.desc())
)
_JOB = _JOBS.where(jobs.c.id == bindparam("job_id"))
# Among the latest alone: thousands of equal jobs that queue would be read in the transaction of each predict.
_ALIKE = (
    select(jobs.c.id, jobs.c.state)
    .where(jobs.c.request_digest == bindparam("digest"), jobs.c.tenant == bindparam("its_tenant"))
    .order_by(jobs.c.id.desc())
    .limit(1000)
    .subquery()
)
_EQUAL = _JOBS.where(jobs.c.id.in_(select(_ALIKE.c.id).where(_ALIKE.c.state == JobState.COMPLETED)))
_LATEST_EQUAL = _JOBS.where(
    jobs.c.id == select(func.max(_ALIKE.c.id)).where(_ALIKE.c.state == JobState.COMPLETED).scalar_subquery()
)
_MOST_EQUAL = 100
"""Equal jobs that are looked at when the latest of them cannot be read."""
_TENANT = select(jobs.c.tenant).where(jobs.c.id == bindparam("job_id"))
_STATE = select(jobs.c.state).where(jobs.c.id == bindparam("job_id"))
_JOBS_OF = _JOBS.where(jobs.c.id.in_(bindparam("job_ids", expanding=True)))
_ATTEMPTS = select(attempts).where(attempts.c.job_id == bindparam("job_id")).order_by(attempts.c.number)
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
_COUNT_AHEAD = select(
    func.count(),
    func.sum(case((or_(_AHEAD.c.run_after.is_(None), _AHEAD.c.run_after <= bindparam("now")), 1), else_=0)),
)
_QUEUE = (
    select(jobs.c.priority, jobs.c.queued_at, jobs.c.id, jobs.c.run_after)
    .where(_ITS_QUEUE)
    .order_by(jobs.c.priority.desc(), jobs.c.queued_at, jobs.c.id)
)
_CREATE = insert(jobs)
_ENQUEUE = update(jobs).where(
    jobs.c.id == bindparam("job"), jobs.c.state == JobState.UPLOADED, _is_registered(bindparam("model"))
)
_IS_DUE = select(jobs.c.id).where(*_due(bindparam("now"))).limit(1)
_its_running = jobs.alias("its_running")
_QUEUED = select(func.min(jobs.c.tenant).label("tenant")).where(jobs.c.state == JobState.QUEUED)
_FIRST_TENANT = _QUEUED.cte("waiting", recursive=True)
# One step into the index for each tenant, however many jobs it has.
_TENANTS = _FIRST_TENANT.union_all(
    select(_QUEUED.where(jobs.c.tenant > _FIRST_TENANT.c.tenant).scalar_subquery()).where(
        _FIRST_TENANT.c.tenant.is_not(None)
    )
)
_WAITING_TENANTS = select(
    _TENANTS.c.tenant,
    select(func.count())
    .select_from(_its_running)
    .where(_its_running.c.state == JobState.RUNNING, _its_running.c.tenant == _TENANTS.c.tenant)
    .scalar_subquery()
    .label("running"),
).where(_TENANTS.c.tenant.is_not(None))
_NEXT = (
    select(jobs.c.id)
    .where(*_due(bindparam("now")), jobs.c.tenant == bindparam("its_tenant"))
    .order_by(jobs.c.priority.desc(), jobs.c.queued_at, jobs.c.id)
    .limit(bindparam("most"))
    .with_for_update(skip_locked=True)
    .cte("next")
)
_CLAIM = (
    update(jobs)
    # The guard stands in `next`, which locks what it finds. Here again, it would have SQLite read the whole queue.
    .where(jobs.c.id.in_(select(_NEXT.c.id)))
    .values(
        state=JobState.RUNNING,
        attempt=jobs.c.attempt + 1,
        worker=bindparam("taker"),
        lease_until=bindparam("until"),
        lease_clock=bindparam("of_clock"),
        started_at=func.coalesce(jobs.c.started_at, bindparam("now")),
    )
    .returning(jobs.c.id)
)
_BEGIN_ATTEMPT = insert(attempts)
_END_ATTEMPT = update(attempts).where(attempts.c.job_id == bindparam("job"), attempts.c.number == bindparam("mine"))
_CANCEL_REQUESTS = select(jobs.c.id).where(
    jobs.c.id.in_(bindparam("job_ids", expanding=True)), jobs.c.cancel_requested_at.is_not(None)
)
_ADD_CHUNKS = insert(chunks)
_COMPLETE_SMALL = update(jobs).where(
    jobs.c.id == bindparam("job"),
    jobs.c.state == JobState.RUNNING,
    jobs.c.attempt == bindparam("mine"),
    jobs.c.chunks_total == 0,
)


_OWNED = select(*(jobs.c[name] for name in Owned.__dataclass_fields__))


def _owned(row: RowMapping) -> Owned:
    """Of a row that may be damaged: keys that are none of ours are left to the sweep."""
    keys = {
        name: row[name] if isinstance(row[name], str) and row[name].startswith("results/") else None
        for name in ("result_key", "errors_key")
    }
    return Owned(row["id"], str(row["state"]), input_key_of(row["id"]), **keys)


def _readable(found: Sequence[RowMapping]) -> Iterator[Job]:
    """Of rows that are fetched already, as all are that may be refused: a cursor that is left in the middle would keep
    its connection at an old state of the database."""
    for row in found:
        with suppress(UnreadableRow):
            yield _job(row)


def _job(row: RowMapping) -> Job:
    """Raises UnreadableRow. A job that has ended is shown without a model that cannot be read."""
    model = None
    if row["model_id"] is not None:
        try:
            model = model_from_row(row)
        except UnreadableRow:
            if row["state"] not in _ENDED:
                raise
    return rows.job(row, model)
