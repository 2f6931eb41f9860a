"""Durable transitions of jobs: each in one transaction, retried while the database is unavailable."""

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


class CancelRequested(Exception):
    """The job of a write that waits for space is to be cancelled."""


class Transitions:
    def __init__(self, database: Database, clock: Clock) -> None:
        self._database, self._clock = database, clock

    def write(self, transition: Callable[..., T], job_id: str, *details: object) -> T:
        """One transition in one transaction. Waits for a database that is unavailable, locked or full: a lease that
        lapses meanwhile fences the write. Raises LeaseLost, and CancelRequested instead of waiting for space."""
        for attempt in stamina.retry_context(on=(Unavailable, InsufficientStorage), attempts=None, timeout=60.0):
            with attempt:
                try:
                    with self._database.write() as connection:
                        return transition(connection, job_id, *details)
                except InsufficientStorage:
                    if self._is_to_be_cancelled(job_id):  # which frees the space that others wait for
                        raise CancelRequested from None
                    raise
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
