"""The time that a worker lives in: a test gives one that it advances by hand."""

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
        """Seconds on a clock of this process that nothing sets."""
        return time.monotonic()

    def wait(self, event: threading.Event, seconds: float) -> bool:
        """Waits for an event; whether it came within so many seconds."""
        return event.wait(seconds)

    def next_of(self, events: SimpleQueue[T], seconds: float) -> T:
        """Waits for the next of some events. Raises queue.Empty when none comes within so many seconds."""
        return events.get(timeout=max(seconds, 0.0))
