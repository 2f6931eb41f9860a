"""The run of one job: an attempt at it, from the claim to its end.

A run is over when its end is written, or when another attempt holds the lease; later outcomes are dropped.
"""

from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import Any

from structlog.typing import FilteringBoundLogger

from batchserve.domain import Chunk, Result, ScoredChunk, StoredInput
from batchserve.engines import Call
from batchserve.errors import (
    BatchserveError,
    LeaseLost,
    QuotaExceeded,
    StorageQuotaExceeded,
    Unavailable,
    UnreadableRow,
)
from batchserve.facts import merge_facts
from batchserve.jobs import execution, plan
from batchserve.logs import logger_of_job
from batchserve.metrics import CRASHES, Metrics
from batchserve.runtime import Runtime
from batchserve.scoring.assembly import assemble_result
from batchserve.scoring.chunks import score_chunk
from batchserve.scoring.comparison import Compared
from batchserve.scoring.planning import Planned, halve_chunk
from batchserve.scoring.small import Small
from batchserve.storage import parts_prefix
from batchserve.storage.disk import outage_of
from batchserve.upkeep.retention import remove_unnamed
from batchserve.worker.active_job import ActiveJob
from batchserve.worker.clock import Clock
from batchserve.worker.job_trace import STAGES, Back, JobTrace
from batchserve.worker.metering import Metering
from batchserve.worker.transitions import CancelRequested, Transitions
from batchserve.worker.waits import Waits, delay_of

__all__ = ["JobRun", "RunContext"]


@dataclass(frozen=True, slots=True)
class RunContext:
    """Context shared by all runs of a worker."""

    runtime: Runtime
    clock: Clock
    transitions: Transitions
    metering: Metering
    window: Callable[[], int]
    """Most running calls: one for each process, and one queued behind it. 0 while the engine has no process."""
    post: Callable[[Callable[[], None]], None]
    """Posts an event to the worker's thread, in which runs do all their work."""
    is_stopping: Callable[[], bool]
    over: Callable[["JobRun"], None]
    """Called when a run is over."""
    ended: Callable[["JobRun"], None]
    """Called afterwards, if the end of the attempt was written."""

    def call(
        self,
        then: Back,
        function: Callable[..., Any],
        *args: Any,
        urgent: bool = False,
        timeout: float | None = None,
    ) -> Call[Any]:
        """Calls a function on the engine; its outcome is handled by the worker's thread."""
        seconds = timeout or self.runtime.settings.chunk_timeout
        call = self.runtime.engine.submit(function, *args, timeout=seconds, urgent=urgent)

        def returned(future: Future[Any]) -> None:
            _count(self.runtime.metrics, function, call)
            self.post(partial(then, future))

        call.future.add_done_callback(returned)
        return call


class JobRun:
    """Runs a job from claim to end: `advance` starts what can start; outcomes of calls are recorded."""

    def __init__(self, job: ActiveJob, context: RunContext) -> None:
        self._job, self._context = job, context
        self._runtime, self._settings = context.runtime, context.runtime.settings
        self.id, self.attempt = job.id, job.attempt
        self.log, self._trace = logger_of_job(job.id, job.asked_by.request_id), JobTrace(job)
        self._waits = Waits(self._runtime.database, context.clock, job, self._settings.rescue, self.log)
        self.is_over = False

    @property
    def calls(self) -> list[Call[Any]]:
        return self._job.calls

    def advance(self, *, may_score: bool) -> bool:
        """The life of a job: planned piece by piece, scored meanwhile, assembled when all is scored. Returns whether a
        chunk was dispatched: one at most, so that other jobs have their turn."""
        if self._is_paused:
            return False
        self._plan()
        if may_score and self._score():
            return True
        self._assemble()
        return False

    def _plan(self) -> None:
        job = self._job
        if job.planning is not None or not job.needs_more(self._context.window()):
            return
        function, task, seconds = job.planning_call(self._context.window(), self._settings)
        then = self._done_small if job.is_small else self._planned
        job.planning = self._call(then, function, task, urgent=True, timeout=seconds)

    def _planned(self, future: Future[Planned | StoredInput | Compared]) -> None:
        self._job.planning = None
        if self._has_failed(future):
            return
        if isinstance(found := future.result(), Compared):
            self._job.add_compared(found)
        else:
            self._add_planned(found)

    def _add_planned(self, planned: Planned | StoredInput) -> None:
        self._write(*_written(self._context.metering, self._job, planned))
        self._job.add_planned(planned)

    def _done_small(self, future: Future[Planned | Small]) -> None:
        """Plan, chunk and result of a small job, in one transaction."""
        job = self._job
        job.planning, job.is_small = None, False
        if self._has_failed(future):
            return
        if isinstance(done := future.result(), Planned):
            self._add_planned(done)
            return
        job.add_scored(done.scored)
        facts = merge_facts(job.facts, done.scored.facts)
        self._complete(done.result, facts, only=done.scored, small=done.contents)

    # --- score ---

    def _score(self) -> bool:
        job = self._job
        if not job.pending or not job.is_compared:
            return False
        chunk = job.pending.popleft()
        # The first chunk of a job is urgent, so that a small job does not wait behind a huge one.
        then, first = partial(self._scored, chunk), chunk.first_record
        job.chunk_calls[first] = self._call(then, score_chunk, job.chunk_task(chunk), urgent=first == 0)
        return True

    def _scored(self, chunk: Chunk, future: Future[ScoredChunk]) -> None:
        job = self._job
        seconds = job.chunk_calls.pop(chunk.first_record).seconds
        error = None if future.cancelled() else future.exception()
        if isinstance(error, CRASHES):
            self._crashed(chunk, error)
            return
        if error is not None and delay_of(error) is not None:
            job.pending.appendleft(chunk)
        if self._has_failed(future):
            return
        scored = future.result()
        if seconds is not None:
            self._runtime.metrics.observe_chunk(job.model.reference, seconds)
        job.add_scored(scored)
        self._write(plan.commit_chunk_if_mine, scored, job.progress)
        if fatal := job.fatal_row_errors:
            self._fail(fatal)

    def _crashed(self, chunk: Chunk, error: BatchserveError) -> None:
        """A chunk gets as many tries as in the settings, the last one as two halves."""
        job, most = self._job, self._settings.crashes
        crashes = self._write(plan.count_crash_if_mine, chunk.first_record)
        self.log.warning("Scoring process was lost", action="chunk_crash", record=chunk.first_record, crashes=crashes,
                         code=error.code, detail=error.detail)  # fmt: skip
        if crashes >= most:
            self._fail(_of_last_try(error, chunk, crashes))
        elif crashes == most - 1 and chunk.records > 1 and job.model.signature.mode != "whole":
            first = chunk.first_record
            before = self._context.transitions.read(lambda connection: plan.chunk_before(connection, job.id, first))
            job.chunk_calls[first] = self._call(partial(self._halved, chunk), halve_chunk, *job.halving(chunk, before))
        else:
            job.pending.appendleft(chunk)

    def _halved(self, whole: Chunk, future: Future[list[Chunk]]) -> None:
        job = self._job
        del job.chunk_calls[whole.first_record]
        if self._has_failed(future):
            job.pending.appendleft(whole)
            return
        halves = future.result()
        if len(halves) > 1:
            self._write(plan.split_chunk_if_mine, whole, halves)
        job.add_halves(halves)

    # --- assemble ---

    def _assemble(self) -> None:
        job = self._job
        if not job.planned or job.pending or job.calls:
            return
        if fatal := job.fatal_row_errors:  # a limit as a share of the records can only be checked now
            self._fail(fatal)
            return
        try:
            done = self._context.transitions.read(lambda connection: plan.done_chunks(connection, job.id))
        except UnreadableRow as error:
            self._fail(error)
            return
        then = partial(self._assembled, merge_facts(job.facts, *(committed.facts for committed in done)))
        task = job.assemble_task(self._settings.storage, done)
        seconds = self._settings.chunk_timeout + task.most_seconds
        job.assembling = self._call(then, assemble_result, task, urgent=True, timeout=seconds)

    def _assembled(self, facts: Mapping[str, Any], future: Future[Result]) -> None:
        self._job.assembling = None
        if self._has_failed(future):
            return
        completed = self._complete(future.result(), facts)
        if completed and not self._job.rows_failed:  # otherwise a retry of the failed records reuses the other parts
            _delete_parts(self._runtime, self.id, self.log)

    # --- end ---

    def request_cancel(self) -> None:
        if self._job.cancelled_at is None:
            self._job.cancelled_at = self._context.clock.monotonic()

    def end_if_cancelled(self) -> None:
        """Ends a cancelled job when its chunks have returned; kills those that take too long."""
        job = self._job
        if job.cancelled_at is None:
            return
        overdue = self._context.clock.monotonic() - job.cancelled_at > self._settings.cancel_grace
        if (not job.calls or overdue) and self._end("cancelled", execution.cancel_if_mine):
            self.log.info("Job is cancelled", action="job_cancel")

    def release(self) -> None:
        """Releases the job to the queue."""
        if self._end("released", execution.release_if_mine):
            self.log.info("Job is released", action="job_release")

    def lose(self) -> None:
        """Another attempt has the job: nothing more is written."""
        if not self.is_over:
            self.log.warning("Lease is lost: another worker owns the job", action="lease_lost", attempt=self.attempt)
            self._drop("lost")

    def _complete(self, result: Result, facts: Mapping[str, Any], **small: Any) -> bool:
        job = self._job
        transition = partial(self._context.metering.complete, **small)
        completed = self._end("completed", transition, job.tenant, result, facts)
        if completed:
            self.log.info("Job is completed", action="job_complete", attempt=job.attempt, rows=job.rows_done,
                          rows_failed=job.rows_failed)  # fmt: skip
        return completed

    def _fail(self, error: BatchserveError) -> None:
        self._trace.error = error
        if self._end("failed", execution.fail_if_mine, error):
            self.log.warning("Job has failed", action="job_fail", code=error.code, detail=error.detail)

    def _end(self, outcome: str, transition: Callable[..., None], *details: Any) -> bool:
        """Writes the end of the attempt. False when another attempt has the job."""
        try:
            self._context.transitions.write_end(transition, self.id, self.attempt, *details)
        except LeaseLost:
            self.lose()
            return False
        self._drop(outcome)
        self._context.ended(self)
        return True

    def _drop(self, outcome: str) -> None:
        if not self.is_over:
            self.is_over = True
            self._trace.end(outcome)
            self._context.over(self)
        for call in self._job.calls:
            call.kill()

    @property
    def _is_paused(self) -> bool:
        return self._job.cancelled_at is not None or self._waits.is_paused or self._context.is_stopping()

    def _call(self, then: Back, function: Callable[..., Any], *args: Any, **how: Any) -> Call[Any]:
        back = self._trace.staged(partial(self._come_back, then), function, args[0])
        return self._context.call(back, function, *args, **how)

    def _come_back(self, then: Back, future: Future[Any]) -> None:
        if self.is_over:
            return  # the attempt was abandoned while this call ran
        try:
            then(future)
        except LeaseLost:
            self.lose()
        except (QuotaExceeded, StorageQuotaExceeded) as error:
            self._fail(error)
        except CancelRequested:  # the outcome is not recorded: a retry scores that chunk again
            self.request_cancel()
        except Exception:
            # The outcome could not be recorded. The lease lapses, and the next attempt scores that chunk again.
            self._drop("abandoned")
            raise

    def _has_failed(self, future: Future[Any]) -> bool:
        """Whether a call failed; then the job waits (storage full or out of reach), retries, stops, or fails."""
        if future.cancelled():
            return True
        job, error = self._job, future.exception()
        if error is None:
            self._waits.end()
            return False
        if (delay := delay_of(error)) is not None:
            self._waits.pause(delay)
        elif isinstance(error, CRASHES) and job.lost_calls + 1 < self._settings.crashes:
            job.lost_calls += 1
            self.log.warning("Scoring process was lost", action="call_crash", crashes=job.lost_calls, code=error.code,
                             detail=error.detail)  # fmt: skip
        elif isinstance(error, BatchserveError):
            self._fail(error)
        else:
            self.log.error("Job has an unexpected error", action="job_error", exc_info=error)
            self._fail(BatchserveError(f"unexpected {type(error).__name__}; the worker's log has the details"))
        return True

    def _write(self, transition: Callable[..., Any], *details: Any) -> Any:
        return self._context.transitions.write(transition, self.id, self.attempt, *details)


def _count(metrics: Metrics, function: Callable[..., Any], call: Call[Any]) -> None:
    """Counts a call that has ended."""
    if call.future.cancelled():
        return
    error = call.future.exception()
    if isinstance(error, CRASHES):
        metrics.count_crash("chunks", error)
    elif error is None and call.seconds is not None and (stage := STAGES.get(function)) is not None:
        metrics.observe_stage(stage, call.seconds)


def _written(metering: Metering, job: ActiveJob, planned: Planned | StoredInput) -> tuple[Any, ...]:
    """The transition that writes what a planning call has come back with, and its details."""
    if isinstance(planned, StoredInput):
        return metering.read, job.tenant, planned
    return metering.plan, job.tenant, planned.chunks, job.is_planned_by(planned)


def _of_last_try(error: BatchserveError, chunk: Chunk, crashes: int) -> BatchserveError:
    """The error of a job with a chunk that crashes scoring processes."""
    last = chunk.first_record + chunk.records - 1
    return type(error)(
        f"{error.detail}; this was try {crashes} at records {chunk.first_record} to {last}. Check these records and "
        "the model, or give the scoring processes more memory or time; then retry the job."
    )


def _delete_parts(runtime: Runtime, job_id: str, log: FilteringBoundLogger) -> None:
    try:
        parts = [part.key for part in runtime.storage.list(parts_prefix(job_id))]
        remove_unnamed(runtime.database, runtime.storage, parts)
    except (OSError, Unavailable) as error:
        if outage_of(error) is None:
            raise
        log.warning("Parts of a completed job are left to the sweep", action="parts_left")
