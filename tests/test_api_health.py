import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
from exposed import values_in
from service import Api, ok, problem, running

from batchserve import __version__

CSV = b"sepal length (cm),sepal width (cm),petal length (cm),petal width (cm)\n5.1,3.5,1.4,0.2\n"


def samples(api: Api) -> dict[str, float]:
    return values_in(api.http.get("/metrics").text)


def test_the_process_is_alive(api: Api) -> None:
    assert ok(api.http.get("/livez")) == {"status": "ok", "version": __version__}


def test_the_service_is_ready_when_database_and_storage_answer(api: Api) -> None:
    body = ok(api.http.get("/readyz"))
    assert (body["status"], body["checks"]) == ("ok", {"database": "ok", "storage": "ok"})


@pytest.mark.sqlite
def test_the_service_is_not_ready_on_a_database_of_another_release_but_alive(tmp_path: Path) -> None:
    with running(tmp_path, worker=False) as api:
        ok(api.http.get("/readyz"))
        with closing(sqlite3.connect(tmp_path / "batchserve.db")) as other, other:
            other.execute("UPDATE alembic_version SET version_num = '9999'")
        answer = api.http.get("/readyz")
        assert answer.status_code == 503
        body = answer.json()
        assert (body["status"], body["checks"]["storage"]) == ("unavailable", "ok")
        assert "9999" in body["checks"]["database"]
        assert str(tmp_path) not in answer.text
        ok(api.http.get("/livez"))


def test_metrics_count_jobs_and_rows(tmp_path: Path, iris_onnx: Path) -> None:
    with running(tmp_path) as api:
        api.register("iris", iris_onnx)
        api.run(CSV + b",,,\n", "iris")
        api.upload(CSV)
        found = samples(api)
    assert (found["batchserve_jobs{completed}"], found["batchserve_jobs{uploaded}"]) == (1, 1)
    assert found["batchserve_jobs{failed}"] == 0
    assert (found["batchserve_rows_total{ok}"], found["batchserve_rows_total{failed}"]) == (1, 1)
    assert found["batchserve_queue_oldest_age_seconds"] == 0
    assert found[f"batchserve_build_info{{{__version__}}}"] == 1


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/v2/jobs", 404, "not-found"),
        ("GET", "/v1/upload", 405, "method-not-allowed"),
        ("DELETE", "/v1/jobs", 405, "method-not-allowed"),
        ("POST", "/livez", 405, "method-not-allowed"),
    ],
)
def test_a_path_without_a_route_gets_a_problem(api: Api, method: str, path: str, status: int, code: str) -> None:
    answer = api.http.request(method, path)
    problem(answer, status, code)
    assert status != 405 or answer.headers["allow"]


def test_the_root_is_a_page(api: Api) -> None:
    answer = api.http.get("/")
    assert (answer.status_code, answer.headers["content-type"]) == (200, "text/html; charset=utf-8")


def test_the_metric_to_alert_on_counts_only_due_jobs(tmp_path: Path, iris_onnx: Path) -> None:
    with running(tmp_path, worker=False) as api:
        api.register("iris", iris_onnx)
        api.http.post("/v1/predict?model=iris&run_after=2099-01-01T00:00:00Z", content=CSV)
        assert samples(api)["batchserve_queue_oldest_age_seconds"] == 0
        api.http.post("/v1/predict?model=iris", content=CSV)
        assert 0 < samples(api)["batchserve_queue_oldest_age_seconds"] < 60
