"""The retention of a job that its predict asks for."""

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from commands import in_this_process
from service import Api, emptied, ok, problem, running
from sqlalchemy import insert

from batchserve import Client
from batchserve.db.connect import Database
from batchserve.db.tables import jobs
from batchserve.domain import JobState
from batchserve.jobs import expiry, queries, requests
from batchserve.settings import Settings
from batchserve.storage import open_storage
from batchserve.upkeep.retention import Expired, expire

HEADER = "sepal length (cm),sepal width (cm),petal length (cm),petal width (cm)\n"
CSV = HEADER + "5.1,3.5,1.4,0.2\n"
LARGE = HEADER + "5.1,3.5,1.4,0.2\n" * 6000
DAY = 86400.0


class Site:
    def __init__(self, api: Api) -> None:
        self.api, self.http = api, api.http
        self.database, self.storage = Database(api.settings.database_url), open_storage(api.settings.storage)

    def expire(self, days: float, settled: float = float("inf"), **keep: Any) -> Expired:
        with self.database.read() as connection:
            now = self.database.moment(connection).wall + days * DAY
        return expire(self.database, self.storage, Settings(storage=self.api.settings.storage, **keep), now, settled)


@pytest.fixture(scope="module")
def service(
    database_settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory, iris_onnx: Path
) -> Iterator[Api]:
    with running(tmp_path_factory.mktemp("expiring"), **database_settings) as api:
        api.register("iris", iris_onnx)
        yield api


@pytest.fixture
def site(service: Api) -> Iterator[Site]:
    site = Site(service)
    yield site
    site.database.close()
    emptied(service)


def ends(job: dict[str, Any]) -> timedelta:
    return datetime.fromisoformat(job["expires_at"]) - datetime.fromisoformat(job["finished_at"])


@pytest.mark.parametrize("body", [CSV, LARGE], ids=["within the request", "by a worker"])
def test_a_job_expires_after_the_time_that_its_predict_asks_for(body: str, site: Site) -> None:
    job = site.api.run(body, "iris", expires_in="2d")
    other = site.api.run(body, "iris")
    assert job["options"]["expires_in"] == 2 * DAY
    assert abs(ends(job) - timedelta(days=2)) < timedelta(seconds=1)
    assert (other["expires_at"], other["options"]["expires_in"]) == (None, None)
    assert site.expire(1.9) == Expired()
    assert site.expire(2.1) == Expired(jobs=1)
    assert site.api.job(job["id"])["state"] == "expired"
    problem(site.http.get(job["links"]["result"]), 410, "expired")
    assert site.api.result(other).content
    assert site.expire(1000) == Expired()


def test_it_is_given_to_an_uploaded_input_and_as_json(site: Site) -> None:
    uploaded = site.api.upload(CSV)
    job = ok(site.http.post(f"/v1/predict/{uploaded['id']}", json={"model": "iris", "expires_in": 3600}), 202)
    assert site.api.finished(job["id"])["options"]["expires_in"] == 3600
    again = ok(site.http.post(f"/v1/predict/{uploaded['id']}", json={"model": "iris", "expires_in": "1h"}), 200)
    assert again["id"] == job["id"]
    longer = ok(site.http.post(f"/v1/predict/{uploaded['id']}", json={"model": "iris", "expires_in": "2h"}), 200)
    assert longer["id"] != job["id"]
    assert site.expire(1.5 / 24) == Expired(jobs=1)
    assert site.api.result(site.api.job(longer["id"])).content  # which it shares with the expired one


def test_it_counts_from_the_end_of_a_failed_or_cancelled_job_and_anew_after_a_retry(site: Site) -> None:
    params = {"model": "iris", "expires_in": "1d", "run_after": "2999-01-01T00:00:00Z"}
    job = ok(site.http.post("/v1/predict", content=CSV, params=params), 202)
    assert job["expires_at"] is None
    assert site.expire(400) == Expired()
    ok(site.http.post(job["links"]["cancel"]), 202)
    cancelled = site.api.job(job["id"])
    assert abs(ends(cancelled) - timedelta(days=1)) < timedelta(seconds=1)
    ok(site.http.post(f"/v1/jobs/{job['id']}/retry"), 202)
    assert site.expire(400) == Expired()
    assert site.api.job(job["id"])["state"] == "queued"
    ok(site.http.post(job["links"]["cancel"]), 202)
    failed = site.api.run(CSV + "5.1,tall,1.4,0.2\n", "iris", on_row_error="fail", expires_in="1d")
    assert failed["state"] == "failed"
    assert site.expire(1.1) == Expired(jobs=2)


def test_the_settings_may_be_shorter_and_a_longer_time_is_refused(tmp_path: Path, iris_onnx: Path) -> None:
    with running(tmp_path, keep_results="3d") as api:
        api.register("iris", iris_onnx)
        uploaded = api.upload(CSV)["id"]
        for path in ("/v1/predict", f"/v1/predict/{uploaded}"):
            answer = api.http.post(path, content=CSV if path == "/v1/predict" else None,
                                   params={"model": "iris", "expires_in": "4d"})  # fmt: skip
            told = problem(answer, 422, "invalid-options")["detail"]
            assert "expires_in" in told
            assert "259200 s" in told
        job = api.run(CSV, "iris", expires_in="3d")
        assert abs(ends(job) - timedelta(days=3)) < timedelta(seconds=1)
    with running(tmp_path, keep_results="1d") as api:
        assert abs(ends(api.job(job["id"])) - timedelta(days=1)) < timedelta(seconds=1)


@pytest.mark.parametrize("given", ["0", "-1", "soon", "1y", "inf", "nan", str(10**12), "1" * 400, ""])
def test_a_time_that_is_none_is_refused(given: str, idle_api: Api) -> None:
    answer = idle_api.http.post("/v1/predict", params={"model": "iris", "expires_in": given}, content=CSV)
    assert "expires_in" in problem(answer, 422, "invalid-options")["detail"]


def test_a_clock_that_is_not_settled_for_so_long_removes_nothing(site: Site) -> None:
    site.api.run(CSV, "iris", expires_in="2d")
    assert site.expire(3, settled=1 * DAY) == Expired()
    assert site.expire(3, settled=2.5 * DAY) == Expired(jobs=1)


def test_a_job_that_expired_may_be_asked_for_again(site: Site) -> None:
    job = site.api.run(CSV, "iris", expires_in="1d")
    site.expire(2)
    params: dict[str, Any] = {"model": "iris", "expires_in": "1d", "reuse": False}
    answer = site.http.post(f"/v1/predict/{job['id']}", params=params)
    assert ok(answer, 200)["state"] == "expired"
    assert answer.json()["id"] == job["id"]


def test_a_new_job_for_failed_records_keeps_the_time(site: Site) -> None:
    job = site.api.run(LARGE + "5.1,tall,1.4,0.2\n", "iris", expires_in="1d")
    again = ok(site.http.post(f"/v1/jobs/{job['id']}/retry", json={"rows": "failed"}), 202)
    again = site.api.finished(again["id"])
    assert again["options"]["expires_in"] == DAY
    assert abs(ends(again) - timedelta(days=1)) < timedelta(seconds=1)


def test_a_client_and_the_command_line_ask_for_it(server: str, iris_onnx: Path, iris_csv: Path, tmp_path: Path) -> None:
    with Client(server) as client:
        client.models.add(iris_onnx, name="iris-expiring")
        job = client.submit(iris_csv, "iris-expiring", expires_in="2h").wait(timeout=60)
        assert job.data["options"]["expires_in"] == 7200
    words = ("predict", "-m", "iris-expiring", str(iris_csv), "-o", "out.csv", "--expires-in", "3h", "--json")
    done = in_this_process(tmp_path, *words, BATCHSERVE_URL=server)
    assert done.returncode == 0, done.stderr
    assert '"expires_in": 10800.0' in done.stdout


def test_the_form_of_an_upload_takes_it(site: Site) -> None:
    uploaded = site.api.upload(CSV)["id"]
    page = site.http.get(f"/jobs/{uploaded}").text
    assert 'name="expires_in"' in page
    token = page.partition("?token=")[2].partition('"')[0]
    form = {"model": "iris@1", "expires_in": "12h"}
    answer = site.http.post(f"/jobs/{uploaded}/predict?token={token}", data=form, follow_redirects=False)
    assert answer.status_code == 303
    assert site.api.finished(uploaded)["options"]["expires_in"] == 12 * 3600


def filled(database: Database, count: int) -> None:
    """So many completed jobs, every hundredth with a time of its own, of which ten are over at 2000."""
    rows: list[dict[str, Any]] = [
        {
            "id": f"{number:036d}",
            "state": JobState.COMPLETED,
            "options": {},
            "metadata": {},
            "created_at": 1.0,
            "finished_at": 1.0,
            "expires_in": None if number % 100 else 1000.0,
            "due_at": None if number % 100 else 1001.0 if number < 1000 else 3000.0,
        }
        for number in range(count)
    ]
    with database.write() as connection:
        connection.execute(insert(jobs), rows)


def test_jobs_that_are_due_are_found_without_reading_the_others(sqlite: Database) -> None:
    filled(sqlite, 5000)
    with sqlite.read() as connection:
        assert len(expiry.find_due(connection, 2000.0, 1e9, 100)) == 10
    with closing(sqlite3.connect(sqlite.url.removeprefix("sqlite:///"))) as own:
        steps = 0

        def count() -> int:
            nonlocal steps
            steps += 1
            return 0

        own.set_progress_handler(count, 10)
        query = "SELECT id FROM jobs WHERE due_at < 2000 AND expires_in <= 1e9 ORDER BY due_at LIMIT 100"
        assert len(own.execute(query).fetchall()) == 10
        plan = own.execute(f"EXPLAIN QUERY PLAN {query}").fetchall()
    assert steps < 100
    assert "USING INDEX ix_jobs_due_at" in plan[0][3]


def test_expiry_sees_each_due_job_once(database: Database) -> None:
    filled(database, 1500)
    with database.write() as connection:
        found = expiry.find_due(connection, 2000.0, 1e9, 100)
        assert len(expiry.expire_if_due(connection, found, 2000.0, 1e9)) == 10
        assert expiry.find_due(connection, 2000.0, 1e9, 100) == []
        assert requests.delete_if_not_running(connection, found[0]).state == "expired"
        assert queries.count_by_state(connection) == {"completed": 1490, "expired": 9}
