"""Bytes are kept for their retention time, and as long as a row references them; the row is changed first."""

import threading
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from service import Api, ok, problem, running
from sqlalchemy import select, update

from batchserve import registry
from batchserve.db.connect import Database
from batchserve.db.tables import events
from batchserve.db.tables import jobs as job_rows
from batchserve.domain import JobState, Options, StoredInput
from batchserve.errors import Unavailable
from batchserve.jobs import execution, expiry, queries, requests, statements
from batchserve.settings import Settings
from batchserve.storage import ObjectInfo, open_storage
from batchserve.storage.local import LocalStorage
from batchserve.upkeep import holds
from batchserve.upkeep.objects import named_objects
from batchserve.upkeep.retention import Expired, dated, expire, forget, remove_unnamed
from batchserve.upkeep.sweep import SweepReport, sweep

CSV = "sepal length (cm),sepal width (cm),petal length (cm),petal width (cm)\n5.1,3.5,1.4,0.2\n"
SOME_FAIL = CSV + "5.1,3.5,1.4,0.2\n" * 120 + ",,,\n"
DAY = 86400.0


class Site:
    """A service with its storage and its database, at a later time."""

    def __init__(self, api: Api) -> None:
        self.api = api
        self.storage = open_storage(api.settings.storage)
        self.database = Database(api.settings.database_url)

    def settings(self, **keep: Any) -> Settings:
        return Settings(storage=self.api.settings.storage, sweep_age=3600.0, **keep)

    def later(self, days: float) -> float:
        with self.database.read() as connection:
            return self.database.moment(connection).wall + days * DAY

    def expire(self, days: float, **keep: Any) -> Expired:
        return expire(self.database, self.storage, self.settings(**keep), self.later(days))

    def sweep(self, days: float = 1) -> SweepReport:
        return sweep(self.database, self.storage, 3600.0, self.later(days))

    def forget(self, days: float, **keep: Any) -> int:
        return forget(self.database, self.settings(**keep), self.later(days))

    def expire_rows_alone(self, days: float) -> list[statements.Owned]:
        """Acts like a process that is killed before it removes the bytes."""
        with self.database.write() as connection:
            over = {"ended_before": self.later(days), "uploaded_before": self.later(days)}
            return expiry.expire_if_over(
                connection, expiry.find_over(connection, **over, most=9), **over, now=self.later(days)
            )

    def objects(self) -> set[str]:
        return {key for key in self.api.stored() if not key.startswith("models/")}


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory, iris_onnx: Path) -> Iterator[Api]:
    with running(tmp_path_factory.mktemp("kept"), chunk_records=100, inline_bytes=0) as api:
        api.register("iris", iris_onnx)
        yield api


@pytest.fixture
def site(service: Api) -> Iterator[Site]:
    """Without jobs and their bytes."""
    site = Site(service)
    yield site
    for job in service.http.get("/v1/jobs", params={"limit": 200}).json()["jobs"]:
        service.http.delete(job["links"]["self"])
    assert site.objects() == set()
    site.database.close()


def get(site: Site, path: str, status: int = 200) -> Any:
    answer = site.api.http.get(path)
    assert answer.status_code == status, answer.text
    return answer


# --- deletion ---------------------------------------------------------------------------------------------------------


def test_deleting_a_job_does_not_list_the_results_of_others(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    job = site.api.run(CSV, "iris")
    listed: list[str] = []
    whole_list = LocalStorage.list

    def seen(storage: LocalStorage, prefix: str) -> Iterator[ObjectInfo]:
        listed.append(prefix)
        return whole_list(storage, prefix)

    monkeypatch.setattr(LocalStorage, "list", seen)
    assert site.api.http.delete(job["links"]["self"]).is_success
    monkeypatch.undo()
    assert [prefix for prefix in listed if not prefix.startswith("parts/")] == []
    assert site.objects() == set()


# --- expiry ----------------------------------------------------------------------------------------------------------


def test_a_finished_job_loses_its_bytes_after_its_retention_time_and_is_still_listed(site: Site) -> None:
    job = site.api.run(SOME_FAIL, "iris")
    assert (job["state"], job["rows"]["failed"], job["expires_at"]) == ("completed", 1, None)
    assert site.expire(29, keep_results="30d") == Expired()
    assert get(site, job["links"]["result"]).content
    assert site.expire(31, keep_results="30d") == Expired(jobs=1)
    assert site.objects() == set()
    for link in ("result", "errors", "input"):
        problem(site.api.http.get(job["links"][link]), 410, "expired")
        problem(site.api.http.get(job["links"][link]), 410, "expired")
        if link != "input":
            problem(site.api.http.get(job["links"][link], params={"partial": True}), 410, "expired")
    shown = site.api.job(job["id"])
    assert (shown["state"], shown["result"], shown["rows"]) == ("expired", None, job["rows"])
    assert shown["expires_at"] > shown["finished_at"]
    assert [found["id"] for found in get(site, "/v1/jobs?state=expired").json()["jobs"]] == [job["id"]]
    problem(site.api.http.post(f"{job['links']['self']}/retry"), 409, "job-conflict")
    detail = problem(site.api.http.post(f"/v1/predict/{job['id']}?model=iris&format=jsonl"), 409, "job-conflict")[
        "detail"
    ]
    assert "its input was removed" in detail
    problem(site.api.http.post(f"{job['links']['self']}/retry", json={"rows": "failed"}), 409, "job-conflict")


def test_failed_and_cancelled_jobs_and_unused_inputs_expire_too(site: Site) -> None:
    failed = site.api.run(SOME_FAIL, "iris", on_row_error="fail")
    cancelled = site.api.upload(CSV)
    ok(site.api.http.post(cancelled["links"]["cancel"]), 202)
    unused = site.api.upload(CSV)
    assert site.expire(2, keep_inputs="7d", keep_results="1d") == Expired(jobs=2)
    assert [site.api.job(job["id"])["state"] for job in (failed, cancelled, unused)] == [
        "expired",
        "expired",
        "uploaded",
    ]
    assert site.expire(8, keep_inputs="7d", keep_results="1d") == Expired(jobs=1)
    problem(site.api.http.get(unused["links"]["input"]), 410, "expired")
    problem(site.api.http.post(f"/v1/predict/{unused['id']}", params={"model": "iris"}), 409, "job-conflict")
    assert site.objects() == set()


def test_without_settings_of_its_own_an_unused_input_is_kept_as_long_as_a_result(site: Site) -> None:
    site.api.upload(CSV)
    assert site.expire(2, keep_results="1d") == Expired(jobs=1)


def test_nothing_expires_without_a_setting(site: Site) -> None:
    site.api.upload(CSV)
    site.api.run(CSV, "iris")
    before = site.objects()
    assert site.expire(10_000) == Expired()
    assert site.forget(10_000) == 0
    assert site.objects() == before


def test_unfinished_jobs_never_expire(tmp_path: Path, iris_onnx: Path) -> None:
    with running(tmp_path, worker=False) as api:
        api.register("iris", iris_onnx)
        site = Site(api)
        queued, running_ = (
            ok(api.http.post("/v1/predict", content=CSV, params={"model": "iris"}), 202)["id"] for _ in range(2)
        )
        with site.database.write() as connection:
            (claimed,) = execution.claim_due(connection, "w", 30.0, site.database.moment(connection), 1)
        before = site.objects()
        assert site.expire(1000, keep_inputs="1d", keep_results="1d") == Expired()
        assert {api.job(job_id)["state"] for job_id in (queued, running_)} == {"queued", "running"}
        assert claimed.id in (queued, running_)
        assert site.objects() == before
        site.database.close()


@pytest.mark.slow
def test_a_job_shows_when_it_will_expire(tmp_path: Path, iris_onnx: Path) -> None:
    with running(tmp_path, keep_inputs=3600.0, keep_results=2 * DAY) as api:
        api.register("iris", iris_onnx)
        uploaded, done = api.upload(CSV), api.run(CSV, "iris")
        listed = {job["id"]: job for job in ok(api.http.get("/v1/jobs"))["jobs"]}
        with closing(Database(api.settings.database_url)) as database, database.read() as connection:
            kept = {job_id: queries.get(connection, job_id) for job_id in listed}
    assert done["expires_at"] == listed[done["id"]]["expires_at"]
    assert uploaded["expires_at"] == listed[uploaded["id"]]["expires_at"]
    times = {job_id: dated(job, api.settings).expires_at for job_id, job in kept.items()}
    assert times[done["id"]] == (kept[done["id"]].finished_at or 0) + 2 * DAY
    assert times[uploaded["id"]] == kept[uploaded["id"]].created_at + 3600
    assert dated(replace(kept[done["id"]], state=JobState.RUNNING, finished_at=None), api.settings).expires_at is None


def test_a_worker_expires_jobs_past_their_retention_time(tmp_path: Path, iris_onnx: Path) -> None:
    with running(tmp_path, keep_results=0.2, keep_rows=0.2, sweep_age=0.2) as api:
        api.register("iris", iris_onnx)
        job = ok(api.http.post("/v1/predict", content=CSV, params={"model": "iris"}, headers={"prefer": "wait=30"}))
        while (answer := api.http.get(job["links"]["self"])).status_code == 200:
            assert answer.json()["state"] in ("completed", "expired")
        problem(answer, 404, "job-not-found")
        assert not any(key.startswith(("inputs/", "results/")) for key in api.stored())


# --- inputs ----------------------------------------------------------------------------------------------------------


def test_an_input_may_be_removed_before_the_result(site: Site) -> None:
    job = site.api.run(SOME_FAIL, "iris")
    assert site.expire(8, keep_inputs="7d", keep_results="30d") == Expired(inputs=1)
    assert site.expire(8, keep_inputs="7d", keep_results="30d") == Expired()
    problem(site.api.http.get(job["links"]["input"]), 410, "expired")
    assert get(site, job["links"]["result"]).text.count("\n") == 123
    assert len(site.api.errors(job)) >= 1
    assert site.api.job(job["id"])["state"] == "completed"
    assert not any(key.startswith(("inputs/", "parts/")) for key in site.objects())
    problem(site.api.http.post(f"{job['links']['self']}/retry", json={"rows": "failed"}), 409, "job-conflict")


def test_partial_results_outlive_the_input_but_a_retry_needs_it(site: Site) -> None:
    job = site.api.run(CSV + "5.1,3.5,1.4,0.2\n" * 120 + ",,,\n", "iris", on_row_error="fail")
    before = site.api.http.get(job["links"]["result"], params={"partial": True})
    site.expire(8, keep_inputs="7d")
    site.sweep(9)
    after = site.api.http.get(job["links"]["result"], params={"partial": True})
    assert (before.status_code, before.content) == (after.status_code, after.content)
    problem(site.api.http.get(job["links"]["input"]), 410, "expired")
    refused = problem(site.api.http.post(f"{job['links']['self']}/retry"), 409, "job-conflict")
    assert "its input was removed" in refused["detail"]


# --- shared results --------------------------------------------------------------------------------------------------


def test_a_shared_result_stays_until_the_last_job_that_names_it_expires(site: Site) -> None:
    body = CSV + "6.3,3.3,6.0,2.5\n"
    first = site.api.run(body, "iris")
    second = site.api.run(body, "iris", reuse=True)
    assert second["reused_from"] == first["id"]
    with site.database.read() as connection:
        ends = [queries.get(connection, job["id"]).finished_at or 0.0 for job in (first, second)]
    between = sum(ends) / 2
    assert ends[0] < between < ends[1]
    assert expire(site.database, site.storage, site.settings(keep_results=DAY), between + DAY) == Expired(jobs=1)
    site.sweep()
    problem(site.api.http.get(first["links"]["result"]), 410, "expired")
    assert get(site, second["links"]["result"]).text.count("\n") == 3
    assert site.expire(31, keep_results="30d") == Expired(jobs=1)
    assert site.objects() == set()


def test_a_result_that_expired_is_never_reused(site: Site) -> None:
    first = site.api.run(CSV, "iris")
    site.expire(31, keep_results="30d")
    second = site.api.run(CSV, "iris", reuse=True)
    assert (second["state"], second["reused_from"]) == ("completed", None)
    assert second["id"] != first["id"]
    assert get(site, second["links"]["result"]).content


# --- crashes and several workers -------------------------------------------------------------------------------------


def test_a_crash_between_row_and_bytes_leaves_nothing_for_ever(site: Site) -> None:
    """Also the input of the oldest job, which existed before its row."""
    job = site.api.run(SOME_FAIL, "iris")
    kept = site.objects()
    assert [expired.id for expired in site.expire_rows_alone(31)] == [job["id"]]
    assert site.objects() == kept
    problem(site.api.http.get(job["links"]["result"]), 410, "expired")
    assert site.sweep().total == len(kept)
    assert site.objects() == set()


def test_several_workers_expire_each_job_once(site: Site) -> None:
    for number in range(8):
        site.api.run(CSV + f"{number},3,2,1\n", "iris")
    shared = site.api.run(CSV + "0,3,2,1\n", "iris", reuse=True)
    assert shared["reused_from"]
    barrier = threading.Barrier(3)
    done: list[int] = []

    def work() -> None:
        barrier.wait(10)
        done.append(site.expire(31, keep_results="30d").jobs)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(done) == 9
    assert site.objects() == set()


def test_a_job_of_any_number_of_parts_can_be_deleted(site: Site) -> None:
    """More parts than SQLite accepts in one statement."""
    job = site.api.run(CSV, "iris")
    (kept,) = (key for key in site.objects() if key.startswith("results/"))
    remove_unnamed(site.database, site.storage, [*(f"parts/{job['id']}/{n}" for n in range(33_000)), kept])
    assert get(site, job["links"]["result"]).content


def test_a_download_that_is_overtaken_by_the_expiry_gets_410(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    job = site.api.run(CSV, "iris")
    storage = site.api.http.app.state.service.runtime.storage  # type: ignore[attr-defined]
    path = storage.path

    def path_late(key: str) -> Path:
        site.expire(31, keep_results="30d")
        found: Path = path(key)
        return found

    monkeypatch.setattr(storage, "path", path_late)
    problem(site.api.http.get(job["links"]["result"]), 410, "expired")


# --- rows ------------------------------------------------------------------------------------------------------------


def test_the_row_of_an_expired_job_is_deleted_after_its_own_retention_time(site: Site) -> None:
    old, young = site.api.run(CSV, "iris"), site.api.upload(CSV)
    site.expire(31, keep_results="30d", keep_inputs="90d")
    assert site.forget(31 + 364, keep_rows="365d") == 0
    assert site.forget(31 + 366, keep_rows="365d") == 1
    problem(site.api.http.get(old["links"]["self"]), 404, "job-not-found")
    assert site.api.job(young["id"])["state"] == "uploaded"


def test_no_row_is_deleted_before_a_sweep_could_find_its_bytes(site: Site) -> None:
    site.api.run(CSV, "iris")
    site.expire_rows_alone(1)
    assert site.forget(1, keep_rows="1s") == 0
    site.sweep(2)
    assert site.forget(2, keep_rows="1s") == 1
    assert site.objects() == set()


def test_the_event_of_an_end_is_forgotten_after_a_week_and_with_its_job(site: Site) -> None:
    def told() -> list[str]:
        with site.database.read() as connection:
            return list(connection.scalars(select(events.c.job_id).order_by(events.c.id)))

    first, second = site.api.run(SOME_FAIL, "iris"), site.api.run(SOME_FAIL, "iris", on_row_error="fail")
    assert told() == [first["id"], second["id"]]
    site.api.http.delete(first["links"]["self"])
    assert told() == [second["id"]]
    assert (site.forget(6), told()) == (0, [second["id"]])
    assert (site.forget(8), told()) == (0, [])
    assert site.api.job(second["id"])["state"] == "failed"


def test_a_borrowed_input_is_read_and_never_removed(site: Site) -> None:
    """It is not backed up either, because it is not owned. Its length and digest may be unknown."""
    site.storage.compose("lake/table.csv", [SOME_FAIL.encode()])
    stored, job_id = StoredInput("lake/table.csv", "csv", owned=False), "01a1f7d8-94a2-73b4-888c-2ac5b95e5d38"
    with site.database.write() as connection:
        model, now = registry.resolve(connection, "iris"), site.database.moment(connection).wall
        requests.create(connection, job_id, [stored], model, now)
        how: dict[str, Any] = {"metadata": {}, "priority": 0, "run_after": None, "now": now}
        requests.enqueue_if_uploaded(connection, job_id, model, Options("csv"), job_id, **how)
    job = site.api.finished(job_id)
    assert (job["state"], job["rows"]["failed"], job["input"]["bytes"], job["input"]["sha256"]) == (
        "completed", 1, None, None,
    )  # fmt: skip
    assert site.api.http.get(job["links"]["input"]).text == SOME_FAIL
    assert "lake/table.csv" not in {key for key, _ in named_objects(site.database)}
    assert site.expire(31, keep_results="30d") == Expired(jobs=1)
    assert site.sweep(99).inputs == 0
    assert site.objects() == {"lake/table.csv"}
    site.storage.delete("lake/table.csv")


def test_an_input_of_two_jobs_is_removed_with_the_later_of_them(site: Site) -> None:
    first = site.api.run(SOME_FAIL, "iris")
    second = ok(site.api.http.post(f"/v1/predict/{first['id']}?model=iris&passthrough=none&reuse=false"), 202)
    done = site.api.finished(second["id"])
    with site.database.write() as connection:
        connection.execute(update(job_rows).where(job_rows.c.id == first["id"]).values(finished_at=0.0))
    assert site.expire(0, keep_inputs="1d") == Expired(inputs=1)
    assert get(site, done["links"]["input"]).text == SOME_FAIL
    problem(site.api.http.get(first["links"]["input"]), 410, "expired")
    assert site.sweep(99).inputs == 0
    assert site.expire(2, keep_inputs="1d") == Expired(inputs=1)
    assert f"inputs/{first['id']}" not in site.objects()


# --- holds -----------------------------------------------------------------------------------------------------------


def test_no_object_that_a_row_referenced_is_removed_while_a_hold_is_active(site: Site, iris_onnx: Path) -> None:
    deleted, over, orphan = (site.api.run(SOME_FAIL, "iris") for _ in range(3))
    registered = ok(site.api.http.put("/v1/models/other", content=iris_onnx.read_bytes() + b"\x72\x00"), 201)
    with site.database.write() as connection:
        requests.delete_if_not_running(connection, orphan["id"])
    before = site.api.stored()
    with holds.held(site.database):
        assert site.api.http.delete(deleted["links"]["self"]).status_code == 204
        assert site.api.http.delete(registered["links"]["self"]).status_code == 204
        assert site.expire(31, keep_results="30d") == Expired(jobs=1)
        assert site.sweep() == SweepReport()
        assert site.forget(400, keep_rows="1d") == 0
        problem(site.api.http.get(over["links"]["result"]), 410, "expired")
        assert site.api.stored() == before
    swept = site.sweep()
    assert swept.models == 1
    assert swept.total == len(before) - 1
    assert {key for key in site.api.stored() if not key.startswith("models/")} == set()


def test_a_hold_whose_holder_died_lapses(site: Site) -> None:
    with site.database.write() as connection:
        now = site.database.moment(connection)
        holds.place(connection, "killed", 60.0, now)
        assert holds.any_in_force(connection, now)
        assert holds.any_in_force(connection, replace(now, steady=now.steady + 59))
        assert not holds.any_in_force(connection, replace(now, steady=now.steady + 61))
        assert not holds.any_in_force(connection, replace(now, clock="another boot"))
        assert not holds.renew_if_in_force(connection, "killed", 60.0, replace(now, steady=now.steady + 61))
        holds.place(connection, "next", 60.0, replace(now, steady=now.steady + 61))
        assert not holds.renew_if_in_force(connection, "killed", 60.0, now)


def test_a_lapsed_hold_is_not_reported_as_active(site: Site) -> None:
    def hold() -> None:
        with holds.held(site.database, 5.0), site.database.write() as connection:
            now = site.database.moment(connection)
            holds.place(connection, "other", 60.0, replace(now, steady=now.steady + 100))  # forgets those that lapsed

    with pytest.raises(Unavailable, match="start again"):
        hold()


# --- space -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_requests_that_need_space_are_refused_below_the_limit_and_those_that_free_it_are_not(
    tmp_path: Path, iris_onnx: Path
) -> None:
    """Uploads, one-call predictions, models, conversions and retries of failed records; not downloads and deletes."""
    with running(tmp_path, chunk_records=100) as api:
        api.register("iris", iris_onnx)
        done, unused = api.run(SOME_FAIL, "iris"), api.upload(CSV)
        stored = api.stored()
    with running(tmp_path, chunk_records=100, free_bytes=2**60) as api:
        http = api.http
        for answer in (
            http.post("/v1/upload", content=CSV),
            http.post("/v1/upload", files={"file": ("a.csv", CSV)}),
            http.post("/v1/predict", params={"model": "iris"}, content=CSV),
            http.put("/v1/models/more", content=iris_onnx.read_bytes()),
            http.get(done["links"]["result"], params={"format": "parquet"}),
            http.post(f"{done['links']['self']}/retry", json={"rows": "failed"}),
        ):
            problem(answer, 507, "insufficient-storage")
        assert api.stored() == stored
        assert api.result(done).content
        assert http.get(unused["links"]["input"]).content
        assert ok(http.post("/v1/models/iris/predict", content=CSV))["prediction"]
        queued = http.post(f"/v1/predict/{unused['id']}", params={"model": "iris"}, headers={"prefer": "wait=30"})
        assert queued.json()["state"] == "completed"  # accepted jobs are finished: the limit reserves space for them
        assert http.delete(done["links"]["self"]).status_code == 204


# --- settings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "seconds"), [("30d", 30 * DAY), ("12h", 12 * 3600.0), ("90", 90.0), ("1.5h", 5400.0), ("", None)]
)
def test_a_duration_is_read_from_the_environment(
    monkeypatch: pytest.MonkeyPatch, text: str, seconds: float | None
) -> None:
    monkeypatch.setenv("BATCHSERVE_KEEP_RESULTS", text)
    assert Settings().keep_results == seconds


@pytest.mark.parametrize("text", ["a week", "-1d", "0", "0d", "nan"])
def test_an_invalid_duration_is_refused(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("BATCHSERVE_KEEP_INPUTS", text)
    with pytest.raises(ValidationError, match="keep_inputs"):
        Settings()
