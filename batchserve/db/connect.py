"""Connections to SQLite or PostgreSQL, through three methods: `read`, `look` and `write`.

SQLite runs WAL with `synchronous=FULL`: with NORMAL, acknowledged commits were lost in simulated power cuts. Every
write transaction begins IMMEDIATE, because one that reads first and writes later fails at once when another process
wrote in between, whatever the busy timeout.

Readers and writers have separate pools. Writers queue for the one lock, and may use up their pool; a reader of SQLite
waits neither for a connection nor, in WAL, for a lock: the event loop may read inline.

PostgreSQL has many writers. What one transaction reads, another may change before the first one writes: statements have
guards in WHERE, and where these do not suffice, a transaction names what it locks (`lock`).
"""

import asyncio
import sqlite3
import threading
import time
from collections.abc import Callable, Hashable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, closing, contextmanager, suppress
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn, TypeVar, get_args

import stamina
from sqlalchemy import Connection, Engine, bindparam, create_engine, event, func, make_url, select
from sqlalchemy.exc import DataError, InternalError, OperationalError, SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.pool import ConnectionPoolEntry

from batchserve.db import codec
from batchserve.db.joint import JointWriter
from batchserve.db.lasting import BEGIN, Busy, LastingConnection, begin, driver_of
from batchserve.db.notifications import Hear
from batchserve.db.prepared import Prepared
from batchserve.db.reserve import Reserve
from batchserve.db.watcher import InlineWatcher, Probe, Version, Watcher
from batchserve.db.writer import Writer
from batchserve.errors import BatchserveError, InsufficientStorage, InvalidOptions, Unavailable

if TYPE_CHECKING:
    from batchserve.db.server import Server

T = TypeVar("T")

BUSY_TIMEOUT_MS = 10_000
_TRIES, _PAUSE = 4, 0.1
"""Of a transaction that a server breaks off, and the longest pause between two of them, in seconds."""
CONNECT_TIMEOUT = 5
"""Seconds after which a server that does not answer counts as unavailable."""
Subject = Literal["clock", "keys", "models", "schema", "inputs", "quotas", "totals"]
"""Names of exclusive locks. The place of each is its number among the advisory locks of the server."""
_MAYBE_FULL = (sqlite3.SQLITE_IOERR_WRITE, sqlite3.SQLITE_CANTOPEN)
_TRANSIENT_ERRORS = (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CANTOPEN)

# Codes of PostgreSQL; the second is of a server that was made a standby, the third of a transaction that it has ended
# because nothing came (`server.SILENCE`).
_DISK_FULL, _READ_ONLY, _SILENT = "53100", "25006", "25P03"
_DEADLOCK, _NOT_SERIALIZABLE = "40P01", "40001"


@dataclass(frozen=True, slots=True)
class Moment:
    """A point in time. Users see `wall`; leases are measured in `steady` seconds, on a monotonic clock.

    `clock` names that clock: for SQLite the boot of the host, so that a lease of an earlier boot has lapsed.
    """

    wall: float
    steady: float
    clock: str


class Database:
    """One database, shared by all threads of a process. Keeps no open connection that another process could inherit."""

    def __init__(self, url: str) -> None:
        self.url = url
        self._sqlite = make_url(url).get_backend_name() == "sqlite"
        self.is_inline = self._sqlite
        """Whether the event loop itself reads, within microseconds."""
        if self._sqlite and (path := make_url(url).database):
            Path(path).parent.mkdir(parents=True, exist_ok=True)
        self._reads: Engine
        self._writes: Engine
        self._looks: Engine
        """As `_reads`, but each statement is a transaction."""
        self._watcher: Watcher
        self._server: Server | None = None
        self._threads: ThreadPoolExecutor | None = None
        """They wait for a server, instead of the event loop."""
        if self._sqlite:
            self._reads = self._looks = _sqlite_engine(url, max_overflow=-1)  # at most one for each reading thread
            self._writes = _sqlite_engine(url).execution_options(**{BEGIN: "BEGIN IMMEDIATE"})
            self._watcher = InlineWatcher(self._own_connection)
        else:
            server = self._server = _opened(url)
            self._reads, self._looks, self._writes = server.reads, server.looks, server.writes
            self._watcher, self._threads = server.watcher, server.threads
        self._inline = LastingConnection(self._reads)
        self._grouped = LastingConnection(self._writes)
        self._turn = threading.Lock()
        path = make_url(url).database if self._sqlite else None
        self._reserve = Reserve(Path(path)) if path else None
        self._writer = Writer(self._write_group, _failures_named)
        self._joint = JointWriter(self._threads, self._commit, _was_undone) if self._threads is not None else None

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """A consistent snapshot. Raises Unavailable when the database does not respond."""
        with _failures_named(), self._reads.connect() as connection:
            yield connection

    @contextmanager
    def look(self) -> Iterator[Connection]:
        """As `read`, for a single statement: a server takes one round trip for it. Several see different moments."""
        with _failures_named(), self._looks.connect() as connection:
            yield connection

    async def fetch(self, read: Callable[[Connection], T]) -> T:
        """The result of a read of one snapshot, for the event loop. `read` fetches all that it queries, and returns no
        Result. Raises Unavailable when the database does not respond.

        SQLite is read inline: that costs less than a thread, and waits for no writer. A server is queried from a
        thread, so that a slow or hanging one blocks nothing else; `read` is called again when its connection was lost.
        """
        return await self._fetch(read, self.read)

    async def fetch_one(self, look: Callable[[Connection], T]) -> T:
        """As `fetch`, for a single statement, see `look`."""
        return await self._fetch(look, self.look)

    async def _fetch(self, read: Callable[[Connection], T], door: "_Door") -> T:
        if self._threads is not None:
            try:
                async with asyncio.timeout(BUSY_TIMEOUT_MS / 1000):
                    return await asyncio.wrap_future(self._threads.submit(_read_again, read, door))
            except TimeoutError:
                raise Unavailable("the database does not respond; try again in a moment") from None
        try:
            return self._inline.run(read)
        except Busy:  # a loop of another thread reads
            return _read(read, door)
        except SQLAlchemyError as error:
            _raise_named(error)

    @contextmanager
    def write(self, *, exclusive: Subject | None = None) -> Iterator[Connection]:
        """A transaction: committed durably when the block ends, rolled back by an exception. `exclusive`: what it
        locks, see `lock`. Raises Unavailable when the database stays locked or does not answer, InsufficientStorage
        when it is full.
        """
        with self._own_turn(), _failures_named(), self._writes.begin() as connection:
            if exclusive is not None:
                lock(connection, exclusive)
            yield connection

    async def commit(self, work: Callable[[Connection], T], *, alone: bool = False) -> T:
        """A write transaction for the event loop: the value of `work`, once it is committed durably. It continues when
        its caller is cancelled. Raises as `write` does, and what `work` raises.

        Works of concurrent callers share a transaction and its sync; one that raises affects no other. So `work` may be
        called again, also when the transaction fails before its commit. `alone`: shares none on a server, for its lock.
        """
        if self._joint is not None:
            return await self._joint.run(work, alone=alone)
        return await self._writer.run(work)

    def _commit(self, work: Callable[[Connection], T], exclusive: Subject | None = None) -> T:
        """The value of `work` in a write transaction. A server may break it off for another one that waits for it, more
        than once where the other is as quick again, or may have been restarted: then it is begun anew. Not when the
        commit itself fails, whose outcome is unknown."""
        worked = False

        def commit() -> T:
            nonlocal worked
            worked = False
            with self.write(exclusive=exclusive) as connection:
                value = work(connection)
                worked = True
            return value

        def may_succeed_now(error: Exception) -> bool:
            return _was_broken_off(error) or (not worked and _was_lost(error))

        return _tried(commit, may_succeed_now)

    def _write_group(self, work: Callable[[Connection], None]) -> None:
        """As `write`, for the writer thread."""
        with self._own_turn(), _failures_named():
            self._grouped.run(work)

    def write_freeing(self, work: Callable[[Connection], T], *, exclusive: Subject | None = None) -> T:
        """A write transaction that removes or ends something. On a full disk it uses the space of the reserve, so
        `work` may be called several times; only the last call is committed."""
        return self.with_reserve(lambda: self._commit(work, exclusive))

    def with_reserve(self, act: Callable[[], T]) -> T:
        """Runs a function, on a full disk again with more and more of the reserve. Raises what it raises."""
        try:
            return act()
        except (InsufficientStorage, Unavailable) as error:
            if self._reserve is None or not _is_out_of_space(error):
                raise
            return self._in_reserve(self._reserve, act, error)

    def _in_reserve(self, reserve: Reserve, act: Callable[[], T], error: BatchserveError) -> T:
        try:
            self._checkpoint("PASSIVE")  # a checkpointed log restarts within its own space
            with reserve.slices() as slices:
                for _ in slices:
                    try:
                        return act()
                    except (InsufficientStorage, Unavailable) as again:
                        error = again
            raise error
        finally:
            self._checkpoint("TRUNCATE")
            reserve.refill()

    def refill_reserve(self) -> bool:
        """Refills the reserve as far as there is space. False while it is incomplete: then no work that takes space
        should start. Cheap, to be called often."""
        return self._reserve is None or self._reserve.refill()

    def write_back(self) -> None:
        """Writes SQLite's log into its file, so that this has the space that it needs. A no-op on a server."""
        if self._sqlite:
            self._checkpoint("TRUNCATE")

    def _checkpoint(self, mode: str) -> None:
        """Checkpoints SQLite's log as far as readers and space allow."""
        # A connection of the pool, which stays open: when the last one closes, SQLite removes its log, and may have no
        # space for a new one.
        with suppress(sqlite3.Error, SQLAlchemyError), closing(self._reads.raw_connection()) as pooled:
            cursor = pooled.cursor()
            try:
                cursor.execute("PRAGMA busy_timeout=200")
                cursor.execute(f"PRAGMA wal_checkpoint({mode})")
            finally:
                cursor.execute(f"PRAGMA busy_timeout={BUSY_TIMEOUT_MS}")
                cursor.close()

    @contextmanager
    def _own_turn(self) -> Iterator[None]:
        """Serializes writers of this process: those that contend for SQLite's lock sleep for milliseconds."""
        if not self._sqlite:
            yield
            return
        if not self._turn.acquire(timeout=BUSY_TIMEOUT_MS / 1000):
            raise Unavailable("the database is busy; try again in a moment")
        try:
            yield
        finally:
            self._turn.release()

    async def version(self) -> Version | None:
        """While it stays the same, no thread and no other process has committed anything. For the event loop: SQLite is
        asked inline in microseconds, and a server once for all that wait. None when the database cannot be asked: then
        read.
        """
        return await self._watcher.version()

    def version_from_thread(self) -> Version | None:
        """The same for callers in a thread."""
        return self._watcher.read_version()

    async def probe(self, probe: Probe, **values: Any) -> Hashable | None:
        """What a probe finds, with the same promises: for values that few of all commits change, and that would rarely
        be cached until the next one."""
        return await self._watcher.probe(probe, values)

    @contextmanager
    def listening(self, hear: Hear) -> Iterator[Callable[[], bool]]:
        """Calls `hear`, from a thread, with what `notifications` are sent by all processes, and with ALL where some may
        have been lost. Yields whether they are received at present: never from SQLite, which sends none."""
        if self._server is None:
            yield lambda: False
            return
        with closing(self._server.listen(hear)) as listener:
            yield lambda: listener.is_live

    def _own_connection(self) -> sqlite3.Connection:
        """A connection outside the pools."""
        pooled = self._reads.raw_connection()
        connection = pooled.driver_connection
        assert isinstance(connection, sqlite3.Connection)
        pooled.detach()
        return connection

    def moment(self, connection: Connection) -> Moment:
        """Now, by clocks that all users of this database share: those of the host for SQLite, those of the server for
        others."""
        if self._sqlite:
            return Moment(time.time(), time.clock_gettime(_UPTIME), _boot_id())
        from batchserve.db.server import seconds_now  # psycopg is an extra

        now = seconds_now(connection)
        return Moment(now, now, "database")

    def copy_to(self, path: Path) -> None:
        """Copies a snapshot of an SQLite database during reads and writes. Raises InvalidOptions for other databases,
        which have their own tools.
        """
        source_path = make_url(self.url).database
        if not self._sqlite or source_path is None:
            raise InvalidOptions("only an SQLite database can be copied here: use the tools of your database")
        with closing(sqlite3.connect(source_path)) as source, closing(sqlite3.connect(path)) as target:
            source.backup(target)

    def close(self) -> None:
        self._writer.close()
        self._grouped.close()
        self._inline.close()
        if self._server is not None:
            self._server.close()
            return
        self._watcher.close()
        self._reads.dispose()
        self._writes.dispose()


def _tried(act: Callable[[], T], may_succeed_now: Callable[[Exception], bool]) -> T:
    """The value of `act`, possibly of a later try, after a pause of random length, so that two do not meet again."""
    try:
        return act()  # the context of stamina takes longer than the statements of a small transaction
    except Exception as error:
        if not may_succeed_now(error):
            raise
    again = stamina.RetryingCaller(attempts=_TRIES - 1, wait_initial=0, wait_max=_PAUSE, wait_jitter=_PAUSE)
    return again(may_succeed_now, act)


def _was_broken_off(error: Exception) -> bool:
    """Whether a server has undone a transaction for the sake of another one."""
    return getattr(getattr(error.__cause__, "orig", None), "sqlstate", None) in (_DEADLOCK, _NOT_SERIALIZABLE)


def _was_undone(error: BaseException) -> bool:
    """Whether a server has said that it has not committed a transaction."""
    cause = error if isinstance(error, SQLAlchemyError) else error.__cause__
    has_said_so = getattr(getattr(cause, "orig", None), "sqlstate", None) is not None
    return has_said_so and not getattr(cause, "connection_invalidated", False)


def _was_lost(error: Exception) -> bool:
    return bool(getattr(error.__cause__, "connection_invalidated", False))


def lock(connection: Connection, subject: Subject, *, shared: bool = False) -> None:
    """Takes this lock until the transaction ends. Shared holders wait only for an exclusive one. Take it before reading
    what it protects, where a transaction acts upon what it has read. A no-op on SQLite, which has one writer at a time.
    """
    if connection.dialect.name == "sqlite":
        return
    values = {"its_place": get_args(Subject).index(subject)}
    if shared:
        _LOCK_SHARED.send(connection, values)
    else:
        _LOCK.rows(connection, values)  # what follows, such as a reading of a clock, is after the wait for it


@contextmanager
def unbounded(connection: Connection) -> Iterator[None]:
    """Lets the statements of this transaction take any time. A no-op on SQLite, which does not limit them."""
    if connection.dialect.name == "sqlite":
        yield
        return
    from batchserve.db.server import unbounded_transaction

    with unbounded_transaction(connection):
        yield


_LOCKS = 0x6261_7463
"""Distinguishes batchserve's advisory locks from others in the same database."""
_LOCK = Prepared(select(func.pg_advisory_xact_lock(_LOCKS, bindparam("its_place")).label("taken")))
_LOCK_SHARED = Prepared(select(func.pg_advisory_xact_lock_shared(_LOCKS, bindparam("its_place")).label("taken")))

# Text that is not UTF-8 was not written by batchserve; it must not prevent the reading of other rows.
_text = partial(str, encoding="utf-8", errors="replace")

_UPTIME = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


@cache
def _boot_id() -> str:
    # Without Linux's boot ID, the time of the boot (to 100 s, wall clocks are adjusted) distinguishes boots.
    return _BOOT_ID.read_text().strip() if _BOOT_ID.exists() else f"boot-{(time.time() - time.monotonic()) // 100:.0f}"


def _opened(url: str) -> "Server":
    from batchserve.db.server import Limits, Server  # psycopg is an extra

    return Server(url, Limits(CONNECT_TIMEOUT, BUSY_TIMEOUT_MS / 1000))


def _sqlite_engine(url: str, **pool: Any) -> Engine:
    engine = create_engine(
        url,
        connect_args={"check_same_thread": False, "timeout": BUSY_TIMEOUT_MS / 1000},
        json_serializer=codec.dumps,
        json_deserializer=codec.loads,
        **pool,
    )

    @event.listens_for(engine, "connect")
    def configure(connection: sqlite3.Connection, _: ConnectionPoolEntry) -> None:
        connection.text_factory = _text
        connection.isolation_level = None  # the driver starts no transaction: `begin` below does
        _use_log(connection)
        for pragma in ("synchronous=FULL", "foreign_keys=ON", f"busy_timeout={BUSY_TIMEOUT_MS}"):
            connection.execute(f"PRAGMA {pragma}").close()

    @event.listens_for(engine, "begin")
    def begin_once(connection: Connection) -> None:
        if not driver_of(connection).in_transaction:  # a lasting connection has begun it
            begin(connection)

    return engine


def _use_log(connection: sqlite3.Connection) -> None:
    """Switches to WAL. SQLite does not wait for others with that, such as those that start together on a new file."""
    deadline = time.monotonic() + BUSY_TIMEOUT_MS / 1000
    while True:
        try:
            connection.execute("PRAGMA journal_mode=WAL").close()
            return
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                raise
        time.sleep(0.01)


def _is_out_of_space(error: BatchserveError) -> bool:
    """Whether more space may help. SQLite has no specific codes for quotas and for files that cannot be created."""
    if isinstance(error, InsufficientStorage):
        return True
    cause = getattr(error.__cause__, "orig", None)
    return isinstance(cause, sqlite3.Error) and cause.sqlite_errorcode in _MAYBE_FULL


_Door = Callable[[], AbstractContextManager[Connection]]


def _read(read: Callable[[Connection], T], door: _Door) -> T:
    with door() as connection:
        return read(connection)


def _read_again(read: Callable[[Connection], T], door: _Door) -> T:
    """Once more, if the connection was lost: the server may have been restarted since its last use."""
    try:
        return _read(read, door)
    except Unavailable as error:
        if not _was_lost(error):
            raise
    return _read(read, door)


@contextmanager
def _failures_named() -> Iterator[None]:
    try:
        yield
    except SQLAlchemyError as error:
        _raise_named(error)


def _raise_named(error: SQLAlchemyError) -> NoReturn:
    named = _named(error)
    if named is error:
        raise error
    raise named from error


def _named(error: SQLAlchemyError) -> Exception:
    """What users are told of a failure; a fault of the program itself stays as it is."""
    if isinstance(error, DataError):  # a server checks lengths and ranges, SQLite does not
        return InvalidOptions("a value is longer, or larger, than the database can hold")
    if isinstance(error, PoolTimeout):
        return Unavailable("the database is busy; try again in a moment")
    cause = getattr(error, "orig", None)
    if isinstance(cause, sqlite3.Error) and cause.sqlite_errorcode == sqlite3.SQLITE_CONSTRAINT_TRIGGER:
        return Unavailable(str(cause))  # by `db.closed`
    if not isinstance(error, OperationalError | InternalError):
        return error
    state = getattr(cause, "sqlstate", None)
    if state == _DISK_FULL:
        return InsufficientStorage("the database's disk is full: free some space")
    if isinstance(error, InternalError) and state not in (_READ_ONLY, _SILENT):
        return error
    if isinstance(cause, sqlite3.Error):
        if cause.sqlite_errorcode in (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR_SHMSIZE):
            return InsufficientStorage("the database's disk is full: free some space")
        if cause.sqlite_errorcode & 0xFF not in _TRANSIENT_ERRORS:
            return error
    return Unavailable("the database does not respond; try again in a moment")
