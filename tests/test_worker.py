"""The worker over a real database, storage and scoring processes, with real models."""

import csv
import io
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import graphs
import numpy as np
import onnxruntime
import orjson
import pandas as pd
import pytest
from sqlalchemy import update
from uuid_utils import uuid7

from batchserve import idempotency, scoring
from batchserve.admission import admit
from batchserve.db import migrate
from batchserve.db.connect import Database, Moment
from batchserve.db.tables import jobs as job_rows
from batchserve.direct import Direct
from batchserve.domain import (
    DEFAULT_TENANT,
    Chunk,
    ChunkLimits,
    Dialect,
    Job,
    JobState,
    ModelVersion,
    Options,
    ScoredChunk,
    StoredInput,
)
from batchserve.engines import Engine, open_engine
from batchserve.errors import InsufficientStorage
from batchserve.jobs import execution, plan, queries, requests
from batchserve.runtime import Runtime
from batchserve.settings import Settings
from batchserve.storage import Storage, input_key, model_key, open_storage, part_key, parts_prefix
from batchserve.submission import Queueing, Submission, create
from batchserve.worker import Worker, chunk_limits

TIMEOUT = 40.0
FOREVER = 1e12
SHORT: dict[str, Any] = {
    "processes": 2,
    "process_memory": 512 * 2**20,
    "lease": 1.0,
    "heartbeat": 0.2,
    "rescue": 0.2,
    "poll": 0.05,
    "cancel_grace": 0.5,
    "grace": 5.0,
}


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """Starting processes takes longer than most tests: they share two."""
    engine = open_engine(Settings(storage=str(tmp_path_factory.mktemp("engine")), **SHORT))
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def busy() -> bytes:
    return graphs.busy()


@pytest.fixture(scope="module")
def second(busy: bytes) -> float:
    """The value of `work` that keeps a scoring process busy for about a second."""
    return graphs.turns_per_second(busy)


class Bench:
    """A database and a storage of their own, and what a client does with them."""

    def __init__(self, settings: Settings, database: Database, storage: Storage, engine: Engine) -> None:
        self.runtime = Runtime(settings, database, storage, engine, interactive=engine)
        self.database, self.storage = database, storage

    @contextmanager
    def worker(self, **settings: Any) -> Iterator[Worker]:
        """A worker in a thread, stopped at the end."""
        changed = self.runtime.settings.model_copy(update=settings)
        worker = Worker(replace(self.runtime, settings=changed))
        thread = threading.Thread(target=worker.run)
        thread.start()
        try:
            yield worker
        finally:
            worker.stop()
            thread.join(TIMEOUT)
            assert not thread.is_alive(), "the worker did not stop"

    def register(self, name: str, model: bytes) -> ModelVersion:
        return Direct(self.database, self.storage).register(name, model)

    def store(self, key: str, content: bytes) -> StoredInput:
        with self.storage.create(key) as writer:
            writer.write(content)
            stored = writer.commit()
        return StoredInput(key, "csv", Dialect(), stored.bytes, stored.sha256)

    def submit(self, model: ModelVersion, content: bytes, **options: Any) -> str:
        """Whether the input fits the model is left to the worker."""
        job_id = str(uuid7())
        return self.queue(job_id, model, [self.store(input_key(job_id), content)], **options)

    def queue(self, job_id: str, model: ModelVersion, stored: Sequence[StoredInput], **options: Any) -> str:
        chosen = Options(**({"format": "csv"} | options))
        with self.database.write() as connection:
            submitted = Submission(DEFAULT_TENANT, job_id, tuple(stored), model, chosen, Queueing(reuse=False))
            create(connection, submitted, time.time())
        return job_id

    def plan_task(self, stored: StoredInput) -> scoring.PlanTask:
        source = scoring.Input.of(self.runtime.settings.storage, stored)
        return scoring.PlanTask(source, None, ChunkLimits(records=4), 100)

    def get(self, job_id: str) -> Job:
        with self.database.read() as connection:
            return queries.get(connection, job_id)

    def wait(self, job_id: str, condition: Callable[[Job], bool] = lambda job: job.state.finished) -> Job:
        deadline = time.monotonic() + TIMEOUT
        while time.monotonic() < deadline:
            job = self.get(job_id)
            if condition(job):
                return job
            assert not job.state.finished, job
            time.sleep(0.02)
        raise AssertionError(f"in vain: {self.get(job_id)}")

    def cancel(self, job_id: str) -> None:
        with self.database.write() as connection:
            requests.request_cancel(connection, job_id, time.time())

    def read(self, key: str | None) -> bytes:
        assert key is not None
        with self.storage.open(key) as source:
            return source.read()

    def result(self, job_id: str) -> bytes:
        job = self.get(job_id)
        assert job.result is not None, job.error
        return self.read(job.result.key)

    def errors(self, job: Job) -> list[dict[str, Any]]:
        return [orjson.loads(line) for line in self.read(job.result.errors_key if job.result else None).splitlines()]

    def parts(self, job_id: str) -> dict[str, float]:
        """The parts of a job and when they were written."""
        return {entry.key: entry.modified for entry in self.storage.list(parts_prefix(job_id))}

    def outcomes(self, job_id: str) -> list[str | None]:
        with self.database.read() as connection:
            return [attempt.outcome for attempt in queries.attempts_of(connection, job_id)]


@contextmanager
def opened(folder: Path, storage: Path, engine: Engine, **settings: Any) -> Iterator[Bench]:
    url = f"sqlite:///{folder / 'batchserve.db'}"
    database = Database(url)
    migrate.upgrade(database)
    try:
        chosen = Settings(storage=str(storage), database=url, **(SHORT | settings))
        yield Bench(chosen, database, open_storage(chosen.storage), engine)
    finally:
        database.close()


@pytest.fixture
def bench(tmp_path: Path, engine: Engine) -> Iterator[Bench]:
    with opened(tmp_path, tmp_path / "store", engine, chunk_records=10) as bench:
        yield bench


def rows_of(*work: float | None) -> bytes:
    lines = [f"r{number},{'' if value is None else f'{value:.0f}'}" for number, value in enumerate(work)]
    return "\n".join(["id,work", *lines, ""]).encode()


def rows_in(content: bytes) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(content.decode())))


def answers(content: bytes) -> list[tuple[str, float | None]]:
    """Record ID and prediction of each row."""
    rows = [list(row.values()) for row in rows_in(content)]
    assert all(len(row) == 2 for row in rows)
    return [(name, float(value) if value else None) for name, value in rows]


def doubled(*work: float | None) -> list[tuple[str, float | None]]:
    return [
        (f"r{number}", None if value is None else float(np.float32(2) * np.float32(round(value))))
        for number, value in enumerate(work)
    ]


# --- results ---


def test_a_csv_job_gives_what_onnxruntime_gives(
    bench: Bench, iris: pd.DataFrame, iris_csv: Path, iris_onnx: Path
) -> None:
    model = bench.register("iris", iris_onnx.read_bytes())
    job_id = bench.submit(model, iris_csv.read_bytes(), passthrough="all")
    with bench.worker():
        job = bench.wait(job_id)
    rows = rows_in(bench.result(job_id))
    session = onnxruntime.InferenceSession(bench.read(model_key(model.digest)))
    wanted = [column.name for column in model.signature.columns]
    labels, probabilities = session.run(None, {session.get_inputs()[0].name: iris[wanted].to_numpy(np.float32)})
    assert [row["prediction"] for row in rows] == list(labels)
    classes = [name for name in rows[0] if name.startswith("probability_")]
    got = np.array([[float(row[name]) for name in classes] for row in rows], np.float32)
    np.testing.assert_allclose(got, probabilities, rtol=1e-6)
    assert [float(row[wanted[0]]) for row in rows] == list(iris[wanted[0]])
    assert (job.rows_ok, job.rows_failed, job.chunks_total, job.chunks_done) == (150, 0, 15, 15)
    assert (job.attempt, job.progress, job.result and job.result.errors_key) == (1, 1.0, None)


def test_a_result_is_stored_as_its_job_says_and_its_parts_are_gone(bench: Bench, busy: bytes) -> None:
    model = bench.register("busy", busy)
    job_id = bench.submit(model, rows_of(*range(35)))
    with bench.worker():
        job = bench.wait(job_id)
    content = bench.result(job_id)
    assert answers(content) == doubled(*range(35))
    assert job.result is not None
    assert job.result.bytes == len(content)
    assert bench.parts(job_id) == {}
    assert bench.outcomes(job_id) == ["completed"]


def test_what_is_known_of_a_job_is_what_is_known_of_its_chunks(bench: Bench, busy: bytes) -> None:
    model = bench.register("busy", busy)
    job_id = bench.submit(model, rows_of(*range(40)))
    with bench.worker(chunk_records=10):
        job = bench.wait(job_id)
    with bench.database.read() as connection:
        done = plan.done_chunks(connection, job_id)
    assert len(done) == 4
    assert job.facts["model_seconds"] == pytest.approx(sum(one.facts["model_seconds"] for one in done))
    assert job.facts["model_seconds"] > 0


@pytest.mark.parametrize("records", [10, 1000])
def test_the_inputs_of_a_job_are_scored_in_their_order_each_in_chunks_of_its_own(
    bench: Bench, busy: bytes, records: int
) -> None:
    """Also inputs that are borrowed, whose length nobody knows before; records are counted over all of them."""
    model = bench.register("busy", busy)
    work: list[list[float | None]] = [[*range(15)], [15, None], [*range(17, 40)]]
    stored = [bench.store(f"lake/{number}", rows_of(*part)) for number, part in enumerate(work)]
    lent = [replace(one, bytes=None, sha256=None, owned=False) for one in stored]
    job_id = bench.queue(str(uuid7()), model, lent)
    with bench.worker(chunk_records=records):
        job = bench.wait(job_id)
    assert (job.state, job.rows_ok, job.rows_failed) == (JobState.COMPLETED, 39, 1)
    assert answers(bench.result(job_id)) == [answer for part in work for answer in doubled(*part)]
    assert [error["record"] for error in bench.errors(job)] == [16]
    with bench.database.read() as connection:
        assert {one.chunk.input for one in plan.done_chunks(connection, job_id)} == {0, 1, 2}


def test_a_job_of_several_inputs_goes_on_where_its_worker_died(bench: Bench, busy: bytes) -> None:
    model = bench.register("busy", busy)
    stored = [bench.store(f"inputs/of-{number}", rows_of(*range(10 * number, 10 * number + 10))) for number in range(3)]
    job_id = bench.queue(str(uuid7()), model, stored)
    with bench.database.write() as connection:
        execution.claim_due(connection, "dead", 0.1, bench.database.moment(connection), 1)
        first = scoring.plan_chunks(bench.plan_task(stored[0]))
        second = scoring.plan_chunks(replace(bench.plan_task(stored[1]), number=1, base=10))
        plan.add_chunks_if_mine(connection, job_id, 1, [*first.chunks, *second.chunks], complete=False)
    with bench.worker(chunk_records=4):
        job = bench.wait(job_id)
    assert (job.state, job.rows_ok, job.attempt) == (JobState.COMPLETED, 30, 2)
    parts = [range(10 * number, 10 * number + 10) for number in range(3)]
    assert answers(bench.result(job_id)) == [answer for part in parts for answer in doubled(*part)]


def test_many_small_jobs_each_get_their_own_rows(bench: Bench, busy: bytes) -> None:
    model = bench.register("busy", busy)
    wanted = {
        bench.submit(model, rows_of(*range(number, number + number % 23))): range(number, number + number % 23)
        for number in range(40)
    }
    with bench.worker():
        for job_id, work in wanted.items():
            bench.wait(job_id)
            assert answers(bench.result(job_id)) == doubled(*work)


def test_two_workers_share_the_jobs(bench: Bench, busy: bytes, second: float) -> None:
    model = bench.register("busy", busy)
    work = [second / 100] * 20
    names = [bench.submit(model, rows_of(*work)) for _ in range(6)]
    with bench.worker(active_jobs=1) as first, bench.worker(active_jobs=1) as other:
        other.name = first.name + "-b"
        for name in names:
            bench.wait(name)
    assert all(answers(bench.result(name)) == doubled(*work) for name in names)
    assert all(bench.outcomes(name) == ["completed"] for name in names)
    assert len({bench.get(name).worker for name in names}) == 2


def test_a_small_job_does_not_wait_for_a_huge_one(bench: Bench, busy: bytes, second: float) -> None:
    model = bench.register("busy", busy)
    huge = bench.submit(model, rows_of(*[second / 20] * 60))
    with bench.worker(chunk_records=1):
        bench.wait(huge, lambda job: job.chunks_done >= 5)
        small = bench.submit(model, rows_of(1))
        bench.wait(small)
        assert bench.get(huge).chunks_done < 40
        assert answers(bench.result(small)) == doubled(1)
        bench.wait(huge)
    assert answers(bench.result(huge)) == doubled(*[second / 20] * 60)


def test_progress_grows_and_ends_at_one(bench: Bench, busy: bytes, second: float) -> None:
    job_id = bench.submit(bench.register("busy", busy), rows_of(*[second / 50] * 40))
    seen = []

    def look(job: Job) -> bool:
        seen.append(job.progress)
        return job.state.finished

    with bench.worker(chunk_records=1):
        bench.wait(job_id, look)
    assert seen == sorted(seen)
    assert len({progress for progress in seen if 0 < progress < 1}) >= 5
    assert seen[-1] == 1.0


# --- records that cannot be scored ---

HOLES = [1.0, None, 3.0, None, *range(4, 40)]  # 40 records, 2 of them without a value


def test_a_record_that_cannot_be_scored_leaves_a_hole_and_a_reason(bench: Bench, busy: bytes) -> None:
    job_id = bench.submit(bench.register("busy", busy), rows_of(*HOLES), key="id")
    with bench.worker():
        job = bench.wait(job_id)
    assert answers(bench.result(job_id)) == doubled(*HOLES)
    assert (job.rows_ok, job.rows_failed) == (38, 2)
    assert [(error["record"], error["key"], error["column"]) for error in bench.errors(job)] == [
        (1, "r1", "work"),
        (3, "r3", "work"),
    ]


def test_an_output_with_too_few_rows_moves_no_answer_to_another_record(bench: Bench) -> None:
    work = [11, 12, 13, 14, 13, 16]
    job_id = bench.submit(bench.register("forgetful", graphs.forgetful()), rows_of(*work))
    with bench.worker():
        job = bench.wait(job_id)
    assert answers(bench.result(job_id)) == doubled(11, 12, None, 14, None, 16)
    assert [(error["record"], error["code"]) for error in bench.errors(job)] == [
        (2, "scoring-failed"),
        (4, "scoring-failed"),
    ]


@pytest.mark.parametrize(
    ("options", "state"),
    [
        ({"max_errors": 2.0}, JobState.COMPLETED),
        ({"max_errors": 1.0}, JobState.FAILED),
        ({"max_errors": 0.05}, JobState.COMPLETED),  # of 40
        ({"max_errors": 0.04}, JobState.FAILED),
        ({"max_errors": 0.0}, JobState.FAILED),
        ({"on_row_error": "fail"}, JobState.FAILED),
    ],
)
def test_a_job_fails_when_more_records_fail_than_it_allows(
    bench: Bench, busy: bytes, options: dict[str, Any], state: JobState
) -> None:
    job_id = bench.submit(bench.register("busy", busy), rows_of(*HOLES), **options)
    with bench.worker():
        job = bench.wait(job_id)
    assert job.state == state
    if state is JobState.FAILED:
        assert job.reason == "too-many-row-errors"
        assert job.error is not None
        assert "2 record" in job.error["message"]


def test_a_job_that_failed_too_many_records_is_not_saved_by_a_crash(bench: Bench, busy: bytes) -> None:
    """Its worker died after the last chunk was committed, and before it could fail the job."""
    job_id = bench.submit(bench.register("busy", busy), rows_of(None, None, 1), max_errors=0.5)
    with bench.database.write() as connection:
        moment = bench.database.moment(connection)
        execution.claim_due(connection, "dead", 0.1, moment, 1)
        plan.add_chunks_if_mine(connection, job_id, 1, [Chunk(0, 3, 8, 20)], complete=True)
        plan.commit_chunk_if_mine(connection, job_id, 1, ScoredChunk(Chunk(0, 3, 8, 20), 2, 10, "", 10), 0.9)
    with bench.worker():
        job = bench.wait(job_id)
    assert (job.state, job.reason, job.attempt) == (JobState.FAILED, "too-many-row-errors", 2)


def test_a_record_that_needs_too_much_memory_fails_alone(tmp_path: Path) -> None:
    work = [1, 2, 100_000, 4, 5]
    with Runtime.open(Settings(storage=str(tmp_path / "store"), **SHORT)) as runtime:
        bench = Bench(runtime.settings, runtime.database, runtime.storage, runtime.engine)
        job_id = bench.submit(bench.register("greedy", graphs.greedy()), rows_of(*work))
        with bench.worker():
            job = bench.wait(job_id)
        assert answers(bench.result(job_id)) == doubled(1, 2, None, 4, 5)
        assert [(error["record"], error["code"]) for error in bench.errors(job)] == [(2, "out-of-memory")]


def test_a_record_is_scored_alike_whatever_model_ran_before_it(tmp_path: Path) -> None:
    """A process keeps models loaded, and what they hold is missing to the next one."""
    large = graphs.large(150 * 2**20)
    chosen = Settings(storage=str(tmp_path / "store"), **(SHORT | {"processes": 1, "process_memory": 1000 * 2**20}))
    with Runtime.open(chosen) as runtime:
        bench = Bench(runtime.settings, runtime.database, runtime.storage, runtime.engine)
        other, greedy = bench.register("large", large), bench.register("greedy", graphs.greedy())
        with bench.worker():
            bench.wait(bench.submit(other, rows_of(1)))
            job = bench.wait(bench.submit(greedy, rows_of(450)))
        assert (job.rows_ok, job.rows_failed) == (1, 0)


# --- crashes ---


def test_a_model_that_must_see_all_records_is_never_given_half_of_them(tmp_path: Path) -> None:
    chosen = Settings(storage=str(tmp_path / "store"), **(SHORT | {"process_memory": 600 * 2**20}))
    with Runtime.open(chosen) as runtime:
        bench = Bench(runtime.settings, runtime.database, runtime.storage, runtime.engine)
        model = bench.register("centred", graphs.centred())
        assert model.signature.mode == "whole"
        job_id = bench.submit(model, rows_of(*range(15_000)))
        with bench.worker():
            job = bench.wait(job_id)
    assert (job.state, job.reason, job.chunks_done) == (JobState.FAILED, "out-of-memory", 0)


def test_a_poisonous_record_fails_its_job_after_three_tries_and_no_other(bench: Bench, busy: bytes) -> None:
    model = bench.register("busy", busy)
    poisoned = bench.submit(model, rows_of(*range(10), 1, 1, FOREVER, *range(7), *range(10)))
    with bench.worker(chunk_timeout=3.0):
        others = [bench.submit(model, rows_of(*range(25))) for _ in range(3)]
        for other in others:
            bench.wait(other)
            assert answers(bench.result(other)) == doubled(*range(25))
        job = bench.wait(poisoned)
    assert (job.state, job.reason, job.attempt) == (JobState.FAILED, "scoring-timeout", 1)
    assert job.error is not None
    assert "this was try 3 at records 10 to 14" in job.error["message"]
    with bench.database.read() as connection:
        left = [(chunk.first_record, chunk.records) for chunk in plan.pending_chunks(connection, poisoned)]
        committed = plan.done_chunks(connection, poisoned)
    done = [(one.chunk.first_record, one.chunk.records) for one in committed]
    assert (10, 5) in left
    assert sorted(left + done) == [(0, 10), (10, 5), (15, 5), (20, 10)]
    assert (0, 10) in done


def test_a_scoring_process_that_is_killed_costs_one_try(bench: Bench, busy: bytes, second: float) -> None:
    work = [second / 4] * 8
    job_id = bench.submit(bench.register("busy", busy), rows_of(*work))
    with bench.worker(chunk_records=1):
        bench.wait(job_id, lambda job: job.chunks_done >= 1)
        os.kill(scoring_process(), signal.SIGKILL)
        job = bench.wait(job_id)
    assert answers(bench.result(job_id)) == doubled(*work)
    assert job.attempt == 1


def scoring_process() -> int:
    """The child of this process that works hardest just now."""
    children = Path(f"/proc/{os.getpid()}/task").glob("*/children")
    processes = [int(pid) for listed in children for pid in listed.read_text().split()]

    def ticks() -> dict[int, int]:
        return {pid: int(Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()[11]) for pid in processes}

    before = ticks()
    time.sleep(0.15)
    after = ticks()
    return max(processes, key=lambda pid: after[pid] - before[pid])


# --- cancelling ---


def test_a_job_that_was_cancelled_in_the_queue_never_runs(bench: Bench, busy: bytes) -> None:
    model = bench.register("busy", busy)
    cancelled, other = bench.submit(model, rows_of(1)), bench.submit(model, rows_of(1))
    bench.cancel(cancelled)
    with bench.worker():
        bench.wait(other)
    assert bench.get(cancelled).state == JobState.CANCELLED
    assert bench.outcomes(cancelled) == []


def test_a_running_job_is_cancelled_and_keeps_what_is_done(bench: Bench, busy: bytes, second: float) -> None:
    job_id = bench.submit(bench.register("busy", busy), rows_of(*[second / 10] * 200))
    with bench.worker(chunk_records=1):
        bench.wait(job_id, lambda job: job.chunks_done >= 3)
        bench.cancel(job_id)
        asked = time.monotonic()
        job = bench.wait(job_id)
        assert time.monotonic() - asked < 3.0
    assert (job.state, bench.outcomes(job_id)) == (JobState.CANCELLED, ["cancelled"])
    with bench.database.read() as connection:
        done = plan.done_chunks(connection, job_id)
    assert len(done) == job.chunks_done >= 3
    for one in done:
        assert len(bench.read(part_key(job_id, one.chunk.first_record, one.attempt))) == one.part_bytes


def test_a_chunk_that_does_not_end_is_killed_by_a_cancel(bench: Bench, busy: bytes) -> None:
    model = bench.register("busy", busy)
    endless = bench.submit(model, rows_of(FOREVER))
    with bench.worker():
        bench.wait(endless, lambda job: job.state is JobState.RUNNING)
        time.sleep(0.3)
        bench.cancel(endless)
        asked = time.monotonic()
        assert bench.wait(endless).state == JobState.CANCELLED
        assert time.monotonic() - asked < 3.0
        after = [bench.submit(model, rows_of(number)) for number in range(4)]
        assert [answers(bench.result(bench.wait(name).id)) for name in after] == [doubled(n) for n in range(4)]


# --- stopping, and going on ---


def test_another_worker_goes_on_where_one_stopped(bench: Bench, busy: bytes, second: float) -> None:
    model = bench.register("busy", busy)
    work = [second / 20 + number for number in range(40)]
    undisturbed, stopped = bench.submit(model, rows_of(*work)), bench.submit(model, rows_of(*work))
    with bench.worker(chunk_records=2, active_jobs=1):
        bench.wait(undisturbed)
        bench.wait(stopped, lambda job: job.chunks_done >= 3)
    released = bench.get(stopped)
    assert (released.state, released.worker) == (JobState.QUEUED, None)
    assert 3 <= released.chunks_done < 20
    kept = bench.parts(stopped)
    assert len(kept) == released.chunks_done  # nothing was under way any more
    with bench.database.read() as connection:
        done = plan.done_chunks(connection, stopped)
    with bench.worker(chunk_records=7):  # the chunks stay as they were planned
        bench.wait(stopped, lambda job: job.chunks_done > released.chunks_done)
        if not bench.get(stopped).state.finished:
            written = bench.parts(stopped)
            assert all(written.get(key, when) == when for key, when in kept.items())
        job = bench.wait(stopped)
    with bench.database.read() as connection:
        whole = plan.done_chunks(connection, stopped)
    assert whole[: len(done)] == done
    assert {one.attempt for one in whole} == {1, 2}
    assert bench.result(stopped) == bench.result(undisturbed)
    assert (job.attempt, bench.outcomes(stopped)) == (2, ["released", "completed"])
    assert answers(bench.result(stopped)) == doubled(*work)


def test_a_worker_that_stops_kills_what_outlasts_its_grace(bench: Bench, busy: bytes) -> None:
    job_id = bench.submit(bench.register("busy", busy), rows_of(FOREVER))
    with bench.worker(grace=0.3):
        bench.wait(job_id, lambda job: job.state is JobState.RUNNING)
        stopping = time.monotonic()
    assert time.monotonic() - stopping < 3.0
    assert bench.get(job_id).state == JobState.QUEUED
    bench.cancel(job_id)


def test_a_cancelled_job_of_a_worker_that_stops_is_not_queued_again(bench: Bench, busy: bytes) -> None:
    job_id = bench.submit(bench.register("busy", busy), rows_of(FOREVER))
    with bench.worker(grace=0.3, cancel_grace=60.0):
        bench.wait(job_id, lambda job: job.state is JobState.RUNNING)
        bench.cancel(job_id)
    assert bench.get(job_id).state == JobState.CANCELLED


# --- leases ---


def test_a_worker_that_lost_its_lease_writes_nothing_more(bench: Bench, busy: bytes, second: float) -> None:
    model = bench.register("busy", busy)
    job_id = bench.submit(model, rows_of(*[second / 10] * 60))
    with bench.worker(chunk_records=1):
        bench.wait(job_id, lambda job: job.chunks_done >= 3)
        with bench.database.write() as connection:  # as another worker would, after a rescue
            moment = bench.database.moment(connection)
            taken = update(job_rows).where(job_rows.c.id == job_id)
            connection.execute(
                taken.values(attempt=2, worker="another", lease_until=moment.steady + 600, lease_clock=moment.clock)
            )
        before = bench.get(job_id)
        other = bench.submit(model, rows_of(1))
        bench.wait(other)
        time.sleep(1.0)
        assert bench.get(job_id) == before
        written = bench.parts(job_id)
        time.sleep(0.5)
        assert bench.parts(job_id) == written
    assert bench.get(job_id) == before


@pytest.mark.slow
def test_a_worker_whose_own_leases_lapse_takes_its_jobs_up_again(
    bench: Bench, busy: bytes, second: float, capsys: pytest.CaptureFixture[str]
) -> None:
    """It could not reach the database for a while: its heartbeat comes too late every time."""
    work = [second / 10 + number for number in range(140)]
    model = bench.register("busy", busy)
    job_id = bench.submit(model, rows_of(*work))
    with bench.worker(chunk_records=1, lease=2.0, heartbeat=60.0) as worker:
        job = bench.wait(job_id)
        assert answers(bench.result(job_id)) == doubled(*work)
        assert job.attempt > 1
        assert set(bench.outcomes(job_id)) == {"lost", "completed"}
        assert job.rows_ok == 140
        after = bench.submit(model, rows_of(1))
        worker.wake()
        assert bench.wait(after).state == JobState.COMPLETED
    assert "worker_error" not in capsys.readouterr().out


@pytest.mark.slow
def test_a_heartbeat_that_fails_is_tried_again(
    bench: Bench, busy: bytes, second: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The database's disk is full for a moment. The lease lasts for several heartbeats."""
    failures = iter(range(2))
    renew = execution.renew_lease_if_mine

    def renew_on_a_full_disk(*arguments: Any) -> None:
        if next(failures, None) is not None:
            raise InsufficientStorage("the database's disk is full")
        renew(*arguments)

    monkeypatch.setattr(execution, "renew_lease_if_mine", renew_on_a_full_disk)
    job_id = bench.submit(bench.register("busy", busy), rows_of(*[second / 5] * 40))
    with bench.worker(chunk_records=1, lease=2.0):
        job = bench.wait(job_id)
    assert next(failures, None) is None
    assert (job.state, job.attempt) == (JobState.COMPLETED, 1)


def test_a_job_of_a_dead_worker_is_taken_up_within_its_lease(bench: Bench, busy: bytes) -> None:
    job_id = bench.submit(bench.register("busy", busy), rows_of(*range(30)))
    with bench.database.write() as connection:
        execution.claim_due(connection, "dead", 1.0, bench.database.moment(connection), 1)
    claimed = time.monotonic()
    with bench.worker():
        job = bench.wait(job_id)
    assert 0.9 < time.monotonic() - claimed < 10.0
    assert (job.attempt, bench.outcomes(job_id)) == (2, ["lost", "completed"])
    parts = [range(10 * number, 10 * number + 10) for number in range(3)]
    assert answers(bench.result(job_id)) == [answer for part in parts for answer in doubled(*part)]


def test_a_job_of_an_earlier_boot_is_taken_up_at_once(bench: Bench, busy: bytes) -> None:
    job_id = bench.submit(bench.register("busy", busy), rows_of(1))
    with bench.database.write() as connection:
        now = bench.database.moment(connection)
        execution.claim_due(connection, "dead", 3600.0, Moment(now.wall, now.steady, "an earlier boot"), 1)
    with bench.worker():
        job = bench.wait(job_id)
    assert (job.state, job.attempt) == (JobState.COMPLETED, 2)


# --- a full disk ---


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.geteuid() != 0:
        pytest.skip("mounting a file system needs root")
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(disk)]
    mounted = subprocess.run(mount, check=False, capture_output=True, text=True)
    if mounted.returncode != 0:
        pytest.skip(f"file systems cannot be mounted here: {mounted.stderr.strip()}")
    try:
        yield disk
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


def test_a_job_waits_while_the_disk_is_full(
    tmp_path: Path, tiny_disk: Path, engine: Engine, busy: bytes, second: float
) -> None:
    work: Sequence[float] = [second / 20] * 30
    with opened(tmp_path, tiny_disk / "store", engine, chunk_records=1) as bench:
        job_id = bench.submit(bench.register("busy", busy), rows_of(*work))
        with bench.worker():
            bench.wait(job_id, lambda job: job.chunks_done >= 2)
            filler = tiny_disk / "filler"
            fill(filler)
            time.sleep(1.0)
            stuck = bench.get(job_id)
            assert stuck.state == JobState.RUNNING
            time.sleep(0.5)
            assert bench.get(job_id).chunks_done == stuck.chunks_done < 30
            filler.unlink()
            job = bench.wait(job_id)
        assert answers(bench.result(job_id)) == doubled(*work)
        assert job.attempt == 1


def fill(path: Path) -> None:
    with path.open("wb", buffering=0) as file:
        try:
            while file.write(bytes(4096)):
                pass
        except OSError:
            return


# --- all of it together ---


def test_a_runtime_opens_what_a_worker_needs(tmp_path: Path, busy: bytes) -> None:
    with Runtime.open(Settings(storage=str(tmp_path / "store"), **SHORT)) as runtime:
        bench = Bench(runtime.settings, runtime.database, runtime.storage, runtime.engine)
        job_id = bench.submit(bench.register("busy", busy), rows_of(*range(100)))
        with bench.worker():
            bench.wait(job_id)
        assert answers(bench.result(job_id)) == doubled(*range(100))


def test_an_idempotency_key_is_forgotten_after_its_hours(bench: Bench) -> None:
    with bench.database.write() as connection:
        idempotency.remember(connection, "old", "content", "job", 201, time.time() - 3700)
        idempotency.remember(connection, "young", "content", "job", 201, time.time() - 3500)

    def known() -> list[str]:
        with bench.database.read() as connection:
            return [key for key in ("old", "young") if idempotency.recall(connection, key, "content")]

    with bench.worker(idempotency_hours=1.0):
        deadline = time.monotonic() + TIMEOUT
        while known() != ["young"] and time.monotonic() < deadline:
            time.sleep(0.02)
    assert known() == ["young"]


def test_a_worker_removes_at_its_start_what_a_crash_left_behind(bench: Bench, busy: bytes) -> None:
    kept = bench.submit(bench.register("busy", busy), rows_of(1))
    time.sleep(0.05)  # files are dated by a coarse clock, and what seems older than the first job stays
    with bench.storage.create("uploads/orphan") as writer:
        writer.write(b"nobody's")
        writer.commit()
    with bench.worker(sweep_age=0.0001):
        bench.wait(kept)
        deadline = time.monotonic() + TIMEOUT
        while list(bench.storage.list("uploads/")) and time.monotonic() < deadline:
            time.sleep(0.02)
    assert not list(bench.storage.list("uploads/"))
    assert bench.read(input_key(kept)) == rows_of(1)


def test_chunks_of_parquet_are_twice_as_large_as_those_of_text(bench: Bench, busy: bytes) -> None:
    model = replace(bench.register("m", busy), signature=replace(admit(busy).signature, records_per_second=None))
    text, parquet = (chunk_limits(bench.runtime.settings, model, name) for name in ("csv", "parquet"))
    assert (parquet.bytes, parquet.records) == (2 * text.bytes, 2 * text.records)
