"""Inputs that clients send to the object store themselves: over HTTP, and on an S3 server."""

import asyncio
import gzip
import hashlib
import io
import shutil
import time
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import httpx2
import obstore
import polars as pl
import pytest
import seaweed
from commands import in_a_process
from conftest import serving, sqlite_address
from obstore.store import S3Store
from proxy import Proxy
from service import Api, ok, problem, running
from test_images import saved, smooth

from batchserve import AsyncClient, Client, keys
from batchserve.access import Scope
from batchserve.db.connect import Database
from batchserve.domain import DirectUpload
from batchserve.errors import InvalidInput, SchemaMismatch, UploadNotFound
from batchserve.jobs import uploads
from batchserve.storage import delete_objects, open_storage, s3
from batchserve.storage.s3_uploads import SignedBucket
from batchserve.upkeep.sweep import sweep

HEADER = b"sepal length (cm),sepal width (cm),petal length (cm),petal width (cm)\n"
CSV = HEADER + b"5.1,3.5,1.4,0.2\n" * 200
SHA256 = hashlib.sha256(CSV).hexdigest()
HOUR = timedelta(hours=1)
UNKNOWN = "01a1f7d8-94a2-73b4-888c-2ac5b95e5d38"


class Site:
    """A service on a bucket, the proxy between them, and what is stored."""

    def __init__(self, api: Api, proxy: Proxy) -> None:
        self.api, self.http, self.proxy = api, api.http, proxy
        self.storage = open_storage(api.settings.storage)

    def begin(self, size: int = len(CSV)) -> dict[str, Any]:
        upload: dict[str, Any] = ok(self.http.post("/v1/uploads", json={"bytes": size}), 201)
        return upload

    def sent(self, body: bytes = CSV, size: int | None = None) -> dict[str, Any]:
        """An upload whose bytes are in the store."""
        upload = self.begin(len(body) if size is None else size)
        send(upload, body)
        return upload

    def complete(self, upload: dict[str, Any], sha256: str | None = None, **query: Any) -> httpx2.Response:
        body = {} if sha256 is None else {"sha256": sha256}
        return self.http.post(upload["links"]["complete"], json=body, params=query)

    def keys(self) -> set[str]:
        return {entry.key for entry in self.storage.list("") if not entry.key.startswith("models/")}

    def has_job(self, upload: dict[str, Any]) -> bool:
        listed = ok(self.http.get("/v1/jobs", params={"q": upload["id"]}))["jobs"]
        assert (self.http.get(f"/v1/jobs/{upload['id']}").status_code == 200) == bool(listed)
        return bool(listed)

    def swept(self, seconds: float) -> int:
        """The objects that a sweep so many seconds later has removed."""
        with closing(Database(self.api.settings.database_url)) as database:
            return sweep(database, self.storage, 3600.0, time.time() + seconds).total


def send(upload: dict[str, Any], body: bytes) -> None:
    """The last URL takes the rest."""
    for number, url in enumerate(upload["urls"], 1):
        rest = body[(number - 1) * upload["part_bytes"] :]
        answer = httpx2.put(url, content=rest if number == len(upload["urls"]) else rest[: upload["part_bytes"]])
        assert answer.is_success, answer.text


@contextmanager
def on_bucket(folder: Path, server: seaweed.Server, template: Path, model: Path) -> Iterator[Site]:
    shutil.copy(template, folder)
    with pytest.MonkeyPatch.context() as patch, closing(Proxy(server.port)) as proxy:
        for name, value in server.environment(proxy.endpoint).items():
            patch.setenv(name, value)
        own: dict[str, Any] = {"storage": server.new_address(), "database": sqlite_address(folder), "inline_bytes": 0}
        with running(folder, **own) as api:
            api.register("iris", model)
            yield Site(api, proxy)


@pytest.fixture(scope="module")
def shared_site(
    tmp_path_factory: pytest.TempPathFactory, s3_server: seaweed.Server, sqlite_template: Path, iris_onnx: Path
) -> Iterator[Site]:
    with on_bucket(tmp_path_factory.mktemp("direct"), s3_server, sqlite_template, iris_onnx) as site:
        yield site


@pytest.fixture
def site(shared_site: Site) -> Site:
    """Without any object but models."""
    delete_objects(shared_site.storage, sorted(shared_site.keys()))
    return shared_site


# --- the way of an input ---------------------------------------------------------------------------------------------


@pytest.mark.s3
def test_what_a_client_sends_to_the_store_becomes_the_input_of_a_job(site: Site) -> None:
    before = site.keys()
    with site.proxy.counted() as counted:
        upload = site.begin()
    assert counted.requests == [], "to begin one needs no request"
    assert not site.has_job(upload)
    send(upload, CSV)
    assert not site.has_job(upload)
    job = ok(site.complete(upload, SHA256, filename="flowers.csv"), 201)
    assert (job["id"], job["state"]) == (upload["id"], "uploaded")
    assert job["input"] == {
        "bytes": len(CSV), "sha256": SHA256, "media_type": "text/csv", "format": "csv", "filename": "flowers.csv",
        "rows": None, "files": 1, "url": None, "query": None, "connection": None,
    }  # fmt: skip
    assert site.http.get(job["links"]["input"]).content == CSV
    (key,) = site.keys() - before
    assert key.startswith("inputs/"), "what was sent is removed"
    ended = ok(site.http.post(f"/v1/predict/{job['id']}?model=iris", headers={"prefer": "wait=30"}))
    assert (ended["state"], ended["rows"]["ok"]) == ("completed", 200)
    assert site.api.result(ended).text.count("\n") == 201
    assert site.http.delete(job["links"]["self"]).status_code == 204
    assert site.keys() == before


@pytest.mark.s3
def test_no_byte_passes_through_the_service_on_its_way_and_each_is_read_once(site: Site) -> None:
    body = HEADER + b"5.1,3.5,1.4,0.2\n" * 700_000
    upload = site.sent(body)
    with site.proxy.counted() as counted:
        job = ok(site.complete(upload), 201)
    assert job["input"]["sha256"] == hashlib.sha256(body).hexdigest()
    assert sum(request.startswith("PUT") for request in counted.requests) == 1, "the store makes the copy"
    assert sum(request.startswith("POST") for request in counted.requests) <= 1, "what was sent is deleted"
    assert len(body) < counted.sent < 1.2 * len(body) + 2**21
    assert site.http.delete(job["links"]["self"]).status_code == 204


@pytest.mark.s3
def test_completed_twice_or_at_once_is_one_job(site: Site) -> None:
    upload = site.sent()
    with ThreadPoolExecutor(4) as threads:
        jobs = [ok(answer, 201) for answer in threads.map(lambda _: site.complete(upload, SHA256), range(4))]
    jobs.append(ok(site.complete(upload, SHA256), 201))
    assert {job["id"] for job in jobs} == {upload["id"]}
    assert len(ok(site.http.get("/v1/jobs", params={"q": upload["id"]}))["jobs"]) == 1
    assert site.http.get(jobs[0]["links"]["input"]).content == CSV
    assert site.http.delete(jobs[0]["links"]["self"]).status_code == 204
    assert site.keys() == set()
    problem(site.complete(upload), 404, "upload-not-found")


@pytest.mark.s3
def test_the_last_bytes_that_are_sent_before_the_completion_count(site: Site) -> None:
    upload = site.begin()
    send(upload, CSV.replace(b"5.1", b"9.9"))
    send(upload, CSV)
    job = ok(site.complete(upload, SHA256), 201)
    send(upload, CSV.replace(b"5.1", b"8.8"))  # its URL is still valid
    assert site.http.get(job["links"]["input"]).content == CSV
    again = ok(site.complete(upload), 201)
    assert again["input"]["sha256"] == SHA256
    assert site.swept(3700) == 1, "what was sent too late"
    assert site.http.get(job["links"]["input"]).content == CSV
    assert site.http.delete(job["links"]["self"]).status_code == 204


@pytest.mark.s3
def test_a_format_is_recognised_and_checked_as_that_of_any_upload(site: Site) -> None:
    table = io.BytesIO()
    with zipfile.ZipFile(table, "w") as members:
        members.writestr("flowers.csv", CSV)
    for body in (CSV, CSV.replace(b",", b";"), table.getvalue(), b"[[1,2]]"):
        ordinary = ok(site.http.post("/v1/upload", content=body), 201)
        direct = ok(site.complete(site.sent(body)), 201)
        assert direct["input"] == ordinary["input"]
        contents = [site.http.get(job["links"]["input"]).content for job in (ordinary, direct)]
        assert contents[0] == contents[1]
        for job in (ordinary, direct):
            assert site.http.delete(job["links"]["self"]).status_code == 204
    assert site.keys() == set()
    with_model = ok(site.complete(site.sent(), model="iris"), 201)
    assert with_model["model"]["name"] == "iris"
    assert site.http.delete(with_model["links"]["self"]).status_code == 204


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.s3
def test_an_upload_without_its_bytes_is_not_completed(site: Site) -> None:
    upload = site.begin()
    refused = problem(site.complete(upload), 409, "upload-incomplete")
    assert "nothing was sent" in refused["detail"]
    assert not site.has_job(upload)
    problem(site.http.post(f"/v1/predict/{upload['id']}?model=iris"), 404, "job-not-found")
    send(upload, CSV)
    ok(site.complete(upload), 201)
    assert site.http.delete(f"/v1/jobs/{upload['id']}").status_code == 204


@pytest.mark.s3
@pytest.mark.parametrize("announced", [len(CSV) - 1, len(CSV) + 1])
def test_more_or_fewer_bytes_than_announced_are_refused(site: Site, announced: int) -> None:
    upload = site.sent(CSV, announced)
    refused = problem(site.complete(upload), 409, "upload-incomplete")
    assert refused["detail"] == f"{announced} bytes were announced, and {len(CSV)} were sent: send them again"
    assert not site.has_job(upload)
    assert site.keys() == {f"uploads/{upload['id']}"}
    assert site.http.delete(upload["links"]["self"]).status_code == 204
    assert site.keys() == set()


@pytest.mark.s3
def test_another_digest_is_refused_and_the_upload_may_be_completed_afterwards(site: Site) -> None:
    upload = site.sent(CSV.replace(b"5.1", b"9.9"))
    refused = problem(site.complete(upload, SHA256), 422, "digest-mismatch")
    assert SHA256 in refused["detail"]
    assert not site.has_job(upload)
    assert site.keys() == {f"uploads/{upload['id']}"}
    send(upload, CSV)
    ok(site.complete(upload, SHA256.upper()), 201)
    assert site.http.delete(f"/v1/jobs/{upload['id']}").status_code == 204


@pytest.mark.s3
@pytest.mark.parametrize(
    ("body", "query", "status", "code"),
    [
        (b"\x80\x04\x95not a table", {}, 415, "unsupported-media-type"),
        (gzip.compress(CSV), {}, 415, "unsupported-media-type"),
        (CSV.decode().encode("utf-16"), {}, 415, "unsupported-media-type"),
        (CSV, {"encoding": "latin-1"}, 415, "unsupported-media-type"),
        (b"a,b\n1,2\n", {"model": "iris"}, 422, "schema-mismatch"),
        (CSV, {"model": "nobody"}, 404, "model-not-found"),
        (CSV, {"delimiter": "%"}, 422, "invalid-options"),
        (b"PK\x03\x04" + bytes(100), {}, 422, "invalid-input"),
    ],
    ids=["pickle", "gzip", "utf-16", "latin-1", "columns", "model", "delimiter", "zip"],
)  # fmt: skip
def test_a_refused_input_leaves_only_what_was_sent(
    site: Site, body: bytes, query: dict[str, str], status: int, code: str
) -> None:
    upload = site.sent(body)
    problem(site.complete(upload, **query), status, code)
    assert not site.has_job(upload)
    assert site.keys() == {f"uploads/{upload['id']}"}
    assert site.http.delete(upload["links"]["self"]).status_code == 204
    assert site.keys() == set()
    problem(site.complete(upload), 404, "upload-not-found")
    problem(site.http.delete(upload["links"]["self"]), 404, "upload-not-found")


@pytest.mark.s3
def test_a_length_that_cannot_be_is_refused_at_the_beginning(site: Site) -> None:
    wrongs: list[Any] = [{}, {"bytes": 0}, {"bytes": "many"}, {"bytes": 2**63}, {"bytes": 1, "sha": ""}, []]
    for wrong in wrongs:
        assert site.http.post("/v1/uploads", json=wrong).status_code == 422, wrong
    problem(site.http.post("/v1/uploads", json={"bytes": 2**40}), 413, "payload-too-large")
    upload = site.begin()
    for digest in ("", "0", "g" * 64, SHA256 + "0"):
        assert site.complete(upload, digest).status_code == 422, digest
    assert site.http.delete(upload["links"]["self"]).status_code == 204


@pytest.mark.s3
def test_an_expired_upload_is_refused_and_what_was_sent_is_removed(site: Site) -> None:
    job = site.api.upload(CSV)  # orphans are younger than the oldest job
    kept, expired = site.sent(), site.sent()
    with closing(Database(site.api.settings.database_url)) as database, database.write() as connection:
        upload = uploads.get(connection, expired["id"], "default")
        uploads.end(connection, upload.id)
        uploads.begin(connection, DirectUpload(upload.id, upload.tenant, upload.bytes, time.time() - 1))
    problem(site.complete(expired), 410, "expired")
    assert site.swept(0) == 0, "one that is being completed may go on"
    life = site.api.settings.upload_life
    assert life > 2 * 3600
    assert site.swept(2 * 3600) == 1
    assert site.keys() == {f"inputs/{job['id']}", f"uploads/{kept['id']}"}
    problem(site.complete(expired), 404, "upload-not-found")
    assert site.swept(life + 3700) == 1
    assert site.keys() == {f"inputs/{job['id']}"}
    problem(site.complete(kept), 404, "upload-not-found")
    assert site.http.delete(job["links"]["self"]).status_code == 204


@pytest.mark.s3
def test_an_outage_of_the_store_refuses_nothing_for_good(site: Site) -> None:
    upload = site.sent()
    site.proxy.turn("away")
    try:
        problem(site.complete(upload, SHA256), 503, "unavailable")
    finally:
        site.proxy.turn("through")
    assert not site.has_job(upload)
    ok(site.complete(upload, SHA256), 201)
    assert site.http.delete(f"/v1/jobs/{upload['id']}").status_code == 204


@pytest.mark.s3
def test_another_tenant_sees_no_upload(
    tmp_path: Path, s3_server: seaweed.Server, sqlite_template: Path, iris_onnx: Path
) -> None:
    with on_bucket(tmp_path, s3_server, sqlite_template, iris_onnx) as site:
        with closing(Database(site.api.settings.database_url)) as database, database.write() as connection:
            red, blue, admin = (
                {"authorization": f"Bearer {keys.create(connection, name, scope, tenant, time.time())[1]}"}
                for name, scope, tenant in (
                    ("red", Scope.USER, "red"), ("blue", Scope.USER, "blue"), ("admin", Scope.ADMIN, "*"),
                )
            )  # fmt: skip
        upload = ok(site.http.post("/v1/uploads", json={"bytes": len(CSV)}, headers=red), 201)
        send(upload, CSV)
        for _ in range(2):  # before its completion, and afterwards
            problem(site.http.post(upload["links"]["complete"], headers=blue), 404, "upload-not-found")
            problem(site.http.delete(upload["links"]["self"], headers=blue), 404, "upload-not-found")
            problem(site.http.post(upload["links"]["complete"]), 401, "unauthorized")
            assert ok(site.http.post(upload["links"]["complete"], headers=admin), 201)["tenant"] == "red"
        job = f"/v1/jobs/{upload['id']}"
        assert ok(site.http.get(job, headers=red))["state"] == "uploaded"
        problem(site.http.get(job, headers=blue), 404, "job-not-found")


def test_a_folder_takes_no_direct_uploads_and_names_the_ordinary_one(api: Api) -> None:
    refused = problem(api.http.post("/v1/uploads", json={"bytes": 5}), 422, "direct-upload-unsupported")
    assert "POST /v1/upload" in refused["detail"]
    problem(api.http.post(f"/v1/uploads/{UNKNOWN}/complete"), 404, "upload-not-found")


# --- parts -----------------------------------------------------------------------------------------------------------

LARGE = HEADER + b"5.1,3.5,1.4,0.2\n" * 700_000
"""Of three parts."""
PART = 5 * 2**20


@pytest.fixture
def in_parts(site: Site, monkeypatch: pytest.MonkeyPatch) -> Site:
    """A service whose clients send in parts what is longer than the store's shortest part."""
    monkeypatch.setattr(s3, "_SENT_PART", PART)
    return site


def pending(site: Site) -> int:
    """Multipart uploads of the bucket that are neither complete nor aborted."""
    bucket, _, prefix = site.api.settings.storage.removeprefix("s3://").partition("/")
    signed = SignedBucket.of(obstore.sign(S3Store(bucket, client_options={"allow_http": True}), "GET", "probe", HOUR))
    assert signed is not None
    return len(list(signed.pending(prefix)))


@pytest.mark.s3
def test_a_large_input_is_sent_in_parts_in_any_order(in_parts: Site) -> None:
    upload = in_parts.begin(len(LARGE))
    assert (len(upload["urls"]), upload["part_bytes"]) == (3, PART)
    pieces = [LARGE[start : start + PART] for start in range(0, len(LARGE), PART)]
    for number in (2, 0, 1, 0):
        assert httpx2.put(upload["urls"][number], content=pieces[number]).is_success
    assert in_parts.keys() == set()
    assert not in_parts.has_job(upload)
    with in_parts.proxy.counted() as counted:
        job = ok(in_parts.complete(upload, hashlib.sha256(LARGE).hexdigest(), filename="large.csv"), 201)
    assert not any(request.startswith("PUT") for request in counted.requests), "nothing is copied"
    assert (job["state"], job["input"]["bytes"]) == ("uploaded", len(LARGE))
    assert in_parts.http.get(job["links"]["input"]).content == LARGE
    assert not httpx2.put(upload["urls"][0], content=pieces[1]).is_success, "no part can change any more"
    assert ok(in_parts.complete(upload), 201) == job
    assert in_parts.keys() == {f"inputs/{upload['id']}"}
    assert pending(in_parts) == 0
    assert in_parts.http.delete(job["links"]["self"]).status_code == 204
    assert in_parts.keys() == set()


@pytest.mark.s3
def test_parts_that_are_missing_are_sent_later(in_parts: Site) -> None:
    upload = in_parts.begin(len(LARGE))
    assert "nothing was sent" in problem(in_parts.complete(upload), 409, "upload-incomplete")["detail"]
    assert httpx2.put(upload["urls"][0], content=LARGE[:PART]).is_success
    refused = problem(in_parts.complete(upload), 409, "upload-incomplete")
    assert f"{len(LARGE)} bytes were announced, and {PART} were sent" in refused["detail"]
    send(upload, LARGE)
    job = ok(in_parts.complete(upload), 201)
    assert in_parts.http.get(job["links"]["input"]).content == LARGE
    assert in_parts.http.delete(job["links"]["self"]).status_code == 204


@pytest.mark.s3
def test_a_refused_completion_of_parts_may_be_repeated(in_parts: Site) -> None:
    upload = in_parts.sent(LARGE)
    problem(in_parts.complete(upload, SHA256), 422, "digest-mismatch")
    problem(in_parts.complete(upload, model="nobody"), 404, "model-not-found")
    assert in_parts.swept(2 * 3600) == 0
    job = ok(in_parts.complete(upload, model="iris"), 201)
    assert in_parts.http.get(job["links"]["input"]).content == LARGE
    assert in_parts.http.delete(job["links"]["self"]).status_code == 204
    assert in_parts.keys() == set()


@pytest.mark.s3
def test_parts_are_removed_with_an_upload_that_is_given_up_or_expires(in_parts: Site) -> None:
    deleted, expired, joined = (in_parts.sent(LARGE) for _ in range(3))
    problem(in_parts.complete(joined, SHA256), 422, "digest-mismatch")
    assert in_parts.keys() == {f"inputs/{joined['id']}"}
    assert pending(in_parts) == 2
    assert in_parts.http.delete(deleted["links"]["self"]).status_code == 204
    assert pending(in_parts) == 1
    in_parts.swept(in_parts.api.settings.upload_life + 3700)
    assert pending(in_parts) == 0
    assert in_parts.keys() == set()
    for upload in (deleted, expired, joined):
        problem(in_parts.complete(upload), 404, "upload-not-found")


@pytest.mark.s3
def test_a_host_with_a_role_offers_one_request(in_parts: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has no secret with which it could sign requests for parts."""
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    upload = in_parts.sent(LARGE)
    assert len(upload["urls"]) == 1
    job = ok(in_parts.complete(upload), 201)
    assert in_parts.http.get(job["links"]["input"]).content == LARGE
    assert in_parts.http.delete(job["links"]["self"]).status_code == 204
    monkeypatch.setattr(s3, "_ONE_REQUEST", PART)
    problem(in_parts.http.post("/v1/uploads", json={"bytes": PART + 1}), 413, "payload-too-large")


# --- the client ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def client(
    tmp_path_factory: pytest.TempPathFactory, s3_server: seaweed.Server, sqlite_template: Path, iris_onnx: Path
) -> Iterator[Client]:
    """Of a server on a bucket."""
    folder = tmp_path_factory.mktemp("client")
    shutil.copy(sqlite_template, folder)
    own = {"BATCHSERVE_STORAGE": s3_server.new_address(), "BATCHSERVE_DATABASE": sqlite_address(folder)}
    with serving(folder, **own, **s3_server.environment()) as url, Client(url) as client:
        client.models.add(iris_onnx, name="iris")
        yield client


class Unseekable(io.BytesIO):
    """As a pipe."""

    def seekable(self) -> bool:
        return False


@pytest.mark.s3
@pytest.mark.parametrize("kind", ["path", "bytes", "frame", "stream", "images"])
def test_the_client_sends_any_data_directly(client: Client, tmp_path: Path, kind: str) -> None:
    path, images = tmp_path / "flowers.csv", tmp_path / "images"
    path.write_bytes(CSV)
    images.mkdir()
    for number in range(3):
        (images / f"{number}.png").write_bytes(saved(smooth(8, 8 + number)))
    data: dict[str, Any] = {
        "path": path, "bytes": CSV, "frame": pl.read_csv(CSV), "stream": Unseekable(CSV), "images": images,
    }  # fmt: skip
    heard: list[tuple[int, int | None]] = []
    job = client.upload(data[kind], direct=True, on_upload=lambda done, total: heard.append((done, total)))
    again = client.upload(Unseekable(CSV) if kind == "stream" else data[kind])
    assert (job.state, job.data["input"]) == ("uploaded", again.data["input"])
    assert heard[-1] == (job.data["input"]["bytes"], job.data["input"]["bytes"])
    for uploaded in (job, again):
        uploaded.delete()


@pytest.mark.s3
def test_a_prediction_of_a_direct_upload_is_that_of_any_other(client: Client, tmp_path: Path) -> None:
    path = tmp_path / "flowers.csv"
    path.write_bytes(CSV.replace(b",", b";"))
    options: dict[str, Any] = {"model": "iris", "delimiter": ";", "passthrough": "all", "reuse": False}
    results = [
        client.predict(path, **options, direct=direct, output=tmp_path / f"{direct}.csv").read_bytes()
        for direct in (False, True)
    ]
    assert results[0] == results[1]
    assert results[0].count(b"\n") == 201
    expected = client.predict(pl.read_csv(CSV), model="iris")
    assert client.predict(pl.read_csv(CSV), model="iris", direct=True).equals(expected)


@pytest.mark.s3
def test_a_direct_upload_that_does_not_fit_the_model_leaves_no_job(client: Client) -> None:
    before = [job.id for job in client.jobs.list()]
    with pytest.raises(SchemaMismatch):
        client.submit(b"a,b\n1,2\n", "iris", direct=True)
    assert [job.id for job in client.jobs.list()] == before


@pytest.mark.s3
def test_the_client_does_not_send_a_compressed_file_directly(client: Client, tmp_path: Path) -> None:
    path = tmp_path / "flowers.csv.gz"
    path.write_bytes(gzip.compress(CSV))
    with pytest.raises(InvalidInput, match="decompress it"):
        client.upload(path, direct=True)


@pytest.mark.s3
def test_an_asynchronous_client_uploads_directly(client: Client) -> None:
    async def upload() -> dict[str, Any]:
        async with AsyncClient(client.url) as same:
            return (await same.upload(CSV, direct=True)).data

    assert asyncio.run(upload())["input"]["sha256"] == SHA256


@pytest.mark.s3
def test_the_command_predict_sends_a_file_directly(client: Client, tmp_path: Path) -> None:
    (tmp_path / "flowers.csv").write_bytes(CSV)
    done = in_a_process(tmp_path, "predict", "flowers.csv", "-m", "iris", "--direct", BATCHSERVE_URL=client.url)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "flowers.predictions.csv").read_text().count("\n") == 201


@pytest.mark.s3
def test_the_command_predict_sends_a_folder_of_files_directly(client: Client, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for name in ("a.csv", "b.csv"):
        (tmp_path / "in" / name).write_bytes(CSV)
    for state in ("completed", "unchanged"):
        done = in_a_process(tmp_path, "predict", "in", "-o", "out", "-m", "iris", "--direct", BATCHSERVE_URL=client.url)
        assert done.returncode == 0, done.stderr
        assert [line.split("\t")[1] for line in done.stdout.splitlines()] == [state, state]
    for name in ("a", "b"):
        assert (tmp_path / "out" / f"{name}.predictions.csv").read_text().count("\n") == 201


# --- rows ------------------------------------------------------------------------------------------------------------


def test_an_upload_is_found_by_its_tenant_until_it_ends(database: Database) -> None:
    upload = DirectUpload(UNKNOWN, "red", 5, 1000.0)
    with database.write() as connection:
        uploads.begin(connection, upload)
    with database.read() as connection:
        assert uploads.get(connection, UNKNOWN, "red") == uploads.get(connection, UNKNOWN, "*") == upload
        assert uploads.pending(connection, [UNKNOWN, "other"]) == {UNKNOWN}
        for upload_id, tenant in ((UNKNOWN, "blue"), ("other", "red"), ("\0", "red")):
            with pytest.raises(UploadNotFound):
                uploads.get(connection, upload_id, tenant)
    with database.write() as connection:
        uploads.end(connection, UNKNOWN)
    with pytest.raises(UploadNotFound), database.write() as connection:
        uploads.end(connection, UNKNOWN)


def test_uploads_end_when_they_expire(database: Database) -> None:
    with database.write() as connection:
        for number in range(5):
            uploads.begin(connection, DirectUpload(str(number), "red", 5, 1000.0 + number))
    ended = []
    for _ in range(3):
        with database.write() as connection:
            ended.append({upload.id for upload in uploads.end_expired(connection, 1003.0, 2)})
    assert ended == [{"0", "1"}, {"2"}, set()]


# --- quotas ---


@pytest.mark.s3
def test_announced_bytes_must_fit_and_are_counted_until_the_upload_ends(site: Site) -> None:
    def used() -> int:
        count: int = ok(site.http.get("/v1/usage"))["bytes"]["used"]
        return count

    before, size = used(), len(CSV)
    ok(site.http.put("/v1/quotas/default", json={"bytes": before + size + 10}))
    try:
        upload = site.sent()
        assert used() == before + size
        refused = problem(site.http.post("/v1/uploads", json={"bytes": 11}), 507, "storage-quota-exceeded")
        assert (refused["quota"], refused["used"]) == ("bytes", before + size)
        job = ok(site.complete(upload), 201)
        assert used() == before + size
        assert site.http.delete(job["links"]["self"]).status_code == 204
        given_up = site.begin()
        assert used() == before + size
        assert site.http.delete(given_up["links"]["self"]).status_code == 204
        assert used() == before
    finally:
        site.http.delete("/v1/quotas/default")
