"""Rows that no release writes: each fails alone, can be found, and can be removed."""

import json
import re
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing
from pathlib import Path
from typing import Any

import httpx2
import postgres
import pytest
from commands import Done, in_this_process
from prometheus_client.parser import text_string_to_metric_families
from service import Api, ok, problem, running
from sqlalchemy import Connection
from sqlalchemy.exc import ProgrammingError
from waiting import until

from batchserve.db.codec import Unwritable
from batchserve.db.connect import Database
from batchserve.db.tables import jobs as table
from batchserve.domain import Options
from batchserve.errors import InvalidOptions, UnreadableRow
from batchserve.jobs import execution, queries, requests
from batchserve.settings import Settings
from batchserve.storage import open_storage
from batchserve.upkeep import inspection
from batchserve.upkeep.backup import back_up
from batchserve.upkeep.inspection import UnreadableCount, find_unreadable, inspect_jobs, mend_unreadable
from batchserve.upkeep.retention import expire
from batchserve.upkeep.sweep import sweep
from batchserve.worker import Worker

CSV = b"sepal length (cm),sepal width (cm),petal length (cm),petal width (cm)\n5.1,3.5,1.4,0.2\n"

POISONS = {
    "options are not JSON": 'options = \'{"format": "csv", "max_errors": Infinity}\'',
    "options are cut off": "options = '{\"format\": '",
    "options are a list": "options = '[1]'",
    "options have no format": "options = '{\"top_k\": 1}'",
    "options have an unknown format": 'options = \'{"format": "xls"}\'',
    "options are a number": "options = 5",
    "options are bytes": "options = x'ff00'",
    "metadata is not JSON": "metadata = '{\"a\": NaN}'",
    "metadata has a number": "metadata = '{\"a\": 1}'",
    "metadata has a lone surrogate": 'metadata = \'{"a": "\\ud800"}\'',
    "error is not JSON": "error = 'boom'",
    "error is nested too deeply": 'error = \'{"a": ' + "[" * 600 + "]" * 600 + "}'",
    "facts are not JSON": "facts = '['",
    "facts are a list": "facts = '[1]'",
    "notes are numbers": """facts = '{"notes": [1]}'""",
    "created never": "created_at = 'yesterday'",
    "created at the end of time": "created_at = 9e999",
    "queued before the calendar": "queued_at = -1e15",
    "to run after the calendar": "run_after = -9e999",
    "an unknown state": "state = 'lost'",
    "an unknown input format": "inputs: format = 'xls'",
    "an unknown delimiter": "inputs: delimiter = '--'",
    "an unknown decimal mark": "inputs: decimal = '*'",
    "rows are a text": "rows_planned = 'many'",
    "fewer rows than none": "rows_ok = -1",
    "a progress beyond the end": "progress = 7.0",
    "a priority beyond all": "priority = 9223372036854775807",
    "a name that is bytes": "inputs: filename = x'ff'",
    "a key that is bytes": "inputs: key = x'00'",
    "a result without its length": "result_key = 'results/1-1'",
    "an attempt that is none": "attempt = -5",
}
TOO_MANY_INPUTS = "inputs_total = 2"
"""Found by the worker and by doctor: a list does not read the inputs after the first."""


def sql(folder: Path, statement: str, *values: Any) -> None:
    if postgres.chosen is not None:
        _sql_of_server(postgres.address_of(folder), statement, values)
        return
    with closing(sqlite3.connect(folder / "batchserve.db", timeout=30)) as connection, connection:
        assert connection.execute(statement, values).rowcount


def _sql_of_server(address: str, statement: str, values: tuple[Any, ...]) -> None:
    if re.search(r"\bx'\w+'", statement):
        pytest.skip("a text of a server holds no bytes")
    with closing(Database(address)) as database:
        try:
            with database.write() as connection:
                assert connection.exec_driver_sql(statement.replace("?", "%s"), values).rowcount
        except (ProgrammingError, InvalidOptions) as error:
            pytest.skip(f"the server takes no such value: {error}")


def queued(api: Api, model: str = "iris", **options: Any) -> str:
    answer = api.http.post("/v1/predict", params={"model": model, "reuse": False, **options}, content=CSV)
    return str(ok(answer, 202)["id"])


def folder_of(api: Api) -> Path:
    return Path(api.settings.storage)


def poison(api: Api, job_id: str, change: str) -> None:
    if change.startswith("inputs: "):
        sql(folder_of(api), f"UPDATE inputs SET {change.removeprefix('inputs: ')} WHERE job_id = ?", job_id)  # noqa: S608
    else:
        sql(folder_of(api), f"UPDATE jobs SET {change} WHERE id = ?", job_id)  # noqa: S608


@pytest.fixture(autouse=True, scope="module")
def restless() -> Iterator[None]:
    """Every request checks: under load a check is long, and the pause after it many times as long."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inspection, "_REST", 0.0)
        patch.setattr(inspection, "_SHORT_REST", 0.0)
        yield


def wait_for_unreadable_rows(api: Api, expected: int) -> None:
    """Until readyz and the metrics count so many."""
    while counted(api) != {expected}:
        time.sleep(0.02)


def counted(api: Api) -> set[float]:
    families = text_string_to_metric_families(api.http.get("/metrics").text)
    named = {sample.name: sample.value for family in families for sample in family.samples}
    return {ok(api.http.get("/readyz"))["unreadable_rows"], named["batchserve_unreadable_rows"]}


def listed(api: Api, **query: Any) -> set[str]:
    """The IDs on all pages."""
    found: set[str] = set()
    after: dict[str, str] = {}
    while True:
        page = ok(api.http.get("/v1/jobs", params={"limit": 2, **query, **after}))
        found |= {job["id"] for job in page["jobs"]}
        if page["next"] is None:
            return found
        after = {"after": page["next"]}


@pytest.fixture
def idle(tmp_path: Path, iris_onnx: Path) -> Iterator[Api]:
    with running(tmp_path / "storage", worker=False) as api:
        api.register("iris", iris_onnx)
        yield api


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory, iris_onnx: Path) -> Iterator[Api]:
    with running(tmp_path_factory.mktemp("shared"), worker=False) as api:
        api.register("iris", iris_onnx)
        yield api


@pytest.mark.parametrize("change", POISONS.values(), ids=POISONS.keys())
def test_a_row_that_cannot_be_read_fails_alone_and_can_be_removed(shared: Api, change: str) -> None:
    idle = shared
    for job_id in listed(idle, limit=200):
        idle.http.delete(f"/v1/jobs/{job_id}")
    before, poisoned, after = queued(idle), queued(idle), queued(idle)
    poison(idle, poisoned, change)
    assert listed(idle) == {before, after}
    body = problem(idle.http.get(f"/v1/jobs/{poisoned}"), 409, "unreadable-row")
    assert poisoned in body["detail"]
    for path in ("cancel", "retry"):
        problem(idle.http.post(f"/v1/jobs/{poisoned}/{path}"), 409, "unreadable-row")
    problem(idle.http.get(f"/v1/download/{poisoned}"), 409, "unreadable-row")
    wait_for_unreadable_rows(idle, 1)
    ok(idle.http.post(f"/v1/jobs/{before}/cancel"), 202)
    assert idle.http.delete(f"/v1/jobs/{poisoned}").status_code == 204
    problem(idle.http.get(f"/v1/jobs/{poisoned}"), 404, "job-not-found")
    wait_for_unreadable_rows(idle, 0)
    assert not [key for key in idle.stored() if poisoned in key]


@pytest.mark.slow
@pytest.mark.sqlite
def test_workers_skip_rows_that_cannot_be_read_and_end_their_jobs(tmp_path: Path, iris_onnx: Path) -> None:
    with running(tmp_path, worker=False) as idle:
        idle.register("iris", iris_onnx)
        poisoned = {queued(idle): change for change in (*POISONS.values(), TOO_MANY_INPUTS)}
        for job_id, change in poisoned.items():
            poison(idle, job_id, change)
        due = [queued(idle, max_errors=1) for _ in range(3)]
    with running(tmp_path) as api:  # also after a restart
        assert {api.finished(job_id)["state"] for job_id in due} == {"completed"}
        assert api.run(CSV, "iris")["state"] == "completed"
        assert listed(api) >= set(due)
        wait_for_unreadable_rows(api, len(poisoned) - 2)  # two had an invalid error, which was replaced
    with closing(sqlite3.connect(tmp_path / "batchserve.db")) as connection:
        connection.text_factory = bytes
        ends = dict(connection.execute("SELECT state, count(*) FROM jobs WHERE reason = 'unreadable-row' GROUP BY 1"))
        left = connection.execute("SELECT count(*) FROM jobs WHERE state IN ('queued', 'running')").fetchone()[0]
    assert ends == {b"failed": len(poisoned) - 1}  # one is in no state that is ever claimed
    assert left == 0


def test_a_poisoned_equal_job_is_not_reused_and_an_older_one_is(tmp_path: Path, iris_onnx: Path) -> None:
    with running(tmp_path) as api:
        api.register("iris", iris_onnx)
        first, second = api.run(CSV, "iris")["id"], api.run(CSV, "iris")["id"]
        poison(api, second, "facts = '[1]'")
        assert api.run(CSV, "iris", reuse=True)["reused_from"] == first


def test_retention_and_the_sweep_continue_despite_rows_that_cannot_be_read(tmp_path: Path, iris_onnx: Path) -> None:
    with running(tmp_path) as api:
        api.register("iris", iris_onnx)
        good, bad = api.run(CSV, "iris")["id"], api.run(CSV, "iris")["id"]
        poison(api, bad, "metadata = '[]'")
    later = time.time() + 1e6
    settings = Settings(storage=str(tmp_path), database=postgres.address_of(tmp_path), keep_results="1s", free_bytes=0)
    storage = open_storage(str(tmp_path))
    with closing(Database(settings.database_url)) as database:
        assert expire(database, storage, settings, later).jobs == 2
        sweep(database, storage, 0.0, later)
        with database.read() as connection:
            assert queries.get(connection, good).state == "expired"
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.parent.name in ("results", "inputs")]


@pytest.mark.sqlite
def test_a_foreign_id_does_not_stop_the_sweep(tmp_path: Path, iris_onnx: Path) -> None:
    with running(tmp_path, inline_bytes=0) as api:
        api.register("iris", iris_onnx)
        job_id = api.run(CSV, "iris")["id"]
    with closing(sqlite3.connect(tmp_path / "batchserve.db")) as connection, connection:
        connection.execute("CREATE TEMP TABLE one AS SELECT * FROM jobs WHERE id = ?", [job_id])
        connection.execute("UPDATE one SET id = '0'")
        connection.execute("INSERT INTO jobs SELECT * FROM one")
    orphan = tmp_path / "inputs" / "01a1f7d8-94a2-73b4-888c-2ac5b95e5d38"
    orphan.write_bytes(b"x")
    with closing(Database(f"sqlite:///{tmp_path / 'batchserve.db'}")) as database:
        assert sweep(database, open_storage(str(tmp_path)), 0.0, time.time() + 60).total >= 1
    assert not orphan.exists()


@pytest.mark.sqlite
def test_a_backup_contains_all_that_can_be_read(tmp_path: Path, iris_onnx: Path) -> None:
    folder = tmp_path / "storage"
    with running(folder, inline_bytes=0) as api:
        api.register("iris", iris_onnx)
        good, bad = api.run(CSV, "iris")["id"], api.run(CSV, "iris")["id"]
        poison(api, bad, "inputs: key = x'00'")
        poison(api, bad, "created_at = 9e999")
        with closing(Database(api.settings.database_url)) as database:
            copied = back_up(database, open_storage(str(folder)), tmp_path / "backup")
    assert copied.damaged == ()
    assert list((tmp_path / "backup").glob(f"results/{good}-*"))


# --- rows of other tables --------------------------------------------------------------------------------------------

MODEL_POISONS = {
    "a signature that is not JSON": "signature = '{'",
    "a signature with an infinity": 'signature = replace(signature, \'"batch":\', \'"x":1e999,"batch":\')',
    "a signature without a batch": 'signature = \'{"inputs": [], "outputs": [], "batch": 0}\'',
    "metadata that is not JSON": "metadata = 'x'",
    "a time that is none": "created_at = 'now'",
}


@pytest.mark.slow
@pytest.mark.parametrize("change", MODEL_POISONS.values(), ids=MODEL_POISONS.keys())
def test_a_model_that_cannot_be_read_fails_alone_and_can_be_removed(
    tmp_path: Path, iris_onnx: Path, petals_onnx: bytes, change: str
) -> None:
    with running(tmp_path) as api:
        api.register("iris", iris_onnx)
        api.register("petals", petals_onnx)
        done = api.run(CSV, "iris")
        sql(tmp_path, f"UPDATE models SET {change} WHERE name = 'iris'")  # noqa: S608
    with running(tmp_path) as api:  # a server goes on with the versions that it has read before
        assert [model["name"] for model in ok(api.http.get("/v1/models"))["models"]] == ["petals"]
        for path in ("/v1/models/iris", "/v1/models/iris@1", "/v1/models/iris/versions/1"):
            problem(api.http.get(path), 409, "unreadable-row")
        problem(api.http.post("/v1/predict?model=iris", content=CSV), 409, "unreadable-row")
        assert api.job(done["id"])["state"] == "completed"  # its result is still valid
        assert api.result(done).content
        wait_for_unreadable_rows(api, 1)
        assert api.http.delete("/v1/models/iris/versions/1").status_code == 204
        wait_for_unreadable_rows(api, 0)
        api.register("iris", iris_onnx)
        assert api.run(CSV, "iris")["state"] == "completed"


@pytest.mark.slow
def test_a_job_whose_model_cannot_be_read_ends_and_blocks_no_other(
    tmp_path: Path, iris_onnx: Path, petals_onnx: bytes
) -> None:
    with running(tmp_path, worker=False) as idle:
        idle.register("iris", iris_onnx)
        idle.register("petals", petals_onnx)
        bad, good = queued(idle), queued(idle, "petals")
        sql(tmp_path, "UPDATE models SET signature = 'x' WHERE name = 'iris'")
    with running(tmp_path) as api:
        assert api.finished(good)["state"] == "completed"
        assert api.finished(bad)["reason"] == "unreadable-row"


@pytest.mark.slow
@pytest.mark.parametrize("change", ["error = '{'", "started_at = 9e999", "worker = x'ff'", "rows_before = 'x'"])
def test_an_attempt_that_cannot_be_read_is_left_out(tmp_path: Path, iris_onnx: Path, change: str) -> None:
    with running(tmp_path) as api:
        api.register("iris", iris_onnx)
        job = api.run(CSV, "iris")
        sql(tmp_path, f"UPDATE attempts SET {change}")  # noqa: S608
        assert api.job(job["id"])["attempts"] == []
        wait_for_unreadable_rows(api, 1)


def test_a_job_whose_chunks_cannot_be_read_ends_and_blocks_no_other(tmp_path: Path, iris_onnx: Path) -> None:
    with running(tmp_path, chunk_records=1) as api:
        api.register("iris", iris_onnx)
        bad = api.run(CSV + b",,,\n" * 3, "iris", on_row_error="fail")["id"]
        sql(tmp_path, "UPDATE chunks SET start = 'x', attempt = NULL WHERE job_id = ?", bad)
        good = ok(api.http.post(f"/v1/jobs/{bad}/retry"), 202)["id"]
        assert good == bad
        assert api.finished(bad)["reason"] == "unreadable-row"
        assert api.run(CSV, "iris")["state"] == "completed"


@pytest.mark.slow
@pytest.mark.parametrize("change", ["status = 'x'", "answer = '{', job_id = NULL", "job_id = x'ff'", "status = 500"])
def test_an_idempotency_key_that_cannot_be_read_is_a_clear_problem(
    tmp_path: Path, iris_onnx: Path, change: str
) -> None:
    with running(tmp_path, worker=False) as api:
        api.register("iris", iris_onnx)
        send: dict[str, Any] = {"url": "/v1/predict?model=iris", "content": CSV, "headers": {"idempotency-key": "mine"}}
        ok(api.http.post(**send), 202)
        sql(tmp_path, f"UPDATE idempotency_keys SET {change}")  # noqa: S608
        problem(api.http.post(**send), 409, "unreadable-row")
        ok(api.http.post(**send | {"headers": {"idempotency-key": "another"}}), 202)
        wait_for_unreadable_rows(api, 1)
        with closing(Database(api.settings.database_url)) as database:
            (row,) = mend_unreadable(database, open_storage(str(tmp_path)))
        assert (row.table, row.key) == ("idempotency_keys", ("default", "mine"))
        ok(api.http.post(**send), 202)


def cli(folder: Path, *arguments: str, **settings: str) -> Done:
    return in_this_process(folder, *arguments, BATCHSERVE_STORAGE=str(folder), **settings)


@pytest.mark.sqlite
@pytest.mark.slow
def test_a_key_that_cannot_be_read_opens_nothing_and_is_revoked_by_mend(tmp_path: Path) -> None:
    good = cli(tmp_path, "keys", "create", "ada", "--scope", "admin").stdout.strip()
    bad = cli(tmp_path, "keys", "create", "bob").stdout.strip()
    sql(tmp_path, "UPDATE keys SET scope = 'root' WHERE name = 'bob'")
    with running(tmp_path, worker=False) as api:
        problem(api.http.get("/v1/jobs", headers={"authorization": f"Bearer {bad}"}), 401, "unauthorized")
        ok(api.http.get("/v1/jobs", headers={"authorization": f"Bearer {good}"}))
        assert [key["name"] for key in json.loads(cli(tmp_path, "keys", "list", "--json").stdout)] == ["ada"]
        assert cli(tmp_path, "mend").returncode == 0
        problem(api.http.get("/v1/jobs", headers={"authorization": f"Bearer {bad}"}), 401, "unauthorized")
        ok(api.http.get("/v1/jobs", headers={"authorization": f"Bearer {good}"}))
        assert ok(api.http.get("/readyz"))["unreadable_rows"] == 0


@pytest.mark.slow
def test_the_doctor_names_the_row_and_its_command_removes_it(
    tmp_path: Path, iris_onnx: Path, start_server: Callable[..., AbstractContextManager[str]]
) -> None:
    with start_server(tmp_path, "--no-worker", BATCHSERVE_FREE_BYTES="0") as url:
        httpx2.put(f"{url}/v1/models/iris", content=iris_onnx.read_bytes(), timeout=60).raise_for_status()
        ids = [httpx2.post(f"{url}/v1/predict?model=iris", content=CSV).json()["id"] for _ in range(2)]
        folder = tmp_path / "storage"
        sql(folder, "UPDATE jobs SET options = 'x' WHERE id = ?", ids[0])
        sql(folder, "UPDATE jobs SET tenant = x'ff' WHERE id = ?", ids[1])  # to which no client connects
        done = cli(folder, "doctor", "--json", BATCHSERVE_URL=url)
        assert "Traceback" not in done.stderr
        (finding,) = [found for found in json.loads(done.stdout) if found["check"] == "rows"]
        assert (done.returncode, finding["status"], len(finding["faults"])) == (1, "fail", 2)
        mends = {fault["place"]: fault["mend"] for fault in finding["faults"]}
        assert f"batchserve jobs rm {ids[0]}" in mends[f"jobs, {ids[0]}"]
        assert cli(folder, "jobs", "rm", ids[0], BATCHSERVE_URL=url).returncode == 0
        mended = json.loads(cli(folder, "mend", "--json").stdout)
        assert [row["key"] for row in mended] == [[ids[1]]]
        with closing(Database(f"sqlite:///{folder / 'batchserve.db'}")) as database:
            assert list(find_unreadable(database)) == []


@pytest.mark.sqlite
def test_a_check_of_many_rows_counts_all_of_them_in_the_end(
    tmp_path: Path, iris_onnx: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inspection, "_SCAN", 0.0)
    with running(tmp_path, worker=False) as api:
        api.register("iris", iris_onnx)
        job_id = queued(api)
        with closing(sqlite3.connect(tmp_path / "batchserve.db")) as connection, connection:
            connection.execute("CREATE TEMP TABLE one AS SELECT * FROM jobs")
            for number in range(2500):
                connection.execute("UPDATE one SET id = ?, facts = '{'", [f"{number:036d}"])
                connection.execute("INSERT INTO jobs SELECT * FROM one")
        assert listed(api, limit=200) == {job_id}
        with closing(Database(api.settings.database_url)) as database:
            count = UnreadableCount(database)
            counts = [count.count()]
            while len(counts) < 2 or counts[-1] > counts[-2]:
                counts.append(count.count())
        assert counts[-1] == 2500
        assert len(counts) > 2, "no look was cut short"


# --- a worker that cannot claim --------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_worker_that_cannot_claim_makes_the_service_unready_and_claims_make_it_ready(
    tmp_path: Path, iris_onnx: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running(tmp_path) as api:
        api.register("iris", iris_onnx)
        is_due, failed = execution.is_due, threading.Semaphore(0)

        def raises(*_: Any) -> bool:
            failed.release()
            raise RuntimeError("secret")

        monkeypatch.setattr(execution, "is_due", raises)
        for _ in range(10):  # at the tenth try, nine have failed
            failed.acquire()
        answer = api.http.get("/readyz")
        assert answer.status_code == 503
        assert "could not claim" in answer.json()["checks"]["worker"]
        assert "secret" not in answer.text
        monkeypatch.setattr(execution, "is_due", is_due)
        until(lambda: api.http.get("/readyz").status_code == 200)
        assert "worker" not in api.http.get("/readyz").json()["checks"]
        assert api.run(CSV, "iris")["state"] == "completed"


def test_a_worker_whose_thread_has_ended_reports_trouble(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with running(tmp_path, worker=False) as api:
        worker = Worker(api.http.app.state.service.runtime)  # type: ignore[attr-defined]
        before = worker.trouble

        def ends(*_: Any) -> None:
            raise SystemExit

        monkeypatch.setattr(worker, "turn", ends)
        with pytest.raises(SystemExit):
            worker.run()
        assert (before, "has ended" in str(worker.trouble)) == (None, True)


@pytest.mark.slow
def test_the_doctor_reports_a_tenant_whose_jobs_are_not_claimed_although_others_run(idle: Api) -> None:
    running_job, waiting, busy = queued(idle), queued(idle), queued(idle)
    with closing(Database(idle.settings.database_url)) as database, database.read() as connection:
        now = database.moment(connection)
    lease = f"lease_until = {now.steady + 3600}, lease_clock = '{now.clock}'"
    poison(idle, running_job, f"state = 'running', {lease}")
    for job_id in (waiting, busy):
        poison(idle, job_id, "queued_at = queued_at - 4000")
    with closing(Database(idle.settings.database_url)) as database:
        assert inspect_jobs(database, patience=60) == []  # they wait for the busy workers
        poison(idle, waiting, "tenant = 'another'")
        (fault,) = inspect_jobs(database, patience=60)
        assert (fault.place, "another" in fault.found) == ("queue", True)


# --- validation of writes --------------------------------------------------------------------------------------------


def write_both(connection: Connection, value: Any) -> None:
    connection.execute(table.update().values(state="failed"))
    connection.execute(table.update().values(metadata={"a": value}))


@pytest.mark.parametrize(
    "value",
    [float("nan"), float("inf"), "\ud800", "a\0b", {"\udfff": 1}, {"a\0": 1}, [2**64], [-(2**63) - 1], [b"bytes"]],
    ids=ascii,
)
def test_values_that_json_cannot_read_back_are_not_written(shared: Api, value: Any) -> None:
    job_id = queued(shared)
    with closing(Database(shared.settings.database_url)) as database:
        with pytest.raises(Unwritable), database.write() as connection:
            write_both(connection, value)
        with database.read() as connection:
            assert queries.get(connection, job_id).state == "queued"


@pytest.mark.parametrize("values", [{"worker": "\ud800"}, {"worker": "a\0"}, {"run_after": float("inf")},
                                    {"progress": float("nan")}], ids=ascii)  # fmt: skip
def test_texts_and_times_that_cannot_be_read_back_are_not_written(shared: Api, values: dict[str, Any]) -> None:
    job_id = queued(shared)
    with closing(Database(shared.settings.database_url)) as database:
        with pytest.raises(Unwritable), database.write() as connection:
            connection.execute(table.update().values(**values))
        with database.read() as connection:
            assert queries.get(connection, job_id).state == "queued"


def test_a_predict_that_cannot_be_read_back_is_not_committed(shared: Api) -> None:
    job_id = shared.upload(CSV)["id"]
    with closing(Database(shared.settings.database_url)) as database:
        with database.read() as connection:
            model = queries.get(connection, queued(shared)).model
        assert model is not None
        for odd in ({"run_after": 1e15}, {"priority": 2**40}, {"options": Options("xls")}):
            given: Any = {"metadata": {}, "priority": 0, "run_after": None, "options": Options("csv"), **odd}
            options = given.pop("options")
            with pytest.raises(UnreadableRow), database.write() as connection:
                requests.enqueue_if_uploaded(connection, job_id, model, options, "digest", **given, now=time.time())
    assert shared.job(job_id)["state"] == "uploaded"


def test_an_error_that_quotes_odd_input_can_be_stored_and_shown() -> None:
    error = UnreadableRow("a\0\ud800", errors=[{"value": float("nan"), "long": 2**70, "deep": [[[{"x": {1, 2}}]]]}])
    assert json.loads(json.dumps(error.to_json(), allow_nan=False).encode())["message"] == "a\\x00\\ud800"
