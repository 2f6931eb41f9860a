"""End to end, with real processes that are killed in the middle of a job: nothing is lost or done twice."""

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import httpx2
import numpy as np
import polars as pl
import postgres
import pytest
from commands import Service
from pausing import pause
from waiting import until

pytestmark = [pytest.mark.slow, pytest.mark.alone, pytest.mark.timeout(180)]  # leases of a second

RECORDS = 300_000


class Site:
    """A folder with its data, the services on it, and the result of an undisturbed run to compare with."""

    def __init__(self, folder: Path, model: Path, table: Path) -> None:
        self.folder, self.model, self.table = folder, model, table
        self.services: list[Service] = []

    def serve(self, *arguments: str) -> Service:
        service = Service(self.folder, "serve", "--port", "0", *arguments)
        self.services.append(service)
        service.url = service.wait_for(r" at (http://\S+) ")[1]
        return service

    def work(self) -> Service:
        service = Service(self.folder, "worker")
        self.services.append(service)
        service.wait_for(r"Worker is ready")
        return service

    def submit(self, url: str) -> str:
        """Queues a job and returns its ID."""
        answer = httpx2.put(f"{url}/v1/models/flowers", content=self.model.read_bytes(), timeout=60)
        answer.raise_for_status()
        answer = httpx2.post(f"{url}/v1/upload", content=self.table.read_bytes(), timeout=60)
        answer.raise_for_status()
        job_id: str = answer.json()["id"]
        answer = httpx2.post(f"{url}/v1/predict/{job_id}", params={"model": "flowers", "reuse": False}, timeout=60)
        assert answer.status_code == 202, answer.text
        return job_id

    def close(self) -> None:
        for service in self.services:
            service.end(signal.SIGKILL)


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    random = np.random.default_rng(7)
    measures = ("sepal length (cm)", "sepal width (cm)", "petal length (cm)", "petal width (cm)")
    columns = {name: random.uniform(0.1, 8.0, RECORDS).astype(np.float32) for name in measures}
    path = tmp_path_factory.mktemp("data") / "flowers.csv"
    pl.DataFrame({"number": np.arange(RECORDS), **columns}).write_csv(path)
    return path


@pytest.fixture
def site(tmp_path: Path, iris_onnx: Path, table: Path) -> Iterator[Site]:
    site = Site(tmp_path, iris_onnx, table)
    yield site
    site.close()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, iris_onnx: Path, table: Path) -> Iterator[bytes]:
    """The result of an undisturbed run."""
    site = Site(tmp_path_factory.mktemp("undisturbed"), iris_onnx, table)
    try:
        service = site.serve()
        yield result(service.url, site.submit(service.url))
    finally:
        site.close()


def job(url: str, job_id: str) -> dict[str, object]:
    answer = httpx2.get(f"{url}/v1/jobs/{job_id}", timeout=30)
    answer.raise_for_status()
    body: dict[str, object] = answer.json()
    return body


def chunks_done(url: str, job_id: str) -> int:
    chunks = job(url, job_id)["chunks"]
    assert isinstance(chunks, dict)
    return int(chunks["done"])


def wait_for_chunks(url: str, job_id: str, number: int) -> None:
    until(lambda: chunks_done(url, job_id) >= number)
    assert job(url, job_id)["state"] == "running", "the job ended before it could be disturbed"


def result(url: str, job_id: str) -> bytes:
    until(lambda: job(url, job_id)["state"] not in ("queued", "running"), 120)
    done = job(url, job_id)
    assert done["state"] == "completed", done
    assert done["rows"] == {"total": RECORDS, "ok": RECORDS, "failed": 0}
    return httpx2.get(f"{url}/v1/download/{job_id}", timeout=60).raise_for_status().content


def test_killed_scoring_processes_are_replaced_and_the_result_is_the_same(site: Site, undisturbed: bytes) -> None:
    service = site.serve()
    job_id = site.submit(service.url)
    killed = 0
    for chunks in (5, 60, 120):
        wait_for_chunks(service.url, job_id, chunks)
        os.kill(service.scoring_processes()[0], signal.SIGKILL)
        killed += 1
    assert result(service.url, job_id) == undisturbed
    assert killed == 3
    assert job(service.url, job_id)["attempt"] == 1, "a lost scoring process is not a lost worker"


def test_a_killed_server_continues_after_its_restart_and_redoes_no_committed_chunk(
    site: Site, undisturbed: bytes
) -> None:
    service = site.serve()
    job_id = site.submit(service.url)
    wait_for_chunks(service.url, job_id, 30)
    scoring = service.scoring_processes()
    service.end(signal.SIGKILL)
    until(lambda: not any(Path(f"/proc/{pid}/status").exists() for pid in scoring), 10)

    service = site.serve()
    done = chunks_done(service.url, job_id)
    assert done >= 30
    assert result(service.url, job_id) == undisturbed
    attempts = job(service.url, job_id)["attempts"]
    assert isinstance(attempts, list)
    assert [attempt["outcome"] for attempt in attempts] == ["lost", "completed"]


def test_a_killed_worker_is_replaced_by_another_one_while_the_server_stays_up(site: Site, undisturbed: bytes) -> None:
    service = site.serve("--no-worker")
    job_id = site.submit(service.url)
    worker = site.work()
    wait_for_chunks(service.url, job_id, 30)
    worker.end(signal.SIGKILL)
    other = site.work()
    assert result(service.url, job_id) == undisturbed
    other.wait_for(r"Job is completed")
    assert service.process.poll() is None


def test_two_workers_share_the_jobs_and_no_job_is_done_twice(site: Site, undisturbed: bytes) -> None:
    service = site.serve("--no-worker")
    job_ids = [site.submit(service.url) for _ in range(4)]
    workers = [site.work(), site.work()]
    for job_id in job_ids:
        assert result(service.url, job_id) == undisturbed
        assert job(service.url, job_id)["attempt"] == 1
    logs = "".join(worker.log.read_text() for worker in workers)
    assert logs.count("Job is completed") == len(job_ids)


def test_a_paused_worker_that_resumes_writes_nothing(site: Site, undisturbed: bytes) -> None:
    service = site.serve("--no-worker")
    job_id = site.submit(service.url)
    paused = site.work()
    wait_for_chunks(service.url, job_id, 30)
    pause(paused, postgres.address_of(site.folder / "storage"))
    other = site.work()
    content = result(service.url, job_id)
    paused.process.send_signal(signal.SIGCONT)
    paused.wait_for(r"Lease is lost", 20)
    assert content == undisturbed
    assert httpx2.get(f"{service.url}/v1/download/{job_id}", timeout=30).content == undisturbed
    attempts = job(service.url, job_id)["attempts"]
    assert isinstance(attempts, list)
    assert [attempt["outcome"] for attempt in attempts] == ["lost", "completed"]
    assert other.process.poll() is None


def test_a_terminated_server_releases_its_job_at_once_and_stops_within_its_grace_time(
    site: Site, undisturbed: bytes
) -> None:
    service = site.serve()
    job_id = site.submit(service.url)
    wait_for_chunks(service.url, job_id, 30)
    started = time.monotonic()
    service.end(signal.SIGTERM)
    assert time.monotonic() - started < 10

    service = site.serve()
    assert result(service.url, job_id) == undisturbed
    attempts = job(service.url, job_id)["attempts"]
    assert isinstance(attempts, list)
    assert [attempt["outcome"] for attempt in attempts] == ["released", "completed"]


def test_an_upload_that_was_acknowledged_survives_a_kill_in_the_next_instant(site: Site, table: Path) -> None:
    service = site.serve()
    content = table.read_bytes()
    answer = httpx2.post(f"{service.url}/v1/upload", content=content, timeout=60)
    service.end(signal.SIGKILL)
    assert answer.status_code == 201

    service = site.serve()
    stored = httpx2.get(f"{service.url}/v1/download/{answer.json()['id']}/input", timeout=60)
    assert stored.content == content
