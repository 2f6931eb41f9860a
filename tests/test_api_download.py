import base64
import hashlib
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import httpx2
import polars as pl
import pytest
from polars.testing import assert_frame_equal
from remote import RemoteStorage
from service import Api, decoded, encoded, ok, problem, running
from sqlalchemy import update

from batchserve import runtime
from batchserve.api.forms import disposition_filename
from batchserve.db.connect import Database
from batchserve.db.tables import jobs

CSV = b"sepal length (cm),sepal width (cm),petal length (cm),petal width (cm)\n5.1,3.5,1.4,0.2\n"
PEOPLE = "id,age,city,visits\n007,30,Bern,7\n008,,Biel,3\n009,61,,11\n"
TYPES = {
    "csv": "text/csv",
    "jsonl": "application/x-ndjson",
    "json": "application/json",
    "parquet": "application/vnd.apache.parquet",
    "arrow": "application/vnd.apache.arrow.file",
    "arrows": "application/vnd.apache.arrow.stream",
}


@pytest.fixture(scope="module")
def job(api: Api, flowers: pl.DataFrame) -> dict[str, Any]:
    """A finished job of 150 flowers, as CSV."""
    return api.run(encoded(flowers, "csv"), "iris")


@pytest.fixture(scope="module")
def people(api: Api) -> dict[str, Any]:
    """A finished job of three records, one of which could not be scored."""
    return api.run(PEOPLE, "people", passthrough="all", key="id")


@pytest.fixture(scope="module")
def remote_api(tmp_path_factory: pytest.TempPathFactory, iris_onnx: Path) -> Iterator[Api]:
    """A service whose storage has no files on its host."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runtime, "open_storage", RemoteStorage)
        with running(tmp_path_factory.mktemp("remote"), chunk_records=100) as api:
            api.register("iris", iris_onnx)
            yield api


@pytest.fixture(scope="module")
def in_order(tmp_path_factory: pytest.TempPathFactory, iris_onnx: Path) -> Iterator[Api]:
    """A service with one scoring process: no chunk is done before those in front of it."""
    with running(tmp_path_factory.mktemp("in-order"), processes=1, chunk_records=100) as api:
        api.register("iris", iris_onnx)
        yield api


# --- before there is a result ----------------------------------------------------------------------------------------


def test_an_early_download_is_not_found_and_reports_the_state_of_the_job(idle_api: Api) -> None:
    job = idle_api.upload(CSV)
    url = f"/v1/download/{job['id']}"
    answer = idle_api.http.get(url)
    body = problem(answer, 404, "result-not-ready")
    assert body["state"] == "uploaded"
    assert f"POST /v1/predict/{job['id']}" in body["detail"]
    assert answer.headers["retry-after"] == "1"
    ok(idle_api.http.post(f"/v1/predict/{job['id']}?model=iris"), 202)
    for suffix in ("", "/errors"):
        answer = idle_api.http.get(url + suffix)
        assert problem(answer, 404, "result-not-ready")["state"] == "queued"
        assert answer.headers["retry-after"] == "1"
    problem(idle_api.http.get(f"{url}?partial=true"), 404, "result-not-ready")
    assert idle_api.http.get(f"{url}/input").content == CSV


def test_a_download_may_wait_for_the_result(api: Api, idle_api: Api) -> None:
    body = CSV * 1 + b"5,5,5,5\n"
    job = ok(api.http.post("/v1/predict?model=iris&reuse=false", content=body), 202)
    assert api.http.get(f"/v1/download/{job['id']}?wait=20").status_code == 200
    started = time.monotonic()
    problem(idle_api.http.get(f"/v1/download/{idle_api.upload(CSV)['id']}?wait=0.5"), 404, "result-not-ready")
    assert 0.4 < time.monotonic() - started < 20


@pytest.mark.parametrize("suffix", ["", "/errors", "/input"])
@pytest.mark.parametrize("job_id", ["nope", "01a1f7d8-94a2-73b4-888c-2ac5b95e5d38", "%2e%2e%2fbatchserve.db"])
def test_an_unknown_job_has_nothing_to_download(api: Api, job_id: str, suffix: str) -> None:
    answer = api.http.get(f"/v1/download/{job_id}{suffix}")
    assert answer.status_code == 404
    assert answer.headers["content-type"] == "application/problem+json"


def test_a_deleted_job_has_nothing_to_download(api: Api) -> None:
    done = api.run(CSV, "iris")
    assert api.http.delete(done["links"]["self"]).status_code == 204
    for link in ("result", "errors", "input"):
        problem(api.http.get(done["links"][link]), 404, "job-not-found")


# --- the stored file -------------------------------------------------------------------------------------------------


def test_a_result_comes_with_its_length_digest_and_name(api: Api, job: dict[str, Any]) -> None:
    answer = api.result(job)
    digest = hashlib.sha256(answer.content).digest()
    assert job["result"] == {
        "bytes": len(answer.content), "sha256": digest.hex(), "media_type": "text/csv", "format": "csv", "rows": 150,
    }  # fmt: skip
    assert answer.headers["etag"] == f'"{digest.hex()}"'
    assert answer.headers["repr-digest"] == f"sha-256=:{base64.b64encode(digest).decode()}:"
    assert answer.headers["content-length"] == str(len(answer.content))
    assert answer.headers["content-disposition"] == f'attachment; filename="{job["id"]}.csv"'
    assert answer.headers["content-type"].startswith("text/csv")
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["accept-ranges"] == "bytes"


@pytest.mark.parametrize(
    ("filename", "stem"),
    [
        ("flowers.csv", "flowers"),
        ("../in/2026.11.csv.gz", "2026.11"),
        ("C:\\in\\flowers.csv", "flowers"),
        ('say "hi"; a=b.csv', 'say "hi"; a=b'),
        ("Zürich ☃.csv", "Zürich ☃"),
    ],
)
def test_downloads_are_named_after_their_input(api: Api, filename: str, stem: str) -> None:
    job = api.run(CSV + b"tall,,,\n", "iris", filename=filename)
    result, errors = job["links"]["result"], job["links"]["errors"]
    for path, accept, name in (
        (result, None, f"{stem}.predictions.csv"),
        (f"{result}?format=parquet", None, f"{stem}.predictions.parquet"),
        (errors, None, f"{stem}.errors.jsonl"),
        (errors, "text/csv", f"{stem}.errors.csv"),
        (f"/jobs/{job['id']}/result?format=jsonl", None, f"{stem}.predictions.jsonl"),
        (f"/jobs/{job['id']}/manifest.json", None, f"{stem}.manifest.json"),
    ):
        answer = api.http.get(path, headers={"accept": accept} if accept else {})
        assert disposition_filename(answer.headers["content-disposition"]) == name, path


@pytest.mark.parametrize("link", ["result", "input"])
def test_head_gives_the_same_headers_without_the_bytes(api: Api, job: dict[str, Any], link: str) -> None:
    get, head = api.http.get(job["links"][link]), api.http.head(job["links"][link])
    assert (head.status_code, head.content) == (200, b"")
    own = {"x-request-id"}
    assert {name: head.headers[name] for name in head.headers.keys() - own} == {
        name: get.headers[name] for name in get.headers.keys() - own
    }


def test_head_works_for_errors_and_conversions(api: Api, job: dict[str, Any]) -> None:
    assert api.http.head(job["links"]["errors"]).status_code == 200
    converted = api.http.head(job["links"]["result"], params={"format": "parquet"})
    assert (converted.status_code, converted.content) == (200, b"")
    assert converted.headers["content-type"] == TYPES["parquet"]
    assert "content-length" not in converted.headers  # which is unknown, and surely not 0


@pytest.mark.parametrize("query", [{}, {"format": "jsonl"}])
def test_a_client_that_has_the_result_gets_304(api: Api, job: dict[str, Any], query: dict[str, str]) -> None:
    etag = api.result(job, **query).headers["etag"]
    for tags in (etag, f'"other", {etag}', f"W/{etag}", "*"):
        answer = api.http.get(job["links"]["result"], params=query, headers={"if-none-match": tags})
        assert (answer.status_code, answer.content) == (304, b""), tags
        assert answer.headers["etag"] == etag
    for tags in ('"other"', etag.replace('"', "")):
        answer = api.http.get(job["links"]["result"], params=query, headers={"if-none-match": tags})
        assert answer.status_code == 200, tags


@pytest.mark.parametrize(
    ("header", "start", "stop"),
    [("bytes=0-9", 0, 10), ("bytes=100-", 100, None), ("bytes=-20", -20, None), ("bytes=5-999999999", 5, None)],
)
def test_a_range_gives_those_bytes(api: Api, job: dict[str, Any], header: str, start: int, stop: int | None) -> None:
    whole = api.result(job).content
    answer = api.http.get(job["links"]["result"], headers={"range": header})
    assert answer.status_code == 206
    assert answer.content == whole[start:stop]
    first = start % len(whole)
    assert answer.headers["content-range"] == f"bytes {first}-{first + len(answer.content) - 1}/{len(whole)}"


def test_a_range_beyond_the_end_is_a_problem_that_says_how_long_the_file_is(api: Api, job: dict[str, Any]) -> None:
    answer = api.http.get(job["links"]["result"], headers={"range": "bytes=10000000-"})
    problem(answer, 416, "range-not-satisfiable")
    assert answer.headers["content-range"] == f"bytes */{job['result']['bytes']}"


@pytest.mark.parametrize("header", ["bytes=0-1,500000-", "bytes=-0, 0-1", "bytes=,0-1"])
def test_of_several_ranges_those_beyond_the_end_are_left_out(api: Api, job: dict[str, Any], header: str) -> None:
    answer = api.http.get(job["links"]["result"], headers={"range": header})
    assert (answer.status_code, answer.content) == (206, api.result(job).content[:2])


@pytest.mark.parametrize(
    "header", ["bytes=+1-3", "bytes=1_0-2_0", "bytes=\u0661-", "bytes=x-y", "lines=0-1", "bytes", "bytes=", "bytes=9-2"]
)
def test_an_invalid_range_is_ignored(api: Api, job: dict[str, Any], header: str) -> None:
    answer = api.http.get(job["links"]["result"], headers=[(b"range", header.encode())])
    assert (answer.status_code, len(answer.content)) == (200, job["result"]["bytes"])


def test_a_range_of_another_version_of_the_file_gets_the_whole_file(api: Api, job: dict[str, Any]) -> None:
    etag = f'"{job["result"]["sha256"]}"'
    headers = {"range": "bytes=0-9"}
    assert api.http.get(job["links"]["result"], headers={**headers, "if-range": etag}).status_code == 206
    whole = api.http.get(job["links"]["result"], headers={**headers, "if-range": '"other"'})
    assert (whole.status_code, len(whole.content)) == (200, job["result"]["bytes"])


def test_an_interrupted_download_resumes_where_it_stopped(server: str, flowers: pl.DataFrame, iris_onnx: Any) -> None:
    assert httpx2.put(f"{server}/v1/models/ranges", content=iris_onnx.read_bytes()).is_success
    body = encoded(pl.concat([flowers] * 100), "csv")
    answer = httpx2.post(f"{server}/v1/predict?model=ranges", content=body, headers={"prefer": "wait=30"}, timeout=40)
    job = ok(answer)
    url = server + job["links"]["result"]
    with httpx2.stream("GET", url) as stream:
        beginning = next(stream.iter_raw(1000))
        etag = stream.headers["etag"]
    rest = httpx2.get(url, headers={"range": f"bytes={len(beginning)}-", "if-range": etag})
    assert rest.status_code == 206
    assert hashlib.sha256(beginning + rest.content).hexdigest() == job["result"]["sha256"]


# --- conversion ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wanted", [name for name in TYPES if name != "csv"])
@pytest.mark.parametrize("by", ["query", "accept"])
def test_a_csv_result_is_converted_and_numbers_are_numbers(
    api: Api, people: dict[str, Any], wanted: str, by: str
) -> None:
    if by == "query":
        answer = api.http.get(people["links"]["result"], params={"format": wanted})
    else:
        answer = api.http.get(people["links"]["result"], headers={"accept": TYPES[wanted]})
    assert answer.status_code == 200
    assert answer.headers["content-type"] == TYPES[wanted]
    assert answer.headers["content-disposition"].startswith(f'attachment; filename="{people["id"]}.')
    assert "accept" in answer.headers["vary"].lower()
    table = decoded(answer.content, wanted)
    probabilities = table.select("probability_rare", "probability_regular")
    assert all(dtype.is_float() for dtype in probabilities.dtypes)
    assert probabilities.sum_horizontal().to_list() == pytest.approx([1, 1, 0], abs=1e-5)
    assert table["id"].to_list() == ["007", "008", "009"]  # text stays text
    assert table["age"].to_list() == [30, None, 61]
    assert table["city"].to_list() == ["Bern", "Biel", None]
    assert table["prediction"].to_list() == ["regular", "rare", None]


@pytest.mark.parametrize("given", ["jsonl", "json", "parquet", "arrow", "arrows"])
def test_results_of_all_formats_convert_to_all_others(api: Api, flowers: pl.DataFrame, given: str) -> None:
    job = api.run(encoded(flowers, given), "iris")
    own = decoded(api.result(job).content, given)
    assert own.height == 150
    for wanted in TYPES:
        converted = decoded(api.result(job, format=wanted).content, wanted)
        assert_frame_equal(converted, own, check_dtypes=False, rel_tol=1e-6)
    assert not any(name.startswith("conversions/") for name in api.stored())


def test_a_conversion_has_its_own_tag_and_ignores_ranges(api: Api, job: dict[str, Any]) -> None:
    plain, converted = api.result(job), api.result(job, format="jsonl")
    assert plain.headers["etag"] != converted.headers["etag"]
    assert "repr-digest" not in converted.headers
    assert converted.content.count(b"\n") == 150


@pytest.mark.parametrize(
    ("accept", "media_type"),
    [
        ("*/*", "text/csv"),
        ("text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8", "text/csv"),
        ("application/json, text/plain, */*", "text/csv"),
        ("application/vnd.apache.parquet, */*;q=0.1", TYPES["parquet"]),
        ("application/parquet", TYPES["parquet"]),
        ("application/json;q=0.5, application/x-ndjson", TYPES["jsonl"]),
        ("text/csv;q=0, application/json;q=0.5", TYPES["json"]),
        ("text/*", "text/csv"),
        ("application/*", TYPES["jsonl"]),
        ("image/png, text/csv;q=0.1", "text/csv"),
        ("TEXT/CSV; charset=utf-8", "text/csv"),
    ],
)
def test_accept_chooses_the_format(api: Api, job: dict[str, Any], accept: str, media_type: str) -> None:
    answer = api.http.get(job["links"]["result"], headers={"accept": accept})
    assert (answer.status_code, answer.headers["content-type"].partition(";")[0]) == (200, media_type)


def test_the_query_takes_precedence_over_accept(api: Api, job: dict[str, Any]) -> None:
    answer = api.http.get(job["links"]["result"], params={"format": "csv"}, headers={"accept": "application/json"})
    assert answer.headers["content-type"].startswith("text/csv")


@pytest.mark.parametrize("accept", ["image/png", "text/csv;q=0", "application/x-npy", "", "nonsense;;q=;"])
def test_a_format_that_is_not_available_is_refused_with_the_available_ones(
    api: Api, job: dict[str, Any], accept: str
) -> None:
    detail = problem(api.http.get(job["links"]["result"], headers={"accept": accept}), 406, "not-acceptable")["detail"]
    assert all(media_type in detail for media_type in TYPES.values())


def test_an_unknown_format_is_refused_with_the_known_ones(api: Api, job: dict[str, Any]) -> None:
    answer = api.http.get(job["links"]["result"], params={"format": "xlsx"})
    assert "csv, jsonl, json, parquet" in problem(answer, 422, "invalid-options")["detail"]
    answer = api.http.get(job["links"]["result"], params={"format": "npy"})
    assert "csv, jsonl, json, parquet" in problem(answer, 406, "not-acceptable")["detail"]


def test_arrays_are_not_converted_to_tables(api: Api, flowers: pl.DataFrame) -> None:
    job = api.run(encoded(flowers.drop("flower"), "npz"), "iris")
    detail = problem(api.http.get(f"/v1/download/{job['id']}?format=csv"), 406, "not-acceptable")["detail"]
    assert "npz" in detail
    assert "parquet" not in detail


# --- errors and input ------------------------------------------------------------------------------------------------


def test_errors_come_as_json_lines_or_csv(api: Api, people: dict[str, Any]) -> None:
    message = "no value for 'city', and the model needs one"
    lines = api.http.get(people["links"]["errors"])
    assert lines.headers["content-type"] == "application/x-ndjson"
    assert api.errors(people) == [
        {"record": 2, "key": "009", "column": "city", "code": "missing-value", "message": message}
    ]
    table = api.http.get(people["links"]["errors"], headers={"accept": "text/csv"})
    assert table.headers["content-type"].startswith("text/csv")
    assert table.text == f'record,key,column,code,message\n2,009,city,missing-value,"{message}"\n'


@pytest.mark.parametrize(
    ("accept", "format"),
    [
        ("text/csv;q=0", "application/x-ndjson"),
        ("application/x-ndjson, text/csv;q=0.1", "application/x-ndjson"),
        ("*/*", "application/x-ndjson"),
        ("application/x-ndjson;q=0.5, TEXT/CSV", "text/csv"),
    ],
)
def test_accept_chooses_the_form_of_errors_by_its_qualities(
    api: Api, people: dict[str, Any], accept: str, format: str
) -> None:
    errors = api.http.get(people["links"]["errors"], headers={"accept": accept})
    assert errors.headers["content-type"].partition(";")[0] == format


@pytest.mark.parametrize("query", ["", "?csv_escape=false"])
def test_an_accept_in_two_lines_is_one_list(api: Api, job: dict[str, Any], query: str) -> None:
    accept = [("accept", "image/webp"), ("accept", "*/*")]
    assert api.http.get(job["links"]["result"] + query, headers=accept).status_code == 200


def test_a_job_without_failed_records_has_an_empty_list_of_errors(api: Api, job: dict[str, Any]) -> None:
    lines = api.http.get(job["links"]["errors"])
    assert (lines.status_code, lines.content) == (200, b"")
    table = api.http.get(job["links"]["errors"], headers={"accept": "text/csv"})
    assert table.text == "record,key,column,code,message\n"


def test_the_input_comes_back_byte_for_byte(api: Api, people: dict[str, Any]) -> None:
    answer = api.http.get(people["links"]["input"])
    assert answer.content == PEOPLE.encode()
    assert answer.headers["etag"] == f'"{people["input"]["sha256"]}"'
    part = api.http.get(people["links"]["input"], headers={"range": "bytes=0-1"})
    assert (part.status_code, part.content) == (206, b"id")


# --- partial results -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", TYPES)
def test_the_finished_prefix_of_a_failed_job_is_given_on_request_and_marked(
    in_order: Api, flowers: pl.DataFrame, format: str
) -> None:
    many = pl.concat([flowers] * 4)
    broken = many.with_columns(
        pl.when(pl.int_range(pl.len()) == 555)
        .then(None)
        .otherwise(pl.col("petal width (cm)"))
        .alias("petal width (cm)")
    )
    job = in_order.run(encoded(broken, format), "iris", on_row_error="fail")
    assert (job["state"], job["reason"], job["result"]) == ("failed", "too-many-row-errors", None)
    body = problem(in_order.http.get(job["links"]["result"]), 404, "result-not-ready")
    assert (body["state"], "partial=true" in body["detail"]) == ("failed", True)
    answer = in_order.result(job, partial="true")
    table = decoded(answer.content, format)
    rows = table.height
    assert rows in (100, 200, 300, 400, 500, 600)
    assert answer.headers["batchserve-incomplete"].startswith(f"rows 0-{rows - 1}/")
    assert f"{job['id']}-partial." in answer.headers["content-disposition"]
    assert "etag" not in answer.headers
    whole = decoded(in_order.result(in_order.run(encoded(many, format), "iris")).content, format)
    if rows <= 500:
        assert_frame_equal(table, whole[:rows])
    problem(in_order.http.get(job["links"]["errors"]), 404, "result-not-ready")
    errors = in_order.http.get(job["links"]["errors"], params={"partial": "true"})
    assert [error["record"] for error in decoded(errors.content, "jsonl").to_dicts()] == [555]  # also after a gap


def test_a_partial_result_is_not_converted(api: Api) -> None:
    body = CSV + b"5.1,3.5,1.4,0.2\n" * 150 + b",,,\n"
    job = api.run(body, "iris", on_row_error="fail")
    answer = api.http.get(job["links"]["result"], params={"partial": "true", "format": "json"})
    assert "csv" in problem(answer, 422, "invalid-options")["detail"]


def test_partial_gives_the_whole_of_a_finished_job(api: Api, job: dict[str, Any]) -> None:
    answer = api.result(job, partial="true")
    assert answer.headers["etag"] == f'"{job["result"]["sha256"]}"'
    assert "batchserve-incomplete" not in answer.headers


# --- spreadsheets ----------------------------------------------------------------------------------------------------

FORMULAS = ["=1+1", "+A1", "-A1", "@SUM(A1)", "\tx", "-5", "+1.5e3", "x=1", ""]


@pytest.fixture(scope="module")
def formulas(api: Api) -> dict[str, Any]:
    """A job whose input has formulas in its texts and in the name of a column, a number with unusual digits, and a
    record that fails, with a formula for its key."""
    names = ["=cmd", *("sepal length (cm)", "sepal width (cm)", "petal length (cm)", "petal width (cm)"), "note"]
    rows = [[text, "5.10", "3.5", "1.4", "0.2", "1.50"] for text in FORMULAS]
    body = pl.DataFrame([*rows, ["=key", "wide", "3", "1", "1", ""]], schema=names, orient="row").write_csv()
    return api.run(body, "iris", passthrough="all", key="=cmd")


def test_a_result_for_a_spreadsheet_has_no_formulas_and_the_same_numbers(api: Api, formulas: dict[str, Any]) -> None:
    plain = pl.read_csv(api.result(formulas).content, infer_schema=False)
    answer = api.result(formulas, csv_escape=True)
    escaped = pl.read_csv(answer.content, infer_schema=False)
    assert plain.columns[0] == "=cmd"
    assert escaped.columns == ["'=cmd", *plain.columns[1:]]
    wanted = ["'=1+1", "'+A1", "'-A1", "'@SUM(A1)", "'\tx", "-5", "+1.5e3", "x=1"]
    assert escaped["'=cmd"].to_list()[:8] == wanted
    assert escaped[:, 1:].equals(plain[:, 1:])
    assert set(escaped["note"][:9]) == {"1.50"}
    assert answer.headers["etag"] == f'"{formulas["result"]["sha256"]}-csv-escaped"'


@pytest.mark.parametrize("format", ["jsonl", "parquet", "arrow"])
def test_a_conversion_to_csv_for_a_spreadsheet_has_no_formulas(api: Api, formulas: dict[str, Any], format: str) -> None:
    body = decoded(api.result(formulas).content, "csv").rename({"prediction": "before"})
    job = api.run(encoded(body, format), "iris", passthrough=["=cmd"])
    assert job["state"] == "completed", job["error"]
    escaped = pl.read_csv(api.result(job, format="csv", csv_escape=True).content, infer_schema=False)
    assert escaped["'=cmd"].to_list()[:4] == ["'=1+1", "'+A1", "'-A1", "'@SUM(A1)"]


def test_failed_records_for_a_spreadsheet_have_no_formulas(api: Api, formulas: dict[str, Any]) -> None:
    answer = api.http.get(formulas["links"]["errors"], params={"csv_escape": True}, headers={"accept": "text/csv"})
    header, line = answer.text.splitlines()
    assert header == "record,key,column,code,message"
    assert line.startswith("9,'=key,sepal length (cm),")
    assert ",=key," in api.http.get(formulas["links"]["errors"], headers={"accept": "text/csv"}).text


def test_only_csv_is_escaped(api: Api, formulas: dict[str, Any]) -> None:
    answer = api.http.get(formulas["links"]["result"], params={"csv_escape": True, "format": "parquet"})
    assert "format=csv" in problem(answer, 422, "invalid-options")["detail"]


# --- storages without files on this host -----------------------------------------------------------------------------


def test_a_result_that_is_not_a_file_of_this_host_supports_ranges(remote_api: Api, flowers: pl.DataFrame) -> None:
    job = remote_api.run(encoded(flowers, "csv"), "iris")
    whole = remote_api.result(job)
    assert len(decoded(whole.content, "csv")) == 150
    assert whole.headers["content-length"] == str(len(whole.content))
    assert remote_api.http.get(job["links"]["input"]).content == encoded(flowers, "csv")
    for header, expected in [("bytes=0-9", whole.content[:10]), ("bytes=-20", whole.content[-20:])]:
        answer = remote_api.http.get(job["links"]["result"], headers={"range": header})
        assert (answer.status_code, answer.content) == (206, expected)
    known = {"if-none-match": whole.headers["etag"]}
    assert remote_api.http.get(job["links"]["result"], headers=known).status_code == 304
    assert len(decoded(remote_api.result(job, format="parquet").content, "parquet")) == 150


def test_a_result_whose_digest_is_unknown_has_its_own_etag(remote_api: Api, flowers: pl.DataFrame) -> None:
    job = remote_api.run(encoded(flowers, "csv"), "iris")
    database = Database(remote_api.settings.database_url)
    with database.write() as connection:
        connection.execute(update(jobs).where(jobs.c.id == job["id"]).values(result_sha256=None))
    database.close()
    assert remote_api.job(job["id"])["result"]["sha256"] is None
    answer = remote_api.result(job)
    assert answer.headers["etag"] == f'"results-{job["id"]}-1"'
    assert "repr-digest" not in answer.headers
    known = {"if-none-match": answer.headers["etag"]}
    assert remote_api.http.get(job["links"]["result"], headers=known).status_code == 304
    assert remote_api.result(job, format="jsonl").headers["etag"] == f'"results-{job["id"]}-1-jsonl"'


def test_a_download_redirects_to_a_result_that_clients_can_fetch_themselves(
    tmp_path: Path, iris_onnx: Path, flowers: pl.DataFrame, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runtime, "open_storage", partial(RemoteStorage, site="https://bucket.example"))
    with running(tmp_path, inline_bytes=0) as api:
        api.register("iris", iris_onnx)
        job = api.run(encoded(flowers, "csv"), "iris")
        kept = api.http.get(job["links"]["result"], follow_redirects=False)
        answer = api.http.get(job["links"]["result"], params={"redirect": True}, follow_redirects=False)
        head = api.http.head(job["links"]["result"], params={"redirect": True}, follow_redirects=False)
        assert api.result(job, format="jsonl", redirect=True).text.count("\n") == 150
    assert (kept.status_code, head.status_code) == (200, 200)
    assert answer.status_code == 307
    assert answer.headers["location"] == f"https://bucket.example/results/{job['id']}-1"
