"""A move from SQLite and a folder to PostgreSQL and a bucket, while the server runs."""

import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import graphs
import httpx2
import postgres
import pytest
from commands import FAST, Service, clean_environment, in_a_process
from service import ok, problem

from batchserve.storage import open_storage

pytestmark = [pytest.mark.postgres, pytest.mark.s3]

SETTINGS = {**FAST, "BATCHSERVE_FREE_BYTES": "0"}
SMALL = "work\n1\n2\n"
LARGE = "work\n" + "1\n2\n" * 30_000
KEY = {"idempotency-key": "night"}


@contextmanager
def served(folder: Path, **settings: str) -> Iterator[tuple[Service, httpx2.Client]]:
    service = Service(folder, "serve", "--port", "0", settings=SETTINGS | settings)
    try:
        url = service.wait_for(r"http://127\.0\.0\.1:\d+")[0]
        with httpx2.Client(base_url=url, timeout=30) as http:
            yield service, http
    finally:
        service.end(signal.SIGTERM)


@pytest.fixture
def new(postgres_server: postgres.Server, s3_address: str) -> dict[str, str]:
    """The settings of the new place."""
    return {"BATCHSERVE_DATABASE": postgres_server.empty(), "BATCHSERVE_STORAGE": s3_address}


def move_to(folder: Path, new: dict[str, str]) -> "subprocess.Popen[str]":
    addresses = ("--to-database", new["BATCHSERVE_DATABASE"], "--to-storage", new["BATCHSERVE_STORAGE"])
    return subprocess.Popen(
        [sys.executable, "-m", "batchserve", "migrate-to", *addresses, "--json"],
        cwd=folder, env=clean_environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def predict(http: httpx2.Client, body: str, status: int = 202, **options: Any) -> dict[str, Any]:
    headers = options.pop("headers", {})
    answer = http.post(
        "/v1/predict", content=body, params={"model": "busy", "reuse": False, **options}, headers=headers
    )
    job: dict[str, Any] = ok(answer, status)
    return job


def ended(http: httpx2.Client, job: dict[str, Any]) -> dict[str, Any]:
    deadline = time.monotonic() + 60
    while (now := ok(http.get(job["links"]["self"])))["state"] in ("queued", "running"):
        assert time.monotonic() < deadline, now
        time.sleep(0.05)
    found: dict[str, Any] = now
    return found


def test_everything_moves_while_clients_poll_and_a_job_runs(tmp_path: Path, new: dict[str, str]) -> None:
    with served(tmp_path) as (_, http):
        ok(http.put("/v1/models/busy", content=graphs.busy()), 201)
        uploaded = ok(http.post("/v1/upload", content=SMALL), 201)
        done = [ended(http, predict(http, body, headers=key)) for body, key in ((SMALL, KEY), (LARGE, {}))]
        before = {job["id"]: http.get(job["links"]["result"]).content for job in done}
        later = predict(http, SMALL, run_after="2099-01-01T00:00:00Z")
        running = predict(http, LARGE + "1\n" * 180_000)
        seen: set[int] = set()
        over = threading.Event()

        def poll() -> None:
            while not over.is_set():
                seen.add(http.get(done[0]["links"]["self"]).status_code)

        polling = threading.Thread(target=poll)
        polling.start()
        with move_to(tmp_path, new) as moving:
            said, errors = moving.communicate(timeout=90)
        over.set()
        polling.join()
        assert moving.returncode == 0, errors
        assert seen <= {200, 503}
        assert '"damaged": []' in said
        refused = problem(http.post("/v1/upload", content=SMALL), 503, "unavailable")
        assert "was moved to other addresses" in refused["detail"]
        listed = {job["id"] for job in ok(http.get("/v1/jobs", params={"limit": 50}))["jobs"]}
    with served(tmp_path, **new) as (_, http):
        assert {job["id"] for job in ok(http.get("/v1/jobs", params={"limit": 50}))["jobs"]} == listed
        for job in done:
            again = ok(http.get(job["links"]["self"]))
            assert again["result"]["sha256"] == job["result"]["sha256"]
            assert http.get(job["links"]["result"]).content == before[job["id"]]
        assert ended(http, running)["state"] == "completed"
        assert len(http.get(running["links"]["result"]).content.splitlines()) > 4 * 60_000
        assert ok(http.get(later["links"]["self"]))["state"] == "queued"
        repeated = predict(http, SMALL, headers=KEY)
        assert repeated["id"] == done[0]["id"]
        predicted = http.post(f"/v1/predict/{uploaded['id']}", params={"model": "busy"}, headers={"prefer": "wait=30"})
        assert ok(predicted)["state"] == "completed"
        assert ok(http.put("/v1/models/other", content=graphs.busy()), 201)["version"] == 1
    refused_start = Service(tmp_path, "serve", "--port", "0", settings=SETTINGS)
    refused_start.process.wait(30)
    assert "was moved by `batchserve migrate-to`" in refused_start.log.read_text()


def test_a_move_that_was_killed_is_begun_again(tmp_path: Path, new: dict[str, str]) -> None:
    with served(tmp_path) as (_, http):
        ok(http.put("/v1/models/busy", content=graphs.busy()), 201)
        jobs = [ended(http, predict(http, LARGE)) for _ in range(3)]
        for wait in (0.6, 0.9, 1.2):
            with move_to(tmp_path, new) as moving:
                time.sleep(wait)
                moving.kill()
        with move_to(tmp_path, new) as moving:
            _, errors = moving.communicate(timeout=90)
        already = "is in use: it has" in errors  # the last one that was killed had just ended
        assert moving.returncode == 0 or already, errors
    with served(tmp_path, **new) as (_, http):
        for job in jobs:
            assert ok(http.get(job["links"]["self"]))["result"]["sha256"] == job["result"]["sha256"]


def test_a_target_that_is_in_use_is_refused_and_the_source_stays_open(tmp_path: Path, new: dict[str, str]) -> None:
    assert in_a_process(tmp_path, "migrate", **new).returncode == 0
    with served(tmp_path, **new) as (_, http):
        ok(http.put("/v1/models/busy", content=graphs.busy()), 201)
    with served(tmp_path) as (_, http):
        with move_to(tmp_path, new) as moving:
            _, errors = moving.communicate(timeout=60)
        assert moving.returncode == 1
        assert "is in use: it has 1 models; move to an empty database" in errors
        ok(http.post("/v1/upload", content=SMALL), 201)


def test_a_damaged_object_is_named_and_the_rest_is_moved(tmp_path: Path, new: dict[str, str]) -> None:
    with served(tmp_path) as (_, http):
        ok(http.put("/v1/models/busy", content=graphs.busy()), 201)
        good, bad = (ended(http, predict(http, LARGE)) for _ in range(2))
    (damaged,) = (tmp_path / "storage" / "results").glob(f"{bad['id']}-*")
    damaged.write_bytes(b"other")
    with move_to(tmp_path, new) as moving:
        said, errors = moving.communicate(timeout=60)
    assert moving.returncode == 1
    assert damaged.name in said
    assert "doctor" in errors
    with served(tmp_path, **new) as (_, http):
        assert ok(http.get(good["links"]["self"]))["state"] == "completed"
    assert list(open_storage(new["BATCHSERVE_STORAGE"]).list("results/"))


def test_an_installation_on_a_server_is_moved_by_its_own_tools(tmp_path: Path, new: dict[str, str]) -> None:
    assert in_a_process(tmp_path, "migrate", **new).returncode == 0
    there = ("--to-database", f"sqlite:///{tmp_path}/x.db", "--to-storage", tmp_path / "x")
    done = in_a_process(tmp_path, "migrate-to", *there, BATCHSERVE_DATABASE=new["BATCHSERVE_DATABASE"])
    assert done.returncode == 1
    assert "only an installation with SQLite can be moved" in done.stderr


def test_a_closed_database_refuses_every_write_and_is_read(tmp_path: Path, new: dict[str, str]) -> None:
    with served(tmp_path) as (_, http):
        ok(http.put("/v1/models/busy", content=graphs.busy()), 201)
        with move_to(tmp_path, new) as moving:
            moving.communicate(timeout=60)
        for method, path, content in (
            ("DELETE", "/v1/models/busy/versions/1", b""),
            ("PUT", "/v1/models/next", graphs.busy()),
            ("POST", "/v1/predict?model=busy", SMALL.encode()),
        ):
            problem(http.request(method, path, content=content), 503, "unavailable")
        assert ok(http.get("/v1/models/busy"))["version"] == 1
    with closing(sqlite3.connect(tmp_path / "storage" / "batchserve.db")) as other:
        assert other.execute("SELECT count(*) FROM models").fetchone() == (1,)
        with pytest.raises(sqlite3.IntegrityError, match="was moved"):
            other.execute("DELETE FROM models")
