"""Durable transitions of jobs: each in one transaction, retried while the database is unavailable."""

import time
from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

import stamina
from sqlalchemy import Connection

from batchserve.db.connect import Database
from batchserve.errors import InsufficientStorage, Unavailable
from batchserve.jobs import execution
from batchserve.worker.clock import Clock

__all__ = ["CancelRequested", "Transitions"]

T = TypeVar("T")

_WAIT_FOR_SPACE = 60.0


class CancelRequested(Exception):
    """The job of a write that waits for space is to be cancelled."""


class Transitions:
    def __init__(
        self, database: Database, clock: Clock, is_stopping: Callable[[], bool], failed: Callable[[], None]
    ) -> None:
        """`failed` is called whenever the database does not respond."""
        self._database, self._clock = database, clock
        self._is_stopping, self._failed = is_stopping, failed

    def write(self, transition: Callable[..., T], job_id: str, *details: object) -> T:
        """One transition in one transaction. Waits for a database that does not respond, and for a minute for one that
        is full: a lease that lapses meanwhile fences the write. A commit whose outcome is unknown is repeated, so
        transitions are idempotent. Raises LeaseLost, and CancelRequested instead of waiting for space.
        """

        def written() -> T:
            try:
                with self._database.write() as connection:
                    return transition(connection, job_id, *details)
            except InsufficientStorage:
                if self._is_to_be_cancelled(job_id):  # which frees the space that others wait for
                    raise CancelRequested from None
                raise

        return self._retried(written)

    def read(self, read: Callable[[Connection], T]) -> T:
        """A read of one snapshot, which waits as `write` does."""

        def found() -> T:
            with self._database.read() as connection:
                return read(connection)

        return self._retried(found)

    def _retried(self, act: Callable[[], T]) -> T:
        full_until = time.monotonic() + _WAIT_FOR_SPACE

        def is_passing(error: Exception) -> bool:
            if isinstance(error, Unavailable):
                self._failed()
                return not self._is_stopping()
            return isinstance(error, InsufficientStorage) and time.monotonic() < full_until

        for attempt in stamina.retry_context(on=is_passing, attempts=None, timeout=None):
            with attempt:
                return act()
        raise AssertionError("stamina either returns or raises")

    def write_end(self, transition: Callable[..., None], job_id: str, *details: object) -> None:
        """The same for the end of an attempt, with its time."""

        def written(connection: Connection, job_id: str) -> None:
            transition(connection, job_id, *details, self._clock.moment(connection).wall)

        if transition is execution.cancel_if_mine:  # a deletion that frees space waits for it
            with suppress(InsufficientStorage):
                self._database.write_freeing(lambda connection: written(connection, job_id))
                return
        self.write(written, job_id)

    def _is_to_be_cancelled(self, job_id: str) -> bool:
        with self._database.read() as connection:
            return bool(execution.cancel_requests(connection, [job_id]))
