"""Inputs that are collected and scored together: `POST /v1/jobs/predict`."""

import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx2
import pytest
from commands import Service
from service import Api, ok, problem, running
from sqlalchemy import delete

from batchserve import keys
from batchserve.access import EVERY_TENANT, Scope
from batchserve.db.connect import Database
from batchserve.db.tables import contents

HEADER = "sepal length (cm),sepal width (cm),petal length (cm),petal width (cm)\n"


def rows(first: float, count: int = 1) -> str:
    return HEADER + f"{first},3.5,1.4,0.2\n" * count


def collect(api: Api, model: str = "iris", headers: dict[str, str] | None = None, **options: Any) -> dict[str, Any]:
    params = {"model": model, **options}
    answer: dict[str, Any] = ok(api.http.post("/v1/jobs/predict", params=params, headers=headers), 202)
    return answer


@pytest.fixture
def day(api: Api) -> Iterator[Api]:
    """The service that all tests share, without the uploads of other tests."""
    remove_uploads(api)
    yield api
    remove_uploads(api)


def remove_uploads(api: Api) -> None:
    while uploads := ok(api.http.get("/v1/jobs", params={"state": "uploaded", "limit": 200}))["jobs"]:
        for job in uploads:
            api.http.delete(f"/v1/jobs/{job['id']}")


def test_all_uploaded_inputs_are_queued_except_those_that_do_not_fit_or_name_another_model(day: Api) -> None:
    done = day.run(rows(5.0), "iris")
    fitting = [day.upload(rows(4 + i / 10, 3)) for i in range(3)]
    named = day.upload(rows(6.0), model="iris")
    equal = day.upload(rows(5.0))
    other = day.upload("sepal length (cm),sepal width (cm),petal length (cm)\n5,3,1\n", model="petals")
    lacking = day.upload("sepal length (cm)\n5.0\n")
    broken = day.upload("\n")
    answer = collect(day)
    wanted = [*(job["id"] for job in fitting), named["id"], equal["id"]]
    assert answer["jobs"] == wanted
    assert (answer["queued"], answer["completed"]) == (4, 1)
    assert [(one["id"], one["problem"]["code"]) for one in answer["refused"]] == [
        (lacking["id"], "schema-mismatch"),
        (broken["id"], "invalid-input"),
    ]
    assert "'sepal width (cm)'" in answer["refused"][0]["problem"]["detail"]
    ended = [day.finished(job_id) for job_id in wanted]
    assert [job["state"] for job in ended] == ["completed"] * 5
    assert [job["rows"]["ok"] for job in ended] == [3, 3, 3, 1, 1]
    assert ended[-1]["reused_from"] == done["id"]
    assert {day.job(job["id"])["state"] for job in (other, lacking, broken)} == {"uploaded"}

    again = collect(day)
    assert (again["queued"], again["completed"], again["jobs"]) == (0, 0, [])
    assert [one["id"] for one in again["refused"]] == [lacking["id"], broken["id"]]
    assert collect(day, "petals")["jobs"] == [other["id"]]


def test_without_uploads_nothing_is_queued_and_options_apply_to_all(day: Api) -> None:
    assert collect(day) == {"queued": 0, "completed": 0, "refused": [], "jobs": []}
    ids = [day.upload(rows(4 + i / 10))["id"] for i in range(2)]
    answer = collect(day, format="jsonl", metadata='{"night": "1"}', passthrough="none")
    assert answer["jobs"] == ids
    for job_id in ids:
        job = day.finished(job_id)
        assert (job["result"]["format"], job["metadata"]) == ("jsonl", {"night": "1"})


def test_equal_inputs_that_are_queued_together_are_each_scored(day: Api) -> None:
    ids = [day.upload(rows(5.0))["id"] for _ in range(3)]
    assert collect(day)["jobs"] == ids
    results = {day.result(day.finished(job_id)).content for job_id in ids}
    assert len(results) == 1


def test_options_that_are_invalid_for_every_input_queue_nothing(day: Api) -> None:
    ids = [day.upload(rows(5.0))["id"] for _ in range(2)]
    refusals: tuple[dict[str, str | int], ...]
    refusals = ({"inputs": '{"x": 1}'}, {"top_k": 9}, {"format": "npy"}, {"fromat": "csv"}, {"delimiter": ";"})
    for options in refusals:
        params = {"model": "iris", **options}
        problem(day.http.post("/v1/jobs/predict", params=params), 422, "invalid-options")
    problem(day.http.post("/v1/jobs/predict"), 422, "invalid-options")
    problem(day.http.post("/v1/jobs/predict", params={"model": "none"}), 404, "model-not-found")
    answer = day.http.post("/v1/jobs/predict", params={"model": "iris"}, content=b"a,b\n1,2\n")
    assert answer.status_code in (415, 422)
    assert {day.job(job_id)["state"] for job_id in ids} == {"uploaded"}


@pytest.mark.parametrize("query", ["state=uploaded&model=iris", "state=uploaded", "model=iris&state=queued"])
def test_the_form_before_this_route_is_refused_and_names_it(day: Api, query: str) -> None:
    job_id = day.upload(rows(5.0))["id"]
    body = problem(day.http.post(f"/v1/predict?{query}"), 422, "invalid-options")
    assert "POST /v1/jobs/predict" in body["detail"]
    assert day.job(job_id)["state"] == "uploaded"


def test_a_repeated_request_with_its_key_gets_the_first_response(day: Api) -> None:
    first_id = day.upload(rows(5.0))["id"]
    params = {"model": "iris"}
    first = day.http.post("/v1/jobs/predict", params=params, headers={"idempotency-key": "night-1"})
    later_id = day.upload(rows(6.0))["id"]
    again = day.http.post("/v1/jobs/predict", params=params, headers={"idempotency-key": "night-1"})
    assert again.headers["idempotency-replayed"] == "true"
    assert (ok(first, 202), ok(first, 202)["jobs"]) == (ok(again, 202), [first_id])
    assert day.job(later_id)["state"] == "uploaded"
    other = day.http.post("/v1/jobs/predict", params={**params, "top_k": 2}, headers={"idempotency-key": "night-1"})
    problem(other, 422, "idempotency-mismatch")
    problem(
        day.http.post("/v1/upload", content=rows(1), headers={"idempotency-key": "night-1"}),
        422,
        "idempotency-mismatch",
    )
    assert collect(day, headers={"idempotency-key": "night-2"})["jobs"] == [later_id]


def test_an_input_whose_bytes_are_lost_is_reported_and_the_others_are_queued(day: Api) -> None:
    lost, kept = day.upload(rows(5.0))["id"], day.upload(rows(6.0))["id"]
    with closing(Database(day.settings.database_url)) as database, database.write() as connection:
        connection.execute(delete(contents).where(contents.c.key == f"rows/inputs/{lost}"))
    answer = collect(day)
    assert answer["jobs"] == [kept]
    assert [(one["id"], one["problem"]["code"]) for one in answer["refused"]] == [(lost, "invalid-input")]


@pytest.fixture
def guarded(tmp_path: Path, iris_onnx: Path) -> Iterator[Api]:
    """A separate service, for keys."""
    with running(tmp_path, worker=False) as api:
        api.register("iris", iris_onnx)
        yield api


def test_each_tenant_queues_its_own(guarded: Api) -> None:
    day = guarded
    database = Database(day.settings.database_url)
    with database.write() as connection:
        of = {
            tenant: {"authorization": f"Bearer {keys.create(connection, name, scope, tenant, time.time())[1]}"}
            for name, tenant, scope in (
                ("a", "ann", Scope.USER), ("b", "bob", Scope.USER), ("all", EVERY_TENANT, Scope.ADMIN),
            )
        }  # fmt: skip
    database.close()

    def upload(tenant: str) -> str:
        answer: httpx2.Response = day.http.post("/v1/upload", content=rows(5.0), headers=of[tenant])
        job_id: str = ok(answer, 201)["id"]
        return job_id

    anns, bobs = upload("ann"), upload("bob")
    same_key = {"idempotency-key": "night"}
    assert collect(day, headers=of["ann"] | same_key)["jobs"] == [anns]
    assert collect(day, headers=of["bob"] | same_key)["jobs"] == [bobs]
    later = [upload("ann"), upload("bob")]
    assert collect(day, headers=of[EVERY_TENANT])["jobs"] == later
    problem(day.http.post("/v1/jobs/predict", params={"model": "iris"}), 401, "unauthorized")


@pytest.mark.slow
def test_hundreds_are_queued_in_the_order_of_their_upload(guarded: Api) -> None:
    ids = [guarded.upload(rows(5.0))["id"] for _ in range(250)]
    misfit = guarded.upload("a\n1\n")["id"]
    answer = collect(guarded)
    assert (answer["jobs"], answer["queued"]) == (ids, 250)
    assert [one["id"] for one in answer["refused"]] == [misfit]
    assert [guarded.job(ids[index])["queue_position"] for index in (0, 101, 249)] == [0, 101, 249]


@pytest.mark.sqlite
@pytest.mark.slow
def test_a_server_that_is_killed_between_two_transactions_continues_with_the_rest(
    tmp_path: Path, iris_onnx: Path
) -> None:
    """The request has a key: the whole response is stored, never a part of it."""
    params, key = {"model": "iris"}, {"idempotency-key": "night"}

    @contextmanager
    def serving() -> Iterator[tuple[Service, httpx2.Client]]:
        service = Service(tmp_path, "serve", "--port", "0")
        try:
            with httpx2.Client(base_url=service.wait_for(r" at (http://\S+) ")[1], timeout=60) as http:
                yield service, http
        finally:
            service.end()

    def ask(http: httpx2.Client) -> None:
        with suppress(httpx2.TransportError):
            http.post("/v1/jobs/predict", params=params, headers=key)

    def uploads() -> list[str]:
        with closing(sqlite3.connect(tmp_path / "storage" / "batchserve.db")) as database:
            return [row[0] for row in database.execute("SELECT id FROM jobs WHERE state = 'uploaded' ORDER BY id")]

    with serving() as (service, http):
        ok(http.put("/v1/models/iris", content=iris_onnx.read_bytes()), 201)
        ids = [ok(http.post("/v1/upload", content=rows(4 + i / 100)), 201)["id"] for i in range(250)]
        asking = threading.Thread(target=ask, args=(http,))
        asking.start()
        deadline = time.monotonic() + 60
        while len(uploads()) == 250:
            assert time.monotonic() < deadline
        service.end()
        asking.join()
    left = uploads()
    assert left == ids[-len(left) :], "each part was queued as a whole, the oldest first"
    assert len(left) in (150, 50)
    with serving() as (_, http):
        answer = ok(http.post("/v1/jobs/predict", params=params, headers=key), 202)
        assert (answer["jobs"], answer["refused"]) == (left, [])
        again = http.post("/v1/jobs/predict", params=params, headers=key)
        assert (again.headers["idempotency-replayed"], ok(again, 202)) == ("true", answer)
        for job_id in ids:
            job = ok(http.get(f"/v1/jobs/{job_id}", params={"wait": 60}))
            assert (job["state"], job["rows"]["ok"]) == ("completed", 1)


@pytest.mark.slow
def test_inputs_that_no_process_can_check_are_refused_one_by_one(tmp_path: Path, iris_onnx: Path) -> None:
    with running(tmp_path, worker=False, online_timeout=0.001) as api:
        api.register("iris", iris_onnx)
        ids = [api.upload(rows(5.0))["id"] for _ in range(2)]
        answer = collect(api)
        assert [(one["id"], one["problem"]["code"]) for one in answer["refused"]] == [
            (job_id, "scoring-timeout") for job_id in ids
        ]
        assert answer["jobs"] == []
