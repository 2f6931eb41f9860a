"""After a jump of the wall clock by years nothing is removed early, kept for ever, or done twice."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from service import Api, ok, running

from batchserve import clock, idempotency
from batchserve.db.connect import Database, Moment
from batchserve.domain import JobState
from batchserve.jobs import execution, queries
from batchserve.settings import Settings
from batchserve.storage import open_storage
from batchserve.upkeep.retention import Expired, expire, forget

CSV = "sepal length (cm),sepal width (cm),petal length (cm),petal width (cm)\n5.1,3.5,1.4,0.2\n"
HOUR, DAY, YEAR = 3600.0, 86400.0, 365 * 86400.0
START = 1_700_000_000.0


class Clocks:
    """A host whose wall clock can be set, and its observations of both clocks."""

    def __init__(self, database: Database) -> None:
        self.database = database
        self.wall, self.steady, self.boot = START, 500.0, "first"

    def look(self) -> float:
        with self.database.write() as connection:
            return clock.settled_for(connection, Moment(self.wall, self.steady, self.boot))

    def run(self, seconds: float, looks: int = 10) -> float:
        for _ in range(looks):
            self.wall += seconds / looks
            self.steady += seconds / looks
            self.look()
        return self.look()


@pytest.fixture
def clocks(database: Database) -> Clocks:
    found = Clocks(database)
    found.look()
    return found


def test_a_clock_without_an_observed_jump_is_trusted(clocks: Clocks) -> None:
    assert clocks.look() > 10 * YEAR
    assert clocks.run(30 * DAY) > 10 * YEAR


@pytest.mark.parametrize("jump", [5 * YEAR, -5 * YEAR, 2 * HOUR, -2 * HOUR, 61.0, -61.0])
def test_after_a_jump_the_clock_is_trusted_for_as_long_as_it_has_run_since(clocks: Clocks, jump: float) -> None:
    clocks.run(DAY)
    clocks.wall += jump
    assert clocks.look() == 0
    assert clocks.run(3 * DAY) == pytest.approx(3 * DAY)
    clocks.wall -= jump
    assert clocks.look() == 0


@pytest.mark.parametrize("drift", [0.01, -0.01])
def test_a_clock_that_is_adjusted_is_trusted(clocks: Clocks, drift: float) -> None:
    for _ in range(1000):
        clocks.wall += 60 * (1 + drift)
        clocks.steady += 60
        assert clocks.look() > 10 * YEAR


def test_a_power_off_of_a_night_is_trusted_but_not_a_jump_during_it(clocks: Clocks) -> None:
    clocks.run(DAY)
    clocks.boot, clocks.steady, clocks.wall = "second", 3.0, clocks.wall + 9 * HOUR
    assert clocks.look() > 10 * YEAR
    for jump in (5 * YEAR, -5 * YEAR):
        clocks.boot, clocks.steady, clocks.wall = f"after {jump}", 3.0, clocks.wall + jump
        assert clocks.look() <= 7 * DAY
        assert clocks.run(HOUR) == pytest.approx(HOUR, abs=8 * DAY)


def test_observing_the_clock_writes_nothing_while_nothing_is_new(clocks: Clocks) -> None:
    before = clocks.database.version_from_thread()
    clocks.run(300, looks=60)
    assert clocks.database.version_from_thread() == before


# --- retention -------------------------------------------------------------------------------------------------------


class Site:
    def __init__(self, api: Api) -> None:
        self.api = api
        self.database = Database(api.settings.database_url)
        self.storage = open_storage(api.settings.storage)

    def expire(self, now: float, settled: float, **keep: Any) -> Expired:
        settings = Settings(storage=self.api.settings.storage, **keep)
        return expire(self.database, self.storage, settings, now, settled)

    def forget(self, now: float, settled: float) -> int:
        settings = Settings(storage=self.api.settings.storage, keep_rows=10 * DAY)
        return forget(self.database, settings, now, settled)


@pytest.fixture
def site(tmp_path: Path, iris_onnx: Path) -> Iterator[Site]:
    with running(tmp_path) as api:
        api.register("iris", iris_onnx)
        site = Site(api)
        yield site
        site.database.close()


@pytest.mark.slow
@pytest.mark.parametrize("jump", [5 * YEAR, -5 * YEAR])
def test_a_jump_removes_nothing_at_once_and_keeps_nothing_for_ever(site: Site, jump: float) -> None:
    site.api.run(CSV, "iris")
    site.api.upload(CSV)
    now = time.time() + jump
    for settled in (0.0, DAY, 29 * DAY):
        assert site.expire(now + settled, settled, keep_results="30d", keep_inputs="30d") == Expired()
    assert site.expire(now + 31 * DAY, 31 * DAY, keep_inputs="30d") == Expired(jobs=1, inputs=1)
    assert site.expire(now + 31 * DAY, 31 * DAY, keep_results="30d") == Expired(jobs=1)
    assert not any(key.startswith(("inputs/", "results/")) for key in site.api.stored())


def test_data_without_a_retention_time_is_kept_whatever_its_date(site: Site) -> None:
    site.api.run(CSV, "iris")
    site.api.upload(CSV)
    for jump in (50 * YEAR, -50 * YEAR):
        assert site.expire(time.time() + jump, 100 * YEAR) == Expired()


@pytest.mark.slow
@pytest.mark.parametrize("jump", [5 * YEAR, -5 * YEAR])
def test_a_jump_forgets_no_job_at_once(site: Site, jump: float) -> None:
    job = site.api.upload(CSV)
    now = time.time()
    assert site.expire(now + 2 * DAY, 10 * YEAR, keep_inputs="1d") == Expired(jobs=1)
    assert site.forget(now + jump, 9 * DAY) == 0
    assert site.api.job(job["id"])["state"] == "expired"
    assert site.forget(now + jump, 11 * DAY) == 1


# --- a worker --------------------------------------------------------------------------------------------------------


@pytest.mark.sqlite
@pytest.mark.slow
@pytest.mark.parametrize("jump", [5 * YEAR, -5 * YEAR])
def test_a_worker_that_sees_a_jump_neither_forgets_keys_nor_removes_bytes(
    tmp_path: Path, iris_onnx: Path, monkeypatch: pytest.MonkeyPatch, jump: float
) -> None:
    real = time.time
    with running(tmp_path, rescue=0.02, keep_results="30d", sweep_age=1.0, poll=0.02) as api:
        api.register("iris", iris_onnx)
        http, headers = api.http, {"idempotency-key": "night", "prefer": "wait=30"}
        first = ok(http.post("/v1/predict?model=iris", content=CSV, headers=headers))
        site = Site(api)
        monkeypatch.setattr(time, "time", lambda: real() + jump)
        deadline = time.monotonic() + 30
        while not _has_seen_a_jump(site.database):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        time.sleep(2.5)  # two checks for expired data
        repeated = http.post("/v1/predict?model=iris", content=CSV, headers=headers)
        assert (repeated.headers["idempotency-replayed"], repeated.json()["id"]) == ("true", first["id"])
        assert api.job(first["id"])["state"] == "completed"
        assert api.result(first).content
        assert len(http.get("/v1/jobs").json()["jobs"]) == 1
        site.database.close()


def _has_seen_a_jump(database: Database) -> bool:
    with database.read() as connection:
        return bool(connection.exec_driver_sql("SELECT settled > 0 FROM clock").scalar())


def test_keys_are_forgotten_by_their_age_and_those_of_a_wrong_clock_with_them(database: Database) -> None:
    with database.write() as connection:
        for name, created in (("old", 1.0), ("young", 5.0), ("of the future", 5 * YEAR)):
            idempotency.remember(connection, name, "f", "job", 201, created)
        assert idempotency.forget_older(connection, 3.0, 100.0) == 2
        assert idempotency.recall(connection, "young", "f") is not None


@pytest.mark.slow
def test_a_job_that_is_to_start_at_a_time_starts_when_the_wall_clock_says_so(site: Site) -> None:
    """Regardless of earlier jumps: `run_after` refers to the wall clock."""
    later = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() + DAY))
    job = ok(site.api.http.post("/v1/predict", params={"model": "iris", "run_after": later}, content=CSV), 202)
    with site.database.read() as connection:
        assert not execution.is_due(connection, time.time() - YEAR)
        assert execution.is_due(connection, time.time() + YEAR)
        assert queries.state_of(connection, job["id"]) is JobState.QUEUED
