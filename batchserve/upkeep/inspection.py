"""Read-only checks of rows and bytes for `batchserve doctor`.

They can run while a server runs: findings are verified again, because jobs end and are deleted meanwhile.
"""

import hashlib
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from typing import Any

from sqlalchemy import Column, Select, Table, and_, bindparam, delete, func, or_, select, tuple_, update
from sqlalchemy.exc import DatabaseError
from sqlalchemy.sql import ColumnElement

from batchserve import rows
from batchserve.db import notifications
from batchserve.db.connect import Database
from batchserve.db.notifications import Topic
from batchserve.db.tables import (
    attempts,
    audit,
    chunks,
    idempotency_keys,
    inputs,
    jobs,
    keys,
    models,
    quotas,
    schedules,
    ticks,
    webhook_attempts,
    webhook_deliveries,
    webhook_endpoints,
    webhook_secrets,
)
from batchserve.db.watcher import Version
from batchserve.domain import JobState
from batchserve.errors import BatchserveError, Unavailable
from batchserve.formats.protocol import Open
from batchserve.jobs import contents, queries, requests
from batchserve.jobs.statements import INPUT_COLUMNS
from batchserve.quotas import account
from batchserve.storage import Storage
from batchserve.upkeep import retention
from batchserve.upkeep.objects import UNFINISHED, WHOLE, NamedObject, objects_by_row
from batchserve.webhooks import terms
from batchserve.webhooks.terms import DeliveryState

BUDGET_BYTES = 2**30
BUDGET_SECONDS = 10.0
"""Most bytes whose digests are computed, unless all are requested."""
PATIENCE = 60.0
"""Seconds beyond all regular delays (a lease, a rescue, a poll) after which a job counts as stuck."""
REPEATS = 2
"""Lost attempts at an unfinished job that count as a fault."""
CLOCK_TOLERANCE = 60.0

_PAGE = 500
_BLOCK = 1 << 20


@dataclass(frozen=True, slots=True)
class Fault:
    """One fault: its place, what was expected, what was found, and its repair."""

    place: str
    expected: str
    found: str
    mend: str


@dataclass(frozen=True, slots=True)
class Inspected:
    """The result of checking the stored objects. `skipped` of the `objects` have a digest that was not compared."""

    objects: int
    skipped: int
    faults: tuple[Fault, ...]


# --- bytes that rows name --------------------------------------------------------------------------------------------


def inspect_objects(database: Database, storage: Storage, *, most_bytes: float, seconds: float) -> Inspected:
    """Checks that referenced objects exist with the length and SHA-256 of their rows. Digests are compared until
    `most_bytes` are read or `seconds` have passed: those of models first, then of the parts from which jobs resume,
    then of inputs and results, the newest first. Existence and length are always checked.
    """
    deadline = time.monotonic() + seconds
    left = most_bytes
    open = partial(contents.opened, database, storage)
    objects = skipped = 0
    faults: list[Fault] = []
    for named, ask_again in objects_by_row(database):
        for expected in named:
            objects += 1
            difference = _difference_of_length(open, expected)
            if difference is None and expected.sha256 is not None:
                if left < (expected.bytes or 0) or time.monotonic() > deadline:
                    skipped += 1
                else:
                    difference = _difference_of_digest(open, expected.key, expected.sha256)
                    left -= expected.bytes or 0
            if difference is not None and expected.key in {named.key for named in ask_again()}:
                faults.append(Fault(f"{expected.key} of {expected.owner}", *difference, expected.mend))
    return Inspected(objects, skipped, tuple(faults))


def _difference_of_length(open: Open, expected: NamedObject) -> tuple[str, str] | None:
    """What was expected and what was found, if they differ."""
    try:
        with open(expected.key) as source:
            size = source.seek(0, 2)
    except FileNotFoundError:
        return "an object" if expected.bytes is None else f"{expected.bytes} bytes", "no object"
    if expected.bytes is not None and size != expected.bytes:
        return f"{expected.bytes} bytes", f"{size} bytes"
    return None


def _difference_of_digest(open: Open, key: str, expected: str) -> tuple[str, str] | None:
    digest = hashlib.sha256()
    try:
        with open(key) as source:
            while block := source.read(_BLOCK):
                digest.update(block)
    except FileNotFoundError:
        return f"SHA-256 {expected}", "no object"
    except OSError as error:
        return f"SHA-256 {expected}", f"a disk that cannot read it: {error.strerror}"
    found = digest.hexdigest()
    return None if found == expected else (f"SHA-256 {expected}", f"SHA-256 {found}")


# --- the database itself ---------------------------------------------------------------------------------------------


def inspect_database(database: Database) -> list[Fault]:
    """Findings of SQLite's integrity checks; none on other databases, which check their pages themselves."""
    if not database.url.startswith("sqlite"):
        return []
    mend = "stop the server and restore the database from a backup"
    faults = []
    try:
        with database.read() as connection:
            broken = connection.exec_driver_sql("PRAGMA integrity_check(10)").scalars().all()
            dangling = connection.exec_driver_sql("PRAGMA foreign_key_check").all()
    except (DatabaseError, Unavailable) as error:
        reason = str(error.orig) if isinstance(error, DatabaseError) else str(error.__cause__ or error)
        return [Fault(database.url, "an intact file", reason, mend)]
    faults = [Fault(database.url, "integrity_check: ok", line, mend) for line in broken if line != "ok"]
    faults += [Fault(f"{table}, row {row}", f"a row in {parent}", "none", mend) for table, row, parent, *_ in dangling]
    return faults


def inspect_clock(database: Database, now: float) -> list[Fault]:
    """Checks that the wall clock is not behind the times in the database. No job is lost by that, since leases do not
    use it; but times, expiry and the order of jobs are wrong."""
    seen = (jobs.c.created_at, jobs.c.finished_at, attempts.c.started_at)
    with database.read() as connection:
        plausible = (select(func.max(moment)).where(moment.between(rows.EARLIEST, rows.LATEST)) for moment in seen)
        newest = max(connection.scalar(query) or 0.0 for query in plausible)
    if newest <= now + CLOCK_TOLERANCE:
        return []
    expected = f"not before {_shown(newest)}, the newest time in the database"
    return [Fault("wall clock", expected, _shown(now), "set the clock of this host (NTP)")]


def _shown(moment: float) -> str:
    return datetime.fromtimestamp(moment, UTC).isoformat(timespec="seconds")


# --- jobs that do not go on ------------------------------------------------------------------------------------------


def inspect_jobs(database: Database, *, patience: float) -> list[Fault]:
    """Stuck jobs: running with a lease that lapsed `patience` seconds ago or on another boot, queued and due for that
    long while no worker runs any of their tenant, cancelled for that long without an end; jobs whose attempts are
    lost repeatedly; and schedules whose tick is overdue for that long."""
    with database.read() as connection:
        now = database.moment(connection)
        mine = jobs.c.lease_clock == now.clock
        running = jobs.c.state == JobState.RUNNING
        lapsed = or_(jobs.c.lease_until < now.steady - patience, jobs.c.lease_clock != now.clock)
        abandoned = connection.execute(select(jobs.c.id, jobs.c.worker).where(running, lapsed)).all()
        held = set(
            connection.scalars(select(jobs.c.tenant).distinct().where(running, mine, jobs.c.lease_until >= now.steady))
        )
        asked = and_(running, jobs.c.cancel_requested_at < now.wall - patience)
        uncancelled = connection.execute(select(jobs.c.id, jobs.c.worker).where(asked, ~lapsed)).all()
        lost = and_(attempts.c.job_id == jobs.c.id, attempts.c.outcome == "lost")
        unfinished = jobs.c.state.in_(UNFINISHED)
        repeated = connection.execute(
            select(jobs.c.id, func.count())
            .join(attempts, lost)
            .where(unfinished)
            .group_by(jobs.c.id)
            .having(func.count() >= REPEATS)
        ).all()
        waits = queries.longest_waits(connection, now.wall)
    start = "batchserve worker (or serve)"
    faults = [
        Fault(f"job {job_id}", f"a lease that {worker} renews", "a lease that lapsed: no worker rescues the job", start)
        for job_id, worker in abandoned
    ]
    # A worker, however busy, takes one job of each tenant of which none is running (execution.claim_due).
    faults += [
        Fault("queue", "due jobs that are started",
              f"one of {tenant} has waited for {waited:.0f} s, and no worker runs any of this tenant",
              f"{start}; if one is running, check its log: it cannot claim jobs")
        for tenant, waited in waits.items() if waited > patience and tenant not in held
    ]  # fmt: skip
    faults += [
        Fault(f"job {job_id}", "the end of a cancelled job", "it keeps running", f"restart the worker {worker}")
        for job_id, worker in uncancelled
    ]
    faults += [
        Fault(f"job {job_id}", "attempts that end", f"{count} lost with their worker",
              f"check the worker's log and memory; batchserve jobs cancel {job_id}")
        for job_id, count in repeated
    ]  # fmt: skip
    return faults + _overdue_schedules(database, patience, start)


def _overdue_schedules(database: Database, patience: float, start: str) -> list[Fault]:
    with database.read() as connection:
        overdue = schedules.c.next_at.between(rows.EARLIEST, database.moment(connection).wall - patience)
        query = select(schedules.c.name, schedules.c.next_at).where(schedules.c.paused_at.is_(None), overdue)
        found = connection.execute(query).all()
    expected = "ticks at its times"
    return [
        Fault(f"schedule {name}", expected, f"none since {_shown(next_at)}: no process plans them", start)
        for name, next_at in found
    ]


# --- webhooks that do not arrive --------------------------------------------------------------------------------------


def inspect_webhooks(database: Database, *, patience: float) -> list[Fault]:
    """Endpoints to which nothing was delivered for `patience` seconds, though it was tried; and deliveries that have
    been due for so long."""
    own, delivery = webhook_endpoints.c, webhook_deliveries.c
    with database.read() as connection:
        now = database.moment(connection)
        failing = select(own.id, own.failing_since).where(own.enabled, own.failing_since < now.wall - patience)
        endpoints = connection.execute(failing.order_by(own.id)).all()
        overdue = and_(delivery.due_clock == now.clock, delivery.due_at < now.steady - patience)
        fresh = and_(delivery.attempts == 0, delivery.created_at < now.wall - patience)
        waiting = select(func.count()).where(delivery.state == DeliveryState.PENDING, or_(overdue, fresh))
        count = connection.scalar(waiting) or 0
    faults = [
        Fault(f"webhook {endpoint_id}", "deliveries that succeed", f"none since {_shown(since)}",
              f"batchserve webhooks deliveries {endpoint_id}")
        for endpoint_id, since in endpoints
    ]  # fmt: skip
    if count:
        found = f"{count} that no worker has tried for {patience:.0f} s"
        faults.append(Fault("webhooks", "due deliveries that are tried", found, "batchserve worker (or serve)"))
    return faults


# --- accounts of tenants with a quota --------------------------------------------------------------------------------


def inspect_accounts(database: Database) -> list[Fault]:
    """Checks that the bytes of each account are those that are stored."""
    with database.read() as connection:
        found = account.differing(connection)
    return [
        Fault(f"account of the tenant {tenant}", f"{stored:,} bytes, which are stored", f"{kept:,} bytes",
              f"batchserve quotas recount {tenant}")
        for tenant, kept, stored in found
    ]  # fmt: skip


# --- rows that cannot be read ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Unreadable:
    """A row that no release writes: its table, its primary key, and the fault."""

    table: str
    key: tuple[Any, ...]
    reason: str

    @property
    def fault(self) -> Fault:
        place = f"{self.table}, {' '.join(map(str, self.key))}"
        return Fault(place, "a readable row", self.reason, _UNREADABLE_MENDS[self.table].format(*self.key))


_UNREADABLE_MENDS = {
    "jobs": "batchserve jobs rm {0} (or `batchserve mend`, which removes all such rows)",
    "inputs": "batchserve jobs rm {0} (or `batchserve mend`), and predict the file again",
    "chunks": "batchserve jobs rm {0} (or `batchserve mend`), and predict the file again",
    "attempts": "batchserve mend (the job keeps its other attempts)",
    "models": "batchserve mend (which removes this version), then: batchserve models add",
    "keys": "batchserve mend (which revokes this key), then: batchserve keys create",
    "idempotency_keys": "batchserve mend (which deletes this key)",
    "audit": "batchserve mend (which deletes this entry)",
    "schedules": "batchserve mend (which deletes this schedule and its history), then: batchserve schedules create",
    "ticks": "batchserve mend (which deletes this entry of the history)",
    "webhook_endpoints": "batchserve mend (which deletes this webhook), then: batchserve webhooks add",
    "webhook_secrets": "batchserve mend (which deletes this secret), then: batchserve webhooks rotate",
    "webhook_deliveries": "batchserve mend (which deletes this delivery)",
    "webhook_attempts": "batchserve mend (which deletes this attempt)",
    "quotas": "batchserve mend (which removes this quota), then: batchserve quotas set",
}


_WEBHOOKS = (webhook_attempts, webhook_deliveries, webhook_secrets, webhook_endpoints)
_FORGOTTEN = (attempts, idempotency_keys, audit, schedules, ticks, quotas, *_WEBHOOKS)
"""Tables whose unreadable rows are deleted."""


def find_unreadable(database: Database) -> Iterator[Unreadable]:
    """Every row that cannot be read, of any table."""
    for page in _unreadable_pages(database):
        yield from page


def mend_unreadable(database: Database, storage: Storage) -> list[Unreadable]:
    """Removes each unreadable row: a job, also one with an unreadable chunk, with its bytes; a key is revoked and a
    model version removed; attempts, idempotency keys, audit entries, schedules, ticks, quotas and rows of webhooks are
    deleted. Returns those rows."""
    found = list(find_unreadable(database))
    for job_id in {row.key[0] for row in found if row.table in ("jobs", "inputs", "chunks")}:
        with database.write() as connection:
            owned = requests.remove_whatever_its_state(connection, job_id)
        if owned is not None:
            retention.remove_bytes(database, storage, owned)
    forgotten = {table.name: table for table in _FORGOTTEN}
    with database.write(exclusive="models") as connection:
        now = database.moment(connection).wall
        ends = {"models": (models, {"deleted_at": now}), "keys": (keys, {"revoked_at": now})}
        for row in found:
            if row.table in ends:
                table, values = ends[row.table]
                connection.execute(update(table).where(_is_row(table, row.key)).values(values))
                if table is keys:
                    notifications.send(connection, Topic.REVOKED)
            elif row.table in forgotten:
                table = forgotten[row.table]
                connection.execute(delete(table).where(_is_row(table, row.key)))
    return found


class UnreadableCount:
    """Number of unreadable rows in the latest scan. Safe from any thread. Each request scans for some milliseconds,
    then pauses for longer: a small database is scanned in one go, a huge one little by little.
    """

    def __init__(self, database: Database) -> None:
        self._database = database
        self._lock = threading.Lock()
        self._pages: Iterator[list[Unreadable]] | None = None
        self._version: Version | None = None
        self._total = self._found = 0
        self._rests_until = 0.0

    def count(self) -> int:
        with self._lock:
            began = time.monotonic()
            if began >= self._rests_until:
                try:
                    self._scan(began + _SCAN)
                except (DatabaseError, BatchserveError):  # other checks report a database that does not answer
                    self._pages = None
                rest = _REST if self._pages is not None else _SHORT_REST
                self._rests_until = time.monotonic() + rest * (time.monotonic() - began)
            return max(self._total, self._found)

    def _scan(self, until: float) -> None:
        if self._pages is None:
            version = self._database.version_from_thread()
            if version is not None and version == self._version:
                return
            self._pages, self._version, self._found = _unreadable_pages(self._database), version, 0
        for page in self._pages:
            self._found += len(page)
            if time.monotonic() > until:
                return
        self._pages, self._total, self._found = None, self._found, 0


_SCAN, _SHORT_REST, _REST = 0.05, 2.0, 20.0
"""Seconds of a scan, and its pauses as multiples of that: after a complete scan, and before it continues."""


def _read_first(row: rows.Row) -> object:
    """A job with its first input only: the others, which are counted, are read separately."""
    further = row["inputs_there"] - 1
    if further > 0 and row["inputs_total"] == 1 + further:
        row = {**row, "inputs_total": 1}
    return rows.job(row, None, ())


def _read_chunk(row: rows.Row) -> object:
    return rows.chunk(row) if row["attempt"] is None else rows.committed_chunk(row)


_INPUTS_THERE = (
    select(func.count()).where(inputs.c.job_id == jobs.c.id).correlate(jobs).scalar_subquery().label("inputs_there")
)
_READERS: tuple[tuple[Table, Select[Any], Callable[[rows.Row], object]], ...] = (
    (jobs, WHOLE.add_columns(_INPUTS_THERE), _read_first),
    (inputs, select(inputs.c.job_id, inputs.c.number, *INPUT_COLUMNS).where(inputs.c.number > 0), rows.stored_input),
    (models, select(models).where(models.c.deleted_at.is_(None)), rows.model),
    (attempts, select(attempts), rows.attempt),
    (chunks, select(chunks), _read_chunk),
    (keys, select(keys).where(keys.c.revoked_at.is_(None)), rows.key),
    (idempotency_keys, select(idempotency_keys), rows.remembered),
    (audit, select(audit), rows.audit_entry),
    (schedules, select(schedules), rows.schedule),
    (ticks, select(ticks), rows.tick),
    (webhook_endpoints, select(webhook_endpoints), terms.read_endpoint),
    (webhook_secrets, select(webhook_secrets), terms.read_secret),
    (webhook_deliveries, select(webhook_deliveries), terms.read_delivery),
    (webhook_attempts, select(webhook_attempts), terms.read_attempt),
    (quotas, select(quotas), rows.quota),
)
"""Columns and reader of each table. A job comes with the first of its inputs."""


def _unreadable_pages(database: Database) -> Iterator[list[Unreadable]]:
    """The unreadable rows of each page, read in short transactions."""
    for table, of_table, read in _READERS:
        key = list(table.primary_key)
        query = of_table.order_by(*key).limit(_PAGE)
        after: tuple[Any, ...] | None = None
        while True:
            beyond = [] if after is None else [_is_after(key, after)]
            with database.read() as connection:
                page = connection.execute(query.where(*beyond)).mappings().all()
            yield [
                Unreadable(table.name, tuple(row[column.name] for column in key), reason)
                for row in page
                if (reason := rows.fault_of(read, row)) is not None
            ]
            last = tuple(page[-1][column.name] for column in key) if page else None
            if len(page) < _PAGE or last == after:
                break
            after = last


def _is_after(key: list[Column[Any]], values: tuple[Any, ...]) -> ColumnElement[bool]:
    return tuple_(*key) > tuple_(
        *(bindparam(None, value, column.type) for column, value in zip(key, values, strict=True))
    )


def _is_row(table: Table, values: tuple[Any, ...]) -> ColumnElement[bool]:
    return and_(*(column == value for column, value in zip(table.primary_key, values, strict=True)))
