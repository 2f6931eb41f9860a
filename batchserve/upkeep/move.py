"""Moves an embedded installation to another database and storage, such as PostgreSQL and a bucket.

Objects never change, so they are copied while the server runs. Then the old database is closed for writes: what would
change it is refused from now on, and reads go on. What was added meanwhile and all rows are copied, the rows in one
transaction: until its end, nothing is visible at the new place. A move that is broken off is begun again.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

from sqlalchemy import Connection, Table, func, insert, make_url, select

from batchserve.db import closed, migrate
from batchserve.db.connect import Database, unbounded
from batchserve.db.tables import clock, holds, jobs, keys, metadata, models, schedules, workers
from batchserve.domain import JobState
from batchserve.errors import InvalidOptions
from batchserve.jobs import execution
from batchserve.storage import Storage, Stored
from batchserve.upkeep.backup import copied, differs
from batchserve.upkeep.holds import held
from batchserve.upkeep.objects import named_objects

__all__ = ["MoveReport", "move"]

_OWN = (holds, clock, workers)
"""Tables of hosts: they are neither copied nor closed."""
_MOVED = [table for table in metadata.sorted_tables if table not in _OWN]
_BATCH = 500


@dataclass(frozen=True, slots=True)
class MoveReport:
    """What a move has copied. `damaged`: keys of objects that were missing already, or differ from their rows."""

    jobs: int = 0
    models: int = 0
    objects: int = 0
    bytes: int = 0
    damaged: tuple[str, ...] = ()


def move(
    source: Database, storage: Storage, target: Database, place: Storage, say: Callable[[str], None] = lambda _: None
) -> MoveReport:
    """Moves everything from `source` and `storage` to `target`, whose schema is made, and `place`. Every byte is
    compared with the digest of its row. Jobs that run are queued there, and keep the chunks that they have.

    Afterwards the old database is closed for writes. Raises InvalidOptions where the source is not SQLite, or the
    target has jobs, models, keys or schedules.
    """
    if make_url(source.url).get_backend_name() != "sqlite":
        raise InvalidOptions("only an installation with SQLite can be moved: use the tools of your database")
    migrate.upgrade(target)
    _require_empty(target)
    done: dict[str, Stored] = {}
    with held(source):
        say("Copying objects; the server may be running")
        _copy_objects(source, storage, place, done)
        say("Closing the old database for writes, and copying its rows")
        with source.write() as connection:
            closed.close(connection, _MOVED)
        try:
            damaged = _copy_objects(source, storage, place, done)
            report = _copy_rows(source, target)
        except BaseException:
            with source.write() as connection:
                closed.reopen(connection, _MOVED)
            raise
    size = sum(stored.bytes for stored in done.values())
    return replace(report, objects=len(done), bytes=size, damaged=tuple(sorted(damaged)))


def _require_empty(target: Database) -> None:
    with target.read() as connection:
        for table in (jobs, models, keys, schedules):
            if count := connection.scalar(select(func.count()).select_from(table)):
                there = make_url(target.url).render_as_string(hide_password=True)
                raise InvalidOptions(f"{there} is in use: it has {count} {table.name}; move to an empty database")


# --- objects ---------------------------------------------------------------------------------------------------------


def _copy_objects(source: Database, storage: Storage, place: Storage, done: dict[str, Stored]) -> set[str]:
    """Copies those that are not done yet. Returns the keys of those that are missing or damaged."""
    damaged: set[str] = set()
    for key, sha256 in named_objects(source):
        if key not in done:
            try:
                with storage.open(key) as opened:
                    done[key] = copied(opened, place, key)
            except FileNotFoundError:
                pass
        if differs(done.get(key), sha256):
            damaged.add(key)
    return damaged


# --- rows ------------------------------------------------------------------------------------------------------------


def _copy_rows(source: Database, target: Database) -> MoveReport:
    with source.read() as old, target.write() as new, unbounded(new):
        counts = {table.name: _copy_table(old, new, table) for table in _MOVED}
        now = target.moment(new).wall
        running = select(jobs.c.id, jobs.c.attempt).where(jobs.c.state == JobState.RUNNING)
        for job_id, attempt in new.execute(running).all():
            execution.release_if_mine(new, job_id, attempt, now)
    return MoveReport(counts[jobs.name], counts[models.name])


def _copy_table(old: Connection, new: Connection, table: Table) -> int:
    count = 0
    found = old.execution_options(yield_per=_BATCH).execute(select(table).order_by(*table.primary_key))
    for rows in found.mappings().partitions():
        new.execute(insert(table), [dict(row) for row in rows])
        count += len(rows)
    column = table.autoincrement_column
    if new.dialect.name == "postgresql" and column is not None and count:
        highest = select(func.max(column)).scalar_subquery()
        new.execute(select(func.setval(func.pg_get_serial_sequence(table.name, column.name), highest)))
    return count
