"""Deletion holds: while one is active, referenced objects are not deleted, so that a backup can copy them.

A deletion updates the row first, and then checks for a hold: in the snapshot that shows that no row references the
object, or later. So an object that is deleted despite a hold was unreferenced before the hold began. Objects that a
hold has kept are swept after it.
"""

import secrets
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from sqlalchemy import Connection, and_, delete, exists, insert, select, update
from sqlalchemy.sql import ColumnElement

from batchserve.db.connect import Database, Moment
from batchserve.db.tables import holds
from batchserve.errors import Unavailable

LAPSE = 60.0
"""Seconds after which an unrenewed hold lapses: its holder died."""
_RENEWAL = 10.0


@contextmanager
def held(database: Database, lapse: float = LAPSE) -> Iterator[None]:
    """Keeps every object that is referenced at the start of the block until its end. Raises Unavailable at the end when
    the hold lapsed in between.
    """
    name = secrets.token_hex(16)
    with database.write() as connection:
        place(connection, name, lapse, database.moment(connection))
    ended = threading.Event()
    renewing = threading.Thread(target=_keep, args=(database, name, lapse, ended), name="hold", daemon=True)
    renewing.start()
    try:
        yield
        _renew(database, name, lapse)
    finally:
        ended.set()
        renewing.join()
        with database.write() as connection:
            connection.execute(delete(holds).where(holds.c.name == name))


def place(connection: Connection, name: str, seconds: float, now: Moment) -> None:
    """Begins a hold that lapses after `seconds` unless it is renewed. Deletes lapsed ones."""
    connection.execute(delete(holds).where(~_in_force(now)))
    connection.execute(insert(holds).values(name=name, until=now.steady + seconds, clock=now.clock))


def renew_if_in_force(connection: Connection, name: str, seconds: float, now: Moment) -> bool:
    """False when it has lapsed: bytes may have been removed since."""
    renewed = update(holds).where(holds.c.name == name, _in_force(now)).values(until=now.steady + seconds)
    return bool(connection.execute(renewed).rowcount)


def any_in_force(connection: Connection, now: Moment) -> bool:
    return bool(connection.scalar(select(exists().where(_in_force(now)))))


def _in_force(now: Moment) -> ColumnElement[bool]:
    """A hold of another boot of the host has always lapsed."""
    return and_(holds.c.until >= now.steady, holds.c.clock == now.clock)


def _keep(database: Database, name: str, lapse: float, ended: threading.Event) -> None:
    while not ended.wait(min(_RENEWAL, lapse / 4)):
        try:
            _renew(database, name, lapse)
        except Unavailable:  # busy for now; the end of the block checks whether it was too long
            continue


def _renew(database: Database, name: str, lapse: float) -> None:
    with database.write() as connection:
        if not renew_if_in_force(connection, name, lapse, database.moment(connection)):
            raise Unavailable(f"this process was stopped for more than {lapse:g} s: start again")
