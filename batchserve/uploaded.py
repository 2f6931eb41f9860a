"""Queues all inputs that wait in state uploaded, for `POST /v1/jobs/predict` and for schedules.

They are queued in several transactions, so that after a crash a repetition continues with the rest. Those of a tenant
with a quota each have their own: one beyond it stays uploaded.
"""

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

from sqlalchemy import Connection
from starlette.concurrency import run_in_threadpool

from batchserve.db.connect import Database
from batchserve.domain import JobState, ModelVersion, StoredInput
from batchserve.errors import (
    BatchserveError,
    OutOfMemory,
    QuotaExceeded,
    ScoringCrashed,
    ScoringTimeout,
    StorageQuotaExceeded,
)
from batchserve.jobs import contents, queries
from batchserve.quotas import limits
from batchserve.quotas.account import Added, charge
from batchserve.submission import Submission, enqueue_all

__all__ = ["Check", "Collected", "SubmissionOf", "each_checked", "queue_uploaded"]

_TOGETHER = 100
"""Jobs checked in one call and queued in one transaction; other work runs in between."""

SubmissionOf = Callable[[str, str, tuple[StoredInput, ...], ModelVersion], Submission]
"""The submission of a job's inputs: tenant, ID, inputs and model."""
Check = Callable[[list[Submission]], Awaitable[list[BatchserveError | None]]]
"""The problem of each of several inputs for one model."""
Note = Callable[[Connection, Sequence[str]], None]
"""Called with the IDs of the jobs that this transaction queues."""


@dataclass(slots=True)
class Collected:
    """Jobs that were queued, or completed from an equal one, and those that stay uploaded, with the reason."""

    states: dict[str, JobState] = field(default_factory=dict)
    refused: dict[str, BatchserveError] = field(default_factory=dict)

    @property
    def completed(self) -> int:
        return sum(state is JobState.COMPLETED for state in self.states.values())


async def queue_uploaded(
    database: Database,
    tenant: str,
    model: ModelVersion,
    submission_of: SubmissionOf,
    check: Check,
    *,
    note: Note = lambda _connection, _job_ids: None,
    wake: Callable[[], None] = lambda: None,
) -> Collected:
    """Queues all uploaded jobs that the tenant sees, but for those that were uploaded for another model. One that does
    not fit stays uploaded. `wake`: called after each transaction. Raises what `check` and `note` do."""

    def find() -> list[str]:
        with database.read() as connection:
            return queries.uploaded_for(connection, model.name, tenant)

    def read(job_ids: list[str]) -> list[Submission]:
        with database.read() as connection:
            found = queries.get_several(connection, job_ids)
            its_inputs = [tuple(contents.with_content(connection, one) for one in job.inputs) for job in found]
        return [submission_of(job.tenant, job.id, inputs, model) for job, inputs in zip(found, its_inputs, strict=True)]

    def enqueue(submissions: list[Submission], problems: list[BatchserveError | None]) -> None:
        fitting = [one for one, problem in zip(submissions, problems, strict=True) if problem is None]
        collected.refused |= {
            one.job_id: problem for one, problem in zip(submissions, problems, strict=True) if problem is not None
        }
        with database.write() as connection:
            limited = {tenant for tenant in {one.tenant for one in fitting} if limits.find_for(connection, tenant)}
            free = [one for one in fitting if one.tenant not in limited]
            states = enqueue_all(connection, free, database.moment(connection).wall)
            note(connection, list(states))
        collected.states |= states
        for one in fitting:
            if one.tenant in limited:
                _enqueue_within_quota(database, one, note, collected)

    job_ids, collected = await run_in_threadpool(find), Collected()
    for start in range(0, len(job_ids), _TOGETHER):
        if submissions := await run_in_threadpool(read, job_ids[start : start + _TOGETHER]):
            problems = await check(submissions)
            await run_in_threadpool(enqueue, submissions, problems)
            wake()
    return collected


def _enqueue_within_quota(database: Database, submission: Submission, note: Note, collected: Collected) -> None:
    """In a transaction of its own, for it may be refused."""
    try:
        with database.write() as connection:
            now = database.moment(connection).wall
            states = enqueue_all(connection, [submission], now)
            note(connection, list(states))
            if JobState.QUEUED in states.values():
                charge(connection, submission.tenant, Added(queues=True), now)
    except (QuotaExceeded, StorageQuotaExceeded) as error:
        collected.refused[submission.job_id] = error
    else:
        collected.states |= states


async def each_checked(check: Check, submissions: list[Submission]) -> list[BatchserveError | None]:
    """The problem of each, also of one whose check dies, takes too long or needs too much memory: then each is checked
    alone, and the one at fault fails alone. Raises what else `check` does."""
    try:
        return await check(submissions)
    except (ScoringCrashed, ScoringTimeout, OutOfMemory) as error:
        if len(submissions) == 1:
            return [error]
        return [problem for one in submissions for problem in await each_checked(check, [one])]
