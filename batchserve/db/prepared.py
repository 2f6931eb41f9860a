"""Prepared statements: those of hot paths, rendered once. SQLAlchemy renders each execution anew and wraps its rows,
which takes ten times as long as SQLite takes for the statement. Other databases are reached through SQLAlchemy alone.
"""

import sqlite3
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, Delete, Insert, Select, Update
from sqlalchemy.exc import DBAPIError

from batchserve.db.lasting import driver_of

__all__ = ["Prepared"]

Values = Mapping[str, Any]
_Convert = Callable[[Any], Any]


@dataclass(frozen=True, slots=True)
class _Text:
    """A statement as SQLite takes it."""

    sql: str
    parameters: tuple[tuple[str, _Convert | None], ...]
    """Name and conversion of each, in order."""
    fixed: Values
    """The parameters that are part of the statement."""
    columns: tuple[tuple[str, _Convert | None], ...]
    """Of the rows that it returns."""

    def given(self, values: Values) -> list[Any]:
        known = {**self.fixed, **values} if self.fixed else values
        return [known[name] if convert is None else convert(known[name]) for name, convert in self.parameters]

    def row(self, found: Sequence[Any]) -> dict[str, Any]:
        return {
            name: value if convert is None else convert(value)
            for (name, convert), value in zip(self.columns, found, strict=True)
        }


class Prepared:
    """A statement of SQLAlchemy Core that is executed often. It is rendered again for each set of columns to which an
    insert or an update gives values, as by `Connection.execute`. Lists as parameters are not supported.
    """

    def __init__(self, statement: Select[Any] | Insert | Update | Delete) -> None:
        self.statement = statement
        self._texts: dict[tuple[str, ...], _Text] = {}

    def run(self, connection: Connection, values: Values) -> int:
        """Executes it; returns the number of changed rows."""
        if connection.dialect.name != "sqlite":
            return connection.execute(self.statement, values).rowcount
        return self._execute(connection, self._text(connection, values), values).rowcount

    def run_many(self, connection: Connection, several: Iterable[Values]) -> None:
        for values in several:
            self.run(connection, values)

    def rows(self, connection: Connection, values: Values) -> Sequence[Mapping[Any, Any]]:
        """The rows that it returns, all fetched."""
        if connection.dialect.name != "sqlite":
            return connection.execute(self.statement, values).mappings().all()
        text = self._text(connection, values)
        return [text.row(found) for found in self._execute(connection, text, values).fetchall()]

    def row(self, connection: Connection, values: Values) -> Mapping[Any, Any] | None:
        """The only row, if there is one."""
        return next(iter(self.rows(connection, values)), None)

    def scalar(self, connection: Connection, values: Values) -> Any:
        """The first value of the only row; None without a row."""
        row = self.row(connection, values)
        return None if row is None else next(iter(row.values()))

    def _execute(self, connection: Connection, text: _Text, values: Values) -> sqlite3.Cursor:
        driver = driver_of(connection)
        if not driver.in_transaction:
            connection.begin()
        given = text.given(values)
        try:
            return driver.execute(text.sql, given)
        except sqlite3.Error as error:
            raise DBAPIError.instance(
                text.sql, given, error, sqlite3.Error, dialect=connection.dialect
            ) from error  # named as by SQLAlchemy

    def _text(self, connection: Connection, values: Values) -> _Text:
        keys = tuple(values)
        text = self._texts.get(keys)
        if text is None:
            text = self._texts[keys] = self._rendered(connection, keys)
        return text

    def _rendered(self, connection: Connection, keys: tuple[str, ...]) -> _Text:
        statement, dialect = self.statement, connection.dialect
        columns = None
        if isinstance(statement, Insert | Update):
            columns = [key for key in keys if key in statement.table.c]
        compiled = statement.compile(dialect=dialect, column_keys=columns)
        kinds = {name: bind.type.dialect_impl(dialect) for bind, name in compiled.bind_names.items()}
        fixed = {name: value for name, value in compiled.params.items() if name not in keys}
        returned = statement.selected_columns if isinstance(statement, Select) else statement.exported_columns
        return _Text(
            str(compiled),
            tuple((name, kinds[name].bind_processor(dialect)) for name in compiled.positiontup or ()),
            fixed,
            tuple(
                (column.key, column.type.dialect_impl(dialect).result_processor(dialect, None))
                for column in returned
                if column.key is not None
            ),
        )
