"""Requirements of HTTP itself: preconditions, HEAD, methods, paths, compressed bodies of many members."""

import gzip
import time
import zlib
from collections.abc import Callable
from typing import Any

import httpx2
import pytest
from packing import zstd
from service import Api, ok, problem

from batchserve.api.bodies import BLOCK, _Gzip, _Zstd

CSV = "sepal length (cm),sepal width (cm),petal length (cm),petal width (cm)\n5.1,3.5,1.4,0.2\nlost,3.0,1.4,0.2\n"
LATER = "Fri, 31 Dec 2038 23:59:59 GMT"
EARLIER = "Sat, 01 Jan 2000 00:00:00 GMT"


@pytest.fixture(scope="module")
def done(api: Api) -> dict[str, Any]:
    return api.run(CSV, "iris")


STRONG = ["result", "errors", "input"]


@pytest.mark.parametrize("link", STRONG)
def test_preconditions_on_immutable_bytes_hold_or_fail_as_the_rfc_says(
    api: Api, done: dict[str, Any], link: str
) -> None:
    url = done["links"][link]
    etag = api.http.get(url).headers["etag"]
    for headers, status in (
        ({"if-match": etag}, 200),
        ({"if-match": f'"other", {etag}'}, 200),
        ({"if-match": "*"}, 200),
        ({"if-match": '"other"'}, 412),
        ({"if-match": f"W/{etag}"}, 412),  # the strong comparison
        ({"if-match": "nonsense"}, 412),
        ({"if-none-match": etag}, 304),
        ({"if-none-match": f'"with, comma" ,, W/{etag}'}, 304),  # the weak comparison
        ({"if-none-match": "*"}, 304),
        ({"if-none-match": '"other"'}, 200),
        ({"if-match": '"other"', "if-none-match": etag}, 412),  # If-Match comes first
        ({"if-match": etag, "if-none-match": etag}, 304),
        ({"if-match": etag, "if-unmodified-since": EARLIER}, 200),  # If-Match wins over a date
        ({"if-none-match": '"other"', "if-modified-since": LATER}, 200),  # so does If-None-Match
    ):
        answer = api.http.get(url, headers=headers)
        assert answer.status_code == status, headers
        if status == 412:
            assert etag in problem(answer, 412, "precondition-failed")["detail"]
        if status == 304:
            assert (answer.headers["etag"], answer.content) == (etag, b"")


@pytest.mark.parametrize("link", ["result", "input"])
def test_preconditions_on_dates_follow_last_modified(api: Api, done: dict[str, Any], link: str) -> None:
    url = done["links"][link]
    modified = api.http.get(url).headers["last-modified"]
    for headers, status in (
        ({"if-unmodified-since": modified}, 200),
        ({"if-unmodified-since": LATER}, 200),
        ({"if-unmodified-since": EARLIER}, 412),
        ({"if-unmodified-since": "yesterday"}, 200),
        ({"if-modified-since": modified}, 304),
        ({"if-modified-since": EARLIER}, 200),
        ({"if-modified-since": "Sat, 99 Jan 99999 00:00:00 GMT"}, 200),
        ({"range": "bytes=0-1", "if-range": modified}, 206),
        ({"range": "bytes=0-1", "if-range": EARLIER}, 200),
        ({"range": "bytes=0-1", "if-unmodified-since": EARLIER}, 412),
    ):
        assert api.http.get(url, headers=headers).status_code == status, headers


def test_a_converted_result_has_preconditions_of_its_own(api: Api, done: dict[str, Any]) -> None:
    url = f"{done['links']['result']}?format=jsonl"
    etag = api.http.head(url).headers["etag"]
    assert api.http.get(url, headers={"if-none-match": f'"a", {etag}'}).status_code == 304
    problem(api.http.get(url, headers={"if-match": '"a"'}), 412, "precondition-failed")


def test_a_job_has_a_weak_tag_in_lists_and_in_kept_answers_alike(api: Api, done: dict[str, Any]) -> None:
    url = done["links"]["self"]
    for _ in range(3):  # the response is cached after the first request
        etag = api.http.get(url).headers["etag"]
        for tags in (etag, f'"a", {etag}', etag.removeprefix("W/"), "*"):
            assert api.http.get(url, headers={"if-none-match": tags}).status_code == 304
        assert api.http.get(url, headers={"if-none-match": '"a"'}).status_code == 200
        assert api.http.get(url, headers={"if-unmodified-since": EARLIER}).status_code == 200  # it has no date
        assert api.http.get(url, headers={"if-match": "*"}).status_code == 200
        problem(api.http.get(url, headers={"if-match": etag}), 412, "precondition-failed")  # weak: never equal


def test_what_a_precondition_forbids_is_not_done(api: Api) -> None:
    url = api.upload(CSV)["links"]["self"]
    problem(api.http.delete(url, headers={"if-match": '"old"'}), 412, "precondition-failed")
    problem(api.http.delete(url, headers={"if-none-match": "*"}), 412, "precondition-failed")
    assert ok(api.http.get(url))["state"] == "uploaded"
    assert api.http.delete(url, headers={"if-match": "*"}).status_code == 204


def test_a_model_is_registered_only_first_or_only_after_a_version_when_asked(
    api: Api, iris_onnx: Any, people_onnx: bytes
) -> None:
    url, model = "/v1/models/conditional", iris_onnx.read_bytes()
    problem(api.http.put(url, content=model, headers={"if-match": "*"}), 412, "precondition-failed")
    first = api.http.put(url, content=model, headers={"if-none-match": "*"})
    assert first.status_code == 201
    with api.unchanged():
        problem(api.http.put(url, content=people_onnx, headers={"if-none-match": "*"}), 412, "precondition-failed")
        problem(api.http.put(url, content=people_onnx, headers={"if-match": '"1-0"'}), 412, "precondition-failed")
    etag = api.http.get(url).headers["etag"]
    assert first.headers["etag"] == etag
    assert api.http.get(url, headers={"if-none-match": etag}).status_code == 304
    assert api.http.put(url, content=people_onnx, headers={"if-match": etag}).json()["version"] == 2
    problem(api.http.get(url, headers={"if-match": etag}), 412, "precondition-failed")
    problem(api.http.delete(f"{url}/versions/2", headers={"if-match": etag}), 412, "precondition-failed")
    assert api.http.delete(f"{url}/versions/1", headers={"if-match": etag}).status_code == 204


def test_head_answers_wherever_get_does(server: str) -> None:
    document = httpx2.get(f"{server}/openapi.json").json()
    places = [path for path, operations in document["paths"].items() if "get" in operations]
    assert len(places) > 10
    for path in [*places, "/", "/docs", "/openapi.json"]:
        url = server + path.replace("{version}", "1").replace("{", "").replace("}", "")
        get, head = httpx2.get(url, follow_redirects=False), httpx2.head(url, follow_redirects=False)
        assert (head.status_code, head.content) == (get.status_code, b""), path
        assert head.headers["content-type"] == get.headers["content-type"] if get.content else True


def test_the_head_of_an_event_stream_ends_at_once(idle_api: Api) -> None:
    link = idle_api.upload(CSV)["links"]["events"]
    head = idle_api.http.head(link)
    assert (head.status_code, head.headers["content-type"].partition(";")[0]) == (200, "text/event-stream")


@pytest.mark.parametrize(
    ("path", "allowed"),
    [
        ("/v1/jobs", "GET, HEAD, POST"),
        ("/v1/jobs/some", "GET, HEAD, DELETE"),
        ("/v1/models/iris", "GET, HEAD, PUT"),
        ("/v1/models/iris/versions/1", "GET, HEAD, DELETE"),
        ("/v1/upload", "POST, PUT"),
        ("/livez", "GET, HEAD"),
    ],
)
@pytest.mark.parametrize("method", ["PATCH", "OPTIONS", "TRACE"])
def test_a_method_that_a_resource_does_not_have_is_a_405_that_lists_all_that_it_has(
    api: Api, method: str, path: str, allowed: str
) -> None:
    answer = api.http.request(method, path)
    assert allowed in problem(answer, 405, "method-not-allowed")["detail"]
    assert answer.headers["allow"] == allowed


@pytest.mark.parametrize("method", ["PROPFIND", "MKCOL", "PURGE", "BREW"])
def test_a_method_that_no_resource_supports_is_a_501(api: Api, method: str) -> None:
    assert method in problem(api.http.request(method, "/v1/jobs"), 501, "not-implemented")["detail"]


@pytest.mark.parametrize("path", ["/v1/jobs/", "/v1/upload/", "//v1/jobs", "/v1//jobs", "/v1/jobs%2F", "/livez/"])
def test_a_path_that_is_nearly_one_is_not_found_and_never_redirected(api: Api, path: str) -> None:
    answer = api.http.get(f"http://elsewhere.example{path}", follow_redirects=False)
    assert "location" not in answer.headers
    assert answer.status_code >= 400
    assert answer.headers["content-type"] == "application/problem+json"


def _cpu_seconds(work: Callable[[], object]) -> float:
    began = time.thread_time()
    work()
    return time.thread_time() - began


def _decoded(decoder: _Gzip | _Zstd, body: bytes) -> list[bytes]:
    blocks = (body[start : start + BLOCK] for start in range(0, len(body), BLOCK))
    return [piece for block in blocks for piece in decoder.decode(block)]


@pytest.mark.parametrize("content", [b"", b"x"], ids=["empty", "one-byte"])
def test_a_gzip_body_of_many_members_costs_what_its_members_cost_one_by_one(content: bytes) -> None:
    member = gzip.compress(content)
    count = 2 * BLOCK // len(member)

    def one_by_one() -> None:
        for _ in range(count):
            zlib.decompressobj(wbits=31).decompress(member)

    alone = min(_cpu_seconds(one_by_one) for _ in range(3))
    pieces: list[bytes] = []
    together = min(_cpu_seconds(lambda: pieces.extend(_decoded(_Gzip(), member * count))) for _ in range(3))
    assert b"".join(pieces) == content * count * 3
    assert len(pieces) <= 3 * 4  # each piece costs a thread hop
    assert together < 6 * alone  # it was 15 to 20 times


@pytest.mark.slow
def test_a_zstd_body_of_many_frames_costs_what_its_frames_cost_one_by_one() -> None:
    frame = zstd.compress(b"")
    count = BLOCK // len(frame)

    def one_by_one() -> None:
        for _ in range(count):
            zstd.ZstdDecompressor().decompress(frame)

    alone = min(_cpu_seconds(one_by_one) for _ in range(3))
    together = min(_cpu_seconds(lambda: _decoded(_Zstd(), frame * count)) for _ in range(3))
    assert together < 6 * alone  # it was 12 times


@pytest.mark.parametrize("count", [1, 2, 3, 50, 3000])
def test_gzip_members_of_any_sizes_are_decoded_whole(count: int) -> None:
    contents = [bytes([i % 251]) * (i * 7919 % 3001) for i in range(count)]
    body = b"".join(gzip.compress(content) for content in contents)
    for size in (1, 700, BLOCK) if count <= 50 else (BLOCK,):
        decoder = _Gzip()
        pieces = [piece for start in range(0, len(body), size) for piece in decoder.decode(body[start : start + size])]
        assert b"".join(pieces) == b"".join(contents)
        assert decoder.ended
