"""Prepared statements: those of hot paths, rendered once for each kind of database, and executed by its driver.
SQLAlchemy renders each execution anew and wraps its rows, which takes ten times as long as SQLite for the statement.
"""

import sqlite3
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sqlalchemy import Connection, Delete, Dialect, Insert, Select, Update
from sqlalchemy.types import TypeEngine

from batchserve.db.lasting import driver_of, execute

if TYPE_CHECKING:
    from batchserve.db.pipeline import Answer

__all__ = ["Prepared"]

Values = Mapping[str, Any]
_Convert = Callable[[Any], Any]


@dataclass(slots=True)
class _Text:
    """A statement as a database takes it."""

    sql: str
    parameters: tuple[tuple[str, _Convert | None], ...]
    """Name and conversion of each, in order."""
    fixed: Values
    """The parameters that are part of the statement."""
    columns: Mapping[str, TypeEngine[Any]]
    """Of the rows that it returns."""
    converted: tuple[tuple[str, _Convert], ...] | None = None
    """Those of the columns whose values are converted, known since the first execution."""

    def given(self, values: Values) -> list[Any]:
        """The parameters in order."""
        known = {**self.fixed, **values} if self.fixed else values
        return [known[name] if convert is None else convert(known[name]) for name, convert in self.parameters]

    def fetched(
        self, found: Iterable[Sequence[Any]], codes: Callable[[], Iterable[int | None]], dialect: Dialect
    ) -> list[dict[str, Any]]:
        """All rows, by the names of their columns. `codes`: the types of these, by which those of the driver differ."""
        if self.converted is None:
            converts = [
                (name, kind.result_processor(dialect, code))
                for (name, kind), code in zip(self.columns.items(), codes(), strict=True)
            ]
            self.converted = tuple((name, convert) for name, convert in converts if convert is not None)
        rows = [dict(zip(self.columns, values, strict=True)) for values in found]
        for name, convert in self.converted:
            for row in rows:
                row[name] = convert(row[name])
        return rows


class Prepared:
    """A statement of SQLAlchemy Core that is executed often. It is rendered again for each set of columns to which an
    insert or an update gives values, as by `Connection.execute`. Lists as parameters are not supported.
    """

    def __init__(self, statement: Select[*tuple[Any, ...]] | Insert | Update | Delete) -> None:
        self.statement = statement
        self._texts: dict[tuple[str, ...], _Text] = {}
        """By the dialect and the names of the given values."""

    def run(self, connection: Connection, values: Values) -> int:
        """Executes it; returns the number of changed rows."""
        text = self._text(connection, values)
        if connection.dialect.name == "sqlite":
            return self._embedded(connection, text, values).rowcount
        return self._served(connection, text, values).changed

    def send(self, connection: Connection, *several: Values) -> None:
        """Executes it for each of these values. A server is given it together with the next statement that has a
        result, or with the commit, which then raise its errors: for one that cannot fail but by a fault."""
        for values in several:
            text = self._text(connection, values)
            if connection.dialect.name == "sqlite":
                self._embedded(connection, text, values)
            else:
                from batchserve.db import server  # psycopg is an extra

                _require_begun(connection)
                server.put(connection, text.sql, text.given(values))

    def rows(self, connection: Connection, values: Values) -> Sequence[Mapping[Any, Any]]:
        """The rows that it returns, all fetched."""
        text, dialect = self._text(connection, values), connection.dialect
        if dialect.name == "sqlite":
            cursor = self._embedded(connection, text, values)
            return text.fetched(cursor.fetchall(), lambda: _codes(cursor), dialect)
        answer = self._served(connection, text, values)
        return text.fetched(answer.rows(), answer.codes, dialect)

    def row(self, connection: Connection, values: Values) -> Mapping[Any, Any] | None:
        """The only row, if there is one."""
        return next(iter(self.rows(connection, values)), None)

    def scalar(self, connection: Connection, values: Values) -> Any:
        """The first value of the only row; None without a row."""
        row = self.row(connection, values)
        return None if row is None else next(iter(row.values()))

    def _embedded(self, connection: Connection, text: _Text, values: Values) -> sqlite3.Cursor:
        driver = driver_of(connection)
        if not driver.in_transaction:
            connection.begin()
        return execute(connection, text.sql, text.given(values), driver)

    def _served(self, connection: Connection, text: _Text, values: Values) -> "Answer":
        from batchserve.db import server  # psycopg is an extra

        _require_begun(connection)
        return server.run(connection, text.sql, text.given(values))

    def _text(self, connection: Connection, values: Values) -> _Text:
        keys = connection.dialect.name, *values
        text = self._texts.get(keys)
        if text is None:
            text = self._texts[keys] = self._rendered(connection, tuple(values))
        return text

    def _rendered(self, connection: Connection, keys: tuple[str, ...]) -> _Text:
        statement, dialect = self.statement, connection.dialect
        changed = None
        if isinstance(statement, Insert | Update):
            changed = [key for key in keys if key in statement.table.c]
        compiled = statement.compile(dialect=_rendering(dialect), column_keys=changed)
        kinds = {name: bind.type.dialect_impl(dialect) for bind, name in compiled.bind_names.items()}
        fixed = {name: value for name, value in compiled.params.items() if name not in keys}
        returned = statement.selected_columns if isinstance(statement, Select) else statement.exported_columns
        columns = {column.key: column.type.dialect_impl(dialect) for column in returned if column.key is not None}
        return _Text(
            str(compiled),
            tuple((name, kinds[name].bind_processor(dialect)) for name in compiled.positiontup or ()),
            fixed,
            columns,
        )


def _require_begun(connection: Connection) -> None:
    if not connection.in_transaction():
        connection.begin()


def _rendering(dialect: Dialect) -> Dialect:
    """The dialect with parameters by their positions, as the drivers take them here."""
    if dialect.name == "sqlite":
        return dialect
    from sqlalchemy.dialects.postgresql import psycopg

    return psycopg.dialect(paramstyle="numeric_dollar")  # type: ignore[no-untyped-call]


def _codes(cursor: sqlite3.Cursor) -> list[None]:
    return [code for _, code, *_ in cursor.description or ()]
