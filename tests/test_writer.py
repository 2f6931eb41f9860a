"""Writes of concurrent requests share a transaction, and none affects another."""

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
from sqlalchemy import Connection, insert, select
from sqlalchemy.exc import IntegrityError

from batchserve.db.connect import Database
from batchserve.db.tables import attempts, holds
from batchserve.errors import JobConflict
from batchserve.runtime import open_database
from batchserve.settings import Settings


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    with open_database(Settings(storage=str(tmp_path))) as opened:
        yield opened


def hold(name: str) -> Callable[[Connection], int]:
    """Its value: the number of holds that were committed before its transaction."""

    def work(connection: Connection) -> int:
        connection.execute(insert(holds), {"name": name, "until": 0.0, "clock": "c"})
        return len(committed(str(connection.engine.url)))

    return work


def committed(url: str) -> set[str]:
    with closing(Database(url)) as other, other.read() as connection:
        return set(connection.scalars(select(holds.c.name)))


def names(database: Database) -> set[str]:
    return committed(database.url)


async def together(database: Database, *works: Callable[[Connection], object]) -> list[object]:
    """The outcomes of works that wait at the same time."""
    is_held, may_end = threading.Event(), threading.Event()

    def other() -> None:
        with database.write():
            is_held.set()
            may_end.wait(20)

    blocking = asyncio.create_task(asyncio.to_thread(other))
    await asyncio.to_thread(is_held.wait, 20)
    first = asyncio.ensure_future(database.commit(lambda connection: connection))
    await asyncio.sleep(0.05)  # it waits for the other transaction, and the works for it
    waiting = [asyncio.ensure_future(database.commit(work)) for work in works]
    await asyncio.sleep(0)
    may_end.set()
    await blocking
    await first
    return await asyncio.gather(*waiting, return_exceptions=True)


def test_works_that_wait_share_a_transaction(database: Database) -> None:
    outcomes = asyncio.run(together(database, *(hold(f"h{number}") for number in range(20))))
    assert outcomes == [0] * 20
    assert names(database) == {f"h{number}" for number in range(20)}


def test_a_work_that_raises_is_undone_alone(database: Database) -> None:
    def conflict(connection: Connection) -> None:
        hold("undone")(connection)
        raise JobConflict("no")

    outcomes = asyncio.run(together(database, hold("a"), conflict, hold("a"), hold("b")))
    assert [type(outcome) for outcome in outcomes] == [int, JobConflict, IntegrityError, int]
    assert names(database) == {"a", "b"}


def test_works_are_done_alone_when_one_ends_the_transaction(database: Database) -> None:
    def ends_it(connection: Connection) -> None:
        driver = connection.connection.driver_connection
        assert driver is not None
        driver.execute("ROLLBACK")
        raise JobConflict("as SQLite does on a full disk")

    outcomes = asyncio.run(together(database, hold("a"), ends_it, hold("b")))
    assert [type(outcome) for outcome in outcomes] == [int, JobConflict, int]
    assert (outcomes[0], outcomes[2]) == (0, 1)
    assert names(database) == {"a", "b"}


def test_a_commit_that_fails_is_the_outcome_of_all(database: Database) -> None:
    def dangling(connection: Connection) -> None:
        connection.exec_driver_sql("PRAGMA defer_foreign_keys=ON")
        row = {"job_id": "none", "number": 1, "worker": "w", "started_at": 0.0}
        connection.execute(insert(attempts), row)

    outcomes = asyncio.run(together(database, hold("a"), dangling, hold("b")))
    assert [type(outcome) for outcome in outcomes] == [IntegrityError] * 3
    assert names(database) == set()


def test_a_work_goes_on_without_its_caller(database: Database) -> None:
    async def leave() -> None:
        task = asyncio.ensure_future(database.commit(hold("kept")))
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await database.commit(hold("next"))

    asyncio.run(leave())
    assert names(database) == {"kept", "next"}


def test_closing_waits_for_what_was_given(tmp_path: Path) -> None:
    async def give(database: Database) -> None:
        for number in range(50):
            asyncio.ensure_future(database.commit(hold(f"h{number}")))  # noqa: RUF006 - the test ends without them
        await asyncio.sleep(0)

    with open_database(Settings(storage=str(tmp_path))) as database:
        asyncio.run(give(database))
    with closing(Database(f"sqlite:///{tmp_path / 'batchserve.db'}")) as again:
        assert len(names(again)) == 50
