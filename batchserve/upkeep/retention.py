"""Retention of bytes, and their removal: the row first, then the bytes.

Bytes without a row are swept; a row without bytes would be invalid. Several workers may do this concurrently.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

from sqlalchemy import Connection

from batchserve import audit, clock
from batchserve.db.connect import Database
from batchserve.domain import DirectUpload, Job, JobState
from batchserve.jobs import expiry, queries
from batchserve.jobs.ends import forget_events
from batchserve.jobs.statements import Owned
from batchserve.jobs.uploads import sent_object
from batchserve.rows import LATEST
from batchserve.settings import Settings
from batchserve.storage import Storage, TakesParts, delete_objects, errors_key, is_in_row, parts_prefix, result_key
from batchserve.timetable import ticks
from batchserve.upkeep import holds
from batchserve.webhooks import deliveries

_Forget = Callable[[Connection, float, int, float], int]
_BATCH = 100
"""Jobs in one transaction."""
_KEEP_EVENTS = 7 * 86400.0
"""Seconds for which the event of a job's end is kept."""
_LOOKUP = 500
"""Keys looked up in one query."""
_ATTEMPTS = 1000
"""Most attempts at a job whose results are removed with it. A row that claims more is damaged: the sweep finds the
rest."""


@dataclass(frozen=True, slots=True)
class Expired:
    """How many jobs expired, and how many others lost their input."""

    jobs: int = 0
    inputs: int = 0

    @property
    def total(self) -> int:
        return self.jobs + self.inputs


def dated(job: Job, settings: Settings) -> Job:
    """The job with its expiry under these settings; None while it is unfinished, or kept forever."""
    if job.state is JobState.EXPIRED:
        return job
    seconds = _keep_uploads(settings) if job.state is JobState.UPLOADED else settings.keep_results
    since = job.created_at if job.state is JobState.UPLOADED else job.finished_at
    if job.state is not JobState.UPLOADED and job.expires_in is not None:
        seconds = min(job.expires_in, math.inf if seconds is None else seconds)
    return job if seconds is None or since is None else replace(job, expires_at=min(since + seconds, LATEST))


def expire(database: Database, storage: Storage, settings: Settings, now: float, settled: float = math.inf) -> Expired:
    """Removes the bytes of jobs past their retention, or one of their own, and of inputs past theirs. The rows remain.
    `settled`: seconds for which `now` is trusted (see `clock`); bytes with a longer retention stay.
    """
    after = now + clock.TOLERANCE
    over = {
        "ended_before": _before(settings.keep_results, now, settled),
        "uploaded_before": _before(_keep_uploads(settings), now, settled),
        "after": after,
    }
    expired = _in_batches(
        database,
        storage,
        lambda connection: expiry.find_over(connection, **over, most=_BATCH),
        lambda connection, found: expiry.expire_if_over(connection, found, **over, now=now),
        _bytes_of,
    )
    expired += _in_batches(
        database,
        storage,
        lambda connection: expiry.find_due(connection, now, settled, _BATCH),
        lambda connection, found: expiry.expire_if_due(connection, found, now, settled),
        _bytes_of,
    )
    before = _before(settings.keep_inputs, now, settled)
    inputs = _in_batches(
        database,
        storage,
        lambda connection: expiry.find_with_input_over(connection, before, _BATCH, after),
        lambda connection, found: expiry.drop_input_if_over(connection, found, before, now, after),
        _inputs_of,
    )
    return Expired(expired, inputs)


def forget(database: Database, settings: Settings, now: float, settled: float = math.inf) -> int:
    """Deletes old events, audit entries, ticks and deliveries of webhooks, and the rows of jobs that expired long ago;
    returns their number.

    To be called after a sweep of the same moment: leftover bytes of a crash are gone then, so the row is not needed to
    find them. While a hold keeps bytes from the sweep, rows stay, too.
    """
    _forget_events(database, now, settled)
    _forget_older(database, audit.forget_before, settings.keep_audit, now, settled)
    _forget_older(database, ticks.forget_before, settings.keep_ticks, now, settled)
    _forget_older(database, deliveries.forget_before, settings.keep_webhooks, now, settled)
    if settings.keep_rows is None or max(settings.keep_rows, settings.sweep_age) > settled:
        return 0
    before, after = now - max(settings.keep_rows, settings.sweep_age), now + clock.TOLERANCE
    forgotten = 0

    def delete(connection: Connection) -> int:
        if holds.any_in_force(connection, database.moment(connection)):
            return 0
        return expiry.delete_expired_before(connection, before, _BATCH, after)

    while True:
        deleted = database.write_freeing(delete)
        forgotten += deleted
        if deleted < _BATCH:
            return forgotten


def _forget_events(database: Database, now: float, settled: float) -> None:
    before, after = now - _KEEP_EVENTS, now + clock.TOLERANCE
    deleted = _BATCH
    while settled >= _KEEP_EVENTS and deleted == _BATCH:
        deleted = database.write_freeing(lambda connection: forget_events(connection, before, _BATCH, after))


def _forget_older(database: Database, forget: _Forget, keep: float | None, now: float, settled: float) -> None:
    if keep is None or keep > settled:
        return
    before, after = now - keep, now + clock.TOLERANCE
    deleted = _BATCH
    while deleted == _BATCH:
        deleted = database.write_freeing(lambda connection: forget(connection, before, _BATCH, after))


def remove_bytes(database: Database, storage: Storage, job: Owned) -> None:
    """Removes the bytes of a job whose row was deleted: input, parts, and the results of all its attempts, lost ones
    too; and the result that it shares with an equal job. Objects that another job references stay.
    """
    attempts = range(1, min(job.attempt, _ATTEMPTS) + 1)
    results = [key(job.id, attempt) for attempt in attempts for key in (result_key, errors_key)]
    remove_unnamed(database, storage, list(dict.fromkeys([*_bytes_of(storage, job), *results])))


def remove_unnamed(database: Database, storage: Storage, keys: Sequence[str]) -> None:
    """Removes the objects that a job has released, except inputs and results that another job references. While a hold
    is in force nothing is removed: the sweep does it later.
    """
    for start in range(0, len(keys), _LOOKUP):
        asked = keys[start : start + _LOOKUP]
        with database.read() as connection:
            named = queries.named_results(connection, [key for key in asked if key.startswith("results/")])
            named |= queries.named_inputs(connection, [key for key in asked if key.startswith("inputs/")])
            if holds.any_in_force(connection, database.moment(connection)):
                return
        # Contents of rows are removed in the job's own transaction.
        delete_objects(storage, [key for key in asked if key not in named and not is_in_row(key)])


def remove_sent(storage: Storage, ended: Sequence[DirectUpload]) -> None:
    """Removes what was sent for direct uploads whose rows were deleted, and which have no job."""
    for upload in ended:
        if upload.multipart is not None and isinstance(storage, TakesParts):
            storage.abort_parts(sent_object(upload), upload.multipart)
    delete_objects(storage, [sent_object(upload) for upload in ended])


def _in_batches(
    database: Database,
    storage: Storage,
    find: Callable[[Connection], list[str]],
    give_up: Callable[[Connection, list[str]], list[Owned]],
    given_up_by: Callable[[Storage, Owned], list[str]],
) -> int:
    """Releases and removes the bytes of all jobs found. The query does not block writers."""
    given_up = 0
    while True:
        with database.read() as connection:
            found = find(connection)
        if not found:
            return given_up
        changed = database.write_freeing(partial(_given, give_up, found))
        if not changed:
            return given_up  # another process did it, or these IDs are unreadable: left to the next sweep
        remove_unnamed(database, storage, [key for job in changed for key in given_up_by(storage, job)])
        given_up += len(changed)


def _given(
    give_up: Callable[[Connection, list[str]], list[Owned]], found: list[str], connection: Connection
) -> list[Owned]:
    return give_up(connection, found)


def _bytes_of(storage: Storage, job: Owned) -> list[str]:
    """Inputs and parts of a job, and the result that it references."""
    results = [key for key in (job.result_key, job.errors_key) if key is not None]
    return [*job.inputs, *_parts_of(storage, job), *results]


def _inputs_of(storage: Storage, job: Owned) -> list[str]:
    """A completed job loses its parts with its inputs: they serve a retry. Of other jobs the parts are the only
    result."""
    return [*job.inputs, *(_parts_of(storage, job) if job.state == JobState.COMPLETED else ())]


def _parts_of(storage: Storage, job: Owned) -> list[str]:
    return [part.key for part in storage.list(parts_prefix(job.id))]


def _keep_uploads(settings: Settings) -> float | None:
    """Retention of an input without a predict."""
    return settings.keep_results if settings.keep_inputs is None else settings.keep_inputs


def _before(keep: float | None, now: float, settled: float) -> float:
    """The moment before which the retention has passed; the epoch when it is unlimited, or the clock is not settled."""
    return 0.0 if keep is None or keep > settled else now - keep
