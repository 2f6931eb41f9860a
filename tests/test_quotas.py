"""Limits of tenants: no path adds more jobs, bytes or rows than they allow; who sets them, and who reads them."""

import asyncio
import json
import re
import socket
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx2
import pytest
from bench import Bench, opened, rows_of
from commands import in_this_process
from graphs import busy
from hand import HandEngine
from service import Api, emptied, ok, problem, running
from starlette.testclient import TestClient

from batchserve import Client, intake, keys
from batchserve.access import EVERY_TENANT, Caller, Quota, Scope
from batchserve.db.connect import Database
from batchserve.domain import JobState
from batchserve.errors import QuotaExceeded, StorageQuotaExceeded
from batchserve.jobs import requests
from batchserve.quotas import account, limits
from batchserve.quotas.limits import Limits
from batchserve.web.tokens import COOKIE

HEADER = "sepal length (cm),sepal width (cm),petal length (cm),petal width (cm)\n"
ROW = "5.1,3.5,1.4,0.2\n"
CSV = HEADER + ROW
SIZE = len(CSV)
FAR = "2999-01-01T00:00:00Z"
LARGE = HEADER + ROW * 6000
"""An input that is no row of the database."""
DAY = 86400.0
StartServer = Callable[..., AbstractContextManager[str]]


def rows(count: int, first: float = 5.1) -> str:
    return HEADER + f"{first},3.5,1.4,0.2\n" * count


@dataclass
class Site:
    api: Api

    @property
    def http(self) -> TestClient:
        return self.api.http

    def limit(self, tenant: str = "default", **given: Any) -> None:
        ok(self.http.put(f"/v1/quotas/{tenant}", json=given))

    def submit(self, body: str = CSV, status: int = 202, **options: Any) -> dict[str, Any]:
        """A job that is queued, and is never due."""
        params = {"model": "iris", "run_after": FAR, "reuse": False, **options}
        job: dict[str, Any] = ok(self.http.post("/v1/predict", content=body, params=params), status)
        return job

    def used(self) -> dict[str, int]:
        usage = ok(self.http.get("/v1/usage"))
        return {name: usage[name]["used"] for name in ("jobs", "bytes", "rows_per_day")}

    def refused(self, answer: httpx2.Response, quota: str, limit: int, used: int) -> None:
        status, code = (507, "storage-quota-exceeded") if quota == "bytes" else (429, "quota-exceeded")
        body = problem(answer, status, code)
        assert (body["quota"], body["limit"], body["used"]) == (quota, limit, used)
        assert int(answer.headers["retry-after"]) >= 1


@pytest.fixture(params=[account.SETTLES, 0.0], ids=["new", "kept"])
def age(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """An account that is new, whose counts are those of the rows, and one whose counts are kept."""
    monkeypatch.setattr(account, "SETTLES", request.param)


@pytest.fixture(scope="module")
def idle(database_settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory, iris_onnx: Path) -> Iterator[Api]:
    with running(tmp_path_factory.mktemp("idle"), worker=False, **database_settings) as api:
        api.register("iris", iris_onnx)
        yield api


@pytest.fixture(scope="module")
def busy_api(
    database_settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory, iris_onnx: Path
) -> Iterator[Api]:
    with running(tmp_path_factory.mktemp("busy"), chunk_records=100, **database_settings) as api:
        api.register("iris", iris_onnx)
        yield api


@pytest.fixture
def site(idle: Api) -> Iterator[Site]:
    """A service without a worker: jobs stay queued."""
    yield Site(idle)
    emptied(idle)


@pytest.fixture
def scoring(busy_api: Api) -> Iterator[Site]:
    """A service that scores small jobs within their requests."""
    yield Site(busy_api)
    emptied(busy_api)


# --- jobs ------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("age")
def test_no_more_jobs_are_queued_than_the_quota_allows(site: Site) -> None:
    site.limit(jobs=2)
    first = site.submit()
    site.submit()
    with site.api.unchanged():
        answer = site.http.post("/v1/predict", content=CSV, params={"model": "iris", "reuse": False})
        site.refused(answer, "jobs", 2, 2)
    assert site.used()["jobs"] == 2
    ok(site.http.post(first["links"]["cancel"]), 202)
    site.submit()


def _stored(site: Site, job_id: str) -> httpx2.Response:
    return site.http.post(f"/v1/predict/{job_id}", params={"model": "iris"})


def _copied(site: Site, _: str) -> httpx2.Response:
    (queued,) = ok(site.http.get("/v1/jobs", params={"state": "queued"}))["jobs"]
    return site.http.post(f"/v1/predict/{queued['id']}", params={"model": "iris", "top_k": 1})


def _sent(site: Site, _: str) -> httpx2.Response:
    return site.http.post("/v1/predict", content=LARGE, params={"model": "iris"})


def _retried(site: Site, _: str) -> httpx2.Response:
    (cancelled,) = ok(site.http.get("/v1/jobs", params={"state": "cancelled"}))["jobs"]
    return site.http.post(f"/v1/jobs/{cancelled['id']}/retry")


@pytest.mark.parametrize("path", [_stored, _copied, _sent, _retried])
def test_each_way_to_queue_a_job_is_limited(path: Callable[[Site, str], httpx2.Response], site: Site) -> None:
    ok(site.http.post(site.submit()["links"]["cancel"]), 202)
    site.submit()
    uploaded = site.api.upload(CSV)["id"]
    site.limit(jobs=1)
    with site.api.unchanged():
        site.refused(path(site, uploaded), "jobs", 1, 1)
    assert site.api.job(uploaded)["state"] == "uploaded"
    site.limit(jobs=2)
    assert path(site, uploaded).status_code == 202
    assert site.used()["jobs"] == 2


def test_of_all_uploads_those_within_the_quota_are_queued(site: Site) -> None:
    uploaded = [site.api.upload(rows(1, 5 + number / 10))["id"] for number in range(5)]
    site.limit(jobs=3)
    answer = ok(site.http.post("/v1/jobs/predict", params={"model": "iris"}), 202)
    assert answer["jobs"] == uploaded[:3]
    assert [refused["id"] for refused in answer["refused"]] == uploaded[3:]
    assert {refused["problem"]["code"] for refused in answer["refused"]} == {"quota-exceeded"}
    assert site.used()["jobs"] == 3
    site.limit(jobs=4)
    answer = ok(site.http.post("/v1/jobs/predict", params={"model": "iris"}), 202)
    assert answer["jobs"] == uploaded[3:4]


def test_a_request_that_is_repeated_queues_nothing_and_is_not_refused(site: Site) -> None:
    uploaded = site.api.upload(CSV)["id"]
    headers = {"idempotency-key": "once"}
    params = {"model": "iris", "run_after": FAR}
    first = ok(site.http.post(f"/v1/predict/{uploaded}", params=params), 202)
    keyed = ok(site.http.post("/v1/predict", content=LARGE, params=params, headers=headers), 202)
    site.limit(jobs=1, bytes=1, rows_per_day=0)
    assert ok(site.http.post(f"/v1/predict/{uploaded}", params=params), 202)["id"] == first["id"]
    assert ok(site.http.post("/v1/predict", content=LARGE, params=params, headers=headers), 202)["id"] == keyed["id"]


def test_jobs_that_are_scored_within_their_request_or_reuse_a_result_are_never_queued(scoring: Site) -> None:
    scoring.limit(jobs=0)
    assert scoring.api.run(CSV, "iris")["state"] == "completed"
    again = ok(scoring.http.post("/v1/predict", content=CSV, params={"model": "iris"}), 200)
    assert again["reused_from"] is not None
    answer = scoring.http.post("/v1/predict", content=CSV, params={"model": "iris", "run_after": FAR, "reuse": False})
    scoring.refused(answer, "jobs", 0, 0)


def test_a_retry_of_failed_records_is_limited_and_leaves_nothing(scoring: Site) -> None:
    job = scoring.api.run(HEADER + ROW * 150 + "5.1,tall,1.4,0.2\n", "iris")
    assert (job["state"], job["rows"]["failed"]) == ("completed", 1)
    for quota, limit in (("jobs", 0), ("rows_per_day", 151)):
        ok(scoring.http.put("/v1/quotas/default", json={quota: limit}))
        with scoring.api.unchanged():
            answer = scoring.http.post(f"/v1/jobs/{job['id']}/retry", json={"rows": "failed"})
            scoring.refused(answer, quota, limit, scoring.used()[quota])
    scoring.limit(rows_per_day=1000)
    ok(scoring.http.post(f"/v1/jobs/{job['id']}/retry", json={"rows": "failed"}), 202)


def test_the_page_of_a_job_says_that_it_is_refused(site: Site) -> None:
    site.submit()
    uploaded = site.api.upload(CSV)["id"]
    site.limit(jobs=1)
    token = site.http.get("/").text.partition("?token=")[2].partition('"')[0]
    answer = site.http.post(f"/jobs/{uploaded}/predict?token={token}", data={"model": "iris@1"})
    assert answer.status_code == 429
    assert "allows 1 queued and running jobs" in answer.text


# --- bytes -----------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("age")
@pytest.mark.parametrize("body", [CSV, LARGE], ids=["in a row", "in the storage"])
def test_no_more_bytes_are_stored_than_the_quota_allows(body: str, site: Site) -> None:
    limit = 2 * len(body) + 10
    site.limit(bytes=limit)
    first = site.api.upload(body)
    site.api.upload(body)
    for path in ("/v1/upload", "/v1/predict?model=iris"):
        with site.api.unchanged():
            site.refused(site.http.post(path, content=body), "bytes", limit, 2 * len(body))
    assert site.used()["bytes"] == 2 * len(body)
    assert site.http.delete(first["links"]["self"]).status_code == 204
    assert site.used()["bytes"] == len(body)
    site.api.upload(body)
    site.limit(bytes=3 * len(body))
    site.api.upload(body)  # to the last byte


def test_a_job_is_not_queued_while_nothing_is_left_for_its_result(site: Site) -> None:
    site.limit(bytes=SIZE)
    uploaded = site.api.upload(CSV)["id"]
    answer = site.http.post(f"/v1/predict/{uploaded}", params={"model": "iris"})
    site.refused(answer, "bytes", SIZE, SIZE)
    assert "a result needs space" in answer.json()["detail"]
    site.limit(bytes=SIZE + 1)
    ok(site.http.post(f"/v1/predict/{uploaded}", params={"model": "iris"}), 202)


@pytest.mark.usefixtures("age")
def test_a_result_that_is_scored_within_its_request_must_fit(scoring: Site) -> None:
    result = scoring.api.run(CSV, "iris")["result"]["bytes"]
    taken = SIZE + result
    scoring.limit(bytes=2 * taken - 1)
    assert scoring.used()["bytes"] == taken
    uploaded = scoring.api.upload(CSV)["id"]
    params: dict[str, Any] = {"model": "iris", "reuse": False}
    with scoring.api.unchanged():
        answer = scoring.http.post(f"/v1/predict/{uploaded}", params=params)
        scoring.refused(answer, "bytes", 2 * taken - 1, taken + SIZE)
    scoring.limit(bytes=2 * taken)
    ok(scoring.http.post(f"/v1/predict/{uploaded}", params=params), 202)
    assert scoring.used()["bytes"] == 2 * taken


def test_the_results_of_accepted_jobs_are_kept_beyond_the_quota(scoring: Site) -> None:
    scoring.limit(bytes=len(LARGE) + 1)
    job = scoring.api.run(LARGE, "iris")
    assert job["state"] == "completed"
    assert scoring.used()["bytes"] == len(LARGE) + job["result"]["bytes"]
    scoring.refused(scoring.http.post("/v1/upload", content=CSV), "bytes", len(LARGE) + 1, scoring.used()["bytes"])


@pytest.mark.slow
def test_a_large_body_is_refused_before_it_is_read(start_server: StartServer, tmp_path: Path) -> None:
    with start_server(tmp_path, "--no-worker") as url:
        ok(httpx2.put(f"{url}/v1/quotas/default", json={"bytes": 100_000}))
        host, port = url.removeprefix("http://").split(":")
        for path, key in (("upload", ""), ("predict?model=iris", ""), ("upload", "Idempotency-Key: new\r\n")):
            head = f"POST /v1/{path} HTTP/1.1\r\nHost: {host}\r\n{key}Content-Length: 1000000000\r\n\r\n"
            with socket.create_connection((host, int(port)), 10) as connection:
                connection.sendall(head.encode())
                answer = connection.recv(4096)
            assert answer.startswith(b"HTTP/1.1 507 ")
            assert b"storage-quota-exceeded" in answer


# --- rows ------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("age")
def test_rows_scored_within_a_request_stay_within_the_quota_of_the_day(scoring: Site) -> None:
    scoring.limit(rows_per_day=10)
    assert scoring.api.run(rows(7), "iris")["rows"]["ok"] == 7
    uploaded = scoring.api.upload(rows(4))["id"]
    params: dict[str, Any] = {"model": "iris", "reuse": False}
    with scoring.api.unchanged():
        answer = scoring.http.post(f"/v1/predict/{uploaded}", params=params)
        scoring.refused(answer, "rows_per_day", 10, 7)
        scoring.refused(scoring.http.post("/v1/predict", content=rows(4), params=params), "rows_per_day", 10, 7)
    assert int(answer.headers["retry-after"]) <= DAY + 1
    assert scoring.api.job(uploaded)["state"] == "uploaded"
    assert ok(scoring.http.post("/v1/predict", content=rows(7), params={"model": "iris"}), 200)["reused_from"]
    assert scoring.used()["rows_per_day"] == 7
    assert scoring.api.run(rows(3), "iris")["rows"]["ok"] == 3
    answer = scoring.http.post("/v1/predict", content=CSV, params={"model": "iris", "run_after": FAR, "reuse": False})
    scoring.refused(answer, "rows_per_day", 10, 10)
    usage = ok(scoring.http.get("/v1/usage"))["rows_per_day"]
    tomorrow = (datetime.now(UTC) + timedelta(days=1)).replace(hour=0, minute=0, second=0, microsecond=0)
    assert datetime.fromisoformat(usage["resets_at"]) == tomorrow


@pytest.fixture
def bench(database_url: str, tmp_path: Path) -> Iterator[Bench]:
    with opened(database_url, tmp_path / "storage", HandEngine()) as bench:
        yield bench


def limited(bench: Bench, **given: Any) -> None:
    with bench.database.write() as connection:
        limits.set_limits(connection, Quota("default", **given), bench.database.moment(connection).wall, Caller())


@pytest.mark.usefixtures("age")
@pytest.mark.parametrize("records", [8, 80])
def test_a_job_with_more_rows_than_are_left_fails_and_goes_on_the_next_day(records: int, bench: Bench) -> None:
    limited(bench, rows_per_day=9 + records)
    hand = bench.by_hand(chunk_records=10)
    model = bench.register("busy", busy())
    first = bench.submit(model, rows_of(*range(10)))
    hand.work(*hand.calls())
    second = bench.submit(model, rows_of(*range(records)))
    hand.work(*hand.calls())
    failed = bench.get(second)
    assert bench.get(first).state is JobState.COMPLETED
    assert failed.state is JobState.FAILED
    assert failed.error is not None
    assert (failed.error["code"], failed.error["quota"]) == ("quota-exceeded", "rows_per_day")
    with bench.database.read() as connection:
        now = hand.clock.moment(connection).wall
        assert account.usage_of(connection, "default", now).rows <= 9 + records
    hand.clock.advance(DAY)
    with bench.database.write() as connection:
        requests.retry_if_stopped(connection, second, hand.clock.moment(connection).wall)
    hand.work(*hand.calls())
    done = bench.get(second)
    assert (done.state, done.rows_ok) == (JobState.COMPLETED, records)


@pytest.mark.slow
def test_the_rows_of_a_day_are_counted_once_although_a_commit_is_repeated(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    from test_database_outages import answers_lost

    monkeypatch.setattr(account, "SETTLES", 0.0)
    limited(bench, rows_per_day=1000)
    hand = bench.by_hand(chunk_records=10)
    job_id = bench.submit(bench.register("busy", busy()), rows_of(*range(60)))
    calls = hand.calls()
    lost = answers_lost(monkeypatch)
    hand.work(*calls)
    monkeypatch.undo()
    assert lost[0] >= 8
    assert bench.get(job_id).state is JobState.COMPLETED
    with bench.database.read() as connection:
        now = hand.clock.moment(connection).wall
        assert account.usage_of(connection, "default", now).rows == 60
        assert account.differing(connection) == []


# --- requests --------------------------------------------------------------------------------------------------------


def test_a_tenant_may_send_the_requests_of_a_second_at_once_and_then_as_many_as_time_allows(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    with database.write() as connection:
        limits.set_limits(connection, Quota("red", requests_per_second=4.0), 1.0, Caller())
    known, clock = Limits(database), [100.0]
    monkeypatch.setattr("time.monotonic", lambda: clock[0])

    def admitted(tenant: str, tries: int) -> int:
        refused = []
        for _ in range(tries):
            try:
                asyncio.run(known.admit(tenant))
            except QuotaExceeded as error:
                refused.append(error.extra)
        expected = {"quota": "requests_per_second", "limit": 4.0, "retry_after": 1}
        assert refused == [expected] * len(refused)
        return tries - len(refused)

    assert admitted("red", 10) == 4
    clock[0] += 0.5
    assert admitted("red", 10) == 2
    clock[0] += 60
    assert admitted("red", 10) == 4
    assert admitted("blue", 10) == 10
    assert admitted(EVERY_TENANT, 10) == 10


def test_requests_beyond_the_quota_are_refused_on_the_api_and_the_pages(own_api: Api) -> None:
    texts = made_keys(own_api, operator=(Scope.ADMIN, EVERY_TENANT), ada=(Scope.USER, "red"))
    ok(own_api.http.put("/v1/quotas/red", json={"requests_per_second": 0.01}, headers=texts["operator"]))
    assert own_api.http.get("/v1/jobs", headers=texts["ada"]).status_code == 200
    answer = own_api.http.get("/v1/models", headers=texts["ada"])
    assert problem(answer, 429, "quota-exceeded")["quota"] == "requests_per_second"
    assert int(answer.headers["retry-after"]) > 60
    cookie = f"{COOKIE}={texts['ada']['authorization'].removeprefix('Bearer ')}"
    assert own_api.http.get("/jobs", headers={"cookie": cookie}).status_code == 429
    assert own_api.http.get("/livez").status_code == 200
    for _ in range(3):
        assert own_api.http.get("/v1/jobs", headers=texts["operator"]).status_code == 200


# --- who sets and reads them -----------------------------------------------------------------------------------------


def made_keys(api: Api, **wanted: tuple[Scope, str]) -> dict[str, dict[str, str]]:
    with closing(Database(api.settings.database_url)) as database, database.write() as connection:
        texts = {name: keys.create(connection, name, *key, 1.0)[1] for name, key in wanted.items()}
    return {name: {"authorization": f"Bearer {text}"} for name, text in texts.items()}


def test_quotas_are_set_by_administrators_of_all_tenants_and_audited(own_api: Api) -> None:
    texts = made_keys(
        own_api, operator=(Scope.ADMIN, EVERY_TENANT), root=(Scope.ADMIN, "red"), ada=(Scope.READER, "red")
    )
    http = own_api.http
    for key in ("root", "ada"):
        for method, path in (("GET", "/v1/quotas"), ("GET", "/v1/quotas/red"), ("PUT", "/v1/quotas/red"),
                             ("DELETE", "/v1/quotas/red")):  # fmt: skip
            answer = http.request(method, path, headers=texts[key])
            problem(answer, 403, "forbidden")
        problem(http.get("/v1/usage", params={"tenant": "blue"}, headers=texts[key]), 403, "forbidden")
        assert ok(http.get("/v1/usage", params={"tenant": "red"}, headers=texts[key]))["tenant"] == "red"
    operator = texts["operator"]
    ok(http.put("/v1/quotas/red", json={"jobs": 3, "bytes": 10}, headers=operator))
    ok(http.put("/v1/quotas/*", json={"jobs": 5}, headers=operator))
    told = ok(http.get("/v1/quotas", headers=operator))["quotas"]
    assert [(quota["tenant"], quota["jobs"], quota["bytes"]) for quota in told] == [("*", 5, None), ("red", 3, 10)]
    assert ok(http.get("/v1/quotas/red", headers=operator))["jobs"] == 3
    assert ok(http.get("/v1/usage", headers=texts["ada"]))["jobs"] == {"used": 0, "limit": 3}
    assert ok(http.get("/v1/usage", params={"tenant": "blue"}, headers=operator))["jobs"]["limit"] == 5
    assert http.delete("/v1/quotas/red", headers=operator).status_code == 204
    assert ok(http.get("/v1/usage", headers=texts["ada"]))["jobs"]["limit"] == 5
    problem(http.delete("/v1/quotas/red", headers=operator), 404, "not-found")
    entries = ok(http.get("/v1/audit", headers=operator))["entries"]
    told = [(one["tenant"], one["key"], one["action"], one["subject"]) for one in entries if one["kind"] == "quota"]
    assert told == [
        ("red", "operator", "delete", "red"),
        ("*", "operator", "set", "*"),
        ("red", "operator", "set", "red"),
    ]


@pytest.mark.parametrize(
    ("tenant", "given", "named"),
    [
        ("red", {}, "at least one limit"),
        ("red", {"jobs": -1}, "jobs"),
        ("red", {"jobs": 1.5}, "jobs"),
        ("red", {"jobs": True}, "jobs"),
        ("red", {"bytes": 2**60}, "bytes"),
        ("red", {"requests_per_second": 0}, "requests_per_second"),
        ("red", {"rows": 1}, "rows"),
        ("a b", {"jobs": 1}, "a tenant has letters"),
        ("a%00b", {"jobs": 1}, "a tenant has letters"),
    ],
)
def test_a_quota_that_makes_no_sense_is_refused_by_name(
    tenant: str, given: dict[str, Any], named: str, own_api: Api
) -> None:
    answer = own_api.http.put(f"/v1/quotas/{tenant}", json=given)
    assert named in problem(answer, 422, "invalid-options")["detail"]
    assert ok(own_api.http.get("/v1/quotas"))["quotas"] == []


def test_a_tenant_without_a_quota_has_that_of_all_others(site: Site) -> None:
    site.limit("*", jobs=1)
    site.submit()
    site.refused(site.http.post("/v1/predict", content=CSV, params={"model": "iris"}), "jobs", 1, 1)
    site.limit("default", bytes=10**9)  # its own, which limits no jobs
    site.submit()
    assert site.http.delete("/v1/quotas/default").status_code == 204
    site.refused(site.http.post("/v1/predict", content=CSV, params={"model": "iris"}), "jobs", 1, 2)
    assert site.http.delete("/v1/quotas/*").status_code == 204
    site.submit()
    with closing(Database(site.api.settings.database_url)) as database, database.read() as connection:
        assert account.usages(connection, 1.0) == []


def test_nothing_is_charged_to_a_tenant_without_a_quota(scoring: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    scoring.limit("other", jobs=0, bytes=0, rows_per_day=0)

    def charged(*_: object, **__: object) -> None:
        raise AssertionError("a tenant without a quota was charged")

    monkeypatch.setattr(account, "charge", charged)
    assert scoring.api.run(CSV, "iris")["state"] == "completed"
    assert scoring.api.run(LARGE, "iris")["state"] == "completed"
    assert scoring.used()["bytes"] > len(LARGE)


def test_the_limits_are_read_once_a_second(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, known = [100.0], Limits(database)
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    assert asyncio.run(known.of("red")) is None
    with database.write() as connection:
        limits.set_limits(connection, Quota("red", jobs=1), 1.0, Caller())
    assert asyncio.run(known.of("red")) is None
    clock[0] += limits.FRESH + 0.01
    assert asyncio.run(known.of("red")) == Quota("red", jobs=1)


def test_commands_set_list_and_remove_quotas_and_show_what_is_used(site: Site, tmp_path: Path) -> None:
    own = {"BATCHSERVE_STORAGE": site.api.settings.storage, "BATCHSERVE_DATABASE": site.api.settings.database_url}

    def command(*words: str) -> str:
        done = in_this_process(tmp_path, *words, **own)
        assert done.returncode == 0, done.stderr
        return done.stdout

    command("quotas", "set", "default", "--jobs", "5", "--bytes", "1000000")
    command("quotas", "set", "*", "--requests-per-second", "20")
    site.http.app.state.service.limits.forget()  # type: ignore[attr-defined]
    site.submit()
    lines = [line.split("\t") for line in command("quotas", "list").splitlines()]
    assert lines == [
        ["*", "", "", "", "", "", "", "20"],
        ["default", "1", "5", str(SIZE), "1000000", "0", "", ""],
    ]
    told = json.loads(command("quotas", "list", "--json"))
    assert [quota["tenant"] for quota in told["quotas"]] == ["*", "default"]
    assert told["usage"][0]["bytes"] == SIZE
    command("quotas", "recount", "default")
    command("quotas", "rm", "default")
    command("quotas", "rm", "*")
    assert command("quotas", "list") == ""
    done = in_this_process(tmp_path, "quotas", "rm", "nobody", **own)
    assert done.returncode == 1
    assert "there is no quota of the tenant 'nobody'" in done.stderr
    done = in_this_process(tmp_path, "quotas", "set", "default", **own)
    assert "at least one limit" in done.stderr


def test_a_client_sets_quotas_and_reads_what_is_used(server: str) -> None:
    with Client(server) as client:
        client.quotas.set("nobody", jobs=2, requests_per_second=0.5)
        assert client.quotas.get("nobody")["jobs"] == 2
        assert [quota["tenant"] for quota in client.quotas.list()] == ["nobody"]
        assert client.quotas.usage("nobody")["jobs"] == {"used": 0, "limit": 2}
        client.quotas.set("nobody", bytes=0)
        assert client.quotas.get("nobody")["jobs"] is None
        client.quotas.remove("nobody")
        assert client.quotas.usage()["jobs"]["limit"] is None


def test_the_command_shows_what_the_tenant_uses(server: str, tmp_path: Path) -> None:
    done = in_this_process(tmp_path, "usage", BATCHSERVE_URL=server)
    assert done.returncode == 0, done.stderr
    assert "tenant\tdefault" in done.stdout
    assert re.search(r"jobs queued or running\t\d+, unlimited", done.stdout)
    assert json.loads(in_this_process(tmp_path, "usage", "--json", BATCHSERVE_URL=server).stdout)["tenant"] == "default"


def test_metrics_show_limits_and_what_is_used(site: Site) -> None:
    site.limit(jobs=5, requests_per_second=100)
    site.submit()
    text = site.http.get("/metrics").text
    assert 'batchserve_quota_used{quota="jobs",tenant="default"} 1.0' in text
    assert f'batchserve_quota_used{{quota="bytes",tenant="default"}} {float(SIZE)}' in text
    assert 'batchserve_quota_limit{quota="jobs",tenant="default"} 5.0' in text
    assert 'batchserve_quota_limit{quota="requests_per_second",tenant="default"} 100.0' in text
    assert 'batchserve_quota_limit{quota="bytes"' not in text


def test_the_page_shows_sets_and_removes_quotas(own_api: Api) -> None:
    http = own_api.http
    token = http.get("/").text.partition("?token=")[2].partition('"')[0]
    form = {"tenant": "red", "jobs": "7", "bytes": ""}
    assert "No tenant has a quota" in http.get("/system/quotas").text
    assert http.post(f"/system/quotas?token={token}", data=form, follow_redirects=False).status_code == 303
    http.post(f"/system/quotas?token={token}", data={"tenant": "*", "requests_per_second": "50"})
    text = http.get("/system/quotas").text
    assert "0 of 7" in text
    assert "each other" in text
    assert http.post(f"/system/quotas?token={token}", data={"tenant": "red", "jobs": "x"}).status_code == 422
    http.post(f"/system/quotas?token={token}", data={"tenant": "red", "action": "remove"})
    assert [quota["tenant"] for quota in ok(http.get("/v1/quotas"))["quotas"]] == ["*"]
    texts = made_keys(own_api, root=(Scope.ADMIN, "red"), ada=(Scope.USER, "red"))
    for name, status in (("root", 200), ("ada", 403)):
        http.post("/sign-in", data={"key": texts[name]["authorization"].removeprefix("Bearer ")})
        answer = http.get("/system/quotas")
        assert answer.status_code == status
        assert "Set a quota" not in answer.text
        token = http.get("/").text.partition("?token=")[2].partition('"')[0]
        assert http.post(f"/system/quotas?token={token}", data=form).status_code == 403


def test_an_administrator_of_all_tenants_is_limited_by_the_tenant_of_a_job(own_api: Api, iris_onnx: Path) -> None:
    own_api.register("iris", iris_onnx)
    texts = made_keys(own_api, operator=(Scope.ADMIN, EVERY_TENANT), ada=(Scope.USER, "red"))
    http, operator = own_api.http, texts["operator"]
    uploaded = ok(http.post("/v1/upload", content=CSV, headers=texts["ada"]), 201)["id"]
    ok(http.put("/v1/quotas/red", json={"jobs": 0}, headers=operator))
    answer = http.post(f"/v1/predict/{uploaded}", params={"model": "iris"}, headers=operator)
    assert problem(answer, 429, "quota-exceeded")["quota"] == "jobs"
    answer = ok(http.post("/v1/jobs/predict", params={"model": "iris"}, headers=operator), 202)
    assert [refused["id"] for refused in answer["refused"]] == [uploaded]
    ok(http.post("/v1/predict", content=CSV, params={"model": "iris"}, headers=operator), 202)  # of the tenant default


def test_an_error_of_a_quota_travels_between_processes() -> None:
    import pickle

    for kind in (QuotaExceeded, StorageQuotaExceeded):
        error = pickle.loads(pickle.dumps(kind("too much", quota="jobs", limit=1, used=1)))
        assert error.extra == {"quota": "jobs", "limit": 1, "used": 1}


@pytest.mark.slow
def test_jobs_over_inputs_in_place_are_limited_and_count_only_what_is_kept_here(
    tmp_path: Path, iris_onnx: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(account, "SETTLES", 0.0)
    lake = tmp_path / "lake"
    for name in ("in", "out"):
        (lake / name).mkdir(parents=True)
    (lake / "in" / "a.csv").write_text(rows(150))
    allowed: dict[str, Any] = {f"{name}put_prefixes": {"*": [f"file://{lake}/{name}/"]} for name in ("in", "out")}
    request = {"input": {"urls": [f"file://{lake}/in/*.csv"]}, "model": "iris"}
    with running(tmp_path / "store", keep_results="3d", **allowed) as api:
        api.register("iris", iris_onnx)
        site = Site(api)
        site.limit(jobs=0)
        site.refused(site.http.post("/v1/jobs", json=request), "jobs", 0, 0)
        with closing(Database(api.settings.database_url)) as database:
            with pytest.raises(QuotaExceeded):  # as a schedule does
                intake.submit(database, api.settings, "default", intake.JobRequest.model_validate(request))
            told = problem(site.http.post("/v1/jobs", json={**request, "expires_in": "4d"}), 422, "invalid-options")
            assert "expires_in" in told["detail"]
            site.limit(jobs=5, bytes=10**9, rows_per_day=300)
            elsewhere = {**request, "output": {"url": f"file://{lake}/out/a.csv"}}
            written = api.finished(ok(site.http.post("/v1/jobs", json=elsewhere), 202)["id"])
            assert written["state"] == "completed"
            assert (site.used()["bytes"], site.used()["rows_per_day"]) == (0, 150)
            kept = api.finished(ok(site.http.post("/v1/jobs", json=request), 202)["id"])
            assert site.used()["bytes"] == kept["result"]["bytes"]
            site.refused(site.http.post("/v1/jobs", json={**request, "reuse": False}), "rows_per_day", 300, 300)
            for job in (written, kept):
                assert site.http.delete(job["links"]["self"]).status_code == 204
            with database.read() as connection:
                assert account.differing(connection) == []
            assert site.used()["bytes"] == 0
