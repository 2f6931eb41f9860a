"""A worker that a test controls step by step: time passes, and calls end, when the test says so."""

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

from sqlalchemy import Connection

from batchserve.db.connect import Database, Moment
from batchserve.scoring.chunks import ChunkTask
from batchserve.worker.clock import Clock

T = TypeVar("T")


class HandClock(Clock):
    """A clock that advances only by waits, by their length and without delay."""

    def __init__(self, database: Database) -> None:
        super().__init__(database)
        self.passed = 0.0

    def advance(self, seconds: float) -> None:
        self.passed += seconds

    def moment(self, connection: Connection) -> Moment:
        now = super().moment(connection)
        return Moment(now.wall + self.passed, now.steady + self.passed, now.clock)

    def monotonic(self) -> float:
        return self.passed

    def wait(self, event: threading.Event, seconds: float) -> bool:
        if not event.is_set():
            self.advance(seconds)
        return event.is_set()

    def next_of(self, events: SimpleQueue[T], seconds: float) -> T:
        try:
            return events.get_nowait()
        except Empty:
            self.advance(max(seconds, 0.0))
            raise


@dataclass(eq=False)
class HandCall:
    """A call that runs in this process when a test runs it."""

    function: Callable[..., Any]
    args: tuple[Any, ...]
    urgent: bool
    future: Future[Any] = field(default_factory=Future)
    seconds: float | None = None

    def run(self) -> None:
        try:
            self.future.set_result(self.function(*self.args))
        except Exception as error:  # noqa: BLE001 - handed on, as every engine does
            self.future.set_exception(error)

    def fail(self, error: Exception) -> None:
        self.future.set_exception(error)

    def kill(self) -> None:
        self.future.cancel()

    @property
    def first_record(self) -> int | None:
        """Of the chunk that it scores."""
        task = self.args[0] if self.args else None
        return task.chunk.first_record if isinstance(task, ChunkTask) else None


class HandEngine:
    """Keeps calls until a test runs them."""

    def __init__(self, capacity: int = 2) -> None:
        self.capacity = capacity
        self.submitted: deque[HandCall] = deque()

    def submit(self, function: Callable[..., Any], *args: Any, timeout: float, urgent: bool = False) -> HandCall:  # noqa: ARG002
        call = HandCall(function, args, urgent)
        self.submitted.append(call)
        return call

    def start(self) -> None:
        """There is nothing to prepare."""

    def close(self) -> None:
        """There is nothing to end."""

    def take(self) -> list[HandCall]:
        """Takes the calls in progress, in the order of their submission; from then on the test controls them."""
        taken = [call for call in self.submitted if not call.future.cancelled()]
        self.submitted.clear()
        return taken
