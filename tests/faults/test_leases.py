"""Many workers and writers on one database, and a wall clock that jumps.

A worker that is paused for longer than its lease and resumes: tests/test_crashes.py.
"""

import os
import shutil
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import httpx2
import postgres
import pytest
from commands import FAST, Service
from sqlalchemy import Connection, create_engine, text

from faults import steps
from faults.processes import Step, take

pytestmark = [pytest.mark.faults, pytest.mark.timeout(180)]

SHORT_LEASES: dict[str, Any] = {"lease": 0.2, "heartbeat": 0.1, "crashes": 1000}
COMMITS = "CREATE TABLE commits (job_id TEXT, first_record INTEGER)"
COMMIT = "watch AFTER UPDATE OF attempt ON chunks"
COMMITTED = "INSERT INTO commits VALUES (new.job_id, new.first_record);"
WATCH = {
    "sqlite": (
        COMMITS,
        f"CREATE TRIGGER {COMMIT} WHEN new.attempt IS NOT NULL BEGIN {COMMITTED} END",
    ),
    "postgresql": (
        COMMITS,
        f"CREATE FUNCTION watch() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN {COMMITTED} RETURN NULL; END $$",
        f"CREATE TRIGGER {COMMIT} FOR EACH ROW WHEN (new.attempt IS NOT NULL) EXECUTE FUNCTION watch()",
    ),
}
HOLD = {"sqlite": ("BEGIN IMMEDIATE",), "postgresql": ("BEGIN", "LOCK TABLE jobs IN EXCLUSIVE MODE")}
UNWATCH = {"sqlite": "DROP TRIGGER watch", "postgresql": "DROP TRIGGER watch ON chunks"}


@pytest.fixture(scope="module")
def prepared(fast_folder: Path, iris_onnx: Path) -> Path:
    """A storage with six queued jobs of 61 chunks each."""
    storage = fast_folder / "prepared"
    take("prepare", storage, model=str(iris_onnx))
    take("submit", storage, count=6, rows=1500)
    return storage


@pytest.fixture
def storage(prepared: Path) -> Iterator[Path]:
    with TemporaryDirectory(dir=prepared.parent, ignore_cleanup_errors=True) as folder:
        copy = Path(folder) / "storage"
        postgres.copy_installation(prepared, copy)
        yield copy
        postgres.remove_installation(copy)


@pytest.fixture(scope="module")
def undisturbed(prepared: Path) -> dict[str, Any]:
    """The jobs after a run of one worker without faults."""
    copy = prepared.with_name("alone")
    postgres.copy_installation(prepared, copy)
    take("run", copy)
    jobs: dict[str, Any] = take("recover", copy).the("jobs")["jobs"]
    return jobs


@pytest.mark.parametrize("workers", [2, 8])
def test_workers_that_die_and_lose_their_leases_commit_each_chunk_once(
    storage: Path, undisturbed: dict[str, Any], workers: int, tried: Counter[str]
) -> None:
    killed = 0
    with _connected(storage) as connection:
        kind = connection.dialect.name
        for statement in WATCH[kind]:
            connection.execute(text(statement))
        working = dict(_worker(storage) for _ in range(workers))
        while killed < 6 and (holder := _holder_of_a_lease(connection, working)) is not None:
            worker = working.pop(holder)
            worker.process.kill()
            worker.end()
            killed += 1
            working.update([_worker(storage)])
        assert all(worker.end().is_done for worker in working.values())
        commits = connection.scalars(text("SELECT count(*) FROM commits GROUP BY job_id, first_record")).all()
        lost = connection.scalar(text("SELECT count(*) FROM attempts WHERE outcome = 'lost'")) or 0
        connection.execute(text(UNWATCH[kind]))
    assert commits == [1] * 6 * 61
    assert 0 < killed <= lost
    assert take("recover", storage).the("jobs")["jobs"] == undisturbed
    tried[f"killed workers of {workers}"] += killed
    tried[f"lost leases of {workers} workers"] += lost


@contextmanager
def _connected(storage: Path) -> Iterator[Connection]:
    """Each statement is a transaction."""
    engine = create_engine(postgres.address_of(storage), isolation_level="AUTOCOMMIT")
    try:
        with engine.connect() as connection:
            yield connection
    finally:
        engine.dispose()


def _holder_of_a_lease(connection: Connection, working: Collection[int]) -> int | None:
    """The process of a worker in the middle of a job, stopped there; None when no job is left."""
    while connection.scalar(text("SELECT count(*) FROM jobs WHERE state IN ('queued', 'running')")):
        for holder in _holders(connection).intersection(working):
            os.kill(holder, signal.SIGSTOP)
            if holder in _holders(connection):
                return holder
            os.kill(holder, signal.SIGCONT)  # its job has ended or has another worker meanwhile
        time.sleep(0.005)
    return None


def _holders(connection: Connection) -> set[int]:
    running = "SELECT worker FROM jobs WHERE state = 'running' AND chunks_done BETWEEN 3 AND 50"
    return {int(worker.rpartition("-")[2]) for worker in connection.scalars(text(running))}


def _worker(storage: Path) -> tuple[int, Step]:
    """A worker by its process."""
    worker = Step("help_out", storage, settings=SHORT_LEASES).begin()
    assert worker.process.pid is not None
    return worker.process.pid, worker


def test_eight_writers_wait_for_a_lock_that_is_held_for_three_seconds(storage: Path, tried: Counter[str]) -> None:
    writers = [Step("submit", storage, count=4) for _ in range(8)]
    with _connected(storage) as holder:
        for statement in HOLD[holder.dialect.name]:
            holder.execute(text(statement))
        for writer in writers:
            writer.begin()
        time.sleep(3)
        holder.execute(text("COMMIT"))
    ended = [writer.end() for writer in writers]
    assert [event["status"] for end in ended for event in end.all("answered")] == [202] * 32
    found = take("recover", storage).the("jobs")["jobs"]
    for queued in (event for end in ended for event in end.all("queued")):
        assert found[queued["id"]]["state"] == "completed"
        assert found[queued["id"]]["input"] == queued["sha256"]
    tried["writers at a lock"] += 8


@pytest.fixture
def clock(tmp_path: Path) -> Path:
    """A file with the offset of the wall clock."""
    if shutil.which("faketime") is None:
        pytest.skip("faketime is not installed")
    path = tmp_path / "clock"
    path.write_text("+0")
    return path


def test_a_wall_clock_that_jumps_by_a_day_neither_stalls_nor_repeats_a_job(
    tmp_path: Path, clock: Path, iris_onnx: Path, tried: Counter[str]
) -> None:
    library = subprocess.run(
        ["faketime", "-f", "+0", "printenv", "LD_PRELOAD"], check=True, capture_output=True, text=True
    )
    faked = {
        # Longer than any wait for a processor core, and far shorter than a jump.
        "BATCHSERVE_LEASE": "20",
        "BATCHSERVE_HEARTBEAT": "2",
        "LD_PRELOAD": library.stdout.strip(),
        "FAKETIME_TIMESTAMP_FILE": str(clock),
        "FAKETIME_NO_CACHE": "1",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
    }
    service = Service(tmp_path, "serve", "--port", "0", settings=FAST | faked)
    try:
        url = service.wait_for(r" at (http://\S+) ")[1]
        assert httpx2.put(f"{url}/v1/models/iris", content=iris_onnx.read_bytes(), timeout=60).is_success
        table = steps.HEADER + "".join(steps.ROWS) * 60_000
        query: dict[str, Any] = {"model": "iris", "reuse": False}

        def finished(job: dict[str, Any], jumps: tuple[str, ...]) -> dict[str, Any]:
            left = list(jumps)
            while job["state"] in ("uploaded", "queued", "running"):
                job = httpx2.get(f"{url}/v1/jobs/{job['id']}", timeout=30).json()
                if left and job["chunks"]["done"] >= 3 * (len(jumps) - len(left)) + 2:
                    clock.write_text(left.pop(0))
            assert not left, f"the job ended before the clock jumped to {left}"
            return job

        jumped = finished(httpx2.post(f"{url}/v1/predict", params=query, content=table, timeout=60).json(),
                          ("+1d", "-1d", "+0"))  # fmt: skip
        calm = finished(httpx2.post(f"{url}/v1/predict", params=query, content=table, timeout=60).json(), ())
        assert (jumped["state"], jumped["attempt"]) == (calm["state"], calm["attempt"]) == ("completed", 1)
        assert jumped["result"]["sha256"] == calm["result"]["sha256"]
    finally:
        service.end(signal.SIGTERM)
        for left in Path("/dev/shm").glob(f"*faketime_*_{service.process.pid}"):  # noqa: S108 - by the library
            left.unlink()
    tried["clock jumps"] += 3


@pytest.mark.parametrize("jump", ["+5y", "-5y"])
def test_a_wall_clock_that_jumps_by_years_makes_no_second_job_and_removes_nothing(
    tmp_path: Path, clock: Path, iris_onnx: Path, jump: str, tried: Counter[str]
) -> None:
    library = subprocess.run(
        ["faketime", "-f", "+0", "printenv", "LD_PRELOAD"], check=True, capture_output=True, text=True
    )
    faked = {
        "BATCHSERVE_LEASE": "20",
        "BATCHSERVE_HEARTBEAT": "2",
        "BATCHSERVE_KEEP_RESULTS": "30d",
        "LD_PRELOAD": library.stdout.strip(),
        "FAKETIME_TIMESTAMP_FILE": str(clock),
        "FAKETIME_NO_CACHE": "1",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
    }
    headers = {"idempotency-key": "night", "prefer": "wait=30"}

    def served(jumps: tuple[str, ...]) -> list[dict[str, Any]]:
        """The answers to one request that is repeated while the clock jumps."""
        service = Service(tmp_path, "serve", "--port", "0", settings=FAST | faked)
        try:
            url = service.wait_for(r" at (http://\S+) ")[1]
            with httpx2.Client(base_url=url, timeout=60) as http:
                assert http.put("/v1/models/iris", content=iris_onnx.read_bytes()).is_success
                answers = []
                for now in jumps:
                    clock.write_text(now)
                    time.sleep(1.5)  # several rescues
                    body = steps.HEADER + steps.ROWS[0]
                    answer = http.post("/v1/predict", params={"model": "iris"}, content=body, headers=headers)
                    answers.append(answer.json())
                    assert http.get(answers[-1]["links"]["result"]).is_success
                assert len(http.get("/v1/jobs").json()["jobs"]) == 1
                return answers
        finally:
            service.end(signal.SIGTERM)
            for left in Path("/dev/shm").glob(f"*faketime_*_{service.process.pid}"):  # noqa: S108 - by the library
                left.unlink()

    answers = served(("+0", jump)) + served((jump, "+0", jump))  # also across a restart
    assert {(answer["id"], answer["state"]) for answer in answers} == {(answers[0]["id"], "completed")}
    tried["clock jumps"] += 4
