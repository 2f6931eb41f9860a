"""A backup taken under load restores everything that was acknowledged before it."""

import hashlib
import re
import shutil
import sqlite3
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx2
import pytest
from commands import Service
from selection import quick_first
from service import Api, ok, problem, running
from sqlalchemy import select
from typer.testing import CliRunner

from batchserve.cli import app as command_line
from batchserve.db import tables
from batchserve.db.connect import Database
from batchserve.errors import DigestMismatch, InvalidOptions, SchemaOutdated
from batchserve.jobs import execution
from batchserve.storage import open_storage
from batchserve.upkeep import holds
from batchserve.upkeep.backup import CopyReport, back_up, restore

HEADER = "sepal length (cm),sepal width (cm),petal length (cm),petal width (cm)\n"
CSV = HEADER + "5.1,3.5,1.4,0.2\n"
SOME_FAIL = CSV + "5.1,3.5,1.4,0.2\n" * 120 + ",,,\n"


def take(api: Api, target: Path, *, link: bool = True) -> CopyReport:
    database = Database(api.settings.database_url)
    try:
        return back_up(database, open_storage(api.settings.storage), target, link=link)
    finally:
        database.close()


def put_back(source: Path, folder: Path) -> CopyReport:
    return restore(source, open_storage(str(folder)), folder / "batchserve.db")


def answers(api: Api) -> dict[str, Any]:
    """Every job as its clients see it, with the bytes behind its links."""
    listed = ok(api.http.get("/v1/jobs", params={"limit": 200}))["jobs"]
    return {
        job["id"]: (
            {name: value for name, value in job.items() if name not in ("rows_per_s", "eta_s")},
            *(
                (a.status_code, re.sub(rb'"request_id":"[^"]*"', b"", a.content))
                for a in (api.http.get(job["links"][n]) for n in ("input", "result", "errors"))
            ),
            api.http.get(job["links"]["result"], params={"partial": True}).content if job["state"] == "failed" else b"",
        )
        for job in listed
    }


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory, iris_onnx: Path) -> Iterator[Api]:
    """A service with jobs in many states, which no test changes."""
    with running(tmp_path_factory.mktemp("source"), chunk_records=100, inline_bytes=0) as api:
        api.register("iris", iris_onnx)
        api.upload(CSV)
        first = api.run(SOME_FAIL, "iris")
        api.run(CSV, "iris")
        assert api.run(SOME_FAIL, "iris", reuse=True)["reused_from"] == first["id"]
        assert api.run(SOME_FAIL, "iris", on_row_error="fail")["state"] == "failed"
        yield api


@pytest.fixture
def taken(source: Api, tmp_path: Path) -> Path:
    take(source, tmp_path / "backup")
    return tmp_path / "backup"


# --- taking a backup -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("link", quick_first([True, False], 1))
def test_a_restored_service_answers_as_the_one_that_was_backed_up(source: Api, tmp_path: Path, link: bool) -> None:
    before = answers(source)
    stored = source.stored()
    copied = take(source, tmp_path / "backup", link=link)
    assert (copied.linked, copied.damaged) == (copied.objects if link else 0, ())
    restored = put_back(tmp_path / "backup", tmp_path / "restored")
    assert (restored.objects, restored.bytes, restored.damaged) == (copied.objects, copied.bytes, ())
    shutil.rmtree(tmp_path / "backup")
    with running(tmp_path / "restored", chunk_records=100) as api:
        left_out = stored - api.stored()
        assert len(api.stored()) == copied.objects == len(stored) - len(left_out)
        assert all(key.startswith("parts/") for key in left_out)  # of chunks that a retry scores again anyway
        assert answers(api) == before
        failed = next(
            job
            for job, *_ in before.values()
            if job["rows"]["failed"] and job["state"] == "completed" and job["reused_from"] is None
        )
        again = ok(api.http.post(f"{failed['links']['self']}/retry", json={"rows": "failed"}), 202)
        assert api.finished(again["id"])["state"] == "completed"
        assert api.run(CSV + "6.3,3.3,6.0,2.5\n", "iris")["state"] == "completed"


def test_a_backup_is_verified_by_sha256sum(taken: Path) -> None:
    checked = subprocess.run(["sha256sum", "--check", "--quiet", "SHA256SUMS"], cwd=taken, check=False)
    assert checked.returncode == 0
    files = {path.relative_to(taken).as_posix() for path in taken.rglob("*") if path.is_file()}
    listed = {line.partition("  ")[2] for line in (taken / "SHA256SUMS").read_text().splitlines()}
    assert files == listed | {"SHA256SUMS"}


def test_a_copied_backup_shares_no_file_with_the_storage(source: Api, tmp_path: Path) -> None:
    take(source, tmp_path / "backup", link=False)
    files = [path for path in (tmp_path / "backup").rglob("*") if path.is_file()]
    assert {path.stat().st_nlink for path in files} == {1}


def test_a_backup_that_fails_leaves_nothing(source: Api, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: Database, __: Path) -> None:
        raise OSError("no such luck")

    monkeypatch.setattr(Database, "copy_to", fail)
    with pytest.raises(OSError, match="no such luck"):
        take(source, tmp_path / "backup")
    assert list(tmp_path.iterdir()) == []
    database = Database(source.settings.database_url)
    with database.read() as connection:
        assert not holds.any_in_force(connection, database.moment(connection))
    database.close()


def test_a_backup_is_never_written_over_something_or_into_the_storage(source: Api, taken: Path) -> None:
    with pytest.raises(InvalidOptions, match="already exists"):
        take(source, taken)
    with pytest.raises(InvalidOptions, match="is in the storage"):
        take(source, Path(source.settings.storage) / "results" / "backup")


@pytest.mark.slow
def test_damage_is_reported_and_does_not_stop_a_backup(tmp_path: Path, iris_onnx: Path) -> None:
    with running(tmp_path / "storage", inline_bytes=0) as api:
        api.register("iris", iris_onnx)
        whole, missing, changed = api.run(CSV, "iris"), api.upload(CSV), api.upload(CSV)
        folder = Path(api.settings.storage)
        (folder / "inputs" / missing["id"]).unlink()
        (folder / "inputs" / changed["id"]).write_bytes(b"x")
        damaged = tuple(sorted(f"inputs/{job['id']}" for job in (missing, changed)))
        assert take(api, tmp_path / "backup").damaged == damaged
        result = api.result(whole).content
    assert put_back(tmp_path / "backup", tmp_path / "restored").damaged == damaged
    with running(tmp_path / "restored") as api:
        assert api.result(whole).content == result


# --- during writes ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_what_is_deleted_while_a_backup_is_taken_is_in_it(
    tmp_path: Path, iris_onnx: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the copy of the database and that of the bytes: a delete, and the end of a job, which drops its parts."""
    with running(tmp_path / "storage", chunk_records=100) as api:
        api.register("iris", iris_onnx)
        job = api.run(SOME_FAIL, "iris")
        before = answers(api)
        copy_to = Database.copy_to

        def copy_then_delete(database: Database, path: Path) -> None:
            copy_to(database, path)
            assert api.http.delete(job["links"]["self"]).status_code == 204
            problem(api.http.get(job["links"]["result"]), 404, "job-not-found")

        monkeypatch.setattr(Database, "copy_to", copy_then_delete)
        assert take(api, tmp_path / "backup").damaged == ()
        assert api.http.get("/v1/jobs").json()["jobs"] == []
    put_back(tmp_path / "backup", tmp_path / "restored")
    with running(tmp_path / "restored", chunk_records=100) as api:
        assert answers(api) == before


SLOW = {
    "BATCHSERVE_CHUNK_BYTES": "20000",
    "BATCHSERVE_PROCESSES": "1",
    "BATCHSERVE_POLL": "0.05",
    "BATCHSERVE_LEASE": "10.0",
    "BATCHSERVE_HEARTBEAT": "1.0",
    "BATCHSERVE_RESCUE": "0.2",
    "BATCHSERVE_SWEEP_AGE": "3.0",
}


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_backups_under_load_restore_with_all_that_was_acknowledged(tmp_path: Path, iris_onnx: Path) -> None:
    """Jobs are created, run, end, are deleted and swept while a separate command takes three backups. In each, every
    job that was acknowledged before exists, runs to its end, and gives the result of an undisturbed run."""
    (tmp_path / "live").mkdir()
    live = Service(tmp_path / "live", "serve", "--port", "0", settings=SLOW)
    servers = [live]
    body = HEADER + "".join(f"{n % 80 / 10},3.5,1.4,{n % 25 / 10}\n" for n in range(12_000))
    acknowledged: list[str] = []
    deleted: set[str] = set()
    stop = threading.Event()
    try:
        live.url = live.wait_for(r" at (http://\S+) ")[1]
        with httpx2.Client(base_url=live.url, timeout=60.0) as http:
            ok(http.put("/v1/models/iris", content=iris_onnx.read_bytes()), 201)

            def load() -> None:
                number = 0
                while not stop.is_set():
                    number += 1
                    content = body + f"{number % 80 / 10},3,1,1\n"
                    params: dict[str, str | bool] = {"model": "iris", "reuse": False}
                    job = ok(http.post("/v1/predict", content=content, params=params), 202)
                    acknowledged.append(job["id"])
                    if number % 3 == 0 and http.delete(f"/v1/jobs/{acknowledged[number // 2]}").status_code == 204:
                        deleted.add(acknowledged[number // 2])
                    stop.wait(0.15)

            loading = threading.Thread(target=load)
            loading.start()
            wanted: list[set[str]] = []
            deadline = time.monotonic() + 60
            while not ok(http.get("/v1/jobs", params={"state": "completed"}))["jobs"]:
                assert time.monotonic() < deadline, "no job is completed"
                time.sleep(0.1)
            for number in range(3):
                time.sleep(2.0)
                before = set(acknowledged)
                taken = Service(tmp_path / "live", "backup", str(tmp_path / f"backup-{number}"), settings=SLOW)
                assert taken.process.wait(60) == 0, taken.log.read_text()
                wanted.append(before - deleted)
            stop.set()
            loading.join()
            expected = {job_id: _result(http, job_id) for job_id in set(acknowledged) - deleted}
        live.end()
        states: set[str] = set()
        for number, there in enumerate(wanted):
            folder = tmp_path / f"restored-{number}"
            folder.mkdir()
            again = Service(folder, "restore", str(tmp_path / f"backup-{number}"), settings=SLOW)
            assert again.process.wait(60) == 0, again.log.read_text()
            with closing(sqlite3.connect(folder / "storage" / "batchserve.db")) as connection:
                states |= {state for (state,) in connection.execute("SELECT state FROM jobs")}
                assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
            server = Service(folder, "serve", "--port", "0", settings=SLOW)
            servers.append(server)
            server.url = server.wait_for(r" at (http://\S+) ")[1]
            with httpx2.Client(base_url=server.url, timeout=60.0) as http:
                results = {job_id: _result(http, job_id) for job_id in there}
            assert len(results.keys() & expected.keys()) > 1
            assert all(expected.get(job_id, sha256) == sha256 for job_id, sha256 in results.items())
            server.end()
        assert "completed" in states  # whether one ran just then is chance; a separate test covers running jobs
    finally:
        stop.set()
        for server in servers:
            server.end()


def _result(http: httpx2.Client, job_id: str) -> str:
    """The digest of the result, when the job is completed."""
    deadline = time.monotonic() + 90
    while (answer := http.get(f"/v1/download/{job_id}", params={"wait": 30})).status_code != 200:
        assert time.monotonic() < deadline, answer.text
        assert answer.json()["code"] == "result-not-ready", answer.text
    return hashlib.sha256(answer.content).hexdigest()


# --- restoring -------------------------------------------------------------------------------------------------------


def test_jobs_that_were_running_are_queued_again(tmp_path: Path, iris_onnx: Path) -> None:
    with running(tmp_path / "storage", worker=False) as api:
        api.register("iris", iris_onnx)
        job = ok(api.http.post("/v1/predict", content=CSV, params={"model": "iris"}), 202)
        database = Database(api.settings.database_url)
        with database.write() as connection:
            (claimed,) = execution.claim_due(connection, "gone", 0.1, database.moment(connection), 1)
        database.close()
        assert (claimed.id, api.job(job["id"])["state"]) == (job["id"], "running")
        take(api, tmp_path / "backup")
    put_back(tmp_path / "backup", tmp_path / "restored")
    with running(tmp_path / "restored") as api:
        done = api.finished(job["id"])
        assert (done["state"], [attempt["outcome"] for attempt in done["attempts"]]) == (
            "completed",
            ["lost", "completed"],
        )
        assert api.result(done).text.count("\n") == 2


def test_a_restored_database_has_no_hold(taken: Path, tmp_path: Path) -> None:
    put_back(taken, tmp_path / "restored")
    database = Database(f"sqlite:///{tmp_path / 'restored' / 'batchserve.db'}")
    with database.read() as connection:
        assert connection.execute(select(tables.holds)).all() == []
    database.close()


def test_a_restore_never_overwrites_something(taken: Path, tmp_path: Path) -> None:
    folder = tmp_path / "restored"
    open_storage(str(folder)).compose("inputs/one", [b"something"])
    with pytest.raises(InvalidOptions, match="is not empty"):
        put_back(taken, folder)
    assert [path.name for path in folder.rglob("*") if path.is_file()] == ["one"]


@pytest.mark.parametrize("what", ["inputs", "results", "models", "batchserve.db"])
@pytest.mark.parametrize("harm", ["flip", "cut", "remove"])
def test_a_damaged_backup_is_refused_and_leaves_nothing(source: Api, tmp_path: Path, what: str, harm: str) -> None:
    take(source, tmp_path / "backup", link=False)
    found = tmp_path / "backup" / what
    file = found if found.is_file() else min(found.iterdir())
    content = bytearray(file.read_bytes())
    if harm == "flip":
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    elif harm == "cut":
        file.write_bytes(content[:-1])
    else:
        file.unlink()
    with pytest.raises(DigestMismatch, match=rf"{what}.* is (damaged|missing) in the backup"):
        put_back(tmp_path / "backup", tmp_path / "restored")
    assert [path for path in (tmp_path / "restored").rglob("*") if path.is_file()] == []


@pytest.mark.parametrize("name", ["../outside", "/outside", "inputs/../../outside"])
def test_a_backup_cannot_write_outside_of_the_storage(taken: Path, tmp_path: Path, name: str) -> None:
    with (taken / "SHA256SUMS").open("a") as sums:
        sums.write(f"{'0' * 64}  {name}\n")
    with pytest.raises(DigestMismatch, match="not a storage key"):
        put_back(taken, tmp_path / "restored")


def test_a_truncated_list_of_sums_is_detected(taken: Path, tmp_path: Path) -> None:
    sums = taken / "SHA256SUMS"
    lines = sums.read_text().splitlines(keepends=True)
    sums.write_text("".join(lines[:-1]))
    assert put_back(taken, tmp_path / "restored").damaged == (lines[-1].split()[1],)


def test_a_folder_that_is_not_a_backup_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidOptions, match="not a backup"):
        put_back(tmp_path, tmp_path / "restored")


# --- commands --------------------------------------------------------------------------------------------------------


def invoke(*arguments: str) -> Any:
    return CliRunner().invoke(command_line, arguments)


def test_the_commands_report_what_they_did(source: Api, tmp_path: Path) -> None:
    made = invoke("backup", str(tmp_path / "backup"), "--storage", source.settings.storage)
    assert made.exit_code == 0, made.output
    assert "Backed up the database and" in made.stderr
    restored = invoke("restore", str(tmp_path / "backup"), "--storage", str(tmp_path / "restored"), "--json")
    assert restored.exit_code == 0, restored.output
    assert '"damaged": []' in restored.stdout
    with running(tmp_path / "restored") as api:
        assert answers(api) == answers(source)


def test_damage_sets_the_exit_status(tmp_path: Path) -> None:
    with running(tmp_path / "storage", inline_bytes=0) as api:
        job = api.upload(CSV)
        (Path(api.settings.storage) / "inputs" / job["id"]).unlink()
    made = invoke("backup", str(tmp_path / "backup"), "--storage", str(tmp_path / "storage"))
    assert made.exit_code == 1
    assert f"inputs/{job['id']}" in made.stderr.replace("\n", "")


def test_a_storage_without_a_database_cannot_be_backed_up(tmp_path: Path) -> None:
    (tmp_path / "storage").mkdir()
    made = invoke("backup", str(tmp_path / "backup"), "--storage", str(tmp_path / "storage"))
    assert isinstance(made.exception, SchemaOutdated)
    assert not (tmp_path / "backup").exists()
    assert invoke("backup", str(tmp_path / "backup"), "--storage", str(tmp_path / "none")).exit_code == 2
