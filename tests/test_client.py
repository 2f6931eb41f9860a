"""The Python client. A transport simulates faults of the network; all other tests use a real server."""

import asyncio
import hashlib
import io
import json
import time
import zipfile
from collections.abc import AsyncIterator, Callable, Iterator
from datetime import UTC, datetime, timedelta
from email.utils import formatdate
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pandas as pd
import polars as pl
import pytest
from commands import in_this_process
from sklearn.linear_model import LogisticRegression

from batchserve import AsyncClient, Client
from batchserve.client import (
    APIError,
    AuthenticationFailed,
    ConnectionFailed,
    Job,
    JobCancelled,
    JobFailed,
    WaitTimeout,
)
from batchserve.client.data import content_of, format_of
from batchserve.client.options import JobOptions
from batchserve.client.transport import BLOCK, Content, pause_before, seconds_to_wait
from batchserve.conversion import convert
from batchserve.errors import (
    BadRequest,
    BatchserveError,
    DigestMismatch,
    IdempotencyInProgress,
    IdempotencyMismatch,
    InvalidInput,
    InvalidOptions,
    JobNotFound,
    ModelNotFound,
    SchemaMismatch,
)

JOB = {"id": "j1", "state": "queued", "progress": 0.0, "rows": {"total": None, "ok": 0, "failed": 0}}
Handler = Callable[[httpx2.Request], httpx2.Response]


@pytest.fixture
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Makes the pauses before retries take no time; returns them."""
    pauses: list[float] = []
    monkeypatch.setattr("batchserve.client.transport.time.sleep", pauses.append)
    return pauses


def client_of(handler: Handler, **arguments: Any) -> Client:
    return Client("http://server", transport=httpx2.MockTransport(handler), **arguments)


def in_turn(*answers: httpx2.Response | Exception) -> tuple[Handler, list[httpx2.Request]]:
    """A server that sends these responses in turn, and the requests that it received, with their bodies read."""
    requests: list[httpx2.Request] = []
    following = iter(answers)

    def handle(request: httpx2.Request) -> httpx2.Response:
        request.read()
        requests.append(request)
        answer = next(following)
        if isinstance(answer, Exception):
            raise answer
        return answer

    return handle, requests


def problem(status: int, code: str, detail: str, **extra: Any) -> httpx2.Response:
    body = {"type": f"/problems/{code}", "code": code, "title": code, "status": status, "detail": detail, **extra}
    return httpx2.Response(status, json=body, headers={"Content-Type": "application/problem+json"})


def job_answer(**changes: Any) -> httpx2.Response:
    return httpx2.Response(202, json=JOB | changes)


# Retries


@pytest.mark.parametrize(
    "failure",
    [
        httpx2.ConnectError("refused"),
        httpx2.ReadTimeout("slow"),
        httpx2.RemoteProtocolError("cut"),
        problem(408, "request-timeout", "slow"),
        problem(409, "idempotency-in-progress", "the first one still runs"),
        problem(429, "too-many-requests", "slower"),
        problem(500, "internal-error", "oops"),
        httpx2.Response(502, text="<html>"),
        problem(503, "unavailable", "later"),
    ],
    ids=lambda failure: str(getattr(failure, "status_code", type(failure).__name__)),
)
def test_what_may_succeed_later_is_sent_again_with_the_same_key_and_body(
    failure: httpx2.Response | Exception, no_pauses: list[float]
) -> None:
    handler, requests = in_turn(failure, job_answer())
    with client_of(handler) as client:
        job = client.submit(b"a,b\n1,2\n", model="iris")
    first, second = requests
    assert job.id == "j1"
    assert first.headers["Idempotency-Key"] == second.headers["Idempotency-Key"] != ""
    assert first.content == second.content == b"a,b\n1,2\n"
    assert len(no_pauses) == 1


BEGUN = {
    "part_bytes": 4,
    "urls": ["http://store/a?signed", "http://store/b?signed"],
    "links": {"self": "/v1/uploads/j1", "complete": "/v1/uploads/j1/complete"},
}


def test_a_direct_upload_is_sent_in_parts_without_the_key_and_each_until_it_is_taken(no_pauses: list[float]) -> None:
    handler, requests = in_turn(
        httpx2.Response(201, json=BEGUN), httpx2.Response(200), httpx2.ConnectError("refused"),
        httpx2.Response(503), httpx2.Response(200), job_answer(state="uploaded"),
    )  # fmt: skip
    heard: list[tuple[int, int | None]] = []
    with client_of(handler, api_key="bs_secret") as client:
        job = client.upload(b"a\n1\n2\n", direct=True, on_upload=lambda done, total: heard.append((done, total)))
    assert job.state == "uploaded"
    assert [(request.method, request.url.host, request.url.path) for request in requests] == [
        ("POST", "server", "/v1/uploads"), ("PUT", "store", "/a"), *[("PUT", "store", "/b")] * 3,
        ("POST", "server", "/v1/uploads/j1/complete"),
    ]  # fmt: skip
    assert json.loads(requests[0].content) == {"bytes": 6}
    assert [request.content for request in requests[1:5]] == [b"a\n1\n", *[b"2\n"] * 3]
    assert "authorization" in requests[0].headers
    assert not any("authorization" in request.headers for request in requests[1:5])
    assert json.loads(requests[5].content) == {"sha256": hashlib.sha256(b"a\n1\n2\n").hexdigest()}
    assert (heard[0], heard[-1]) == ((4, 6), (6, 6))
    assert len(no_pauses) == 2


def test_a_direct_upload_that_the_store_refuses_is_given_up() -> None:
    denied = httpx2.Response(403, text="<Error><Code>AccessDenied</Code></Error>")
    handler, requests = in_turn(httpx2.Response(201, json=BEGUN), denied, httpx2.Response(204))
    with (
        client_of(handler) as client,
        pytest.raises(APIError, match="store refuses the bytes: AccessDenied"),
    ):
        client.upload(b"a\n1\n2\n", direct=True)
    assert (requests[-1].method, requests[-1].url.path) == ("DELETE", "/v1/uploads/j1")


def test_two_calls_have_two_keys() -> None:
    handler, requests = in_turn(job_answer(), job_answer())
    with client_of(handler) as client:
        client.submit(b"a\n1\n", model="iris")
        client.submit(b"a\n1\n", model="iris")
    assert requests[0].headers["Idempotency-Key"] != requests[1].headers["Idempotency-Key"]


@pytest.mark.parametrize("key", ["", "nächtlich", "a\nb", "a\0b", " padded ", "x" * 256])
def test_a_key_that_no_header_can_have_is_refused_before_anything_is_sent(key: str) -> None:
    handler, requests = in_turn(job_answer())
    with client_of(handler) as client, pytest.raises(BadRequest, match="1 to 255 printable ASCII characters"):
        client.submit(b"a\n1\n", model="iris", idempotency_key=key)
    assert requests == []


def test_a_call_may_bring_a_key_of_its_own() -> None:
    handler, requests = in_turn(*[job_answer() for _ in range(4)])
    with client_of(handler) as client:
        uploaded = client.submit(b"a\n1\n", model="iris", idempotency_key="night-7")
        client.submit(uploaded, model="iris", idempotency_key="night-7")
        client.submit_urls("file:///in/a.csv", "iris", idempotency_key="night-7")
        client.submit_query("TABLE a", "iris", connection="warehouse", idempotency_key="night-7")
        with pytest.raises(ValueError, match="a direct upload takes no idempotency_key"):
            client.submit(b"a\n1\n", model="iris", direct=True, idempotency_key="night-7")
    assert [request.headers["Idempotency-Key"] for request in requests] == ["night-7"] * 4
    assert all(b"night-7" not in request.content and "night-7" not in str(request.url) for request in requests)


@pytest.mark.parametrize(
    "refusal",
    [
        problem(404, "model-not-found", "no model iris"),
        problem(409, "job-conflict", "other options"),
        problem(422, "schema-mismatch", "no column a"),
        problem(507, "insufficient-storage", "disk full"),
    ],
    ids=lambda refusal: str(refusal.status_code),
)
def test_a_refusal_is_not_repeated(refusal: httpx2.Response, no_pauses: list[float]) -> None:
    handler, requests = in_turn(refusal)
    with client_of(handler) as client, pytest.raises(BatchserveError, match=refusal.json()["detail"]):
        client.submit(b"a\n1\n", model="iris")
    assert len(requests) == 1
    assert no_pauses == []


def test_the_last_error_is_raised_when_all_retries_failed(no_pauses: list[float]) -> None:
    handler, requests = in_turn(*[problem(409, "idempotency-in-progress", "still running") for _ in range(4)])
    with client_of(handler, max_retries=3) as client, pytest.raises(IdempotencyInProgress):
        client.submit(b"a\n1\n", model="iris")
    assert len(requests) == 4
    assert len(no_pauses) == 3


def test_an_unreachable_server_is_named_by_its_address(no_pauses: list[float]) -> None:
    refused = httpx2.ConnectError("Connection refused")
    handler, _ = in_turn(refused, refused, refused)
    with client_of(handler) as client, pytest.raises(ConnectionFailed, match="http://server: Connection refused"):
        client.models.get("iris")
    assert len(no_pauses) == 2


def test_a_body_that_can_be_read_once_is_sent_once(no_pauses: list[float]) -> None:
    class Pipe(io.BytesIO):
        def seekable(self) -> bool:
            return False

    handler, requests = in_turn(problem(503, "unavailable", "later"))
    with client_of(handler) as client, pytest.raises(BatchserveError, match="later"):
        client.submit(Pipe(b"a\n1\n"), model="iris")
    assert len(requests) == 1
    assert requests[0].headers["Transfer-Encoding"] == "chunked"
    assert "Content-Length" not in requests[0].headers
    assert no_pauses == []


def test_retry_after_is_respected(no_pauses: list[float]) -> None:
    later = problem(503, "unavailable", "later")
    later.headers["Retry-After"] = "17"
    handler, _ = in_turn(later, job_answer())
    with client_of(handler) as client:
        client.submit(b"a\n1\n", model="iris")
    assert no_pauses == [17.0]


def test_a_retry_after_of_an_hour_raises_instead_of_waiting(no_pauses: list[float]) -> None:
    later = problem(503, "unavailable", "back at noon")
    later.headers["Retry-After"] = "3600"
    handler, _ = in_turn(later)
    with client_of(handler) as client, pytest.raises(BatchserveError, match="back at noon"):
        client.submit(b"a\n1\n", model="iris")
    assert no_pauses == []


def test_pauses_double_up_to_a_limit_and_jitter() -> None:
    for retries, longest in enumerate([0.5, 1.0, 2.0, 4.0, 8.0, 8.0]):
        pauses = {pause_before(retries, None) for _ in range(50)}
        assert all(longest / 2 <= pause <= longest for pause in pauses)
        assert len(pauses) > 1


def test_retry_after_may_be_a_date() -> None:
    seconds = seconds_to_wait(formatdate(time.time() + 30, usegmt=True))
    assert seconds is not None
    assert 28 <= seconds <= 31
    assert seconds_to_wait("soon") is None


# Errors


def test_a_problem_becomes_the_error_of_its_code_with_all_its_details() -> None:
    faults = [{"column": "petal_width", "expected": "float32", "message": "missing"}]
    handler, _ = in_turn(problem(422, "schema-mismatch", "1 column is missing", errors=faults, model="iris@1"))
    with client_of(handler) as client, pytest.raises(SchemaMismatch, match="1 column is missing") as caught:
        client.submit(b"a\n1\n", model="iris")
    assert caught.value.errors == faults
    assert caught.value.extra["model"] == "iris@1"


def test_a_response_that_is_not_a_problem_is_an_api_error_with_status_and_request_id() -> None:
    answer = httpx2.Response(418, text="<html>teapot</html>", headers={"X-Request-ID": "r-7"})
    handler, _ = in_turn(answer)
    with client_of(handler) as client, pytest.raises(APIError, match="418") as caught:
        client.jobs.get("j1")
    assert caught.value.http_status == 418
    assert caught.value.request_id == "r-7"
    assert caught.value.problem == {}


@pytest.mark.parametrize("status", [401, 403])
def test_a_refused_key_is_an_authentication_failure(status: int) -> None:
    handler, requests = in_turn(problem(status, "unauthorized", "the key is wrong"))
    with client_of(handler, api_key="bs_live_x") as client, pytest.raises(AuthenticationFailed, match="the key"):
        client.jobs.get("j1")
    assert requests[0].headers["Authorization"] == "Bearer bs_live_x"


def test_address_and_key_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BATCHSERVE_URL", "http://elsewhere:1/")
    monkeypatch.setenv("BATCHSERVE_API_KEY", "bs_live_env")
    handler, requests = in_turn(job_answer())
    with Client(transport=httpx2.MockTransport(handler)) as client:
        client.jobs.get("j1")
    assert str(requests[0].url) == "http://elsewhere:1/v1/jobs/j1"
    assert requests[0].headers["Authorization"] == "Bearer bs_live_env"


def test_a_key_may_be_in_a_file_and_end_with_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "key").write_bytes(b"bs_live_file\r\n")
    monkeypatch.setenv("BATCHSERVE_API_KEY_FILE", str(tmp_path / "key"))
    handler, requests = in_turn(job_answer())
    client_of(handler).jobs.get("j1")
    assert requests[0].headers["Authorization"] == "Bearer bs_live_file"
    monkeypatch.setenv("BATCHSERVE_API_KEY_FILE", str(tmp_path / "gone"))
    with pytest.raises(InvalidOptions, match=r"BATCHSERVE_API_KEY_FILE: .*No such file"):
        Client()


@pytest.mark.parametrize("key", ["bs_secr\u00e9t", "bs_secret bs_secret", "bs_secret\nX: y"])
def test_a_key_that_no_header_can_have_is_refused_and_not_shown(key: str) -> None:
    with pytest.raises(InvalidOptions, match="visible ones of ASCII") as refused:
        Client(api_key=key)
    assert "bs_" not in refused.value.detail


# Bodies


def test_a_file_is_sent_in_blocks_with_its_length_and_reports(tmp_path: Path) -> None:
    content = bytes(range(256)) * (5 * BLOCK // 512)
    path = tmp_path / "night.parquet"
    path.write_bytes(content)
    handler, requests = in_turn(job_answer())
    reports: list[tuple[int, int | None]] = []
    with client_of(handler) as client:
        client.submit(path, model="iris", on_upload=lambda done, total: reports.append((done, total)))
    assert requests[0].content == content
    assert requests[0].headers["Content-Length"] == str(len(content))
    assert requests[0].headers["Content-Type"] == "application/vnd.apache.parquet"
    assert reports == [(BLOCK, len(content)), (2 * BLOCK, len(content)), (len(content), len(content))]


def test_a_compressed_file_keeps_the_type_of_what_is_inside(tmp_path: Path) -> None:
    path = tmp_path / "a.csv.gz"
    path.write_bytes(b"\x1f\x8b")
    body = content_of(path)
    assert (body.media_type, body.encoding) == ("text/csv", "gzip")


def sent_frame(body: Content) -> pl.DataFrame:
    return pl.read_ipc_stream(b"".join(body.blocks()))


def test_frames_of_both_libraries_are_sent_as_equal_arrow() -> None:
    columns = {"x": [1.5, None, 3.0], "name": ["a", None, "ü"], "n": [1, 2, 3], "yes": [True, False, True]}
    from_polars, from_pandas = content_of(pl.DataFrame(columns)), content_of(pd.DataFrame(columns))
    assert from_polars.media_type == from_pandas.media_type == "application/vnd.apache.arrow.stream"
    frames = [sent_frame(body) for body in (from_polars, from_pandas)]
    assert frames[0].equals(frames[1])
    assert frames[1].to_dict(as_series=False) == columns


def test_categories_and_dates_of_pandas_survive() -> None:
    frame = pd.DataFrame(
        {"c": pd.Categorical(["u", "v", None]), "d": pd.to_datetime(pd.Series(["2026-01-01", None, "2026-01-03"]))}
    )
    sent = sent_frame(content_of(frame))
    assert sent["c"].to_list() == ["u", "v", None]
    assert sent["d"].is_null().to_list() == [False, True, False]
    assert sent["d"].dtype.is_temporal()


def test_arrays_are_sent_as_npy_and_mappings_of_arrays_as_npz() -> None:
    array = np.arange(6, dtype=np.float32).reshape(3, 2)
    one, several = content_of(array), content_of({"left": array, "right": array + 1})
    assert one.media_type == "application/x-npy"
    assert np.array_equal(np.load(io.BytesIO(b"".join(one.blocks()))), array)
    assert several.media_type == "application/x-npz"
    assert np.array_equal(np.load(io.BytesIO(b"".join(several.blocks())))["right"], array + 1)


def test_records_are_sent_as_json() -> None:
    body = content_of([{"a": 1}, {"a": None}])
    assert body.media_type == "application/json"
    assert json.loads(b"".join(body.blocks())) == [{"a": 1}, {"a": None}]


def images_in(folder: Path) -> dict[str, bytes]:
    """Image files, and other files next to them."""
    files = {"b.PNG": b"1", "a/c.jpg": b"22", "a/b/a.webp": b"", "a/notes.txt": b"4"}
    files |= {".hidden.png": b"3", "a/.trash/d.png": b"5"}
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return {name: files[name] for name in ("a/b/a.webp", "a/c.jpg", "b.PNG")}


def members_of(content: Content) -> list[tuple[str, bytes]]:
    with zipfile.ZipFile(io.BytesIO(b"".join(content.blocks()))) as archive:
        return [(name, archive.read(name)) for name in archive.namelist()]


def test_a_folder_is_sent_as_a_zip_of_its_images_in_order(tmp_path: Path) -> None:
    images = images_in(tmp_path / "photos")
    body = content_of(tmp_path / "photos")
    assert (body.media_type, body.filename) == ("application/zip", "photos.zip")
    assert members_of(body) == members_of(body) == list(images.items())
    assert b"".join(body.blocks()) == b"".join(content_of(str(tmp_path / "photos")).blocks())
    (tmp_path / "empty").mkdir()
    with pytest.raises(
        InvalidInput, match=r"there are no images in .*/empty': expected files named \*\.jpg, \*\.jpeg, "
    ):
        content_of(tmp_path / "empty")


def test_several_images_are_sent_as_a_zip_by_their_paths_below_their_common_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images_in(tmp_path / "photos")
    monkeypatch.chdir(tmp_path)
    body = content_of(["photos/b.PNG", Path("photos/a/../a/c.jpg")])
    assert (body.media_type, body.filename) == ("application/zip", None)
    assert members_of(body) == [("b.PNG", b"1"), ("a/c.jpg", b"22")]
    assert members_of(content_of(["photos/a/c.jpg"])) == [("c.jpg", b"22")]
    with pytest.raises(InvalidInput, match=r"'photos/a/notes\.txt' has no image suffix"):
        content_of(["photos/b.PNG", "photos/a/notes.txt"])
    with pytest.raises(InvalidInput, match=r"photos/b\.PNG' appears twice"):
        content_of(["photos/b.PNG", "photos/a/c.jpg", tmp_path / "photos" / "b.PNG"])


def test_a_large_folder_is_sent_in_blocks(tmp_path: Path) -> None:
    content = bytes(range(256)) * (BLOCK // 512)
    for number in range(5):
        (tmp_path / f"{number}.jpg").write_bytes(content)
    sizes = [len(block) for block in content_of(tmp_path).blocks()]
    assert len(sizes) == 3
    assert max(sizes) < 2 * BLOCK


def test_what_cannot_be_sent_is_named() -> None:
    with pytest.raises(TypeError, match="cannot send a int: expected a path"):
        content_of(7)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "format"),
    [
        ("a.csv", "csv"),
        ("a.tsv", "csv"),
        ("a.ndjson", "jsonl"),
        ("a.FEATHER", "arrow"),
        ("a.parquet", "parquet"),
        ("a", None),
        ("a.zip", None),
        ("a.jpg", None),
    ],
)
def test_a_file_name_determines_its_format(name: str, format: str | None) -> None:
    assert format_of(Path(name)) == format


# Waiting and downloads


def test_waiting_tolerates_a_restart_of_the_server(no_pauses: list[float]) -> None:
    refused = httpx2.ConnectError("refused")
    handler, _ = in_turn(job_answer(), *[refused] * 7, job_answer(state="completed", progress=1.0))
    with client_of(handler) as client:
        job = client.submit(b"a\n1\n", model="iris").wait()
    assert job.state == "completed"
    assert no_pauses


def test_waiting_ends_after_its_timeout_and_says_that_the_job_continues() -> None:
    handler = httpx2.MockTransport(lambda _: job_answer(state="running", progress=0.5))
    with Client("http://server", transport=handler) as client:
        job = client.jobs.get("j1")
        with pytest.raises(WaitTimeout, match=r"j1 is running after 0\.3 s and continues") as caught:
            job.wait(timeout=0.3)
    assert isinstance(caught.value, TimeoutError)
    assert caught.value.job.progress == 0.5


def test_waiting_for_a_job_that_fails_raises_with_the_reason_and_the_job() -> None:
    handler, _ = in_turn(
        job_answer(state="failed", error={"code": "out-of-memory", "message": "2 GiB were not enough"})
    )
    with client_of(handler) as client, pytest.raises(JobFailed, match="2 GiB were not enough") as caught:
        client.jobs.get("j1").wait()
    assert caught.value.job.id == "j1"


def test_waiting_for_a_cancelled_job_raises() -> None:
    handler, _ = in_turn(job_answer(state="cancelled"))
    with client_of(handler) as client, pytest.raises(JobCancelled, match="j1 was cancelled"):
        client.jobs.get("j1").wait()


class Breaking(httpx2.SyncByteStream):
    """A body whose connection breaks after some bytes."""

    def __init__(self, content: bytes) -> None:
        self.content = content

    def __iter__(self) -> Iterator[bytes]:
        yield self.content
        raise httpx2.ReadError("connection reset")


def test_an_interrupted_download_resumes_at_the_missing_byte(no_pauses: list[float]) -> None:
    handler, requests = in_turn(
        job_answer(state="completed"),
        httpx2.Response(200, stream=Breaking(b"a,prediction\n1"), headers={"ETag": '"e1"'}),
        httpx2.Response(206, content=b",2\n"),
    )
    with client_of(handler) as client:
        content = client.jobs.get("j1").result().read()
    assert content == b"a,prediction\n1,2\n"
    assert requests[2].headers["Range"] == "bytes=14-"
    assert requests[2].headers["If-Range"] == '"e1"'
    assert len(no_pauses) == 1


def test_a_download_that_changed_in_between_is_not_joined(no_pauses: list[float]) -> None:
    handler, _ = in_turn(
        job_answer(state="completed"),
        httpx2.Response(200, stream=Breaking(b"old"), headers={"ETag": '"e1"'}),
        httpx2.Response(200, content=b"new result"),
    )
    with client_of(handler) as client, pytest.raises(ConnectionFailed, match="has changed"):
        client.jobs.get("j1").result().read()
    assert len(no_pauses) == 1


def test_a_damaged_download_leaves_no_file(tmp_path: Path) -> None:
    headers = {"Repr-Digest": "sha-256=:47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU=:"}
    handler, _ = in_turn(job_answer(state="completed"), httpx2.Response(200, content=b"damaged", headers=headers))
    with client_of(handler) as client, pytest.raises(DigestMismatch):
        client.jobs.get("j1").result().save(tmp_path / "out.csv")
    assert list(tmp_path.iterdir()) == []


def test_the_asynchronous_client_retries_and_streams_in_the_same_way(tmp_path: Path) -> None:
    class Pieces(httpx2.AsyncByteStream):
        async def __aiter__(self) -> AsyncIterator[bytes]:
            yield b'{"a": 1}\n{"a"'
            yield b": 2}\n"

    answers = iter([problem(503, "unavailable", "later"), job_answer(state="completed")])
    bodies: list[bytes] = []

    async def handle(request: httpx2.Request) -> httpx2.Response:
        if request.method == "GET":
            return httpx2.Response(200, stream=Pieces())
        bodies.append(await request.aread())
        return next(answers)

    async def run() -> list[dict[str, Any]]:
        async with AsyncClient("http://server", transport=httpx2.MockTransport(handle)) as client:
            job = await client.submit(path, model="iris")
            return [row async for row in job.result().iter_rows()]

    path = tmp_path / "in.csv"
    path.write_bytes(b"a\n1\n2\n")
    assert asyncio.run(run()) == [{"a": 1}, {"a": 2}]
    assert bodies == [b"a\n1\n2\n"] * 2


# A real server


@pytest.fixture(scope="module")
def client(server: str, iris_onnx: Path) -> Iterator[Client]:
    with Client(server) as client:
        client.models.add(iris_onnx, name="iris")
        yield client


FLOWERS = {"setosa", "versicolor", "virginica"}


def test_a_polars_frame_comes_back_as_one_with_a_row_for_each(client: Client, iris: pd.DataFrame) -> None:
    frame = pl.from_pandas(iris).with_columns(id=pl.int_range(150))
    out = client.predict(frame, model="iris")
    assert isinstance(out, pl.DataFrame)
    assert out["id"].to_list() == list(range(150))
    assert set(out["prediction"]) == FLOWERS
    assert out["prediction"][0] == "setosa"


def test_a_pandas_frame_comes_back_with_its_index(client: Client, iris: pd.DataFrame) -> None:
    frame = iris.set_index(pd.Index([f"flower-{i}" for i in range(150)]))
    out = client.predict(frame, model="iris", passthrough="all")
    assert isinstance(out, pd.DataFrame)
    assert list(out.index) == list(frame.index)
    assert np.allclose(out["petal length (cm)"], frame["petal length (cm)"])
    assert set(out["prediction"]) == FLOWERS


def test_an_array_comes_back_as_an_array_with_named_fields(client: Client, iris: pd.DataFrame, tmp_path: Path) -> None:
    array = iris.to_numpy(np.float32)
    species = np.repeat(sorted(FLOWERS), 50)
    convert(LogisticRegression(max_iter=500).fit(array, species), array, tmp_path / "nameless.onnx")
    client.models.add(tmp_path / "nameless.onnx", name="nameless")
    out: np.ndarray[Any, Any] = client.predict(array, model="nameless")
    assert out.shape == (150,)
    assert (out["prediction"] == species).mean() > 0.9
    assert np.allclose(sum(out[f"probability_{flower}"] for flower in FLOWERS), 1.0, atol=1e-5)


def test_arrays_come_back_as_the_arrays_of_the_model(client: Client, iris: pd.DataFrame) -> None:
    (tensor,) = client.models.get("nameless").signature["inputs"]
    out = client.predict({tensor["name"]: iris.to_numpy(np.float32)}, model="nameless")
    assert {len(array) for array in out.values()} == {150}
    assert any(array.shape == (150, 3) for array in out.values())


def test_uploads_are_collected_and_queued_together(client: Client, iris_csv: Path) -> None:
    for job in list(client.jobs.list(state="uploaded")):
        job.delete()
    ids = [client.upload(iris_csv).id for _ in range(2)]
    refused = client.upload(b"a,b\n1,2\n")
    queued = client.predict_uploaded("iris", format="jsonl", top_k=1, reuse=False)
    assert ([job.id for job in queued.jobs], queued.completed) == (ids, 0)
    assert [(one["id"], one["problem"]["code"]) for one in queued.refused] == [(refused.id, "schema-mismatch")]
    assert [job.wait(30).rows["ok"] for job in queued.jobs] == [150, 150]
    assert queued.jobs[0].result().read() == queued.jobs[1].result().read()

    async def again() -> int:
        async with AsyncClient(client.url) as twin:
            return len((await twin.predict_uploaded("iris")).jobs)

    assert asyncio.run(again()) == 0


def test_records_come_back_as_records(client: Client, iris: pd.DataFrame) -> None:
    records = pl.from_pandas(iris.head(3)).to_dicts()
    out = client.predict(records, model="iris")
    assert [row["prediction"] for row in out] == ["setosa"] * 3


def test_a_path_comes_back_as_the_path_of_the_saved_result(client: Client, iris_csv: Path, tmp_path: Path) -> None:
    path = tmp_path / "night.csv"
    path.write_bytes(iris_csv.read_bytes())
    beside = client.predict(path, model="iris")
    elsewhere = client.predict(str(path), model="iris", output=tmp_path / "out.parquet")
    assert beside == tmp_path / "night.predictions.csv"
    assert pl.read_csv(beside)["prediction"].to_list() == pl.read_parquet(elsewhere)["prediction"].to_list()


@pytest.mark.parametrize("output", ["night.csv", "link.csv", "again.csv"])
def test_an_input_is_not_replaced_by_its_result(
    client: Client, server: str, iris_csv: Path, tmp_path: Path, output: str
) -> None:
    path = tmp_path / "night.csv"
    path.write_bytes(iris_csv.read_bytes())
    (tmp_path / "link.csv").symlink_to(path)
    (tmp_path / "again.csv").hardlink_to(path)
    with pytest.raises(InvalidOptions, match="is an input, which its result would replace"):
        client.predict(path, model="iris", output=tmp_path / output)
    done = in_this_process(tmp_path, "predict", "night.csv", "-m", "iris", "-o", output, BATCHSERVE_URL=server)
    assert done.returncode == 1
    assert "is an input, which its result would replace" in done.stderr
    assert path.read_bytes() == iris_csv.read_bytes()


@pytest.mark.parametrize("output", ["out.csv.gz", "out.parquet.zst", "out.xlsx", "out.zip"])
def test_a_suffix_that_promises_what_no_result_is_is_refused(
    client: Client, server: str, iris_csv: Path, tmp_path: Path, output: str
) -> None:
    with pytest.raises(InvalidOptions, match=f"a result is not written as {Path(output).suffix}"):
        client.predict(iris_csv, model="iris", output=tmp_path / output)
    job = client.submit(iris_csv, model="iris").wait(60)
    with pytest.raises(InvalidOptions, match=r"expected one of \.csv"):
        job.result().save(tmp_path / output)
    done = in_this_process(tmp_path, "predict", iris_csv, "-m", "iris", "-o", output, BATCHSERVE_URL=server)
    assert done.returncode == 1
    assert "a result is not written as" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_images_come_back_as_the_path_of_the_saved_result(client: Client, reviews_onnx: bytes, tmp_path: Path) -> None:
    """The model scores the names of the files, so no model of images is needed."""
    images = images_in(tmp_path / "photos")
    client.models.add(reviews_onnx, name="reviews")
    columns = {"text": "file"}
    saved = client.predict(tmp_path / "photos", "reviews", columns=columns, passthrough=["file"])
    assert saved == tmp_path / "photos.predictions.jsonl"
    assert pl.read_ndjson(saved)["file"].to_list() == list(images)
    paths = [tmp_path / "photos" / name for name in images]
    saved = client.predict(paths, "reviews", columns=columns, passthrough=["file"])
    assert saved == tmp_path / "photos" / "a" / "b" / "a.predictions.jsonl"
    assert pl.read_ndjson(saved)["file"].to_list() == list(images)


def test_rows_that_cannot_be_scored_give_a_warning_and_are_listed(client: Client, iris: pd.DataFrame) -> None:
    frame = pl.from_pandas(iris)
    frame[3, "petal length (cm)"] = None
    with pytest.warns(UserWarning, match="1 of 150 rows could not be scored") as caught:
        out = client.predict(frame, model="iris")
    assert out["prediction"].is_null().arg_true().to_list() == [3]
    job_id = str(caught[0].message).split("'")[1]
    (error,) = client.jobs.get(job_id).errors()
    assert error["record"] == 3
    assert error["column"] == "petal length (cm)"


def test_a_submitted_job_reports_its_progress_and_gives_its_result_in_any_format(
    client: Client, iris_csv: Path, tmp_path: Path
) -> None:
    job = client.submit(iris_csv, model="iris", metadata={"night": "2026-11-20"}, reuse=False)
    seen: list[float] = []
    job.wait(timeout=60, on_progress=lambda view: seen.append(view.progress))
    assert job.rows == {"total": 150, "ok": 150, "failed": 0}
    assert job.progress == 1.0 == seen[-1]
    assert job.metadata == {"night": "2026-11-20"}
    assert job.model == "iris@1"
    result = job.result()
    frames = [pl.read_csv(result.read()), result.to_polars(), pl.from_pandas(result.to_pandas())]
    assert all(frame["prediction"].to_list() == frames[0]["prediction"].to_list() for frame in frames)
    assert [row["prediction"] for row in result.iter_rows()] == frames[0]["prediction"].to_list()
    assert pl.read_parquet(result.save(tmp_path / "a.parquet")).height == 150


def test_an_upload_is_predicted_later(client: Client, iris_csv: Path) -> None:
    uploaded = client.upload(iris_csv)
    assert uploaded.state == "uploaded"
    assert uploaded.data["input"]["filename"] == "iris.csv"
    job = client.submit(uploaded, model="iris").wait(timeout=60)
    assert job.id == uploaded.id
    assert job.state == "completed"


@pytest.mark.parametrize(
    "id",
    [
        "../models/iris/versions/1",
        "../../livez",
        "..",
        ".",
        "",
        "a b?x=1#f",
        "%2e%2e/models/iris/versions/1",
        "a/../b",
        "ü",
    ],
)
def test_whatever_is_given_as_an_id_leads_to_nothing_else(client: Client, id: str) -> None:
    for call in (client.jobs.get, client.jobs.delete, client.schedules.get, client.schedules.delete):
        with pytest.raises(BatchserveError) as refused:
            call(id)
        assert refused.value.code.endswith("not-found")
    with pytest.raises(BatchserveError):
        client.models.remove(f"gone@{id}")
    with pytest.raises(BatchserveError):
        client.webhooks.delete(id)
    assert client.models.get("iris@1").version == 1


def test_a_repeated_call_with_one_key_has_one_job(client: Client, iris_csv: Path) -> None:
    first, again = (client.submit(iris_csv, "iris", reuse=False, idempotency_key="night-7") for _ in range(2))
    assert first.id == again.id
    with pytest.raises(IdempotencyMismatch):
        client.submit(iris_csv, "iris", reuse=False, idempotency_key="night-7", top_k=1)


def test_a_pipe_of_unknown_length_is_uploaded(client: Client, iris_csv: Path) -> None:
    class Pipe(io.BytesIO):
        def seekable(self) -> bool:
            return False

    job = client.submit(Pipe(iris_csv.read_bytes()), model="iris").wait(timeout=60)
    assert job.rows["ok"] == 150


def test_a_model_shows_its_signature(client: Client, iris: pd.DataFrame) -> None:
    signature = client.models.get("iris").signature
    assert [column["name"] for column in signature["columns"]] == list(iris.columns)
    assert set(signature["labels"]) == FLOWERS
    assert client.models.get("iris@1").digest == client.models.get("iris").digest
    assert "iris" in [model.name for model in client.models.list()]


def test_equal_bytes_return_the_existing_version(client: Client, iris_onnx: Path) -> None:
    assert client.models.add(iris_onnx.read_bytes(), name="iris").version == 1


def test_a_removed_version_is_gone(client: Client, iris_onnx: Path) -> None:
    client.models.add(iris_onnx, name="short-lived")
    client.models.remove("short-lived@1")
    with pytest.raises(ModelNotFound, match="short-lived"):
        client.models.get("short-lived")


def test_online_predictions_equal_those_of_a_job(client: Client, iris: pd.DataFrame, iris_csv: Path) -> None:
    online = client.models.predict("iris", pl.from_pandas(iris.head(5)).to_dicts())
    job = client.submit(iris_csv, model="iris").wait(timeout=60)
    expected = list(job.result().iter_rows())[:5]
    assert [row["prediction"] for row in online] == [row["prediction"] for row in expected]
    assert client.models.validate("iris", pl.from_pandas(iris))["valid"] is True


def test_online_predictions_take_arrays_and_options(client: Client, iris: pd.DataFrame) -> None:
    online = client.models.predict("iris", iris.head(3).to_numpy().tolist(), top_k=1)
    assert [row["label_1"] for row in online] == ["setosa"] * 3
    renamed = iris.rename(columns={"petal width (cm)": "width"})
    assert client.models.validate("iris", renamed, columns={"petal width (cm)": "width"})["valid"] is True


def test_a_wrong_column_is_refused_at_once_and_named(client: Client) -> None:
    with pytest.raises(SchemaMismatch, match="petal width"):
        client.submit(b"a,b\n1,2\n", model="iris")


def test_an_unknown_job_is_not_found(client: Client) -> None:
    with pytest.raises(JobNotFound):
        client.jobs.get("01900000-0000-7000-8000-000000000000")


def test_a_deleted_job_is_not_found(client: Client, iris_csv: Path) -> None:
    job = client.submit(iris_csv, model="iris").wait(timeout=60)
    job.delete()
    with pytest.raises(JobNotFound):
        job.refresh()


def test_a_job_that_waits_for_its_time_can_be_cancelled_and_retried(client: Client, iris_csv: Path) -> None:
    job = client.submit(iris_csv, model="iris", run_after="2099-01-01T00:00:00Z", reuse=False)
    assert job.cancel().state == "cancelled"
    with pytest.raises(JobCancelled) as caught:
        job.wait(timeout=10)
    assert caught.value.job.id == job.id
    assert job.retry().state in ("queued", "running", "completed")


def test_a_job_with_too_many_bad_rows_fails_with_the_reason(client: Client, iris: pd.DataFrame) -> None:
    frame = pl.from_pandas(iris)
    frame[3, "petal length (cm)"] = None
    with pytest.raises(JobFailed, match="on_row_error") as caught:
        client.predict(frame, model="iris", on_row_error="fail", reuse=False)
    job = caught.value.job
    assert isinstance(job, Job)
    assert job.errors()[0]["record"] == 3


def test_failed_rows_are_scored_again_by_a_new_job_and_the_first_result_stays(
    client: Client, iris: pd.DataFrame
) -> None:
    frame = pl.from_pandas(iris)
    frame[3, "petal length (cm)"] = None
    job = client.submit(frame, model="iris", reuse=False).wait(timeout=60)
    again = job.retry_failed_rows().wait(timeout=60)
    assert again.id != job.id
    assert again.rows == {"total": 150, "ok": 149, "failed": 1}
    assert again.result().read() == job.result().read()


def test_a_listing_continues_over_all_pages(client: Client, iris_csv: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    submitted = {client.submit(iris_csv, model="iris", metadata={"page": str(n)}).id for n in range(5)}
    monkeypatch.setattr("batchserve.client.core._PAGE", 2)
    listed = [job.id for job in client.jobs.list(model="iris")]
    assert submitted <= set(listed)
    assert len(listed) == len(set(listed))


def test_a_listing_is_filtered_sorted_and_counted(client: Client, iris_csv: Path) -> None:
    options: JobOptions = {"metadata": {"batch": "of-the-client"}, "reuse": False}
    ids = [client.submit(iris_csv, model="iris", **options).wait(30).id for _ in range(3)]
    mark = "of-the-client"

    def listed(**wanted: Any) -> list[int]:
        assert client.jobs.count(q=mark, **{name: value for name, value in wanted.items() if name != "order"}) == 3
        return [ids.index(job.id) for job in client.jobs.list(q=mark, **wanted)]

    assert listed() == listed(since=timedelta(hours=1)) == listed(state=["completed", "failed"]) == [2, 1, 0]
    assert listed(order="asc", until=datetime(2999, 1, 1)) == [0, 1, 2]  # noqa: DTZ001 - a time of this machine
    assert sorted(listed(finished_since="1h", finished_until="2999-01-01", state="completed")) == [0, 1, 2]
    assert client.jobs.count(q=mark, since=datetime(2999, 1, 1, tzinfo=UTC)) == 0
    assert [job.id for job in client.jobs.list(q=mark, sort="finished")] == ids[::-1]

    async def of_twin() -> tuple[int, list[str]]:
        async with AsyncClient(client.url) as twin:
            found = twin.jobs.list(q=mark, sort="finished", order="asc", since="1h")
            return await twin.jobs.count(q=mark, state=("completed",)), [job.id async for job in found]

    assert asyncio.run(of_twin()) == (3, ids)


def test_models_are_listed_over_all_pages(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = [model.name for model in client.models.list()]
    monkeypatch.setattr("batchserve.client.core._PAGE", 1)
    assert [model.name for model in client.models.list()] == whole
    assert [model.name for model in client.models.list(q="IRI")] == ["iris"]
    assert client.models.list(q="no such model") == []


def test_the_asynchronous_client_predicts_and_lists_in_the_same_way(
    server: str, client: Client, iris: pd.DataFrame
) -> None:
    async def run() -> tuple[pl.DataFrame, list[str]]:
        async with AsyncClient(server) as twin:
            out = await twin.predict(pl.from_pandas(iris), model="iris")
            return out, [job.id async for job in twin.jobs.list(state="completed")]

    out, listed = asyncio.run(run())
    assert out.equals(client.predict(pl.from_pandas(iris), model="iris"))
    assert listed


def test_the_blocking_client_works_inside_a_running_loop(client: Client, iris_csv: Path) -> None:
    """As in a notebook."""

    async def run() -> int:
        return len(list(client.submit(iris_csv, model="iris").wait(timeout=60).result().iter_rows()))

    assert asyncio.run(run()) == 150
