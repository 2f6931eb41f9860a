"""Connections to SQLite that stay open: to take one of a pool, and to give it back, takes longer than most reads."""

import sqlite3
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, TypeVar

from sqlalchemy import Connection, Engine
from sqlalchemy.exc import DBAPIError, SQLAlchemyError

__all__ = ["BEGIN", "Busy", "LastingConnection", "begin", "driver_of", "execute"]

T = TypeVar("T")

BEGIN = "batchserve_begin"
"""The option of a connection that names the statement by which its transactions begin."""


class Busy(Exception):
    """The connection has a transaction already."""


class LastingConnection:
    """A connection that is never given back to its pool, opened by its first transaction. It has one transaction at a
    time. What that queries must be fetched: a result that is not would keep its snapshot for all that follow."""

    def __init__(self, engine: Engine) -> None:
        self._engine, self._begin = engine, _begin(engine)
        self._used = threading.Lock()
        self._connection: Connection | None = None

    def run(self, work: Callable[[Connection], T]) -> T:
        """The value of `work`, in a transaction that is committed, or rolled back when it raises. Raises Busy while
        another one is in progress."""
        if not self._used.acquire(blocking=False):
            raise Busy
        try:
            connection = self._connection = self._connection or self._engine.connect()
            execute(connection, self._begin)
            try:
                value = work(connection)
                if connection.in_transaction():  # a statement went through SQLAlchemy, which has its own account of it
                    connection.commit()
                else:
                    execute(connection, "COMMIT")
            except BaseException:
                self._undo(connection)
                raise
            return value
        finally:
            self._used.release()

    def close(self) -> None:
        """Call it when no transaction is in progress."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _undo(self, connection: Connection) -> None:
        try:
            connection.rollback()
            driver_of(connection).rollback()
        except (sqlite3.Error, SQLAlchemyError):  # of no more use
            self._connection = None
            with suppress(sqlite3.Error, SQLAlchemyError):
                connection.invalidate()
                connection.close()


def driver_of(connection: Connection) -> sqlite3.Connection:
    driver: Any = connection.connection.dbapi_connection
    assert isinstance(driver, sqlite3.Connection)
    return driver


def begin(connection: Connection) -> None:
    """Begins a transaction by the statement that the options of the connection name."""
    execute(connection, _begin(connection))


def _begin(options: Connection | Engine) -> str:
    statement: str = options.get_execution_options().get(BEGIN, "BEGIN")
    return statement


def execute(
    connection: Connection, statement: str, values: Sequence[Any] = (), driver: sqlite3.Connection | None = None
) -> sqlite3.Cursor:
    """Executes a statement by the driver: through SQLAlchemy it would take longer than many reads. Raises what
    SQLAlchemy would raise."""
    try:
        return (driver or driver_of(connection)).execute(statement, values)
    except sqlite3.Error as error:
        raise DBAPIError.instance(statement, values, error, sqlite3.Error, dialect=connection.dialect) from error
