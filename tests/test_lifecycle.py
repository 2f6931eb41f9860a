"""The life of jobs under any order of events: clients, workers, crashes, pauses and clocks, against a reference.

Hypothesis draws the events and shrinks a failure to its shortest sequence. Failures end with the seed to repeat them.
"""

import random
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import pytest
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from reference import LEGAL, UNFINISHED, ReferenceJob
from sqlalchemy import Connection, delete, select

from batchserve import idempotency, registry
from batchserve.db import tables
from batchserve.db.connect import Database, Moment
from batchserve.domain import (
    Chunk,
    Dialect,
    InputTensor,
    JobState,
    Options,
    Result,
    ScoredChunk,
    Signature,
    StoredInput,
)
from batchserve.errors import (
    IdempotencyInProgress,
    IdempotencyMismatch,
    JobConflict,
    JobNotFound,
    LeaseLost,
    ModelInUse,
    ModelNotFound,
    ScoringCrashed,
)
from batchserve.jobs import execution, plan, queries, requests, totals
from batchserve.storage import input_key, result_key

T = TypeVar("T")

SHARED: dict[str, Any] = {
    "deadline": None,
    "print_blob": True,
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
}
EFFORTS = {
    "quick": settings(max_examples=30, stateful_step_count=40, phases=[Phase.generate, Phase.shrink], **SHARED),
    "thorough": settings(max_examples=500, stateful_step_count=80, **SHARED),
}

LEASE, HEARTBEAT, CRASHES, DAY = 30.0, 10.0, 3, 86_400.0
CONTENTS = {"short": (3,), "halves": (2, 2), "long": (4, 1, 3)}
"""Inputs, as the records of the chunks that they are cut into."""
KEYS = st.sampled_from([None, None, "key-1", "key-2"])
SIGNATURE = Signature((InputTensor("X", "float32", (None, 2)),), ())


@dataclass
class Hold:
    """The state of a claimed job as known to its worker, which may be out of date."""

    worker: str
    job_id: str
    attempt: int
    content: str
    pending: list[Chunk]
    planned: bool
    rows_planned: int
    rows_done: int
    share_planned: float
    """Of the input's bytes: an estimate, and none before this worker plans itself."""
    done: list[ScoredChunk] = field(default_factory=list)

    @property
    def progress(self) -> float:
        """The progress as known to its worker. It may decrease when the plan grows: records differ in length."""
        return 0.99 * self.share_planned * self.rows_done / max(self.rows_planned, 1)

    def next_chunks(self, most: int) -> list[Chunk]:
        """The cuts of the input behind what is planned."""
        chunks, first = [], 0
        for records in CONTENTS[self.content]:
            if first >= self.rows_planned:
                chunks.append(Chunk(first, records, 10 * first, 10 * (first + records)))
            first += records
        return chunks[:most]


class JobLife(RuleBasedStateMachine):
    """Clients and workers on one database. Every rule acts like the API or a worker, and updates the reference."""

    def __init__(self, database: Database) -> None:
        super().__init__()
        self.database = database
        self.jobs: dict[str, ReferenceJob] = {}
        self.keys: dict[str, tuple[str, str, float]] = {}
        self.models: list[int] = []
        self.holds: list[Hold] = []
        self.awake = ["worker-1", "worker-2"]
        self.asleep: list[str] = []
        self.workers = len(self.awake)
        self.created = self.newest_model = 0
        self.wall, self.steady, self.boot = 1_700_000_000.0, 500.0, 1
        self.last: dict[str, tuple[JobState, int, float]] = {}
        self.committed: dict[tuple[str, int], tuple[int, int, str]] = {}
        self.results: dict[str, tuple[Any, ...]] = {}
        self.counted: dict[str, int] = {}
        with database.write() as connection:
            for table in reversed(tables.metadata.sorted_tables):
                connection.execute(delete(table))

    @property
    def now(self) -> Moment:
        return Moment(self.wall, self.steady, f"boot-{self.boot}")

    def write(self, act: Callable[[Connection], T], refused: type[Exception] | None = None) -> T | None:
        """One transaction. `refused`: the error that has to undo it."""
        if refused is None:
            with self.database.write() as connection:
                return act(connection)
        with pytest.raises(refused), self.database.write() as connection:
            act(connection)
        return None

    def a_job(self, data: st.DataObject) -> ReferenceJob:
        return self.jobs[data.draw(st.sampled_from(sorted(self.jobs)), "job")]

    def a_hold(self, data: st.DataObject) -> Hold:
        """A run of a worker that is not paused, whichever attempt owns the job by now."""
        held = self.live_holds()
        index = data.draw(st.integers(0, len(held) - 1), "hold")
        return held[index]

    def has_job(self) -> bool:
        return bool(self.jobs)

    def has_room(self) -> bool:
        return len(self.jobs) < 20 and sum(job.state in UNFINISHED for job in self.jobs.values()) < 5

    def has_hold(self) -> bool:
        return bool(self.live_holds())

    def live_holds(self) -> list[Hold]:
        return [hold for hold in self.holds if hold.worker in self.awake]

    @initialize(contents=st.lists(st.sampled_from(sorted(CONTENTS)), min_size=2, max_size=3), planned=st.integers(0, 2))
    def begin_with_jobs(self, contents: list[str], planned: int) -> None:
        self.register_model()
        for content in contents:
            self.upload_and_predict(content, "csv", False, None)
        for hold in self.claim_by(self.awake[0], 1):
            self.work_by(hold, min(planned, 1), planned)

    # --- clients ---

    @precondition(has_room)
    @rule(content=st.sampled_from(sorted(CONTENTS)), key=KEYS, race=st.booleans())
    def upload(self, content: str, key: str | None, race: bool) -> None:
        """`race`: another process handles this key between our read and our write."""
        asked = idempotency.fingerprint("upload", content)
        refused = IdempotencyInProgress if race and key in self.keys else None
        if refused is None and self.replayed(key, asked):
            return
        job_id = self.new_id()
        self.write(lambda connection: self.create(connection, job_id, content, key, asked, 201), refused)
        if refused is None:
            self.jobs[job_id] = ReferenceJob(job_id, content)

    @precondition(has_job)
    @rule(data=st.data(), form=st.sampled_from(["csv", "jsonl"]), reuse=st.booleans(), key=KEYS,
          priority=st.integers(0, 1), delay=st.sampled_from([None, 5.0]))  # fmt: skip
    def predict(
        self, data: st.DataObject, form: str, reuse: bool, key: str | None, priority: int, delay: float | None
    ) -> None:
        job = self.a_job(data)
        asked = idempotency.fingerprint("predict", job.id, form, str(reuse), str(priority), str(delay))
        if not self.replayed(key, asked):
            self.enqueue(job, form, reuse, key, asked, priority, delay, create=False)

    @precondition(has_room)
    @rule(content=st.sampled_from(sorted(CONTENTS)), form=st.sampled_from(["csv", "jsonl"]), reuse=st.booleans(),
          key=KEYS)  # fmt: skip
    def upload_and_predict(self, content: str, form: str, reuse: bool, key: str | None) -> None:
        asked = idempotency.fingerprint("upload-predict", content, form, str(reuse))
        if not self.replayed(key, asked):
            self.enqueue(ReferenceJob(self.new_id(), content), form, reuse, key, asked, 0, None, create=True)

    @precondition(has_job)
    @rule(data=st.data(), what=st.sampled_from(["cancel and retry", "cancel", "retry", "retry failed rows", "delete"]))
    def ask(self, data: st.DataObject, what: str) -> None:
        job = self.a_job(data)
        match what:
            case "cancel":
                self.cancel(job)
            case "retry":
                self.retry(job)
            case "retry failed rows":
                self.retry_failed_rows(job)
            case "delete":
                self.delete(job)
            case "cancel and retry":
                self.cancel(job)
                self.retry(job)

    def cancel(self, job: ReferenceJob) -> None:
        self.write(lambda connection: requests.request_cancel(connection, job.id, self.wall))
        job.request_cancel()

    def retry(self, job: ReferenceJob) -> None:
        allowed = job.retry(self.wall, job.model in self.models)
        refused = None if allowed else JobConflict
        self.write(lambda connection: requests.retry_if_stopped(connection, job.id, self.wall), refused)

    def retry_failed_rows(self, job: ReferenceJob) -> None:
        job_id = self.new_id()
        again = job.retry_of_failed_rows(job_id, self.wall, job.model in self.models)

        def create(connection: Connection) -> None:
            found = queries.get(connection, job.id)
            requests.create_retry_of_failed_rows(connection, found, job_id, self.wall)

        self.write(create, None if again else JobConflict)
        if again is not None:
            self.jobs[job_id] = again

    def delete(self, job: ReferenceJob) -> None:
        refused = JobConflict if job.state is JobState.RUNNING else None
        self.write(lambda connection: requests.delete_if_not_running(connection, job.id), refused)
        if refused is None:
            del self.jobs[job.id]
            with pytest.raises(JobNotFound), self.database.read() as connection:
                queries.get(connection, job.id)

    # --- workers ---

    @precondition(lambda self: self.awake)
    @rule(data=st.data(), most=st.integers(1, 3), chunks=st.integers(0, 3))
    def claim(self, data: st.DataObject, most: int, chunks: int) -> None:
        for hold in self.claim_by(data.draw(st.sampled_from(self.awake), "worker"), most):
            if chunks and not hold.planned:
                self.plan_by(hold, chunks)

    @precondition(has_hold)
    @rule(data=st.data(), steps=st.integers(1, 6), most=st.integers(1, 3), failed=st.sampled_from([1, 0]))
    def work(self, data: st.DataObject, steps: int, most: int, failed: int) -> None:
        """What a worker does next for a job: plan, commit a chunk (the last one: any order will do), complete."""
        self.work_by(self.a_hold(data), steps, most, failed)

    @precondition(has_hold)
    @rule(
        data=st.data(), what=st.sampled_from(["commit again", "complete too early", "complete small", "crash", "fail"])
    )
    def go_wrong(self, data: st.DataObject, what: str) -> None:
        hold = self.a_hold(data)
        match what:
            case "commit again":
                self.commit_again(hold)
            case "complete too early":
                self.complete_too_early(hold)
            case "complete small":
                self.complete_small(hold, failed=data.draw(st.integers(0, 1), "failed"))
            case "crash":
                self.lose_a_scoring_process(hold, times=data.draw(st.sampled_from([CRASHES, 2, 1]), "times"))
            case "fail":
                self.fail_by(hold)

    def commit_again(self, hold: Hold) -> None:
        """A chunk counts once: a repeated commit changes nothing, and that of another attempt is refused."""
        for scored in hold.done:
            of_it = (tables.chunks.c.job_id == hold.job_id, tables.chunks.c.first_record == scored.chunk.first_record)
            with self.database.read() as connection:
                by = connection.scalar(select(tables.chunks.c.attempt).where(*of_it))
            self.write(
                lambda connection: plan.commit_chunk_if_mine(connection, hold.job_id, hold.attempt, scored, 1.0),  # noqa: B023 - called at once
                None if by == hold.attempt else LeaseLost,
            )

    def lose_a_scoring_process(self, hold: Hold, times: int) -> None:
        """What the worker makes of it: one more try, the last one as two halves, then the job fails."""
        for _ in range(times):
            if not hold.pending or hold not in self.holds:
                return
            chunk = hold.pending[0]
            counted = self.write_as(
                hold,
                lambda connection: plan.count_crash_if_mine(connection, hold.job_id, hold.attempt, chunk.first_record),  # noqa: B023 - called at once
            )
            if counted is None:
                return
            crashes = self.jobs[hold.job_id].count_crash(chunk.first_record)
            assert counted == crashes
            if crashes >= CRASHES:
                self.fail_by(hold)
            elif crashes == CRASHES - 1 and chunk.records > 1:
                self.split_by(hold, chunk)

    def complete_too_early(self, hold: Hold) -> None:
        """No job is completed while a record has no row, whatever its worker assumes."""
        job = self.jobs.get(hold.job_id)
        if job is None or not job.is_of(hold.attempt) or not job.is_whole:
            result = self.result_of(hold)
            self.write(
                lambda connection: execution.complete_if_mine(
                    connection, hold.job_id, hold.attempt, result, {}, self.wall
                ),
                LeaseLost,
            )

    def complete_small(self, hold: Hold, failed: int) -> None:
        """Planned, scored and assembled at once; a job that was planned before is refused."""
        job = self.jobs.get(hold.job_id)
        records = sum(CONTENTS[hold.content])
        chunk = Chunk(0, records, 0, 10 * records)
        result = self.result_of(hold)

        def act(connection: Connection) -> None:
            only = self.scored(hold, chunk, failed)
            execution.complete_if_mine(connection, hold.job_id, hold.attempt, result, {}, self.wall, only=only)

        if job is not None and job.is_of(hold.attempt) and job.chunks:
            self.write(act, LeaseLost)
        elif self.write_as(hold, act, ends=JobState.COMPLETED) is not None and job is not None:
            job.plan({0: records}, complete=True)
            job.commit(0, failed, 1.0)
            job.complete(result)

    @precondition(lambda self: self.awake)
    @rule(what=st.sampled_from(["pause", "pause", "crash", "terminate"]), number=st.integers(0, 3),
          cancelled=st.booleans(), seconds=st.sampled_from([3 * LEASE, 0.0]), steps=st.integers(0, 3))  # fmt: skip
    def disturb_worker(self, what: str, number: int, cancelled: bool, seconds: float, steps: int) -> None:
        """Pauses, crashes or terminates a worker; then time passes. `cancelled`: one of its jobs was just cancelled."""
        worker = self.awake[number % len(self.awake)]
        its_jobs = [self.jobs[hold.job_id] for hold in self.holds if hold.worker == worker and hold.job_id in self.jobs]
        if cancelled and its_jobs:
            self.cancel(its_jobs[0])
        match what:
            case "pause":  # it is not aware of it when it resumes
                self.awake.remove(worker)
                self.asleep.append(worker)
            case "crash":
                self.replace_worker(worker)
            case "terminate":  # it releases its jobs
                for hold in [hold for hold in self.holds if hold.worker == worker]:
                    self.release_by(hold)
                self.replace_worker(worker)
        self.wait(seconds, steps)

    @rule(what=st.sampled_from(["boot", "clock goes back", "clock goes on", "new model", "model is deleted"]),
          seconds=st.sampled_from([3 * LEASE, 0.0]), steps=st.integers(0, 3))  # fmt: skip
    def disturb_all(self, what: str, seconds: float, steps: int) -> None:
        """Then time goes by."""
        match what:
            case "boot":  # all processes end, and the uptime starts again
                self.boot, self.steady = self.boot + 1, 10.0
                for worker in self.awake + self.asleep:
                    self.replace_worker(worker)
            case "clock goes back":
                self.wall -= DAY
            case "clock goes on":
                self.wall += DAY
            case "new model":
                self.register_model()
            case "model is deleted":
                self.delete_model()
        self.wait(seconds, steps)

    @precondition(lambda self: self.asleep)
    @rule(what=st.sampled_from(["work", "renew", "complete", "complete small", "cancel", "fail", "release"]))
    def wake_worker(self, what: str) -> None:
        """It continues where it was paused, as if no time had passed."""
        worker = self.asleep.pop(0)
        self.awake.append(worker)
        for hold in [hold for hold in self.holds if hold.worker == worker]:
            match what:
                case "work":
                    self.work_by(hold, 1)
                case "renew":
                    self.renew_by(hold)
                case "complete":
                    self.complete_too_early(hold)
                case "complete small":
                    self.complete_small(hold, failed=0)
                case "cancel":
                    self.cancel_by(hold)
                case "fail":
                    self.fail_by(hold)
                case "release":
                    self.release_by(hold)

    @rule(seconds=st.sampled_from([1.0, HEARTBEAT, LEASE, 3 * LEASE]), steps=st.integers(0, 3))
    def wait(self, seconds: float, steps: int) -> None:
        """Active workers renew their leases, take that many steps for each job, and check for due work."""
        while seconds > 0:
            step = min(seconds, HEARTBEAT)
            seconds, self.wall, self.steady = seconds - step, self.wall + step, self.steady + step
            for hold in self.live_holds():
                self.renew_by(hold)
        for hold in self.live_holds():
            self.work_by(hold, steps, failed=1)
        if self.awake:
            self.rescue()
        for worker in self.awake if steps else ():
            self.hear_of_cancels(worker)
            self.claim_by(worker, 1)

    # --- what must hold after every event ---

    @invariant()
    def no_counter_of_the_service_ever_decreases(self) -> None:
        with self.database.read() as connection:
            found = totals.count_all(connection)
        counted = {**found.ended, "rows_ok": found.rows_ok, "rows_failed": found.rows_failed}
        assert all(counted[name] >= before for name, before in self.counted.items()), (self.counted, counted)
        self.counted = counted

    @invariant()
    def the_database_tells_what_the_reference_tells(self) -> None:
        with self.database.read() as connection:
            rows = {row["id"]: dict(row) for row in connection.execute(select(tables.jobs)).mappings()}
            chunks = connection.execute(select(tables.chunks).order_by(*tables.chunks.primary_key)).mappings().all()
            attempts = connection.execute(select(tables.attempts)).mappings().all()
        assert set(rows) == set(self.jobs)
        assert {row["job_id"] for row in [*chunks, *attempts]} <= set(rows)
        for job_id, row in rows.items():
            self.compare(self.jobs[job_id], row)
            own = [dict(chunk) for chunk in chunks if chunk["job_id"] == job_id]
            self.compare_chunks(self.jobs[job_id], own)
            self.check_history(row, own)
            self.check_attempts(row, [dict(attempt) for attempt in attempts if attempt["job_id"] == job_id])

    def compare(self, job: ReferenceJob, row: dict[str, Any]) -> None:
        names = (
            "attempt",
            "planned",
            "rows_planned",
            "rows_ok",
            "rows_failed",
            "chunks_done",
            "reused_from",
            "crashes",
        )
        assert row["state"] == job.state
        assert {name: row[name] for name in names} == {name: getattr(job, name) for name in names}
        assert row["chunks_total"] == len(job.chunks)
        assert row["progress"] == pytest.approx(job.progress)
        assert (row["cancel_requested_at"] is not None) == job.cancel_requested
        lease = None if row["lease_until"] is None else (row["lease_until"], row["lease_clock"])
        assert lease == job.lease, "one live lease, and only of a running job"
        assert (lease is not None) == (job.state is JobState.RUNNING)
        assert (row["finished_at"] is not None) == (job.state not in UNFINISHED)
        assert row["result_key"] == (job.result.key if job.result else None)

    def compare_chunks(self, job: ReferenceJob, chunks: list[dict[str, Any]]) -> None:
        names = ("first_record", "records", "crashes", "attempt")
        expected = [(first, chunk.records, chunk.crashes, chunk.attempt) for first, chunk in sorted(job.chunks.items())]
        assert [tuple(chunk[name] for name in names) for chunk in chunks] == ([] if job.reused_from else expected)
        following = 0
        for chunk in chunks:
            assert (chunk["first_record"], chunk["start"]) == (following, 10 * following), "contiguous"
            following += chunk["records"]
            assert chunk["stop"] == 10 * following

    def check_history(self, row: dict[str, Any], chunks: list[dict[str, Any]]) -> None:
        """What may change, and what may not."""
        job_id, state = row["id"], JobState(row["state"])
        before = self.last.get(job_id)
        if before is not None:
            assert before[0] is state or (before[0], state) in LEGAL
            assert row["attempt"] in (before[1], before[1] + 1)
            assert row["progress"] >= before[2]
        self.last[job_id] = (state, row["attempt"], row["progress"])
        for chunk in chunks:
            if chunk["attempt"] is not None:
                part = (chunk["attempt"], chunk["records"], chunk["part_sha256"])
                assert self.committed.setdefault((job_id, chunk["first_record"]), part) == part, "committed once"
        assert row["rows_ok"] + row["rows_failed"] <= row["rows_planned"]
        assert (row["progress"] == 1.0) == (state is JobState.COMPLETED)
        if state is JobState.COMPLETED:
            assert (
                row["rows_ok"] + row["rows_failed"] == row["rows_planned"] == sum(CONTENTS[self.jobs[job_id].content])
            )
            result = tuple(row[name] for name in row if name.startswith(("result_", "errors_")))
            assert self.results.setdefault(job_id, result) == result, "a result never changes"

    def check_attempts(self, row: dict[str, Any], attempts: list[dict[str, Any]]) -> None:
        """One for each number; the last one is under way while the job runs, no other ever is."""
        assert sorted(attempt["number"] for attempt in attempts) == list(range(1, row["attempt"] + 1))
        under_way = [attempt["number"] for attempt in attempts if attempt["outcome"] is None]
        assert under_way == ([row["attempt"]] if row["state"] == JobState.RUNNING else [])

    def teardown(self) -> None:
        """No job is stuck: after any events, one worker that stays alive brings every job to its end."""
        if sys.exc_info()[0] is not None:
            return  # a rule or an invariant has failed: report that failure
        for worker in self.awake + self.asleep:
            self.replace_worker(worker)
        self.steady += LEASE + 1
        self.wall = max([self.wall, *(job.run_after or 0.0 for job in self.jobs.values())])
        self.rescue()
        self.the_database_tells_what_the_reference_tells()
        self.claim_by(self.awake[0], 100)
        self.the_database_tells_what_the_reference_tells()
        for hold in list(self.holds):
            if not hold.planned:
                self.plan_by(hold, 100)
            for chunk in list(hold.pending):
                self.commit_by(hold, chunk, 0)
                self.the_database_tells_what_the_reference_tells()
            self.complete_by(hold)
        self.the_database_tells_what_the_reference_tells()
        assert not [job for job in self.jobs.values() if job.state in (JobState.QUEUED, JobState.RUNNING)]

    # --- steps of rules ---

    def register_model(self) -> None:
        self.newest_model += 1
        digest = f"{self.newest_model:064d}"
        added = self.write(
            lambda connection: registry.add(connection, "iris", digest, 10, SIGNATURE, {}, self.wall).version
        )
        assert added == self.newest_model, "versions count on, also past deleted ones"
        self.models.append(self.newest_model)

    def delete_model(self) -> None:
        if not self.models:
            return
        version = self.models[0]
        used = any(job.model == version and job.state in UNFINISHED for job in self.jobs.values())

        def remove(connection: Connection) -> None:
            registry.delete_if_unused(connection, registry.resolve(connection, f"iris@{version}"), self.wall)

        self.write(remove, ModelInUse if used else None)
        if not used:
            self.models.remove(version)

    def hear_of_cancels(self, worker: str) -> None:
        """A worker looks for cancel requests of its jobs, and ends these."""
        holds = {hold.job_id: hold for hold in self.holds if hold.worker == worker}
        with self.database.read() as connection:
            asked = execution.cancel_requests(connection, holds)
        # Of a job that the worker lost while it was paused, nothing is asked any more.
        known = {job_id: self.jobs[job_id] for job_id in holds if job_id in self.jobs}
        running = {job_id: job for job_id, job in known.items() if job.state is JobState.RUNNING}
        assert asked == {job_id for job_id, job in running.items() if job.cancel_requested}
        for job_id in sorted(asked):
            self.cancel_by(holds[job_id])

    def rescue(self) -> None:
        """Rescues jobs, as every worker does every few seconds."""
        before = {job_id: job.state for job_id, job in self.jobs.items()}
        for job in self.jobs.values():
            job.rescue(self.steady, self.now.clock, CRASHES)
        changed = {job_id: self.jobs[job_id].state for job_id in before if self.jobs[job_id].state != before[job_id]}
        found = self.write(lambda connection: execution.rescue_expired(connection, CRASHES, self.now))
        assert found is not None
        for state, job_ids in zip((JobState.QUEUED, JobState.FAILED), found, strict=True):
            assert sorted(job_ids) == sorted(job_id for job_id in changed if changed[job_id] is state)
        forgotten = self.write(lambda connection: idempotency.forget_older(connection, self.wall - DAY))
        kept = {key: known for key, known in self.keys.items() if known[2] >= self.wall - DAY}
        assert forgotten == len(self.keys) - len(kept)
        self.keys = kept

    def new_id(self) -> str:
        self.created += 1
        return f"{self.created:04d}"

    def replayed(self, key: str | None, asked: str) -> bool:
        """Whether a request is answered by an earlier one with its key, or refused because that was another one."""
        if key is None:
            return False
        known = self.keys.get(key)
        with self.database.read() as connection:
            if known is not None and known[0] != asked:
                with pytest.raises(IdempotencyMismatch):
                    idempotency.recall(connection, key, asked)
                return True
            remembered = idempotency.recall(connection, key, asked)
        assert (remembered.job_id if remembered else None) == (known[1] if known else None)
        return known is not None

    def remember(self, connection: Connection, key: str | None, asked: str, job_id: str, status: int) -> None:
        if key is not None:
            idempotency.remember(connection, key, asked, job_id, status, self.wall)
            self.keys[key] = (asked, job_id, self.wall)

    def create(
        self, connection: Connection, job_id: str, content: str, key: str | None, asked: str, status: int
    ) -> None:
        sha256 = idempotency.fingerprint(content)
        new = StoredInput(input_key(job_id), "csv", Dialect(), 10 * sum(CONTENTS[content]), sha256)
        requests.create(connection, job_id, [new], None, self.wall)
        self.remember(connection, key, asked, job_id, status)

    def enqueue(
        self,
        job: ReferenceJob,
        form: str,
        reuse: bool,
        key: str | None,
        asked: str,
        priority: int,
        delay: float | None,
        *,
        create: bool,
    ) -> None:
        """One transaction: the row of a new job, its place in the queue, or its end by an equal one, and the key."""
        if not self.models:
            with pytest.raises(ModelNotFound), self.database.read() as connection:
                registry.resolve(connection, "iris")
            return
        version = max(self.models)
        digest = idempotency.fingerprint(job.content, str(version), form)
        run_after = None if delay is None else self.wall + delay
        completed = [other for other in self.jobs.values() if other.state is JobState.COMPLETED]
        equal = max((other for other in completed if other.digest == digest), key=lambda other: other.id, default=None)

        def act(connection: Connection) -> bool:
            model = registry.resolve(connection, "iris")
            if create:
                self.create(connection, job.id, job.content, None, asked, 202)
            found = queries.find_equal(connection, digest) if reuse else None
            assert (found.id if found else None) == (equal.id if equal and reuse else None)
            queued = requests.enqueue_if_uploaded(
                connection, job.id, model, Options(form), digest,
                metadata={}, priority=priority, run_after=run_after, now=self.wall,
            )  # fmt: skip
            if queued and found is not None:
                assert requests.complete_as_equal_if_queued(connection, job.id, found, self.wall)
            self.remember(connection, key, asked, job.id, 202)
            return queued

        queued = job.enqueue(version, digest, priority, run_after, self.wall)
        assert self.write(act) == queued
        if queued and reuse and equal is not None:
            job.complete_as(equal)
        if create:
            self.jobs[job.id] = job

    def claim_by(self, worker: str, most: int) -> list[Hold]:
        due = [job for job in self.jobs.values() if job.is_due(self.wall)]
        due.sort(key=lambda job: (-job.priority, job.queued_at, job.id))
        with self.database.read() as connection:
            assert execution.is_due(connection, self.wall) == bool(due)
        claimed = self.write(lambda connection: execution.claim_due(connection, worker, LEASE, self.now, most))
        assert claimed is not None
        assert [job.id for job in claimed] == [job.id for job in due[:most]]
        for job in claimed:
            expected = self.jobs[job.id]
            expected.claim((self.steady + LEASE, self.now.clock))
            self.holds = [hold for hold in self.holds if (hold.worker, hold.job_id) != (worker, job.id)]
            with self.database.read() as connection:
                pending, last = plan.pending_chunks(connection, job.id), plan.last_chunk(connection, job.id)
            assert [chunk.first_record for chunk in pending] == expected.open_chunks
            planned = last.first_record + last.records if last else 0
            assert planned == job.rows_planned
            self.holds.append(
                Hold(
                    worker,
                    job.id,
                    job.attempt,
                    expected.content,
                    pending,
                    job.planned,
                    planned,
                    job.rows_done,
                    share_planned=1.0 if job.planned else 0.0,
                )
            )
        return self.holds[len(self.holds) - len(claimed) :]

    def write_as(self, hold: Hold, act: Callable[[Connection], T], *, ends: JobState | bool = False) -> T | bool | None:
        """A write of a worker. Refused, and the job given up, exactly when another attempt has the job, or none: then
        None. `ends`: of this worker's work on it, in this state; if the attempt has ended so already, nothing changes.
        """
        job = self.jobs.get(hold.job_id)
        is_mine = job is not None and job.is_of(hold.attempt)
        has_ended = job is not None and job.state is ends and job.attempt == hold.attempt
        value = self.write(act, None if is_mine or has_ended else LeaseLost)
        if ends or not is_mine:
            self.holds.remove(hold)
        if not is_mine:
            return None
        return True if value is None else value

    def work_by(self, hold: Hold, steps: int, most: int = 2, failed: int = 0) -> None:
        for _ in range(steps):
            if hold not in self.holds:
                return
            if hold.pending:
                self.commit_by(hold, hold.pending[-1], failed)
            elif not hold.planned:
                self.plan_by(hold, most)
            else:
                self.complete_by(hold)

    def renew_by(self, hold: Hold) -> None:
        renewed = self.write_as(
            hold,
            lambda connection: execution.renew_lease_if_mine(connection, hold.job_id, hold.attempt, LEASE, self.now),
        )
        if renewed:
            self.jobs[hold.job_id].lease = (self.steady + LEASE, self.now.clock)

    def plan_by(self, hold: Hold, most: int) -> None:
        chunks = hold.next_chunks(most)
        rows = hold.rows_planned + sum(chunk.records for chunk in chunks)
        complete = rows == sum(CONTENTS[hold.content])
        planned = self.write_as(
            hold,
            lambda connection: plan.add_chunks_if_mine(connection, hold.job_id, hold.attempt, chunks, complete),
        )
        if planned:
            hold.pending += chunks
            hold.rows_planned, hold.planned = rows, complete
            hold.share_planned = 1 - (1 - rows / sum(CONTENTS[hold.content])) ** 2
            self.jobs[hold.job_id].plan({chunk.first_record: chunk.records for chunk in chunks}, complete)

    def scored(self, hold: Hold, chunk: Chunk, failed: int) -> ScoredChunk:
        sha256 = idempotency.fingerprint(hold.job_id, str(chunk.first_record), str(hold.attempt))
        return ScoredChunk(chunk, failed, 100, sha256, 17 * failed)

    def commit_by(self, hold: Hold, chunk: Chunk, failed: int) -> None:
        scored = self.scored(hold, chunk, failed)
        hold.rows_done += chunk.records
        progress = hold.progress
        committed = self.write_as(
            hold,
            lambda connection: plan.commit_chunk_if_mine(connection, hold.job_id, hold.attempt, scored, progress),
        )
        if committed:
            hold.pending.remove(chunk)
            hold.done.append(scored)
            self.jobs[hold.job_id].commit(chunk.first_record, failed, progress)

    def split_by(self, hold: Hold, whole: Chunk) -> None:
        cut = whole.records // 2
        middle = 10 * (whole.first_record + cut)
        halves = [
            Chunk(whole.first_record, cut, whole.start, middle),
            Chunk(whole.first_record + cut, whole.records - cut, middle, whole.stop),
        ]
        split = self.write_as(
            hold,
            lambda connection: plan.split_chunk_if_mine(connection, hold.job_id, hold.attempt, whole, halves),
        )
        assert split
        hold.pending.remove(whole)
        hold.pending += halves
        self.jobs[hold.job_id].split(whole.first_record, cut)

    def result_of(self, hold: Hold) -> Result:
        sha256 = idempotency.fingerprint(hold.job_id, str(hold.attempt))
        return Result(result_key(hold.job_id, hold.attempt), 1000, sha256, None, 0)

    def complete_by(self, hold: Hold) -> None:
        result = self.result_of(hold)
        completed = self.write_as(
            hold,
            lambda connection: execution.complete_if_mine(connection, hold.job_id, hold.attempt, result, {}, self.wall),
            ends=JobState.COMPLETED,
        )
        if completed:
            self.jobs[hold.job_id].complete(result)

    def fail_by(self, hold: Hold) -> None:
        error = ScoringCrashed("the scoring process died")
        failed = self.write_as(
            hold,
            lambda connection: execution.fail_if_mine(connection, hold.job_id, hold.attempt, error, self.wall),
            ends=JobState.FAILED,
        )
        if failed:
            self.jobs[hold.job_id].fail()

    def cancel_by(self, hold: Hold) -> None:
        cancelled = self.write_as(
            hold,
            lambda connection: execution.cancel_if_mine(connection, hold.job_id, hold.attempt, self.wall),
            ends=JobState.CANCELLED,
        )
        if cancelled:
            self.jobs[hold.job_id].cancel()

    def release_by(self, hold: Hold) -> None:
        released = self.write_as(
            hold,
            lambda connection: execution.release_if_mine(connection, hold.job_id, hold.attempt, self.wall),
            ends=True,
        )
        if released:
            self.jobs[hold.job_id].release()

    def replace_worker(self, name: str) -> None:
        for workers in (self.awake, self.asleep):
            if name in workers:
                workers.remove(name)
        self.holds = [hold for hold in self.holds if hold.worker != name]
        self.workers += 1
        self.awake.append(f"worker-{self.workers}")


@pytest.mark.timeout(1200)  # a failure is shrunk for minutes
@pytest.mark.parametrize("effort", ["quick", pytest.param("thorough", marks=pytest.mark.faults)])
def test_jobs_live_as_promised_whatever_happens_in_whatever_order(
    database: Database, effort: str, pytestconfig: pytest.Config
) -> None:
    given = pytestconfig.getoption("--hypothesis-seed")
    number = random.SystemRandom().randrange(2**32) if given is None else given

    class Life(JobLife):
        def __init__(self) -> None:
            super().__init__(database)

    try:
        run_state_machine_as_test(seed(number)(Life), settings=EFFORTS[effort])
    except BaseException as failure:
        failure.add_note(f"To replay this: pytest {__file__} -k {effort} --hypothesis-seed={number}")
        raise
