"""Joint commits on a server: pieces of work that come while others are written share the next transaction.

Each transaction costs a sync of the server's disk, a lock that all those with notifications wait for, and turns of the
threads of this process. One that fails is undone with all of its pieces, and each is then written alone: a failure is
rare, and to guard against it by a savepoint for each piece would cost every transaction.
"""

import asyncio
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor
from typing import TypeVar

from sqlalchemy import Connection

from batchserve.db.pieces import Piece, Transaction, tell_all
from batchserve.errors import Unavailable

__all__ = ["JointWriter"]

T = TypeVar("T")

_MOST = 16
"""Pieces of work in a transaction: each waits for all of them, and for the locks that they wait for."""
_AT_ONCE = 2
"""Transactions at a time: one that waits for a lock delays no other work."""


class JointWriter:
    """Writes for event loops, in threads."""

    def __init__(self, threads: Executor, transaction: Transaction, is_undone: Callable[[BaseException], bool]) -> None:
        """`transaction` runs a function in one, possibly several times until it is committed. `is_undone`: whether an
        error says that it was certainly not."""
        self._threads, self._transaction, self._is_undone = threads, transaction, is_undone
        self._lock = threading.Lock()
        self._waiting: deque[Piece] = deque()
        self._busy = 0

    async def run(self, work: Callable[[Connection], T], *, alone: bool = False) -> T:
        """The value of `work`, once it is committed durably. Raises what it raises, and what a commit raises. When its
        caller is cancelled, the work is done nevertheless. `alone`: it shares no transaction."""
        piece = Piece(work, asyncio.get_running_loop().create_future())
        if alone:
            self._write_alone(piece)
        else:
            self._put(piece)
        value: T = await piece.done
        return value

    def _put(self, piece: Piece) -> None:
        with self._lock:
            self._waiting.append(piece)
            is_room = self._busy < _AT_ONCE
            self._busy += is_room
        if is_room:
            self._threads.submit(self._serve)

    def _serve(self) -> None:
        while group := self._next():
            self._write(group)

    def _next(self) -> list[Piece]:
        with self._lock:
            group = [self._waiting.popleft() for _ in range(min(_MOST, len(self._waiting)))]
            self._busy -= not group
            return group

    def _write(self, group: list[Piece]) -> None:
        is_worked = False

        def work(connection: Connection) -> None:
            nonlocal is_worked
            is_worked = False
            for piece in group:
                piece.value = piece.work(connection)
            is_worked = True

        try:
            self._transaction(work)
        except BaseException as error:  # noqa: BLE001 - the callers get it
            is_of_a_piece = not is_worked and not isinstance(error, Unavailable)
            if len(group) > 1 and (is_of_a_piece or self._is_undone(error)):
                for piece in group:
                    self._write_alone(piece)
                return
            for piece in group:  # the server is away, say, or it is unknown whether the commit has happened
                piece.error = error
        tell_all(group)

    def _write_alone(self, piece: Piece) -> None:
        try:
            self._threads.submit(self._write, [piece])  # one that waits for a lock delays no other
        except RuntimeError:  # they end
            self._write([piece])
