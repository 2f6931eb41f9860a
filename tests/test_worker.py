"""The worker over a real database, storage and scoring processes, with real models."""

import os
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import graphs
import numpy as np
import onnxruntime
import pandas as pd
import pytest
from bench import SHORT, TIMEOUT, Bench, answers, doubled, opened, rows_in, rows_of
from uuid_utils import uuid7

from batchserve.admission import admit
from batchserve.domain import Chunk, JobState, ScoredChunk
from batchserve.engines import Engine, open_engine
from batchserve.jobs import execution, plan
from batchserve.runtime import Runtime
from batchserve.scoring.planning import plan_chunks
from batchserve.settings import Settings
from batchserve.storage import model_key
from batchserve.worker.limits import chunk_limits

FOREVER = 1e12


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """Starting processes takes longer than most tests, so they share two."""
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


@pytest.fixture
def bench(database_url: str, tmp_path: Path, engine: Engine) -> Iterator[Bench]:
    with opened(database_url, tmp_path / "store", engine, chunk_records=10) as bench:
        yield bench


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


def test_the_facts_of_a_job_are_those_of_its_chunks(bench: Bench, busy: bytes) -> None:
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
    """Also borrowed inputs, whose length is not known beforehand; records are counted over all of them."""
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


def test_a_job_of_several_inputs_resumes_where_its_worker_died(bench: Bench, busy: bytes) -> None:
    model = bench.register("busy", busy)
    stored = [bench.store(f"inputs/of-{number}", rows_of(*range(10 * number, 10 * number + 10))) for number in range(3)]
    job_id = bench.queue(str(uuid7()), model, stored)
    with bench.database.write() as connection:
        execution.claim_due(connection, "dead", 0.1, bench.database.moment(connection), 1)
        first = plan_chunks(bench.plan_task(stored[0]))
        second = plan_chunks(replace(bench.plan_task(stored[1]), number=1, base=10))
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


def test_two_workers_share_the_jobs(bench: Bench, busy: bytes) -> None:
    """One takes no further job while it has as many as it may, and the other does them."""
    model = bench.register("busy", busy)
    endless = bench.submit(model, rows_of(FOREVER))
    with bench.worker(active_jobs=1) as first:
        bench.wait(endless, lambda job: job.state is JobState.RUNNING)
        with bench.worker(active_jobs=1) as other:
            other.name = f"{first.name}-b"
            names = [bench.submit(model, rows_of(*range(20))) for _ in range(6)]
            for name in names:
                bench.wait(name)
        assert bench.get(endless).state is JobState.RUNNING
        bench.cancel(endless)
        bench.wait(endless)
    assert all(answers(bench.result(name)) == doubled(*range(20)) for name in names)
    assert all(bench.outcomes(name) == ["completed"] for name in names)
    assert {bench.get(name).worker for name in names} == {other.name} != {first.name}


# --- records that cannot be scored ---

HOLES = [1.0, None, 3.0, None, *range(4, 40)]  # 40 records, 2 of them without a value


def test_a_record_that_cannot_be_scored_gives_an_empty_row_and_a_reason(bench: Bench, busy: bytes) -> None:
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


@pytest.mark.slow
def test_a_record_is_scored_alike_whatever_model_ran_before_it(tmp_path: Path) -> None:
    """A process keeps models loaded, and their memory is not available to the next one."""
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


@pytest.mark.slow
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


def test_a_scoring_process_that_is_killed_costs_one_try(bench: Bench, busy: bytes, second: float) -> None:
    work, model = [second / 4] * 8, bench.register("busy", busy)
    with bench.worker(chunk_records=1):
        killed, job_id = None, ""
        while killed is None:  # it was too quick
            job_id = bench.submit(model, rows_of(*work))
            bench.wait(job_id, lambda job: job.chunks_done >= 1)
            killed = scoring_process(bench, job_id)
        os.kill(killed, signal.SIGKILL)
        job = bench.wait(job_id)
    assert answers(bench.result(job_id)) == doubled(*work)
    assert job.attempt == 1


def scoring_process(bench: Bench, job_id: str) -> int | None:
    """A scoring process that works on this job; None when it is finished. Servers of a database may be children of
    this process, too."""
    children = Path(f"/proc/{os.getpid()}/task").glob("*/children")
    pids = [int(pid) for listed in children for pid in listed.read_text().split()]
    processes = [pid for pid in pids if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]

    def ticks() -> dict[int, int]:
        return {pid: int(Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()[11]) for pid in processes}

    before = ticks()
    while not bench.get(job_id).state.finished:
        after = ticks()
        busiest = max(processes, key=lambda pid: after[pid] - before[pid])
        if after[busiest] - before[busiest] > 5:
            return busiest
        time.sleep(0.01)
    return None


# --- cancelling ---


def test_a_job_that_was_cancelled_in_the_queue_never_runs(bench: Bench, busy: bytes) -> None:
    model = bench.register("busy", busy)
    cancelled, other = bench.submit(model, rows_of(1)), bench.submit(model, rows_of(1))
    bench.cancel(cancelled)
    with bench.worker():
        bench.wait(other)
    assert bench.get(cancelled).state == JobState.CANCELLED
    assert bench.outcomes(cancelled) == []


def test_a_chunk_that_does_not_end_is_killed_by_a_cancel(bench: Bench, busy: bytes) -> None:
    model = bench.register("busy", busy)
    endless = bench.submit(model, rows_of(FOREVER))
    with bench.worker():
        bench.wait(endless, lambda job: job.state is JobState.RUNNING)
        bench.cancel(endless)
        assert bench.wait(endless).state == JobState.CANCELLED
        after = [bench.submit(model, rows_of(number)) for number in range(4)]
        assert [answers(bench.result(bench.wait(name).id)) for name in after] == [doubled(n) for n in range(4)]


# --- leases and housekeeping ---


@pytest.mark.slow
def test_a_lease_is_kept_for_as_long_as_its_job_runs(bench: Bench, busy: bytes, second: float) -> None:
    job_id = bench.submit(bench.register("busy", busy), rows_of(*[second / 5] * 24))
    with bench.worker(chunk_records=1, lease=2.0, heartbeat=0.2):
        bench.wait(job_id)
    assert bench.outcomes(job_id) == ["completed"]


def test_a_worker_removes_at_its_start_what_a_crash_left_behind(bench: Bench, busy: bytes) -> None:
    bench.submit(bench.register("busy", busy), rows_of(1))
    time.sleep(0.05)  # files are dated by a coarse clock, and those that seem older than the first job stay
    with bench.storage.create("uploads/orphan") as writer:
        writer.write(b"of no job")
        writer.commit()
    with bench.worker(sweep_age=0.0001):
        deadline = time.monotonic() + TIMEOUT
        while list(bench.storage.list("uploads/")) and time.monotonic() < deadline:
            time.sleep(0.02)
    assert not list(bench.storage.list("uploads/"))


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
    database_url: str, tiny_disk: Path, engine: Engine, busy: bytes, second: float, capsys: pytest.CaptureFixture[str]
) -> None:
    work: Sequence[float] = [second / 20] * 30
    with opened(database_url, tiny_disk / "store", engine, chunk_records=1) as bench:
        job_id = bench.submit(bench.register("busy", busy), rows_of(*work))
        filler = tiny_disk / "filler"
        fill(filler)
        with bench.worker():
            bench.wait(job_id, lambda _: "job_wait" in capsys.readouterr().out)
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


# --- the runtime ---


def test_a_runtime_opens_what_a_worker_needs(tmp_path: Path, busy: bytes) -> None:
    with Runtime.open(Settings(storage=str(tmp_path / "store"), **SHORT)) as runtime:
        bench = Bench(runtime.settings, runtime.database, runtime.storage, runtime.engine)
        job_id = bench.submit(bench.register("busy", busy), rows_of(*range(100)))
        with bench.worker():
            bench.wait(job_id)
        assert answers(bench.result(job_id)) == doubled(*range(100))


def test_chunks_of_parquet_are_twice_as_large_as_those_of_text(bench: Bench, busy: bytes) -> None:
    model = replace(bench.register("m", busy), signature=replace(admit(busy).signature, records_per_second=None))
    text, parquet = (chunk_limits(bench.runtime.settings, model, name) for name in ("csv", "parquet"))
    assert (parquet.bytes, parquet.records) == (2 * text.bytes, 2 * text.records)
