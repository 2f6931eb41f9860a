"""Pieces of work that wait for a transaction which they share: what the writers of SQLite and of a server have in
common."""

import asyncio
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from sqlalchemy import Connection

__all__ = ["Piece", "Transaction", "tell_all"]

Transaction = Callable[[Callable[[Connection], None]], None]
"""Runs a function in a transaction."""


@dataclass(eq=False, slots=True)
class Piece:
    """A piece of work, and its outcome."""

    work: Callable[[Connection], Any]
    done: "asyncio.Future[Any]"
    """Of the loop of its caller."""
    value: Any = None
    error: BaseException | None = None

    def tell(self) -> None:
        """For the loop of its caller."""
        if self.done.done():
            return  # its caller is gone
        if self.error is not None:
            self.done.set_exception(self.error)
        else:
            self.done.set_result(self.value)


def tell_all(pieces: Iterable[Piece]) -> None:
    """Tells the callers of the outcomes, from a thread."""
    for loop, its_pieces in groupby(pieces, key=lambda piece: piece.done.get_loop()):
        with suppress(RuntimeError):  # the loop has ended, and with it its callers
            loop.call_soon_threadsafe(_tell, list(its_pieces))


def _tell(pieces: list[Piece]) -> None:
    for piece in pieces:
        piece.tell()
