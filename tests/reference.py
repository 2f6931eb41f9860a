"""The life of jobs as documented, in memory and in one thread, with which the database is compared.

Each method returns whether the change is allowed, and makes it if so. There are no rows, guards or SQL.
"""

from dataclasses import dataclass, field, replace

from batchserve.domain import JobState, Result

LEGAL = {
    (JobState.UPLOADED, JobState.QUEUED),
    (JobState.UPLOADED, JobState.CANCELLED),
    (JobState.UPLOADED, JobState.COMPLETED),  # at once, by the result of an equal job
    (JobState.QUEUED, JobState.RUNNING),
    (JobState.QUEUED, JobState.CANCELLED),
    (JobState.RUNNING, JobState.QUEUED),
    (JobState.RUNNING, JobState.COMPLETED),
    (JobState.RUNNING, JobState.FAILED),
    (JobState.RUNNING, JobState.CANCELLED),
    (JobState.FAILED, JobState.QUEUED),
    (JobState.CANCELLED, JobState.QUEUED),
}
UNFINISHED = (JobState.UPLOADED, JobState.QUEUED, JobState.RUNNING)


@dataclass(frozen=True)
class ReferenceChunk:
    records: int
    crashes: int = 0
    attempt: int | None = None
    """The attempt whose part counts."""
    failed: int = 0


@dataclass
class ReferenceJob:
    id: str
    content: str
    state: JobState = JobState.UPLOADED
    model: int | None = None
    digest: str | None = None
    priority: int = 0
    run_after: float | None = None
    queued_at: float | None = None
    attempt: int = 0
    crashes: int = 0
    lease: tuple[float, str] | None = None
    cancel_requested: bool = False
    planned: bool = False
    chunks: dict[int, ReferenceChunk] = field(default_factory=dict)
    """By first record."""
    progress: float = 0.0
    result: Result | None = None
    reused_from: str | None = None

    @property
    def rows_planned(self) -> int:
        return sum(chunk.records for chunk in self.chunks.values())

    @property
    def rows_failed(self) -> int:
        return sum(chunk.failed for chunk in self.chunks.values())

    @property
    def rows_ok(self) -> int:
        return sum(chunk.records for chunk in self.chunks.values() if chunk.attempt) - self.rows_failed

    @property
    def chunks_done(self) -> int:
        return sum(chunk.attempt is not None for chunk in self.chunks.values())

    @property
    def open_chunks(self) -> list[int]:
        return sorted(first for first, chunk in self.chunks.items() if chunk.attempt is None)

    @property
    def is_whole(self) -> bool:
        return self.planned and not self.open_chunks

    # --- what clients do ---

    def enqueue(self, model: int, digest: str, priority: int, run_after: float | None, now: float) -> bool:
        if self.state is not JobState.UPLOADED:
            return False
        self.state, self.model, self.digest, self.queued_at = JobState.QUEUED, model, digest, now
        self.priority, self.run_after = priority, run_after
        return True

    def complete_as(self, equal: "ReferenceJob") -> None:
        self.state, self.result, self.planned, self.progress = JobState.COMPLETED, equal.result, True, 1.0
        self.chunks, self.reused_from = dict(equal.chunks), equal.reused_from or equal.id

    def request_cancel(self) -> None:
        if self.state in UNFINISHED:
            self.cancel_requested = True
        if self.state in (JobState.UPLOADED, JobState.QUEUED):
            self.state = JobState.CANCELLED

    def retry(self, now: float, model_is_there: bool) -> bool:
        stopped = self.state in (JobState.FAILED, JobState.CANCELLED)
        if not (stopped and self.queued_at is not None and model_is_there):
            return False
        self.state, self.queued_at, self.cancel_requested, self.crashes = JobState.QUEUED, now, False, 0
        self.chunks = {first: replace(chunk, crashes=0) for first, chunk in self.chunks.items()}
        return True

    def retry_of_failed_rows(self, job_id: str, now: float, model_is_there: bool) -> "ReferenceJob | None":
        has_failed = self.state is JobState.COMPLETED and self.rows_failed and self.reused_from is None
        if not (has_failed and model_is_there):
            return None
        chunks = {
            first: ReferenceChunk(chunk.records) if chunk.failed else replace(chunk, crashes=0)
            for first, chunk in self.chunks.items()
        }
        done = sum(chunk.records for chunk in chunks.values() if chunk.attempt)
        return ReferenceJob(
            job_id,
            self.content,
            JobState.QUEUED,
            self.model,
            priority=self.priority,
            run_after=self.run_after,
            queued_at=now,
            planned=True,
            chunks=chunks,
            progress=0.99 * done / self.rows_planned,
        )

    # --- what workers do ---

    def is_due(self, now: float) -> bool:
        return self.state is JobState.QUEUED and (self.run_after is None or self.run_after <= now)

    def claim(self, lease: tuple[float, str]) -> None:
        self.state, self.lease, self.attempt = JobState.RUNNING, lease, self.attempt + 1

    def is_of(self, attempt: int) -> bool:
        return self.state is JobState.RUNNING and self.attempt == attempt

    def plan(self, chunks: dict[int, int], complete: bool) -> None:
        self.chunks |= {first: ReferenceChunk(records) for first, records in chunks.items()}
        self.planned = complete

    def commit(self, first: int, failed: int, progress: float) -> None:
        self.chunks[first] = replace(self.chunks[first], attempt=self.attempt, failed=failed)
        self.crashes, self.progress = 0, max(self.progress, progress)

    def count_crash(self, first: int) -> int:
        chunk = self.chunks[first]
        self.chunks[first] = replace(chunk, crashes=chunk.crashes + 1)
        return chunk.crashes + 1

    def split(self, first: int, records: int) -> None:
        """In two, of which the first one has `records`."""
        whole = self.chunks[first]
        self.chunks[first] = replace(whole, records=records)
        self.chunks[first + records] = replace(whole, records=whole.records - records)

    def complete(self, result: Result) -> None:
        self.progress, self.result = 1.0, result
        self._end(JobState.COMPLETED)

    def fail(self) -> None:
        self._end(JobState.FAILED)

    def cancel(self) -> None:
        self._end(JobState.CANCELLED)

    def release(self) -> None:
        self._end(JobState.CANCELLED if self.cancel_requested else JobState.QUEUED)

    def rescue(self, steady: float, clock: str, crashes: int) -> None:
        """Its state after its lease has lapsed."""
        if self.lease is None or (self.lease[0] >= steady and self.lease[1] == clock):
            return
        if self.cancel_requested:
            self.cancel()
        elif self.crashes + 1 >= crashes:
            self.fail()
        else:
            self.crashes += 1
            self._end(JobState.QUEUED)

    def _end(self, state: JobState) -> None:
        self.state, self.lease = state, None
