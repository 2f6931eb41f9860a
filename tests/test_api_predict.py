import multiprocessing
import os
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import orjson
import polars as pl
import pytest
from polars.testing import assert_frame_equal
from selection import quick_first
from service import Api, decoded, encoded, ok, problem, running

CSV = b"sepal length (cm),sepal width (cm),petal length (cm),petal width (cm)\n5.1,3.5,1.4,0.2\n"
TABLES = ("csv", "jsonl", "json", "parquet", "arrow", "arrows")
PEOPLE = "age,city,visits,name\n30,Bern,7,Ada\n,Biel,3,Ben\n61,Genf,11,Cy\n"


def unlike(model: Path) -> bytes:
    """The same model in other bytes."""
    graph = onnx.load(model)
    graph.doc_string = "another version"
    return bytes(graph.SerializeToString())


@pytest.fixture(scope="module")
def sums(api: Api) -> str:
    """A model of two columns without names: a + 10 b."""
    text = """<ir_version: 8, opset_import: ["": 17]>
        sums (float[N, 2] x) => (float[N, 1] total) <float[2, 1] weights = {1.0, 10.0}> {
            total = MatMul(x, weights)
        }"""
    api.register("sums", onnx.parser.parse_model(text).SerializeToString())
    return "sums"


# --- one job, once ---------------------------------------------------------------------------------------------------


def test_predict_queues_the_job_and_answers_at_once(idle_api: Api) -> None:
    job = idle_api.upload(CSV)
    answer = idle_api.http.post(f"/v1/predict/{job['id']}?model=iris")
    queued = ok(answer, 202)
    assert answer.headers["location"] == f"/v1/jobs/{job['id']}"
    assert int(answer.headers["retry-after"]) >= 1
    assert (queued["state"], queued["attempt"]) == ("queued", 0)
    assert queued["queue_position"] >= 0
    assert (queued["model"]["name"], queued["model"]["version"]) == ("iris", 1)
    assert queued["queued_at"] is not None


def kill_next_process(known: set[int]) -> int:
    """Kills the next scoring process while it is starting."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        for process in multiprocessing.active_children():
            if process.pid not in known and process.pid is not None:
                process.kill()
                return process.pid
        time.sleep(0.01)
    raise AssertionError("no process was started")


@pytest.mark.parametrize(
    ("method", "path", "status"),
    quick_first(
        [
            ("POST", "/v1/models/iris/predict", 200),
            ("POST", "/v1/predict?model=iris", 202),
            ("PUT", "/v1/models/next", 201),
        ],
        1,
    ),
)
def test_a_valid_request_is_not_refused_because_its_scoring_process_was_killed(
    tmp_path: Path, iris_onnx: Path, method: str, path: str, status: int
) -> None:
    body = iris_onnx.read_bytes() + b"\xa2\x06\x00" if method == "PUT" else CSV  # with a field that onnx does not know
    others = set(multiprocessing.active_children())
    with running(tmp_path, worker=False) as api, ThreadPoolExecutor() as pool:
        api.register("iris", iris_onnx)
        for process in set(multiprocessing.active_children()) - others:
            process.kill()  # the next call starts a new one
            os.waitid(os.P_PID, process.pid or 0, os.WEXITED | os.WNOWAIT)
        known = {process.pid or 0 for process in multiprocessing.active_children()}
        killed = pool.submit(kill_next_process, known)
        ok(api.http.request(method, path, content=body), status)
        assert killed.result() not in known


def test_a_repeated_predict_gives_the_same_job_and_never_a_second_run(api: Api) -> None:
    job = api.upload(CSV)
    url = f"/v1/predict/{job['id']}?model=iris&reuse=false"
    first = api.http.post(url)
    assert first.status_code == 202
    again = api.http.post(url, headers={"prefer": "wait=30"})
    done = ok(again)
    assert done["state"] == "completed"
    finished = api.http.post(url)
    assert (finished.status_code, finished.json()) == (200, done)
    assert [attempt["number"] for attempt in done["attempts"]] == [1]
    assert "retry-after" not in finished.headers


def test_the_first_predict_of_a_job_meets_it_as_it_is_now(idle_api: Api, iris_onnx: Path) -> None:
    """Also where this server has the upload in memory, and another request has changed the job meanwhile."""
    idle_api.register("newer", iris_onnx)
    job = idle_api.upload(CSV)
    assert job["id"] in ok(idle_api.http.post("/v1/jobs/predict?model=newer"), 202)["jobs"]
    idle_api.register("newer", unlike(iris_onnx))  # a newer version does not make it another request
    for query in ("", "?model=newer"):
        again = ok(idle_api.http.post(f"/v1/predict/{job['id']}{query}"), 202)
        assert (again["id"], again["model"]["version"]) == (job["id"], 1)


@pytest.mark.parametrize("query", ["model=iris", "model=none"])
def test_a_job_that_was_deleted_before_its_first_predict_is_not_found(idle_api: Api, query: str) -> None:
    job = idle_api.upload(CSV)
    assert idle_api.http.delete(job["links"]["self"]).status_code == 204
    problem(idle_api.http.post(f"/v1/predict/{job['id']}?{query}"), 404, "job-not-found")


@pytest.mark.parametrize(
    "other", ["format=jsonl", "priority=5", 'metadata={"a":"b"}', "passthrough=all", "run_after=2030-01-01T00:00:00Z"]
)
def test_other_options_make_a_new_job_on_the_same_input_once(idle_api: Api, other: str) -> None:
    job = idle_api.upload(CSV)
    url = f"/v1/predict/{job['id']}?model=iris"
    queued = ok(idle_api.http.post(url), 202)
    stored = {key for key in idle_api.stored() if key.startswith("inputs/")}
    answer = idle_api.http.post(f"{url}&{other}")
    beside = ok(answer, 202)
    assert beside["id"] != job["id"]
    assert answer.headers["location"].endswith(f"/v1/jobs/{beside['id']}")
    assert (beside["input"], beside["state"]) == (queued["input"], "queued")
    assert {key for key in idle_api.stored() if key.startswith("inputs/")} == stored
    with idle_api.unchanged():
        assert ok(idle_api.http.post(f"{url}&{other}"), 202) == beside | {"queue_position": beside["queue_position"]}
        assert ok(idle_api.http.post(url), 202)["id"] == queued["id"]
        assert ok(idle_api.http.post(f"/v1/predict/{beside['id']}?model=iris"), 202)["id"] == queued["id"]


def test_two_models_predict_one_upload_and_the_input_is_removed_with_the_last_job(api: Api, iris_onnx: Path) -> None:
    api.register("other", unlike(iris_onnx))
    job = api.upload(CSV)
    first = ok(api.http.post(f"/v1/predict/{job['id']}?model=iris", headers={"prefer": "wait=30"}))
    second = ok(api.http.post(f"/v1/predict/{job['id']}?model=other", headers={"prefer": "wait=30"}))
    assert [done["state"] for done in (first, second)] == ["completed", "completed"]
    assert (first["model"]["name"], second["model"]["name"]) == ("iris", "other")
    assert api.http.delete(first["links"]["self"]).status_code == 204
    assert api.http.get(second["links"]["input"]).content == CSV
    assert api.http.delete(second["links"]["self"]).status_code == 204
    assert f"inputs/{job['id']}" not in api.stored()


def test_options_that_do_not_fit_the_input_make_no_second_job(idle_api: Api) -> None:
    job = idle_api.upload(CSV)
    ok(idle_api.http.post(f"/v1/predict/{job['id']}?model=iris"), 202)
    with idle_api.unchanged():
        url = f"/v1/predict/{job['id']}?model=iris&passthrough=nowhere"
        problem(idle_api.http.post(url), 422, "schema-mismatch")


def test_two_second_predicts_at_once_make_one_job(idle_api: Api) -> None:
    job = idle_api.upload(CSV)
    url = f"/v1/predict/{job['id']}?model=iris"
    ok(idle_api.http.post(url), 202)
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda _: ok(idle_api.http.post(f"{url}&priority=3"), 202)["id"], range(8)))
    assert len(set(answers)) == 1


def test_a_repeated_predict_keeps_its_version_when_a_newer_one_was_registered_meanwhile(
    idle_api: Api, iris_onnx: Path
) -> None:
    idle_api.register("growing", iris_onnx)
    job = idle_api.upload(CSV)
    url = f"/v1/predict/{job['id']}?model=growing"
    ok(idle_api.http.post(url), 202)
    assert idle_api.register("growing", unlike(iris_onnx))["version"] == 2
    assert ok(idle_api.http.post(url), 202)["model"]["version"] == 1
    newer = ok(idle_api.http.post(f"{url}@2"), 202)
    assert (newer["id"] != job["id"], newer["model"]["version"]) == (True, 2)


@pytest.mark.parametrize("reference", ["fading", "fading@1", None])
def test_a_repeated_predict_gives_the_job_also_when_its_model_was_deleted(
    api: Api, iris_onnx: Path, reference: str | None
) -> None:
    api.register("fading", iris_onnx)
    version = ok(api.http.get("/v1/models/fading"))["version"]
    job = api.upload(CSV)
    url = f"/v1/predict/{job['id']}"
    query = {"model": reference.replace("@1", f"@{version}")} if reference else {}
    done = ok(api.http.post(url, params={"model": f"fading@{version}"}, headers={"prefer": "wait=30"}))
    assert api.http.delete(f"/v1/models/fading/versions/{version}").status_code == 204
    assert ok(api.http.post(url, params=query)) == done
    problem(api.http.post(url, params={"model": "fading@9"}), 404, "model-not-found")


def test_a_job_that_was_cancelled_before_it_was_queued_cannot_be_predicted(idle_api: Api) -> None:
    job = idle_api.upload(CSV)
    ok(idle_api.http.post(job["links"]["cancel"]), 202)
    detail = problem(idle_api.http.post(f"/v1/predict/{job['id']}?model=iris"), 409, "job-conflict")["detail"]
    assert "is cancelled and was never queued" in detail


def test_a_version_can_be_pinned(api: Api, iris_onnx: Path) -> None:
    api.register("pinned", iris_onnx)
    assert api.register("pinned", unlike(iris_onnx))["version"] == 2
    assert api.run(CSV, "pinned@1")["model"]["version"] == 1
    assert api.run(CSV, "pinned")["model"]["version"] == 2


@pytest.mark.parametrize("reference", ["rose", "iris@7", "iris@", "iris@x", "@", "iris@99999999999999999999999", "i/s"])
def test_an_unknown_model_is_named_with_the_existing_ones(api: Api, reference: str) -> None:
    job = api.upload(CSV)
    answer = api.http.post(f"/v1/predict/{job['id']}", params={"model": reference})
    detail = problem(answer, 404, "model-not-found")["detail"]
    assert repr(reference) in detail
    assert api.job(job["id"])["state"] == "uploaded"
    with api.unchanged():
        problem(api.http.post("/v1/predict", params={"model": reference}, content=CSV), 404, "model-not-found")


@pytest.mark.parametrize("job_id", ["nope", "01a1f7d8-94a2-73b4-888c-2ac5b95e5d38", "..", "%00"])
def test_an_unknown_job_is_not_found(api: Api, job_id: str) -> None:
    answer = api.http.post(f"/v1/predict/{job_id}?model=iris")
    assert answer.status_code == 404
    assert answer.headers["content-type"] == "application/problem+json"


# --- options ---------------------------------------------------------------------------------------------------------


def test_options_come_by_query_and_by_body_and_the_body_takes_precedence(idle_api: Api) -> None:
    job = idle_api.upload(CSV)
    body = {"format": "jsonl", "passthrough": ["sepal width (cm)"], "metadata": {"night": "2026-11-20"}}
    queued = ok(idle_api.http.post(f"/v1/predict/{job['id']}?model=iris&format=csv&priority=3", json=body), 202)
    assert queued["options"] == {
        "format": "jsonl",
        "passthrough": ["sepal width (cm)"],
        "columns": None,
        "key": None,
        "on_row_error": "continue",
        "max_errors": None,
        "top_k": None,
        "inputs": None,
        "priority": 3,
        "run_after": None,
        "webhook": None,
        "expires_in": None,
        "input_file": False,
    }
    assert queued["metadata"] == {"night": "2026-11-20"}


@pytest.mark.parametrize(
    ("query", "parameter", "said"),
    [
        ("colour=blue", "colour", "there is no such parameter"),
        ("format=xlsx", "format", "csv, jsonl, json, parquet, arrow, arrows, npy, npz, got 'xlsx'"),
        ("top_k=0", "top_k", "greater than or equal to 1"),
        ("priority=101", "priority", "less than or equal to 100, got '101'"),
        ("on_row_error=panic", "on_row_error", "'continue' or 'fail'"),
        ("max_errors=-1", "max_errors", "0"),
        ("run_after=2026-11-20T02:00:00", "run_after", "zone"),
        ("run_after=tomorrow", "run_after", "datetime"),
        ("metadata=[1]", "metadata", "expected a JSON object, got [1]"),
        ('metadata={"a":1}', "metadata.a", "string"),
        ("metadata={", "metadata", "JSON"),
        ("columns={", "columns", "JSON"),
        ("passthrough=[", "passthrough", "JSON"),
        ("metadata=" + orjson.dumps({f"k{i}": "v" for i in range(17)}).decode(), "metadata", "16"),
    ],
)
def test_an_option_that_is_unknown_or_wrong_is_named(idle_api: Api, query: str, parameter: str, said: str) -> None:
    job = idle_api.upload(CSV)
    body = problem(idle_api.http.post(f"/v1/predict/{job['id']}?model=iris&{query}"), 422, "invalid-options")
    assert body["errors"][0]["parameter"].startswith(parameter)
    assert said in body["detail"]
    assert idle_api.job(job["id"])["state"] == "uploaded"


@pytest.mark.parametrize("option", ["priority", "max_errors", "expires_in", "top_k"])
def test_true_is_no_number(idle_api: Api, option: str) -> None:
    job = idle_api.upload(CSV)
    answer = idle_api.http.post(f"/v1/predict/{job['id']}", json={"model": "iris", option: True})
    assert f"{option}: expected a number, got true" in problem(answer, 422, "invalid-options")["detail"]


def test_the_digits_of_a_duration_are_those_of_ascii(idle_api: Api) -> None:
    job = idle_api.upload(CSV)
    answer = idle_api.http.post(f"/v1/predict/{job['id']}", json={"model": "iris", "expires_in": "\u0663d"})
    assert "is not a duration" in problem(answer, 422, "invalid-options")["detail"]


def test_predict_without_a_model_is_refused(api: Api) -> None:
    body = problem(api.http.post(f"/v1/predict/{api.upload(CSV)['id']}"), 422, "invalid-options")
    assert body["detail"] == "model: must be given"
    with api.unchanged():
        problem(api.http.post("/v1/predict", content=CSV), 422, "invalid-options")


@pytest.mark.parametrize(
    ("content", "media_type", "status", "code"),
    [
        (b"{", "application/json", 422, "invalid-options"),
        (b"[1]", "application/json", 422, "invalid-options"),
        (CSV, "text/csv", 415, "unsupported-media-type"),
        (b" " * (2 << 20) + b"{}", "application/json", 413, "payload-too-large"),
    ],
)
def test_a_body_that_is_not_an_object_of_options_is_refused(
    api: Api, content: bytes, media_type: str, status: int, code: str
) -> None:
    job = api.upload(CSV)
    answer = api.http.post(f"/v1/predict/{job['id']}?model=iris", content=content, headers={"content-type": media_type})
    problem(answer, status, code)
    assert api.job(job["id"])["state"] == "uploaded"


@pytest.mark.parametrize("media_type", ["application/json ; charset=utf-8", "Application/JSON", ""])
def test_the_media_type_of_options_is_compared_as_others_are(idle_api: Api, media_type: str) -> None:
    job = idle_api.upload(CSV)
    headers = {"content-type": media_type}
    ok(idle_api.http.post(f"/v1/predict/{job['id']}", content=b'{"model":"iris"}', headers=headers), 202)


# --- waiting ---------------------------------------------------------------------------------------------------------


def test_prefer_wait_answers_when_the_job_is_finished(api: Api) -> None:
    answer = api.http.post("/v1/predict?model=iris&reuse=false", content=CSV, headers={"prefer": "wait=30"})
    assert ok(answer)["state"] == "completed"
    assert answer.headers["preference-applied"] == "wait=30"


def test_prefer_wait_gives_up_after_the_time_it_names(idle_api: Api) -> None:
    started = time.monotonic()
    answer = idle_api.http.post("/v1/predict?model=iris", content=CSV, headers={"prefer": 'respond-async, wait="1"'})
    assert ok(answer, 202)["state"] == "queued"
    assert 0.9 < time.monotonic() - started < 20


@pytest.mark.parametrize(
    "prefer", ["wait=30; foo=bar", "wait = 30", 'a="x,y", WAIT="30"', ("respond-async", "wait=30")]
)
def test_prefer_is_read_by_its_grammar(api: Api, prefer: str | tuple[str, ...]) -> None:
    lines = [("prefer", line) for line in ([prefer] if isinstance(prefer, str) else prefer)]
    for query in ("model=iris&reuse=false", "model=iris&reuse=false&delimiter=,"):
        answer = api.http.post(f"/v1/predict?{query}", content=CSV, headers=lines)
        assert answer.headers["preference-applied"] == "wait=30"


@pytest.mark.parametrize(
    "prefer",
    ['foo="a,wait=3"', "wait=\u0663".encode(), "wait=", "wait=soon", "wait=-1", "handling=strict", ";;,=", "wait"],
)
def test_an_invalid_preference_is_ignored(idle_api: Api, prefer: str | bytes) -> None:
    given = prefer if isinstance(prefer, bytes) else prefer.encode()
    answer = idle_api.http.post("/v1/predict?model=iris", content=CSV, headers=[(b"prefer", given)])
    ok(answer, 202)
    assert "preference-applied" not in answer.headers


def test_a_job_waits_for_its_run_after(api: Api) -> None:
    later = datetime.now(UTC) + timedelta(seconds=1.5)
    answer = api.http.post(
        "/v1/predict", params={"model": "iris", "reuse": False, "run_after": later.isoformat()}, content=CSV
    )
    job = ok(answer, 202)
    assert datetime.fromisoformat(job["options"]["run_after"]) == later
    time.sleep(0.4)
    assert api.job(job["id"])["state"] == "queued"
    done = api.finished(job["id"])
    assert done["state"] == "completed"
    assert datetime.fromisoformat(done["started_at"]) >= later


def test_a_higher_priority_starts_first_and_equal_ones_in_the_order_of_their_age(
    tmp_path: Path, iris_onnx: Path
) -> None:
    with running(tmp_path, worker=False) as api:
        api.register("iris", iris_onnx)
        names = {}
        for name, priority in (("a", 0), ("b", 0), ("c", 9), ("d", -9), ("e", 9)):
            query: dict[str, Any] = {"model": "iris", "priority": priority, "reuse": False}
            job = ok(api.http.post("/v1/predict", params=query, content=CSV), 202)
            names[job["id"]] = name
        places = {name: api.job(job_id)["queue_position"] for job_id, name in names.items()}
        assert places == {"c": 0, "e": 1, "a": 2, "b": 3, "d": 4}
    with running(tmp_path, active_jobs=1) as api:
        jobs = [api.finished(job_id) for job_id in names]
    started = sorted(jobs, key=lambda job: str(job["started_at"]))
    assert "".join(names[job["id"]] for job in started) == "ceabd"


# --- one call --------------------------------------------------------------------------------------------------------


def test_upload_and_predict_go_in_one_call(api: Api) -> None:
    query: dict[str, Any] = {
        "model": "iris",
        "reuse": False,
        "delimiter": ";",
        "filename": "one.csv",
        "format": "jsonl",
    }
    answer = api.http.post("/v1/predict", params=query, content=CSV.replace(b",", b";"), headers={"prefer": "wait=30"})
    job = ok(answer)
    assert (job["state"], job["input"]["filename"], job["result"]["format"]) == ("completed", "one.csv", "jsonl")
    assert orjson.loads(api.result(job).content)["prediction"] == "setosa"


def test_one_call_whose_input_does_not_fit_leaves_nothing(api: Api) -> None:
    with api.unchanged():
        problem(api.http.post("/v1/predict?model=iris", content=b"a,b\n1,2\n"), 422, "schema-mismatch")
        problem(api.http.post("/v1/predict?model=iris&colour=blue", content=CSV), 422, "invalid-options")


def test_one_call_sent_again_with_its_key_gives_the_first_job(api: Api) -> None:
    headers = {"idempotency-key": "one-call"}
    first = api.http.post("/v1/predict?model=iris&reuse=false", content=CSV, headers=headers)
    assert first.status_code == 202
    again = api.http.post("/v1/predict?model=iris&reuse=false", content=CSV, headers=headers)
    assert (again.status_code, again.json()["id"]) == (202, first.json()["id"])
    assert again.headers["idempotency-replayed"] == "true"
    other = api.http.post("/v1/predict?model=iris", content=CSV, headers=headers)
    problem(other, 422, "idempotency-mismatch")


def test_predict_sent_again_with_its_key_gives_the_first_answer(api: Api) -> None:
    job = api.upload(CSV)
    headers = {"idempotency-key": "predict-key"}
    url = f"/v1/predict/{job['id']}?model=iris&reuse=false"
    ok(api.http.post(url, headers=headers), 202)
    ok(api.http.post(url, headers={"prefer": "wait=30"}))
    again = api.http.post(url, headers=headers)
    assert (again.status_code, again.json()["state"]) == (202, "completed")
    problem(api.http.post(f"{url}&format=json", headers=headers), 422, "idempotency-mismatch")


# --- reuse -----------------------------------------------------------------------------------------------------------


def test_an_equal_job_reuses_the_result_of_the_finished_one(api: Api) -> None:
    body = CSV + b"6.1,2.9,4.7,1.4\n"
    first = api.run(body, "iris")
    second = api.run(body, "iris", reuse=True)
    assert second["id"] != first["id"]
    assert (second["state"], second["reused_from"], second["attempt"]) == ("completed", first["id"], 0)
    assert (second["rows"], second["result"]) == (first["rows"], first["result"])
    third = api.run(body, "iris", reuse=True)
    assert third["reused_from"] == first["id"]
    anew = api.run(body, "iris", reuse=False)
    assert (anew["reused_from"], anew["attempt"]) == (None, 1)
    assert anew["result"]["sha256"] == first["result"]["sha256"]
    ok_ids = (first["id"], second["id"], anew["id"])
    for job_id in ok_ids:
        assert api.http.delete(f"/v1/jobs/{job_id}").status_code == 204
    assert api.result(third).text.count("\n") == 3
    assert f"results/{first['id']}-1" in api.stored()
    assert api.http.delete(f"/v1/jobs/{third['id']}").status_code == 204
    assert f"results/{first['id']}-1" not in api.stored()


def test_a_reused_job_has_the_row_errors_too(api: Api) -> None:
    body = CSV + b"6.1,2.9,4.7,\n"
    first, second = api.run(body, "iris"), api.run(body, "iris", reuse=True)
    assert second["reused_from"] == first["id"]
    assert api.errors(second) == api.errors(first) != []


@pytest.mark.parametrize("other", [{"format": "jsonl"}, {"passthrough": "all"}, {"top_k": 1}, {"key": "flower"}])
def test_a_job_with_other_options_is_scored(api: Api, flowers: pl.DataFrame, other: dict[str, Any]) -> None:
    body = encoded(flowers[:3], "csv")
    api.run(body, "iris")
    job = api.run(body, "iris", **other, reuse=True)
    assert (job["reused_from"], job["attempt"]) == (None, 1)


def test_the_same_bytes_with_another_delimiter_are_another_input(api: Api) -> None:
    text = '<ir_version: 8, opset_import: ["": 17]> minus (float[N, 1] x) => (float[N, 1] y) { y = Neg(x) }'
    api.register("minus", onnx.parser.parse_model(text).SerializeToString())
    first = api.run("x\n5\n", "minus", passthrough="none")
    second = api.run("x\n5\n", "minus", passthrough="none", delimiter=";", reuse=True)
    assert api.result(first).text == api.result(second).text == "y\n-5.0\n"
    assert second["reused_from"] is None


# --- inputs that do not fit ------------------------------------------------------------------------------------------


def test_missing_columns_are_named_with_their_types_and_close_names(api: Api) -> None:
    job = api.upload("Age,town,visits\n30,Bern,7\n")
    body = problem(api.http.post(f"/v1/predict/{job['id']}?model=people"), 422, "schema-mismatch")
    errors = {error["column"]: error for error in body["errors"]}
    assert set(errors) == {"age", "city"}
    assert errors["age"]["expected"] == "float32"
    assert "'Age'" in str(errors["age"])
    assert "'city'" in body["detail"]
    assert api.job(job["id"])["state"] == "uploaded"


def test_a_duplicate_column_is_named(api: Api) -> None:
    with api.unchanged():
        answer = api.http.post("/v1/predict?model=people", content="age,city,age,visits\n1,Bern,2,3\n")
        assert "'age' in columns 1, 3" in problem(answer, 422, "invalid-input")["detail"]


def test_text_in_the_first_rows_of_a_numeric_column_is_refused_at_once(api: Api) -> None:
    with api.unchanged():
        answer = api.http.post("/v1/predict?model=people", content="age,city,visits\nold,Bern,7\nyoung,Biel,2\n")
        body = problem(answer, 422, "schema-mismatch")
        assert [error["column"] for error in body["errors"]] == ["age"]
        assert "'old'" in body["detail"] + str(body["errors"])


# --- columns, passthrough, key, top_k --------------------------------------------------------------------------------


def test_columns_choose_and_order_what_a_model_without_names_takes(api: Api, sums: str) -> None:
    body = "a,b,c\n1,2,3\n"
    refused = problem(api.http.post(f"/v1/predict?model={sums}", content=body), 422, "schema-mismatch")
    assert "columns" in refused["detail"]
    assert api.result(api.run(body, sums, columns="a,b")).text == "c,total\n3,21.0\n"
    assert api.result(api.run(body, sums, columns='["c", "a"]')).text == "b,total\n2,13.0\n"


def test_a_mapping_of_columns_gives_their_names_in_the_file(api: Api) -> None:
    body = "alter,stadt,visits\n30,Bern,7\n"
    job = api.run(body, "people", columns='{"age": "alter", "city": "stadt"}')
    expected = api.run("age,city,visits\n30,Bern,7\n", "people")
    assert api.result(job).text == api.result(expected).text


@pytest.mark.parametrize(
    ("options", "columns"),
    [
        ({}, ["name"]),
        ({"passthrough": "unused"}, ["name"]),
        ({"passthrough": "all"}, ["age", "city", "visits", "name"]),
        ({"passthrough": "none"}, []),
        ({"passthrough": "visits,age"}, ["age", "visits"]),
        ({"passthrough": '["name"]'}, ["name"]),
        ({"key": "name", "passthrough": "none"}, ["name"]),
        ({"key": "visits"}, ["visits", "name"]),
        ({"key": "visits", "passthrough": "all"}, ["visits", "age", "city", "name"]),
    ],
)
def test_passthrough_and_key_choose_the_input_columns_of_the_result(
    api: Api, options: dict[str, Any], columns: list[str]
) -> None:
    table = decoded(api.result(api.run(PEOPLE, "people", **options)).content, "csv")
    assert table.columns == [*columns, "prediction", "probability_rare", "probability_regular"]
    assert table["prediction"].to_list() == ["regular", "rare", "regular"]
    if "name" in columns:
        assert table["name"].to_list() == ["Ada", "Ben", "Cy"]


@pytest.mark.parametrize("options", [{"passthrough": "name,shoe"}, {"key": "shoe"}])
def test_an_unknown_column_in_passthrough_or_key_is_named(api: Api, options: dict[str, Any]) -> None:
    with api.unchanged():
        answer = api.http.post("/v1/predict", params={"model": "people", **options}, content=PEOPLE)
        detail = problem(answer, 422, "schema-mismatch")["detail"]
        assert "no column 'shoe'" in detail
        assert "'visits'" in detail


def test_the_key_is_in_each_row_error(api: Api) -> None:
    job = api.run(PEOPLE.replace("Bern", ""), "people", key="name")
    assert api.errors(job) == [
        {"record": 0, "key": "Ada", "column": "city", "code": "missing-value",
         "message": "no value for 'city', and the model needs one"}
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("given", "format"), quick_first([("csv", "csv"), ("jsonl", "csv"), ("jsonl", "jsonl"), ("parquet", "jsonl")], 2)
)
def test_a_key_that_the_model_takes_is_in_row_errors_as_in_the_result(api: Api, given: str, format: str) -> None:
    """The model takes float32, which has neither 1.9 nor 16,777,217."""
    table = pl.DataFrame({"age": [1.9, 16_777_217.0], "city": ["Bern", None], "visits": [1.0, 2.0]})
    table = pl.concat([table, table.with_columns(city=None)], how="vertical_relaxed")
    job = api.run(encoded(table, given), "people", key="age", format=format)
    keys = decoded(api.result(job).content, format)["age"].cast(pl.String).to_list()
    assert keys[:2] == keys[2:]
    assert {entry["record"]: str(entry["key"]) for entry in api.errors(job)} == dict(enumerate(keys[1:], 1))


def test_a_pass_through_column_with_the_name_of_an_output_is_renamed(api: Api) -> None:
    body = PEOPLE.replace("name", "prediction")
    table = decoded(api.result(api.run(body, "people")).content, "csv")
    assert table.columns == ["input_prediction", "prediction", "probability_rare", "probability_regular"]
    assert table["input_prediction"].to_list() == ["Ada", "Ben", "Cy"]


def test_top_k_ranks_the_classes(api: Api) -> None:
    table = decoded(api.result(api.run(CSV, "iris", top_k=2)).content, "csv")
    assert table.columns == ["prediction", "label_1", "probability_1", "label_2", "probability_2"]
    assert table["label_1"].item() == table["prediction"].item() == "setosa"
    assert table["probability_1"].item() > table["probability_2"].item()


@pytest.mark.parametrize(("model", "top_k"), [("iris", 4), ("petals", 1)])
def test_an_impossible_top_k_is_refused_before_anything_runs(api: Api, model: str, top_k: int) -> None:
    with api.unchanged():
        answer = api.http.post(f"/v1/predict?model={model}&top_k={top_k}", content=CSV)
        assert "top_k" in problem(answer, 422, "invalid-options")["detail"]


# --- formats ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def expected(api: Api, flowers: pl.DataFrame) -> pl.DataFrame:
    """The result for all flowers, as one table."""
    answer = ok(api.http.post("/v1/models/iris/predict", content=encoded(flowers[:100], "jsonl")))["prediction"]
    answer += ok(api.http.post("/v1/models/iris/predict", content=encoded(flowers[100:], "jsonl")))["prediction"]
    outputs = ["prediction", "probability_setosa", "probability_versicolor", "probability_virginica"]
    return pl.DataFrame(answer).select("flower", *outputs)


@pytest.mark.parametrize("wanted", TABLES)
@pytest.mark.parametrize("given", TABLES)
def test_any_table_gives_a_result_in_any_table_format(
    api: Api, flowers: pl.DataFrame, expected: pl.DataFrame, given: str, wanted: str
) -> None:
    job = api.run(encoded(flowers, given), "iris", format=wanted)
    assert (job["state"], job["rows"], job["chunks"]["done"]) == (
        "completed",
        {"total": 150, "ok": 150, "failed": 0},
        1 if given == "parquet" else 2,  # a chunk of Parquet may have twice the records
    )
    answer = api.result(job)
    assert answer.headers["content-type"].partition(";")[0] == job["result"]["media_type"]
    table = decoded(answer.content, wanted)
    if given == "csv":  # a CSV has no types: columns that pass through are text
        table = table.with_columns(pl.col("flower").cast(pl.Int64))
    assert_frame_equal(table, expected, check_dtypes=False, rel_tol=1e-6)


@pytest.mark.parametrize("given", ["npy", "npz"])
@pytest.mark.parametrize("wanted", TABLES)
def test_arrays_give_a_result_in_any_table_format(
    api: Api, flowers: pl.DataFrame, expected: pl.DataFrame, given: str, wanted: str
) -> None:
    job = api.run(encoded(flowers.drop("flower"), given), "iris", format=wanted)
    assert job["state"] == "completed", job["error"]
    table = decoded(api.result(job).content, wanted)
    assert_frame_equal(table, expected.drop("flower"), check_dtypes=False, rel_tol=1e-6)


def test_an_npz_result_holds_each_output_unchanged(api: Api, flowers: pl.DataFrame, expected: pl.DataFrame) -> None:
    job = api.run(encoded(flowers.drop("flower"), "npz"), "iris")
    assert (job["state"], job["result"]["format"]) == ("completed", "npz")
    Path(api.settings.storage, "result.npz").write_bytes(api.result(job).content)
    with np.load(Path(api.settings.storage, "result.npz")) as arrays:
        label, probabilities = (arrays[name] for name in arrays.files)
    Path(api.settings.storage, "result.npz").unlink()
    assert label.tolist() == expected["prediction"].to_list()
    assert probabilities.dtype == np.float32
    np.testing.assert_allclose(probabilities, expected.drop("flower", "prediction").to_numpy(), rtol=1e-6)


def test_a_number_for_each_record_may_come_as_npy(api: Api, flowers: pl.DataFrame) -> None:
    three = flowers.drop("flower", "petal width (cm)")
    table = decoded(api.result(api.run(encoded(three, "csv"), "petals")).content, "csv")
    for given in ("npy", "csv", "parquet"):
        job = api.run(encoded(three, given), "petals", format="npy")
        assert job["state"] == "completed", job["error"]
        Path(api.settings.storage, "result.npy").write_bytes(api.result(job).content)
        found = np.load(Path(api.settings.storage, "result.npy"))
        Path(api.settings.storage, "result.npy").unlink()
        np.testing.assert_allclose(found.ravel(), table["prediction"].to_numpy(), rtol=1e-5)


def test_a_result_with_text_cannot_be_npy(api: Api) -> None:
    with api.unchanged():
        answer = api.http.post("/v1/predict?model=iris&format=npy", content=CSV)
        assert "npy" in problem(answer, 422, "invalid-options")["detail"]


# --- row errors and their limits -------------------------------------------------------------------------------------

FAULTY = CSV + b"5.1,3.5,1.4,\n" * 3 + b"5.1,3.5,1.4,0.2\n" * 6


def test_failed_records_keep_their_place_and_are_listed(api: Api) -> None:
    job = api.run(FAULTY, "iris")
    assert (job["state"], job["rows"]) == ("completed", {"total": 10, "ok": 7, "failed": 3})
    predictions = decoded(api.result(job).content, "csv")["prediction"].to_list()
    assert predictions == ["setosa", None, None, None, *["setosa"] * 6]
    assert [(error["record"], error["column"]) for error in api.errors(job)] == [
        (1, "petal width (cm)"),
        (2, "petal width (cm)"),
        (3, "petal width (cm)"),
    ]


@pytest.mark.parametrize(
    ("options", "state"),
    [
        ({"on_row_error": "fail"}, "failed"),
        ({"max_errors": 2}, "failed"),
        ({"max_errors": 3}, "completed"),
        ({"max_errors": 0}, "failed"),
        ({"max_errors": 0.2}, "failed"),
        ({"max_errors": 0.3}, "completed"),
    ],
)
def test_a_job_ends_by_its_own_limit_of_row_errors(api: Api, options: dict[str, Any], state: str) -> None:
    job = api.run(FAULTY, "iris", **options)
    assert job["state"] == state
    if state == "failed":
        assert (job["reason"], job["error"]["code"]) == ("too-many-row-errors", "too-many-row-errors")
        assert "3 record" in job["error"]["message"]
        assert "the errors list of the job names them" in job["error"]["message"]


@pytest.mark.parametrize("records", [1, 30, 250])
def test_a_job_of_which_no_record_could_be_scored_fails_unless_that_is_allowed(api: Api, records: int) -> None:
    """In one call, in one chunk and in three."""
    faulty = CSV.split(b"\n")[0] + b",note\n" + b"5.1,3.5,1.4,,x\n" * records
    job = api.run(faulty, "iris")
    assert (job["state"], job["reason"], job["error"]["code"]) == ("failed", "no-row-scored", "no-row-scored")
    assert job["rows"] == {"total": records, "ok": 0, "failed": records}
    assert f"max_errors={records}" in job["error"]["message"]
    listed = api.http.get(f"/v1/download/{job['id']}/errors?partial=true").content.splitlines()
    assert [orjson.loads(line)["record"] for line in listed] == list(range(records))
    assert api.http.get(f"/v1/download/{job['id']}").status_code == 404
    again = ok(api.http.post(f"/v1/jobs/{job['id']}/retry"), 202)
    assert api.finished(again["id"])["reason"] == "no-row-scored"
    allowed = api.run(faulty, "iris", max_errors=records)
    assert (allowed["state"], len(api.errors(allowed))) == ("completed", records)
    assert api.run(faulty, "iris", max_errors=0.5)["reason"] == "too-many-row-errors"
    one_good = faulty + b"5.1,3.5,1.4,0.2,x\n"
    assert api.run(one_good, "iris")["rows"] == {"total": records + 1, "ok": 1, "failed": records}


def test_a_job_without_records_is_completed(api: Api) -> None:
    job = api.run(CSV.split(b"\n")[0] + b"\n", "iris")
    assert (job["state"], job["rows"]["total"]) == ("completed", 0)


def test_a_record_that_makes_the_run_fail_is_found_and_the_others_are_scored(api: Api) -> None:
    text = """<ir_version: 8, opset_import: ["": 17]>
        words (int64[N] number) => (string[N] word) <string[3] known = {"zero", "one", "two"}> {
            word = Gather(known, number)
        }"""
    api.register("words", onnx.parser.parse_model(text).SerializeToString())
    numbers = [i % 3 for i in range(250)]
    numbers[7] = numbers[120] = 99
    job = api.run("number\n" + "".join(f"{number}\n" for number in numbers), "words", passthrough="all")
    assert (job["state"], job["rows"]) == ("completed", {"total": 250, "ok": 248, "failed": 2}), job["error"]
    table = decoded(api.result(job).content, "csv")
    expected = [None if number == 99 else ("zero", "one", "two")[number] for number in numbers]
    assert table["word"].to_list() == expected
    assert [(error["record"], error["code"]) for error in api.errors(job)] == [
        (7, "scoring-failed"),
        (120, "scoring-failed"),
    ]
    hopeless = api.run("number\n77\n", "words", passthrough="all", max_errors=1)
    assert (hopeless["state"], hopeless["rows"]["failed"]) == ("completed", 1)
    assert api.result(hopeless).text == "number,word\n77,\n"
