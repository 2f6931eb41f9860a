"""A small job is scored within the call that submits it, and ends as one that a worker has run; whatever is not certain
to end well is left to the worker."""

import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import graphs
import httpx2
import pytest
from service import Api, ok, problem, running
from sqlalchemy import select

from batchserve import registry
from batchserve.db.connect import Database
from batchserve.db.tables import events
from batchserve.domain import Options
from batchserve.jobs import requests

HEADER = "sepal length (cm),sepal width (cm),petal length (cm),petal width (cm)\n"
ROW = "5.1,3.5,1.4,0.2\n"
CSV = HEADER + ROW * 3
SOME_FAIL = HEADER + ROW * 3 + ",,,\n"
NAMES = {name: name for name in HEADER.strip().split(",")}
OF_THE_RUN = (
    "id",
    "request_id",
    "created_at",
    "queued_at",
    "started_at",
    "finished_at",
    "links",
    "attempts",
    "rows_per_s",
)
"""Fields that differ between two equal jobs."""


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory, iris_onnx: Path) -> Iterator[Api]:
    with running(tmp_path_factory.mktemp("direct")) as api:
        api.register("iris", iris_onnx)
        yield api


@pytest.fixture(scope="module")
def queueing(tmp_path_factory: pytest.TempPathFactory, iris_onnx: Path) -> Iterator[Api]:
    """A service that queues every job."""
    with running(tmp_path_factory.mktemp("queueing"), direct_seconds=0) as api:
        api.register("iris", iris_onnx)
        yield api


def submit(api: Api, body: str, status: int = 202, **options: Any) -> dict[str, Any]:
    params = {"model": "iris", "reuse": False, **options}
    job: dict[str, Any] = ok(api.http.post("/v1/predict", content=body, params=params), status)
    return job


def test_the_answer_to_a_predict_has_the_result_and_says_202_unless_it_waits(service: Api) -> None:
    job = service.upload(CSV)
    done = ok(service.http.post(f"/v1/predict/{job['id']}", params={"model": "iris"}), 202)
    assert (done["state"], done["rows"]["ok"], done["attempt"]) == ("completed", 3, 1)
    again = ok(service.http.post(f"/v1/predict/{job['id']}", params={"model": "iris"}), 200)
    assert again["id"] == job["id"]
    assert service.run(CSV, "iris")["state"] == "completed"  # Prefer: wait, and 200


@pytest.mark.parametrize("body", [CSV, SOME_FAIL, '{"sepal length (cm)": 5.1}\n'], ids=["csv", "some-fail", "missing"])
def test_a_job_ends_as_by_a_worker(service: Api, queueing: Api, body: str) -> None:
    if body.startswith("{"):
        for api in (service, queueing):
            params: dict[str, Any] = {"model": "iris", "reuse": False}
            problem(api.http.post("/v1/predict", content=body, params=params), 422, "schema-mismatch")
        return
    ours, other = submit(service, body), queueing.run(body, "iris")
    assert ours["state"] == "completed"
    assert {name: value for name, value in ours.items() if name not in OF_THE_RUN} == {
        name: value for name, value in other.items() if name not in OF_THE_RUN
    }
    (attempt,), (its,) = ours["attempts"], other["attempts"]
    assert (attempt["number"], attempt["outcome"], attempt["worker"]) == (1, "completed", its["worker"])
    assert service.result(ours).content == queueing.result(other).content
    assert service.errors(ours) == queueing.errors(other)


@pytest.mark.parametrize("body", [CSV, SOME_FAIL], ids=["all", "some-fail"])
def test_an_answer_shows_the_job_as_it_is_read_afterwards(service: Api, body: str) -> None:
    def read(job: dict[str, Any]) -> dict[str, Any]:
        found: dict[str, Any] = ok(service.http.get(job["links"]["self"]))
        return found

    uploaded = service.upload(body)
    assert read(uploaded) == uploaded
    options = {"model": "iris", "priority": 3, "metadata": {"of": "it"}, "passthrough": "all", "columns": NAMES}
    done = ok(service.http.post(f"/v1/predict/{uploaded['id']}", json={**options, "reuse": False}), 202)
    assert (done["state"], done["metadata"], done["options"]["priority"]) == ("completed", {"of": "it"}, 3)
    assert read(done) == done
    at_once = submit(service, body, priority=2)
    assert at_once["state"] == "completed"
    assert read(at_once) == at_once


def test_a_job_that_has_changed_since_its_upload_is_predicted_as_it_is_now(service: Api) -> None:
    """By other processes: this one does not read what it has just created."""
    cancelled, queued, deleted, kept = (service.upload(CSV)["id"] for _ in range(4))
    with closing(Database(service.settings.database_url)) as database, database.write() as connection:
        requests.request_cancel(connection, cancelled, time.time())
        requests.delete_if_not_running(connection, deleted)
        asked: dict[str, Any] = {"metadata": {}, "priority": -5, "run_after": time.time() + 3600}
        model = registry.resolve(connection, "iris")
        requests.enqueue_if_uploaded(connection, queued, model, Options("jsonl"), "r" * 64, **asked, now=time.time())

    def predict(job_id: str, **options: Any) -> httpx2.Response:
        return service.http.post(f"/v1/predict/{job_id}", params={"model": "iris", "reuse": False, **options})

    problem(predict(cancelled), 409, "job-conflict")
    problem(predict(deleted), 404, "job-not-found")
    other = ok(predict(queued), 202)
    assert other["id"] != queued
    assert other["input"]["sha256"] == ok(service.http.get(f"/v1/jobs/{queued}"))["input"]["sha256"]
    problem(predict(kept, model="missing"), 404, "model-not-found")
    assert ok(predict(kept), 202)["state"] == "completed"


def test_the_end_has_its_event(service: Api) -> None:
    job = submit(service, CSV)
    with closing(Database(service.settings.database_url)) as database, database.read() as connection:
        found = connection.scalars(select(events.c.state).where(events.c.job_id == job["id"])).all()
    assert found == ["completed"]


def test_an_equal_job_is_reused(service: Api) -> None:
    body = CSV + "1,2,3,4\n"
    first = submit(service, body)
    again = submit(service, body, 200, reuse=True)
    assert again["reused_from"] == first["id"]


def test_a_key_gives_the_same_job(service: Api) -> None:
    ask: dict[str, Any] = {"params": {"model": "iris", "reuse": False}, "headers": {"idempotency-key": "k-direct"}}
    first = ok(service.http.post("/v1/predict", content=CSV, **ask), 202)
    again = service.http.post("/v1/predict", content=CSV, **ask)
    assert (again.json()["id"], again.headers["idempotency-replayed"]) == (first["id"], "true")


@pytest.mark.parametrize(
    ("body", "options"),
    [
        (CSV, {"run_after": "2999-01-01T00:00:00Z"}),
        (CSV, {"priority": -1, "run_after": "2999-01-01T00:00:00Z"}),
        (HEADER + ROW * 5000, {}),
    ],
    ids=["later", "low", "long"],
)
def test_other_jobs_are_queued(service: Api, body: str, options: dict[str, Any]) -> None:
    job = submit(service, body, **options)
    assert job["state"] in ("queued", "running")
    service.http.delete(job["links"]["self"])


def test_without_a_worker_nothing_is_scored(tmp_path: Path, iris_onnx: Path) -> None:
    with running(tmp_path, worker=False) as api:
        api.register("iris", iris_onnx)
        assert submit(api, CSV)["state"] == "queued"


@pytest.mark.parametrize(
    ("options", "body", "code"),
    [
        ({"on_row_error": "fail"}, SOME_FAIL, "too-many-row-errors"),
        ({"max_errors": 0}, SOME_FAIL, "too-many-row-errors"),
        ({}, HEADER + ",,,\n", "no-row-scored"),
    ],
)
def test_a_job_that_fails_is_ended_by_the_worker(service: Api, options: dict[str, Any], body: str, code: str) -> None:
    job = service.finished(submit(service, body, **options)["id"])
    assert (job["state"], job["error"]["code"]) == ("failed", code)
    assert service.errors(job) or service.http.get(job["links"]["errors"], params={"partial": True}).content


def test_a_job_that_ends_its_process_is_queued_and_others_are_not_affected(tmp_path: Path) -> None:
    with running(tmp_path, direct_seconds=1000) as api:
        api.register("greedy", graphs.greedy())
        began = time.monotonic()
        job = ok(api.http.post("/v1/predict", content="work\n1\n100000\n3\n", params={"model": "greedy"}), 202)
        assert time.monotonic() - began < 60
        done = api.finished(job["id"])
        assert (done["state"], done["rows"]["ok"], done["rows"]["failed"]) == ("completed", 2, 1)
        assert [error["code"] for error in api.errors(done)] == ["out-of-memory"]
        after = ok(api.http.post("/v1/predict", content="work\n7\n", params={"model": "greedy"}), 202)
        assert after["state"] == "completed"
