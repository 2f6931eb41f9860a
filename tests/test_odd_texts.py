"""Every text of a request with characters and lengths that a database refuses, on every kind of database."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx2
import orjson
import pytest
from service import Api, running
from sqlalchemy import Connection

from batchserve import keys, registry
from batchserve.access import Scope
from batchserve.db.connect import Database
from batchserve.errors import BatchserveError
from batchserve.jobs import queries

CSV = "sepal length (cm),sepal width (cm),petal length (cm),petal width (cm)\n5.1,3.5,1.4,0.2\n"
ODD = {
    "NUL": "a\0b",
    "NUL alone": "\0",
    "long": "x" * 300,
    "very long": "x" * 5000,
    "emoji": "\U0001f600" * 200,
    "control": "a\x01b",
}
IN_QUERIES = [
    ("GET", "/v1/jobs", ("model", "q", "after", "state")),
    ("POST", "/v1/upload", ("filename", "model", "columns", "delimiter", "decimal", "encoding", "sheet")),
    ("POST", "/v1/predict", ("model", "filename", "format", "passthrough", "columns", "metadata", "delimiter")),
    ("POST", "/v1/predict/{job}", ("model", "format", "columns", "run_after", "metadata", "webhook")),
    ("GET", "/v1/webhooks/jobs/deliveries", ("after", "state")),
    ("GET", "/v1/models", ("q", "name")),
]
IN_PATHS = [
    *(("GET", f"/v1/{path}") for path in ("jobs/{odd}", "jobs/{odd}/events", "download/{odd}", "download/{odd}/input")),
    *(("POST", f"/v1/{path}") for path in ("jobs/{odd}/cancel", "jobs/{odd}/retry", "predict/{odd}")),
    *(("GET", f"/v1/models/{path}") for path in ("{odd}", "{odd}/versions", "iris/versions/{odd}", "iris@{odd}")),
    *(("GET", f"/v1/webhooks/{path}") for path in ("{odd}", "{odd}/deliveries", "jobs/deliveries/{odd}")),
    *(("POST", f"/v1/webhooks/{path}") for path in ("{odd}/test", "{odd}/rotate", "{odd}/deliveries/{odd}/redeliver")),
    ("PUT", "/v1/models/{odd}"),
    ("POST", "/v1/models/{odd}/predict"),
    ("DELETE", "/v1/models/{odd}/versions/1"),
    ("DELETE", "/v1/jobs/{odd}"),
    *(("GET", f"/v1/schedules/{path}") for path in ("{odd}", "{odd}/ticks", "?after={odd}")),
    *(("POST", f"/v1/schedules/{path}") for path in ("{odd}/run", "{odd}/pause", "{odd}/resume")),
    ("DELETE", "/v1/schedules/{odd}"),
]
HEADERS = ("idempotency-key", "authorization", "content-disposition", "content-type", "if-none-match", "prefer")


@pytest.fixture(scope="module", params=["sqlite", pytest.param("postgres", marks=pytest.mark.postgres)])
def api(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, iris_onnx: Path) -> Iterator[Api]:
    address: dict[str, Any] = {}
    if request.param == "postgres":
        address["database"] = request.getfixturevalue("postgres_server").lasting()
    with running(tmp_path_factory.mktemp("odd"), worker=False, **address) as api:
        api.register("iris", iris_onnx)
        yield api


def answers(api: Api, odd: str) -> Iterator[httpx2.Response]:
    ask, job = api.http.request, api.upload(CSV)["id"]
    for method, path, names in IN_QUERIES:
        for name in names:
            content = CSV if method == "POST" else None
            yield ask(method, path.format(job=job), params={"model": "iris", name: odd}, content=content)
    for method, path in IN_PATHS:
        content = CSV if method in ("POST", "PUT") else None
        yield ask(method, path.format(odd=quote(odd, safe="")), content=content)
    options: list[dict[str, Any]] = [{"metadata": {"k": odd}}, {"metadata": {odd: "v"}}, {"columns": {odd: odd}}]
    for option in (*options, {"model": odd}, {odd: odd}, {"passthrough": odd}):
        yield ask("POST", f"/v1/predict/{job}", content=orjson.dumps({"model": "iris", **option}))
    for name in HEADERS:
        yield ask("POST", "/v1/predict", params={"model": "iris"}, content=CSV, headers={name.encode(): odd.encode()})


@pytest.mark.parametrize("odd", ODD.values(), ids=ODD)
def test_no_text_of_a_request_is_a_fault_of_the_server(api: Api, odd: str) -> None:
    statuses = []
    for answer in answers(api, odd):
        assert answer.status_code < 500, f"{answer.request.method} {answer.request.url}: {answer.text}"
        if answer.status_code >= 400:
            problem = answer.json()
            assert problem["detail"], problem
            assert "psycopg" not in problem["detail"]
        statuses.append(answer.status_code)
    assert len(statuses) > 40
    if "\0" in odd:  # also where a client could not have meant it
        assert sum(status < 400 for status in statuses) <= 8


@pytest.mark.parametrize("number", [2**31, 2**63, -(2**31) - 1, 10**30])
def test_no_number_of_a_request_is_a_fault_of_the_server(api: Api, number: int) -> None:
    for path in ("/v1/models/iris/versions/{}", "/v1/models/iris@{}", "/v1/jobs?limit={}", "/v1/jobs?model=iris@{}"):
        assert api.http.get(path.format(number)).status_code in (404, 422)
    assert api.http.delete(f"/v1/models/iris/versions/{number}").status_code in (404, 422)
    for name in ("priority", "max_errors", "top_k"):
        answer = api.http.post("/v1/predict", params={"model": "iris", name: number}, content=CSV)
        assert answer.status_code < 500, answer.text


@pytest.mark.parametrize("odd", ODD.values(), ids=ODD)
def test_no_text_of_a_command_is_a_fault_of_the_program(database: Database, odd: str) -> None:
    calls: list[Callable[[Connection], object]] = [
        lambda connection: keys.create(connection, odd, Scope.USER, "default", 1.0),
        lambda connection: keys.create(connection, "k", Scope.USER, odd, 1.0),
        lambda connection: keys.revoke(connection, odd, 1.0),
        lambda connection: registry.resolve(connection, odd),
        lambda connection: queries.require_seen(connection, odd, "default"),
    ]
    for call in calls:
        with pytest.raises(BatchserveError) as refused, database.write() as connection:
            call(connection)
        assert refused.value.status in range(400, 500)
