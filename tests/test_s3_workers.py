"""Several workers on one database and one bucket: kills, and a host that loses the bucket, lose nothing."""

import hashlib
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import pytest
import seaweed
from commands import Service
from pausing import pause
from proxy import Proxy
from selection import quick_first
from service import ok
from waiting import until

pytestmark = [pytest.mark.s3, pytest.mark.timeout(300)]

HEADER = "sepal length (cm),sepal width (cm),petal length (cm),petal width (cm)\n"
ROWS = ["5.1,3.5,1.4,0.2\n", "6.3,3.3,6.0,2.5\n", "5.9,3.0,4.2,1.5\n", "6.0,2.2,4.0,1.0\n"]
BODY = (HEADER + "".join(ROWS) * 60_000).encode()
SETTINGS = {
    "BATCHSERVE_CHUNK_BYTES": "200000",
    "BATCHSERVE_LEASE": "2.0",
    "BATCHSERVE_HEARTBEAT": "0.3",
    "BATCHSERVE_RESCUE": "0.3",
    "BATCHSERVE_POLL": "0.1",
    "BATCHSERVE_PROCESSES": "1",
    "BATCHSERVE_GRACE": "5",
    "BATCHSERVE_FREE_BYTES": "0",
    "BATCHSERVE_DIRECT_SECONDS": "0",
    "BATCHSERVE_ACTIVE_JOBS": "2",
    "BATCHSERVE_LOG_FORMAT": "json",
}


@dataclass(frozen=True)
class Site:
    """A server without a worker, and two workers: the first one reaches the bucket through a proxy."""

    http: httpx2.Client
    workers: tuple[Service, Service]
    proxy: Proxy
    database_url: str

    def submit(self) -> dict[str, Any]:
        job: dict[str, Any] = ok(
            self.http.post("/v1/predict", content=BODY, params={"model": "iris", "reuse": False}), 202
        )
        return job

    def get(self, job: dict[str, Any]) -> dict[str, Any]:
        found: dict[str, Any] = ok(self.http.get(job["links"]["self"]))
        return found

    def ended(self, job: dict[str, Any]) -> dict[str, Any]:
        deadline = time.monotonic() + 120
        while (now := self.get(job))["state"] in ("queued", "running"):
            assert time.monotonic() < deadline, now
            time.sleep(0.1)
        return now

    def one_of(self, jobs: list[dict[str, Any]], worker: Service) -> dict[str, Any]:
        """A job that a worker runs, with some chunks done and others not."""
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            for job in map(self.get, jobs):
                is_its = bool(job["attempts"]) and job["attempts"][-1]["worker"].endswith(f"-{worker.process.pid}")
                if is_its and job["state"] == "running" and job["chunks"]["done"]:
                    return job
            time.sleep(0.02)
        raise AssertionError(f"worker {worker.process.pid} runs none of {[self.get(job) for job in jobs]}")

    def caught(self, jobs: list[dict[str, Any]], worker: Service) -> dict[str, Any]:
        """Such a job in the middle of which its worker was stopped."""
        while True:
            job = self.one_of(jobs, worker)
            pause(worker, self.database_url)
            if self.get(job)["state"] == "running":
                return job
            worker.process.send_signal(signal.SIGCONT)


@pytest.fixture
def site(database_url: str, s3_server: seaweed.Server, tmp_path: Path, iris_onnx: Path) -> Iterator[Site]:
    with started(database_url, s3_server, tmp_path, iris_onnx) as site:
        yield site


@contextmanager
def started(database_url: str, s3_server: seaweed.Server, tmp_path: Path, iris_onnx: Path) -> Iterator[Site]:
    own = SETTINGS | {"BATCHSERVE_STORAGE": s3_server.new_address(), "BATCHSERVE_DATABASE": database_url}
    own["TMPDIR"] = str(tmp_path)  # of the models that are cached
    with ExitStack() as stack:
        proxy = stack.enter_context(closing(Proxy(s3_server.port)))

        def start(*arguments: str, endpoint: str | None = None) -> Service:
            service = Service(tmp_path, *arguments, settings=own | s3_server.environment(endpoint))
            stack.callback(service.end)
            return service

        server = start("serve", "--no-worker", "--port", "0")
        workers = start("worker", endpoint=proxy.endpoint), start("worker")
        url = server.wait_for(r" at (http://\S+) ")[1]
        http = stack.enter_context(httpx2.Client(base_url=url, timeout=60))
        ok(http.put("/v1/models/iris", content=iris_onnx.read_bytes()), 201)
        for worker in workers:
            worker.wait_for("worker_start")
        yield Site(http, workers, proxy, database_url)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_nothing_is_lost_of_the_jobs_of_a_worker_that_gets(number: signal.Signals, site: Site) -> None:
    jobs = [site.submit() for _ in range(6)]
    victim = site.caught(jobs, site.workers[0])
    site.workers[0].process.send_signal(number)
    until(lambda: site.get(victim)["attempt"] == 2)
    site.workers[0].process.send_signal(signal.SIGCONT)  # where it lives, it finds that its lease is lost
    done = [site.ended(job) for job in jobs]
    assert {job["state"] for job in done} == {"completed"}
    assert {(job["rows"]["ok"], job["rows"]["failed"]) for job in done} == {(240_000, 0)}
    assert len({job["result"]["sha256"] for job in done}) == 1
    resumed = next(job for job in done if job["id"] == victim["id"])
    assert [attempt["outcome"] for attempt in resumed["attempts"]] == ["lost", "completed"]
    content = site.http.get(resumed["links"]["result"]).content
    assert hashlib.sha256(content).hexdigest() == resumed["result"]["sha256"]


@pytest.mark.parametrize("mode", quick_first(["away", "silent", "unanswered", "broken", "full"], 1))
def test_a_host_that_loses_the_bucket_for_a_while_loses_no_job(site: Site, mode: Any) -> None:
    jobs = [site.submit() for _ in range(4)]
    victim = site.one_of(jobs, site.workers[0])
    site.proxy.turn(mode)
    site.workers[0].wait_for("job_wait")
    assert site.get(victim)["state"] == "running"
    time.sleep(3)
    site.proxy.turn("through")
    done = [site.ended(job) for job in jobs]
    assert {job["state"] for job in done} == {"completed"}
    assert len({job["result"]["sha256"] for job in done}) == 1
    assert {attempt["outcome"] for job in done for attempt in job["attempts"]} == {"completed"}


def test_a_bucket_whose_server_is_killed_loses_no_job(database_url: str, tmp_path: Path, iris_onnx: Path) -> None:
    with seaweed.serving() as server, started(database_url, server, tmp_path, iris_onnx) as site:
        jobs = [site.submit() for _ in range(4)]
        for worker in site.workers:
            site.one_of(jobs, worker)
        server.kill()
        site.workers[0].wait_for("job_wait")
        server.start()
        done = [site.ended(job) for job in jobs]
        assert {job["state"] for job in done} == {"completed"}
        assert len({job["result"]["sha256"] for job in done}) == 1
        for job in done:
            content = site.http.get(job["links"]["result"]).content
            assert hashlib.sha256(content).hexdigest() == job["result"]["sha256"]
