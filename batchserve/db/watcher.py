"""Versions of the database, and probes of its rows: they say whether a value that was read earlier still holds."""

import sqlite3
import threading
from collections.abc import Callable, Hashable, Mapping
from functools import cached_property
from typing import Any, Protocol

from sqlalchemy import Select
from sqlalchemy.dialects import sqlite
from sqlalchemy.exc import OperationalError

__all__ = ["InlineWatcher", "Probe", "Version", "Watcher"]

Version = int | str


class Probe:
    """A query of a few short rows through an index, which takes microseconds: a cached value is valid while it finds
    the same (`Database.probe`)."""

    def __init__(self, query: Select[Any]) -> None:
        """`query`: its parameters are `bindparam`s."""
        compiled = query.compile(dialect=sqlite.dialect(paramstyle="named"))
        self._query, self.text, self.values = query, str(compiled), compiled.params

    @cached_property
    def server_text(self) -> str:
        """The query as psycopg takes it."""
        from sqlalchemy.dialects.postgresql import psycopg

        return str(self._query.compile(dialect=psycopg.dialect()))  # type: ignore[no-untyped-call]


class Watcher(Protocol):
    """See the methods of the same names in `Database`."""

    async def version(self) -> Version | None: ...

    async def probe(self, probe: Probe, values: Mapping[str, Any]) -> Hashable | None: ...

    def read_version(self) -> Version | None:
        """The version, for callers in any thread."""
        ...

    def close(self) -> None: ...


class InlineWatcher:
    """Asks SQLite, inline: it waits for no writer. Safe from any thread."""

    def __init__(self, connect: Callable[[], sqlite3.Connection]) -> None:
        """`connect` opens a connection, which the watcher closes."""
        self._connect = connect
        self._connection: sqlite3.Connection | None = None
        self._asking = threading.Lock()

    async def version(self) -> int | None:
        return self.read_version()

    async def probe(self, probe: Probe, values: Mapping[str, Any]) -> Hashable | None:
        return self._ask(probe.text, {**probe.values, **values})

    def read_version(self) -> int | None:
        # A version is valid on one connection only, and leaves out the commits of that connection.
        found = self._ask("PRAGMA data_version", {})
        return None if found is None else int(found[0][0])

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()

    def _ask(self, text: str, values: Mapping[str, Any]) -> tuple[Any, ...] | None:
        with self._asking:
            try:
                if self._connection is None:
                    self._connection = self._connect()
                # All rows: a query that has not ended would keep its snapshot.
                return tuple(self._connection.execute(text, values).fetchall())
            except (sqlite3.OperationalError, OperationalError):
                return None
