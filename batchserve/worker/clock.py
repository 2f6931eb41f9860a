"""The worker's source of time; tests pass one that they advance by hand."""

import threading
import time
from queue import SimpleQueue
from typing import TypeVar

from sqlalchemy import Connection

from batchserve.db.connect import Database, Moment

__all__ = ["Clock"]

T = TypeVar("T")


class Clock:
    def __init__(self, database: Database) -> None:
        self._database = database

    def moment(self, connection: Connection) -> Moment:
        """Now, by the clocks that all users of the database share."""
        return self._database.moment(connection)

    def monotonic(self) -> float:
        """Seconds on a monotonic clock of this process."""
        return time.monotonic()

    def wait(self, event: threading.Event, seconds: float) -> bool:
        """Waits for an event for so many seconds; returns whether it was set."""
        return event.wait(seconds)

    def next_of(self, events: SimpleQueue[T], seconds: float) -> T:
        """Waits for the next of some events. Raises queue.Empty after so many seconds."""
        return events.get(timeout=max(seconds, 0.0))
