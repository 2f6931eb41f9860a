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

__all__ = ["Transitions"]

T = TypeVar("T")


class Transitions:
    def __init__(self, database: Database, clock: Clock) -> None:
        self._database, self._clock = database, clock

    def write(self, transition: Callable[..., T], *details: object) -> T:
        """One transition in one transaction. Waits for a database that is unavailable or locked: a lease that lapses
        meanwhile fences the write. Raises LeaseLost."""
        for attempt in stamina.retry_context(on=(Unavailable, InsufficientStorage), attempts=None, timeout=60.0):
            with attempt, self._database.write() as connection:
                return transition(connection, *details)
        raise AssertionError("stamina either returns or raises")

    def write_end(self, transition: Callable[..., None], *details: object) -> None:
        """The same for the end of an attempt, with its time."""

        def written(connection: Connection) -> None:
            transition(connection, *details, self._clock.moment(connection).wall)

        if transition is execution.cancel_if_mine:  # a deletion that frees space waits for it
            with suppress(InsufficientStorage):
                self._database.write_freeing(written)
                return
        self.write(written)
