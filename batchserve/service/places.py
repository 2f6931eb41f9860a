"""The places of queued jobs, counted once for all requests."""

import threading
import time
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Iterable
from dataclasses import dataclass, field

from sqlalchemy import Connection

from batchserve.db.connect import Database
from batchserve.db.watcher import Version
from batchserve.domain import Job, JobState
from batchserve.jobs import queries

__all__ = ["NEAR", "Places"]

NEAR = 1000
"""Queued jobs that are read for a single place; further back, places come from a count of the whole queue."""
SHARE = 10
"""Validity of a count, as a multiple of its duration: counting takes a tenth of a core, however long the queue."""
UNUSED = 30.0
"""Seconds after which an unused count is dropped."""


@dataclass(slots=True)
class _Line:
    """The due jobs of one priority in their order."""

    before: int
    """Due jobs of higher priorities."""
    since: "array[float]" = field(default_factory=lambda: array("d"))
    ids: list[str] = field(default_factory=list)


@dataclass(slots=True)
class _Count:
    """The queue of a tenant at one moment."""

    version: Version | None
    """Of the database, before it was read."""
    ahead: float
    """Seconds by which the clock of the database was ahead of that of this host."""
    lines: dict[int, _Line] = field(default_factory=dict)
    """By priority, the highest first."""
    total: int = 0
    next_due: float | None = None
    """When the next delayed job becomes due: then places change without a commit."""
    holds_until: float = 0.0
    """On the monotonic clock."""
    asked_at: float = 0.0

    def place(self, job: Job) -> int:
        """Number of due jobs ahead of this one, whether or not it was in the count."""
        line = self.lines.get(job.priority)
        if line is None:
            return next((line.before for priority, line in self.lines.items() if priority < job.priority), self.total)
        since = job.queued_at or 0.0
        first = bisect_left(line.since, since)
        return line.before + bisect_left(line.ids, job.id, first, bisect_right(line.since, since, first))


class Places:
    """A tenant's queue is counted on request, when the last count is no longer valid and a commit has followed it. So a
    place is as old as ten counts at most: 2 s with 100,000 queued jobs, nothing with a few."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._counts: dict[str, _Count] = {}
        self._locks: dict[str, threading.Lock] = {}
        self._lock = threading.Lock()

    def near(self, connection: Connection, job: Job, now: float) -> int | None:
        """The place of a job as of now. None when it is not queued, and when it is too far back to be counted in
        passing."""
        return queries.queue_position(connection, job, now, NEAR)

    def of(self, found: Iterable[Job], now: float) -> dict[str, int]:
        """The places of those of these jobs that queue, by ID. May count a queue: call it in a thread."""
        queued = [job for job in found if job.state is JobState.QUEUED]
        counts = {tenant: self._count(tenant, now) for tenant in {job.tenant for job in queued}}
        return {job.id: counts[job.tenant].place(job) for job in queued}

    def may_have_changed(self, tenants: Iterable[str]) -> bool:
        """Whether time alone has moved a counted job of these tenants."""
        now = time.time()
        counts = [self._counts.get(tenant) for tenant in tenants]
        return any(
            count is not None and count.next_due is not None and count.next_due <= now + count.ahead for count in counts
        )

    def _count(self, tenant: str, now: float) -> _Count:
        with self._lock:
            lock = self._locks.setdefault(tenant, threading.Lock())
        kept = self._counts.get(tenant)
        if kept is not None and self._holds(kept, now):
            return self._used(kept)
        # While one thread counts, the others use the previous count; without one, they wait.
        if not lock.acquire(blocking=kept is None):
            assert kept is not None
            return self._used(kept)
        try:
            kept = self._counts.get(tenant)
            if kept is None or not self._holds(kept, now):
                kept = self._counts[tenant] = self._counted(tenant, now)
        finally:
            lock.release()
        self._forget_unused()
        return self._used(kept)

    def _holds(self, count: _Count, now: float) -> bool:
        if time.monotonic() < count.holds_until:
            return True
        due = count.next_due is not None and count.next_due <= now
        return not due and count.version is not None and count.version == self._database.version_from_thread()

    def _counted(self, tenant: str, now: float) -> _Count:
        began = time.monotonic()
        count = _Count(self._database.version_from_thread(), now - time.time())
        with self._database.read() as connection:
            for priority, since, job_id, run_after in queries.queue_of(connection, tenant):
                if run_after is not None and run_after > now:
                    count.next_due = min(run_after, count.next_due or run_after)
                    continue
                line = count.lines.get(priority)
                if line is None:
                    line = count.lines[priority] = _Line(count.total)
                line.since.append(since or 0.0)
                line.ids.append(job_id)
                count.total += 1
        ended = time.monotonic()
        count.holds_until = ended + SHARE * (ended - began)
        return count

    def _used(self, count: _Count) -> _Count:
        count.asked_at = time.monotonic()
        return count

    def _forget_unused(self) -> None:
        with self._lock:
            before = time.monotonic() - UNUSED
            for tenant in [tenant for tenant, count in self._counts.items() if 0.0 < count.asked_at < before]:
                del self._counts[tenant]
                self._locks.pop(tenant, None)
