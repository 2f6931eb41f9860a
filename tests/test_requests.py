"""Request IDs in responses, problems, jobs and logs, and the access log."""

import json
import re
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest
from commands import FAST, Service, in_this_process
from service import Api, ok, problem
from structlog.testing import capture_logs
from waiting import until

from batchserve import keys
from batchserve.access import Scope
from batchserve.db.connect import Database

CSV = "sepal length (cm),sepal width (cm),petal length (cm),petal width (cm)\n5.1,3.5,1.4,0.2\n"
ONE_FAILS = f"{CSV}5.1,tall,1.4,0.2\n"
LOGGED = FAST | {"BATCHSERVE_LOG_FORMAT": "json", "BATCHSERVE_PROCESSES": "1"}


def named(request_id: str) -> dict[str, str]:
    return {"x-request-id": request_id}


# --- responses -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/livez", 200),
        ("HEAD", "/readyz", 200),
        ("GET", "/metrics", 200),
        ("GET", "/docs", 200),
        ("GET", "/docs/static/favicon.png", 200),
        ("GET", "/openapi.json", 200),
        ("GET", "/", 200),
        ("GET", "/static/style.css", 200),
        ("GET", "/jobs/missing", 404),
        ("GET", "/v1/jobs", 200),
        ("GET", "/v1/jobs/missing", 404),
        ("GET", "/v1/jobs?staet=queued", 422),
        ("GET", "/v1/download/missing", 404),
        ("POST", "/v1/predict/missing", 404),
        ("POST", "/v1/upload", 422),
        ("PATCH", "/v1/upload", 405),
        ("BREW", "/v1/upload", 501),
        ("GET", "/nothing", 404),
    ],
)
def test_every_response_has_the_id_of_its_request(api: Api, method: str, path: str, status: int) -> None:
    answer = api.http.request(method, path, headers=named("night-7"))
    assert answer.status_code == status
    assert answer.headers.get_list("x-request-id") == ["night-7"]
    if answer.headers["content-type"] == "application/problem+json":
        assert answer.json()["request_id"] == "night-7"


def test_requests_that_are_refused_before_all_routes_have_an_id(own_api: Api) -> None:
    foreign = own_api.http.get("/v1/jobs", headers={"host": "evil.example", **named("a")})
    assert problem(foreign, 421, "misdirected-request")["request_id"] == foreign.headers["x-request-id"] == "a"
    crossed = own_api.http.get("/v1/jobs", headers={"origin": "http://evil.example", **named("b")})
    assert problem(crossed, 403, "cross-origin")["request_id"] == crossed.headers["x-request-id"] == "b"
    database: Database = own_api.http.app.state.service.runtime.database  # type: ignore[attr-defined]
    with database.write() as connection:
        keys.create(connection, "night", Scope.ADMIN, "default", 1.0)
    unknown = own_api.http.get("/v1/jobs", headers=named("c"))
    assert problem(unknown, 401, "unauthorized")["request_id"] == unknown.headers["x-request-id"] == "c"


def test_an_unexpected_error_has_an_id(own_api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr("batchserve.api.job_list.read_slice", fail)
    with capture_logs() as lines:
        answer = own_api.http.get("/v1/jobs", headers=named("d"))
    assert [line["action"] for line in lines] == ["request_error"]
    assert problem(answer, 500, "internal-error")["request_id"] == answer.headers["x-request-id"] == "d"


@pytest.mark.parametrize("given", ["x", "night/2026-11-20:7", "!~", "a" * 128])
def test_a_well_formed_id_is_kept(api: Api, given: str) -> None:
    assert api.http.get("/livez", headers=named(given)).headers["x-request-id"] == given


@pytest.mark.parametrize("given", [None, b"", b"a" * 129, b"a b", b"a\tb", "é".encode(), b"\xff", b"a\x7f"])
def test_an_id_that_is_missing_or_malformed_is_replaced_by_a_new_one(api: Api, given: bytes | None) -> None:
    headers = [] if given is None else [(b"x-request-id", given)]
    first, second = (api.http.get("/livez", headers=headers).headers["x-request-id"] for _ in range(2))
    assert first != second
    assert uuid.UUID(first).version == 7


def test_a_response_from_memory_has_the_id_of_its_own_request(api: Api) -> None:
    job = api.run(CSV, "iris")
    for request_id in ("first", "second", "third"):
        answer = api.http.get(job["links"]["self"], headers=named(request_id))
        assert answer.headers.get_list("x-request-id") == [request_id]
    etag = api.http.get(job["links"]["result"]).headers["etag"]
    for extra, status in (
        ({"range": "bytes=0-3"}, 206),
        ({"if-none-match": etag}, 304),
        ({"range": "bytes=9999-"}, 416),
    ):
        answer = api.http.get(job["links"]["result"], headers={**extra, **named("part")})
        assert (answer.status_code, answer.headers["x-request-id"]) == (status, "part")


# --- jobs ------------------------------------------------------------------------------------------------------------


def test_a_job_has_the_id_of_the_predict_that_queued_it(api: Api) -> None:
    uploaded = ok(api.http.post("/v1/upload", content=CSV, headers=named("upload")), 201)
    assert uploaded["request_id"] is None
    query = {"model": "iris", "reuse": "false"}
    queued = ok(api.http.post(f"/v1/predict/{uploaded['id']}", params=query, headers=named("predict")), 202)
    assert queued["request_id"] == "predict"
    again = api.http.post(f"/v1/predict/{uploaded['id']}", params=query, headers=named("again")).json()
    assert (again["id"], again["request_id"]) == (uploaded["id"], "predict")
    assert api.finished(uploaded["id"])["request_id"] == "predict"
    other = {**query, "format": "jsonl"}
    second = ok(api.http.post(f"/v1/predict/{uploaded['id']}", params=other, headers=named("other")), 202)
    assert second["id"] != uploaded["id"]
    assert second["request_id"] == "other"


@pytest.mark.parametrize(
    "query", [{}, {"priority": "-1"}, {"reuse": "true"}], ids=["within the call", "by the worker", "from an equal job"]
)
def test_a_job_of_one_call_has_its_id(api: Api, query: dict[str, str]) -> None:
    api.run(CSV, "iris", reuse="true")
    answer = api.http.post("/v1/predict", content=CSV, params={"model": "iris", "reuse": "false"} | query,
                           headers=named("one-call") | {"prefer": "wait=30"})  # fmt: skip
    job = ok(answer)
    assert (job["state"], job["request_id"]) == ("completed", "one-call")
    assert api.job(job["id"])["request_id"] == "one-call"
    assert [each["request_id"] for each in ok(api.http.get("/v1/jobs?limit=1"))["jobs"]] == ["one-call"]
    assert "<code>one-call</code>" in api.http.get(f"/jobs/{job['id']}").text


def test_jobs_that_are_queued_together_share_an_id(own_api: Api, iris_onnx: Path) -> None:
    own_api.register("iris", iris_onnx)
    uploads = [own_api.upload(CSV)["id"] for _ in range(3)]
    ok(own_api.http.post("/v1/jobs/predict?model=iris&reuse=false", headers=named("all")), 202)
    assert [own_api.job(job_id)["request_id"] for job_id in uploads] == ["all"] * 3


def test_a_job_that_is_retried_has_the_id_of_the_retry(own_api: Api, iris_onnx: Path) -> None:
    own_api.register("iris", iris_onnx)
    query = {"model": "iris", "priority": "-1"}
    job = ok(own_api.http.post("/v1/predict", content=CSV, params=query, headers=named("predict")), 202)
    assert own_api.http.post(job["links"]["cancel"], headers=named("cancel")).is_success
    assert own_api.job(job["id"])["request_id"] == "predict"
    ok(own_api.http.post(f"{job['links']['self']}/retry", headers=named("retry")), 202)
    assert own_api.job(job["id"])["request_id"] == "retry"


def test_a_job_for_the_failed_rows_of_another_has_the_id_of_the_retry(api: Api) -> None:
    job = api.run(ONE_FAILS, "iris")
    rows = {"rows": "failed"}
    retried = ok(api.http.post(f"{job['links']['self']}/retry", json=rows, headers=named("failed-rows")), 202)
    assert retried["id"] != job["id"]
    assert retried["request_id"] == "failed-rows"


# --- logs ------------------------------------------------------------------------------------------------------------


def lines_of(*services: Service) -> list[dict[str, Any]]:
    texts = [service.log.read_text() for service in services]
    return [json.loads(line) for text in texts for line in text.splitlines() if line.startswith("{")]


@contextmanager
def started(folder: Path, *arguments: str, **settings: str) -> Iterator[Service]:
    service = Service(folder, *arguments, settings=LOGGED | settings)
    try:
        if arguments[0] == "serve":
            service.url = service.wait_for(r" at (http://\S+) ")[1]
        yield service
    finally:
        service.end()


def client_of(service: Service, **headers: str) -> httpx2.Client:
    return httpx2.Client(base_url=service.url, headers=headers, timeout=30)


@pytest.mark.slow
def test_each_line_about_a_job_has_the_request_in_another_process(tmp_path: Path, iris_onnx: Path) -> None:
    with started(tmp_path, "serve", "--no-worker", "--port", "0") as server, client_of(server) as http:
        http.put("/v1/models/iris", content=iris_onnx.read_bytes()).raise_for_status()
        query = {"model": "iris", "max_errors": "1"}
        answer = http.post("/v1/predict", params=query, content=ONE_FAILS, headers=named("night-1"))
        job = ok(answer, 202)
        bad = "x\n" * 3
        refused = http.post("/v1/predict", params=query, content=bad, headers=named("bad-1"))
        assert refused.status_code == 422
        with started(tmp_path, "worker") as worker:
            until(lambda: http.get(f"/v1/jobs/{job['id']}").json()["state"] == "completed")
            until(lambda: "job_complete" in worker.log.read_text())
            told = [line for line in lines_of(worker) if line.get("job_id") == job["id"]]
            assert [line["action"] for line in told] == ["job_start", "job_complete"]
            assert {line["request_id"] for line in told} == {"night-1"}
            assert [line for line in lines_of(worker) if "job_id" not in line and "request_id" in line] == []
            assert [line for line in lines_of(server) if line.get("action") == "access"] == []


@pytest.mark.slow
def test_a_job_that_is_rescued_keeps_its_request_in_the_log(tmp_path: Path, iris_onnx: Path) -> None:
    """The first worker is killed while it has the job; the lines of the second name the request."""
    with started(tmp_path, "serve", "--no-worker", "--port", "0") as server, client_of(server) as http:
        http.put("/v1/models/iris", content=iris_onnx.read_bytes()).raise_for_status()
        header, row, _ = CSV.split("\n")
        content = f"{header}\n" + f"{row}\n" * 400_000
        answer = http.post("/v1/predict", params={"model": "iris"}, content=content, headers=named("night-2"))
        job_id = ok(answer, 202)["id"]
        with started(tmp_path, "worker") as first:
            until(lambda: "job_start" in first.log.read_text())
        with started(tmp_path, "worker") as second:
            until(lambda: http.get(f"/v1/jobs/{job_id}").json()["state"] == "completed")
            until(lambda: "job_complete" in second.log.read_text())
            told = [line for line in lines_of(second) if line.get("job_id") == job_id]
        assert [line["action"] for line in told] == ["job_rescue", "job_start", "job_complete"]
        assert {line["request_id"] for line in told} == {"night-2"}


# --- the access log --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Service, httpx2.Client]]:
    """A server that logs requests, and a client with a key."""
    folder = tmp_path_factory.mktemp("watched")
    made = in_this_process(folder, "keys", "create", "night", "--scope", "admin", "--tenant", "acme")
    key = re.search(r"bs_\w+", made.stdout)
    assert key is not None, made.stderr
    with (
        started(folder, "serve", "--no-worker", "--port", "0", BATCHSERVE_ACCESS_LOG="info") as service,
        client_of(service, authorization=f"Bearer {key[0]}") as http,
    ):
        yield service, http


@pytest.fixture
def told(watched: tuple[Service, httpx2.Client]) -> Callable[..., dict[str, Any]]:
    """The only line of the log about a request that is sent, apart from what it has in every case."""
    service, http = watched

    def line(method: str, path: str, **request: Any) -> dict[str, Any]:
        request_id = str(uuid.uuid4())
        headers = request.pop("headers", {}) | named(request_id)
        http.request(method, path, headers=headers, **request)
        until(lambda: request_id in service.log.read_text())
        (found,) = (line for line in lines_of(service) if line.get("request_id") == request_id)
        assert found.pop("seconds") > 0
        assert (found.pop("action"), found.pop("client"), found.pop("method")) == ("access", "127.0.0.1", method)
        assert found.pop("event") == "Request is answered"
        del found["request_id"], found["timestamp"], found["level"]
        return found

    return line


def test_a_line_says_who_asked_for_what_and_what_came(told: Callable[..., dict[str, Any]]) -> None:
    caller = {"tenant": "acme", "key": "night"}
    assert told("GET", "/v1/jobs?limit=1") == {
        "path": "/v1/jobs", "route": "/v1/jobs", "status": 200, "bytes": len(b'{"jobs":[],"next":null,"total":null}'),
        **caller,
    }  # fmt: skip
    missing = told("GET", "/v1/jobs/none")
    assert (missing["route"], missing["status"]) == ("/v1/jobs/{job_id}", 404)
    head = told("HEAD", "/v1/jobs")
    assert (head["status"], head["bytes"]) == (200, 0)
    nothing = told("GET", "/nothing%0Ahere/%1b[31m")
    assert (nothing["path"], nothing["route"], nothing["status"]) == ("/nothing%0Ahere/%1b[31m", None, 404)
    page = told("GET", "/sign-in")
    assert (page["route"], page["tenant"], page["key"], page["status"]) == ("/sign-in", None, None, 200)


def test_nothing_secret_is_logged(told: Callable[..., dict[str, Any]], watched: tuple[Service, httpx2.Client]) -> None:
    service, http = watched
    told("POST", "/sign-out?token=hidden-token", headers={"cookie": "batchserve_key=hidden-cookie"})
    refused = told("GET", "/v1/jobs", headers={"authorization": "Bearer hidden-key"})
    assert (refused["status"], refused["tenant"], refused["key"]) == (401, None, None)
    told("POST", "/sign-in", data={"key": "hidden-form"})
    told("POST", "/v1/upload?filename=hidden-name", content="hidden,content\n1,2\n")
    log = service.log.read_text()
    assert "hidden" not in log
    assert str(http.headers["authorization"]).removeprefix("Bearer ") not in log


def test_probes_are_logged_only_where_they_fail(
    told: Callable[..., dict[str, Any]], watched: tuple[Service, httpx2.Client]
) -> None:
    service, http = watched
    for path in ("/livez", "/readyz", "/metrics"):
        assert http.get(path, headers=named(f"probe-{path[1:]}")).status_code == 200
    assert told("GET", "/metrics", headers={"authorization": "Bearer none"})["status"] == 401
    assert "probe-" not in service.log.read_text()


@pytest.mark.slow
def test_a_level_that_is_not_logged_is_off(tmp_path: Path) -> None:
    with started(tmp_path, "serve", "--no-worker", "--port", "0", BATCHSERVE_ACCESS_LOG="debug") as service:
        with client_of(service) as http:
            assert http.get("/v1/jobs", headers=named("quiet")).headers["x-request-id"] == "quiet"
            assert http.get("/nothing").status_code == 404
        service.end(15)
        assert "quiet" not in service.log.read_text()
