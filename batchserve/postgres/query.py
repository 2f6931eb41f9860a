"""The rows of a query: one SELECT, in a transaction that reads one state and changes nothing.

The extended protocol takes a single statement. That it is a SELECT, the server says: it has to be one that may stand in
another SELECT, from which its columns are known, too.
"""

from collections.abc import Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any

import polars as pl
import psycopg
from psycopg import Column as Described
from psycopg import IsolationLevel
from psycopg.types.string import TextLoader

from batchserve.errors import QueryRefused
from batchserve.postgres import Place
from batchserve.postgres.connection import connected, first_line, passing

__all__ = ["Rows", "columns_of_query", "rows_of_query"]

_MOST_ROWS = 50_000
_MOST_BYTES = 8 * 2**20
"""Of the texts, bytes and arrays in one frame."""
_AT_ONCE = 1000
"""Rows that the driver receives at a time."""
_CANCELLED, _READ_ONLY = "57014", "25006"
_SIMPLE: dict[int, pl.DataType] = {
    16: pl.Boolean(),
    17: pl.Binary(),
    18: pl.String(),  # "char"
    19: pl.String(),  # name
    20: pl.Int64(),
    21: pl.Int16(),
    23: pl.Int32(),
    25: pl.String(),
    26: pl.Int64(),  # oid
    114: pl.String(),  # json
    700: pl.Float32(),
    701: pl.Float64(),
    1042: pl.String(),  # character(n)
    1043: pl.String(),
    1082: pl.Date(),
    1083: pl.Time(),
    1114: pl.Datetime("us"),
    1184: pl.Datetime("us", "UTC"),
    2950: pl.String(),  # uuid
    3802: pl.String(),  # jsonb
}
_ARRAYS: dict[int, pl.DataType] = {
    1000: pl.Boolean(),
    1005: pl.Int16(),
    1007: pl.Int32(),
    1009: pl.String(),
    1015: pl.String(),
    1016: pl.Int64(),
    1021: pl.Float32(),
    1022: pl.Float64(),
}
"""The types of elements by the OID of their array."""
_NUMERIC = 1700
_AS_TEXT = ("json", "jsonb", "uuid")
_MOST_DIGITS = 38


@dataclass(frozen=True, slots=True)
class Rows:
    """The columns of a query, and its rows, frame by frame."""

    schema: dict[str, pl.DataType]
    frames: Iterator[pl.DataFrame]


def columns_of_query(place: Place, text: str, seconds: float) -> dict[str, pl.DataType]:
    """The columns of a query, which is not run. Raises as `rows_of_query` does."""
    with _reading(place, text, seconds) as (_, schema):
        return schema


@contextmanager
def rows_of_query(place: Place, text: str, seconds: float) -> Iterator[Rows]:
    """The rows of a query in the state that the database has now, in bounded memory. `seconds`: in which all are to be
    read.

    Raises QueryRefused for what is no SELECT, for columns whose types are not known, and when it takes too long;
    LocationRefused, and Unavailable when the server does not respond.
    """
    with _reading(place, text, seconds) as (connection, schema):
        frames = _frames(connection, _one_statement(text), schema)
        with closing(frames):  # it keeps others from the connection until then
            yield Rows(schema, frames)


@contextmanager
def _reading(
    place: Place, text: str, seconds: float
) -> Iterator[tuple[psycopg.Connection[Any], dict[str, pl.DataType]]]:
    """In a transaction that only reads, with the columns of the query."""
    what = f"the query in {place.name}"
    with connected(place, what) as connection:
        connection.isolation_level, connection.read_only = IsolationLevel.REPEATABLE_READ, True
        try:
            with connection.transaction():
                connection.execute(
                    "SELECT set_config('statement_timeout', %s, true), set_config('lock_timeout', '0', true)",
                    [str(max(1, round(1000 * seconds)))],
                )
                yield connection, _described(connection, _one_statement(text))
        except psycopg.Error as error:
            if error.sqlstate == _READ_ONLY:
                raise QueryRefused(f"{what} may change nothing: {first_line(error)}") from error
            if error.sqlstate == _CANCELLED:
                raise QueryRefused(
                    f"{what} was cancelled; it may take {seconds:g} s (BATCHSERVE_QUERY_TIMEOUT)"
                ) from error
            raise (passing(error, what) or QueryRefused(f"{what}: {first_line(error)}")) from error


def _one_statement(text: str) -> str:
    return text.rstrip().removesuffix(";")


def _described(connection: psycopg.Connection[Any], text: str) -> dict[str, pl.DataType]:
    # A line break, because the text may end with a comment. The format binary goes with the extended protocol.
    nested = f"SELECT * FROM (\n{text}\n) AS query LIMIT 0"  # noqa: S608 - it only reads, and the text is a query
    cursor = connection.execute(nested.encode(), binary=True)
    found = cursor.description or []
    if not found:
        raise QueryRefused("the query has no columns")
    schema: dict[str, pl.DataType] = {}
    for column in found:
        if column.name in schema:
            raise QueryRefused(f"the query has two columns {column.name!r}: name one of them otherwise, with AS")
        schema[column.name] = _type_of(column)
    return schema


def _type_of(column: Described) -> pl.DataType:
    """Raises QueryRefused for a type whose values no type of a table of inputs holds exactly."""
    name, oid = column.name, column.type_code
    if oid in _ARRAYS:
        return pl.List(_ARRAYS[oid])
    if oid == _NUMERIC:
        precision, scale = column.precision, column.scale
        if precision is not None and scale is not None and 0 <= scale <= precision <= _MOST_DIGITS:
            return pl.Decimal(precision, scale)
        hint = f"which may have any number of digits: write {name}::float8, ::bigint or ::numeric(20, 4)"
        raise QueryRefused(f"column {name!r} of the query is numeric, {hint}")
    if oid not in _SIMPLE:
        raise QueryRefused(
            f"column {name!r} of the query is {column.type_display}, which is not read: write {name}::text"
        )
    return _SIMPLE[oid]


def _frames(
    connection: psycopg.Connection[Any], text: str, schema: dict[str, pl.DataType]
) -> Generator[pl.DataFrame, None, None]:
    long = [place for place, kind in enumerate(schema.values()) if isinstance(kind, pl.String | pl.Binary | pl.List)]
    with connection.cursor() as cursor:
        for kind in _AS_TEXT:
            cursor.adapters.register_loader(kind, TextLoader)
        size = _AT_ONCE if psycopg.capabilities.has_stream_chunked() else 1
        rows = cursor.stream(text.encode(), size=size)
        assert isinstance(rows, Generator), "it keeps others from the connection until it is closed"
        with closing(rows):
            while taken := list(_taken(rows, long)):
                yield _frame(taken, schema)


def _taken(rows: Iterator[tuple[Any, ...]], long: Sequence[int]) -> Iterator[tuple[Any, ...]]:
    """The rows of one frame."""
    size = 0
    for row in islice(rows, _MOST_ROWS):
        yield row
        if long:
            size += sum(len(row[place]) for place in long if row[place] is not None)
            if size > _MOST_BYTES:
                return


def _frame(rows: Sequence[tuple[Any, ...]], schema: dict[str, pl.DataType]) -> pl.DataFrame:
    """Raises QueryRefused for a value that the type of its column does not hold, such as an array in an array."""
    columns = []
    for (name, kind), values in zip(schema.items(), zip(*rows, strict=True), strict=True):
        if isinstance(kind, pl.Decimal) and not all(value is None or value.is_finite() for value in values):
            raise QueryRefused(f"column {name!r} of the query has a value that is not read: NaN in a numeric")
        try:
            columns.append(pl.Series(name, values, dtype=kind, strict=True))
        except (TypeError, ValueError, OverflowError, pl.exceptions.PolarsError) as error:
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            raise QueryRefused(f"column {name!r} of the query has a value that is not read: {reason[:200]}") from error
    return pl.DataFrame(columns)
