"""A database server that hangs, is restarted, or is asked by many at once."""

import asyncio
import os
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Connection, bindparam, func, insert, select, text, update
from sqlalchemy.exc import IntegrityError, InternalError

from batchserve.db import connect, server
from batchserve.db.connect import Database, unbounded
from batchserve.db.prepared import Prepared
from batchserve.db.tables import contents, holds
from batchserve.db.watcher import Probe, Version
from batchserve.errors import BatchserveError, Conflict, InsufficientStorage, InvalidOptions, Unavailable

pytestmark = pytest.mark.postgres
ONE = text("SELECT 1")
OTHERS = text("SELECT pid FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()")
END_OTHERS = text(
    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
    "WHERE datname = current_database() AND pid <> pg_backend_pid()"
)


@pytest.fixture
def url(request: pytest.FixtureRequest) -> str:
    """The address of a database."""
    address: str = request.getfixturevalue("postgres_server").migrated()
    return address


@pytest.fixture
def database(url: str) -> Iterator[Database]:
    with closing(Database(url)) as opened:
        yield opened


def one(connection: Connection) -> Any:
    return connection.scalar(ONE)


def processes(url: str) -> list[int]:
    """Those of the server for the connections to this database."""
    with closing(Database(url)) as other, other.look() as connection:
        return list(connection.scalars(OTHERS))


def end_connections(url: str) -> None:
    """As a restart of the server does."""
    with closing(Database(url)) as other, other.look() as connection:
        connection.execute(END_OTHERS)


@contextmanager
def hanging(url: str, *, whole: bool = False) -> Iterator[None]:
    """None of the connections so far gets an answer; if the `whole` server hangs, there are no new ones either."""
    stopped = processes(url)
    assert stopped
    if whole:
        stopped.append(int(Path(f"/proc/{stopped[0]}/stat").read_text().rpartition(")")[2].split()[1]))  # its parent
    for process in stopped:
        os.kill(process, signal.SIGSTOP)
    try:
        yield
    finally:
        for process in stopped:
            os.kill(process, signal.SIGCONT)


async def ticking(awaited: Callable[[], Any]) -> tuple[Any, int]:
    """What a coroutine returns, and how often the event loop ran meanwhile, at most a hundred times a second."""
    task, ticks = asyncio.ensure_future(awaited()), 0
    while not task.done():
        await asyncio.sleep(0.01)
        ticks += 1
    return await task, ticks


# --- versions ---


def test_a_version_that_is_asked_for_after_a_commit_shows_it_whatever_is_on_its_way(database: Database) -> None:
    async def versions() -> list[Version | None]:
        found = [await database.version()]
        for number in range(50):
            early = [asyncio.create_task(database.version()) for _ in range(3)]
            await asyncio.sleep(0)  # these are on their way
            with database.write() as connection:
                connection.execute(insert(holds).values(name=str(number), until=1.0, clock="c"))
            found.append(await database.version())
            await asyncio.gather(*early)
        return found

    found = asyncio.run(versions())
    assert None not in found
    assert len(set(found)) == 51


def test_many_requests_at_once_ask_the_server_a_few_times(database: Database) -> None:
    asked = text("SELECT xact_commit FROM pg_stat_database WHERE datname = current_database()")
    probe = Probe(select(holds.c.until).where(holds.c.name == bindparam("of_name")))

    def count() -> int:
        with database.look() as connection:
            connection.execute(text("SELECT pg_stat_clear_snapshot()"))
            return int(connection.scalar(asked) or 0)

    async def ask() -> tuple[list[Any], list[Any]]:
        await database.version()
        versions = await asyncio.gather(*(database.version() for _ in range(1000)))
        return versions, await asyncio.gather(*(database.probe(probe, of_name="none") for _ in range(1000)))

    before = count()
    versions, probes = asyncio.run(ask())
    assert len(set(versions)) == 1
    assert set(probes) == {()}
    asyncio.run(asyncio.sleep(1.1))  # the server counts with a delay of a second
    assert count() - before < 100


def test_a_caller_that_leaves_takes_the_version_from_no_other(database: Database) -> None:
    async def ask() -> Version | None:
        first, second = asyncio.create_task(database.version()), asyncio.create_task(database.version())
        await asyncio.sleep(0)
        first.cancel()
        return await second

    assert asyncio.run(ask()) is not None


def test_a_probe_with_a_value_that_the_server_refuses_finds_nothing_and_harms_no_other(database: Database) -> None:
    probe = Probe(select(holds.c.until).where(holds.c.name == bindparam("of_name")))

    async def ask() -> tuple[object, Version | None]:
        return await database.probe(probe, of_name="a\0b"), await database.version()

    refused, version = asyncio.run(ask())
    assert refused is None
    assert version is not None


def test_loops_of_several_threads_ask_for_versions(database: Database) -> None:
    async def version() -> Version | None:
        return await database.version()

    with ThreadPoolExecutor(4) as pool:
        versions = list(pool.map(lambda _: asyncio.run(version()), range(8)))
    assert None not in versions
    assert len(set(versions)) == 1


# --- statements that travel together ---

ADD = Prepared(insert(holds))
NAMES = Prepared(select(holds.c.name).order_by(holds.c.name))
ADD_CONTENT, CONTENTS = Prepared(insert(contents)), Prepared(select(contents.c.content))


def hold(name: str) -> dict[str, Any]:
    return {"name": name, "until": 1.0, "clock": "c"}


def names(connection: Connection) -> list[str]:
    return [row["name"] for row in NAMES.rows(connection, {})]


def test_statements_without_a_result_are_executed_before_whatever_follows_them(database: Database) -> None:
    with database.write() as connection:
        ADD.send(connection, hold("a"), hold("b"))
        assert names(connection) == ["a", "b"]
        ADD.send(connection, hold("c"))
        assert connection.scalar(select(func.count()).select_from(holds)) == 3
        ADD.send(connection, hold("d"))
    with database.read() as connection:
        assert names(connection) == ["a", "b", "c", "d"]


def test_a_statement_without_a_result_that_fails_ends_its_transaction_with_the_next_one(database: Database) -> None:
    with database.write() as connection:
        ADD.send(connection, hold("a"))

    def add_and_read(connection: Connection) -> list[str]:
        ADD.send(connection, hold("b"), hold("a"))
        return names(connection)

    with pytest.raises(IntegrityError):
        asyncio.run(database.commit(add_and_read))
    with pytest.raises(IntegrityError):
        asyncio.run(database.commit(lambda connection: ADD.send(connection, hold("b"), hold("a"), hold("c"))))
    for number in range(10):  # the connection and what it has prepared are as good as before
        with database.write() as connection:
            ADD.send(connection, hold(f"later {number}"))
    with database.read() as connection:
        assert names(connection) == ["a", *(f"later {number}" for number in range(10))]


def test_a_statement_without_a_result_is_forgotten_with_its_transaction(database: Database) -> None:
    with suppress(KeyError), database.write() as connection:
        ADD.send(connection, hold("a"))
        raise KeyError
    with database.write() as connection:
        assert names(connection) == []


def test_a_transaction_whose_failure_was_passed_over_is_not_taken_for_committed(database: Database) -> None:
    def pass_over(connection: Connection) -> None:
        ADD.send(connection, hold("a"), hold("a"))
        with suppress(IntegrityError):
            names(connection)

    with pytest.raises(InternalError):
        asyncio.run(database.commit(pass_over))
    with database.read() as connection:
        assert names(connection) == []


def test_the_results_of_many_bytes_and_statements_travel_at_once(database: Database) -> None:
    key = "row:inputs/{}".format
    with database.write() as connection:
        ADD_CONTENT.send(connection, *({"key": key(number), "content": bytes(2**20)} for number in range(20)))
        assert [len(row["content"]) for row in CONTENTS.rows(connection, {})] == [2**20] * 20


# --- works that share a transaction ---


def test_works_that_come_together_share_transactions(database: Database) -> None:
    current = text("SELECT CAST(pg_current_xact_id() AS text)")

    async def together() -> list[Any]:
        await database.commit(one)
        return await asyncio.gather(
            *(database.commit(lambda connection: connection.scalar(current)) for _ in range(40))
        )

    assert len(set(asyncio.run(together()))) < 20


@pytest.mark.parametrize("at_once", [True, False], ids=["at once", "at its commit"])
def test_a_work_that_fails_affects_none_that_shares_its_transaction(database: Database, at_once: bool) -> None:
    def add(name: str, connection: Connection) -> str:
        if name == "refused":
            raise Conflict(name)
        ADD.send(connection, hold(name))
        if at_once:
            names(connection)
        return name

    wanted = [f"{number:02}" for number in range(20)]
    given = ["00", *wanted[:10], "refused", *wanted[10:], "19"]

    async def together() -> list[Any]:
        works = (database.commit(partial(add, name)) for name in given)
        return await asyncio.gather(*works, return_exceptions=True)

    told = asyncio.run(together())
    with database.read() as connection:
        assert names(connection) == wanted
    assert [name for name in told if isinstance(name, str)].count("refused") == 0
    assert sorted(name for name in told if isinstance(name, str)) == wanted
    assert sorted(type(error).__name__ for error in told if not isinstance(error, str)) == [
        "Conflict",
        "IntegrityError",
        "IntegrityError",
    ]


def test_a_work_that_waits_for_a_lock_delays_no_other(database: Database) -> None:
    raised = Prepared(update(holds).where(holds.c.name == bindparam("its_name")).values(until=holds.c.until + 1.0))
    with database.write() as connection:
        ADD.send(connection, hold("locked"))

    async def together() -> float:
        with database.write() as holding:
            raised.run(holding, {"its_name": "locked"})
            waiting = asyncio.create_task(
                database.commit(lambda connection: raised.run(connection, {"its_name": "locked"}))
            )
            await asyncio.sleep(0.1)
            began = time.monotonic()
            await asyncio.gather(*(database.commit(one) for _ in range(20)))
            passed = time.monotonic() - began
            assert not waiting.done()
        assert await waiting == 1
        return passed

    assert asyncio.run(together()) < 2.0


def test_a_work_is_done_without_its_caller(database: Database) -> None:
    async def leave() -> None:
        task = asyncio.create_task(database.commit(lambda connection: ADD.send(connection, hold("left"))))
        await asyncio.sleep(0)
        task.cancel()
        await database.commit(one)
        await asyncio.sleep(0.2)

    asyncio.run(leave())
    with database.read() as connection:
        assert names(connection) == ["left"]


# --- a server that was restarted, or hangs ---


def test_connections_that_were_lost_while_unused_are_replaced_unseen(database: Database) -> None:
    async def use() -> list[Any]:
        return [
            await database.version() is not None,
            await database.fetch(one),
            await database.fetch_one(one),
            await database.commit(one),
        ]

    async def use_twice() -> list[list[Any]]:
        first = await use()
        end_connections(database.url)
        await asyncio.sleep(0.2)  # a write is not repeated, but the end of a connection is seen as soon as it has come
        second = await use()
        end_connections(database.url)
        return [first, second, [await database.version() is not None, *[await database.fetch(one) for _ in range(5)]]]

    assert asyncio.run(use_twice()) == [[True, 1, 1, 1], [True, 1, 1, 1], [True, 1, 1, 1, 1, 1]]


def test_a_prepared_read_is_repeated_on_a_new_connection_when_its_own_was_lost(database: Database) -> None:
    count = Prepared(select(func.count().label("holds")).select_from(holds))

    async def use() -> list[Any]:
        found = await asyncio.gather(
            *(database.fetch(lambda connection: count.scalar(connection, {})) for _ in range(5))
        )
        end_connections(database.url)  # all that those have left in the pool
        return [*found, await database.fetch(lambda connection: count.scalar(connection, {}))]

    assert asyncio.run(use()) == [0] * 6


def test_nothing_is_written_through_the_doors_for_reads(database: Database) -> None:
    for door in (database.read, database.look):
        with pytest.raises(Unavailable), door() as connection:
            connection.execute(insert(holds).values(name="h", until=1.0, clock="c"))
    with database.look() as connection:
        assert connection.scalar(select(func.count()).select_from(holds)) == 0


def test_the_time_of_the_server_goes_on_in_a_transaction(database: Database) -> None:
    clock = text("SELECT extract(epoch FROM clock_timestamp())")
    for door in (database.write, database.read, database.look):
        with door() as connection:
            before = float(connection.scalar(clock) or 0)
            time.sleep(0.5)
            now = database.moment(connection).wall
            after = float(connection.scalar(clock) or 0)
        # It is known from the beginning of the transaction, by as much too early as that took to arrive.
        assert before < now < after + 0.001


@pytest.mark.parametrize("whole", [False, True])
def test_the_event_loop_goes_on_while_a_version_is_awaited_from_a_server_that_hangs(
    url: str, whole: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connect, "CONNECT_TIMEOUT", 2)

    async def ask(database: Database) -> tuple[list[Any], int, float, Version | None]:
        assert await database.version() is not None
        with hanging(url, whole=whole):
            versions, ticks = await ticking(lambda: asyncio.gather(*(database.version() for _ in range(5))))
            began = time.monotonic()
            await database.version()
            again = time.monotonic() - began
        await asyncio.sleep(0.5)
        return versions, ticks, again, await database.version()

    with closing(Database(url)) as database:
        versions, ticks, again, later = asyncio.run(ask(database))
    assert [version is None for version in versions] == [whole] * 5  # a new connection works, if there is one
    assert ticks >= 20
    assert again < 1.0  # a server that hangs is not asked again at once
    assert later is not None


def test_a_read_or_write_of_a_server_that_hangs_is_unavailable(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connect, "BUSY_TIMEOUT_MS", 500)
    monkeypatch.setattr(connect, "CONNECT_TIMEOUT", 2)
    with closing(Database(url)) as database:
        with database.read() as connection:
            one(connection)
        with database.write() as connection, hanging(url):
            began = time.monotonic()
            with pytest.raises(Unavailable):
                asyncio.run(database.fetch(one))
            assert time.monotonic() - began < 5
        with pytest.raises(Unavailable), database.write() as connection, hanging(url):
            one(connection)
        assert asyncio.run(database.fetch(one)) == 1


def test_a_transaction_without_bounds_takes_its_time(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connect, "BUSY_TIMEOUT_MS", 200)
    with closing(Database(url)) as database:
        with database.write() as connection, unbounded(connection):
            connection.execute(text("SELECT pg_sleep(3)"))
        with pytest.raises(Unavailable), database.write() as connection:
            connection.execute(text("SELECT pg_sleep(3)"))


def test_the_locks_of_a_process_that_says_nothing_any_more_are_released(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "SILENCE", 0.5)
    with closing(Database(url)) as silent, closing(Database(url)) as other:
        with other.write() as connection:
            connection.execute(insert(holds).values(name="h", until=1.0, clock="c"))

        def change(connection: Connection) -> None:
            connection.execute(update(holds).values(until=holds.c.until + 1.0))

        def change_and_be_silent(connection: Connection) -> None:
            change(connection)
            with other.write() as waiting:  # for the lock
                change(waiting)
            change(connection)

        with pytest.raises(Unavailable), silent.write() as connection:
            change_and_be_silent(connection)
        with silent.read() as connection:
            assert connection.scalar(select(holds.c.until)) == 2.0


# --- what a server says ---


@pytest.mark.parametrize(
    ("state", "error"),
    [
        ("53100", InsufficientStorage),  # a full disk
        ("25006", Unavailable),  # a server that was made a standby
        ("53300", Unavailable),  # too many connections
        ("57P01", Unavailable),  # it is stopping
        ("40P01", Unavailable),
        ("40001", Unavailable),
        ("22001", InvalidOptions),
        ("22003", InvalidOptions),
    ],
)
def test_a_failure_of_the_server_is_told_by_its_kind(
    database: Database, state: str, error: type[BatchserveError]
) -> None:
    fail = text(f"DO $$ BEGIN RAISE EXCEPTION 'no' USING ERRCODE = '{state}'; END $$")
    for door in (database.write, database.read, database.look):
        with pytest.raises(error) as raised, door() as connection:
            connection.execute(fail)
        assert type(raised.value) is error
    assert asyncio.run(database.fetch(one)) == 1


def test_a_write_to_a_server_that_has_become_read_only_is_unavailable(database: Database) -> None:
    with database.write() as connection:
        name = connection.scalar(text("SELECT current_database()"))
        connection.execute(text(f"ALTER DATABASE {name} SET default_transaction_read_only = on"))
    end_connections(database.url)
    time.sleep(1.1)
    with pytest.raises(Unavailable), database.write() as connection:
        connection.execute(insert(holds).values(name="h", until=1.0, clock="c"))
    assert asyncio.run(database.fetch(one)) == 1
