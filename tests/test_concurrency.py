"""Concurrent transactions: on every kind of database the outcome is as if one had run after the other."""

import asyncio
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import pytest
from service import ok, running
from sqlalchemy import Connection, bindparam, event, text, update

from batchserve import clock, idempotency, keys, registry
from batchserve.access import Scope
from batchserve.db.connect import Database, Moment
from batchserve.db.prepared import Prepared
from batchserve.db.tables import holds
from batchserve.domain import (
    Chunk,
    Dialect,
    JobState,
    ModelVersion,
    Options,
    Result,
    ScoredChunk,
    Signature,
    StoredInput,
)
from batchserve.errors import BatchserveError, Conflict, ModelInUse, ModelNotFound, NotFound
from batchserve.jobs import execution, expiry, plan, queries, requests
from batchserve.jobs.ends import forget_events

Act = Callable[[Connection], Any]
CHUNK = Chunk(0, 10, 0, 100)


def meet(database: Database, first: Act, second: Act) -> tuple[Any, Any]:
    """The results or exceptions of two transactions, the second of which begins just before the first one commits."""
    acted = threading.Event()

    def earlier() -> Any:
        try:
            with database.write() as connection:
                outcome = first(connection)
                acted.set()
                time.sleep(0.1)
                return outcome
        finally:
            acted.set()

    def later() -> Any:
        assert acted.wait(10)
        with database.write() as connection:
            return second(connection)

    def outcome_of(act: Callable[[], Any]) -> Any:
        try:
            return act()
        except BatchserveError as error:
            return error

    with ThreadPoolExecutor(2) as pool:
        outcomes = [pool.submit(outcome_of, act) for act in (earlier, later)]
        return outcomes[0].result(), outcomes[1].result()


def add(connection: Connection, name: str = "iris", digest: str = "d1") -> ModelVersion:
    return registry.add(connection, name, digest, 1, Signature((), ()), {}, 1.0)


def upload(connection: Connection, job_id: str) -> None:
    stored = StoredInput(f"inputs/{job_id}", "csv", Dialect(), 1, "s")
    requests.create(connection, job_id, [stored], None, 1.0)


def enqueue(connection: Connection, job_id: str, model: ModelVersion) -> bool:
    return requests.enqueue_if_uploaded(
        connection, job_id, model, Options("csv"), "r", metadata={}, priority=0, run_after=None, now=2.0
    )


@pytest.fixture
def model(database: Database) -> ModelVersion:
    with database.write() as connection:
        return add(connection)


def test_concurrent_registrations_of_one_name_give_two_versions(database: Database) -> None:
    made = meet(database, lambda c: add(c, digest="d1"), lambda c: add(c, digest="d2"))
    assert [version.version for version in made] == [1, 2]


def test_no_job_is_queued_for_a_model_that_is_being_deleted(database: Database, model: ModelVersion) -> None:
    with database.write() as connection:
        upload(connection, "1")
    deleted, queued = meet(
        database, lambda c: registry.delete_if_unused(c, model, 3.0), lambda c: enqueue(c, "1", model)
    )
    assert deleted is None
    assert isinstance(queued, ModelNotFound)


def test_a_model_for_which_a_job_is_being_queued_is_not_deleted(database: Database, model: ModelVersion) -> None:
    with database.write() as connection:
        upload(connection, "1")
    queued, deleted = meet(
        database, lambda c: enqueue(c, "1", model), lambda c: registry.delete_if_unused(c, model, 3.0)
    )
    assert queued is True
    assert isinstance(deleted, ModelInUse)


def test_a_model_whose_job_is_being_retried_is_not_deleted(database: Database, model: ModelVersion) -> None:
    with database.write() as connection:
        upload(connection, "1")
        enqueue(connection, "1", model)
        requests.request_cancel(connection, "1", 3.0)
    retried, deleted = meet(
        database,
        lambda c: requests.retry_if_stopped(c, "1", 4.0),
        lambda c: registry.delete_if_unused(c, model, 5.0),
    )
    assert retried.state == "queued"
    assert isinstance(deleted, ModelInUse)


def test_jobs_are_queued_for_one_model_at_the_same_time(database: Database, model: ModelVersion) -> None:
    with database.write() as connection:
        for job_id in ("1", "2"):
            upload(connection, job_id)
    queued = meet(database, lambda c: enqueue(c, "1", model), lambda c: enqueue(c, "2", model))
    assert queued == (True, True)


def test_a_job_does_not_reuse_a_result_that_is_being_deleted(database: Database, model: ModelVersion) -> None:
    complete(database, model, "1")
    deleted, equal = meet(
        database, lambda c: requests.delete_if_not_running(c, "1"), lambda c: queries.find_equal(c, "r")
    )
    assert deleted.result_key == "results/1-1"
    assert equal is None


def test_a_result_that_is_being_reused_is_referenced_before_its_job_is_deleted(
    database: Database, model: ModelVersion
) -> None:
    """Otherwise its bytes would be removed, because no row references them yet."""
    complete(database, model, "1")
    with database.write() as connection:
        upload(connection, "2")

    def take(connection: Connection) -> bool:
        equal = queries.find_equal(connection, "r")
        assert equal is not None
        return enqueue(connection, "2", model) and requests.complete_as_equal_if_queued(connection, "2", equal, 5.0)

    def delete(connection: Connection) -> set[str]:
        requests.delete_if_not_running(connection, "1")
        return queries.named_results(connection, ["results/1-1"])

    assert meet(database, take, delete) == (True, {"results/1-1"})


def complete(database: Database, model: ModelVersion, job_id: str) -> None:
    with database.write() as connection:
        upload(connection, job_id)
        enqueue(connection, job_id, model)
        execution.claim_due(connection, "w", 30.0, Moment(3.0, 3.0, "c"), 1)
        plan.add_chunks_if_mine(connection, job_id, 1, [CHUNK], complete=True)
        plan.commit_chunk_if_mine(connection, job_id, 1, ScoredChunk(CHUNK, 0, 1, "c", 0), 0.5)
        execution.complete_if_mine(connection, job_id, 1, Result(f"results/{job_id}-1", 1, "a", None, 0), {}, 4.0)


def test_one_of_two_concurrent_keys_with_one_name_is_refused(database: Database) -> None:
    made, refused = meet(
        database,
        lambda c: keys.create(c, "ada", Scope.USER, "default", 1.0),
        lambda c: keys.create(c, "ada", Scope.USER, "default", 1.0),
    )
    assert made[0].name == "ada"
    assert isinstance(refused, Conflict)
    with database.write() as connection:
        keys.revoke(connection, "ada", 2.0)
        with pytest.raises(NotFound):
            keys.revoke(connection, "ada", 2.0)


def test_workers_that_first_observe_the_clock_together_create_one_row(database: Database) -> None:
    now = Moment(5.0, 5.0, "c")
    assert meet(database, lambda c: clock.settled_for(c, now), lambda c: clock.settled_for(c, now)) == (5.0, 5.0)


def test_a_worker_runs_on_a_host_with_the_longest_possible_name(
    database_url: str, tmp_path: Path, iris_onnx: Path, iris_csv: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("socket.gethostname", lambda: "h" * 64)
    with running(tmp_path, database=database_url) as api:
        api.register("iris", iris_onnx)
        assert api.run(iris_csv.read_bytes(), "iris")["state"] == "completed"


def test_concurrent_registrations_and_deletions_of_one_model_are_all_answered(
    database_url: str, tmp_path: Path, iris_onnx: Path
) -> None:
    """The last one determines whether the artifact exists; in any order, none gives a 500."""
    content = iris_onnx.read_bytes()
    with running(tmp_path, worker=False, database=database_url) as api, ThreadPoolExecutor(4) as pool:
        for number in range(3):
            put = [pool.submit(api.http.put, f"/v1/models/m{number}", content=content) for _ in range(3)]
            assert {answer.result().status_code for answer in put} <= {200, 201}
            gone = [pool.submit(api.http.delete, f"/v1/models/m{number}/versions/1") for _ in range(3)]
            assert sorted(answer.result().status_code for answer in gone) == [204, 404, 404]
        assert ok(api.http.put("/v1/models/last", content=content), 201)["version"] == 1
        assert (tmp_path / "models").is_dir()


def test_a_read_changes_nothing(database_url: str) -> None:
    if database_url.startswith("sqlite"):
        pytest.skip("SQLite has no transactions that only read")
    with closing(Database(database_url)) as database, pytest.raises(BatchserveError), database.read() as connection:
        connection.execute(text("DELETE FROM models"))


# --- deadlocks ---


@pytest.mark.postgres
def test_a_transaction_that_a_deadlock_breaks_off_begins_once_more(postgres_server: Any) -> None:
    """Two transactions write two rows in opposite orders; the server lets one of them fail."""
    with closing(Database(postgres_server.migrated())) as database, ThreadPoolExecutor(2) as pool:
        with database.write() as connection:
            connection.execute(text("INSERT INTO holds (name, until, clock) VALUES ('a', 0, 'c'), ('b', 0, 'c')"))
        both, begun = threading.Barrier(2), []

        def write(first: str, second: str, connection: Connection) -> None:
            begun.append(first)
            connection.execute(text("UPDATE holds SET until = until + 1 WHERE name = :name"), {"name": first})
            if begun.count(first) == 1:
                both.wait(20)
            connection.execute(text("UPDATE holds SET until = until + 1 WHERE name = :name"), {"name": second})

        writes = [
            pool.submit(database.write_freeing, partial(write, "a", "b")),
            pool.submit(asyncio.run, database.commit(partial(write, "b", "a"))),
        ]
        for done in writes:
            done.result()
        with database.read() as connection:
            assert connection.scalars(text("SELECT until FROM holds")).all() == [2.0, 2.0]
        assert len(begun) >= 3  # again, where the other one has not ended yet


@pytest.mark.postgres
def test_a_transaction_that_a_deadlock_breaks_off_at_its_commit_begins_once_more(postgres_server: Any) -> None:
    raised = Prepared(update(holds).where(holds.c.name == bindparam("its_name")).values(until=holds.c.until + 1.0))
    with closing(Database(postgres_server.migrated())) as database, ThreadPoolExecutor(2) as pool:
        with database.write() as connection:
            connection.execute(text("INSERT INTO holds (name, until, clock) VALUES ('a', 0, 'c'), ('b', 0, 'c')"))
        both, begun = threading.Barrier(2), []

        def write(first: str, second: str, connection: Connection) -> None:
            begun.append(first)
            raised.run(connection, {"its_name": first})
            if begun.count(first) == 1:
                both.wait(20)
            raised.send(connection, {"its_name": second})  # the commit is the next statement

        writes = [
            pool.submit(database.write_freeing, partial(write, "a", "b")),
            pool.submit(asyncio.run, database.commit(partial(write, "b", "a"))),
        ]
        for done in writes:
            done.result()
        with database.read() as connection:
            assert connection.scalars(text("SELECT until FROM holds")).all() == [2.0, 2.0]
        assert len(begun) >= 3


@pytest.mark.postgres
@pytest.mark.parametrize("database_url", ["postgres"], indirect=True)
def test_expiry_takes_no_job_that_ends_after_it_has_locked_those_to_expire(database: Database) -> None:
    with database.write() as connection:
        model = add(connection)
        for job_id in ("over", "ends"):
            upload(connection, job_id)
            enqueue(connection, job_id, model)
        requests.request_cancel(connection, "over", 2.0)

    def end_the_other(*_: Any) -> None:
        with database.write() as other:
            requests.request_cancel(other, "ends", 2.0)

    with database.write() as expiring:
        event.listen(expiring, "after_cursor_execute", end_the_other, once=True)
        taken = expiry.expire_if_over(expiring, ["over", "ends"], ended_before=5.0, uploaded_before=0.0, now=6.0)
    assert [job.id for job in taken] == ["over"]
    with database.read() as connection:
        assert queries.get(connection, "ends").state is JobState.CANCELLED


@pytest.mark.postgres
def test_workers_that_tidy_the_same_jobs_together_never_wait_for_each_other_in_a_circle(postgres_server: Any) -> None:
    url, rounds, jobs = postgres_server.migrated(), 12, 40
    late = Moment(1e6, 1e6, "database")
    ids = [f"{number:036}" for number in range(jobs)]

    def tidy(seed: int) -> list[str]:
        """One worker; returns what it has rescued."""
        random, rescued = Random(seed), list[str]()
        barrier.wait(20)
        with closing(Database(url)) as database:
            for _ in range(rounds):
                acts: list[Act] = [
                    lambda c: rescued.extend(execution.rescue_expired(c, 10**6, late)[0]),
                    lambda c: execution.claim_due(c, "w", -1.0, late, 7),
                    lambda c: expiry.drop_input_if_over(c, random.sample(ids, jobs), 1e5, 1e6),
                    lambda c: expiry.expire_if_over(
                        c, random.sample(ids, jobs), ended_before=5.0, uploaded_before=5.0, now=6.0
                    ),
                    lambda c: expiry.delete_expired_before(c, 7.0, 3),
                    lambda c: forget_events(c, 1e5, 5, 1e9),
                    lambda c: idempotency.forget_older(c, 1e5),
                    lambda c: requests.request_cancel(c, random.choice(ids), 2.0),
                ]
                random.shuffle(acts)
                for act in acts:
                    with suppress(NotFound, Conflict), database.write() as connection:  # Unavailable: a deadlock
                        act(connection)
        return rescued

    with closing(Database(url)) as database, database.write() as connection:
        model = add(connection)
        for job_id in ids:
            upload(connection, job_id)
            enqueue(connection, job_id, model)
            idempotency.remember(connection, job_id, "f", job_id, 202, 1.0)
    barrier = threading.Barrier(4)
    with ThreadPoolExecutor(4) as pool:
        rescued = [job_id for found in pool.map(tidy, range(4)) for job_id in found]
    assert rescued
    deadlocks = text("SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()")
    with closing(Database(url)) as database, database.read() as connection:
        assert connection.scalar(deadlocks) == 0
