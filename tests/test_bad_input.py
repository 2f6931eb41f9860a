"""Malformed input is refused with its place, the expected and the received value; and the server continues."""

import asyncio
import json
import os
import random
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx2
import polars as pl
import pytest
from conftest import serving
from selection import quick_first
from service import Api, decoded, encoded, ok, problem
from starlette.requests import Request
from starlette.types import Message
from waiting import until

from batchserve.api import bodies
from batchserve.errors import RequestTimeout
from batchserve.settings import Settings

HEADER = "sepal length (cm),sepal width (cm),petal length (cm),petal width (cm)\n"
ROW = "5.1,3.5,1.4,0.2\n"
OUTPUTS = ["prediction", "probability_setosa", "probability_versicolor", "probability_virginica"]


@pytest.fixture(autouse=True)
def goes_on(request: pytest.FixtureRequest) -> Iterator[None]:
    """Asserts that the server is alive, and that the next job works."""
    yield
    if "api" in request.fixturenames:
        api: Api = request.getfixturevalue("api")
        ok(api.http.get("/livez"))
        assert api.run(HEADER + ROW, "iris")["rows"] == {"total": 1, "ok": 1, "failed": 0}


def refused(api: Api, body: bytes | str, status: int, code: str, model: str = "iris", **headers: str) -> dict[str, Any]:
    """The problem of a body that is refused in one call and in two, and leaves nothing."""
    with api.unchanged():
        answer = api.http.post("/v1/predict", params={"model": model}, content=body, headers=headers)
        return problem(answer, status, code)


def failures(api: Api, job: dict[str, Any]) -> list[tuple[int, str | None, str]]:
    return [(error["record"], error["column"], error["code"]) for error in api.errors(job)]


def predictions(api: Api, job: dict[str, Any]) -> list[str | None]:
    return decoded(api.result(job).content, "csv")["prediction"].to_list()


# --- empty inputs ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "media_type", ["text/csv", "application/json", "application/x-npy", "application/octet-stream"]
)
def test_an_empty_body_is_refused(api: Api, media_type: str) -> None:
    with api.unchanged():
        for path in ("/v1/upload", "/v1/predict?model=iris"):
            answer = api.http.post(path, content=b"", headers={"content-type": media_type})
            assert "empty" in problem(answer, 422, "invalid-input")["detail"]


def test_a_body_of_blank_lines_has_no_header(api: Api) -> None:
    refused(api, "\n\n  \n", 422, "invalid-input")


@pytest.mark.parametrize("header", [HEADER, HEADER.strip(), "\ufeff" + HEADER, HEADER.replace("\n", "\r\n")])
def test_a_header_alone_is_a_job_of_no_rows(api: Api, header: str) -> None:
    job = api.run(header, "iris")
    assert (job["state"], job["rows"], job["progress"]) == ("completed", {"total": 0, "ok": 0, "failed": 0}, 1.0)
    assert (job["result"]["rows"], api.result(job).text) == (0, ",".join(OUTPUTS) + "\n")
    assert api.errors(job) == []


@pytest.mark.parametrize("format", ["csv", "jsonl", "json", "parquet", "arrow", "arrows"])
def test_a_result_of_no_rows_comes_in_every_format(api: Api, format: str) -> None:
    direct = api.run(HEADER, "iris", format=format)
    assert (direct["state"], direct["result"]["rows"]) == ("completed", 0)
    converted = api.result(api.run(HEADER, "iris"), format=format)
    for content in (api.result(direct).content, converted.content):
        if format == "jsonl":
            assert content == b""
        elif format == "json":
            assert json.loads(content) == []
        else:
            assert (decoded(content, format).columns, decoded(content, format).height) == (OUTPUTS, 0)


@pytest.mark.parametrize("format", ["parquet", "arrow", "arrows", "npy", "npz"])
def test_a_typed_file_of_no_records_is_a_job_of_no_rows(api: Api, flowers: pl.DataFrame, format: str) -> None:
    wanted = "jsonl" if format == "npy" else format  # npy holds no labels
    job = api.run(encoded(flowers.drop("flower")[:0], format), "iris", format=wanted)
    assert (job["state"], job["rows"]) == ("completed", {"total": 0, "ok": 0, "failed": 0}), job["error"]


@pytest.mark.parametrize("body", ["[]", '{"data": []}', " [ ] "])
def test_a_list_of_no_records_has_no_columns_to_check(api: Api, body: str) -> None:
    assert "no records" in refused(api, body, 422, "invalid-input")["detail"]


# --- columns ---------------------------------------------------------------------------------------------------------


def test_missing_columns_are_named(api: Api) -> None:
    body = refused(api, "sepal length (cm),Petal Width\n1,2\n", 422, "schema-mismatch")
    names = {"sepal width (cm)", "petal length (cm)", "petal width (cm)"}
    assert {error["column"] for error in body["errors"]} == names
    assert all(error["expected"] == "float32" for error in body["errors"])
    assert all(repr(name) in body["detail"] for name in names)


def test_a_duplicate_column_is_named_with_its_positions(api: Api) -> None:
    body = refused(api, HEADER.replace("sepal width", "sepal length") + ROW, 422, "invalid-input")
    assert "'sepal length (cm)' in columns 1, 2" in body["detail"]
    assert body["errors"][0]["column"] == "sepal length (cm)"


def test_a_column_without_a_name_between_others_is_refused_with_its_position(api: Api) -> None:
    body = refused(api, "id,," + HEADER + "0,1," + ROW, 422, "invalid-input")
    assert "no name for column 2" in body["detail"]


def test_an_index_without_a_name_passes_through_under_the_name_that_pandas_gives_it(api: Api) -> None:
    result = api.result(api.run("," + HEADER + "7," + ROW, "iris")).text.splitlines()
    assert result[0].startswith("Unnamed: 0,prediction,")
    assert result[1].startswith("7,setosa,")


def test_blanks_around_the_names_of_a_header_do_not_count(api: Api) -> None:
    body = HEADER.replace(",", " , ") + ROW.replace(",", ", ")
    assert api.result(api.run(body, "iris")).text.splitlines()[1].startswith("setosa,")


def test_columns_that_the_model_does_not_take_pass_through(api: Api) -> None:
    body = f"id,{HEADER.strip()},note\n7,{ROW.strip()},hello\n"
    assert api.result(api.run(body, "iris")).text.splitlines()[1].startswith("7,hello,setosa,")


# --- values ----------------------------------------------------------------------------------------------------------


def test_a_column_of_a_wrong_type_is_refused_with_an_example(api: Api) -> None:
    body = refused(api, HEADER + "wide,3.5,1.4,0.2\nwider,3.5,1.4,0.2\n", 422, "schema-mismatch")
    (error,) = body["errors"]
    assert (error["column"], error["expected"], error["row"]) == ("sepal length (cm)", "float32", 0)
    assert "'wide'" in error["value"]
    assert "'sepal length (cm)': expected float32, got 'wide' in record 0" in body["detail"]


def test_a_column_of_a_typed_file_is_refused_by_its_type(api: Api, flowers: pl.DataFrame) -> None:
    dates = flowers.with_columns(pl.lit("2026-11-20").str.to_date().alias("petal width (cm)"))
    body = refused(api, encoded(dates, "parquet"), 422, "schema-mismatch")
    assert [error["column"] for error in body["errors"]] == ["petal width (cm)"]


def test_a_wrong_type_further_down_fails_its_record_alone(api: Api) -> None:
    job = api.run(HEADER + ROW * 333 + "5.1,3.5,wide,0.2\n" + ROW * 3, "iris")
    assert (job["state"], job["rows"]) == ("completed", {"total": 337, "ok": 336, "failed": 1})
    assert failures(api, job) == [(333, "petal length (cm)", "wrong-type")]
    assert api.errors(job)[0]["message"] == "expected float32, got 'wide'"
    assert predictions(api, job) == ["setosa"] * 333 + [None] + ["setosa"] * 3


def test_a_missing_number_or_nan_gets_no_label(api: Api) -> None:
    job = api.run(HEADER + ROW + "nan,3.5,1.4,0.2\n5.1,,1.4,0.2\n5.1,3.5,NaN,0.2\n" + ROW, "iris")
    assert predictions(api, job) == ["setosa", None, None, None, "setosa"]
    assert failures(api, job) == [
        (1, "sepal length (cm)", "missing-value"),
        (2, "sepal width (cm)", "missing-value"),
        (3, "petal length (cm)", "missing-value"),
    ]


@pytest.mark.parametrize("value", ["inf", "-inf"])
def test_an_infinite_number_gets_no_meaningless_label(api: Api, value: str) -> None:
    job = api.run(HEADER + ROW + f"{value},3.5,1.4,0.2\n" + ROW, "iris")
    assert (job["state"], job["rows"]) == ("completed", {"total": 3, "ok": 2, "failed": 1})
    assert predictions(api, job) == ["setosa", None, "setosa"]
    ((record, _, code),) = failures(api, job)
    assert (record, code) == (1, "out-of-range")
    online = ok(api.http.post("/v1/models/iris/predict", content=HEADER + f"{value},3.5,1.4,0.2\n"))
    assert online["prediction"][0]["prediction"] is None
    assert online["errors"][0]["code"] == code


def test_nan_is_not_json(api: Api) -> None:
    row = '{"sepal length (cm)": NaN, "sepal width (cm)": 1, "petal length (cm)": 1, "petal width (cm)": 1}'
    body = refused(api, f"[{row}]", 422, "invalid-input")
    assert "character 22" in body["detail"]


# --- the bytes of text -----------------------------------------------------------------------------------------------


def test_a_line_of_ten_megabytes_is_one_record(api: Api) -> None:
    note = "x" * 10_000_000
    body = f"note,{HEADER}short,{ROW}{note},{ROW}short,{ROW}"
    job = api.run(body, "iris")
    assert (job["state"], job["rows"]["ok"]) == ("completed", 3)
    assert [len(line.partition(",")[0]) for line in api.result(job).text.splitlines()[1:]] == [5, 10_000_000, 5]


def test_a_number_of_ten_megabytes_is_not_a_number(api: Api) -> None:
    job = api.run(HEADER + ROW + "5" * 10_000_000 + ",3.5,1.4,0.2\n", "iris")
    assert (job["state"], job["rows"]["failed"]) == ("completed", 1)
    assert len(api.http.get(job["links"]["errors"]).content) < 1000


def test_a_line_that_never_ends_is_refused_with_its_record_and_line(api: Api) -> None:
    job = api.run(HEADER + ROW * 150 + '"' + "x" * (66 << 20), "iris")
    assert (job["state"], job["error"]["code"]) == ("failed", "invalid-input")
    assert "record 150, which begins in line 152 at byte 2470, is longer than 64 MiB" in job["error"]["message"]


def test_a_header_of_ten_megabytes_is_refused(api: Api) -> None:
    assert "header line" in refused(api, "a" * 10_000_000 + "\n1\n", 422, "invalid-input")["detail"]


@pytest.mark.parametrize("seed", range(3))
def test_binary_noise_is_not_csv(api: Api, seed: int) -> None:
    noise = random.Random(seed).randbytes(20_000)
    with api.unchanged():
        answer = api.http.post("/v1/predict?model=iris", content=noise, headers={"content-type": "text/csv"})
        problem(answer, 415, "unsupported-media-type")
        answer = api.http.post("/v1/predict?model=iris", content=noise.replace(b"\0", b"\1"))
        detail = problem(answer, 422, "invalid-input")["detail"]
        assert "is not UTF-8" in detail


def test_noise_after_a_good_header_fails_record_by_record(api: Api) -> None:
    noise = random.Random(7).randbytes(20_000).translate(bytes.maketrans(b'\0\r"', b"\1\1'"))
    job = api.run((HEADER + ROW + "é\n").encode() + noise + b"\n" + ROW.encode(), "iris")
    assert job["state"] == "completed"
    assert job["rows"]["ok"] + job["rows"]["failed"] == job["rows"]["total"] > 10
    found = predictions(api, job)
    assert len(found) == job["rows"]["total"]
    assert (found[0], found[-1]) == ("setosa", "setosa")


def test_a_record_that_is_not_utf_8_fails_alone(api: Api) -> None:
    body = (
        f"name,{HEADER}".encode() + b"Bern,5.1,3.5,1.4,0.2\nZ\xfcrich,5.1,3.5,1.4,0.2\nGen\xc3\xa8ve,5.1,3.5,1.4,0.2\n"
    )
    job = api.run(body, "iris")
    assert job["rows"] == {"total": 3, "ok": 2, "failed": 1}
    assert failures(api, job) == [(1, None, "invalid-utf8")]
    assert "byte 1 of the record (0xfc)" in api.errors(job)[0]["message"]
    assert decoded(api.result(job).content, "csv")["name"].to_list() == ["Bern", None, "Genève"]


def test_ragged_rows_fail_alone(api: Api) -> None:
    job = api.run(HEADER + ROW + "1,2,3\n1,2,3,4,5\n" + ROW + "\n" + ROW, "iris")
    assert predictions(api, job) == ["setosa", None, None, "setosa", "setosa"]
    assert [(error["record"], error["message"]) for error in api.errors(job)] == [
        (1, "expected 4 fields, got 3"),
        (2, "expected 4 fields, got 5"),
    ]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('[{"text": "a", "text": "b"}]', "'text' appears more than once"),
        ('[{"text": "a"}] x', "after the array, which ends at byte 14"),
        ('[{"text": ' + "[" * 10_000 + "]" * 10_000 + "}]", "depth"),
        ('[{"text": "a"}, ', "JSON"),
        ('[{"text": "a"}', "JSON"),
        ("[1, 2]", "object"),
        ('{"data": 5', "malformed JSON"),
    ],
)
def test_malformed_json_is_refused_with_the_place(api: Api, text: str, said: str) -> None:
    answer = api.http.post("/v1/predict?model=reviews", content=text, headers={"content-type": "application/json"})
    assert said in problem(answer, 422, "invalid-input")["detail"]


@pytest.mark.parametrize("wrap", ["lines", "array"])
def test_a_malformed_record_further_down_fails_alone(api: Api, wrap: str) -> None:
    records = ['{"text": "good film"}'] * 150 + ['{"text": nope}', '{"text": ["a"]}', '{"text": "good film"}']
    body = "\n".join(records) if wrap == "lines" else f"[{','.join(records)}]"
    job = api.run(body, "reviews")
    assert (job["state"], job["rows"]) == ("completed", {"total": 153, "ok": 151, "failed": 2})
    assert failures(api, job) == [(150, None, "invalid-json"), (151, "text", "wrong-type")]


# --- the bytes of typed files ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [0.3, 0.7, 0.99])
@pytest.mark.parametrize("format", ["parquet", "arrow", "arrows", "npy", "npz"])
def test_a_file_that_is_cut_off_is_refused(api: Api, flowers: pl.DataFrame, format: str, keep: float) -> None:
    whole = encoded(flowers.drop("flower"), format)
    detail = refused(api, whole[: int(len(whole) * keep)], 422, "invalid-input")["detail"]
    assert "cut off" in detail


@pytest.mark.parametrize("format", ["parquet", "arrow", "arrows", "npz"])
@pytest.mark.parametrize("files", quick_first([3, 12], 1))
def test_a_file_with_damaged_bytes_ends_the_job_or_is_refused_but_never_the_server(
    api: Api, flowers: pl.DataFrame, format: str, files: int
) -> None:
    whole = encoded(pl.concat([flowers.drop("flower")] * 20), format)
    rng = random.Random(1)
    for _ in range(files):
        damaged = bytearray(whole)
        for _ in range(8):
            damaged[rng.randrange(8, len(damaged))] = rng.randrange(256)
        query = {"model": "iris", "reuse": "false"}
        answer = api.http.post("/v1/predict", params=query, content=bytes(damaged), headers={"prefer": "wait=30"})
        if answer.status_code == 200:
            job = answer.json()
            assert job["state"] in ("completed", "failed"), job
            assert job["state"] == "completed" or job["error"]["code"] != "internal-error", job["error"]
        else:
            assert answer.status_code in (415, 422), answer.text
            assert answer.headers["content-type"] == "application/problem+json"


@pytest.mark.parametrize(
    ("media_type", "said"),
    [("application/vnd.apache.parquet", "csv"), ("application/x-npy", "csv"), ("application/json", "csv"),
     ("application/pdf", "application/pdf"), ("video/mp4", "video/mp4")],
)  # fmt: skip
def test_a_wrong_content_type_is_named(api: Api, media_type: str, said: str) -> None:
    body = refused(api, HEADER + ROW, 415, "unsupported-media-type", **{"content-type": media_type})
    assert said in body["detail"]
    assert "text/csv" in body["detail"]


# --- requests at the wrong time --------------------------------------------------------------------------------------


def test_a_repeated_predict_and_an_early_download(api: Api, idle_api: Api) -> None:
    job = idle_api.upload(HEADER + ROW)
    url = f"/v1/predict/{job['id']}?model=iris"
    assert ok(idle_api.http.post(url), 202) == ok(idle_api.http.post(url), 202)
    early = idle_api.http.get(f"/v1/download/{job['id']}")
    assert problem(early, 404, "result-not-ready")["state"] == "queued"
    assert early.headers["retry-after"]
    problem(api.http.get(f"/v1/download/{job['id']}"), 404, "job-not-found")


# --- the wire --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def impatient(tmp_path_factory: pytest.TempPathFactory, iris_onnx: Path) -> Iterator[tuple[str, Path]]:
    """A server process that aborts bodies which stall for a second, and its storage."""
    folder = tmp_path_factory.mktemp("impatient")
    settings = {"BODY_IDLE": "1.0", "UPLOAD_BYTES": "1000000", "CHUNK_RECORDS": "1000"}
    with serving(folder, **{f"BATCHSERVE_{name}": value for name, value in settings.items()}) as url:
        assert httpx2.put(f"{url}/v1/models/iris", content=iris_onnx.read_bytes()).is_success
        yield url, folder / "storage"


@contextmanager
def connected(url: str) -> Iterator[socket.socket]:
    """A connection with hand-written requests; afterwards the server still works and has stored nothing."""
    address = urlsplit(url)
    with socket.create_connection((address.hostname, address.port), 20) as connection:
        yield connection
    assert httpx2.get(f"{url}/livez").is_success


def nothing_kept(storage: Path) -> bool:
    """Whether no input is left in the end: the bytes of a disconnected client are removed in the background."""
    deadline = time.monotonic() + 20
    while any(path.is_file() for path in storage.glob("inputs/*")):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def answered(connection: socket.socket) -> bytes:
    reply = b""
    while block := connection.recv(65536):
        reply += block
    return reply


def head(*lines: str) -> bytes:
    return "\r\n".join(("POST /v1/upload HTTP/1.1", "host: localhost", "connection: close", *lines, "", "")).encode()


@pytest.mark.slow
def test_a_body_shorter_than_announced_never_becomes_an_input(impatient: tuple[str, Path]) -> None:
    url, storage = impatient
    body = (HEADER + ROW).encode()
    with connected(url) as connection:
        connection.sendall(head(f"content-length: {len(body) + 10}") + body)
    assert nothing_kept(storage)
    assert ok(httpx2.get(f"{url}/v1/jobs"))["jobs"] == []


@pytest.mark.parametrize("path", ["/v1/upload", "/v1/predict?model=iris", "/v1/models/iris/predict", "/v1/models/new"])
def test_a_body_of_another_length_than_announced_is_refused_with_both_lengths(api: Api, path: str) -> None:
    body = (HEADER + ROW).encode()
    method = "PUT" if path.endswith("/new") else "POST"
    with api.unchanged():
        answer = api.http.request(method, path, content=body, headers={"content-length": str(len(body) + 10)})
        detail = problem(answer, 400, "truncated-body")["detail"]
        assert f"after {len(body)} bytes, {len(body) + 10} were announced" in detail


def test_a_client_that_leaves_in_the_middle_of_a_chunked_body_leaves_nothing(impatient: tuple[str, Path]) -> None:
    url, storage = impatient
    with connected(url) as connection:
        connection.sendall(head("transfer-encoding: chunked") + b"400\r\n" + b"a" * 0x400 + b"\r\n")
    assert nothing_kept(storage)
    assert ok(httpx2.get(f"{url}/v1/jobs"))["jobs"] == []


def test_a_body_that_stalls_is_aborted(impatient: tuple[str, Path]) -> None:
    url, storage = impatient
    with connected(url) as connection:
        began = time.monotonic()
        connection.sendall(head("content-length: 100000") + HEADER.encode())
        reply = answered(connection)
        assert 0.9 < time.monotonic() - began < 12  # without the setting it would be 15
    assert reply.startswith(b"HTTP/1.1 408")
    assert b'"code":"request-timeout"' in reply
    assert f"after {len(HEADER)} bytes".encode() in reply
    assert nothing_kept(storage)


def test_a_slow_body_that_never_stalls_is_accepted(impatient: tuple[str, Path]) -> None:
    url, _ = impatient
    body = (HEADER + ROW * 4).encode()
    with connected(url) as connection:
        connection.sendall(head(f"content-length: {len(body)}"))
        for start in range(0, len(body), 25):
            connection.sendall(body[start : start + 25])
            time.sleep(0.15)
        reply = answered(connection)
    assert reply.startswith(b"HTTP/1.1 201")
    job = json.loads(reply.partition(b"\r\n\r\n")[2])
    assert httpx2.delete(url + job["links"]["self"]).status_code == 204


@pytest.mark.slow
def test_a_body_that_trickles_is_aborted_after_its_first_minute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bodies, "RATE_AFTER", 0.5)

    left = 0

    async def read(rate: int) -> int:
        """Sends a body of 20 bytes in two seconds."""
        nonlocal left
        left = 20

        async def receive() -> Message:
            nonlocal left
            await asyncio.sleep(0.1)
            left -= 1
            return {"type": "http.request", "body": b"x", "more_body": left > 0}

        request = Request({"type": "http", "method": "POST", "headers": []}, receive)
        return len(await bodies.Body(request, Settings(storage=str(tmp_path), body_rate=rate), 1000).read())

    assert asyncio.run(read(rate=5)) == 20
    with pytest.raises(RequestTimeout, match=r"\d bytes in \d s, expected 50 bytes/s"):
        asyncio.run(read(rate=50))
    assert left > 0


def test_a_body_that_is_too_long_is_refused_before_it_is_sent(impatient: tuple[str, Path]) -> None:
    url, storage = impatient
    with connected(url) as connection:
        connection.sendall(head("content-length: 1000001", "expect: 100-continue"))
        reply = answered(connection)
    assert reply.startswith(b"HTTP/1.1 413")
    assert b"100 Continue" not in reply
    assert b"1000001 bytes" in reply
    assert nothing_kept(storage)


def test_a_client_that_expects_100_continue_gets_it(impatient: tuple[str, Path]) -> None:
    url, _ = impatient
    body = (HEADER + ROW).encode()
    with connected(url) as connection:
        connection.sendall(head(f"content-length: {len(body)}", "expect: 100-continue"))
        assert connection.recv(1000).startswith(b"HTTP/1.1 100 Continue")
        connection.sendall(body)
        assert b"HTTP/1.1 201" in answered(connection)


@pytest.mark.parametrize("lines", [["content-length: x"], ["content-length: -1"], ["content-length: 5", "bad header"]])
def test_a_malformed_request_is_refused_by_the_protocol(impatient: tuple[str, Path], lines: list[str]) -> None:
    url, storage = impatient
    with connected(url) as connection:
        connection.sendall(head(*lines) + b"a\n1\n2")
        assert answered(connection).startswith(b"HTTP/1.1 400")
    assert all(path.stat().st_size > 5 for path in storage.glob("inputs/*"))


def test_a_client_that_leaves_in_the_middle_of_a_conversion_leaves_nothing(
    impatient: tuple[str, Path], flowers: pl.DataFrame
) -> None:
    url, storage = impatient
    body = encoded(pl.concat([flowers] * 200), "csv")[:900_000]
    query = {"model": "iris", "passthrough": "all"}
    answer = httpx2.post(f"{url}/v1/predict", params=query, content=body, headers={"prefer": "wait=30"}, timeout=40)
    job = ok(answer)
    assert job["rows"]["ok"] == 30_000
    path = job["links"]["result"]
    for _ in range(3):
        with connected(url) as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)  # otherwise the kernel buffers all of it
            connection.sendall(f"GET {path}?format=json HTTP/1.1\r\nhost: localhost\r\n\r\n".encode())
            assert connection.recv(100).startswith(b"HTTP/1.1 200")
    # Unlike Path.glob, os.walk passes over a folder that the server removes meanwhile.
    until(lambda: not any(files for _, _, files in os.walk(storage / "conversions")), seconds=5)
    assert httpx2.get(f"{url}{path}?format=json", timeout=30).json()[0]["prediction"] == "setosa"
