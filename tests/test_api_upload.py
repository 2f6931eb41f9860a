import asyncio
import base64
import gzip
import hashlib
import io
import json
import pickle
import resource
import socket
import sqlite3
import threading
import time
import zipfile
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx2
import orjson
import polars as pl
import pytest
from conftest import serving
from packing import zstd
from service import Api, encoded, ok, problem, running
from starlette.requests import Request
from starlette.types import Message

from batchserve.api.bodies import Body
from batchserve.app import create_app
from batchserve.db import connect
from batchserve.settings import Settings
from batchserve.storage import open_storage
from batchserve.storage.local import FileWriter

CSV = b"sepal length (cm),sepal width (cm),petal length (cm),petal width (cm)\n5.1,3.5,1.4,0.2\n"
FORMATS = {
    "csv": "text/csv",
    "jsonl": "application/x-ndjson",
    "json": "application/json",
    "parquet": "application/vnd.apache.parquet",
    "arrow": "application/vnd.apache.arrow.file",
    "arrows": "application/vnd.apache.arrow.stream",
    "npy": "application/x-npy",
    "npz": "application/x-npz",
}


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def digest(data: bytes) -> str:
    return f"sha-256=:{base64.b64encode(hashlib.sha256(data).digest()).decode()}:"


# --- accepted bodies -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("declared", [True, False], ids=["declared", "sniffed"])
@pytest.mark.parametrize("format", FORMATS)
def test_a_file_of_every_format_is_stored_as_it_came(
    api: Api, flowers: pl.DataFrame, format: str, declared: bool
) -> None:
    body = encoded(flowers, format)
    headers = {"content-type": FORMATS[format]} if declared else {}
    answer = api.http.post("/v1/upload", content=body, headers=headers)
    job = ok(answer, 201)
    assert answer.headers["location"] == job["links"]["self"] == f"/v1/jobs/{job['id']}"
    assert (job["state"], job["progress"], job["model"], job["result"]) == ("uploaded", 0.0, None, None)
    assert (job["input"]["format"], job["input"]["media_type"]) == (format, FORMATS[format])
    assert (job["input"]["bytes"], job["input"]["sha256"]) == (len(body), sha256(body))
    assert api.http.get(job["links"]["input"]).content == body
    assert api.job(job["id"]) == job


@pytest.mark.parametrize("rows", ['[{"a": 1}, {"a": 2}]', '{"data": [{"a": 1}, {"a": 2}]}', '{"data":\n [\n{"a": 1}]}'])
def test_json_may_be_a_list_of_records_or_wrapped_as_data(api: Api, rows: str) -> None:
    assert api.upload(rows)["input"]["format"] == "json"


def test_json_lines_and_json_are_distinguished(api: Api) -> None:
    assert api.upload('{"a": 1}\n{"a": 2}\n')["input"]["format"] == "jsonl"


def test_curl_may_put_a_file(api: Api) -> None:
    job = ok(api.http.put("/v1/upload", content=CSV, params={"filename": "one.csv"}), 201)
    assert (job["state"], job["input"]["filename"]) == ("uploaded", "one.csv")


def test_a_part_of_a_file_is_no_file(api: Api) -> None:
    headers = {"content-range": "bytes 76-149/150"}
    with api.unchanged():
        for path in ("/v1/upload", "/v1/models/part"):
            answer = api.http.put(path, content=CSV, headers=headers)
            assert "got Content-Range bytes 76-149/150" in problem(answer, 400, "bad-request")["detail"]


def test_the_delimiter_is_chosen_by_query_or_by_type(api: Api) -> None:
    data = CSV.replace(b",", b";")
    job = api.run(data, "iris", delimiter=";")
    assert job["rows"] == {"total": 1, "ok": 1, "failed": 0}
    tabs = CSV.replace(b",", b"\t")
    uploaded = ok(api.http.post("/v1/upload", content=tabs, headers={"content-type": "text/tab-separated-values"}), 201)
    answer = api.http.post(f"/v1/predict/{uploaded['id']}?model=iris", headers={"prefer": "wait=30"})
    assert ok(answer)["rows"]["ok"] == 1
    problem(api.http.post("/v1/upload?delimiter=x", content=CSV), 422, "invalid-options")


def test_a_form_carries_one_file(api: Api) -> None:
    job = ok(api.http.post("/v1/upload", files={"file": ("flowers.csv", CSV, "text/csv")}), 201)
    assert (job["input"]["filename"], job["input"]["sha256"]) == ("flowers.csv", sha256(CSV))


def test_a_compressed_file_in_a_form_is_decompressed(api: Api) -> None:
    job = ok(api.http.post("/v1/upload", files={"file": ("flowers.csv.gz", gzip.compress(CSV))}), 201)
    assert (job["input"]["format"], job["input"]["sha256"]) == ("csv", sha256(CSV))


PNG = b"\x89PNG\r\n\x1a\n\x00not a real one"
JPEG = b"\xff\xd8\xff\xe0\x00\x10JFIF\x00nor this"


def members_of(data: bytes) -> list[tuple[str, bytes]]:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        assert archive.testzip() is None
        return [(name, archive.read(name)) for name in archive.namelist()]


@pytest.mark.parametrize(
    ("body", "format", "media_type"),
    [(PNG, "png", "image/png"), (JPEG, "jpeg", "image/jpeg")],
)
def test_an_image_is_stored_as_it_came(api: Api, body: bytes, format: str, media_type: str) -> None:
    for answer in (
        api.http.post("/v1/upload", content=body),
        api.http.post("/v1/upload", content=body, headers={"content-type": media_type}),
        api.http.post("/v1/upload", files={"photo": (f"a.{format}", body)}),
    ):
        job = ok(answer, 201)
        assert (job["input"]["format"], job["input"]["media_type"]) == (format, media_type)
        stored = api.http.get(job["links"]["input"])
        assert (stored.content, stored.headers["content-type"]) == (body, media_type)


def test_a_form_with_several_files_is_stored_as_a_zip_in_their_order(api: Api) -> None:
    names = [
        "b.png",
        "a.jpg",
        "b.png",
        "b.png",
        "b-2.png",
        "../../etc/c.png",
        "C:\\fake\\d.png",
        "Zürich/é.png",
        "",
    ]
    files = [(f"field{i % 3}", (name, PNG + bytes([i]))) for i, name in enumerate(names)]
    job = ok(api.http.post("/v1/upload", files=[*files, ("note", (None, b"hello"))]), 201)
    assert (job["input"]["format"], job["input"]["media_type"]) == ("zip", "application/zip")
    assert job["input"]["filename"] is None
    stored = api.http.get(job["links"]["input"])
    assert stored.headers["content-type"] == "application/zip"
    assert (len(stored.content), sha256(stored.content)) == (job["input"]["bytes"], job["input"]["sha256"])
    kept = ["b.png", "a.jpg", "b-2.png", "b-3.png", "b-2-2.png", "etc/c.png", "d.png", "Zürich/é.png"]
    assert members_of(stored.content) == [(name, PNG + bytes([i])) for i, name in enumerate(kept)]
    again = ok(api.http.post("/v1/upload", files=[*files]), 201)
    assert again["input"]["sha256"] == job["input"]["sha256"]


def test_an_empty_file_field_of_a_form_is_ignored(api: Api) -> None:
    part = b'--b\r\ncontent-disposition: form-data; name="x"; filename="%b"\r\n\r\n%b\r\n'
    headers = {"content-type": "multipart/form-data; boundary=b"}
    for named, stored in ((b"a.csv", CSV), (b"", CSV)):
        body = part % (b"", b"") + part % (named, CSV) + part % (b"", b"") + b"--b--\r\n"
        job = ok(api.http.post("/v1/upload", content=body, headers=headers), 201)
        assert api.http.get(job["links"]["input"]).content == stored
        assert job["input"]["filename"] == (named.decode() or None)
    body = part % (b"\x00a\x1f.png", PNG) + part % (b"/", PNG) + part % (b"..", JPEG) + b"--b--\r\n"
    job = ok(api.http.post("/v1/upload", content=body, headers=headers), 201)
    stored = api.http.get(job["links"]["input"]).content
    assert members_of(stored) == [("a.png", PNG), ("file", PNG), ("file-2", JPEG)]
    with api.unchanged():
        answer = api.http.post("/v1/upload", content=part % (b"", b"") + b"--b--\r\n", headers=headers)
        assert "one file" in problem(answer, 422, "invalid-options")["detail"]


def test_a_name_beyond_ascii_may_come_as_some_clients_send_it(api: Api) -> None:
    part = b"--b\r\ncontent-disposition: form-data; name=\"x\"; filename*=utf-8''%b\r\n\r\n%b\r\n"
    headers = {"content-type": "Multipart/Form-Data; boundary=b"}
    body = part % (b"%C3%A4.png", PNG) + part % (b"b.jpg", JPEG) + b"--b--\r\n"
    job = ok(api.http.post("/v1/upload", content=body, headers=headers), 201)
    assert members_of(api.http.get(job["links"]["input"]).content) == [("ä.png", PNG), ("b.jpg", JPEG)]


@pytest.mark.parametrize("cut", [0, 2, 10, 60, 80, 130])
def test_a_form_that_is_cut_off_is_refused(api: Api, cut: int) -> None:
    part = b'--b\r\ncontent-disposition: form-data; name="x"; filename="%d.png"\r\n\r\n%b\r\n'
    whole = part % (1, PNG) + part % (2, PNG) + b"--b--"
    headers = {"content-type": "multipart/form-data; boundary=b"}
    if cut == 0:
        ok(api.http.post("/v1/upload", content=whole, headers=headers), 201)
        return
    with api.unchanged():
        answer = api.http.post("/v1/upload", content=whole[:-cut], headers=headers)
        assert "closing boundary" in problem(answer, 400, "truncated-body")["detail"]
        answer = api.http.post("/v1/models/iris/predict", content=whole[:-cut], headers=headers)
        problem(answer, 400, "truncated-body")


def test_a_form_with_several_large_files_keeps_every_byte(api: Api) -> None:
    contents = [JPEG + bytes(range(256)) * (size // 256) for size in (3 << 20, 100, 1 << 20, (2 << 20) + 777)]
    job = ok(api.http.post("/v1/upload", files=[("file", (f"{i}.jpg", data)) for i, data in enumerate(contents)]), 201)
    stored = api.http.get(job["links"]["input"]).content
    assert members_of(stored) == [(f"{i}.jpg", data) for i, data in enumerate(contents)]


def test_a_form_may_have_thousands_of_files_and_not_more(api: Api) -> None:
    part = b'--b\r\ncontent-disposition: form-data; name="x"; filename="%d.png"\r\n\r\n%b\r\n'
    headers = {"content-type": "multipart/form-data; boundary=b"}
    parts = [part % (i, PNG) for i in range(10_001)]
    job = ok(api.http.post("/v1/upload", content=b"".join(parts[1:]) + b"--b--\r\n", headers=headers), 201)
    assert len(members_of(api.http.get(job["links"]["input"]).content)) == 10_000
    with api.unchanged():
        answer = api.http.post("/v1/upload", content=b"".join(parts) + b"--b--\r\n", headers=headers)
        assert "more than 10000 files" in problem(answer, 400, "bad-request")["detail"]


def test_an_archive_of_images_is_a_table_of_its_files(api: Api) -> None:
    body = zipped({"a/": b"", "a/good film.png": PNG, "b/bad film.jpg": JPEG})
    options = {"columns": '{"text": "file"}', "passthrough": "file"}
    job = api.run(body, "reviews", **options)
    assert (job["state"], job["rows"]) == ("completed", {"total": 2, "ok": 2, "failed": 0}), job["error"]
    assert (job["input"]["rows"], job["result"]["format"], job["options"]["format"]) == (2, "jsonl", "jsonl")
    rows = [orjson.loads(line) for line in api.result(job).content.splitlines()]
    assert [row["file"] for row in rows] == ["a/good film.png", "b/bad film.jpg"]
    files = [("file", ("a good film.png", PNG)), ("file", ("b bad film.jpg", JPEG))]
    query = {"model": "reviews", **options, "format": "csv"}
    done = ok(api.http.post("/v1/predict", files=files, params=query, headers={"prefer": "wait=30"}))
    assert api.result(done).text.splitlines()[1].startswith("a good film.png,")
    with api.unchanged():
        answer = api.http.post("/v1/predict", content=body, params={**query, "format": "zip"})
        assert "expected one of csv, jsonl" in problem(answer, 422, "invalid-options")["errors"][0]["message"]
    problem(api.http.get(done["links"]["result"], params={"format": "zip"}), 406, "not-acceptable")


def test_a_hostile_archive_is_refused_before_it_is_a_job_and_leaves_nothing(api: Api) -> None:
    with api.unchanged():
        for body, said in (
            (zipped({"good.png": PNG, "../evil.png": PNG}), "unsafe name: '../evil.png'"),
            (zipped({"good.png": PNG, "evil.png": bytes(80 << 20)}), "'evil.png' unpacks"),
            (zipped({"good/": b""}), "holds no files"),
            (zipped({"good.png": PNG})[:-5], "cut off"),
        ):
            for call in ("/v1/upload", "/v1/predict"):
                answer = api.http.post(call, content=body, params={"model": "reviews"})
                assert said in problem(answer, 422, "invalid-input")["detail"]


def zipped(files: dict[str, bytes]) -> bytes:
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return target.getvalue()


def two_members(data: bytes) -> bytes:
    return gzip.compress(data[:30]) + gzip.compress(data[30:])


def two_frames(data: bytes) -> bytes:
    return zstd.compress(data[:30]) + zstd.compress(data[30:])


@pytest.mark.parametrize("said", [True, False], ids=["encoding-said", "encoding-seen"])
@pytest.mark.parametrize(
    ("compress", "encoding"),
    [(gzip.compress, "gzip"), (two_members, "gzip"), (zstd.compress, "zstd"), (two_frames, "zstd")],
    ids=["gzip", "gzip-members", "zstd", "zstd-frames"],
)
def test_a_compressed_body_is_stored_plain(
    api: Api, flowers: pl.DataFrame, compress: Callable[[bytes], bytes], encoding: str, said: bool
) -> None:
    plain = encoded(flowers, "csv")
    headers = {"content-encoding": encoding} if said else {}
    job = ok(api.http.post("/v1/upload", content=compress(plain), headers=headers), 201)
    assert (job["input"]["bytes"], job["input"]["sha256"]) == (len(plain), sha256(plain))
    assert api.http.get(job["links"]["input"]).content == plain


def test_a_big_compressed_body_keeps_every_byte(api: Api) -> None:
    plain = b"a,b\n" + b"".join(b"%d,%d\n" % (i, i * 7919 % 104729) for i in range(300_000))
    for compress in (gzip.compress, zstd.compress):
        assert ok(api.http.post("/v1/upload", content=compress(plain)), 201)["input"]["sha256"] == sha256(plain)


@pytest.mark.parametrize("header", ["content-digest", "repr-digest"])
def test_a_digest_that_matches_is_accepted_and_one_that_does_not_is_refused(api: Api, header: str) -> None:
    ok(api.http.post("/v1/upload", content=CSV, headers={header: digest(CSV)}), 201)
    ok(api.http.post("/v1/upload", content=CSV, headers={header: f"md5=:AAAA:, {digest(CSV)}"}), 201)
    with api.unchanged():
        body = problem(
            api.http.post("/v1/upload", content=CSV, headers={header: digest(b"else")}), 422, "digest-mismatch"
        )
        assert sha256(CSV) in body["detail"]
        assert sha256(b"else") in body["detail"]
        problem(api.http.post("/v1/upload", content=CSV, headers={header: "md5=:AAAA:"}), 400, "bad-request")
        problem(api.http.post("/v1/upload", content=CSV, headers={header: "sha-256=:AAA:"}), 400, "bad-request")


def test_the_digest_is_that_of_the_body_as_sent(api: Api) -> None:
    body = gzip.compress(CSV)
    ok(api.http.post("/v1/upload", content=body, headers={"content-digest": digest(body)}), 201)
    files = {"file": ("flowers.csv", CSV)}
    with api.unchanged():
        problem(
            api.http.post("/v1/upload", files=files, headers={"content-digest": digest(CSV)}), 422, "digest-mismatch"
        )


def test_a_digest_that_cannot_be_checked_is_refused_before_the_body_is_sent(server: str) -> None:
    address = urlsplit(server)
    head = f"host: localhost\r\nconnection: close\r\nexpect: 100-continue\r\ncontent-length: {len(CSV)}\r\n"
    with socket.create_connection((address.hostname, address.port), 20) as connection:
        connection.sendall(f"POST /v1/upload HTTP/1.1\r\n{head}repr-digest: md5=:AAAA:\r\n\r\n".encode())
        assert connection.recv(65536).startswith(b"HTTP/1.1 400")


# --- big bodies: one block is written while the next is received -----------------------------------------------------

BIG = b"a,b\n" + b"".join(b"%d,%d\n" % (i, i * 7919 % 104729) for i in range(400_000))


@pytest.mark.parametrize("headers", [{}, {"repr-digest": digest(BIG)}], ids=["plain", "digest"])
@pytest.mark.parametrize("length", [(1 << 20) - 1, 1 << 20, (1 << 20) + 1, len(BIG)])
def test_a_big_body_keeps_every_byte_in_its_place(api: Api, length: int, headers: dict[str, str]) -> None:
    body = BIG[:length]
    headers = {name: digest(body) for name in headers}
    job = ok(api.http.post("/v1/upload", content=body, headers=headers), 201)
    assert (job["input"]["bytes"], job["input"]["sha256"]) == (length, sha256(body))
    assert api.http.get(job["links"]["input"]).content == body


def test_a_big_body_that_does_not_match_its_digest_leaves_nothing(api: Api) -> None:
    with api.unchanged():
        answer = api.http.post("/v1/upload", content=BIG, headers={"repr-digest": digest(BIG[:-1])})
        problem(answer, 422, "digest-mismatch")


@pytest.mark.parametrize(
    "sent", [{"content": BIG}, {"files": [("x", ("a", BIG)), ("x", ("b", BIG))]}], ids=["file", "form"]
)
def test_a_disk_that_fills_up_in_the_middle_of_a_body_is_named_and_leaves_nothing(
    api: Api, sent: dict[str, Any]
) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with api.unchanged():
        resource.setrlimit(resource.RLIMIT_FSIZE, (3 << 20, limits[1]))
        try:
            answer = api.http.post("/v1/upload", **sent)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        problem(answer, 507, "insufficient-storage")
    ok(api.http.post("/v1/upload", **sent), 201)


@pytest.mark.slow
def test_a_client_that_leaves_in_the_middle_of_a_big_body_leaves_nothing(tmp_path: Path) -> None:
    with serving(tmp_path) as url:
        address, inputs = urlsplit(url), tmp_path / "storage" / "inputs"
        with socket.create_connection((address.hostname, address.port), 20) as connection:
            connection.sendall(
                f"POST /v1/upload HTTP/1.1\r\nhost: localhost\r\ncontent-length: {len(BIG)}\r\n\r\n".encode()
            )
            connection.sendall(BIG[: 5 << 19])
            assert _within(30, lambda: _bytes_in(inputs) >= 1 << 20)  # blocks are written before the body has ended
        assert _within(30, lambda: _bytes_in(inputs) == 0)
        assert ok(httpx2.get(f"{url}/v1/jobs"))["jobs"] == []


def _bytes_in(folder: Path) -> int:
    """The size of the existing files, any of which may be removed while they are counted."""
    total = 0
    for path in folder.glob("*"):
        with suppress(FileNotFoundError):
            total += path.stat().st_size
    return total


def _within(seconds: float, condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


@pytest.mark.parametrize("blocks_come", [False, True], ids=["waiting for the client", "waiting for the disk"])
def test_a_cancelled_request_keeps_its_file_open_until_the_last_write_has_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, blocks_come: bool
) -> None:
    """The descriptor of a closed file may belong to another file a moment later."""
    writing, go_on = threading.Event(), threading.Event()
    failures: list[BaseException] = []
    received = 0
    write = FileWriter.write

    def slow_disk(self: FileWriter, data: bytes | memoryview) -> None:
        writing.set()
        go_on.wait(20)
        try:
            write(self, data)
        except BaseException as error:
            failures.append(error)
            raise

    async def receive() -> Message:
        nonlocal received
        received += 1
        await asyncio.sleep(0 if blocks_come or received <= 2 else 60)  # with the second, the first is written
        return {"type": "http.request", "body": bytes(1 << 20), "more_body": True}

    async def store() -> None:
        request = Request({"type": "http", "method": "POST", "headers": []}, receive)
        body = Body(request, Settings(storage=str(tmp_path)), 1 << 40)
        blocks = body.blocks()
        with open_storage(str(tmp_path)).create("inputs/a") as writer:
            await body.store(writer, await anext(blocks), blocks)

    async def cancelled() -> None:
        request = asyncio.create_task(store())
        assert await asyncio.to_thread(writing.wait, 20)
        await asyncio.sleep(0.1)
        request.cancel()
        _, waiting = await asyncio.wait([request], timeout=0.2)
        go_on.set()
        assert waiting
        with pytest.raises(asyncio.CancelledError):
            await request

    monkeypatch.setattr(FileWriter, "write", slow_disk)
    asyncio.run(cancelled())
    assert failures == []
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


# --- ?model= ---------------------------------------------------------------------------------------------------------


def test_an_upload_for_a_model_is_checked_and_predict_need_not_name_it(api: Api) -> None:
    job = api.upload(CSV, model="iris")
    assert (job["state"], job["model"]["name"], job["model"]["version"]) == ("uploaded", "iris", 1)
    done = ok(api.http.post(f"/v1/predict/{job['id']}", headers={"prefer": "wait=30"}))
    assert (done["state"], done["model"]["version"], done["rows"]["ok"]) == ("completed", 1, 1)


def test_an_upload_for_a_model_is_checked_with_the_columns_of_a_predict(api: Api) -> None:
    renamed = CSV.replace(b"petal length (cm)", b"length")
    columns = {"columns": json.dumps({"petal length (cm)": "length"})}
    job = ok(api.http.post("/v1/upload", params={"model": "iris", **columns}, content=renamed), 201)
    done = ok(api.http.post(f"/v1/predict/{job['id']}", params=columns, headers={"prefer": "wait=30"}))
    assert done["rows"]["ok"] == 1
    with api.unchanged():
        wrong = {"model": "iris", "columns": json.dumps({"petal length (cm)": "absent"})}
        problem(api.http.post("/v1/upload", params=wrong, content=renamed), 422, "schema-mismatch")
        unread = problem(api.http.post("/v1/upload", params=columns, content=renamed), 422, "invalid-options")
        assert "only with model" in unread["detail"]


def test_an_upload_that_does_not_fit_its_model_leaves_nothing(api: Api) -> None:
    with api.unchanged():
        body = problem(
            api.http.post("/v1/upload?model=iris", content=b"petal length (cm)\n1\n"), 422, "schema-mismatch"
        )
        assert {error["column"] for error in body["errors"]} == {
            "sepal length (cm)",
            "sepal width (cm)",
            "petal width (cm)",
        }


def test_an_upload_for_an_unknown_model_names_those_that_exist(api: Api) -> None:
    with api.unchanged():
        body = problem(api.http.post("/v1/upload?model=rose", content=CSV), 404, "model-not-found")
        assert "'rose'" in body["detail"]
        assert all(f" {name}" in body["detail"] for name in ("iris", "people", "petals", "reviews"))


# --- refused bodies --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "media_type", "named"),
    [
        (pickle.dumps({"a": 1}), "application/octet-stream", "pickle"),
        (b"\x89PNG\r\n\x1a\n" + bytes(20), "text/csv", "png"),
        (b"\x89PNG\r\n\x1a\n" + bytes(20), "image/jpeg", "image/jpeg"),
        (b"%PDF-1.7 ", None, "PDF"),
        (zipped({"[Content_Types].xml": b"<x/>"}), "application/zip", "Excel"),
        (zipped({"notes.txt": b"hello"}), "application/x-npz", "zip"),
        (b"PAR1" + bytes(30) + b"PAR1", "text/csv", "parquet"),
        (CSV, "application/vnd.apache.parquet", "csv"),
        (CSV, "text/html", "text/html"),
        (b'[{"a": 1}]', "text/csv", "json"),
        ("a,b\n1,2\n".encode("utf-16-le"), None, "UTF-16"),
        (b"a,b\n\x00\x01\x02\n", None, "NUL"),
    ],
)
def test_bytes_of_another_type_are_named_and_refused(api: Api, body: bytes, media_type: str | None, named: str) -> None:
    with api.unchanged():
        headers = {"content-type": media_type} if media_type else {}
        answer = api.http.post("/v1/upload", content=body, headers=headers)
        detail = problem(answer, 415, "unsupported-media-type")["detail"]
        assert named in detail
        assert "text/csv" in detail


@pytest.mark.parametrize("encoding", ["br", "gzip, zstd", "compress"])
def test_another_content_encoding_is_named_and_refused(api: Api, encoding: str) -> None:
    with api.unchanged():
        answer = api.http.post("/v1/upload", content=CSV, headers={"content-encoding": encoding})
        assert repr(encoding) in problem(answer, 415, "unsupported-media-type")["detail"]


@pytest.mark.parametrize(
    ("body", "encoding", "code"),
    [
        (gzip.compress(CSV)[:-9], "gzip", "truncated-body"),
        (zstd.compress(CSV)[:-3], "zstd", "truncated-body"),
        (CSV, "gzip", "bad-request"),
        (CSV, "zstd", "bad-request"),
        (gzip.compress(CSV) + b"trailer", "gzip", "bad-request"),
    ],
    ids=["gzip cut off", "zstd cut off", "not gzip", "not zstd", "gzip with a trailer"],
)
def test_a_damaged_compressed_body_leaves_nothing(api: Api, body: bytes, encoding: str, code: str) -> None:
    with api.unchanged():
        answer = api.http.post("/v1/upload", content=body, headers={"content-encoding": encoding})
        assert encoding in problem(answer, 400, code)["detail"] or code == "truncated-body"


@pytest.mark.parametrize("compress", [gzip.compress, zstd.compress], ids=["gzip", "zstd"])
def test_a_decompression_bomb_is_aborted_while_it_is_received(api: Api, compress: Callable[[bytes], bytes]) -> None:
    bomb = compress(b"a\n" + b"0" * (80 << 20))
    assert len(bomb) < 200_000
    with api.unchanged():
        detail = problem(api.http.post("/v1/upload", content=bomb), 413, "payload-too-large")["detail"]
        assert "200 times" in detail


def test_an_upload_longer_than_the_limit_is_refused_however_it_is_sent(tmp_path: Path) -> None:
    long = b"a\n" + b"1\n" * 10_000
    with running(tmp_path, worker=False, upload_bytes=10_000) as api:
        ok(api.http.post("/v1/upload", content=long[:10_000]), 201)
        with api.unchanged():
            announced = problem(api.http.post("/v1/upload", content=long), 413, "payload-too-large")
            assert "20002 bytes" in announced["detail"]
            assert "10000" in announced["detail"]
            streamed = api.http.post("/v1/upload", content=(long[i : i + 999] for i in range(0, len(long), 999)))
            problem(streamed, 413, "payload-too-large")
            problem(api.http.post("/v1/upload", content=gzip.compress(long)), 413, "payload-too-large")
            problem(api.http.post("/v1/upload", files={"file": ("a.csv", long)}), 413, "payload-too-large")
            compressed = {"file": ("a.csv.gz", gzip.compress(long))}
            problem(api.http.post("/v1/upload", files=compressed), 413, "payload-too-large")


def test_uploads_leave_as_much_space_free_as_the_settings_require(tmp_path: Path) -> None:
    with running(tmp_path, worker=False, free_bytes=2**60) as api, api.unchanged():
        answer = api.http.post("/v1/upload", content=CSV)
        problem(answer, 507, "insufficient-storage")
        assert answer.headers["retry-after"] == "30"


def test_a_form_needs_a_file(api: Api) -> None:
    with api.unchanged():
        none = api.http.post("/v1/upload", files={"note": (None, b"hello")})
        assert "one file or more, got none: a file has a name" in problem(none, 422, "invalid-options")["detail"]
        problem(api.http.post("/v1/upload", files={"file": ("a.csv", b"")}), 422, "invalid-input")


@pytest.mark.parametrize(
    "content_type", ["multipart/form-data", "multipart/form-data; boundary=x", "multipart/form-data; boundary="]
)
def test_a_malformed_form_is_refused(api: Api, content_type: str) -> None:
    with api.unchanged():
        answer = api.http.post("/v1/upload", content=b"this is no form", headers={"content-type": content_type})
        assert "form" in problem(answer, 400, "bad-request")["detail"]


# --- file names ------------------------------------------------------------------------------------------------------

HOSTILE = [
    "../../etc/passwd",
    "/etc/passwd",
    "..\\..\\boot.ini",
    "a\r\nSet-Cookie: x=1",
    "\u202egpj.exe",
    "x" * 900,
    "\u00e9" * 300,
    ".",
    "",
    '";rm -rf ~;".csv',
    "\U0001f338.csv",
]


@pytest.mark.parametrize("name", HOSTILE, ids=range(len(HOSTILE)))
def test_a_hostile_file_name_is_only_metadata(api: Api, name: str) -> None:
    before = api.stored()
    job = api.upload(CSV, filename=name)
    kept = job["input"]["filename"] or ""
    assert api.stored() - before == {f"inputs/{job['id']}"}
    assert len(kept.encode()) <= 255
    assert kept.isprintable()
    answer = api.http.get(job["links"]["input"])
    assert answer.content == CSV
    assert "set-cookie" not in answer.headers
    disposition = answer.headers["content-disposition"]
    assert disposition.startswith("attachment; filename")
    assert disposition.isascii()


@pytest.mark.parametrize(
    ("header", "name"),
    [
        ('attachment; filename="july.csv"', "july.csv"),
        ("attachment; filename*=UTF-8''z%C3%BCrich.csv", "zürich.csv"),
        ('attachment; filename="../../etc/passwd"', "../../etc/passwd"),
        ("attachment; filename*=klingon''%ff.csv", None),
        ("attachment", None),
    ],
)
def test_the_file_name_may_come_as_a_header(api: Api, header: str, name: str | None) -> None:
    job = ok(api.http.post("/v1/upload", content=CSV, headers={"content-disposition": header}), 201)
    assert name is None or job["input"]["filename"] == name
    assert job["state"] == "uploaded"


def test_a_hostile_name_in_a_form_is_metadata_too(api: Api) -> None:
    job = ok(api.http.post("/v1/upload", files={"file": ("../../../evil.csv", CSV)}), 201)
    assert job["input"]["filename"] == "../../../evil.csv"
    assert f"inputs/{job['id']}" in api.stored()


# --- Idempotency-Key -------------------------------------------------------------------------------------------------


def test_an_upload_sent_again_with_its_key_gives_the_first_job(api: Api) -> None:
    headers = {"idempotency-key": '"upload-1"'}
    first = api.http.post("/v1/upload", content=CSV, headers=headers)
    assert "idempotency-replayed" not in first.headers
    with api.unchanged():
        again = api.http.post("/v1/upload", content=CSV, headers=headers)
        assert (again.status_code, again.json()) == (201, first.json())
        assert again.headers["idempotency-replayed"] == "true"
        other = api.http.post("/v1/upload", content=CSV + b"1,2,3,4\n", headers=headers)
        assert first.json()["id"] in problem(other, 422, "idempotency-mismatch")["detail"]
        problem(api.http.post("/v1/upload?delimiter=;", content=CSV, headers=headers), 422, "idempotency-mismatch")


def test_a_key_survives_a_restart_and_a_refused_upload_does_not_use_it_up(tmp_path: Path) -> None:
    headers = {"idempotency-key": "k"}
    with running(tmp_path, worker=False) as api:
        problem(api.http.post("/v1/upload", content=b"", headers=headers), 422, "invalid-input")
        job = ok(api.http.post("/v1/upload", content=CSV, headers=headers), 201)
    with running(tmp_path, worker=False) as api:
        again = api.http.post("/v1/upload", content=CSV, headers=headers)
        assert (again.status_code, again.json()["id"]) == (201, job["id"])


@pytest.mark.parametrize(("key", "code"), [("", "bad-request"), ('""', "bad-request"), ("k" * 256, "bad-request")])
def test_a_key_that_is_empty_or_too_long_is_refused(api: Api, key: str, code: str) -> None:
    with api.unchanged():
        problem(api.http.post("/v1/upload", content=CSV, headers={"idempotency-key": key}), 400, code)


def test_a_second_request_gets_409_while_the_first_one_with_its_key_is_in_progress(server: str) -> None:
    address = urlsplit(server)
    headers = {"idempotency-key": "slow"}
    request = (
        f"POST /v1/upload HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n"
        f"expect: 100-continue\r\nidempotency-key: slow\r\ncontent-length: {len(CSV)}\r\n\r\n"
    ).encode()
    with socket.create_connection((address.hostname, address.port), 20) as slow:
        slow.sendall(request)
        assert slow.recv(65536).startswith(b"HTTP/1.1 100 Continue")
        slow.sendall(CSV[:10])
        answer = httpx2.post(f"{server}/v1/upload", content=CSV, headers=headers)
        problem(answer, 409, "idempotency-in-progress")
        assert answer.headers["retry-after"] == "1"
        slow.sendall(CSV[10:])
        reply = b""
        while block := slow.recv(65536):
            reply += block
    head, _, body = reply.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 201")
    job = orjson.loads(body)
    again = ok(httpx2.post(f"{server}/v1/upload", content=CSV, headers=headers), 201)
    assert again["id"] == job["id"]


@pytest.mark.parametrize(
    ("method", "path", "known"),
    [
        (
            "GET",
            "/v1/jobs?stat=failed",
            "after, finished_since, finished_until, limit, model, order, q, since, sort, state",
        ),
        ("HEAD", "/v1/jobs?stat=failed", ""),
        ("GET", "/v1/models?stat=failed", "after, limit, q"),
        ("POST", "/v1/upload?stat=failed", "columns, decimal, delimiter, encoding, filename, inputs, model, sheet"),
        ("GET", "/v1/jobs/{job}?stat=failed", "wait"),
        ("GET", "/v1/jobs/{job}/events?stat=failed", "none"),
        ("GET", "/v1/download/{job}?stat=failed", "csv_escape, format, partial, redirect, wait"),
        ("GET", "/v1/download/{job}/input?stat=failed", "redirect"),
        ("POST", "/v1/jobs/{job}/cancel?stat=failed", "none"),
        ("POST", "/v1/jobs/{job}/retry?stat=failed", "none"),
        ("DELETE", "/v1/jobs/{job}?stat=failed", "none"),
    ],
)
def test_an_unknown_query_parameter_is_refused_with_those_that_exist(
    api: Api, method: str, path: str, known: str
) -> None:
    job = api.upload(CSV)["id"]
    answer = api.http.request(method, path.format(job=job))
    assert answer.status_code == 422
    assert api.job(job)["state"] == "uploaded"
    if known:
        fault = problem(answer, 422, "invalid-options")["errors"][0]
        assert fault["parameter"] == "stat"
        assert fault["value"] == "'failed'"
        assert known in fault["message"]


def test_the_job_is_the_same_json_everywhere(api: Api) -> None:
    job = api.upload(json.dumps([{"a": 1}]))
    listed = ok(api.http.get("/v1/jobs", params={"q": job["id"]}))["jobs"]
    assert listed == [job]


# --- bytes and their row ---------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("path", ["/v1/upload", "/v1/predict?model=iris"])
def test_a_request_that_is_cancelled_at_its_commit_leaves_no_job_without_bytes(
    tmp_path: Path, iris_onnx: Path, path: str
) -> None:
    """Its thread continues: a moment later the job exists, and its input must exist, too."""
    app = create_app(Settings(storage=str(tmp_path), free_bytes=0, inline_bytes=0), worker=False)
    model, inputs = iris_onnx.read_bytes(), tmp_path / "inputs"

    async def cancel_at_the_commit(client: httpx2.AsyncClient) -> None:
        ok(await client.put("/v1/models/iris", content=model), 201)
        with closing(sqlite3.connect(tmp_path / "batchserve.db")) as other:
            other.isolation_level = None
            other.execute("BEGIN IMMEDIATE")  # the commit of the request has to wait
            request = asyncio.create_task(client.post(path, content=CSV))
            await asyncio.sleep(1.5)
            assert len(list(inputs.iterdir())) == 1  # it is stored, but has no row yet
            request.cancel()
            with pytest.raises(asyncio.CancelledError):
                await request
            other.execute("ROLLBACK")

    async def run() -> list[dict[str, Any]]:
        transport = httpx2.ASGITransport(app)
        async with (
            app.router.lifespan_context(app),
            httpx2.AsyncClient(transport=transport, base_url="http://localhost") as client,
        ):
            await cancel_at_the_commit(client)
            await asyncio.sleep(1.0)
            jobs: list[dict[str, Any]] = ok(await client.get("/v1/jobs"))["jobs"]
            for job in jobs:
                assert (await client.get(job["links"]["input"])).content == CSV
            return jobs

    assert len(asyncio.run(run())) == 1


@pytest.mark.sqlite
@pytest.mark.parametrize("path", ["/v1/upload", "/v1/predict?model=iris"])
def test_an_upload_whose_row_cannot_be_written_leaves_nothing(
    tmp_path: Path, iris_onnx: Path, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connect, "BUSY_TIMEOUT_MS", 50)
    with running(tmp_path, worker=False) as api:
        api.register("iris", iris_onnx)
        before = api.stored()
        with closing(sqlite3.connect(tmp_path / "batchserve.db")) as other:
            other.isolation_level = None
            other.execute("BEGIN IMMEDIATE")
            answer = api.http.post(path, content=CSV)
            problem(answer, 503, "unavailable")
            assert answer.headers["retry-after"] == "1"
            other.execute("ROLLBACK")
        assert api.stored() == before
        ok(api.http.post(path, content=CSV), 201 if "upload" in path else 202)
