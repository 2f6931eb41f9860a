"""The worker: claims jobs, renews their leases, feeds their chunks to the engine, commits, publishes, cancels.

One thread owns all state (`run`); finished calls and wake-ups reach it through a queue. Another thread does nothing
but renew leases, so that a slow commit never costs a job.
"""

import os
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from math import ceil
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

import stamina
from sqlalchemy import Connection

from batchserve import clock, idempotency, scoring
from batchserve.domain import Chunk, ChunkLimits, Job, ModelVersion, Options, Result, ScoredChunk, merge_facts
from batchserve.engines import Call
from batchserve.errors import (
    BatchserveError,
    InsufficientStorage,
    LeaseLost,
    OutOfMemory,
    ScoringCrashed,
    ScoringTimeout,
    TooManyRowErrors,
    Unavailable,
    UnreadableRow,
)
from batchserve.formats import FORMATS
from batchserve.jobs import execution, plan
from batchserve.logs import get_logger
from batchserve.runtime import Runtime
from batchserve.settings import Settings
from batchserve.storage import parts_prefix
from batchserve.upkeep.retention import expire, forget, remove_unnamed
from batchserve.upkeep.sweep import sweep

T = TypeVar("T")

log = get_logger()

_CRASHES = (ScoringCrashed, ScoringTimeout, OutOfMemory)
_UNLIMITED = 2**62
_WORTH = 4 * 2**20
"""Bytes of a chunk that is worth a call and a part of its own."""
_IMAGES = 256
"""Images in a chunk, at most: those of 32 x 32 pixels take a process a tenth of a second, photographs half a second."""
_SLACK = 16 * 2**10
"""A chunk ends before the record that would be too much: what that leaves over must not add up to one chunk more."""
_SWEEP_PAUSE = 3600.0
"""Seconds between two sweeps, at most."""
_FAILED_CLAIMS = 3
"""In a row, after which a worker says that it cannot claim."""
SMALL = 2**20
"""Input bytes up to which a job is done in one call and one transaction; each more would cost more than its scoring."""
_COPIED_PER_SECOND = 20e6
"""Bytes of parts that any disk should copy, hash and sync in a second."""


@dataclass(slots=True)
class ActiveJob:
    """A job whose lease this worker holds, and what is under way for it."""

    id: str
    attempt: int
    inputs: tuple[scoring.Input, ...]
    bases: dict[int, int]
    """The number of the first record of each input, as far as they are planned."""
    model: ModelVersion
    options: Options
    limits: ChunkLimits
    planned: bool
    is_small: bool
    """Whether it is worth a try in one call: plan, score and assemble."""
    last_planned: Chunk | None
    pending: deque[Chunk]
    rows_planned: int
    rows_done: int
    rows_failed: int
    share_planned: float = 0.0
    planning: Call[Any] | None = None
    scoring: dict[int, Call[Any]] = field(default_factory=dict)
    assembling: Call[Any] | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)
    """What is known of the job before its chunks are."""
    lost_calls: int = 0
    """Planning and assembling calls whose process died."""
    paused_until: float = 0.0
    """Not before this monotonic time, after the storage was full."""
    cancelled_at: float | None = None

    @property
    def calls(self) -> list[Call[Any]]:
        return [call for call in (self.planning, self.assembling, *self.scoring.values()) if call is not None]

    @property
    def progress(self) -> float:
        """0 to 1 over the whole input; the last hundredth is for assembling."""
        return 0.99 * self.share_planned * self.rows_done / max(self.rows_planned, 1)


class Worker:
    """Runs jobs until it is stopped. Any number of workers may share a database and a storage."""

    def __init__(self, runtime: Runtime, tell: Callable[[str], None] | None = None) -> None:
        """`tell` is called with the ID of each job whose attempt ends here, from the worker's thread."""
        self.name = f"{socket.gethostname()}-{os.getpid()}"
        self._runtime = runtime
        self._tell = tell or _nobody
        self._settings = runtime.settings
        self._database = runtime.database
        self._events: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._active: dict[str, ActiveJob] = {}
        self._turn: deque[str] = deque()
        self._look_is_due = threading.Event()
        self._stopping = threading.Event()
        self._ended = threading.Event()
        self._failed_claims = 0
        self._claim_error = ""

    # --- what other threads call ---

    def wake(self) -> None:
        """There may be a new job, or a cancel request. Safe from any thread, and cheap."""
        if not self._look_is_due.is_set():
            self._look_is_due.set()
            self._events.put(self._look)

    @property
    def trouble(self) -> str | None:
        """Why no job is claimed; None when claims succeed, or have failed only in passing."""
        if self._ended.is_set() and not self._stopping.is_set():
            return "the worker has ended: restart the server"
        if self._failed_claims >= _FAILED_CLAIMS:
            return f"the worker could not claim jobs {self._failed_claims} times in a row: {self._claim_error}"
        return None

    def stop(self) -> None:
        """Finish the chunks under way within the grace time, release the leases, and return from `run`."""
        self._stopping.set()
        self._events.put(_nothing)

    def run(self) -> None:
        """Works until `stop`. Survives every error of a single job."""
        log.info("Worker is ready", action="worker_start", worker=self.name, processes=self._runtime.engine.capacity)
        for _ in range(self._runtime.engine.capacity):
            self._runtime.engine.submit(scoring.warm_up, timeout=60.0)
        beside = [
            threading.Thread(target=self._keep_leases, name="heartbeat", daemon=True),
            threading.Thread(target=self._keep_swept, name="sweeper", daemon=True),
        ]
        for thread in beside:
            thread.start()
        next_look = next_rescue = time.monotonic()
        try:
            while not self._stopping.is_set():
                now = time.monotonic()
                if now >= next_rescue:
                    self._guarded(self._rescue)
                    next_rescue = now + self._settings.rescue
                if now >= next_look:
                    self._guarded(self._look)
                    next_look = now + self._settings.poll
                self._guarded(self._kill_overdue)
                self._guarded(self._feed)
                self._handle_events(min(next_look, next_rescue) - time.monotonic())
            self._finish()
        finally:
            self._ended.set()
            for thread in beside:
                thread.join()
            log.info("Worker has stopped", action="worker_stop", worker=self.name)

    # --- the loop ---

    def _handle_events(self, timeout: float) -> None:
        """Waits for one event, then takes all that have come."""
        try:
            event = self._events.get(timeout=max(timeout, 0.0))
            while True:
                self._guarded(event)
                event = self._events.get_nowait()
        except Empty:
            return

    def _guarded(self, action: Callable[[], None]) -> None:
        try:
            action()
        except Unavailable:
            log.warning("Database does not answer", action="database_unavailable", worker=self.name)
            time.sleep(0.2)
        except Exception:
            log.exception("Worker goes on after an error", action="worker_error", worker=self.name)

    def _look(self) -> None:
        """Claims what is due, and hears of cancel requests.

        No more jobs than there is work for, so that other workers find some; but one at each look, up to the limit of
        the settings, for a huge job must not keep a small one waiting. Nor may a tenant that has many: beyond the
        limit, one job of each tenant of which none is running.
        """
        self._look_is_due.clear()
        room = self._settings.active_jobs - len(self._active)
        most = max(0, min(room, max(1, self._window - len(self._active))))
        if not self._stopping.is_set():
            for job in self._claimed_or_counted(most):
                self._take_or_fail(job)
        if self._active:
            with self._database.read() as connection:
                cancelled = execution.cancel_requests(connection, self._active)
            for job_id in cancelled:
                self._cancel(self._active[job_id])

    def _claimed_or_counted(self, most: int) -> list[Job]:
        try:
            claimed = self._claimed(most)
        except Exception as error:
            self._failed_claims += 1
            self._claim_error = error.detail if isinstance(error, BatchserveError) else type(error).__name__
            raise
        self._failed_claims = 0
        return claimed

    def _claimed(self, most: int) -> list[Job]:
        with self._database.read() as connection:
            if not execution.is_due(connection, self._database.moment(connection).wall, most):
                return []
        with self._database.write() as connection:
            now = self._database.moment(connection)
            return execution.claim_due(connection, self.name, self._settings.lease, now, most)

    def _rescue(self) -> None:
        with self._database.write() as connection:
            now = self._database.moment(connection)
            queued, failed = execution.rescue_expired(connection, self._settings.crashes, now)
            kept = 3600 * self._settings.idempotency_hours
            if clock.settled_for(connection, now) >= kept:
                idempotency.forget_older(connection, now.wall - kept, now.wall + clock.TOLERANCE)
        self._database.refill_reserve()
        for job_id in queued:
            log.warning("Job is queued again: its worker was lost", action="job_rescue", job_id=job_id)
        for job_id in failed:
            log.error("Job has failed: its workers died", action="job_fail", job_id=job_id, code="worker-crashed")

    def _take_or_fail(self, job: Job) -> None:
        """One job that cannot be begun, such as one whose chunks cannot be read, keeps no other from it."""
        try:
            self._take(job)
        except Unavailable:
            raise  # its lease lapses, and it is claimed anew
        except Exception as error:
            named = error if isinstance(error, BatchserveError) else None
            log.error("Job cannot be begun", action="job_error", job_id=job.id, exc_info=None if named else error)
            found = named or UnreadableRow(f"job {job.id} cannot be begun; the worker's log has the details")
            with suppress(LeaseLost):
                self._write_end(execution.fail_if_mine, job.id, job.attempt, found)
            self._tell(job.id)

    def _take(self, job: Job) -> None:
        if job.model is None or job.options is None:
            raise UnreadableRow(f"the database's row of job {job.id} names no model or no options: remove it")
        if stale := self._active.get(job.id):  # our own lease lapsed, and we are the next to claim the job
            self._lost(stale)
        pending, last, bases = self._plan_of(job)
        size = sum(_UNLIMITED if stored.bytes is None else stored.bytes for stored in job.inputs)
        active = ActiveJob(
            id=job.id,
            attempt=job.attempt,
            inputs=tuple(scoring.Input.of(self._settings.storage, stored) for stored in job.inputs),
            bases=bases,
            model=job.model,
            options=job.options,
            limits=even_limits(
                chunk_limits(self._settings, job.model, job.input.format),
                job.input.format,
                size,
                self._runtime.engine.capacity,
            ),
            planned=job.planned,
            last_planned=last,
            pending=deque(pending),
            rows_planned=job.rows_planned,
            rows_done=job.rows_done,
            rows_failed=job.rows_failed,
            share_planned=1.0 if job.planned else 0.0,
            facts=merge_facts(job.facts, {"notes": list(job.model.signature.notes)}),
            is_small=len(job.inputs) == 1 and size <= SMALL and not job.chunks_total,
        )
        self._active[job.id] = active
        self._turn.append(job.id)
        log.info("Job has started", action="job_start", job_id=job.id, attempt=job.attempt, model=job.model.reference)

    def _plan_of(self, job: Job) -> tuple[list[Chunk], Chunk | None, dict[int, int]]:
        """What earlier attempts left: the chunks that are to be scored, the last one that is planned, and where the
        inputs begin."""
        if not job.chunks_total:
            return [], None, {0: 0}
        with self._database.read() as connection:
            bases = plan.first_records(connection, job.id) if len(job.inputs) > 1 else {0: 0}
            return plan.pending_chunks(connection, job.id), plan.last_chunk(connection, job.id), bases

    def _feed(self) -> None:
        """Keeps the engine busy: one chunk of each job in turn, so that a huge job does not block a small one."""
        under_way = sum(len(active.calls) for active in self._active.values())
        idle = 0
        while self._turn and idle < len(self._turn):
            job_id = self._turn[0]
            self._turn.rotate(-1)
            active = self._active[job_id]
            self._plan(active)
            if under_way < self._window and self._score_next(active):
                under_way += 1
                idle = 0
            else:
                self._assemble_if_done(active)
                idle += 1

    def _plan(self, active: ActiveJob) -> None:
        waits = len(active.pending) < self._window
        if active.planned or active.planning is not None or not waits or self._held(active):
            return
        # A first look is short, so that scoring begins at once.
        most = 64 if active.last_planned else self._window
        number, last = max(active.bases), active.last_planned
        after = last if last is not None and last.input == number else None
        task = scoring.PlanTask(active.inputs[number], after, active.limits, most, number, active.bases[number])
        if active.is_small:
            what = (task, active.id, active.attempt, active.model, active.options)
            active.planning = self._call(active, self._done_small, scoring.score_small, *what, urgent=True)
        else:
            active.planning = self._call(active, self._planned, scoring.plan_chunks, task, urgent=True)

    def _score_next(self, active: ActiveJob) -> bool:
        if not active.pending or self._held(active):
            return False
        chunk = active.pending.popleft()
        task = scoring.ChunkTask(
            active.inputs[chunk.input],
            active.id,
            active.attempt,
            chunk,
            active.model,
            active.options,
            active.bases[chunk.input],
        )
        then = partial(self._scored, chunk)
        # The first chunk of a job goes before others: a small job does not wait behind a huge one.
        call = self._call(active, then, scoring.score_chunk, task, urgent=chunk.first_record == 0)
        active.scoring[chunk.first_record] = call
        return True

    def _assemble_if_done(self, active: ActiveJob) -> None:
        if not active.planned or active.pending or active.calls or self._held(active):
            return
        if too_many := too_many_row_errors(active):  # a share of the records is known only now
            self._fail(active, too_many)
            return
        try:
            with self._database.read() as connection:
                done = plan.done_chunks(connection, active.id)
        except UnreadableRow as error:
            self._fail(active, error)
            return
        parts, errors = scoring.stored_parts(active.id, done)
        facts = merge_facts(active.facts, *(committed.facts for committed in done))
        task = scoring.AssembleTask(
            self._settings.storage,
            active.id,
            active.attempt,
            active.options.format,
            active.inputs[0].dialect,
            parts,
            errors,
        )
        seconds = self._settings.chunk_timeout + sum(part.bytes for part in parts) / _COPIED_PER_SECOND
        then = partial(self._assembled, facts)
        active.assembling = self._call(active, then, scoring.assemble_result, task, urgent=True, timeout=seconds)

    def _held(self, active: ActiveJob) -> bool:
        return active.cancelled_at is not None or time.monotonic() < active.paused_until or self._stopping.is_set()

    @property
    def _window(self) -> int:
        """Calls under way: one for each process, and the next one for when it comes back."""
        return 2 * self._runtime.engine.capacity

    def _call(
        self,
        active: ActiveJob,
        then: Callable[[ActiveJob, Any], None],
        function: Callable[..., Any],
        *args: Any,
        urgent: bool = False,
        timeout: float | None = None,
    ) -> Call[Any]:
        seconds = timeout or self._settings.chunk_timeout
        call = self._runtime.engine.submit(function, *args, timeout=seconds, urgent=urgent)
        call.future.add_done_callback(lambda future: self._events.put(partial(self._arrive, active, then, future)))
        return call

    def _arrive(self, active: ActiveJob, then: Callable[[ActiveJob, Any], None], future: Any) -> None:
        if self._active.get(active.id) is not active:
            return  # the attempt was given up while this call ran
        try:
            then(active, future)
        except LeaseLost:
            self._lost(active)
        except Exception:
            # What came back could not be recorded. The lease lapses, and the next attempt scores that chunk again.
            self._drop(active)
            raise

    # --- what calls come back with ---

    def _planned(self, active: ActiveJob, future: Any) -> None:
        active.planning = None
        if self._failed(active, future):
            return
        self._add_planned(active, future.result())

    def _add_planned(self, active: ActiveJob, planned: scoring.Planned) -> None:
        number = max(active.bases)
        complete = planned.complete and number == len(active.inputs) - 1
        self._write(plan.add_chunks_if_mine, active.id, active.attempt, planned.chunks, complete)
        active.planned, active.share_planned = complete, (number + planned.share) / len(active.inputs)
        active.pending.extend(planned.chunks)
        active.rows_planned += sum(chunk.records for chunk in planned.chunks)
        if planned.chunks:
            active.last_planned = planned.chunks[-1]
        if planned.complete and not complete:
            active.bases[number + 1] = active.rows_planned

    def _done_small(self, active: ActiveJob, future: Any) -> None:
        """Plan, chunk and result of a small job, in one transaction."""
        active.planning, active.is_small = None, False
        if self._failed(active, future):
            return
        done: scoring.Planned | scoring.Small = future.result()
        if isinstance(done, scoring.Planned):
            self._add_planned(active, done)
            return
        active.rows_done, active.rows_failed = done.scored.chunk.records, done.scored.rows_failed
        complete = partial(execution.complete_if_mine, only=done.scored)
        if self._end(active, complete, done.result, merge_facts(active.facts, done.scored.facts)):
            self._log_completed(active)

    def _scored(self, chunk: Chunk, active: ActiveJob, future: Any) -> None:
        del active.scoring[chunk.first_record]
        error = None if future.cancelled() else future.exception()
        if isinstance(error, _CRASHES):
            self._crashed(active, chunk, error)
            return
        if isinstance(error, InsufficientStorage):
            active.pending.appendleft(chunk)
        if self._failed(active, future):
            return
        scored: ScoredChunk = future.result()
        active.rows_done += scored.chunk.records
        active.rows_failed += scored.rows_failed
        self._write(plan.commit_chunk_if_mine, active.id, active.attempt, scored, active.progress)
        if too_many := too_many_row_errors(active):
            self._fail(active, too_many)

    def _crashed(self, active: ActiveJob, chunk: Chunk, error: BatchserveError) -> None:
        """A chunk gets as many tries as the settings say, the last one as two halves."""
        crashes = self._write(plan.count_crash_if_mine, active.id, active.attempt, chunk.first_record)
        log.warning(
            "Scoring process was lost",
            action="chunk_crash",
            job_id=active.id,
            record=chunk.first_record,
            crashes=crashes,
            code=error.code,
            detail=error.detail,
        )
        if crashes >= self._settings.crashes:
            last = chunk.first_record + chunk.records - 1
            self._fail(
                active,
                type(error)(
                    f"{error.detail}; this was try {crashes} at records {chunk.first_record} to {last}. Look at these "
                    "records and at the model, or give the scoring processes more memory or time; then retry the job."
                ),
            )
        elif crashes == self._settings.crashes - 1 and chunk.records > 1 and active.model.signature.mode != "whole":
            with self._database.read() as connection:
                before = plan.chunk_before(connection, active.id, chunk.first_record)
            after = before if before is not None and before.input == chunk.input else None
            then = partial(self._halved, chunk)
            base = active.bases[chunk.input]
            active.scoring[chunk.first_record] = self._call(
                active, then, scoring.halve_chunk, active.inputs[chunk.input], chunk, after, base
            )
        else:
            active.pending.appendleft(chunk)

    def _halved(self, whole: Chunk, active: ActiveJob, future: Any) -> None:
        del active.scoring[whole.first_record]
        if self._failed(active, future):
            active.pending.appendleft(whole)
            return
        halves: list[Chunk] = future.result()
        if len(halves) > 1:
            self._write(plan.split_chunk_if_mine, active.id, active.attempt, whole, halves)
        active.pending.extendleft(reversed(halves))

    def _assembled(self, facts: Mapping[str, Any], active: ActiveJob, future: Any) -> None:
        active.assembling = None
        if self._failed(active, future):
            return
        result: Result = future.result()
        if self._end(active, execution.complete_if_mine, result, facts):
            self._log_completed(active)
            if not active.rows_failed:  # with failed records, a retry of these takes over the other parts
                self._delete_parts(active)

    def _log_completed(self, active: ActiveJob) -> None:
        log.info("Job is completed", action="job_complete", job_id=active.id, attempt=active.attempt,
                 rows=active.rows_done, rows_failed=active.rows_failed)  # fmt: skip

    def _failed(self, active: ActiveJob, future: Any) -> bool:
        """Whether a call gave no value; then the job waits (storage full), tries it again, stops, or is failed."""
        if future.cancelled():
            return True
        error = future.exception()
        if error is None:
            return False
        if isinstance(error, InsufficientStorage):
            log.warning("Job waits: the storage is full", action="job_wait", job_id=active.id)
            active.paused_until = time.monotonic() + self._settings.rescue
        elif isinstance(error, _CRASHES) and active.lost_calls + 1 < self._settings.crashes:
            active.lost_calls += 1
            log.warning("Scoring process was lost", action="call_crash", job_id=active.id,
                        crashes=active.lost_calls, code=error.code, detail=error.detail)  # fmt: skip
        elif isinstance(error, BatchserveError):
            self._fail(active, error)
        else:
            log.error("Job meets an unexpected error", action="job_error", job_id=active.id, exc_info=error)
            self._fail(active, BatchserveError(f"unexpected {type(error).__name__}; the worker's log has the details"))
        return True

    # --- ends of an attempt ---

    def _fail(self, active: ActiveJob, error: BatchserveError) -> None:
        if self._end(active, execution.fail_if_mine, error):
            log.warning("Job has failed", action="job_fail", job_id=active.id, code=error.code, detail=error.detail)

    def _cancel(self, active: ActiveJob) -> None:
        if active.cancelled_at is None:
            active.cancelled_at = time.monotonic()

    def _kill_overdue(self) -> None:
        """Ends cancelled jobs: when their chunks have come back, or by killing those that do not."""
        for active in [active for active in self._active.values() if active.cancelled_at is not None]:
            overdue = time.monotonic() - (active.cancelled_at or 0.0) > self._settings.cancel_grace
            if (not active.calls or overdue) and self._end(active, execution.cancel_if_mine):
                log.info("Job is cancelled", action="job_cancel", job_id=active.id)

    def _end(self, active: ActiveJob, transition: Callable[..., None], *details: Any) -> bool:
        """Writes the end of the attempt and forgets the job. False when another attempt has it."""
        try:
            self._write_end(transition, active.id, active.attempt, *details)
        except LeaseLost:
            self._lost(active)
            return False
        self._drop(active)
        self._tell(active.id)
        self.wake()  # there is room for the next job
        return True

    def _write(self, transition: Callable[..., T], *details: Any) -> T:
        """One transition in one transaction. Waits for a database that is away or locked: a lease that lapses
        meanwhile fences the write."""
        for attempt in stamina.retry_context(on=(Unavailable, InsufficientStorage), attempts=None, timeout=60.0):
            with attempt, self._database.write() as connection:
                return transition(connection, *details)
        raise AssertionError("stamina either returns or raises")

    def _write_end(self, transition: Callable[..., None], *details: Any) -> None:
        def written(connection: Connection) -> None:
            transition(connection, *details, self._database.moment(connection).wall)

        if transition is execution.cancel_if_mine:  # who waits for it wants space
            with suppress(InsufficientStorage):
                self._database.write_freeing(written)
                return
        self._write(written)

    def _delete_parts(self, active: ActiveJob) -> None:
        storage = self._runtime.storage
        remove_unnamed(self._database, storage, [part.key for part in storage.list(parts_prefix(active.id))])

    def _drop(self, active: ActiveJob) -> None:
        if self._active.pop(active.id, None) is not None:
            self._turn.remove(active.id)
        for call in active.calls:
            call.kill()

    def _finish(self) -> None:
        """After SIGTERM: lets the chunks under way end, then gives all jobs back."""
        log.info("Worker is stopping", action="worker_stopping", worker=self.name, jobs=len(self._active))
        deadline = time.monotonic() + self._settings.grace
        while any(active.calls for active in self._active.values()) and time.monotonic() < deadline:
            self._handle_events(min(0.2, deadline - time.monotonic()))
        for active in list(self._active.values()):
            self._guarded(partial(self._release, active))

    def _release(self, active: ActiveJob) -> None:
        if self._end(active, execution.release_if_mine):
            log.info("Job is released", action="job_release", job_id=active.id)

    # --- leases ---

    def _keep_leases(self) -> None:
        while not self._ended.wait(self._settings.heartbeat):
            for active in list(self._active.values()):
                try:
                    with self._database.write() as connection:
                        now = self._database.moment(connection)
                        execution.renew_lease_if_mine(connection, active.id, active.attempt, self._settings.lease, now)
                except LeaseLost:
                    self._events.put(partial(self._lost, active))
                except Unavailable:
                    log.warning("Lease could not be renewed", action="lease_unavailable", job_id=active.id)
                except Exception:  # a full disk, say: this thread must not end before the worker does
                    log.exception("Lease could not be renewed", action="lease_error", job_id=active.id)

    def _keep_swept(self) -> None:
        """At the start and then hourly, removes what is kept no longer, and what a crash left behind."""
        storage, settings = self._runtime.storage, self._settings
        while True:
            try:
                now, settled = self._database.write_freeing(self._settled)
                expired = expire(self._database, storage, settings, now, settled)
                if expired.total:
                    log.info("Bytes are kept no longer", action="expire", jobs=expired.jobs, inputs=expired.inputs)
                # Bytes that are written just now may be dated by a clock that was set since.
                swept = (
                    sweep(self._database, storage, settings.sweep_age, now) if settled >= settings.sweep_age else None
                )
                if swept is not None and swept.total:
                    log.info("Orphaned bytes are removed", action="sweep", objects=swept.total)
                if forgotten := forget(self._database, settings, now, settled):
                    log.info("Expired jobs are forgotten", action="forget", jobs=forgotten)
            except Exception:
                log.exception("Sweep has failed; the next one will come", action="sweep_error")
            if self._ended.wait(min(_SWEEP_PAUSE, max(settings.sweep_age, settings.poll))):
                return

    def _settled(self, connection: Connection) -> tuple[float, float]:
        """The wall clock, and for how long it is to be believed."""
        now = self._database.moment(connection)
        return now.wall, clock.settled_for(connection, now)

    def _lost(self, active: ActiveJob) -> None:
        if self._active.get(active.id) is active:
            log.warning("Lease is lost: another worker has the job", action="lease_lost", job_id=active.id,
                        attempt=active.attempt)  # fmt: skip
            self._drop(active)


def chunk_limits(settings: Settings, model: ModelVersion, input_format: str) -> ChunkLimits:
    """How large this model's chunks may be: slow models get few records, a model that must see all at once gets all.

    Formats that take less memory for a byte than text get more (`Format.chunk_scale`). Images take much longer to
    decode than other values to read, whatever the model: small chunks of them keep all processes at work.
    """
    if model.signature.mode == "whole":
        return ChunkLimits(bytes=_UNLIMITED, records=_UNLIMITED)
    times = FORMATS[input_format].chunk_scale
    records = times * settings.chunk_records
    if model.signature.records_per_second is not None:
        records = min(records, max(1, int(model.signature.records_per_second * settings.chunk_seconds)))
    if any(tensor.image is not None for tensor in model.signature.inputs):
        records = min(records, _IMAGES)
    return ChunkLimits(bytes=times * settings.chunk_bytes, records=records)


def even_limits(limits: ChunkLimits, input_format: str, input_bytes: int, processes: int) -> ChunkLimits:
    """The limits under which a text is cut into chunks of one size, as many for each process.

    So all processes end at the same time: of three chunks for two processes, the third would keep one of them waiting.
    A chunk is not made smaller than is worth a call and a part of its own.
    """
    if not FORMATS[input_format].is_text or limits.bytes <= _WORTH or limits.bytes == _UNLIMITED:
        return limits
    each = max(1, ceil(input_bytes / (limits.bytes - _SLACK) / processes))
    even = ceil(input_bytes / (each * processes)) + _SLACK
    return replace(limits, bytes=max(_WORTH, even))


def too_many_row_errors(active: ActiveJob) -> TooManyRowErrors | None:
    """The error that ends a job by its own options, if there is one."""
    failed, options = active.rows_failed, active.options
    see = f"GET /v1/download/{active.id}/errors?partial=true lists them"
    if failed and options.on_row_error == "fail":
        return TooManyRowErrors(f"{failed} record(s) could not be scored and on_row_error is 'fail'; {see}")
    if options.max_errors is None:
        return None
    most = options.max_errors if options.max_errors >= 1 else options.max_errors * active.rows_planned
    settled = options.max_errors >= 1 or active.planned
    if settled and failed > most:
        return TooManyRowErrors(f"{failed} records could not be scored, max_errors allows {int(most)}; {see}")
    return None


def _nothing() -> None:
    """An event that only wakes the loop."""


def _nobody(_job_id: str) -> None:
    """Nobody waits in this process."""
