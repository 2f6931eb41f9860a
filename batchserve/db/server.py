"""Connections to PostgreSQL: limited in number, and in the time that each waits for an answer.

The server itself ends statements that take too long. But one that hangs, or whose host is gone, answers nothing at all:
so a connection counts as lost when it has waited for longer.

A round trip costs more than most statements: a transaction begins with its first statement that has a result, and
statements whose results nobody needs travel with those that follow (`pipeline`). The time of the server is known from a
moment before.
"""

import asyncio
import math
import select
import threading
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NoReturn, TypeVar

import psycopg
from psycopg import errors
from psycopg.abc import PQGen
from psycopg.pq import TransactionStatus
from sqlalchemy import URL, Connection, Engine, create_engine, event, make_url, text
from sqlalchemy.exc import DBAPIError, InvalidatePoolError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.pool import ConnectionPoolEntry

from batchserve.db import codec
from batchserve.db.lasting import BEGIN
from batchserve.db.listener import Listener
from batchserve.db.notifications import Hear
from batchserve.db.pipeline import Answer, Pipeline
from batchserve.db.watcher import Probe

__all__ = ["Limits", "Server", "ServerWatcher", "put", "run", "seconds_now", "unbounded_transaction"]

T = TypeVar("T")

_CONNECTIONS = 15
"""Most connections of a process for reads, and as many for writes."""
_VERSION = "SELECT CAST(pg_current_snapshot() AS text)"
"""Changes whenever a transaction that writes begins or ends, in any process."""
_CLOCK = "SELECT CAST(extract(epoch FROM clock_timestamp()) AS float8)"
_FRESH = 0.2
"""Seconds for which a reading of this clock is continued by that of the host."""
_KEPT = 5
"""Of the connections, those that stay open while unused; and transactions of an event loop at a time. To open one takes
longer than a transaction, and with more threads than a few the interpreter's lock is contended."""
_MARGIN = 2.0
"""Seconds between the end of a statement by the server, and of the wait for it."""
_IDLE = 1.0
"""Seconds of disuse after which a connection is tested before its next use: the server may have been restarted."""
_WATCH_TIMEOUT = 2.0
"""Seconds to wait for a version: a read without one takes longer, but waits for nothing else."""
SILENCE = 60.0
"""Seconds after which the server ends a transaction whose process says nothing: its host may be gone, and its locks
would keep others from its jobs until TCP notices. Longer than the storage may take within a transaction."""
_SHORTEST_PAUSE, _LONGEST_PAUSE = 0.1, 2.0
"""Seconds between two tries to connect."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Of a connection, in seconds."""

    connect: float
    statement: float
    """For a statement, and for the lock that it waits for."""

    def arguments(self, url: URL) -> dict[str, Any]:
        """Those of `psycopg.connect`, but for what the address itself says."""
        milliseconds = round(1000 * self.statement)
        wanted = {
            "connect_timeout": max(2, round(self.connect)),  # libpq takes 1 as 2
            "tcp_user_timeout": milliseconds,
            "keepalives_idle": max(1, round(self.statement)),
            "options": f"-c statement_timeout={milliseconds} -c lock_timeout={milliseconds} "
            f"-c idle_in_transaction_session_timeout={round(1000 * SILENCE)}",
        }
        return {name: value for name, value in wanted.items() if name not in url.query}


class NoAnswer(psycopg.OperationalError):
    """The server has answered nothing for too long; the connection is closed."""


class _Clock:
    """The clock of a server. Its readings are shared by all connections of a process."""

    def __init__(self) -> None:
        self._reading = 0.0, -math.inf
        """The last one, and the time of the host at which it came."""

    def now(self, ask: Callable[[], float]) -> float:
        """Its time in seconds since 1970. `ask` reads it."""
        read, since = self._reading
        passed = _host_time() - since
        if passed <= _FRESH:
            return read + passed
        read = ask()
        self._reading = read, _host_time()
        return read


def _host_time() -> float:
    """Seconds that include those in which the host was suspended."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


class _Bounded(psycopg.Connection[Any]):
    patience: float | None = None
    """Seconds to wait for an answer; None: any time."""
    clock: _Clock

    @cached_property
    def batch(self) -> Pipeline:
        return Pipeline(self)

    def commit(self) -> None:
        """What waits is sent with it."""
        if not self._is_idle():
            done = self.batch.run("COMMIT")
            if done.result.command_status != b"COMMIT":
                raise errors.InFailedSqlTransaction("a statement of this transaction has failed before")

    def rollback(self) -> None:
        self.batch.drop()
        if self.closed:
            super().rollback()
        elif not self._is_idle():
            self.batch.run("ROLLBACK")  # that of psycopg forgets what is prepared

    def _is_idle(self) -> bool:
        return not self.batch.waiting and self.pgconn.transaction_status == TransactionStatus.IDLE

    def wait(self, gen: PQGen[T], interval: float = 0.1, timeout: float | None = None) -> T:
        try:
            return super().wait(gen, interval, self.patience if timeout is None else timeout)
        except psycopg.OperationalError as error:
            raise _lost(self, error) from None


class _CursorAfter(psycopg.Cursor[Any]):
    """Of statements that do not go through the pipeline, such as those of SQLAlchemy: after what waits in it."""

    def execute(self, *words: Any, **named: Any) -> "_CursorAfter":
        _settle(self.connection)
        return super().execute(*words, **named)

    def executemany(self, *words: Any, **named: Any) -> None:
        _settle(self.connection)
        super().executemany(*words, **named)


class _ServerCursorAfter(psycopg.ServerCursor[Any]):
    """The same, for results that are fetched bit by bit."""

    def execute(self, *words: Any, **named: Any) -> "_ServerCursorAfter":
        _settle(self.connection)
        return super().execute(*words, **named)


def _settle(connection: psycopg.Connection[Any]) -> None:
    assert isinstance(connection, _Bounded)
    connection.batch.settle()


class _BoundedAsync(psycopg.AsyncConnection[Any]):
    patience: float | None = None

    async def wait(
        self,
        gen: PQGen[T],
        interval: float = 0.1,
        timeout: float | None = None,  # noqa: ASYNC109 - of the method that this overrides
    ) -> T:
        try:
            return await super().wait(gen, interval, self.patience if timeout is None else timeout)
        except psycopg.OperationalError as error:
            raise _lost(self, error) from None


def _lost(connection: _Bounded | _BoundedAsync, error: psycopg.OperationalError) -> psycopg.OperationalError:
    """The error to raise; a connection that still waits for an answer is closed, and of no more use."""
    if connection.pgconn.transaction_status != TransactionStatus.ACTIVE:
        return error
    connection.pgconn.finish()
    return NoAnswer(f"no answer from the server after {connection.patience} s")


class Server:
    """What a process has open to a server."""

    def __init__(self, url: str, limits: Limits) -> None:
        self._closed, self._clock = threading.Event(), _Clock()
        self.looks = self._engine(url, limits, "-c default_transaction_read_only=on")
        """Each statement is a transaction."""
        self.reads = self.looks.execution_options(**{BEGIN: "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY"})
        """The same connections; each transaction is a snapshot."""
        self.writes = self._engine(url, limits).execution_options(**{BEGIN: "BEGIN ISOLATION LEVEL READ COMMITTED"})
        self.watcher = ServerWatcher(url, limits, self.looks)
        self.threads = ThreadPoolExecutor(_KEPT, thread_name_prefix="database")
        """They wait for the server, instead of the event loop."""
        self._url, self._limits = url, limits

    def listen(self, hear: Hear) -> Listener:
        """Calls `hear` with each notification, from a thread, until it is closed."""
        return Listener(self._connect, hear)

    def close(self) -> None:
        self._closed.set()
        self.watcher.close()
        self.threads.shutdown()
        self.reads.dispose()
        self.writes.dispose()

    def _engine(self, url: str, limits: Limits, options: str = "") -> Engine:
        engine = _engine(url, limits, options, self._clock)

        @event.listens_for(engine, "checkin")
        def close_late(connection: _Bounded | None, _entry: ConnectionPoolEntry) -> None:
            if connection is not None and self._closed.is_set():
                connection.close()  # a thread has used it until now: the pool is gone

        return engine

    def _connect(self) -> psycopg.Connection[Any]:
        words, named = _arguments(self._url, self._limits)
        connection = _Bounded.connect(*words, autocommit=True, **named)
        connection.patience = self._limits.statement
        return connection


def _arguments(url: str, limits: Limits) -> tuple[Sequence[str], dict[str, Any]]:
    """Those of a connection outside the pools."""
    words, named = make_url(url).get_dialect()().create_connect_args(make_url(url))
    return words, {**limits.arguments(make_url(url)), **named}


def _engine(url: str, limits: Limits, options: str, clock: _Clock) -> Engine:
    """`options`: of the server, for its sessions."""
    given = limits.arguments(make_url(url))
    if "options" in given:
        given["options"] = f"{given['options']} {options}"
    engine = create_engine(
        url,
        connect_args=given,
        pool_size=_KEPT,
        max_overflow=_CONNECTIONS - _KEPT,
        pool_timeout=limits.statement,
        json_serializer=codec.dumps,
        json_deserializer=codec.loads,
    )
    patience = limits.statement + _MARGIN

    @event.listens_for(engine, "do_connect")
    def connect(_dialect: Any, _entry: Any, words: list[Any], named: dict[str, Any]) -> _Bounded:
        connection = _Bounded.connect(*words, autocommit=True, **named)  # `begin` below begins transactions
        connection.patience, connection.clock = patience, clock
        connection.cursor_factory, connection.server_cursor_factory = _CursorAfter, _ServerCursorAfter
        connection.prepare_threshold = None  # what it prepares would be dropped with all that the pipeline has prepared
        return connection

    event.listen(engine, "begin", _begin)

    @event.listens_for(engine, "checkin")
    def note(_connection: _Bounded | None, entry: ConnectionPoolEntry) -> None:
        entry.info["since"] = time.monotonic()

    @event.listens_for(engine, "checkout")
    def test(connection: _Bounded, entry: ConnectionPoolEntry, _proxy: Any) -> None:
        is_doubtful = time.monotonic() - entry.info.get("since", math.inf) > _IDLE or _has_said_something(connection)
        if is_doubtful and not _answers(connection, limits.connect):
            raise InvalidatePoolError  # of which the pool makes a new connection

    return engine


def _answers(connection: _Bounded, seconds: float) -> bool:
    patience, connection.patience = connection.patience, seconds
    try:
        connection.execute("")
    except psycopg.OperationalError:
        return False
    finally:
        connection.patience = patience
    return True


def _has_said_something(connection: _Bounded) -> bool:
    """Whether something came from the server while nothing was asked: mostly that it has ended the connection."""
    if connection.closed:
        return True
    ready = select.poll()
    ready.register(connection.pgconn.socket, select.POLLIN)
    return bool(ready.poll(0))


def _begin(connection: Connection) -> None:
    statement = connection.get_execution_options().get(BEGIN)
    if statement is not None:
        put(connection, statement)


def seconds_now(connection: Connection) -> float:
    """Now, by the clock of the server, in seconds since 1970: mostly without a round trip."""
    return _driver_of(connection).clock.now(lambda: float(run(connection, _CLOCK).rows()[0][0]))


def put(connection: Connection, statement: str, values: Sequence[Any] = ()) -> None:
    """Executes a statement with the next one that is `run`, or with the commit: see `Pipeline.put`."""
    driver = _driver_of(connection)
    try:
        driver.batch.put(statement, values)
    except psycopg.Error as error:
        _raise_as_sqlalchemy(connection, driver, statement, values, error)


def run(connection: Connection, statement: str, values: Sequence[Any] = ()) -> Answer:
    """Executes a statement by the driver: SQLAlchemy takes longer for it than the server. Raises what SQLAlchemy would
    raise."""
    driver = _driver_of(connection)
    try:
        return driver.batch.run(statement, values)
    except psycopg.Error as error:
        _raise_as_sqlalchemy(connection, driver, statement, values, error)


def _raise_as_sqlalchemy(
    connection: Connection, driver: _Bounded, statement: str, values: Sequence[Any], error: psycopg.Error
) -> NoReturn:
    is_lost = driver.closed
    if is_lost:
        connection.invalidate(error)
        connection.engine.dispose()  # the unused ones are as old
    raise DBAPIError.instance(
        statement, list(values), error, psycopg.Error, connection_invalidated=is_lost, dialect=connection.dialect
    ) from error


def _driver_of(connection: Connection) -> _Bounded:
    driver = connection.connection.driver_connection
    assert isinstance(driver, _Bounded)
    return driver


@contextmanager
def unbounded_transaction(connection: Connection) -> Iterator[None]:
    driver = _driver_of(connection)
    connection.execute(text("SET LOCAL statement_timeout = 0"))
    connection.execute(text("SET LOCAL idle_in_transaction_session_timeout = 0"))
    patience, driver.patience = driver.patience, None
    try:
        yield
    finally:
        driver.patience = patience


_Question = tuple[str, tuple[tuple[str, Any], ...]]
"""A statement and its values."""
_Answer = tuple[tuple[Any, ...], ...]


class ServerWatcher:
    """Asks a server, from event loops: each has a connection, for one question at a time. Equal questions that come
    while one is on its way share the next, which sees all that was committed before any of them came."""

    def __init__(self, url: str, limits: Limits, looks: Engine) -> None:
        self._looks = looks
        self._words, self._named = _arguments(url, limits)
        self._askers: dict[asyncio.AbstractEventLoop, _Asker] = {}

    async def version(self) -> str | None:
        found = await self._asker().ask((_VERSION, ()))
        return None if found is None else str(found[0][0])

    async def probe(self, probe: Probe, values: Mapping[str, Any]) -> Hashable | None:
        return await self._asker().ask((probe.server_text, tuple({**probe.values, **values}.items())))

    def read_version(self) -> str | None:
        try:
            with self._looks.connect() as connection:
                return str(connection.scalar(text(_VERSION)))
        except (OperationalError, PoolTimeout):
            return None

    def close(self) -> None:
        for loop, asker in self._askers.items():
            asker.close(loop)
        self._askers.clear()

    def _asker(self) -> "_Asker":
        loop = asyncio.get_running_loop()
        asker = self._askers.get(loop)
        if asker is None:
            for ended in [other for other in self._askers if other.is_closed()]:
                self._askers.pop(ended).close(ended)
            asker = self._askers[loop] = _Asker(self._words, self._named)
        return asker


class _Asker:
    """The questions of one event loop, and its connection."""

    def __init__(self, words: Sequence[str], named: Mapping[str, Any]) -> None:
        """`words`, `named`: the arguments by which it connects."""
        self._words, self._named = words, named
        self._waiting: dict[_Question, list[asyncio.Future[_Answer | None]]] = {}
        self._serving: asyncio.Task[None] | None = None
        self._connection: _BoundedAsync | None = None
        self._pause, self._not_before = 0.0, 0.0

    async def ask(self, question: _Question) -> _Answer | None:
        """None when the server does not answer, or refuses the values."""
        answer: asyncio.Future[_Answer | None] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(question, []).append(answer)
        if self._serving is None or self._serving.done():
            self._serving = asyncio.create_task(self._serve())
        return await answer

    def close(self, loop: asyncio.AbstractEventLoop) -> None:
        if self._serving is not None and not self._serving.done() and not loop.is_closed():
            self._serving.add_done_callback(lambda _: self._drop())
            loop.call_soon_threadsafe(self._serving.cancel)
        else:
            self._drop()

    async def _serve(self) -> None:
        while self._waiting:
            question = next(iter(self._waiting))
            asked = self._waiting.pop(question)
            found = await self._answer(question)
            for answer in asked:
                if not answer.done():  # its caller is gone
                    answer.set_result(found)

    async def _answer(self, question: _Question) -> _Answer | None:
        if self._connection is not None:
            with suppress(psycopg.Error):
                return await self._found(self._connection, question)
            if not self._connection.closed:
                return None
            self._drop()  # the server was restarted, say
        if time.monotonic() < self._not_before:
            return None
        try:
            self._connection = await _BoundedAsync.connect(*self._words, autocommit=True, **self._named)
            self._connection.patience = _WATCH_TIMEOUT
            found = await self._found(self._connection, question)
            self._pause = 0.0
            return found
        except psycopg.Error:
            self._pause = min(_LONGEST_PAUSE, max(_SHORTEST_PAUSE, 2 * self._pause))
            self._not_before = time.monotonic() + self._pause
            return None

    async def _found(self, connection: _BoundedAsync, question: _Question) -> _Answer:
        statement, values = question
        cursor = await connection.execute(statement.encode(), dict(values) or None, prepare=True)
        return tuple(await cursor.fetchall())

    def _drop(self) -> None:
        if self._connection is not None:
            self._connection.pgconn.finish()
            self._connection = None
