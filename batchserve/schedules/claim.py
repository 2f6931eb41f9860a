"""A tick in the hands of one process, and what it is handed to."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from sqlalchemy import Connection

from batchserve.db.connect import Database
from batchserve.errors import BatchserveError
from batchserve.recurring import ActionKind, Tick, TickState
from batchserve.timetable import ticks
from batchserve.worker.clock import Clock

__all__ = ["Action", "Actions", "Claim", "is_passing", "reason"]

_PASSING = frozenset({429, 503, 507})
"""Statuses of errors that pass: a full quota or disk, an outage."""


class Claim:
    """A tick that this process has claimed, and ends. Every method raises LeaseLost when another process has claimed or
    ended it meanwhile: then the transaction is undone."""

    def __init__(self, database: Database, clock: Clock, tick: Tick, seconds: float) -> None:
        """`seconds`: after which another process may claim it."""
        self.tick = tick
        self.state: TickState | None = None
        """In which state it was ended here."""
        self.error: Mapping[str, Any] | None = None
        self._database, self._clock, self._seconds = database, clock, seconds

    def note(self, connection: Connection, job_ids: Sequence[str]) -> None:
        """Adds jobs that this transaction queues; more may follow."""
        until = self._clock.moment(connection).wall + self._seconds
        ticks.note_jobs_if_mine(connection, self.tick, job_ids, until)

    def queued(self, connection: Connection, job_ids: Sequence[str]) -> None:
        """Ends it, with the last of its jobs, which this transaction queues."""
        self._end(connection, TickState.QUEUED, job_ids, None)

    def end(self, state: TickState, error: Mapping[str, Any] | None = None) -> None:
        """Ends it in a transaction of its own."""
        with self._database.write() as connection:
            self._end(connection, state, (), error)

    def postpone(self, seconds: float, error: Mapping[str, Any]) -> None:
        """Gives it back, to be tried again after so many seconds."""
        with self._database.write() as connection:
            until = self._clock.moment(connection).wall + seconds
            ticks.postpone_if_mine(connection, self.tick, until, error)

    def _end(
        self, connection: Connection, state: TickState, job_ids: Sequence[str], error: Mapping[str, Any] | None
    ) -> None:
        now = self._clock.moment(connection).wall
        ticks.end_if_mine(connection, self.tick, state, now, job_ids=job_ids, error=error)
        self.state, self.error = state, error


class Action(Protocol):
    """What a tick does."""

    def check(self, tenant: str, request: Mapping[str, Any]) -> None:
        """Raises what is wrong with a request, as far as that is known before its tick: a ValidationError of pydantic,
        or a BatchserveError."""
        ...

    def run(self, tenant: str, request: Mapping[str, Any], claim: Claim) -> None:
        """Queues jobs, and ends the tick. Raises the same, and LeaseLost."""
        ...


Actions = Mapping[ActionKind, Action]


def reason(code: str, message: str) -> dict[str, Any]:
    """Why a tick does not run, or not yet, as its row has it."""
    return {"code": code, "message": message}


def is_passing(error: BatchserveError) -> bool:
    """Whether a tick is tried again after it."""
    return error.status in _PASSING
