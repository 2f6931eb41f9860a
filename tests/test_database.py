"""Access to the database, the same for every kind, and the cache of values that were read."""

import asyncio
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import Any

import pytest
from sqlalchemy import Connection, bindparam, func, insert, select, text

from batchserve.db import connect
from batchserve.db.cache import ALWAYS, VersionedCache
from batchserve.db.connect import Database, lock
from batchserve.db.prepared import Prepared
from batchserve.db.tables import holds
from batchserve.db.watcher import Probe
from batchserve.errors import InvalidOptions, Unavailable

Sleep = Callable[[Connection], Any]
HUNG = text("SELECT pg_sleep(20)")


@pytest.fixture
def postgres(request: pytest.FixtureRequest) -> str:
    """The address of a PostgreSQL database, for behaviour that only a server has."""
    url: str = request.getfixturevalue("postgres_server").migrated()
    return url


# --- reading from the event loop ---


def test_the_event_loop_reads_one_snapshot(database: Database) -> None:
    count = text("SELECT count(*) FROM holds")

    def read(connection: Connection) -> tuple[int, int]:
        first = connection.scalar(count)
        with database.write() as other:
            other.execute(text("INSERT INTO holds (name, until, clock) VALUES ('h', 1.0, 'c')"))
        return first, connection.scalar(count)

    assert asyncio.run(database.fetch(read)) == (0, 0)
    assert asyncio.run(database.fetch(lambda connection: connection.scalar(count))) == 1


def test_sqlite_is_read_without_a_thread_and_a_server_from_one(database: Database) -> None:
    reader = asyncio.run(database.fetch(lambda _: threading.get_ident()))
    assert (reader == threading.get_ident()) == database.url.startswith("sqlite")


def test_loops_of_several_threads_read_at_the_same_time(database: Database) -> None:
    is_reading, may_end = threading.Event(), threading.Event()

    def long(connection: Connection) -> Any:
        is_reading.set()
        assert may_end.wait(20)
        return connection.scalar(text("SELECT 1"))

    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(lambda: asyncio.run(database.fetch(long)))
        assert is_reading.wait(20)
        assert asyncio.run(database.fetch(lambda connection: connection.scalar(text("SELECT 2")))) == 2
        may_end.set()
        assert other.result() == 1


@pytest.mark.parametrize("prepared", [False, True])
def test_a_read_that_raises_does_not_affect_the_next(database: Database, prepared: bool) -> None:
    count = Prepared(select(func.count().label("holds")).select_from(holds))

    def fails(connection: Connection) -> None:
        if prepared:
            count.scalar(connection, {})
        else:
            connection.scalar(select(func.count()).select_from(holds))
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        asyncio.run(database.fetch(fails))
    with database.write() as connection:
        connection.execute(insert(holds), {"name": "h", "until": 1.0, "clock": "c"})
    assert asyncio.run(database.fetch(lambda connection: count.scalar(connection, {}))) == 1


def test_a_connection_that_cannot_be_rolled_back_is_replaced(sqlite: Database) -> None:
    def lose(connection: Connection) -> None:
        driver: Any = connection.connection.driver_connection
        driver.close()
        raise ValueError("lost")

    for _ in range(2):
        with pytest.raises(ValueError, match="lost"):
            asyncio.run(sqlite.fetch(lose))
        assert asyncio.run(sqlite.fetch(lambda connection: connection.scalar(text("SELECT 1")))) == 1
        with pytest.raises(ValueError, match="lost"):
            asyncio.run(sqlite.commit(lose))
        asyncio.run(sqlite.commit(lambda connection: connection.execute(text("DELETE FROM holds"))))


@pytest.mark.postgres
def test_the_event_loop_is_not_blocked_by_a_server_that_does_not_respond(postgres: str) -> None:
    async def ticks_meanwhile() -> int:
        hung = asyncio.create_task(database.fetch(lambda connection: connection.execute(text("SELECT pg_sleep(0.5)"))))
        ticks = 0
        while not hung.done():
            await asyncio.sleep(0.01)
            ticks += 1
        return ticks

    with closing(Database(postgres)) as database:
        assert asyncio.run(ticks_meanwhile()) >= 10


# --- limits of a server ---


@pytest.mark.postgres
def test_a_server_that_takes_long_to_answer_is_unavailable(postgres: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connect, "BUSY_TIMEOUT_MS", 200)
    began = time.monotonic()
    with closing(Database(postgres)) as database:
        for door in (database.read, database.write):
            with pytest.raises(Unavailable), door() as connection:
                connection.execute(HUNG)
    assert time.monotonic() - began < 10


@pytest.mark.postgres
def test_a_transaction_that_waits_too_long_for_a_lock_is_unavailable(
    postgres: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with closing(Database(postgres)) as holder, holder.write(exclusive="models"):
        monkeypatch.setattr(connect, "BUSY_TIMEOUT_MS", 200)
        with closing(Database(postgres)) as database:
            with pytest.raises(Unavailable), database.write(exclusive="models"):
                pass
            with pytest.raises(Unavailable), database.write() as connection:
                lock(connection, "models", shared=True)
            with database.write(exclusive="keys") as connection:  # another subject
                assert connection.scalar(text("SELECT 1")) == 1


@pytest.mark.postgres
def test_a_server_that_does_not_take_connections_is_unavailable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connect, "CONNECT_TIMEOUT", 2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"postgresql+psycopg://u@127.0.0.1:{silent.getsockname()[1]}/d"
        began = time.monotonic()
        with closing(Database(url)) as database, pytest.raises(Unavailable), database.read():
            pass
        assert time.monotonic() - began < 10


@pytest.mark.postgres
def test_however_many_threads_read_a_server_sees_few_connections(postgres: str) -> None:
    count = text("SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()")

    def read(_: int) -> int:
        with database.read() as connection:
            connection.execute(text("SELECT pg_sleep(0.05)"))
            seen: int = connection.scalar(count) or 0
            return seen

    with closing(Database(postgres)) as database, ThreadPoolExecutor(40) as pool:
        assert 5 <= max(pool.map(read, range(120))) <= 15


@pytest.mark.postgres
def test_a_value_that_a_server_cannot_hold_is_refused(postgres: str) -> None:
    row = "INSERT INTO holds (name, until, clock) VALUES (:name, 1.0, 'c')"
    with closing(Database(postgres)) as database, pytest.raises(InvalidOptions), database.write() as connection:
        connection.execute(text(row), {"name": "h" * 33})


@pytest.mark.postgres
def test_the_time_is_that_of_the_database_server(postgres: str) -> None:
    with closing(Database(postgres)) as database, database.read() as connection:
        first, second = database.moment(connection), database.moment(connection)
    assert first.clock == "database"
    assert abs(first.wall - time.time()) < 60
    assert first.wall < second.wall == second.steady


# --- the cache ---


def test_a_value_that_was_read_is_cached_until_a_commit(database: Database) -> None:
    cache: VersionedCache[str, int] = VersionedCache(2)

    async def kept() -> list[int | None]:
        cache.put("a", await database.version(), 1)
        before = cache.get("a", await database.version())
        with database.write() as connection:
            connection.execute(text("INSERT INTO holds (name, until, clock) VALUES ('h', 1.0, 'c')"))
        return [before, cache.get("a", await database.version())]

    assert asyncio.run(kept()) == [1, None]


def test_threads_see_the_commits_of_others_in_the_version(database: Database) -> None:
    before = database.version_from_thread()
    assert before is not None
    assert database.version_from_thread() == before
    with closing(Database(database.url)) as other, other.write() as connection:
        connection.execute(text("INSERT INTO holds (name, until, clock) VALUES ('h', 1.0, 'c')"))
    assert database.version_from_thread() != before


def test_a_value_that_was_read_is_cached_while_a_probe_finds_the_same(database: Database) -> None:
    probe = Probe(select(func.max(holds.c.until)).where(holds.c.name == bindparam("of_name")).limit(1))
    cache: VersionedCache[str, int] = VersionedCache(2)

    def hold(name: str, until: float) -> None:
        with database.write() as connection:
            connection.execute(insert(holds).values(name=name, until=until, clock="c"))

    async def kept() -> list[int | None]:
        cache.put("a", await database.probe(probe, of_name="a"), 1)
        hold("b", 1.0)
        before = cache.get("a", await database.probe(probe, of_name="a"))
        hold("a", 2.0)
        assert await database.probe(probe, of_name="a") == ((2.0,),)
        return [before, cache.get("a", await database.probe(probe, of_name="a"))]

    assert asyncio.run(kept()) == [1, None]


def test_nothing_is_cached_without_a_version_of_the_database() -> None:
    cache: VersionedCache[str, int] = VersionedCache(2)
    cache.put("a", None, 1)
    assert cache.get("a", None) is None
    cache.put("a", 7, 1)
    assert cache.get("a", None) is None


def test_the_oldest_cached_value_is_evicted() -> None:
    cache: VersionedCache[str, int] = VersionedCache(2)
    for key, value in (("a", 1), ("b", 2), ("a", 3), ("c", 4)):
        cache.put(key, ALWAYS, value)
    assert [cache.get(key, ALWAYS) for key in "abc"] == [3, None, 4]


def test_a_cached_value_expires_after_its_maximum_age() -> None:
    cache: VersionedCache[str, int] = VersionedCache(2, max_age=0.05)
    cache.put("a", ALWAYS, 1)
    assert cache.get("a", ALWAYS) == 1
    time.sleep(0.06)
    assert cache.get("a", ALWAYS) is None
