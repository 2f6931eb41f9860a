"""API keys and tenants: no request is served without a key, and no tenant sees the jobs of another."""

import asyncio
import json
import time
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import httpx2
import pytest
from commands import in_a_process, in_this_process
from conftest import serving
from service import Api, ok, problem, running
from sqlalchemy import insert
from starlette.types import Message

from batchserve import idempotency, keys
from batchserve.access import EVERY_TENANT, Scope
from batchserve.api.auth import Keyring
from batchserve.api.cache import AnswerCache
from batchserve.client import AsyncClient, AuthenticationFailed, Client
from batchserve.db.connect import Database, Moment
from batchserve.db.lasting import driver_of
from batchserve.db.tables import inputs
from batchserve.db.tables import jobs as job_rows
from batchserve.db.watcher import Version
from batchserve.domain import StoredInput
from batchserve.errors import Conflict, InvalidOptions, JobNotFound, NotFound
from batchserve.jobs import execution, queries, requests
from batchserve.settings import Settings

ROW = "5.1,3.5,1.4,0.2\n"
CSV = f"sepal length (cm),sepal width (cm),petal length (cm),petal width (cm)\n{ROW}"
PUBLIC = {"/livez", "/readyz"}
OF_QUOTAS = {"list_quotas", "get_quota", "set_quota", "delete_quota"}
FOR_ADMINISTRATORS = {"register_model", "delete_version", "list_audit", "get_metrics"} | OF_QUOTAS
NO_WEBHOOK = {"webhook_id": "none", "delivery_id": "none", "tenant": "red"}


def database_of(api: Api) -> Database:
    return Database(api.settings.database_url)


def make_key(api: Api, name: str, scope: Scope = Scope.USER, tenant: str = "default") -> str:
    database = database_of(api)
    try:
        with database.write() as connection:
            return keys.create(connection, name, scope, tenant, time.time())[1]
    finally:
        database.close()


def revoke_key(api: Api, name: str) -> None:
    database = database_of(api)
    try:
        with database.write() as connection:
            keys.revoke(connection, name, time.time())
    finally:
        database.close()


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


@contextmanager
def as_(api: Api, key: str | None) -> Iterator[Api]:
    """Makes the client of the service send this key."""
    before = dict(api.http.headers)
    if key is not None:
        api.http.headers["authorization"] = f"Bearer {key}"
    try:
        yield api
    finally:
        api.http.headers.clear()
        api.http.headers.update(before)


@dataclass(frozen=True)
class Guarded:
    """A service with an admin key and a key of each of two tenants, and a finished job of each tenant."""

    api: Api
    admin: str
    all: str
    red: str
    blue: str
    reader: str
    """Of the tenant red."""
    job: dict[str, Any]
    """Of the tenant red."""
    blues: dict[str, Any]

    def get(self, key: str, path: str, **params: Any) -> httpx2.Response:
        return self.api.http.get(path, headers=bearer(key), params=params)


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory, iris_onnx: Path) -> Iterator[Guarded]:
    with running(tmp_path_factory.mktemp("guarded")) as api:
        api.register("iris", iris_onnx)
        admin = make_key(api, "admin", Scope.ADMIN)
        all_ = make_key(api, "operator", Scope.ADMIN, EVERY_TENANT)
        red, blue = make_key(api, "red", tenant="red"), make_key(api, "blue", tenant="blue")
        reader = make_key(api, "reader", Scope.READER, "red")
        with as_(api, red):
            job = api.run(CSV, "iris", filename="red.csv")
        with as_(api, blue):
            blues = api.run(CSV + ROW, "iris", filename="blue.csv")
        yield Guarded(api, admin, all_, red, blue, reader, job, blues)


def operations(guarded: Guarded) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Method, path and description of every operation of the OpenAPI document."""
    document = ok(guarded.api.http.get("/openapi.json"))
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            yield method.upper(), path, operation


# --- the format of a key ---------------------------------------------------------------------------------------------


def test_a_key_has_256_random_bits_a_prefix_and_a_checksum() -> None:
    made = {keys.generate() for _ in range(200)}
    assert len(made) == 200
    digits = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
    values = []
    for key in made:
        assert key.startswith("bs_")
        assert len(key) == 52
        checksum = 0
        for digit in key[-6:]:
            checksum = 62 * checksum + digits.index(digit)
        assert checksum == zlib.crc32(key[:-6].encode())
        value = 0
        for digit in key[3:-6]:
            value = 62 * value + digits.index(digit)
        values.append(value)
    assert max(values) < 2**256
    for bit in range(256):  # no bit is constant: by chance one is with a probability of 2**-199
        assert len({value >> bit & 1 for value in values}) == 2, bit


def test_a_mistyped_key_is_detected_by_its_checksum() -> None:
    key = keys.generate()
    assert keys.is_well_formed(key)
    other = {place: key[:place] + ("1" if key[place] == "0" else "0") + key[place + 1 :] for place in range(3, 52)}
    swapped = key.replace("bs_", "BS_"), key.replace("bs_", "gh_"), key.removeprefix("bs_")
    for mistyped in (*other.values(), *swapped, key[:-1], key[1:], key + "0", 2 * key, f" {key}", f"{key}\n", ""):
        assert not keys.is_well_formed(mistyped), mistyped


def test_only_the_digest_of_a_key_is_stored(database: Database) -> None:
    with database.write() as connection:
        made, text = keys.create(connection, "night", Scope.USER, "red", 5.0)
    with database.read() as connection:
        rows = connection.exec_driver_sql("SELECT * FROM keys").all()
        assert keys.find(connection, text) == made
        assert keys.find(connection, keys.generate()) is None
    assert text not in str(rows)
    assert text[12:] not in str(rows)
    assert (made.prefix, made.tenant, made.scope) == (text[:9], "red", Scope.USER)


def test_a_revoked_key_is_no_longer_found_and_its_name_is_free(database: Database) -> None:
    with database.write() as connection:
        assert not keys.exist(connection)
        first, text = keys.create(connection, "night", Scope.ADMIN, "default", 5.0)
        assert keys.has_admin(connection)
        with pytest.raises(Conflict, match="night"):
            keys.create(connection, "night", Scope.USER, "default", 6.0)
        assert keys.revoke(connection, "night", 7.0).revoked_at == 7.0
        assert keys.find(connection, text) is None
        assert keys.exist(connection)
        assert not keys.has_admin(connection)
        with pytest.raises(NotFound, match="night"):
            keys.revoke(connection, "night", 8.0)
        second, _ = keys.create(connection, "night", Scope.USER, "default", 9.0)
        assert keys.revoke(connection, str(second.id), 10.0).name == "night"
        assert [key.revoked_at for key in keys.list_all(connection)] == [7.0, 10.0]
        assert first.id != second.id


@pytest.mark.parametrize(
    ("name", "scope", "tenant"),
    [
        ("", Scope.USER, "red"),
        ("12", Scope.USER, "red"),
        ("a b", Scope.USER, "red"),
        ("a", Scope.USER, ""),
        ("a", Scope.USER, EVERY_TENANT),
        ("a", Scope.READER, EVERY_TENANT),
        ("a", Scope.ADMIN, "re*"),
        ("a" * 65, Scope.USER, "red"),
    ],
)
def test_names_and_tenants_are_short_words_and_only_administrators_see_all(
    name: str, scope: Scope, tenant: str, database: Database
) -> None:
    with pytest.raises(InvalidOptions), database.write() as connection:
        keys.create(connection, name, scope, tenant, 1.0)
    with database.read() as connection:
        assert keys.list_all(connection) == []


# --- authentication --------------------------------------------------------------------------------------------------


def test_every_route_except_the_public_ones_requires_a_key(guarded: Guarded) -> None:
    asked = 0
    for method, path, operation in operations(guarded):
        url = path.format(
            job_id=guarded.job["id"], upload_id="none", schedule_id="none", name="iris", version="1", **NO_WEBHOOK
        )
        answer = guarded.api.http.request(method, url)
        if path in PUBLIC:
            assert (answer.status_code, operation["security"]) == (200, []), path
            continue
        assert problem(answer, 401, "unauthorized")["detail"].startswith("an API key is needed")
        assert answer.headers["www-authenticate"].startswith("Bearer")
        assert operation["security"] == [{"key": []}]
        asked += 1
    assert asked >= 20
    for path in ("/docs", "/docs/static/swagger-ui.css", "/openapi.json"):
        assert guarded.api.http.get(path).status_code == 200
    for path in ("/v1", "/v1/none", "/docs/../v1/jobs", "/livez/x", "//v1/jobs", "/docs/static/../../v1/jobs"):
        assert guarded.api.http.get(path, follow_redirects=False).status_code in (303, 401, 404), path
    for path in ("/docs/static/none", "/docs/static/v1/jobs/none"):
        problem(guarded.api.http.get(path), 404, "not-found")
    assert guarded.api.http.get("/v1/none").status_code == 401  # not even which routes there are


@pytest.mark.parametrize(
    "header",
    [
        "",
        "Bearer",
        "Bearer ",
        "Basic YTpi",
        "Bearer bs_short",
        f"Bearer {'x' * 100_000}",
        pytest.param(f"Bearer {keys.generate()}", id="an unknown key"),
        pytest.param(f"Basic {keys.generate()}", id="a key by another scheme"),
        "Bearer bs_é",
    ],
)
def test_an_invalid_key_is_refused(header: str, guarded: Guarded) -> None:
    answer = guarded.api.http.get("/v1/jobs", headers=[(b"authorization", header.encode())])
    body = problem(answer, 401, "unauthorized")
    assert not header or len(header) < 8 or header[7:] not in body["detail"]


def test_a_key_in_the_address_is_ignored(guarded: Guarded) -> None:
    for name in ("key", "api_key", "access_token", "token"):
        problem(guarded.api.http.get("/v1/jobs", params={name: guarded.admin}), 401, "unauthorized")


def test_administration_needs_an_admin_key(guarded: Guarded, iris_onnx: Path) -> None:
    refused = set()
    for method, path, operation in operations(guarded):
        url = path.format(job_id="none", upload_id="none", schedule_id="none", name="mine", version="1", **NO_WEBHOOK)
        answer = guarded.api.http.request(method, url, headers=bearer(guarded.red), content=iris_onnx.read_bytes())
        assert answer.status_code != 401, url
        if answer.status_code == 403:
            problem(answer, 403, "forbidden")
            refused.add(operation["operationId"])
    assert refused == FOR_ADMINISTRATORS
    assert [model["name"] for model in ok(guarded.get(guarded.red, "/v1/models"))["models"]] == ["iris"]
    registered = guarded.api.http.put("/v1/models/iris", content=iris_onnx.read_bytes(), headers=bearer(guarded.admin))
    assert registered.status_code == 200
    assert "batchserve_jobs" in guarded.get(guarded.admin, "/metrics").text


def test_a_reader_gets_what_a_user_reads_and_may_do_nothing_else(guarded: Guarded) -> None:
    """Every operation, including those that are added later."""
    refused: set[tuple[str, str]] = set()
    allowed: set[tuple[str, str]] = set()
    for method, path, operation in operations(guarded):
        url = path.format(
            job_id=guarded.job["id"], upload_id="none", schedule_id="none", name="iris", version="1", **NO_WEBHOOK
        )
        answer = guarded.api.http.request(method, url, headers=bearer(guarded.reader), content=CSV)
        (refused if answer.status_code == 403 else allowed).add((method, operation["operationId"]))
        if answer.status_code != 403 and path not in PUBLIC:
            as_user = guarded.api.http.request(method, url, headers=bearer(guarded.red), content=CSV)
            assert answer.status_code == as_user.status_code, path
    assert {method for method, _ in allowed} == {"GET", "POST"}
    assert [name for method, name in allowed if method == "POST"] == ["validate_records"]
    unread = {"list_audit", "get_metrics", "list_quotas", "get_quota"}
    assert {name for method, name in refused if method == "GET"} == unread
    assert ok(guarded.get(guarded.reader, guarded.job["links"]["self"])) == guarded.job
    assert guarded.get(guarded.reader, guarded.job["links"]["result"]).content
    problem(guarded.get(guarded.reader, guarded.blues["links"]["self"]), 404, "job-not-found")


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/v1/models/iris/validate/"),
        ("POST", "/v1/models/iris/validate/../predict"),
        ("POST", "/v1/models/iris/predict?/validate"),
        ("POST", "/v1/predict?model=iris"),
        ("PATCH", "/v1/jobs"),
        ("DELETE", "/v1/models/iris/validate"),
    ],
)
def test_an_address_that_resembles_that_of_a_check_is_refused_to_a_reader(
    method: str, path: str, guarded: Guarded
) -> None:
    answer = guarded.api.http.request(method, path, headers=bearer(guarded.reader), content=CSV)
    assert "the scope reader" in problem(answer, 403, "forbidden")["detail"]


@pytest.mark.parametrize(
    ("method", "path", "key", "status"),
    [
        ("POST", "/v1/upload", None, 401),
        ("POST", "/v1/upload", "reader", 403),
        ("PUT", "/v1/upload", "wrong", 401),
        ("POST", "/v1/predict", None, 401),
        ("PUT", "/v1/models/mine", None, 401),
        ("PUT", "/v1/models/mine", "red", 403),
        ("POST", "/v1/models/iris/predict", None, 401),
        ("POST", "/v1/predict/{foreign}", "red", 404),
        ("POST", "/v1/jobs/{foreign}/retry", "red", 404),
    ],
)
def test_a_request_is_refused_before_any_byte_of_its_body_is_read(
    method: str, path: str, key: str | None, status: int, guarded: Guarded
) -> None:
    read = 0
    sent: list[Message] = []

    async def receive() -> Message:
        nonlocal read
        read += 1
        return {"type": "http.request", "body": b"x" * 1000, "more_body": True}

    async def send(message: Message) -> None:
        sent.append(message)

    given = {"red": guarded.red, "reader": guarded.reader, "wrong": keys.generate()}.get(key or "")
    scope = {
        "type": "http", "http_version": "1.1", "method": method, "scheme": "http", "query_string": b"model=iris",
        "path": path.format(foreign=guarded.blues["id"]), "raw_path": path.encode(), "root_path": "",
        "headers": [(b"host", b"localhost"), *([(b"authorization", f"Bearer {given}".encode())] if given else [])],
        "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 80),
    }  # fmt: skip
    call = guarded.api.http.portal
    assert call is not None
    call.call(guarded.api.http.app, scope, receive, send)
    assert sent[0]["status"] == status
    assert read == 0


def test_the_scheme_is_bearer_in_any_case(guarded: Guarded) -> None:
    for header in (f"bearer {guarded.red}", f"BEARER  {guarded.red} "):
        ok(guarded.api.http.get("/v1/jobs", headers={"authorization": header}))


def test_without_keys_every_route_is_open_and_the_first_key_closes_them(tmp_path: Path) -> None:
    with running(tmp_path, worker=False) as api:
        job = api.upload(CSV)
        assert job["tenant"] == "default"
        ok(api.http.get("/v1/jobs", headers=bearer("anything")))
        key = make_key(api, "first", Scope.ADMIN)
        problem(api.http.get(job["links"]["self"]), 401, "unauthorized")
        assert ok(api.http.get(job["links"]["self"], headers=bearer(key)))["id"] == job["id"]


def test_a_revocation_takes_effect_at_once_and_revoking_the_last_key_opens_nothing(tmp_path: Path) -> None:
    with running(tmp_path, worker=False) as api:
        key = make_key(api, "only")
        with as_(api, key):
            job = api.upload(CSV)
            for _ in range(3):  # by now the key and the response are cached
                ok(api.http.get(job["links"]["self"]))
            revoke_key(api, "only")
            problem(api.http.get(job["links"]["self"]), 401, "unauthorized")
        problem(api.http.get("/v1/jobs"), 401, "unauthorized")


def test_only_requests_that_came_together_share_a_look_at_the_database(sqlite: Database) -> None:
    async def looks() -> list[Version | None]:
        keyring = Keyring(sqlite)
        first = await keyring.version()
        with sqlite.write() as connection:
            keys.create(connection, "new", Scope.USER, "default", time.time())
        same_turn = await keyring.version()
        await asyncio.sleep(0)
        return [first, same_turn, await keyring.version()]

    first, same_turn, next_turn = asyncio.run(looks())
    assert first == same_turn
    assert first != next_turn


# --- tenants ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.sqlite
def test_streams_and_long_polls_end_when_their_key_is_revoked(tmp_path: Path) -> None:
    with serving(tmp_path, "--no-worker") as url, ThreadPoolExecutor(4) as pool:
        database = Database(Settings(storage=str(tmp_path / "storage")).database_url)
        with database.write() as connection:
            ours, theirs = (
                bearer(keys.create(connection, name, Scope.USER, "default", time.time())[1])
                for name in ("ours", "theirs")
            )
        job = ok(httpx2.post(f"{url}/v1/upload", content=CSV, headers=ours), 201)["id"]
        events = f"{url}/v1/jobs/{job}/events"

        def status(path: str, headers: dict[str, str]) -> int:
            return httpx2.get(f"{url}{path}", headers=headers, timeout=30).status_code

        with (
            httpx2.stream("GET", events, headers=ours, timeout=30) as stream,
            httpx2.stream("GET", events, headers=theirs, timeout=30) as other,
        ):
            ended, goes_on = stream.iter_lines(), other.iter_lines()
            assert next(ended).startswith("event:")
            assert next(goes_on).startswith("event:")
            polls = [
                pool.submit(status, path, ours) for path in (f"/v1/jobs/{job}?wait=25", f"/v1/download/{job}?wait=25")
            ]
            kept = pool.submit(status, f"/v1/jobs/{job}?wait=3", theirs)
            time.sleep(0.5)
            began = time.monotonic()
            with database.write() as connection:
                keys.revoke(connection, "ours", time.time())
            list(ended)
            assert [poll.result() for poll in polls] == [401, 401]
            assert time.monotonic() - began < 12  # long before the end of their waits, and of the stream
            assert kept.result() == 200
            assert httpx2.delete(f"{url}/v1/jobs/{job}", headers=theirs).status_code == 204
            list(goes_on)
        database.close()


def test_a_job_of_another_tenant_looks_like_a_missing_one_on_every_route(guarded: Guarded) -> None:
    """Every route with the ID of a job, including routes that are added later."""
    with as_(guarded.api, guarded.blue):
        before = ok(guarded.api.http.get("/v1/jobs"))
    asked = 0
    for method, path, _ in operations(guarded):
        if "{job_id}" not in path:
            continue
        for query in ({"model": "iris"}, {"partial": "true"}, {"wait": "1"}, {"format": "csv"}, {}):
            answers = [
                guarded.api.http.request(method, path.format(job_id=job_id), params=query, headers=bearer(guarded.red))
                for job_id in (guarded.blues["id"], guarded.blues["id"][:-4] + "0000")
            ]
            foreign, unknown = (problem(answer, 404, "job-not-found") for answer in answers)
            assert foreign["detail"].replace(guarded.blues["id"], "X") == unknown["detail"].replace(
                guarded.blues["id"][:-4] + "0000", "X"
            )
        asked += 1
    assert asked >= 9
    for method in ("HEAD",):
        for suffix in ("", "/errors", "/input"):
            url = f"/v1/download/{guarded.blues['id']}{suffix}"
            assert guarded.api.http.request(method, url, headers=bearer(guarded.red)).status_code == 404
    with as_(guarded.api, guarded.blue):
        assert ok(guarded.api.http.get("/v1/jobs")) == before
        assert guarded.api.result(guarded.blues).content


def test_a_tenant_reads_its_own_job_on_every_route(guarded: Guarded) -> None:
    """The counterpart of the test above: these routes do not always respond 404."""
    for method, path, _ in operations(guarded):
        if "{job_id}" in path and method == "GET":
            url = path.format(job_id=guarded.job["id"])
            assert guarded.api.http.get(url, headers=bearer(guarded.red)).status_code == 200, path


def test_a_list_holds_only_the_jobs_of_the_tenant(guarded: Guarded) -> None:
    for key, own, foreign in ((guarded.red, "red", "blue"), (guarded.blue, "blue", "red")):
        found = ok(guarded.get(key, "/v1/jobs"))["jobs"]
        assert found
        assert {job["tenant"] for job in found} == {own}
        for filters in ({"q": foreign}, {"state": "completed", "q": foreign}, {"model": "iris", "q": foreign}):
            assert ok(guarded.get(key, "/v1/jobs", **filters))["jobs"] == []


def test_an_administrator_of_a_tenant_sees_no_other_and_one_of_all_sees_all(guarded: Guarded) -> None:
    assert ok(guarded.get(guarded.admin, "/v1/jobs", q="red.csv"))["jobs"] == []
    problem(guarded.get(guarded.admin, guarded.job["links"]["self"]), 404, "job-not-found")
    found = ok(guarded.get(guarded.all, "/v1/jobs"))["jobs"]
    assert {job["tenant"] for job in found} >= {"red", "blue"}
    assert guarded.get(guarded.all, guarded.job["links"]["result"]).status_code == 200
    with as_(guarded.api, guarded.all):
        assert guarded.api.upload(CSV)["tenant"] == "default"


def test_cached_responses_to_polls_go_only_to_their_tenant(guarded: Guarded, monkeypatch: pytest.MonkeyPatch) -> None:
    given = 0
    get = AnswerCache.get

    def counted(self: AnswerCache, key: tuple[str, str], version: int | None) -> Any:
        nonlocal given
        answer = get(self, key, version)
        given += answer is not None
        return answer

    monkeypatch.setattr(AnswerCache, "get", counted)
    path, rounds = guarded.job["links"]["self"], 0
    while rounds < 3 or (given < 2 and rounds < 100):  # a commit in another database of a server invalidates them, too
        rounds += 1
        ok(guarded.get(guarded.red, path))
        problem(guarded.get(guarded.blue, path), 404, "job-not-found")
        problem(guarded.api.http.get(path), 401, "unauthorized")
        assert ok(guarded.get(guarded.all, path))["tenant"] == "red"
    assert given >= 2  # some responses were cached


def test_idempotency_keys_are_separate_for_each_tenant(guarded: Guarded) -> None:
    answers = [
        guarded.api.http.post("/v1/upload", content=CSV, headers=bearer(key) | {"idempotency-key": "night"})
        for key in (guarded.red, guarded.blue, guarded.red, guarded.all)
    ]
    reds, blues, again, alls = (ok(answer, 201) for answer in answers)
    assert (reds["tenant"], blues["tenant"], alls["tenant"]) == ("red", "blue", "default")
    assert again["id"] == reds["id"]
    assert len({reds["id"], blues["id"], alls["id"]}) == 3
    other = guarded.api.http.post(
        "/v1/upload", content=CSV + ROW, headers=bearer(guarded.blue) | {"idempotency-key": "night"}
    )
    assert reds["id"] not in problem(other, 422, "idempotency-mismatch")["detail"]


def test_an_idempotency_key_that_another_tenant_is_using_does_not_conflict(database: Database) -> None:
    with database.write() as connection:
        idempotency.remember(connection, "k", "f", "job", 201, 10.0, "red")
        assert idempotency.recall(connection, "k", "other", "blue") is None
        idempotency.remember(connection, "k", "other", "job-2", 202, 10.0, "blue")
        assert idempotency.recall(connection, "k", "f", "red") == idempotency.Remembered("job", 201)
        assert idempotency.recall(connection, "k", "other", "blue") == idempotency.Remembered("job-2", 202)


def test_an_equal_result_is_reused_only_within_a_tenant(guarded: Guarded) -> None:
    ran = {}
    for name, key in (("red", guarded.red), ("blue", guarded.blue), ("all", guarded.all)):
        with as_(guarded.api, key):
            ran[name] = guarded.api.run(CSV, "iris", reuse=True)
    assert ran["red"]["reused_from"] == guarded.job["id"]
    assert ran["blue"]["reused_from"] is None
    assert ran["all"]["reused_from"] is None
    with as_(guarded.api, guarded.red):
        uploaded = guarded.api.upload(CSV)
    answer = guarded.api.http.post(
        f"/v1/predict/{uploaded['id']}", params={"model": "iris"}, headers=bearer(guarded.all)
    )
    assert ok(answer, 200)["reused_from"] in (guarded.job["id"], ran["red"]["id"])  # it stays the tenant's job


def test_a_retry_belongs_to_the_tenant_of_its_job(guarded: Guarded) -> None:
    with as_(guarded.api, guarded.red):
        job = guarded.api.run(CSV + "5.1,tall,1.4,0.2\n", "iris")
        assert job["rows"]["failed"] == 1
        retried = ok(guarded.api.http.post(f"{job['links']['self']}/retry", json={"rows": "failed"}), 202)
        assert retried["tenant"] == "red"
        assert guarded.api.finished(retried["id"])["state"] == "completed"
    problem(guarded.get(guarded.blue, retried["links"]["self"]), 404, "job-not-found")


def test_a_job_must_be_visible_to_the_tenant(database: Database) -> None:
    with database.write() as connection:
        requests.create(connection, "1", [StoredInput("inputs/1", "csv")], None, 1.0, "red")
        queries.require_seen(connection, "1", "red")
        queries.require_seen(connection, "1", EVERY_TENANT)
        for job_id, tenant in (("1", "blue"), ("1", "default"), ("2", "red"), ("2", EVERY_TENANT)):
            with pytest.raises(JobNotFound):
                queries.require_seen(connection, job_id, tenant)


# --- turns -----------------------------------------------------------------------------------------------------------


def fill(database: Database, tenant: str, count: int, *, since: float = 0.0, priority: int = 0) -> None:
    """Queues that many jobs of a tenant, a second after each other."""
    rows = [
        {
            "id": f"{tenant}-{number:05d}", "tenant": tenant, "state": "queued", "options": {}, "metadata": {},
            "priority": priority, "created_at": since + number, "queued_at": since + number,
        }
        for number in range(count)
    ]  # fmt: skip
    with database.write() as connection:
        connection.execute(insert(job_rows), rows)
        stored = {"number": 0, "key": "i", "format": "csv", "delimiter": ","}
        connection.execute(insert(inputs), [{"job_id": row["id"], **stored} for row in rows])


def claimed(database: Database, most: int) -> list[str]:
    with database.write() as connection:
        return [job.id for job in execution.claim_due(connection, "w", 30.0, Moment(1e9, 1.0, "boot"), most)]


def test_tenants_take_turns_whatever_the_length_and_priority_of_their_queues(database: Database) -> None:
    fill(database, "many", 10_000, priority=100)
    fill(database, "few", 2, since=1e6)
    assert sorted(claimed(database, 2)) == ["few-00000", "many-00000"]
    assert sorted(claimed(database, 2)) == ["few-00001", "many-00001"]
    assert claimed(database, 3) == ["many-00002", "many-00003", "many-00004"]


def test_the_tenant_with_fewer_running_jobs_comes_first(database: Database) -> None:
    fill(database, "many", 100)
    assert len(claimed(database, 3)) == 3
    fill(database, "few", 5, since=1e6)
    assert claimed(database, 1) == ["few-00000"]
    assert claimed(database, 1) == ["few-00001"]


def test_a_tenant_without_a_running_job_gets_one_beyond_the_limit(database: Database) -> None:
    fill(database, "many", 100)
    assert len(claimed(database, 4)) == 4
    assert claimed(database, 0) == []
    fill(database, "few", 5, since=1e6)
    with database.read() as connection:
        assert execution.is_due(connection, 1e9, 0)
    assert claimed(database, 0) == ["few-00000"]
    with database.read() as connection:
        assert not execution.is_due(connection, 1e9, 0)
    assert claimed(database, 0) == []


def test_equal_tenants_take_turns_at_random(database: Database) -> None:
    """No tenant is always second when each job has ended before the next claim."""
    fill(database, "a", 100)
    fill(database, "b", 100)
    assert sorted(claimed(database, 0)) == ["a-00000", "b-00000"]
    first = []
    for _ in range(40):
        (job_id,) = claimed(database, 1)
        first.append(job_id[0])
        with database.write() as connection:
            execution.release_if_mine(connection, job_id, queries.get(connection, job_id).attempt, 1.0)
    assert set(first) == {"a", "b"}  # with a probability of 1 - 2**-39


def test_each_job_is_claimed_once_by_workers_that_claim_together(database: Database) -> None:
    fill(database, "a", 40)
    fill(database, "b", 40)
    with ThreadPoolExecutor(4) as threads:
        found = [job_id for taken in threads.map(lambda _: claimed(database, 3), range(40)) for job_id in taken]
    assert sorted(found) == sorted(f"{tenant}-{number:05d}" for tenant in "ab" for number in range(40))


def test_a_claim_reads_only_the_front_of_the_queue(sqlite: Database) -> None:
    """A claim from a queue of 10,000 takes about as many steps of SQLite's machine as one from a short queue."""
    few, many = (steps_of_a_claim(sqlite, tenant, count) for tenant, count in (("few", 50), ("many", 10_000)))
    assert 0 < many < 1.5 * few


def steps_of_a_claim(database: Database, tenant: str, count: int) -> int:
    """In tens, for four jobs of a tenant that has so many."""
    fill(database, tenant, count)
    steps: list[None] = []
    with database.write() as connection:
        driver = driver_of(connection)
        driver.set_progress_handler(lambda: steps.append(None), 10)
        found = execution.claim_due(connection, "w", 30.0, Moment(1e9, 1.0, "boot"), 4)
        driver.set_progress_handler(None, 0)
    assert len(list(found)) == 4
    return len(steps)


def test_the_queue_position_counts_only_jobs_of_the_tenant(database: Database) -> None:
    fill(database, "many", 50)
    fill(database, "few", 3, since=1e6)
    with database.read() as connection:
        assert queries.queue_position(connection, queries.get(connection, "few-00002"), 1e9) == 2


@pytest.mark.slow
def test_ten_thousand_queued_jobs_delay_a_job_of_another_tenant_by_little(tmp_path: Path, iris_onnx: Path) -> None:
    """A worker with the maximum of jobs of one tenant runs one of another in addition."""
    with running(tmp_path, processes=1, active_jobs=2, chunk_records=10) as api:
        api.register("iris", iris_onnx)
        many, few = make_key(api, "many", tenant="many"), make_key(api, "few", tenant="few")
        with as_(api, many):
            first = api.upload(CSV + 20_000 * ROW)
            for number in range(3):  # each has thousands of chunks: longer than this test
                api.http.post(
                    "/v1/predict", params={"model": "iris", "reuse": False}, content=CSV + (100_000 + number) * ROW
                )
            started = ok(api.http.post(f"/v1/predict/{first['id']}?model=iris&priority=100"), 202)
        database = database_of(api)
        with database.write() as connection:
            template = dict(
                connection.execute(job_rows.select().where(job_rows.c.id == started["id"])).mappings().one()
            )
            rows = [
                template | {"id": f"{number:036d}", "state": "queued", "attempt": 0, "priority": 50}
                for number in range(10_000)
            ]
            connection.execute(insert(job_rows), rows)
            stored = {"number": 0, "key": "i", "format": "csv", "delimiter": ","}
            connection.execute(insert(inputs), [{"job_id": row["id"], **stored} for row in rows])
        database.close()
        deadline = time.monotonic() + 20
        while True:
            with as_(api, many):
                busy = ok(api.http.get("/v1/jobs", params={"state": "running"}))["jobs"]
            if len(busy) >= 2:
                break
            assert time.monotonic() < deadline
            time.sleep(0.05)
        with as_(api, few):
            began = time.monotonic()
            job = api.run(CSV, "iris")
            assert job["state"] == "completed"
            assert time.monotonic() - began < 20  # on a busy machine; all jobs before it take hours
        with as_(api, many):
            waiting = ok(api.http.get("/v1/jobs", params={"state": "running"}))["jobs"]
        assert waiting
        assert all(job["progress"] < 1 for job in waiting)


# --- clients and commands --------------------------------------------------------------------------------------------


def test_keys_are_made_listed_and_revoked_on_the_command_line(tmp_path: Path) -> None:
    run = partial(in_this_process, tmp_path)
    made = in_a_process(tmp_path, "keys", "create", "night", "--scope", "admin", "--tenant", "red")
    key = made.stdout.strip()
    assert keys.is_well_formed(key)
    assert key not in made.stderr
    assert "every request needs a key" in made.stderr
    again = run("keys", "create", "night")
    assert (again.returncode, again.stdout) == (1, "")
    second = json.loads(run("keys", "create", "day", "--json").stdout)
    assert keys.is_well_formed(second["key"])
    assert (second["scope"], second["tenant"], second["revoked_at"]) == ("user", "default", None)
    listed = run("keys", "list")
    assert [line.split("\t")[1:5] for line in listed.stdout.splitlines()] == [
        ["night", "admin", "red", key[:9]], ["day", "user", "default", second["prefix"]],
    ]  # fmt: skip
    assert run("keys", "revoke", "night").returncode == 0
    assert run("keys", "revoke", "2").returncode == 0
    gone = run("keys", "revoke", "none")
    assert gone.returncode == 1
    assert "no valid key" in gone.stderr
    assert run("keys", "list", "--in-force").stdout == ""
    assert len(run("keys", "list", "--scope", "admin", "--tenant", "red").stdout.splitlines()) == 1
    assert run("keys", "list", "--scope", "user", "--tenant", "red").stdout == ""
    found = json.loads(run("keys", "list", "--json").stdout)
    assert [entry["revoked_at"] is not None for entry in found] == [True, True]
    for shown in (listed.stdout, json.dumps(found)):
        assert key not in shown
        assert second["key"] not in shown


@pytest.mark.sqlite
@pytest.mark.slow
def test_an_address_that_others_can_reach_is_served_only_with_an_admin_key(
    tmp_path: Path, start_server: Callable[..., AbstractContextManager[str]]
) -> None:
    everywhere = "0.0.0.0"  # noqa: S104 - refused, or with keys
    refused = in_a_process(tmp_path, "serve", "--host", everywhere, "--port", "0")
    assert refused.returncode == 2
    assert "keys create NAME --scope admin" in refused.stderr
    assert list(tmp_path.iterdir()) == []
    assert in_a_process(tmp_path, "keys", "create", "day").returncode == 0
    assert in_a_process(tmp_path, "serve", "--host", everywhere, "--port", "0").returncode == 2
    assert in_a_process(tmp_path, "keys", "create", "night", "--scope", "admin").returncode == 0
    with start_server(tmp_path, "--host", everywhere) as url:
        assert httpx2.get(f"{url}/v1/jobs").status_code == 401
    assert in_a_process(tmp_path, "keys", "revoke", "night").returncode == 0
    assert in_a_process(tmp_path, "serve", "--host", everywhere, "--port", "0").returncode == 2


@pytest.mark.sqlite
@pytest.mark.slow
def test_clients_send_their_key_and_no_log_or_file_holds_it(
    tmp_path: Path, iris_onnx: Path, iris_csv: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    admin = in_a_process(tmp_path, "keys", "create", "admin", "--scope", "admin").stdout.strip()
    user = in_a_process(tmp_path, "keys", "create", "user", "--tenant", "red").stdout.strip()
    with serving(tmp_path, BATCHSERVE_LOG_LEVEL="debug") as url:
        with Client(url) as client, pytest.raises(AuthenticationFailed, match="API key is needed"):
            client.models.list()
        with Client(url, api_key=user) as client, pytest.raises(AuthenticationFailed, match="admin key"):
            client.models.add(iris_onnx, name="iris")
        with Client(url, api_key=admin) as client:
            client.models.add(iris_onnx, name="iris")
        monkeypatch.setenv("BATCHSERVE_API_KEY", user)
        with Client(url) as client:
            job = client.submit(iris_csv, "iris").wait(60)
            assert job.data["tenant"] == "red"
            assert len(list(job.result().iter_rows())) == 150

        async def listed() -> list[str]:
            async with AsyncClient(url, api_key=user) as client:
                return [found.id async for found in client.jobs.list()]

        assert asyncio.run(listed()) == [job.id]
        done = in_a_process(tmp_path, "jobs", "show", job.id, BATCHSERVE_URL=url, BATCHSERVE_API_KEY=user)
        assert done.returncode == 0
        for key in ("", admin, user[:-1]):
            refused = in_a_process(tmp_path, "jobs", "show", job.id, BATCHSERVE_URL=url, BATCHSERVE_API_KEY=key)
            assert refused.returncode == (1 if key == admin else 4), refused.stderr
        httpx2.get(f"{url}/v1/jobs", params={"api_key": user})
    held = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert any(path.name == "server.log" for path in held)
    for path in held:
        content = path.read_bytes()
        for key in (admin, user):
            assert key[12:].encode() not in content, path
