"""Group commit: pieces of work that wait for the writer share a transaction, and with it a sync of the disk.

A sync takes most of a small transaction. Each piece is a savepoint: one that fails is undone, and affects no other. All
are told of their outcomes after the commit.
"""

import asyncio
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from queue import Empty, SimpleQueue
from typing import TypeVar

from sqlalchemy import Connection

from batchserve.db.lasting import driver_of
from batchserve.db.pieces import Piece, Transaction, tell_all

__all__ = ["GROUP", "Writer"]

T = TypeVar("T")
Named = Callable[[], AbstractContextManager[None]]

GROUP = 128
"""Most pieces of work in a transaction."""


class Writer:
    """A thread that writes for an event loop, in SQLite. It starts with the first piece of work."""

    def __init__(self, transaction: Transaction, named: Named) -> None:
        """`transaction` runs a function in one. `named` gives the errors of statements their names."""
        self._transaction, self._named = transaction, named
        self._queue: SimpleQueue[Piece | None] = SimpleQueue()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    async def run(self, work: Callable[[Connection], T]) -> T:
        """The value of `work`, once it is committed durably. Raises what it raises, and what a commit raises. When its
        caller is cancelled, the work is done nevertheless."""
        piece = Piece(work, asyncio.get_running_loop().create_future())
        with self._lock:
            if self._thread is None:
                self._thread = threading.Thread(target=self._serve, name="writer", daemon=True)
                self._thread.start()
        self._queue.put(piece)
        value: T = await piece.done
        return value

    def close(self) -> None:
        """Waits until all that was given is written."""
        with self._lock:
            thread, self._thread = self._thread, None
        if thread is not None:
            self._queue.put(None)
            thread.join()

    def _serve(self) -> None:
        while (first := self._queue.get()) is not None:
            group, is_last = [first], False
            with suppress(Empty):
                while len(group) < GROUP and not is_last:
                    following = self._queue.get_nowait()
                    if following is None:
                        is_last = True
                    else:
                        group.append(following)
            self._write(group)
            if is_last:
                return

    def _write(self, group: list[Piece]) -> None:
        """Writes a group. If a failure undoes the work of others, too, each is written alone."""
        try:
            self._transaction(lambda connection: _do_all(connection, group, self._named))
        except _Undone:
            for piece in group:
                piece.error = None  # of what was undone
                self._write([piece])
            return
        except BaseException as error:  # noqa: BLE001 - the callers get it
            for piece in group:
                piece.error = piece.error or error
        tell_all(group)


class _Undone(Exception):
    """A failure has ended the transaction of a group before its commit."""


def _do_all(connection: Connection, group: list[Piece], named: Named) -> None:
    for piece in group:
        _do(connection, piece, named, is_alone=len(group) == 1)


def _do(connection: Connection, piece: Piece, named: Named, *, is_alone: bool) -> None:
    """Does a piece of work as a savepoint of a transaction."""
    if is_alone:
        piece.value = piece.work(connection)
        return
    driver = driver_of(connection)
    driver.execute("SAVEPOINT piece")
    try:
        with named():
            piece.value = piece.work(connection)
        driver.execute("RELEASE piece")
    except BaseException as error:
        if not driver.in_transaction:  # SQLite ends it for a full disk, say: nothing of the group was done
            raise _Undone from error
        driver.execute("ROLLBACK TO piece")
        driver.execute("RELEASE piece")
        piece.error = error
