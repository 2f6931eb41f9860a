"""The workers that are alive: each announces itself with its heartbeat, whether or not it has jobs."""

from dataclasses import dataclass

from sqlalchemy import Connection, and_, delete, func, insert, select, update
from sqlalchemy.sql import ColumnElement

from batchserve.db.connect import Moment
from batchserve.db.tables import workers
from batchserve.jobs.statements import changed

__all__ = ["Living", "announce", "forget_lost", "leave", "living"]

_KEPT = 3600.0
"""Seconds after which a worker that was lost is forgotten."""


@dataclass(frozen=True, slots=True)
class Living:
    workers: int
    processes: int
    """Their scoring processes for chunks."""


def announce(connection: Connection, name: str, processes: int, seconds: float, now: Moment) -> None:
    """The worker counts as alive for so many seconds."""
    values = {"processes": processes, "until": now.steady + seconds, "clock": now.clock}
    if not changed(connection, update(workers).where(workers.c.name == name).values(**values)):
        connection.execute(insert(workers).values(name=name, started_at=now.wall, **values))


def leave(connection: Connection, name: str) -> None:
    """The worker has stopped."""
    connection.execute(delete(workers).where(workers.c.name == name))


def living(connection: Connection, now: Moment) -> Living:
    row = connection.execute(select(func.count(), func.sum(workers.c.processes)).where(_is_alive(now))).one()
    return Living(int(row[0]), int(row[1] or 0))


def forget_lost(connection: Connection, now: Moment) -> None:
    """Forgets those that died long ago, or on another boot of the host."""
    lost = ~_is_alive(Moment(now.wall, now.steady - _KEPT, now.clock))
    # What another worker deletes at this moment is skipped, in place of a wait for each other.
    found = connection.scalars(select(workers.c.name).where(lost).with_for_update(skip_locked=True)).all()
    connection.execute(delete(workers).where(workers.c.name.in_(found)))


def _is_alive(now: Moment) -> ColumnElement[bool]:
    """A worker of another boot of the host has ended."""
    return and_(workers.c.until >= now.steady, workers.c.clock == now.clock)
