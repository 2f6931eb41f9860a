"""The Ray engine beyond what every engine does (`test_engine.py`): several hosts, and their losses.

Each test leaves the cluster with both hosts.
"""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import calls
import graphs
import pytest
from bench import answers, doubled, rows_of
from ray_hosts import Cluster, running
from ray_servers import Servers, bench_on, worker_environment
from structlog.testing import capture_logs
from waiting import is_alive, until

from batchserve.domain import Job, JobState
from batchserve.engines import Engine, open_engine
from batchserve.engines.ray import RayEngine
from batchserve.errors import InvalidOptions, ScoringCrashed
from batchserve.settings import Settings

pytestmark = [pytest.mark.ray, pytest.mark.timeout(180)]

TIMEOUT = 60.0
Logs = list[MutableMapping[str, Any]]


@pytest.fixture
def engine(ray_cluster: Cluster, tmp_path: Path) -> Iterator[Engine]:
    """An engine of both hosts; a test that loses one starts it again."""
    with ray_cluster.engine(tmp_path) as engine:
        yield engine


@pytest.fixture(scope="module")
def busy() -> bytes:
    return graphs.busy()


@pytest.fixture(scope="module")
def second(busy: bytes) -> float:
    """The value of `work` that keeps a scoring process busy for about a second."""
    return graphs.turns_per_second(busy)


@pytest.fixture
def places(servers: Servers) -> dict[str, str]:
    """A database and a storage of a cluster, both empty."""
    return servers.places()


@contextmanager
def logged(action: str) -> Iterator[Callable[[], Logs]]:
    """The lines with that action, so far."""
    with capture_logs() as lines:
        yield lambda: [line for line in lines if line.get("action") == action]


def gathered(engine: Engine, seconds: float, count: int) -> set[int]:
    """The processes that run so many calls."""
    started = [engine.submit(calls.pid_after, seconds, timeout=TIMEOUT) for _ in range(count)]
    return {call.future.result(TIMEOUT) for call in started}


def is_written(path: Path) -> bool:
    return path.exists() and path.read_text() != ""


# --- results ---


def test_a_job_on_two_hosts_has_the_bytes_of_one_on_this_host(ray_cluster: Cluster, tmp_path: Path) -> None:
    results, hosts = [], set()
    for engine in ("local", ray_cluster.url):
        with (
            bench_on(engine, {"storage": str(tmp_path / engine[:3])}, chunk_records=500) as bench,
            logged("host_join") as joined,
        ):
            model = bench.register("doubler", graphs.busy())
            with bench.worker():
                until(lambda: bench.runtime.engine.capacity == 2)
                job_id = bench.submit(model, rows_of(*range(10_000)), format="parquet")
                job = bench.wait(job_id)
            assert (job.state, job.chunks_done, job.attempt) == (JobState.COMPLETED, 20, 1)
            results.append(bench.result(job_id))
            hosts |= {line["host"] for line in joined()}
    assert results[0] == results[1]
    assert len(hosts) == 2


def test_processes_of_a_host_have_its_niceness_and_not_that_of_ray_on_top(engine: Engine) -> None:
    assert engine.submit(calls.niceness, timeout=TIMEOUT).future.result(TIMEOUT) == max(os.nice(0), 10)


def test_two_drivers_share_the_processes_of_the_hosts(ray_cluster: Cluster, tmp_path: Path) -> None:
    with ray_cluster.engine(tmp_path) as first, ray_cluster.engine(tmp_path) as second:
        assert gathered(first, 0.3, 6) == gathered(second, 0.3, 6)
        slow = first.submit(calls.pid_after, 60.0, timeout=TIMEOUT)
        time.sleep(3.0)  # until the second has asked the hosts what they do
        beside = second.submit(calls.double, 4, timeout=TIMEOUT)
        assert beside.future.result(TIMEOUT) == 8
        slow.kill()


def test_a_call_that_waits_behind_a_long_one_moves_to_the_host_that_is_idle_first(
    engine: Engine, tmp_path: Path
) -> None:
    long = [engine.submit(calls.appear, tmp_path / str(number), 60.0, timeout=TIMEOUT) for number in range(2)]
    until(lambda: all(is_written(tmp_path / str(number)) for number in range(2)))
    waiting = [engine.submit(calls.double, number, timeout=TIMEOUT) for number in range(2)]
    time.sleep(0.5)  # until each host has one of them
    long[0].kill()
    assert [call.future.result(20.0) for call in waiting] == [0, 2]
    long[1].kill()


# --- losses ---


def end_of_a_scoring_process(cluster: Cluster, engine: Engine) -> None:
    del cluster
    os.kill(engine.submit(os.getpid, timeout=TIMEOUT, urgent=True).future.result(TIMEOUT), signal.SIGKILL)


def end_of_an_actor(cluster: Cluster, engine: Engine) -> None:
    del engine
    cluster.other.kill("ray::ScoringHost")


def end_of_a_raylet(cluster: Cluster, engine: Engine) -> None:
    del engine
    cluster.other.kill("raylet/raylet")


def end_of_the_cable(cluster: Cluster, engine: Engine) -> None:
    cluster.cut()
    until(lambda: engine.capacity == 1)


@pytest.mark.parametrize("fault", [end_of_a_scoring_process, end_of_an_actor, end_of_a_raylet, end_of_the_cable])
def test_a_job_completes_in_its_first_attempt_in_spite_of(
    fault: Callable[[Cluster, Engine], None],
    ray_cluster: Cluster,
    places: dict[str, str],
    busy: bytes,
    second: float,
) -> None:
    work = [round(0.2 * second) + number for number in range(40)]
    with bench_on(ray_cluster.url, places, chunk_records=1) as bench:
        job_id = bench.submit(bench.register("busy", busy), rows_of(*work))
        try:
            with bench.worker():
                until(lambda: bench.runtime.engine.capacity == 2)
                bench.wait(job_id, lambda job: job.chunks_done >= 4)
                fault(ray_cluster, bench.runtime.engine)
                job = bench.wait(job_id)
                assert (job.state, job.attempt, job.chunks_done) == (JobState.COMPLETED, 1, 40), job
                assert answers(bench.result(job_id)) == doubled(*work)
                if fault is end_of_the_cable:
                    ray_cluster.join()
                if fault is end_of_a_raylet:
                    ray_cluster.other.stop()
                    ray_cluster.other.start()
                until(lambda: bench.runtime.engine.capacity == 2)
        finally:
            ray_cluster.join()


def test_a_call_of_a_silent_host_is_answered_by_another_one_and_killed_when_the_first_answers(
    ray_cluster: Cluster, engine: Engine, tmp_path: Path
) -> None:
    there = tmp_path / "there"
    here = engine.submit(calls.appear, tmp_path / "here", 60.0, timeout=TIMEOUT)
    slow = engine.submit(calls.appear, there, 60.0, timeout=TIMEOUT)
    until(lambda: is_written(there) and is_written(tmp_path / "here"))
    pids = {int((tmp_path / name).read_text()): call for name, call in (("here", here), ("there", slow))}
    far = next(pid for pid in pids if pid in ray_cluster.other.processes())
    near = next(pid for pid in pids if pid != far)
    try:
        ray_cluster.cut()
        until(lambda: engine.capacity == 1)
        pids[near].kill()
        moved = pids[far]
        until(lambda: str(far) not in {(tmp_path / name).read_text() for name in ("here", "there")})  # it runs again
        assert not moved.future.done()
    finally:
        ray_cluster.join()
    until(lambda: engine.capacity == 2)
    until(lambda: not is_alive(far))
    moved.kill()


def test_a_call_that_ends_every_host_it_gets_fails_as_a_crash(engine: Engine) -> None:
    call = engine.submit(calls.die_with_parent, timeout=TIMEOUT)
    with pytest.raises(ScoringCrashed, match="4 hosts were lost while they worked on it"):
        call.future.result(TIMEOUT)
    until(lambda: engine.capacity == 2)
    assert engine.submit(calls.double, 4, timeout=TIMEOUT).future.result(TIMEOUT) == 8


@pytest.mark.slow
def test_the_calls_of_a_driver_that_was_killed_end_within_a_minute(ray_cluster: Cluster, tmp_path: Path) -> None:
    code = f"from pathlib import Path; import calls; calls.serve_calls(Path({str(tmp_path)!r}))"
    command = [sys.executable, "-c", code]
    own = os.environ | {"BATCHSERVE_ENGINE": ray_cluster.url, "PYTHONPATH": str(Path(calls.__file__).parent)}
    with subprocess.Popen(command, env=own, start_new_session=True) as process:
        try:
            until(lambda: is_written(tmp_path / "batch"))
        finally:
            process.kill()
    pid = int((tmp_path / "batch").read_text())
    assert is_alive(pid)
    until(lambda: not is_alive(pid), 60.0)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_another_driver_resumes_the_job_of_one_that_gets(
    number: signal.Signals, ray_cluster: Cluster, places: dict[str, str], busy: bytes, second: float
) -> None:
    work = [round(0.3 * second) + record for record in range(40)]
    own = worker_environment(ray_cluster, places) | {"BATCHSERVE_LEASE": "4", "BATCHSERVE_HEARTBEAT": "1"}
    with bench_on(ray_cluster.url, places, chunk_records=1) as bench:
        job_id = bench.submit(bench.register("busy", busy), rows_of(*work))
        with subprocess.Popen([sys.executable, "-m", "batchserve", "worker"], env=own) as first:
            try:
                bench.wait(job_id, lambda job: job.chunks_done >= 4)
                first.send_signal(number)
                left = bench.get(job_id).chunks_done
                with bench.worker():
                    bench.wait(job_id, lambda job: job.attempt == 2 and job.chunks_done >= left + 2)
                    first.send_signal(signal.SIGCONT)  # where it lives, it finds that its lease is lost
                    job = bench.wait(job_id)
            finally:
                first.kill()
        assert (job.state, job.chunks_done) == (JobState.COMPLETED, 40)
        assert answers(bench.result(job_id)) == doubled(*work)
        assert bench.outcomes(job_id) == ["lost", "completed"]


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_job_is_resumed_when_the_head_was_lost_and_is_back(
    servers: Servers, places: dict[str, str], busy: bytes, second: float
) -> None:
    work = [round(0.3 * second) + number for number in range(40)]
    with running() as cluster, cluster.reaching(servers.store) as ways, bench_on("local", places) as bench:
        own = worker_environment(cluster, places, ways[cluster.head.name])
        own |= {"BATCHSERVE_LEASE": "6", "BATCHSERVE_HEARTBEAT": "2"}
        command = cluster.head.place.command(sys.executable, "-m", "batchserve", "worker")
        job_id = bench.submit(bench.register("busy", busy), rows_of(*work))
        with subprocess.Popen(command, env=own) as first:
            bench.wait(job_id, lambda job: job.chunks_done >= 4)
            for name in ("gcs_server", "raylet/raylet"):
                cluster.head.kill(name)
            cluster.other.stop()
            bench.wait(job_id, lambda job: job.state is JobState.QUEUED)
            cluster.head.start(head=True)
            cluster.other.start()
            with subprocess.Popen(command, env=own) as another:
                until(lambda: bench.get(job_id).state.finished, 100.0)
                job = bench.get(job_id)
                another.kill()
            assert first.wait(120) != 0  # so that what watches over it starts it again
    assert (job.state, job.attempt) == (JobState.COMPLETED, 2)
    assert answers(bench.result(job_id)) == doubled(*work)


# --- hosts that are refused ---


@contextmanager
def replaced_host(cluster: Cluster, **changes: Any) -> Iterator[None]:
    """The other host starts again with these changes, and as before at the end."""
    cluster.other.stop()
    try:
        cluster.other.start(**changes)
        yield
    finally:
        cluster.other.stop()
        cluster.other.start()


def test_a_host_with_another_version_is_refused_and_told(ray_cluster: Cluster, tmp_path: Path) -> None:
    folder = tmp_path / "older" / "polars-0.1.dist-info"
    folder.mkdir(parents=True)
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: polars\nVersion: 0.1\n")
    with (
        replaced_host(ray_cluster, path=folder.parent),
        logged("host_refuse") as refused,
        ray_cluster.engine(tmp_path, capacity=1) as engine,
    ):
        until(lambda: any(re.search(r"polars 0\.1, not \d", line["reason"]) for line in refused()))
        assert all(ray_cluster.other.address in line["host"] for line in refused())
        assert engine.capacity == 1


def test_a_host_with_a_wrong_setting_is_refused_and_the_setting_is_named(ray_cluster: Cluster, tmp_path: Path) -> None:
    with (
        replaced_host(ray_cluster, BATCHSERVE_PROCESS_NICE="many"),
        logged("host_refuse") as refused,
        ray_cluster.engine(tmp_path, capacity=1),
    ):
        until(lambda: any("process_nice" in line["reason"] for line in refused()))


def test_hosts_that_do_not_see_the_storage_are_refused(
    ray_cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    settings = Settings(storage=str(tmp_path), engine=ray_cluster.url, ray_reserved={"CPU": 0.1})
    own = {"storage": "/proc/self/cwd/store"}  # another folder in each process
    with closing(RayEngine(settings.model_copy(update=own))) as engine, logged("host_refuse") as refused:
        engine.start()
        reason = "cannot read the storage /proc/self/cwd/store"  # one that joins now may have another, too
        until(lambda: len({line["host"] for line in refused() if reason in line["reason"]}) == 2)
        assert engine.capacity == 0


def test_hosts_without_the_resources_are_not_used(ray_cluster: Cluster, tmp_path: Path) -> None:
    with ray_cluster.engine(tmp_path, processes=1) as engine:
        time.sleep(3.0)
        assert engine.capacity == 1
        assert gathered(engine, 0.0, 3) <= set(ray_cluster.head.processes())


# --- the start ---


def started_worker(folder: Path, engine: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    own = os.environ | {"BATCHSERVE_ENGINE": engine, "BATCHSERVE_STORAGE": str(folder)} | environment
    command = [sys.executable, "-m", "batchserve", "worker"]
    return subprocess.run(command, env=own, check=False, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("number", [1, 77], ids=["no-head", "no-host"])
def test_a_head_that_is_not_there_is_told_in_seconds(ray_cluster: Cluster, tmp_path: Path, number: int) -> None:
    address = f"{ray_cluster.head.address.rpartition('.')[0]}.{number}:6999"
    started = time.monotonic()
    ended = started_worker(tmp_path, f"ray://{address}")
    assert ended.returncode == 1
    assert f"no head of Ray answers at {address}" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert time.monotonic() - started < 25


def test_a_worker_with_another_token_is_refused(ray_cluster: Cluster, tmp_path: Path) -> None:
    started = time.monotonic()
    ended = started_worker(tmp_path, ray_cluster.url, RAY_AUTH_TOKEN="0" * 64)
    assert ended.returncode == 1
    assert re.search(r"cannot be joined .*\. Is the token that of the head", ended.stderr)
    assert "Traceback" not in ended.stderr
    assert time.monotonic() - started < 25


def test_a_worker_ends_its_chunks_after_sigterm_and_releases_its_jobs(
    ray_cluster: Cluster, tmp_path: Path, busy: bytes, second: float
) -> None:
    places = {"storage": str(tmp_path)}
    own = worker_environment(ray_cluster, places) | {"BATCHSERVE_GRACE": "20"}
    with bench_on("local", places) as bench:
        job_id = bench.submit(bench.register("busy", busy), rows_of(*[5.0 * second] * 10))
        with subprocess.Popen([sys.executable, "-m", "batchserve", "worker"], env=own) as process:
            try:
                bench.wait(job_id, lambda job: job.chunks_done >= 1)
                process.terminate()
                assert process.wait(40) == 0
            finally:
                process.kill()
        job: Job = bench.get(job_id)
        assert (job.state, bench.outcomes(job_id)) == (JobState.QUEUED, ["released"])
        assert 2 <= job.chunks_done < 10


@pytest.mark.parametrize("address", ["ray://", "ray://head:port", "ray://head/path"])
def test_an_address_that_is_none_is_refused(tmp_path: Path, address: str) -> None:
    with pytest.raises(InvalidOptions, match="ray://HOST:PORT"):
        open_engine(Settings(storage=str(tmp_path), engine=address))
