"""The worker: claims jobs, runs them on the engine, and rescues jobs of dead workers.

One thread owns all state (`Worker.run`); finished calls and wake-ups reach it through a queue. Others renew leases
(`leases`), apply retention (`housekeeper`) and send webhooks (`webhooks.deliverer`).
"""

import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from queue import Empty, SimpleQueue

from sqlalchemy import Connection

from batchserve import clock as clocks
from batchserve import idempotency
from batchserve.db.notifications import Notification, Topic
from batchserve.domain import Chunk, Job
from batchserve.errors import BatchserveError, LeaseLost, Unavailable, UnreadableRow
from batchserve.jobs import contents, execution, plan
from batchserve.logs import get_logger, logger_of_job
from batchserve.quotas.limits import Limits
from batchserve.runtime import Runtime, process_name
from batchserve.storage import is_in_row
from batchserve.webhooks.deliverer import Deliverer
from batchserve.worker.active_job import ActiveJob
from batchserve.worker.clock import Clock
from batchserve.worker.housekeeper import Housekeeper
from batchserve.worker.job_run import JobRun, RunContext
from batchserve.worker.leases import LeaseKeeper
from batchserve.worker.metering import Metering
from batchserve.worker.presence import Presence
from batchserve.worker.transitions import Transitions

__all__ = ["Worker"]

log = get_logger()

_FAILED_CLAIMS = 3
"""Consecutive failed claims after which a worker reports trouble."""
_SHORTEST_PAUSE, _LONGEST_PAUSE = 0.2, 5.0
"""Seconds between two tries while the database does not respond."""


class Worker:
    """Runs jobs until it is stopped. Any number of workers may share a database and a storage."""

    def __init__(
        self, runtime: Runtime, notify: Callable[[str], None] | None = None, clock: Clock | None = None
    ) -> None:
        """`notify` is called with the ID of each job whose attempt ends here, from the worker's thread."""
        self.name = process_name()
        self._runtime, self._database, self._settings = runtime, runtime.database, runtime.settings
        self._notify = notify or _no_notification
        self._clock = clock or Clock(runtime.database)
        self._events: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._runs: dict[str, JobRun] = {}
        self._turns: deque[JobRun] = deque()
        """The same runs, in the order of their turns."""
        self._poll_is_due = threading.Event()
        self._stopping = threading.Event()
        self._ended = threading.Event()
        self._next_poll = self._next_rescue = self._clock.monotonic()
        self._capable_at = self._clock.monotonic()
        """When the engine last had a process."""
        self._failed_claims = 0
        self._claim_error = ""
        self._pause = 0.0
        self._database_failed = not runtime.database.is_inline
        """Whether it has not responded since the last turn. At the start a server may just be back."""
        self.limits = Limits(runtime.database)
        self._context = RunContext(
            runtime,
            self._clock,
            Transitions(runtime.database, self._clock, self._stopping.is_set, self._note_failure),
            Metering(self.limits, self._clock),
            window=self._window,
            post=self._events.put,
            is_stopping=self._stopping.is_set,
            over=self._forget,
            ended=self._tell,
        )
        self.leases = LeaseKeeper(
            runtime.database,
            self._settings,
            self._clock,
            Presence(runtime, self._clock, self.name),
            held=lambda: list(self._runs.values()),
            lost=lambda run: self._events.put(run.lose),
            failed=self._note_failure,
        )
        self.housekeeper = Housekeeper(runtime, self._clock)
        self.deliverer = Deliverer(runtime.database, self._settings, self._clock.moment, metrics=runtime.metrics)

    # --- what other threads call ---

    def wake(self) -> None:
        """Signals a new job or a cancel request. Safe from any thread, and cheap."""
        if not self._poll_is_due.is_set():
            self._poll_is_due.set()
            self._events.put(self._poll)

    def hear(self, notification: Notification) -> None:
        """A notification of any process. Safe from any thread."""
        if notification.topic in (Topic.QUEUED, Topic.CANCEL, Topic.UNKNOWN):
            self.wake()
        if notification.topic in (Topic.WEBHOOKS, Topic.UNKNOWN):
            self.deliverer.wake()

    @property
    def trouble(self) -> str | None:
        """Why no job is claimed; None when claims succeed, or have failed only briefly."""
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
        """Runs until `stop`. Survives every error of a single job. Raises what `Engine.start` raises."""
        self._runtime.engine.start()
        log.info("Worker is ready", action="worker_start", worker=self.name, processes=self._runtime.engine.capacity)
        runs = {"heartbeat": self.leases.run, "housekeeper": self.housekeeper.run, "webhooks": self.deliverer.run}
        keepers = [_started(name, run, self._ended) for name, run in runs.items()]
        try:
            while not self._stopping.is_set():
                self.turn()
            self.give_back()
        finally:
            self._ended.set()
            self.deliverer.wake()
            for thread in keepers:
                thread.join()
            log.info("Worker has stopped", action="worker_stop", worker=self.name)

    # --- the loop ---

    def turn(self) -> None:
        """Does due work, dispatches calls up to the engine's capacity, then waits for events until more work is due."""
        now = self._clock.monotonic()
        if self._database_failed:  # then no other worker could renew its leases either
            self._database_failed = False
            self._next_rescue = max(self._next_rescue, now + self._settings.lease)
        if now >= self._next_rescue:
            self._guarded(partial(_rescue, self._runtime, self._clock))
            self._next_rescue = now + self._settings.rescue
        if now >= self._next_poll:
            self._guarded(self._poll)
            self._next_poll = now + self._settings.poll
        self._guarded(self._end_cancelled)
        self._guarded(self._release_if_incapable)
        self._guarded(self._dispatch)
        self._handle_events(min(self._next_poll, self._next_rescue) - self._clock.monotonic())

    def give_back(self) -> None:
        """Waits for running chunks within the grace time, then releases all jobs."""
        log.info("Worker is stopping", action="worker_stopping", worker=self.name, jobs=len(self._runs))
        deadline = self._clock.monotonic() + self._settings.grace
        while any(run.calls for run in self._runs.values()) and self._clock.monotonic() < deadline:
            self._handle_events(min(0.2, deadline - self._clock.monotonic()))
        for run in list(self._runs.values()):
            self._guarded(run.release)

    def _handle_events(self, seconds: float) -> None:
        """Waits for one event, then handles all pending ones."""
        try:
            event = self._clock.next_of(self._events, seconds)
            while True:
                self._guarded(event)
                event = self._events.get_nowait()
        except Empty:
            return

    def _guarded(self, action: Callable[[], None]) -> None:
        try:
            action()
        except Unavailable:
            self._note_failure()
            log.warning("Database does not respond", action="database_unavailable", worker=self.name)
            self._pause = min(_LONGEST_PAUSE, max(_SHORTEST_PAUSE, 2 * self._pause))
            self._clock.wait(self._stopping, self._pause)
        except Exception:
            log.exception("Worker continues after an error", action="worker_error", worker=self.name)

    def _note_failure(self) -> None:
        self._database_failed = True

    def _dispatch(self) -> None:
        """Keeps the engine busy: one chunk of each job in turn, so that a huge job does not block a small one."""
        under_way = sum(len(run.calls) for run in self._runs.values())
        idle = 0
        while self._turns and idle < len(self._turns):
            run = self._turns[0]
            self._turns.rotate(-1)
            if run.advance(may_score=under_way < self._window()):
                under_way += 1
                idle = 0
            else:
                idle += 1

    def _end_cancelled(self) -> None:
        for run in list(self._runs.values()):
            run.end_if_cancelled()

    def _release_if_incapable(self) -> None:
        """Releases the jobs to other workers, which may reach a host, when the engine has had no process for as long as
        a lease."""
        now = self._clock.monotonic()
        if self._runtime.engine.capacity:
            self._capable_at = now
        elif self._runs and now - self._capable_at > self._settings.lease:
            for run in list(self._runs.values()):
                run.release()

    def _window(self) -> int:
        return 2 * self._runtime.engine.capacity

    def _forget(self, run: JobRun) -> None:
        del self._runs[run.id]
        self._turns.remove(run)

    def _tell(self, run: JobRun) -> None:
        self._notify(run.id)
        self.wake()  # capacity for the next job

    # --- claims ---

    def _poll(self) -> None:
        """Claims due jobs, and reads cancel requests. Claims no more jobs than the engine can use, so that other
        workers find some; but one at each poll, up to the limit of the settings, so that a huge job does not delay a
        small one. Nor must a tenant with many jobs: beyond the limit, one job of each tenant without a running one.
        None while the engine has no process.
        """
        self._poll_is_due.clear()
        room = self._settings.active_jobs - len(self._runs)
        window = self._window()
        most = max(0, min(room, max(1, window - len(self._runs))))
        if window and not self._stopping.is_set():
            for job in self._claimed_or_counted(most):
                self._begin_or_fail(job)
        if self._runs:
            with self._database.read() as connection:
                cancelled = execution.cancel_requests(connection, self._runs)
            for job_id in cancelled:
                self._runs[job_id].request_cancel()

    def _claimed_or_counted(self, most: int) -> list[Job]:
        try:
            claimed = self._claimed(most)
        except Exception as error:
            self._failed_claims += 1
            self._claim_error = error.detail if isinstance(error, BatchserveError) else type(error).__name__
            raise
        self._failed_claims, self._pause = 0, 0.0
        return claimed

    def _claimed(self, most: int) -> list[Job]:
        with self._database.read() as connection:
            if not execution.is_due(connection, self._clock.moment(connection).wall, most):
                return []
        with self._database.write() as connection:
            now = self._clock.moment(connection)
            return execution.claim_due(connection, self.name, self._settings.lease, now, most)

    def _begin_or_fail(self, job: Job) -> None:
        """A job that cannot be started, such as one with unreadable chunks, does not prevent others."""
        try:
            self._begin(job)
        except Unavailable:
            raise  # this worker stops: its lease lapses, and it is claimed again
        except Exception as error:
            found, log = _fault_at_start(job, error), logger_of_job(job.id, job.request_id)
            log.error("Job cannot be started", action="job_error", exc_info=None if found is error else error)
            with suppress(LeaseLost):
                self._context.transitions.write_end(execution.fail_if_mine, job.id, job.attempt, found)
            self._notify(job.id)

    def _begin(self, job: Job) -> None:
        if stale := self._runs.get(job.id):  # this worker's own lease lapsed, and it has claimed the job again
            stale.lose()
        read = self._context.transitions.read
        if any(is_in_row(stored.key) for stored in job.inputs):
            job = read(partial(_with_contents, job))
        left = read(partial(_plan_of, job)) if job.chunks_total else ([], None, {0: 0})
        active = ActiveJob.begin(job, *left, self._settings)
        run = self._runs[job.id] = JobRun(active, self._context)
        self._turns.append(run)
        _note_start(self._runtime, job, run, active.model.reference)


def _fault_at_start(job: Job, error: Exception) -> BatchserveError:
    """The error of a job that cannot be started."""
    if isinstance(error, BatchserveError):
        return error
    return UnreadableRow(f"job {job.id} cannot be started; the worker's log has the details")


def _note_start(runtime: Runtime, job: Job, run: JobRun, reference: str) -> None:
    """Counts how long a job has waited for its first attempt."""
    run.log.info("Job has started", action="job_start", attempt=job.attempt, model=reference)
    if job.attempt == 1 and job.queued_at is not None and job.started_at is not None:
        runtime.metrics.observe_queue_wait(job.started_at - max(job.queued_at, job.run_after or 0.0))


def _started(name: str, run: Callable[[threading.Event], None], ended: threading.Event) -> threading.Thread:
    thread = threading.Thread(target=run, args=[ended], name=name, daemon=True)
    thread.start()
    return thread


def _rescue(runtime: Runtime, clock: Clock) -> None:
    """Queues jobs of dead workers again, and forgets old idempotency keys."""
    settings = runtime.settings
    with runtime.database.write() as connection:
        now = clock.moment(connection)
        queued, failed = execution.rescue_expired(connection, settings.crashes, now)
        asked_by = execution.request_ids(connection, [*queued, *failed])
        kept = 3600 * settings.idempotency_hours
        if clocks.settled_for(connection, now) >= kept:
            idempotency.forget_older(connection, now.wall - kept, now.wall + clocks.TOLERANCE)
    runtime.metrics.count_rescued(len(queued) + len(failed))
    runtime.database.refill_reserve()
    for job_id in queued:
        logger_of_job(job_id, asked_by[job_id]).warning("Job is queued again: its worker was lost", action="job_rescue")
    for job_id in failed:
        of_job = logger_of_job(job_id, asked_by[job_id])
        of_job.error("Job has failed: its workers died", action="job_fail", code="worker-crashed")


def _with_contents(job: Job, connection: Connection) -> Job:
    """The job with the inputs that are in rows: scoring processes do not read the database."""
    return replace(job, inputs=tuple(contents.with_content(connection, stored) for stored in job.inputs))


def _plan_of(job: Job, connection: Connection) -> tuple[list[Chunk], Chunk | None, dict[int, int]]:
    """The state left by earlier attempts: unscored chunks, the last planned one, and the first record of each input."""
    bases = plan.first_records(connection, job.id) if len(job.inputs) > 1 else {0: 0}
    return plan.pending_chunks(connection, job.id), plan.last_chunk(connection, job.id), bases


def _nothing() -> None:
    """An event that only wakes the loop."""


def _no_notification(_job_id: str) -> None:
    """Notifies no waiters in this process."""
