"""Connections to SQLite that stay open: to take one of a pool, and to give it back, takes longer than most reads."""

import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from sqlalchemy import Connection, Engine
from sqlalchemy.exc import DBAPIError, OperationalError, SQLAlchemyError

__all__ = ["LastingConnection", "driver_of", "execute"]


class LastingConnection:
    """A connection outside the pool's count, opened by its first transaction. It has one transaction at a time."""

    def __init__(self, engine: Engine, begin: str) -> None:
        """`begin`: the statement that begins its transactions."""
        self._engine, self._begin = engine, begin
        self._used = threading.Lock()
        self._connection: Connection | None = None

    @contextmanager
    def transaction(self) -> Iterator[Connection | None]:
        """Committed when the block ends, rolled back by an exception. None while the connection is in use."""
        if not self._used.acquire(blocking=False):
            yield None
            return
        try:
            if self._connection is None:
                self._connection = self._engine.connect()
            driver = driver_of(self._connection)
            execute(driver, self._begin)
            try:
                yield self._connection
                self._end(self._connection, driver)
            except BaseException:
                self._undo(self._connection, driver)
                raise
        finally:
            self._used.release()

    def close(self) -> None:
        """Call it when no transaction is in progress."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _end(self, connection: Connection, driver: sqlite3.Connection) -> None:
        if connection.in_transaction():  # a statement went through SQLAlchemy, which has its own account of it
            connection.commit()
        else:
            execute(driver, "COMMIT")

    def _undo(self, connection: Connection, driver: sqlite3.Connection) -> None:
        try:
            connection.rollback()
            if driver.in_transaction:
                driver.rollback()
        except (sqlite3.Error, SQLAlchemyError):  # of no more use
            self._connection = None
            with suppress(sqlite3.Error, SQLAlchemyError):
                connection.invalidate()
                connection.close()


def driver_of(connection: Connection) -> sqlite3.Connection:
    driver = connection.connection.driver_connection
    assert isinstance(driver, sqlite3.Connection)
    return driver


def execute(driver: sqlite3.Connection, statement: str) -> None:
    """Executes a statement without results by the driver: through SQLAlchemy it would take longer than many reads.
    Raises OperationalError, as SQLAlchemy does."""
    try:
        driver.execute(statement).close()
    except sqlite3.Error as error:
        raise _named(statement, error) from error


def _named(statement: str, error: sqlite3.Error) -> DBAPIError:
    kind = OperationalError if isinstance(error, sqlite3.OperationalError) else DBAPIError
    return kind(statement, None, error)
