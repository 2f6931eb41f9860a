"""Stops processes where others can go on."""

import signal
import sqlite3
import time
from contextlib import closing, suppress

from commands import Service
from sqlalchemy import make_url, text

from batchserve.db.connect import Database

__all__ = ["pause"]


def pause(service: Service, database_url: str) -> None:
    """Stops a process between two transactions: one that is stopped inside of one keeps its locks.

    See docs/promises.md, "Not promised".
    """
    in_transaction = _holds_the_lock if database_url.startswith("sqlite") else _is_in_a_transaction
    while True:
        service.process.send_signal(signal.SIGSTOP)
        if not in_transaction(database_url):
            return
        service.process.send_signal(signal.SIGCONT)
        time.sleep(0.02)


def _holds_the_lock(database_url: str) -> bool:
    """Whether some process does."""
    opened = sqlite3.connect(make_url(database_url).database or "", timeout=0.1, isolation_level=None)
    with closing(opened) as connection, suppress(sqlite3.OperationalError):
        connection.execute("BEGIN IMMEDIATE").close()
        connection.execute("ROLLBACK").close()
        return False
    return True


def _is_in_a_transaction(database_url: str) -> bool:
    """Whether some process is."""
    ours = "datname = current_database() AND pid <> pg_backend_pid()"
    query = text(f"SELECT 1 FROM pg_stat_activity WHERE {ours} AND state <> 'idle' LIMIT 1")  # noqa: S608
    time.sleep(0.05)  # for a statement that is on its way
    with closing(Database(database_url)) as database, database.look() as connection:
        return connection.scalar(query) is not None
