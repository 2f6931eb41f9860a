"""Jobs on PostgreSQL, an object store and a Ray cluster whose servers fail, and those of several drivers.

The losses of hosts and drivers are those of `test_ray.py`. Each test leaves both servers and both hosts.
"""

import subprocess
import sys
import time
from contextlib import suppress
from typing import Any

import graphs
import pytest
from bench import Bench, answers, doubled, rows_of
from proxy import Mode
from ray_hosts import Cluster
from ray_servers import Servers, bench_on, worker_environment
from structlog.testing import capture_logs
from waiting import until

from batchserve.domain import JobState
from batchserve.errors import Unavailable
from batchserve.jobs import queries

pytestmark = [pytest.mark.ray, pytest.mark.timeout(180)]

RECORDS = 24


@pytest.fixture(scope="module")
def busy() -> bytes:
    return graphs.busy()


@pytest.fixture(scope="module")
def work(busy: bytes) -> list[int]:
    """Records that keep a scoring process busy for about 0.2 s each."""
    return [round(0.2 * graphs.turns_per_second(busy)) + number for number in range(RECORDS)]


def waits(lines: list[Any], job_id: str) -> bool:
    """Whether it is logged that the job waits."""
    return any(line.get("action") == "job_wait" and line.get("job_id") == job_id for line in list(lines))


def chunks_done(bench: Bench, job_id: str) -> int:
    """As soon as the database answers."""
    while True:
        with suppress(Unavailable):
            return bench.get(job_id).chunks_done


def require_completed(bench: Bench, job_id: str, work: list[int]) -> None:
    """In its first attempt, with each answer once."""
    until(lambda: bench.get(job_id).state.finished, 100.0)
    job = bench.get(job_id)
    assert (job.state, job.attempt, job.chunks_done) == (JobState.COMPLETED, 1, len(work)), job
    assert answers(bench.result(job_id)) == doubled(*work)
    assert bench.outcomes(job_id) == ["completed"]


def test_a_job_completes_in_its_first_attempt_while_the_database_is_restarted_again_and_again(
    ray_cluster: Cluster, servers: Servers, busy: bytes, work: list[int]
) -> None:
    with bench_on(ray_cluster.url, servers.places(), chunk_records=1) as bench:
        job_id = bench.submit(bench.register("busy", busy), rows_of(*work))
        with bench.worker():
            for seconds in (0.0, 0.5, 2.0):
                done = chunks_done(bench, job_id)
                until(lambda: chunks_done(bench, job_id) >= done + 3)  # noqa: B023
                assert not bench.get(job_id).state.finished, "the job ended before it could be disturbed"
                servers.database.stop()
                time.sleep(seconds)
                servers.database.start()
            chunks_done(bench, job_id)
            require_completed(bench, job_id, work)


def test_a_job_waits_for_an_object_store_that_was_killed(
    ray_cluster: Cluster, servers: Servers, busy: bytes, work: list[int]
) -> None:
    with bench_on(ray_cluster.url, servers.places(), chunk_records=1, inline_bytes=0) as bench:
        job_id = bench.submit(bench.register("busy", busy), rows_of(*work))
        with capture_logs() as lines, bench.worker():
            bench.wait(job_id, lambda job: job.chunks_done >= 4)
            servers.store.kill()
            try:
                until(lambda: waits(lines, job_id))
                assert bench.get(job_id).state is JobState.RUNNING
            finally:
                servers.store.start()
            require_completed(bench, job_id, work)


@pytest.mark.parametrize("mode", ["away", "silent", "broken", "full", "unanswered", "flaky"])
def test_a_job_completes_in_its_first_attempt_when_the_way_of_a_host_to_the_object_store_is(
    mode: Mode, ray_cluster: Cluster, servers: Servers, busy: bytes, work: list[int]
) -> None:
    way = servers.ways[ray_cluster.other.name]
    with bench_on(ray_cluster.url, servers.places(), chunk_records=1, inline_bytes=0) as bench:
        job_id = bench.submit(bench.register("busy", busy), rows_of(*work))
        with capture_logs() as lines, bench.worker():
            until(lambda: bench.runtime.engine.capacity == 2)
            bench.wait(job_id, lambda job: job.chunks_done >= 4)
            way.turn(mode)
            try:
                if mode != "flaky":
                    until(lambda: waits(lines, job_id))
                else:
                    bench.wait(job_id, lambda job: job.chunks_done >= 16)
            finally:
                way.turn("through")
            require_completed(bench, job_id, work)


def test_two_drivers_run_each_job_once(ray_cluster: Cluster, servers: Servers, busy: bytes, work: list[int]) -> None:
    places = servers.places()
    with bench_on(ray_cluster.url, places, chunk_records=1, active_jobs=2) as bench:
        model = bench.register("busy", busy)
        own = worker_environment(ray_cluster, places) | {"BATCHSERVE_ACTIVE_JOBS": "2"}
        with subprocess.Popen([sys.executable, "-m", "batchserve", "worker"], env=own) as other:
            try:
                first = bench.submit(model, rows_of(*work))
                bench.wait(first, lambda job: job.chunks_done >= 1)
                jobs = [first, *(bench.submit(model, rows_of(*work[:8])) for _ in range(4))]
                with bench.worker():
                    for job_id in jobs:
                        require_completed(bench, job_id, work if job_id == first else work[:8])
            finally:
                other.terminate()
                other.wait(40)
        with bench.database.read() as connection:
            attempts = [attempt for job_id in jobs for attempt in queries.attempts_of(connection, job_id)]
        assert len({attempt.worker for attempt in attempts}) == 2
