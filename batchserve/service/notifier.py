"""Notifications about jobs for the requests of this process."""

import asyncio
from collections.abc import Callable
from contextlib import suppress
from weakref import WeakValueDictionary

from batchserve.db.notifications import Notification, Topic

__all__ = ["JobNotifier"]


class JobNotifier:
    """Wakes the waiters of a job when an attempt at it has ended: by the worker of this process, if it `has_worker`,
    and by those of others while their notifications are received. Starts of attempts notify of nothing: poll for these,
    too.
    """

    def __init__(self, *, has_worker: bool) -> None:
        self.has_worker = has_worker
        self.hears_others: Callable[[], bool] = lambda: False
        """Whether the notifications of other processes are received at present."""
        self._loop = asyncio.get_running_loop()
        self._waiting: WeakValueDictionary[str, asyncio.Event] = WeakValueDictionary()

    def notify(self, job_id: str) -> None:
        """Safe from any thread."""
        if job_id in self._waiting:
            with suppress(RuntimeError):  # the loop has ended, and with it all waiters
                self._loop.call_soon_threadsafe(self._wake, job_id)

    def hear(self, notification: Notification) -> None:
        """A notification of any process. Safe from any thread."""
        if notification.topic in (Topic.QUEUED, Topic.WEBHOOKS):
            return
        for job_id in notification.job_ids or list(self._waiting):
            self.notify(job_id)

    def subscribe(self, job_id: str) -> asyncio.Event:
        """An event that is set when an attempt at the job ends."""
        return self._waiting.setdefault(job_id, asyncio.Event())

    def _wake(self, job_id: str) -> None:
        if event := self._waiting.pop(job_id, None):
            event.set()
