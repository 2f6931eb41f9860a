"""Any value of any type, in every option, query, header and body, gets a 2xx or a 4xx, and the queue continues."""

import json
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx2
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from service import Api, ok, problem, running

from batchserve.api.schemas.options import OnlineOptions
from batchserve.domain import ReadOptions
from batchserve.options import METADATA_BYTES, PredictOptions

CSV = b"sepal length (cm),sepal width (cm),petal length (cm),petal width (cm)\n5.1,3.5,1.4,0.2\n"

ODD = [
    "inf", "-inf", "nan", "1e400", "-1e400", "1e308", "NaN", "Infinity", "-0", "9" * 400, "9" * 5000, "-1", "0.5",
    "1e-320", str(2**31), str(2**53), str(2**63), str(2**64), str(2**70), "", " ", "\0", "a\0b", "null", "true", "[]",
    "{}", '"', "[" * 2000, '{"a":' * 500, '["\\ud800"]', '{"\\ud800": "a"}', '{"a": "\\udfff"}', '{"a": "\\u0000"}',
    '{"a": NaN}', '{"a": 1e400}', f'{{"a": {2**64}}}', f'{{"a": {"9" * 400}}}', '{"a": {}}', '{"a": null}',
    "0001-01-01T00:00:00+14:00", "0001-01-01T00:00:00-14:00", "9999-12-31T23:59:59-14:00", "9999-12-31T23:59:59+14:00",
    "2999-12-31T23:59:59Z", "1969-12-31T23:59:59Z", "2026-01-01", "-62135596800", "253402300800", "unused", "csv",
    "iris", "iris@1", "iris@0", "iris@999999999999", "iris@\u0661", "é", "\U0001f600", "\ufffd", "a" * 300, "a" * 5000,
    "a,b", "sepal length (cm)", "../..", "%", "%00", "wait=inf", "wait=-1", "\u2028", "\x7f", "bytes=0-", "*/*;q=nan",
]  # fmt: skip

texts = st.sampled_from(ODD) | st.text(max_size=40) | st.floats().map(str) | st.integers().map(str)
"""Values in a query: text that is UTF-8."""

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | texts | st.text(st.characters(), max_size=10)
    | st.sampled_from([2**63, 2**64, -(2**70), 1e308, "\ud800", "a\0", "\udfff" * 3]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10) | st.just("\ud800"), inner,
                                                                max_size=4),
    max_leaves=8,
)  # fmt: skip
"""Values in JSON."""

OPTIONS = sorted(PredictOptions.model_fields)
READ = list(ReadOptions.__dataclass_fields__)
QUERIES = {
    "/v1/upload": [*READ, "filename", "model"],
    "/v1/predict": [*OPTIONS, *READ, "filename", "state"],
    "/v1/models/iris/predict": sorted(OnlineOptions.model_fields),
    "/v1/models/iris/validate": sorted(OnlineOptions.model_fields),
    "/v1/jobs": ["state", "model", "q", "limit", "after"],
    "/v1/jobs/{job}": ["wait"],
    "/v1/download/{job}": ["format", "partial", "csv_escape", "wait"],
    "/v1/download/{job}/errors": ["partial", "format", "csv_escape"],
}
POSTED = ("/v1/upload", "/v1/predict", "/v1/models/iris/predict", "/v1/models/iris/validate")
HEADERS = ["idempotency-key", "prefer", "last-event-id", "if-none-match", "content-disposition", "content-type",
           "accept", "range", "content-digest", "content-encoding", "authorization", "if-match", "if-range",
           ]  # fmt: skip


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, iris_onnx: Path) -> Iterator[Api]:
    with running(tmp_path_factory.mktemp("property"), poll=0.02) as api:
        api.register("iris", iris_onnx)
        yield api


@pytest.fixture(autouse=True)
def queue_that_goes_on(served: Api) -> Iterator[None]:
    """After any request of a test, a new job completes."""
    yield
    assert served.run(CSV, "iris")["state"] == "completed"


def query_of(pairs: dict[str, str]) -> str:
    return "&".join(f"{name}={quote(value, safe='')}" for name, value in pairs.items())


def encoded(value: Any) -> bytes:
    """JSON as written by careless clients: with NaN, infinities and lone surrogates."""
    return json.dumps(value).encode()


def checked(answer: httpx2.Response) -> httpx2.Response:
    assert answer.status_code < 500, answer.text
    if answer.status_code >= 400:
        assert answer.headers["content-type"] == "application/problem+json"
        assert json.loads(answer.content)["detail"]
    return answer


def still_works(api: Api, *answers: httpx2.Response) -> None:
    """Each created job can be shown, and so can lists."""
    for answer in answers:
        if answer.status_code in (200, 201, 202) and "id" in (body := answer.json()):
            shown = ok(api.http.get(f"/v1/jobs/{body['id']}"))
            assert shown["id"] == body["id"]
    ok(api.http.get("/v1/jobs", params={"limit": 200}))


def try_query(api: Api, path: str, pairs: dict[str, str]) -> None:
    job_id = api.run(CSV, "iris", reuse=True)["id"]
    base = {"model": "iris"} if path == "/v1/predict" else {}
    url = f"{path.format(job=job_id)}?{query_of(base | pairs)}"
    if path in POSTED:
        answer = checked(api.http.post(url, content=CSV, headers={"content-type": "text/csv"}))
    else:
        answer = checked(api.http.get(url))
    still_works(api, *([answer] if path in POSTED[:2] else []))


def try_body(api: Api, options: dict[str, Any], raw: Any) -> None:
    job_id = api.upload(CSV)["id"]
    json_type = {"content-type": "application/json"}
    answers = [
        checked(api.http.post(url, content=content, headers=json_type))
        for url, content in (
            (f"/v1/predict/{job_id}", encoded({"model": "iris", **options})),
            (f"/v1/predict/{job_id}", encoded(raw)),
            (f"/v1/jobs/{job_id}/retry", encoded({"rows": raw})),
            ("/v1/jobs/predict", encoded({"model": "iris", **options})),
        )
    ]
    for path in POSTED[2:]:
        checked(api.http.post(path, content=encoded(raw), headers=json_type))
    still_works(api, *answers[:3])


def try_headers(api: Api, headers: dict[str, str]) -> None:
    given = [(name.encode(), value.encode("latin-1", "replace")) for name, value in headers.items()]
    job_id = api.run(CSV, "iris", reuse=True)["id"]
    answers = [checked(api.http.post("/v1/predict?model=iris", content=CSV, headers=given))]
    for path in (f"/v1/jobs/{job_id}", f"/v1/jobs/{job_id}/events", f"/v1/download/{job_id}", "/v1/jobs"):
        checked(api.http.get(path, headers=given))
    still_works(api, *answers)


places = st.sampled_from([(path, name) for path, names in QUERIES.items() for name in names])
QUICK: dict[str, Any] = {"deadline": None, "suppress_health_check": list(HealthCheck)}
LONG = pytest.param(800, marks=[pytest.mark.slow, pytest.mark.timeout(600)])


@pytest.mark.parametrize("examples", [50, LONG])
def test_any_value_in_any_query_is_answered_and_stops_nothing(served: Api, examples: int) -> None:
    @settings(max_examples=examples, **QUICK)
    @given(places, texts, st.dictionaries(st.sampled_from(OPTIONS), texts, max_size=2))
    def holds(place: tuple[str, str], value: str, more: dict[str, str]) -> None:
        path, name = place
        try_query(served, path, (more if path == "/v1/predict" else {}) | {name: value})

    holds()


@pytest.mark.parametrize("examples", [25, LONG])
def test_any_value_in_any_body_is_answered_and_stops_nothing(served: Api, examples: int) -> None:
    @settings(max_examples=examples, **QUICK)
    @given(st.dictionaries(st.sampled_from(OPTIONS), values, min_size=1, max_size=3), values)
    def holds(options: dict[str, Any], raw: Any) -> None:
        try_body(served, options, raw)

    holds()


@pytest.mark.parametrize("examples", [25, LONG])
def test_any_value_in_any_header_is_answered_and_stops_nothing(served: Api, examples: int) -> None:
    @settings(max_examples=examples, **QUICK)
    @given(st.dictionaries(st.sampled_from(HEADERS), texts, min_size=1, max_size=2))
    def holds(headers: dict[str, str]) -> None:
        try_headers(served, headers)

    holds()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_each_odd_value_in_each_place_is_answered_and_stops_nothing(served: Api) -> None:
    for path, names in QUERIES.items():
        for name in names:
            for value in ODD:
                base = {"model": "iris"} if path == "/v1/predict" and name != "model" else {}
                url = f"{path.format(job='x')}?{query_of(base | {name: value})}"
                post = path in POSTED
                checked(served.http.post(url, content=CSV) if post else served.http.get(url))
        still_works(served)


# --- refusals with a reason ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("max_errors", "inf", "max_errors"),
        ("max_errors", "1e400", "max_errors"),
        ("max_errors", "nan", "max_errors"),
        ("top_k", str(2**63), "top_k"),
        ("run_after", "0001-01-01T00:00:00+14:00", "1970 to 2999"),
        ("run_after", "9999-12-31T23:59:59-14:00", "1970 to 2999"),
        ("metadata", json.dumps({"a": "é" * (METADATA_BYTES // 2)}), "16384 bytes"),
        ("metadata", '{"a": "\\ud800"}', "lone surrogate"),
        ("metadata", '{"\\ud800": "a"}', "lone surrogate"),
        ("columns", '["\\ud800"]', "lone surrogate"),
        ("passthrough", '["a\\u0000"]', "NUL"),
        ("passthrough", json.dumps(["a"] * 16_385), "16384"),
        ("key", "a\0", "NUL"),
        ("key", "k" * 4097, "4096"),
        ("model", "m" * 257, "256"),
        ("inputs", '{"a": "\\ud800"}', "lone surrogate"),
        ("inputs", '{"a": NaN}', "NaN"),
        ("filename", "a\0b", "NUL"),
    ],
)
def test_a_value_beyond_its_bounds_is_named_and_leaves_nothing(served: Api, option: str, value: str, said: str) -> None:
    with served.unchanged():
        if len(value) < 20_000:
            answer = served.http.post(f"/v1/predict?{query_of({'model': 'iris', option: value})}", content=CSV)
            assert said in problem(answer, 422, "invalid-options")["detail"]
    if option == "filename":
        return
    job_id = served.upload(CSV)["id"]
    given = json.dumps({"model": "iris", option: value}).encode()
    assert said in problem(served.http.post(f"/v1/predict/{job_id}", content=given), 422, "invalid-options")["detail"]
    assert served.job(job_id)["state"] == "uploaded"


@pytest.mark.parametrize("name", ["q", "after", "model"])
@pytest.mark.parametrize("value", ["a\0", "a" * 2000])
def test_an_invalid_parameter_of_a_list_is_refused(served: Api, name: str, value: str) -> None:
    problem(served.http.get(f"/v1/jobs?{query_of({name: value})}"), 422, "invalid-options")


@pytest.mark.parametrize("moment", [datetime(1970, 1, 1, tzinfo=UTC), datetime(2999, 12, 31, 23, 59, 59, tzinfo=UTC)])
def test_run_after_may_be_at_either_end_of_its_range(served: Api, moment: datetime) -> None:
    answer = served.http.post("/v1/predict", params={"model": "iris", "run_after": moment.isoformat()}, content=CSV)
    job_id = answer.json()["id"]
    assert answer.json()["options"]["run_after"].startswith(str(moment.year))
    ok(served.http.get("/v1/jobs"))
    served.http.delete(f"/v1/jobs/{job_id}")


def test_metadata_up_to_its_bound_is_kept(served: Api) -> None:
    job_id = served.upload(CSV)["id"]
    metadata = {"a": "x" * (METADATA_BYTES - 1)}
    answer = served.http.post(f"/v1/predict/{job_id}", json={"model": "iris", "metadata": metadata})
    assert answer.status_code in (200, 202), answer.text
    assert served.job(job_id)["metadata"] == metadata


@pytest.mark.parametrize("charset", ["undefined", "idna", "punycode", "hex", "a\0b", "utf-16", "no-such"])
def test_a_file_name_in_an_odd_encoding_is_not_a_server_error(served: Api, charset: str) -> None:
    header = f"attachment; filename*={charset}''a%ffb%00".encode("latin-1")
    answer = served.http.post("/v1/upload", content=CSV, headers=[(b"content-disposition", header)])
    assert checked(answer).status_code in (201, 400, 422)
