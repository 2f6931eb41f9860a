"""The service layer over storage and database: fair calls into scoring processes, waiting for jobs, queue places. It
does not depend on HTTP; the API is built on it."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import uuid_utils
from sqlalchemy import Connection
from starlette.concurrency import run_in_threadpool

from batchserve import registry
from batchserve.db.cache import ALWAYS, VersionedCache
from batchserve.db.watcher import Version
from batchserve.domain import Attempt, ChunkLimits, Job, JobState, ModelVersion, ReadOptions, StoredInput
from batchserve.errors import (
    BatchserveError,
    IdempotencyInProgress,
    OutOfMemory,
    ScoringCrashed,
    ScoringTimeout,
)
from batchserve.formats import FORMATS
from batchserve.jobs import contents, queries
from batchserve.logs import get_logger
from batchserve.quotas.limits import Limits
from batchserve.runtime import Runtime, process_name
from batchserve.scoring import unpacking
from batchserve.scoring.checks import check_input, check_inputs
from batchserve.scoring.direct import DirectItem, DirectTask, score_directly
from batchserve.scoring.small import Small
from batchserve.service.calls import Calls, Leaving
from batchserve.service.counted import Counted
from batchserve.service.notifier import JobNotifier
from batchserve.service.places import Places
from batchserve.service.turns import Lane
from batchserve.storage import input_key
from batchserve.submission import Scored, Submission
from batchserve.upkeep import retention
from batchserve.upkeep.inspection import UnreadableCount
from batchserve.uploaded import each_checked

__all__ = ["MAX_WAIT", "JobSnapshot", "Service"]

log = get_logger()

MAX_WAIT = 60.0
_LONGEST_PAUSE = 0.25
_PAUSE_OF_LISTENERS = 1.0
"""Seconds between two polls for a job whose end is notified, whichever process has its attempt."""
_JOBS_SEEN = 4096
_MODELS_SEEN = 256
_JUST_UPLOADED = 128
_CONTENT_KEPT = 2**15
"""Bytes of such an input: 4 MiB for all of them."""


_DIRECT_MODEL_BYTES = 64 * 2**20
"""Models up to this size are loaded for a call that submits a small job."""
_DIRECT_MOST_SECONDS = 5.0
"""Seconds, with the loading of a model, after which a small job is queued that was expected to take milliseconds."""
_BYTES_OF_RECORD = 8
"""Approximate bytes of a record in a binary format."""


@dataclass(frozen=True, slots=True)
class JobSnapshot:
    """A job and the facts that its row does not hold."""

    job: Job
    attempts: list[Attempt]
    place: int | None
    """Place in the queue; None for a job that is not queued, or is too far back to be counted in passing."""
    now: float
    """When the place was true."""


@dataclass(slots=True)
class Service:
    """The runtime, and the state that requests of this process share."""

    runtime: Runtime
    wake_worker: Callable[[], None]
    stop_worker: Callable[[], None]
    notifier: JobNotifier
    worker_trouble: Callable[[], str | None] = lambda: None
    """Why the worker of this process claims no jobs; None when it does."""
    stopping: asyncio.Event = field(default_factory=asyncio.Event)
    calls: Calls = field(init=False)
    places: Places = field(init=False)
    unreadable: UnreadableCount = field(init=False)
    limits: Limits = field(init=False)
    _keys_under_way: set[tuple[str, str]] = field(default_factory=set)
    """Tenants and their idempotency keys."""
    _jobs_seen: VersionedCache[tuple[str, str], bool] = field(default_factory=lambda: VersionedCache(_JOBS_SEEN))
    """Pairs of tenant and job whose ownership was verified; it holds as long as the job exists."""
    just_uploaded: VersionedCache[str, Job] = field(default_factory=lambda: VersionedCache(_JUST_UPLOADED))
    """Small jobs as they were created, with the content of their only input, until their first predict."""
    _models_seen: VersionedCache[str, ModelVersion] = field(default_factory=lambda: VersionedCache(_MODELS_SEEN))
    """Model versions by reference."""
    _models_unprobed: VersionedCache[str, ModelVersion] = field(default_factory=lambda: VersionedCache(_MODELS_SEEN))
    """The same by the version of the whole database: while nothing was committed, no probe is needed."""

    def __post_init__(self) -> None:
        settings, database = self.runtime.settings, self.runtime.database
        processes = Counted(self.runtime.interactive, self.runtime.metrics)
        self.calls = Calls(processes, settings.online_calls, settings.online_wait)
        self.places = Places(database)
        self.unreadable = UnreadableCount(database)
        self.limits = Limits(database)

    async def wake(self) -> None:
        """A coroutine, because a background task of another kind would take a thread."""
        self.wake_worker()

    def stop(self) -> None:
        """Stops claiming and ends streams and long polls. Precedes the wait for all requests."""
        self.stopping.set()
        self.stop_worker()

    @contextmanager
    def only_one(self, tenant: str, key: str | None) -> Iterator[None]:
        """Admits one request for an idempotency key at a time. Raises IdempotencyInProgress for a concurrent second
        one."""
        if key is None:
            yield
            return
        if (tenant, key) in self._keys_under_way:
            raise IdempotencyInProgress(
                f"a request with the Idempotency-Key {key!r} is in progress: wait for its response", retry_after=1
            )
        self._keys_under_way.add((tenant, key))
        try:
            yield
        finally:
            self._keys_under_way.discard((tenant, key))

    async def require_visible(self, tenant: str, job_id: str) -> None:
        """Raises JobNotFound for a missing job and for another tenant's."""
        if self._jobs_seen.get((tenant, job_id), ALWAYS) is None:
            await self.runtime.database.fetch_one(lambda connection: queries.require_seen(connection, job_id, tenant))
            self._jobs_seen.put((tenant, job_id), ALWAYS, True)

    def note_created(self, tenant: str, job: Job, new: StoredInput) -> None:
        """Spares the queries of `require_visible`, and those for the job and its content, for one that this tenant has
        just created from this input."""
        self._jobs_seen.put((tenant, job.id), ALWAYS, True)
        if new.content is not None and len(new.content) <= _CONTENT_KEPT:
            self.just_uploaded.put(job.id, ALWAYS, replace(job, inputs=(new,), expires_at=None))

    async def resolve_model(self, reference: str, known_version: Version | None = None) -> ModelVersion:
        """`known_version`: of the database, since the request came. Raises ModelNotFound."""
        model = self._models_unprobed.get(reference, known_version)
        if model is None:
            model = await self._resolve_probed(reference)
            self._models_unprobed.put(reference, known_version, model)
        return model

    async def _resolve_probed(self, reference: str) -> ModelVersion:
        database = self.runtime.database
        version = await registry.state(database, reference)
        model = self._models_seen.get(reference, version)
        if model is None:
            model = await database.fetch_one(lambda connection: registry.resolve(connection, reference))
            self._models_seen.put(reference, version, model)
        return model

    async def read_job(self, job_id: str) -> Job:
        """Raises JobNotFound."""
        return await self.runtime.database.fetch_one(lambda connection: queries.get(connection, job_id))

    async def read_job_to_check(self, job_id: str, new: Job | None = None) -> tuple[Job, tuple[StoredInput, ...]]:
        """A job and its inputs, the first with its content where that is in a row. `new`: as it was created here.
        Raises JobNotFound."""
        if new is not None:
            return await self.read_job(job_id), new.inputs
        return await self.runtime.database.fetch(lambda connection: contents.get_with_inputs(connection, job_id))

    async def view(self, job_id: str) -> JobSnapshot:
        """Raises JobNotFound."""
        return await self.runtime.database.fetch(lambda connection: self.snapshot(connection, job_id))

    def view_from_thread(self, job_id: str) -> JobSnapshot:
        """The same for callers in a thread."""
        with self.runtime.database.read() as connection:
            return self.snapshot(connection, job_id)

    def snapshot(self, connection: Connection, job_id: str) -> JobSnapshot:
        """The same as a transaction sees it: at the end of one that writes, it spares another that reads."""
        job = retention.dated(queries.get(connection, job_id), self.runtime.settings)
        attempts = queries.attempts_of(connection, job_id) if job.attempt else []
        now = self.runtime.database.moment(connection).wall
        return JobSnapshot(job, attempts, self.places.near(connection, job, now), now)

    def shown(self, job: Job, attempts: list[Attempt], now: float) -> JobSnapshot:
        """The same of a job that does not queue, as it was just written: what is known need not be read."""
        return JobSnapshot(retention.dated(job, self.runtime.settings), attempts, None, now)

    async def check(self, tenant: str, submission: Submission) -> None:
        """Raises SchemaMismatch or InvalidInput when the beginning of an input does not fit a model."""
        settings = self.runtime.settings
        source = submission.source(settings.storage)
        with self.calls.place(tenant, Lane.CHECK) as place:
            await self.calls.run(
                place,
                check_input,
                source,
                submission.model,
                submission.options,
                seconds=settings.online_timeout,
            )

    async def check_or_score(self, tenant: str, submission: Submission) -> Scored | None:
        """Checks an input as `check` does; scores it, too, if that is expected to take no longer than a check: a small
        input in a row, whose job need not wait, where this process has a worker. None: the job is to be queued. That is
        also the answer to all trouble but a refusal: the worker counts crashes and ends jobs.
        """
        if not self._is_direct(submission):
            await self.check(tenant, submission)
            return None
        settings = self.runtime.settings
        (stored,) = submission.inputs
        limits = ChunkLimits(settings.chunk_bytes, settings.chunk_records)
        task = DirectTask(submission.model, submission.options, limits, settings.inline_bytes)
        item = DirectItem(submission.source(settings.storage), submission.job_id)
        seconds = min(settings.online_timeout, _DIRECT_MOST_SECONDS)
        try:
            with self.calls.place(tenant, Lane.CHECK) as place:
                small: Small | None = await self.calls.together(
                    place, score_directly, task, item, size=stored.bytes or 0, seconds=seconds
                )
        except (ScoringCrashed, ScoringTimeout, OutOfMemory):
            await self.check(tenant, submission)
            return None
        return None if small is None else Scored(process_name(), small)

    def tell_completed(self, job_id: str, rows_ok: int, rows_failed: int) -> None:
        """Tells the log, and those that wait, that a job was completed within the call that submitted it."""
        self.notifier.notify(job_id)
        log.info("Job is completed", action="job_complete", job_id=job_id, attempt=1, rows=rows_ok + rows_failed,
                 rows_failed=rows_failed)  # fmt: skip

    def _is_direct(self, submission: Submission) -> bool:
        first, model, queueing = submission.inputs[0], submission.model, submission.queueing
        if first.content is None or len(submission.inputs) > 1 or not self.notifier.has_worker:
            return False
        if queueing.run_after is not None or queueing.priority < 0 or model.bytes > _DIRECT_MODEL_BYTES:
            return False
        rate = model.signature.records_per_second
        return rate is not None and _most_records(first) / rate <= self.runtime.settings.direct_seconds

    async def unpack(
        self, tenant: str, stored: StoredInput, read: ReadOptions, columns: frozenset[str], leaving: Leaving
    ) -> StoredInput:
        """The table that a stored zip holds, as an input of its own; the zip itself if it is an archive of images.

        Raises InvalidInput, UnsupportedMedia, PayloadTooLarge, and BadRequest when the client disconnects; then no
        table is stored.
        """
        settings = self.runtime.settings
        with self.calls.place(tenant, Lane.CHECK) as place:
            contents = await self.calls.run(
                place, unpacking.inspect, settings.storage, stored.key, seconds=settings.online_timeout
            )
        if contents.is_images:
            return stored
        target = input_key(str(uuid_utils.uuid7()))
        task = unpacking.Unpacking(settings.storage, stored.key, target, read, columns, settings.upload_bytes)
        table, is_done = None, False
        try:
            with self.calls.place(tenant, Lane.LONG) as place:
                async with self.calls.long_turn(place):
                    seconds = settings.chunk_timeout
                    table = await self.calls.run(
                        place, unpacking.unpack, task, contents, seconds=seconds, leaving=leaving
                    )
            is_done = True
        finally:
            if not is_done:  # the process may have stored it just before it was killed
                await run_in_threadpool(self.runtime.storage.delete, target)
        return stored if table is None else table

    async def check_all(self, tenant: str, submissions: list[Submission]) -> list[BatchserveError | None]:
        """The problem of each of several inputs for one model. Raises InvalidOptions when the options suit none,
        Unavailable, and TooManyRequests."""
        settings, model = self.runtime.settings, submissions[0].model

        async def check(some: list[Submission]) -> list[BatchserveError | None]:
            inputs, seconds = [(one.source(settings.storage), one.options) for one in some], settings.online_timeout
            with self.calls.place(tenant, Lane.LONG) as place:
                async with self.calls.long_turn(place):
                    return await self.calls.run(place, check_inputs, inputs, model, seconds=seconds)

        return await each_checked(check, submissions)

    async def wait_for(
        self,
        job_id: str,
        seconds: float,
        until: Callable[[JobState], bool],
        require_allowed: Callable[[], Awaitable[None]],
    ) -> None:
        """Waits until the state is as wanted, for at most `seconds`, or until the server stops. Raises JobNotFound, and
        what `require_allowed` raises: it is called periodically. Ends of attempts are notified by the worker of
        this process, and by a server of the database; other changes are polled for, often at first where no worker
        notifies.
        """
        deadline = time.monotonic() + min(seconds, MAX_WAIT)
        pause = _LONGEST_PAUSE if self.notifier.has_worker else 0.01
        is_woken = False
        while True:
            change = self.notifier.subscribe(job_id)
            state = await self.runtime.database.fetch_one(lambda connection: queries.state_of(connection, job_id))
            left = deadline - time.monotonic()
            if until(state) or left <= 0 or self.stopping.is_set():
                return
            if is_woken:  # for another reason, such as a key that was revoked
                await require_allowed()
            longest = _PAUSE_OF_LISTENERS if self.notifier.hears_others() else pause
            try:
                async with asyncio.timeout(min(longest, left)):
                    await change.wait()
                is_woken = True
            except TimeoutError:
                is_woken = False
                await require_allowed()
            pause = min(pause * 1.5, _LONGEST_PAUSE)


def _most_records(stored: StoredInput) -> int:
    """About how many records a small input has at most."""
    assert stored.content is not None
    format = FORMATS[stored.format]
    if format.is_text:
        return stored.content.count(b"\n") + 1
    return 1 if format.family == "image" else len(stored.content) // _BYTES_OF_RECORD + 1
