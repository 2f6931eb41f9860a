"""The database is away for a while: requests get a 503, and jobs wait."""

import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import graphs
import httpx2
import orjson
import pandas as pd
import postgres
import pytest
from bench import Bench, answers, opened, rows_of
from commands import Service as Command
from commands import in_a_process
from hand import HandEngine
from selection import quick_first
from service import Api, ok, problem, running
from sqlalchemy import Connection, text
from waiting import until

from batchserve.db.connect import Database
from batchserve.errors import LeaseLost, Unavailable
from batchserve.jobs import execution

CSV = "sepal length (cm),sepal width (cm),petal length (cm),petal width (cm)\n" + "5.1,3.5,1.4,0.2\n" * 20
AWAY = 6.0
"""Seconds of an outage that is longer than a lease."""


@pytest.fixture
def bench(database_url: str, tmp_path: Path) -> Iterator[Bench]:
    with opened(database_url, tmp_path / "store", HandEngine(), chunk_records=10) as bench:
        yield bench


def operations(api: Api) -> Iterator[tuple[str, str]]:
    for path, methods in api.http.get("/openapi.json").json()["paths"].items():
        for method in methods:
            if method in ("get", "put", "post", "patch", "delete"):
                yield method.upper(), path


# --- requests ---


@pytest.mark.postgres
def test_every_route_answers_503_while_the_database_is_away_and_works_when_it_is_back(
    own_server: postgres.Server, tmp_path: Path, iris_onnx: Path
) -> None:
    with running(tmp_path, database=own_server.migrated()) as api:
        api.register("iris", iris_onnx)
        job = api.run(CSV, "iris")
        names = {"job_id": job["id"], "upload_id": job["id"], "schedule_id": "x", "name": "iris", "version": "1"}
        names |= {"webhook_id": "jobs", "delivery_id": job["id"], "tenant": "red"}
        for _ in range(2):
            ok(api.http.get(job["links"]["self"]))  # now it is cached
        own_server.stop()
        tried = 0
        for method, path in operations(api):
            if path in ("/livez", "/readyz"):
                continue
            began = time.monotonic()
            answer = api.http.request(method, path.format(**names), content=CSV if method != "GET" else None)
            problem(answer, 503, "unavailable")
            assert int(answer.headers["retry-after"]) >= 1
            assert time.monotonic() - began < 5
            tried += 1
        assert tried >= 15
        assert ok(api.http.get("/livez"))["status"] == "ok"
        unready = ok(api.http.get("/readyz"), 503)
        assert unready["checks"]["database"] != "ok"
        own_server.start()
        until(lambda: api.http.get("/readyz").status_code == 200, 30)
        assert ok(api.http.get(job["links"]["self"]))["state"] == "completed"
        assert api.run(CSV, "iris")["state"] == "completed"


@pytest.mark.postgres
@pytest.mark.parametrize(
    ("address", "reason"),
    [
        ("nobody@/{database}", 'role "nobody" does not exist'),
        ("postgres@/missing", 'database "missing" does not exist'),
        ("postgres@/{database}?port=1", "No such file"),
    ],
)
def test_a_server_does_not_start_without_its_database_and_says_why_in_a_line(
    postgres_server: postgres.Server, tmp_path: Path, address: str, reason: str
) -> None:
    database = postgres_server.migrated().partition("@")[2].partition("?")[0].removeprefix("/")
    url = f"postgresql+psycopg://{address.format(database=database)}"
    url += f"{'&' if '?' in url else '?'}host={postgres_server.socket}"
    for command in (("serve", "--port", "0"), ("worker",)):
        done = in_a_process(tmp_path, *command, BATCHSERVE_DATABASE=url)
        assert done.returncode == 1
        assert reason in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1, done.stderr


@pytest.mark.postgres
def test_commands_say_what_is_true_of_a_server(own_server: postgres.Server, tmp_path: Path, iris_onnx: Path) -> None:
    url = own_server.migrated()
    with running(tmp_path / "storage", database=url) as api:
        api.register("iris", iris_onnx)
        assert api.run(CSV, "iris")["state"] == "completed"

    def command(*words: str | Path) -> tuple[int, str]:
        done = in_a_process(tmp_path, *words, BATCHSERVE_DATABASE=url, BATCHSERVE_URL="http://127.0.0.1:9")
        return done.returncode, done.stdout + done.stderr

    status, told = command("doctor", "--json")
    found = {finding["check"]: finding for finding in orjson.loads(told)}
    assert status == 0, told
    assert {finding["status"] for name, finding in found.items() if name != "memory"} == {"ok"}
    assert "pg_amcheck" in found["database file"]["detail"]
    status, told = command("backup", tmp_path / "copy")
    assert status == 2
    assert "pg_dump" in told
    status, told = command("restore", tmp_path)
    assert status == 2
    assert "pg_restore" in told
    assert command("keys", "create", "k")[0] == 0
    own_server.stop()
    for words in (("doctor",), ("migrate",), ("keys", "list")):
        status, told = command(*words)
        assert status == 1
        assert "No such file" in told, told
    found = orjson.loads(command("doctor", "--json")[1])
    assert {finding["status"] for finding in found if finding["check"] in ("database", "database file")} == {"fail"}


@pytest.mark.postgres
def test_the_documented_rights_suffice(postgres_server: postgres.Server, tmp_path: Path, iris_onnx: Path) -> None:
    url = postgres_server.migrated()
    with closing(Database(url)) as database, database.write() as connection:
        for statement in (
            "CREATE ROLE clerk LOGIN",
            "GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA public TO clerk",
            "GRANT USAGE ON ALL SEQUENCES IN SCHEMA public TO clerk",
        ):
            connection.execute(text(statement))
    with running(tmp_path, database=url.replace("postgres@", "clerk@"), direct_seconds=0) as api:
        api.register("iris", iris_onnx)
        job = api.run(CSV, "iris")
        assert job["state"] == "completed"
        assert "completed" in api.http.get(f"/v1/jobs/{job['id']}/events").text
        assert api.http.delete(job["links"]["self"]).status_code == 204
        assert api.http.delete("/v1/models/iris/versions/1").status_code == 204
    with closing(Database(url)) as database, database.write() as connection:
        connection.execute(text("DROP OWNED BY clerk"))
        connection.execute(text("DROP ROLE clerk"))


# --- jobs ---


def reached(url: str, path: str) -> httpx2.Response:
    """The first answer that is not a 503, within a minute. No other error is accepted."""
    deadline = time.monotonic() + 60
    while (answer := httpx2.get(f"{url}{path}", timeout=30)).status_code == 503:
        assert int(answer.headers["retry-after"]) >= 1
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return answer


@contextmanager
def site(folder: Path, database: str) -> Iterator[tuple[str, list[Command]]]:
    """A server and two workers in processes of their own; yields its address, and all of them."""
    settings = {
        "BATCHSERVE_DATABASE": database,
        "BATCHSERVE_STORAGE": str(folder / "storage"),
        "BATCHSERVE_PROCESSES": "1",
        "BATCHSERVE_CHUNK_BYTES": "40000",
        "BATCHSERVE_LEASE": "4",
        "BATCHSERVE_HEARTBEAT": "1",
        "BATCHSERVE_RESCUE": "0.2",
        "BATCHSERVE_POLL": "0.1",
    }
    commands = [Command(folder, "serve", "--port", "0", "--no-worker", settings=settings)]
    try:
        commands += [Command(folder, "worker", settings=settings) for _ in range(2)]
        for worker in commands[1:]:
            worker.wait_for("Worker is ready")
        yield commands[0].wait_for(r" at (http://\S+) ")[1], commands
    finally:
        for command in commands:
            command.end()


@pytest.mark.postgres
@pytest.mark.slow
@pytest.mark.timeout(180)
def test_a_job_survives_crashes_and_a_long_outage_of_the_database(
    own_server: postgres.Server, tmp_path: Path, iris: pd.DataFrame, iris_onnx: Path
) -> None:
    table = pd.concat([iris] * 1000).to_csv(index=False)
    with site(tmp_path, own_server.migrated()) as (url, commands):
        httpx2.put(f"{url}/v1/models/iris", content=iris_onnx.read_bytes(), timeout=60).raise_for_status()

        def submit() -> str:
            target = f"{url}/v1/predict?model=iris&reuse=false&passthrough=all"
            answer = httpx2.post(target, content=table, timeout=60)
            return str(ok(answer, 202)["id"])

        def job(job_id: str) -> dict[str, Any]:
            found: dict[str, Any] = ok(reached(url, f"/v1/jobs/{job_id}"))
            return found

        disturbed, done = submit(), 0
        for seconds in (0.0, 0.5, AWAY):
            until(lambda: job(disturbed)["chunks"]["done"] >= done + 5, 60)  # noqa: B023
            assert job(disturbed)["state"] == "running", "the job ended before it could be disturbed"
            own_server.stop()
            time.sleep(seconds)
            own_server.start()
            done = job(disturbed)["chunks"]["done"]
        until(lambda: job(disturbed)["state"] != "running", 120)
        ended = job(disturbed)
        assert (ended["state"], ended["attempt"]) == ("completed", 1), ended
        undisturbed = submit()
        until(lambda: job(undisturbed)["state"] == "completed", 120)
        results = [reached(url, f"/v1/download/{job_id}").content for job_id in (disturbed, undisturbed)]
        assert results[0] == results[1]
        assert results[0].count(b"\n") == table.count("\n")
        assert [command.process.poll() for command in commands] == [None] * 3


@pytest.mark.parametrize("records", quick_first([1, 60], 1))
def test_a_commit_whose_outcome_is_unknown_is_repeated_and_counts_once(
    bench: Bench, records: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    hand = bench.by_hand(chunk_records=10)
    job_id = bench.submit(bench.register("busy", graphs.busy()), rows_of(*range(records)), passthrough=("id",))
    calls = hand.calls()
    lost = answers_lost(monkeypatch)
    hand.work(*calls)
    assert bench.outcomes(job_id) == ["completed"]
    assert lost[0] >= (8 if records > 10 else 2)
    job = bench.get(job_id)
    assert (job.rows_ok, job.rows_planned, job.chunks_done) == (records, records, -(-records // 10))
    assert [name for name, _ in answers(bench.result(job_id))] == [f"r{number}" for number in range(records)]


def answers_lost(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """From now on, the answer to every second commit is lost. Returns their growing number."""
    write, lost = Database.write, [0]

    @contextmanager
    def uncertain(self: Database, **how: Any) -> Iterator[Connection]:
        with write(self, **how) as connection:
            yield connection
        lost[0] += 1
        if lost[0] % 2:
            raise Unavailable("the connection was lost after the commit")

    monkeypatch.setattr(Database, "write", uncertain)
    return lost


def test_a_worker_that_did_not_reach_the_database_rescues_no_job_before_others_can_renew_their_leases(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    hand = bench.by_hand(lease=30.0, rescue=1.0)
    busy = bench.register("busy", graphs.busy())
    job_id = bench.submit(busy, rows_of(*range(60)))
    with bench.database.write() as connection:  # another worker
        (job,) = execution.claim_due(connection, "other", 10.0, hand.clock.moment(connection), 1)
    fails = [True]
    is_due = execution.is_due

    def away(*given: Any) -> bool:
        if fails[0]:
            raise Unavailable("away")
        return is_due(*given)

    monkeypatch.setattr(execution, "is_due", away)
    while hand.clock.passed < 100.0:
        hand.worker.turn()
    fails[0] = False
    back = hand.clock.passed
    while hand.clock.passed < back + 15.0:
        hand.worker.turn()
    assert bench.get(job_id).attempt == 1
    with bench.database.write() as connection:
        execution.renew_lease_if_mine(connection, job_id, 1, 10.0, hand.clock.moment(connection))
    while hand.clock.passed < back + 100.0 and bench.get(job_id).attempt == 1:
        hand.worker.turn()
    assert bench.get(job_id).attempt == 2  # that worker is dead
    assert hand.clock.passed > back + 20.0
    with bench.database.write() as connection, pytest.raises(LeaseLost):
        execution.renew_lease_if_mine(connection, job_id, job.attempt, 10.0, hand.clock.moment(connection))


@pytest.mark.postgres
@pytest.mark.parametrize("database_url", ["postgres"], indirect=True)
def test_a_worker_that_begins_as_a_server_is_back_rescues_no_job_before_others_can_renew_their_leases(
    bench: Bench,
) -> None:
    job_id = bench.submit(bench.register("busy", graphs.busy()), rows_of(*range(60)))
    with bench.database.write() as connection:  # another worker, whose lease has lapsed during the outage
        execution.claim_due(connection, "other", -1.0, bench.database.moment(connection), 1)
    hand = bench.by_hand(lease=30.0, rescue=1.0)
    while hand.clock.passed < 25.0:
        hand.worker.turn()
    assert bench.get(job_id).attempt == 1
    while hand.clock.passed < 60.0 and bench.get(job_id).attempt == 1:
        hand.worker.turn()
    assert bench.get(job_id).attempt == 2  # that worker is dead
