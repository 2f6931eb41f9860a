"""Notifications about jobs within this process."""

import asyncio
from contextlib import suppress
from weakref import WeakValueDictionary

__all__ = ["JobNotifier"]


class JobNotifier:
    """Wakes the waiters of a job when the worker of this process, if it `has_worker`, has ended an attempt. Starts of
    attempts and the workers of other processes notify of nothing: poll for these, too.
    """

    def __init__(self, *, has_worker: bool) -> None:
        self.has_worker = has_worker
        self._loop = asyncio.get_running_loop()
        self._waiting: WeakValueDictionary[str, asyncio.Event] = WeakValueDictionary()

    def notify(self, job_id: str) -> None:
        """Safe from any thread."""
        if job_id in self._waiting:
            with suppress(RuntimeError):  # the loop has ended, and with it all waiters
                self._loop.call_soon_threadsafe(self._wake, job_id)

    def subscribe(self, job_id: str) -> asyncio.Event:
        """An event that is set when an attempt at the job ends."""
        return self._waiting.setdefault(job_id, asyncio.Event())

    def _wake(self, job_id: str) -> None:
        if event := self._waiting.pop(job_id, None):
            event.set()
