"""Jobs on an S3 server, from the upload to the download: over HTTP, with real server processes, and with the same
results to the byte as on a folder."""

import hashlib
import io
import json
import random
import shutil
import time
import zipfile
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import polars as pl
import pytest
import seaweed
from commands import in_a_process
from conftest import serving
from proxy import Proxy
from service import encoded, ok, problem
from test_images import MEANS, saved, smooth
from uuid_utils import uuid7

from batchserve.db.connect import Database
from batchserve.settings import Settings
from batchserve.storage import Storage, open_storage
from batchserve.upkeep.retention import expire
from batchserve.upkeep.sweep import sweep

pytestmark = [pytest.mark.s3, pytest.mark.timeout(300)]

FORMATS = ("csv", "jsonl", "json", "parquet", "arrow", "arrows", "npy", "npz")
MANY, FEW = 60_000, 300
"""Records of a job of several chunks, and of one that is done in one call."""
SETTINGS = {
    "BATCHSERVE_CHUNK_RECORDS": "20000",
    "BATCHSERVE_CHUNK_BYTES": "1000000",
    "BATCHSERVE_INLINE_BYTES": "0",
    "BATCHSERVE_PROCESSES": "2",
    "BATCHSERVE_POLL": "0.05",
    "BATCHSERVE_RESCUE": "0.3",
    "BATCHSERVE_FREE_BYTES": "0",
}


@dataclass(frozen=True)
class Site:
    """A server, its storage, and the proxy between them if the storage is a bucket."""

    http: httpx2.Client
    storage: Storage
    environment: dict[str, str]
    proxy: Proxy | None = None

    @property
    def database_url(self) -> str:
        return self.environment["BATCHSERVE_DATABASE"]

    def submit(self, body: bytes, model: str = "iris", **options: Any) -> dict[str, Any]:
        params = {"model": model, "reuse": False, **options}
        job: dict[str, Any] = ok(self.http.post("/v1/predict", content=body, params=params), 202)
        return job

    def submitted(self, body: bytes) -> dict[str, Any]:
        """As `submit`, again after each 503."""
        while True:
            answer = self.http.post("/v1/predict", content=body, params={"model": "iris", "reuse": False})
            if answer.status_code != 503:
                job: dict[str, Any] = ok(answer, 202)
                return job

    def ended(self, job: dict[str, Any], seconds: float = 60.0) -> dict[str, Any]:
        deadline = time.monotonic() + seconds
        while (now := ok(self.http.get(job["links"]["self"])))["state"] in ("queued", "running"):
            assert time.monotonic() < deadline, now
            time.sleep(0.05)
        found: dict[str, Any] = now
        return found

    def run(self, body: bytes, model: str = "iris", **options: Any) -> dict[str, Any]:
        job = self.ended(self.submit(body, model, **options))
        assert job["state"] == "completed", job["error"]
        return job

    def result(self, job: dict[str, Any], **headers: str) -> httpx2.Response:
        return self.http.get(job["links"]["result"], headers=headers)

    def keys(self, prefix: str = "") -> set[str]:
        return {entry.key for entry in self.storage.list(prefix)}


@pytest.fixture(scope="module")
def records(iris: Any) -> pl.DataFrame:
    chance = np.random.default_rng(1)
    frame = pl.from_pandas(iris)[chance.integers(0, len(iris), MANY)]
    noise = pl.Series(chance.normal(0, 0.1, MANY)).round(3)
    noisy: pl.DataFrame = frame.with_columns((pl.all() + noise).cast(pl.Float32))
    return noisy


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, iris_onnx: Path) -> Iterator[Site]:
    place = tmp_path_factory.mktemp("folder")
    own = {"BATCHSERVE_STORAGE": str(place / "store")}
    with serving(place, **SETTINGS, **own) as url, httpx2.Client(base_url=url, timeout=60) as http:
        yield _with_models(Site(http, open_storage(own["BATCHSERVE_STORAGE"]), own), iris_onnx)


@pytest.fixture(scope="module")
def bucket(
    tmp_path_factory: pytest.TempPathFactory, s3_server: seaweed.Server, sqlite_template: Path, iris_onnx: Path
) -> Iterator[Site]:
    place, address = tmp_path_factory.mktemp("bucket"), s3_server.new_address()
    shutil.copy(sqlite_template, place)
    own = {"BATCHSERVE_STORAGE": address, "BATCHSERVE_DATABASE": f"sqlite:///{place / sqlite_template.name}"}
    own["TMPDIR"] = str(place)  # of the models that are cached
    with (
        pytest.MonkeyPatch.context() as patch,
        closing(Proxy(s3_server.port)) as proxy,
        serving(place, **SETTINGS, **own, **s3_server.environment(proxy.endpoint)) as url,
        httpx2.Client(base_url=url, timeout=60) as http,
    ):
        for name, value in s3_server.environment().items():
            patch.setenv(name, value)
        storage = open_storage(address)
        yield _with_models(Site(http, storage, own | s3_server.environment(), proxy), iris_onnx)


def _with_models(site: Site, iris_onnx: Path) -> Site:
    for name, graph in (("iris", iris_onnx.read_bytes()), ("means", MEANS(resize="stretch", size=[16, 16]))):
        ok(site.http.put(f"/v1/models/{name}", content=graph), 201)
    return site


# --- results ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [MANY, FEW], ids=["chunks", "one call"])
@pytest.mark.parametrize("format", FORMATS)
def test_a_result_is_the_same_to_the_byte_as_on_a_folder(
    folder: Site, bucket: Site, records: pl.DataFrame, format: str, number: int
) -> None:
    body = encoded(records.head(number), format)
    jobs = [site.run(body) for site in (folder, bucket)]
    assert jobs[0]["rows"] == jobs[1]["rows"] == {"total": number, "ok": number, "failed": 0}
    assert jobs[0]["chunks"] == jobs[1]["chunks"]
    assert (jobs[1]["chunks"]["total"] > 1) == (number == MANY)
    assert jobs[0]["result"] == jobs[1]["result"]
    contents = [site.result(job).content for site, job in zip((folder, bucket), jobs, strict=True)]
    assert contents[0] == contents[1]
    assert hashlib.sha256(contents[1]).hexdigest() == jobs[1]["result"]["sha256"]
    assert jobs[1]["input"]["sha256"] == hashlib.sha256(body).hexdigest()
    assert bucket.http.get(jobs[1]["links"]["input"]).content == body


def test_an_archive_of_images_is_the_same_as_on_a_folder(folder: Site, bucket: Site) -> None:
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as members:
        for number in range(600):
            members.writestr(f"deep/{number}.png", saved(smooth(20 + number % 7, 30)))
        members.writestr("deep/none.png", random.Random(1).randbytes(3000))
    jobs = [site.run(archive.getvalue(), "means") for site in (folder, bucket)]
    assert jobs[0]["rows"] == jobs[1]["rows"] == {"total": 601, "ok": 600, "failed": 1}
    assert jobs[0]["result"] == jobs[1]["result"]
    lists = [site.http.get(job["links"]["errors"]).content for site, job in zip((folder, bucket), jobs, strict=True)]
    assert lists[0] == lists[1]
    assert b"invalid-image" in lists[1]


def test_a_result_is_converted_on_the_way(bucket: Site, records: pl.DataFrame) -> None:
    job = bucket.run(encoded(records, "csv"))
    converted = bucket.http.get(job["links"]["result"], params={"format": "parquet"})
    assert pl.read_parquet(converted.content).height == MANY
    assert not bucket.keys("conversions/")


# --- downloads -------------------------------------------------------------------------------------------------------


def test_a_download_has_ranges_conditions_and_digests(folder: Site, bucket: Site, records: pl.DataFrame) -> None:
    body = encoded(records, "csv")
    answers = [site.result(site.run(body)) for site in (folder, bucket)]
    job = bucket.run(body)
    for name in ("etag", "repr-digest", "content-length", "content-type", "accept-ranges", "cache-control"):
        assert answers[0].headers[name] == answers[1].headers[name], name
    whole = answers[1].content
    for header, expected in [
        ("0-9", whole[:10]),
        ("-20", whole[-20:]),
        ("1000000-1200000", whole[1_000_000:1_200_001]),
    ]:
        part = bucket.result(job, range=f"bytes={header}")
        assert (part.status_code, part.content) == (206, expected)
    assert bucket.result(job, range="bytes=99999999-").status_code == 416
    assert bucket.result(job, **{"if-none-match": answers[1].headers["etag"]}).status_code == 304
    assert bucket.http.head(job["links"]["result"]).headers["content-length"] == str(len(whole))


def test_a_download_is_redirected_to_the_bucket_when_the_client_asks_for_it(
    bucket: Site, records: pl.DataFrame
) -> None:
    assert bucket.proxy is not None
    job = bucket.run(encoded(records, "csv"))
    whole = bucket.result(job).content
    for link in ("result", "input"):
        with bucket.proxy.counted() as counted:
            answer = bucket.http.get(job["links"][link], params={"redirect": "1"})
        assert (answer.status_code, answer.headers["cache-control"]) == (307, "no-store")
        assert counted.requests == [], "nothing passes through the API"
    location = bucket.http.get(job["links"]["result"], params={"redirect": "1"}).headers["location"]
    assert httpx2.get(location).content == whole
    assert httpx2.get(location, headers={"range": "bytes=5-9"}).content == whole[5:10]
    etag = bucket.result(job).headers["etag"]
    known = bucket.http.get(job["links"]["result"], params={"redirect": "1"}, headers={"if-none-match": etag})
    assert known.status_code == 304


# --- the rest of a job's life ----------------------------------------------------------------------------------------


def test_failed_records_are_retried_and_bytes_are_removed_with_their_job(bucket: Site, records: pl.DataFrame) -> None:
    frame = records.with_row_index().with_columns(
        pl.when(pl.col("index") == 7).then(None).otherwise(pl.nth(1)).alias(records.columns[0])
    )
    before = bucket.keys()
    job = bucket.run(encoded(frame, "csv"))
    assert job["rows"] == {"total": MANY, "ok": MANY - 1, "failed": 1}
    assert bucket.proxy is not None
    with bucket.proxy.counted() as counted:
        again = ok(bucket.http.post(f"{job['links']['self']}/retry", json={"rows": "failed"}), 202)
    copied = [request for request in counted.requests if request.startswith("PUT") and "/parts/" in request]
    assert len(copied) == job["chunks"]["total"] - 1 > 0
    assert counted.sent < 50_000, "the store copies the parts"
    again = bucket.ended(again)
    assert (again["state"], again["rows"]["failed"]) == ("completed", 1)
    assert bucket.result(again).content == bucket.result(job).content
    for removed in (job, again):
        assert bucket.http.delete(removed["links"]["self"]).status_code == 204
    assert bucket.keys() == before


def test_a_wrong_input_leaves_nothing(bucket: Site) -> None:
    before = bucket.keys()
    answer = bucket.http.post("/v1/predict", content=b"a,b\n" + b"1,2\n" * 400_000, params={"model": "iris"})
    problem(answer, 422, "schema-mismatch")
    assert bucket.keys() == before


def test_a_model_is_kept_once_and_removed_with_its_last_version(bucket: Site, iris_onnx: Path) -> None:
    before = bucket.keys("models/")
    graph = iris_onnx.read_bytes() + b"\x72\x00"
    first = ok(bucket.http.put("/v1/models/own", content=graph), 201)
    ok(bucket.http.put("/v1/models/own", content=graph))
    assert len(bucket.keys("models/") - before) == 1
    assert bucket.http.delete(first["links"]["self"]).status_code == 204
    assert bucket.keys("models/") == before


def test_an_outage_in_the_middle_of_a_job_delays_it(bucket: Site, records: pl.DataFrame) -> None:
    assert bucket.proxy is not None
    body = encoded(pl.concat([records] * 5), "csv")
    expected = bucket.run(body)
    job = bucket.submit(body)
    while not ok(bucket.http.get(job["links"]["self"]))["chunks"]["done"]:
        time.sleep(0.01)
    bucket.proxy.turn("away")
    try:
        deadline = time.monotonic() + 30
        while (now := ok(bucket.http.get(job["links"]["self"])))["reason"] != "unavailable":
            assert now["state"] == "running"
            assert time.monotonic() < deadline
            time.sleep(0.05)
        problem(bucket.http.post("/v1/upload", content=body), 503, "unavailable")
        problem(bucket.result(expected), 503, "unavailable")
        assert bucket.http.get("/readyz").status_code == 503
        time.sleep(2)
    finally:
        bucket.proxy.turn("through")
    done = bucket.ended(job)
    assert (done["state"], done["reason"], done["attempt"]) == ("completed", None, 1)
    assert done["result"]["sha256"] == expected["result"]["sha256"]
    assert bucket.http.get("/readyz").status_code == 200


def test_errors_delays_and_unknown_outcomes_change_no_result(bucket: Site, records: pl.DataFrame) -> None:
    assert bucket.proxy is not None
    body = encoded(pl.concat([records] * 5), "parquet")
    expected = bucket.run(body)
    bucket.proxy.turn("flaky")
    try:
        jobs = [bucket.submitted(body) for _ in range(3)]
        done = [bucket.ended(job, 120) for job in jobs]
    finally:
        bucket.proxy.turn("through")
    assert {(job["state"], job["attempt"]) for job in done} == {("completed", 1)}
    assert {job["result"]["sha256"] for job in done} == {expected["result"]["sha256"]}
    assert {hashlib.sha256(bucket.result(job).content).hexdigest() for job in done} == {expected["result"]["sha256"]}


# --- upkeep ----------------------------------------------------------------------------------------------------------


def test_only_own_objects_are_removed_when_they_are_old_and_no_row_needs_them(
    bucket: Site, records: pl.DataFrame
) -> None:
    job = bucket.run(encoded(records, "csv"))
    kept = bucket.keys()
    number = str(uuid7())
    orphans = {
        f"inputs/{number}",
        f"parts/{number}/000000000000000-1",
        f"results/{number}-1",
        "uploads/1",
        "conversions/a/1",
    }
    foreign = {"lake/table.csv", "resultset/x", "lake/inputs/1"}
    for key in orphans | foreign:
        bucket.storage.compose(key, [b"1"])
    with closing(Database(bucket.database_url)) as database:
        soon = time.time() + 5
        assert sweep(database, bucket.storage, 3600.0, soon).total == 0
        assert sweep(database, bucket.storage, 3600.0, soon + 3600).total == len(orphans)
        assert bucket.keys() == kept | foreign
        lasting = Settings(storage=bucket.storage.address, database=bucket.database_url, keep_results=86_400.0)
        assert expire(database, bucket.storage, lasting, soon + 2 * 86_400).jobs > 0
    left = bucket.keys()
    assert {key for key in left if not key.startswith("models/")} == foreign
    problem(bucket.result(job), 410, "expired")
    for key in foreign:
        bucket.storage.delete(key)


def test_doctor_finds_a_bucket_in_order(bucket: Site, records: pl.DataFrame, tmp_path: Path) -> None:
    job = bucket.run(encoded(records, "csv"))
    done = in_a_process(tmp_path, "doctor", "--deep", "--json", **bucket.environment)
    findings = {finding["check"]: finding for finding in json.loads(done.stdout)}
    assert {name for name, finding in findings.items() if finding["status"] == "fail"} == set(), done.stdout
    assert "takes writes" in findings["storage"]["detail"]
    assert "lifecycle rule" in findings["free space"]["detail"]
    assert "objects exist" in findings["stored bytes"]["detail"]
    bucket.storage.delete(f"results/{job['id']}-1")
    done = in_a_process(tmp_path, "doctor", "--json", **bucket.environment)
    assert done.returncode == 1
    assert "stored bytes" in {finding["check"] for finding in json.loads(done.stdout) if finding["status"] == "fail"}
    assert bucket.http.delete(job["links"]["self"]).status_code == 204


def test_a_backup_of_a_bucket_is_refused_with_the_tools_that_make_one(bucket: Site, tmp_path: Path) -> None:
    done = in_a_process(tmp_path, "backup", "copy", **bucket.environment)
    assert done.returncode == 2
    assert "pg_dump" in done.stderr
    assert "versioning" in done.stderr


def test_the_backup_of_a_folder_can_be_restored_into_a_bucket(
    folder: Site, s3_server: seaweed.Server, records: pl.DataFrame, tmp_path: Path
) -> None:
    jobs = [folder.run(encoded(records.head(FEW), format)) for format in ("csv", "parquet")]
    assert in_a_process(tmp_path, "backup", "copy", **folder.environment).returncode == 0
    own = s3_server.environment() | {
        "BATCHSERVE_STORAGE": s3_server.new_address(),
        "BATCHSERVE_DATABASE": f"sqlite:///{tmp_path / 'moved.db'}",
    }
    done = in_a_process(tmp_path, "restore", "copy", **own)
    assert done.returncode == 0, done.stderr
    with serving(tmp_path, **SETTINGS, **own) as url, httpx2.Client(base_url=url, timeout=60) as http:
        for job in jobs:
            assert http.get(job["links"]["result"]).content == folder.result(job).content
            assert http.get(job["links"]["input"]).content == folder.http.get(job["links"]["input"]).content
