"""Transitions made by workers: they claim a job, keep its lease, and end their attempt.

A worker's writes name its attempt number, the fencing token: when another attempt owns the job, no row matches and
LeaseLost is raised, which rolls the transaction back. An attempt may end its job in the same way once more: it is
unknown whether a commit has happened when the connection is lost.
"""

import random
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from sqlalchemy import Connection, and_, bindparam, func, insert, or_, select, update

from batchserve.db import notifications
from batchserve.db.connect import Moment
from batchserve.db.notifications import Topic
from batchserve.db.prepared import Prepared
from batchserve.db.tables import attempts, inputs, jobs
from batchserve.domain import Attempt, Job, JobState, Result, ScoredChunk, StoredInput
from batchserve.errors import BatchserveError, LeaseLost, UnreadableRow, WorkerCrashed
from batchserve.jobs import contents
from batchserve.jobs.ends import Ended, ending, error_values, finish, result_values
from batchserve.jobs.plan import ADD_CHUNKS, chunk_values, part_values
from batchserve.jobs.statements import JOBS_OF, changed, due, further_inputs, job_from_row, require_mine

_chance = random.Random()  # noqa: S311 - separate from the global generator, whose state others use


def is_due(connection: Connection, now: float, most: int = 1) -> bool:
    """Whether `claim_due` would probably find a job. Cheaper than an empty claim, and waits for no lock."""
    if most > 0:
        return _IS_DUE.row(connection, {"now": now}) is not None
    return 0 in _waiting_tenants(connection).values()


def claim_due(connection: Connection, worker: str, lease: float, now: Moment, most: int) -> list[Job]:
    """queued -> running for up to `most` jobs that are due, each with a new attempt number and a lease of `lease`
    seconds; and beyond `most`, for one job of each tenant without a running one. Tenants with fewer running jobs come
    first, equals in random order. The jobs of a tenant go by priority and age. An unreadable job fails immediately, and
    is not claimed again.
    """
    running = _waiting_tenants(connection)
    claimed: list[str] = []
    while running:
        room = most - len(claimed)
        tenant, its_running = min(running.items(), key=lambda entry: (entry[1], _chance.random()))
        if room <= 0 and its_running:
            break
        share = max(room, 1) if len(running) == 1 else 1  # a single tenant claims all in one step
        values = {
            "now": now.wall,
            "its_tenant": tenant,
            "most": share,
            "taker": worker,
            "until": now.steady + lease,
            "of_clock": now.clock,
        }
        its_jobs = _CLAIM.rows(connection, values)
        claimed += (row["id"] for row in its_jobs)
        running[tenant] += len(its_jobs)
        if len(its_jobs) < share:
            del running[tenant]
    if not claimed:
        return []
    taken = _taken(connection, claimed, now.wall)
    if not taken:
        return []
    for job in taken:
        begun = Attempt(job.attempt, worker, started_at=now.wall, rows_before=job.rows_done)
        add_attempt(connection, job.id, begun)
    return taken


def add_attempt(connection: Connection, job_id: str, attempt: Attempt) -> None:
    values = {name: getattr(attempt, name) for name in Attempt.__dataclass_fields__}
    _ADD_ATTEMPT.send(
        connection, {"job_id": job_id, **{name: value for name, value in values.items() if value is not None}}
    )


def _taken(connection: Connection, claimed: list[str], now: float) -> list[Job]:
    """The claimed jobs in the order of the queue. Unreadable ones fail."""
    taken = []
    found = connection.execute(JOBS_OF, {"job_ids": claimed}).mappings().all()
    further = further_inputs(connection, found)
    for row in found:
        try:
            taken.append(job_from_row(row, further.get(row["id"], ())))
        except UnreadableRow as error:
            values = error_values(error) | {"worker": None}
            finish(connection, ending(jobs.c.id == row["id"]), JobState.FAILED, now, values)
    return sorted(taken, key=lambda job: (-job.priority, job.queued_at or 0.0, job.id))


def _waiting_tenants(connection: Connection) -> dict[str, int]:
    """The tenants that have queued jobs, due or not, each with the number of its running ones."""
    return {row["tenant"]: row["running"] for row in _WAITING_TENANTS.rows(connection, {})}


def renew_lease_if_mine(connection: Connection, job_id: str, attempt: int, lease: float, now: Moment) -> None:
    require_mine(
        connection, job_id, attempt, {"lease_until": now.steady + lease, "lease_clock": now.clock}, "renew the lease of"
    )


def wait_if_mine(connection: Connection, job_id: str, attempt: int, reason: str | None) -> None:
    """Shows in the row what the job waits for, by the code of an error; None: it waits no longer."""
    require_mine(connection, job_id, attempt, {"reason": reason}, "delay")


def keep_input_if_mine(connection: Connection, job_id: str, attempt: int, stored: StoredInput) -> bool:
    """The rows of its query, which this attempt has read and stored, are the input of the job from now on. False: they
    were before."""
    require_mine(connection, job_id, attempt, {"reason": None}, "keep the input of")
    kept = update(inputs).where(inputs.c.job_id == job_id, inputs.c.number == 0, inputs.c.key != stored.key)
    return changed(connection, kept.values(key=stored.key, bytes=stored.bytes, sha256=stored.sha256))


def cancel_requests(connection: Connection, job_ids: Iterable[str]) -> set[str]:
    """Those of these running jobs whose cancellation was requested."""
    return set(connection.scalars(_CANCEL_REQUESTS)).intersection(job_ids)


def complete_if_mine(
    connection: Connection,
    job_id: str,
    attempt: int,
    result: Result,
    facts: Mapping[str, Any],
    now: float,
    *,
    only: ScoredChunk | None = None,
    small: Mapping[str, bytes] = MappingProxyType({}),
) -> bool:
    """running -> completed. Before this commit the result is invisible; after it, it never changes. Also guarded by the
    row count: every planned record has its row. `only`: the chunk of a job that was done in one call; it is planned and
    committed here, and must not have been planned before. `small`: the contents of its result, if it is
    kept in rows. False when this attempt has completed it before.
    """
    if only is None:
        values = result_values(result, facts)
        return _finish_mine(connection, job_id, attempt, JobState.COMPLETED, now, values, _COMPLETE)
    values = account_of(only) | result_values(result, facts)
    if not _finish_mine(connection, job_id, attempt, JobState.COMPLETED, now, values, _COMPLETE_UNPLANNED):
        return False
    add_scored(connection, job_id, attempt, only, small)
    return True


def add_scored(
    connection: Connection, job_id: str, attempt: int, only: ScoredChunk, small: Mapping[str, bytes]
) -> None:
    """The only chunk of a job and, if they are kept in rows, the contents of its result."""
    ADD_CHUNKS.send(connection, chunk_values(job_id, only.chunk) | part_values(only, attempt))
    contents.add(connection, small)


def fail_if_mine(connection: Connection, job_id: str, attempt: int, error: BatchserveError, now: float) -> None:
    """running -> failed."""
    _finish_mine(connection, job_id, attempt, JobState.FAILED, now, error_values(error))


def cancel_if_mine(connection: Connection, job_id: str, attempt: int, now: float) -> None:
    """running -> cancelled."""
    _finish_mine(connection, job_id, attempt, JobState.CANCELLED, now, {"reason": None})


def release_if_mine(connection: Connection, job_id: str, attempt: int, now: float) -> None:
    """running -> queued, immediately and for any worker: this one is stopping. -> cancelled when that was requested."""
    mine = {"job": job_id, "mine": attempt, "worker": None, "reason": None}
    if not finish(connection, _CANCEL_IF_ASKED, JobState.CANCELLED, now, mine):
        values = {"state": JobState.QUEUED, "worker": None, "lease_until": None, "reason": None}
        require_mine(connection, job_id, attempt, values, "release")
        notifications.send(connection, Topic.QUEUED, [job_id])
    _end_attempt(connection, job_id, attempt, "released", None, now)


def rescue_expired(connection: Connection, crashes: int, now: Moment) -> tuple[list[str], list[str]]:
    """running -> queued for jobs whose lease lapsed; -> failed when `crashes` attempts in a row made no progress; ->
    cancelled when that was requested. Returns the IDs of the queued and the failed ones. A lease of another boot of the
    host has always lapsed.
    """
    overdue = or_(jobs.c.lease_until < now.steady, jobs.c.lease_clock != now.clock)
    guards = (jobs.c.state == JobState.RUNNING, overdue)
    # None that another worker rescues or renews at this moment, in place of a wait for each other.
    query = select(jobs.c.id).where(*guards).order_by(jobs.c.id).with_for_update(skip_locked=True)
    found = connection.scalars(query).all()
    if not found:
        return [], []
    lapsed = and_(jobs.c.id.in_(found), *guards)
    error = WorkerCrashed(
        f"{crashes} workers in a row died while they ran this job, without finishing a chunk. Check their logs and "
        "memory, then retry the job: it resumes where it stopped."
    )

    ended = finish(
        connection,
        ending(lapsed, jobs.c.cancel_requested_at.is_not(None)),
        JobState.CANCELLED,
        now.wall,
        {"reason": None},
    )
    failed = finish(
        connection, ending(lapsed, jobs.c.crashes + 1 >= crashes), JobState.FAILED, now.wall, error_values(error)
    )
    released = {"state": JobState.QUEUED, "reason": None, "worker": None, "lease_until": None}
    queued = {**released, "crashes": jobs.c.crashes + 1}
    rescued = connection.execute(update(jobs).where(lapsed).values(queued).returning(jobs.c.id, jobs.c.attempt)).all()
    # Jobs first, then their attempts: an attempt whose lease is renewed at this moment is not lost.
    again = [Ended(row.id, row.attempt) for row in rescued]
    if again:
        notifications.send(connection, Topic.QUEUED, [job.id for job in again])
    for job in (*ended, *failed, *again):
        lost = {"code": "worker-lost", "message": "lease lapsed"}
        _end_attempt(connection, job.id, job.attempt, "lost", lost, now.wall)
    return [job.id for job in again], [job.id for job in failed]


def request_ids(connection: Connection, job_ids: Sequence[str]) -> dict[str, str | None]:
    """Of the requests that queued these jobs, by the ID of the job."""
    if not job_ids:
        return {}
    return {row.id: row.request_id for row in connection.execute(_REQUEST_IDS, {"job_ids": list(job_ids)})}


def account_of(only: ScoredChunk) -> dict[str, Any]:
    """The counts of a job of one chunk that is done."""
    return {
        "planned": True,
        "rows_planned": only.chunk.records,
        "rows_ok": only.chunk.records - only.rows_failed,
        "rows_failed": only.rows_failed,
        "chunks_total": 1,
        "chunks_done": 1,
        "crashes": 0,
    }


def _finish_mine(
    connection: Connection,
    job_id: str,
    attempt: int,
    state: JobState,
    now: float,
    values: Mapping[str, Any],
    guarded: Prepared | None = None,
) -> bool:
    """Ends the job and the attempt at it. False when this attempt has ended the job so before. Raises LeaseLost when
    another attempt has the job, or a guard fails."""
    mine = {"job": job_id, "mine": attempt}
    if not finish(connection, _END if guarded is None else guarded, state, now, {**values, **mine}):
        ended = (jobs.c.id == job_id, jobs.c.state == state, jobs.c.attempt == attempt)
        if connection.scalar(select(jobs.c.id).where(*ended)) is not None:
            return False
        raise LeaseLost(f"attempt {attempt} may not end job {job_id} as {state}: it is not its current attempt")
    _end_attempt(connection, job_id, attempt, state.value, values.get("error"), now)
    return True


def _end_attempt(
    connection: Connection, job_id: str, number: int, outcome: str, error: dict[str, Any] | None, now: float
) -> None:
    values = {"outcome": outcome, "error": error, "finished_at": now}
    _END_ATTEMPT.send(connection, {"job": job_id, "mine": number, **values})


_IS_DUE = Prepared(select(jobs.c.id).where(*due(bindparam("now"))).limit(1))
_its_running = jobs.alias("its_running")
_QUEUED = select(func.min(jobs.c.tenant).label("tenant")).where(jobs.c.state == JobState.QUEUED)
_FIRST_TENANT = _QUEUED.cte("waiting", recursive=True)
# One step into the index for each tenant, however many jobs it has.
_TENANTS = _FIRST_TENANT.union_all(
    select(_QUEUED.where(jobs.c.tenant > _FIRST_TENANT.c.tenant).scalar_subquery()).where(
        _FIRST_TENANT.c.tenant.is_not(None)
    )
)
_WAITING_TENANTS = Prepared(
    select(
        _TENANTS.c.tenant,
        select(func.count())
        .select_from(_its_running)
        .where(_its_running.c.state == JobState.RUNNING, _its_running.c.tenant == _TENANTS.c.tenant)
        .scalar_subquery()
        .label("running"),
    ).where(_TENANTS.c.tenant.is_not(None))
)
_NEXT = (
    select(jobs.c.id)
    .where(*due(bindparam("now")), jobs.c.tenant == bindparam("its_tenant"))
    .order_by(jobs.c.priority.desc(), jobs.c.queued_at, jobs.c.id)
    .limit(bindparam("most"))
    .with_for_update(skip_locked=True)
    .cte("next")
)
_CLAIM = Prepared(
    update(jobs)
    # The guard is in `next`, which locks what it finds. Repeated here, it would make SQLite read the whole queue.
    .where(jobs.c.id.in_(select(_NEXT.c.id)))
    .values(
        state=JobState.RUNNING,
        reason=None,
        attempt=jobs.c.attempt + 1,
        worker=bindparam("taker"),
        lease_until=bindparam("until"),
        lease_clock=bindparam("of_clock"),
        started_at=func.coalesce(jobs.c.started_at, bindparam("now")),
    )
    .returning(jobs.c.id)
)
_ADD_ATTEMPT = Prepared(insert(attempts))
_END_ATTEMPT = Prepared(
    update(attempts).where(attempts.c.job_id == bindparam("job"), attempts.c.number == bindparam("mine"))
)
# For all workers: a list of jobs in the statement would be rendered again for each of its lengths.
_CANCEL_REQUESTS = select(jobs.c.id).where(jobs.c.state == JobState.RUNNING, jobs.c.cancel_requested_at.is_not(None))
_REQUEST_IDS = select(jobs.c.id, jobs.c.request_id).where(jobs.c.id.in_(bindparam("job_ids", expanding=True)))
_mine = ending(jobs.c.id == bindparam("job"), jobs.c.state == JobState.RUNNING, jobs.c.attempt == bindparam("mine"))
_END = Prepared(_mine)
_CANCEL_IF_ASKED = Prepared(_mine.where(jobs.c.cancel_requested_at.is_not(None)))
_COMPLETE = Prepared(
    _mine.where(
        jobs.c.planned,
        jobs.c.chunks_done == jobs.c.chunks_total,
        jobs.c.rows_ok + jobs.c.rows_failed == jobs.c.rows_planned,
    )
)
_COMPLETE_UNPLANNED = Prepared(_mine.where(jobs.c.chunks_total == 0))
