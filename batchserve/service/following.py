"""Jobs that clients follow: one poll of the database for all followers, one body for each job."""

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import suppress
from contextvars import Context
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

from starlette.concurrency import run_in_threadpool

from batchserve.db.connect import Database
from batchserve.db.notifications import Notification, Topic
from batchserve.db.watcher import Version
from batchserve.domain import Attempt, Job
from batchserve.jobs import queries
from batchserve.logs import get_logger
from batchserve.service.places import Places
from batchserve.settings import Settings
from batchserve.upkeep import retention

__all__ = ["PAUSE", "Following", "Shown"]

log = get_logger()

PAUSE = 0.25
"""Shortest polling interval, in seconds."""
SHARE = 10
"""The pause after a poll, as a multiple of its duration: following takes a tenth of a core."""
TOGETHER = 250
"""Jobs read in one query."""
SENDING = 0.0003
"""Approximate seconds to send one event to one follower."""
ALLOWED_FOR = 1.0
"""Seconds for which the permission of a follower without events is not checked again."""
BURST = 50
"""Followers notified in one batch; other requests run in between."""


class Shown(Protocol):
    """A job as its followers see it, made once for all of them."""

    @property
    def tag(self) -> str:
        """Identifies the shown content."""
        ...

    @property
    def finished(self) -> bool: ...


S = TypeVar("S", bound=Shown)
Show = Callable[[Job, list[Attempt], int | None, float], S]
"""Renders a job, its attempts and its place in the queue as of a moment."""


@dataclass(eq=False, slots=True)
class _Followed(Generic[S]):
    followers: int = 0
    is_due: bool = True
    """Whether it is to be read before the next poll."""
    read: tuple[Job, int | None] | None = None
    """The latest read: the job and its place."""
    notified: S | None = None
    gone: bool = False
    change: asyncio.Event = field(default_factory=asyncio.Event)

    def tell(self) -> None:
        """Wakes the followers."""
        self.change.set()
        self.change = asyncio.Event()


class Following(Generic[S]):
    """Polls while jobs are followed: after a commit, and when time alone may have moved a job. Without a database
    version, every poll reads. All other work is in a thread.
    """

    def __init__(
        self, database: Database, settings: Settings, places: Places, stopping: asyncio.Event, show: Show[S]
    ) -> None:
        self._database, self._settings, self._places, self._stopping = database, settings, places, stopping
        self._show = show
        self._followed: dict[str, _Followed[S]] = {}
        self._come = asyncio.Event()
        """Set when a job is to be read before the next poll."""
        self._loop = asyncio.get_running_loop()
        self._polling: asyncio.Task[None] | None = None

    async def follow(self, job_id: str, allowed: Callable[[], Awaitable[bool]]) -> AsyncGenerator[S]:
        """The job now, and after each change; a slow follower misses intermediate states. Ends when the job is finished
        or deleted, when it is not `allowed` any more, and when the server stops."""
        followed = self._followed.setdefault(job_id, _Followed())
        followed.followers += 1
        if followed.is_due:
            self._come.set()
        if self._polling is None or self._polling.done():
            self._polling = asyncio.create_task(self._poll(), context=Context())
        notified: S | None = None
        try:
            while not self._stopping.is_set() and await allowed():
                change = followed.change
                if followed.notified is not None and followed.notified is not notified:
                    notified = followed.notified
                    yield notified
                elif followed.gone or (notified is not None and notified.finished):
                    return
                else:
                    with suppress(TimeoutError):
                        async with asyncio.timeout(ALLOWED_FOR):
                            await change.wait()
        finally:
            followed.followers -= 1
            if not followed.followers:
                del self._followed[job_id]

    def hear(self, notification: Notification) -> None:
        """A notification of any process, which is faster than a poll. Safe from any thread."""
        if self._followed:
            with suppress(RuntimeError):  # the loop has ended, and with it all followers
                self._loop.call_soon_threadsafe(self._heard, notification)

    def _heard(self, notification: Notification) -> None:
        for job_id in notification.job_ids:
            if followed := self._followed.get(job_id):
                followed.is_due = True
                self._come.set()
        if notification.topic is Topic.REVOKED:
            for followed in self._followed.values():
                followed.tell()  # they ask whether they are still allowed

    async def _poll(self) -> None:
        """Runs until no follower is left, or the server stops."""
        seen: Version | None = None
        next_poll = 0.0
        while self._followed and not self._stopping.is_set():
            await self._pause(next_poll - time.monotonic())
            began = time.monotonic()
            if began < next_poll:
                chosen = {job_id: followed for job_id, followed in self._followed.items() if followed.is_due}
            else:
                version = await self._database.version()
                tenants = {followed.read[0].tenant for followed in self._followed.values() if followed.read}
                same = version is not None and version == seen and not self._places.may_have_changed(tenants)
                chosen = {
                    job_id: followed for job_id, followed in self._followed.items() if not same or followed.is_due
                }
                seen, next_poll = version, began + PAUSE
            if not chosen:
                continue
            try:
                notified = await self._notify(chosen)
            except Exception:  # such as a database that does not respond: the next poll is soon
                log.warning("Followed jobs could not be read", action="follow_error", exc_info=True)
                seen, notified = None, 0
            next_poll = max(next_poll, began + SHARE * (time.monotonic() - began + notified * SENDING))
        for followed in self._followed.values():
            followed.change.set()

    async def _pause(self, seconds: float) -> None:
        """Waits until the next poll is due, a follower joins or the server stops."""
        if not self._come.is_set() and seconds > 0:
            waits = [asyncio.ensure_future(event.wait()) for event in (self._come, self._stopping)]
            await asyncio.wait(waits, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
            for wait in waits:
                wait.cancel()
        self._come.clear()

    async def _notify(self, chosen: dict[str, _Followed[S]]) -> int:
        """Reads these jobs and notifies the followers of changed ones; returns how many were notified."""
        before = {job_id: followed.read for job_id, followed in chosen.items()}
        for followed in chosen.values():
            followed.is_due = False  # what is heard from now on may be missed by this read
        changed = await run_in_threadpool(self._read, before)
        notified, burst = 0, BURST
        for job_id, found in changed.items():
            followed = chosen[job_id]
            if found is None:
                followed.gone = True
            else:
                followed.read, body = found
                if followed.notified is None or body.tag != followed.notified.tag:
                    followed.notified = body
            followed.tell()
            notified += followed.followers
            if notified >= burst:
                burst = notified + BURST
                await asyncio.sleep(0)
        return notified

    def _read(
        self, before: dict[str, tuple[Job, int | None] | None]
    ) -> dict[str, tuple[tuple[Job, int | None], S] | None]:
        """The changed jobs; None for a deleted one."""
        ids = list(before)
        changed: dict[str, tuple[tuple[Job, int | None], S] | None] = {}
        for start in range(0, len(ids), TOGETHER):
            some = ids[start : start + TOGETHER]
            with self._database.read() as connection:
                now = self._database.moment(connection).wall
                found = {job.id: job for job in queries.get_several(connection, some)}
            places = self._places.of(found.values(), now)
            new = [job for job in found.values() if before[job.id] != (job, places.get(job.id))]
            with self._database.read() as connection:
                tried = queries.attempts_of_several(connection, [job.id for job in new if job.attempt])
            for job in new:
                place = places.get(job.id)
                dated = retention.dated(job, self._settings)
                changed[job.id] = (job, place), self._show(dated, tried.get(job.id, []), place, now)
            for job_id in set(some) - set(found):
                changed[job_id] = None
        return changed
