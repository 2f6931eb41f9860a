"""Prepared statements: those of hot paths, rendered once. SQLAlchemy renders each execution anew and wraps its rows,
which takes ten times as long as SQLite takes for the statement. Other databases are reached through SQLAlchemy alone.
"""

import sqlite3
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, Delete, Insert, Select, Update

from batchserve.db.lasting import driver_of, execute

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
    columns: tuple[str, ...]
    """Of the rows that it returns."""
    converted: tuple[tuple[str, _Convert], ...]
    """Those of the columns whose values are converted."""

    def given(self, values: Values) -> list[Any]:
        known = {**self.fixed, **values} if self.fixed else values
        return [known[name] if convert is None else convert(known[name]) for name, convert in self.parameters]

    def row(self, found: Sequence[Any]) -> dict[str, Any]:
        row = dict(zip(self.columns, found, strict=True))
        for name, convert in self.converted:
            row[name] = convert(row[name])
        return row


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
        return execute(connection, text.sql, text.given(values), driver)

    def _text(self, connection: Connection, values: Values) -> _Text:
        keys = tuple(values)
        text = self._texts.get(keys)
        if text is None:
            text = self._texts[keys] = self._rendered(connection, keys)
        return text

    def _rendered(self, connection: Connection, keys: tuple[str, ...]) -> _Text:
        statement, dialect = self.statement, connection.dialect
        changed = None
        if isinstance(statement, Insert | Update):
            changed = [key for key in keys if key in statement.table.c]
        compiled = statement.compile(dialect=dialect, column_keys=changed)
        kinds = {name: bind.type.dialect_impl(dialect) for bind, name in compiled.bind_names.items()}
        fixed = {name: value for name, value in compiled.params.items() if name not in keys}
        returned = statement.selected_columns if isinstance(statement, Select) else statement.exported_columns
        columns = {
            column.key: column.type.dialect_impl(dialect).result_processor(dialect, None)
            for column in returned
            if column.key is not None
        }
        return _Text(
            str(compiled),
            tuple((name, kinds[name].bind_processor(dialect)) for name in compiled.positiontup or ()),
            fixed,
            tuple(columns),
            tuple((name, convert) for name, convert in columns.items() if convert is not None),
        )
