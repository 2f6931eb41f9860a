"""Every fault that `batchserve doctor` looks for, made by hand."""

import json
import os
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import postgres
import pytest
from commands import in_a_process, in_this_process
from service import running
from sqlalchemy import text

from batchserve.db.connect import Database
from batchserve.storage import open_storage
from batchserve.upkeep.inspection import Fault, inspect_clock, inspect_database, inspect_jobs, inspect_objects

CSV = b"sepal length (cm),sepal width (cm),petal length (cm),petal width (cm)\n" + b"5.1,3.5,1.4,0.2\n" * 25
FAULTY = CSV + b",,,\n"
DAY = 86_400.0
NOBODY = "01a1f7d8-94a2-73b4-888c-2ac5b95e5d38"


class Jobs(NamedTuple):
    """The IDs of four jobs: without a fault, with a failed record, failed by that record, not yet predicted."""

    completed: str
    faulty: str
    failed: str
    uploaded: str


@dataclass(frozen=True)
class Site:
    """An installation whose server has stopped."""

    folder: Path
    jobs: Jobs

    @contextmanager
    def database(self) -> Iterator[Database]:
        with closing(Database(postgres.address_of(self.folder))) as opened:
            yield opened

    def sql(self, statement: str, **values: Any) -> None:
        with self.database() as database, database.write() as connection:
            assert connection.execute(text(statement), values).rowcount

    def change(self, job_id: str, assigned: str, **values: Any) -> None:
        self.sql(f"UPDATE jobs SET {assigned} WHERE id = :id", id=job_id, **values)  # noqa: S608

    def object_of(self, pattern: str) -> Path:
        return next(iter(sorted(self.folder.glob(pattern))))

    def faults(self, **budget: float) -> list[Fault]:
        return list(self.inspected(**budget).faults)

    def inspected(self, **budget: float) -> Any:
        with self.database() as database:
            wanted = {"most_bytes": 1e9, "seconds": 60.0, **budget}
            return inspect_objects(database, open_storage(str(self.folder)), **wanted)

    def stuck(self, patience: float = 60.0) -> list[Fault]:
        with self.database() as database:
            return inspect_jobs(database, patience=patience)

    @property
    def environment(self) -> dict[str, str]:
        own = {"BATCHSERVE_STORAGE": str(self.folder), "BATCHSERVE_URL": "http://127.0.0.1:9"}
        return own | postgres.chosen_environment(self.folder)

    def doctor(self, *arguments: str, **settings: str) -> tuple[int, dict[str, dict[str, Any]]]:
        """Its exit status, and its findings by their names."""
        done = in_this_process(self.folder.parent, "doctor", "--json", *arguments, **self.environment, **settings)
        assert "Traceback" not in done.stderr, done.stderr
        return done.returncode, {finding["check"]: finding for finding in json.loads(done.stdout)}


@pytest.fixture(scope="module")
def left(tmp_path_factory: pytest.TempPathFactory, iris_onnx: Path) -> Site:
    folder = tmp_path_factory.mktemp("left")
    # One process: of two chunks at a time, the first may be scored and not yet committed when the other fails its job.
    with running(folder, chunk_records=10, processes=1, inline_bytes=0) as api:
        api.register("iris", iris_onnx)
        jobs = Jobs(
            completed=api.run(CSV, "iris")["id"],
            faulty=api.run(FAULTY, "iris")["id"],
            failed=api.run(FAULTY, "iris", on_row_error="fail")["id"],
            uploaded=api.upload(CSV)["id"],
        )
    return Site(folder, jobs)


@pytest.fixture
def site(left: Site, tmp_path: Path) -> Iterator[Site]:
    """A copy, to be damaged."""
    postgres.copy_installation(left.folder, tmp_path / "storage")
    yield Site(tmp_path / "storage", left.jobs)
    postgres.remove_installation(tmp_path / "storage")


def flip(path: Path) -> None:
    """Changes one bit in the middle, which no listing shows."""
    times = path.stat()
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    os.utime(path, (times.st_atime, times.st_mtime))


def test_a_folder_that_is_not_there_is_said_and_not_made(tmp_path: Path) -> None:
    done = in_this_process(tmp_path, "doctor", "--json", "--storage", tmp_path / "mistyped")
    found = {finding["check"]: finding for finding in json.loads(done.stdout)}
    assert f"{tmp_path / 'mistyped'} does not exist" in found["storage"]["detail"]
    assert not (tmp_path / "mistyped").exists()


# --- no findings -----------------------------------------------------------------------------------------------------


def test_a_sound_installation_has_no_faults_and_stays_as_it_is(site: Site) -> None:
    before = {path: path.read_bytes() for path in site.folder.rglob("*") if path.is_file()}
    status, findings = site.doctor()
    assert status == 0, findings
    assert {name: finding["status"] for name, finding in findings.items() if name != "free space"} == dict.fromkeys(
        ("packages", "storage", "database", "database file", "rows", "stored bytes", "orphans", "jobs", "webhooks",
         "quotas", "clock", "memory", "scoring", "server"), "ok"
    )  # fmt: skip
    assert {path: path.read_bytes() for path in site.folder.rglob("*") if path.is_file()} == before


@pytest.mark.slow
def test_a_running_server_is_checked_without_a_finding(tmp_path: Path, iris_onnx: Path) -> None:
    with running(tmp_path, chunk_records=10) as api, closing(Database(api.settings.database_url)) as database:
        api.register("iris", iris_onnx)
        store = open_storage(str(tmp_path))
        for _ in range(5):
            answer = api.http.post("/v1/predict", params={"model": "iris", "reuse": False}, content=CSV * 4)
            seen = inspect_objects(database, store, most_bytes=1e9, seconds=10)
            assert seen.faults == ()
            assert api.finished(answer.json()["id"])["state"] in ("completed", "failed")
            api.http.delete(f"/v1/jobs/{answer.json()['id']}")


# --- bytes -----------------------------------------------------------------------------------------------------------

KINDS = ["models/*.onnx", "inputs/{uploaded}", "inputs/{completed}", "results/{completed}-*", "parts/{failed}/*-1",
         "parts/{faulty}/*-1"]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_bytes_that_are_missing_are_named_with_their_owner(site: Site, kind: str) -> None:
    lost = site.object_of(kind.format(**site.jobs._asdict()))
    lost.unlink()
    (fault,) = site.faults()
    assert fault.place.startswith(f"{lost.relative_to(site.folder)} of ")
    assert fault.found == "no object"
    assert "batchserve" in fault.mend


@pytest.mark.parametrize("kind", KINDS)
def test_one_bit_that_has_changed_is_found_by_the_digest(site: Site, kind: str) -> None:
    damaged = site.object_of(kind.format(**site.jobs._asdict()))
    flip(damaged)
    (fault,) = site.faults()
    assert fault.place.startswith(f"{damaged.relative_to(site.folder)} of ")
    assert fault.expected.startswith("SHA-256 ")
    assert fault.found.startswith("SHA-256 ")
    assert fault.found != fault.expected


def test_a_truncated_object_is_found_without_its_digest(site: Site) -> None:
    cut = site.object_of(f"results/{site.jobs.faulty}-*.errors")
    cut.write_bytes(cut.read_bytes()[:-1])
    (fault,) = site.faults(most_bytes=0)
    assert fault.place == f"results/{cut.name} of job {site.jobs.faulty}"
    assert (fault.expected, fault.found) == (f"{cut.stat().st_size + 1} bytes", f"{cut.stat().st_size} bytes")


def test_objects_beyond_the_budget_are_counted_and_deep_checks_them(site: Site) -> None:
    flip(site.object_of(f"results/{site.jobs.completed}-*"))
    for budget in ({"most_bytes": 0.0}, {"seconds": 0.0}):
        spared = site.inspected(**budget)
        assert spared.faults == ()
        assert spared.skipped >= 8
    assert len(site.faults()) == 1
    status, findings = site.doctor("--deep")
    assert status == 1
    assert findings["stored bytes"]["status"] == "fail"
    (fault,) = findings["stored bytes"]["faults"]
    assert site.jobs.completed in fault["place"]


def test_parts_that_are_no_longer_needed_are_not_reported_as_missing(site: Site) -> None:
    assert not list(site.folder.glob(f"parts/{site.jobs.completed}/*"))
    assert list(site.folder.glob(f"parts/{site.jobs.faulty}/*"))
    assert site.faults() == []


def test_bytes_that_no_row_references_are_counted_with_their_size_and_age(site: Site) -> None:
    orphan = site.folder / "results" / f"{NOBODY}-1"
    orphan.write_bytes(b"x" * 5000)
    status, findings = site.doctor()
    assert (status, findings["orphans"]["status"]) == (0, "ok")  # it may belong to a request in progress
    status, findings = site.doctor(BATCHSERVE_SWEEP_AGE="0.01")
    assert (status, findings["orphans"]["status"]) == (0, "warn")
    assert "1 unreferenced object(s) take 5.0 kB" in findings["orphans"]["detail"]
    assert f"results/{orphan.name}, is 0.0 hours old" in findings["orphans"]["detail"]
    assert orphan.exists()


# --- the database ----------------------------------------------------------------------------------------------------


@pytest.mark.sqlite  # a server has no such rows
def test_a_row_that_refers_to_nothing_is_found(site: Site) -> None:
    with closing(sqlite3.connect(site.folder / "batchserve.db")) as connection, connection:
        connection.execute(
            "INSERT INTO attempts (job_id, number, worker, started_at) VALUES (?, 1, 'w', 1.0)", [NOBODY]
        )
    with site.database() as database:
        (fault,) = inspect_database(database)
    assert fault.place.startswith("attempts, row ")
    assert fault.expected == "a row in jobs"


@pytest.mark.sqlite
def test_a_damaged_database_is_a_finding_and_not_a_traceback(site: Site) -> None:
    path = site.folder / "batchserve.db"
    data = bytearray(path.read_bytes())
    for page in range(2, len(data) // 4096):
        data[page * 4096 : page * 4096 + 400] = b"\xa5" * 400
    path.write_bytes(data)
    status, findings = site.doctor()
    assert status == 1
    assert findings["database file"]["status"] == "fail"
    assert findings["database file"]["faults"][0]["mend"].startswith("stop the server and restore")


@pytest.mark.parametrize(
    ("change", "status", "said"),
    [
        ("UPDATE alembic_version SET version_num = '0000'", 1, "newer"),
        ("DELETE FROM alembic_version", 0, "batchserve migrate"),
    ],
)
def test_another_schema_is_named_with_the_command(site: Site, change: str, status: int, said: str) -> None:
    site.sql(change)
    code, findings = site.doctor()
    assert code == status or (
        postgres.chosen is not None and code == 1
    )  # no start of a server migrates a shared database
    assert said in findings["database"]["detail"]
    assert "not checked" in findings["stored bytes"]["detail"]


def test_a_clock_behind_the_database_is_detected(site: Site) -> None:
    with site.database() as database:
        assert inspect_clock(database, time.time()) == []
        (fault,) = inspect_clock(database, time.time() - DAY)
    assert fault.place == "wall clock"


# --- jobs ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def leased(site: Site) -> Site:
    """One of its jobs is running, with a lease that ends in an hour."""
    with site.database() as database, database.read() as connection:
        now = database.moment(connection)
    change = (
        "UPDATE jobs SET state = 'running', worker = 'w1', lease_until = :until, lease_clock = :clock WHERE id = :id"
    )
    site.sql(change, until=now.steady + 3600, clock=now.clock, id=site.jobs.failed)
    assert site.stuck() == []
    return site


@pytest.mark.parametrize("change", ["lease_until = lease_until - 4000", "lease_clock = 'another boot'"])
def test_a_lapsed_lease_that_is_not_rescued_is_stuck(leased: Site, change: str) -> None:
    leased.change(leased.jobs.failed, change)
    (fault,) = leased.stuck()
    assert fault.place == f"job {leased.jobs.failed}"
    assert "w1" in fault.expected
    assert "batchserve worker" in fault.mend


def test_a_lease_that_has_just_lapsed_is_not_stuck(leased: Site) -> None:
    leased.change(leased.jobs.failed, "lease_until = lease_until - 3610")
    assert leased.stuck(patience=60) == []
    assert len(leased.stuck(patience=5)) == 1


def test_due_jobs_are_stuck_only_while_no_job_of_the_tenant_runs(leased: Site) -> None:
    leased.sql(
        "UPDATE jobs SET state = 'queued', queued_at = :value WHERE id = :id",
        value=time.time() - 300,
        id=leased.jobs.uploaded,
    )
    assert leased.stuck() == []
    leased.change(leased.jobs.failed, "state = 'failed'")
    (fault,) = leased.stuck()
    assert fault.place == "queue"
    assert "no worker" in fault.found
    leased.change(leased.jobs.uploaded, "run_after = :value", value=time.time() + DAY)
    assert leased.stuck() == []


def test_a_cancelled_job_that_runs_on_is_stuck(leased: Site) -> None:
    leased.sql(
        "UPDATE jobs SET cancel_requested_at = :value WHERE id = :id", value=time.time() - 300, id=leased.jobs.failed
    )
    (fault,) = leased.stuck()
    assert fault.mend == "restart the worker w1"


def test_attempts_that_are_lost_repeatedly_are_stuck(leased: Site) -> None:
    add = "INSERT INTO attempts (job_id, number, worker, started_at, outcome) VALUES (:id, :number, 'w0', 1.0, 'lost')"
    leased.sql(add, id=leased.jobs.failed, number=7)
    assert leased.stuck() == []
    leased.sql(add, id=leased.jobs.failed, number=8)
    (fault,) = leased.stuck()
    assert (fault.place, fault.found) == (f"job {leased.jobs.failed}", "2 lost with their worker")


def test_stuck_jobs_are_a_warning_with_the_command(leased: Site) -> None:
    leased.change(leased.jobs.failed, "lease_until = lease_until - 9000")
    status, findings = leased.doctor()
    assert (status, findings["jobs"]["status"]) == (0, "warn")
    assert findings["jobs"]["faults"][0]["mend"] == "batchserve worker (or serve)"


# --- on a terminal ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_text_output_has_each_fault_with_its_repair(site: Site) -> None:
    site.object_of(f"inputs/{site.jobs.completed}").unlink()
    environment = site.environment | {"COLUMNS": "100"}
    del environment["BATCHSERVE_STORAGE"]
    done = in_a_process(site.folder.parent, "doctor", "--storage", site.folder, **environment)
    assert done.returncode == 1
    assert (
        f"inputs/{site.jobs.completed} of job {site.jobs.completed}: expected {len(CSV)} bytes, found no object"
        in done.stdout
    )
    assert f"batchserve jobs rm {site.jobs.completed}" in done.stdout
