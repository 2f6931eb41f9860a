"""Columns of tables: which values they hold exactly, and how these are copied into them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import polars as pl
import psycopg
from psycopg import sql

from batchserve.errors import TableMismatch

__all__ = ["Column", "columns_of", "identifiers", "made_for", "require_fit", "texts_of"]

_LONGEST_NAME = 63
"""Bytes of a name; PostgreSQL cuts longer ones."""
_COLUMNS = """
    SELECT
        a.attname, format_type(a.atttypid, a.atttypmod), coalesce(e.typname, t.typname), a.atttypmod, e.oid IS NOT NULL,
        a.attnotnull AND NOT a.atthasdef AND a.attidentity = '', a.attgenerated <> '' OR a.attidentity = 'a'
    FROM pg_catalog.pg_attribute AS a
    JOIN pg_catalog.pg_type AS t ON t.oid = a.atttypid
    LEFT JOIN pg_catalog.pg_type AS e ON e.oid = t.typelem AND t.typcategory = 'A'
    WHERE a.attrelid = %s AND a.attnum > 0 AND NOT a.attisdropped
    ORDER BY a.attnum
"""
_INTEGERS = frozenset({"int2", "int4", "int8", "numeric"})
"""An integer out of range is an error of the server."""
_FITTING: Mapping[type[pl.DataType], frozenset[str]] = {
    pl.Boolean: frozenset({"bool"}),
    pl.Int8: _INTEGERS | {"float4", "float8"},
    pl.Int16: _INTEGERS | {"float4", "float8"},
    pl.Int32: _INTEGERS | {"float8"},
    pl.Int64: _INTEGERS,
    pl.UInt8: _INTEGERS | {"float4", "float8"},
    pl.UInt16: _INTEGERS | {"float4", "float8"},
    pl.UInt32: _INTEGERS | {"float8"},
    pl.UInt64: _INTEGERS,
    pl.Float16: frozenset({"float4", "float8"}),
    pl.Float32: frozenset({"float4", "float8"}),
    pl.Float64: frozenset({"float8"}),
    pl.Decimal: frozenset({"numeric"}),
    pl.String: frozenset({"text", "varchar", "uuid", "json"}),
    pl.Binary: frozenset({"bytea"}),
    pl.Date: frozenset({"date"}),
    pl.Time: frozenset({"time"}),
}
"""The types that hold every value of another exactly, or refuse it."""
_NEW: Mapping[type[pl.DataType], str] = {
    pl.Boolean: "boolean",
    pl.Int8: "smallint",
    pl.Int16: "smallint",
    pl.Int32: "integer",
    pl.Int64: "bigint",
    pl.UInt8: "smallint",
    pl.UInt16: "integer",
    pl.UInt32: "bigint",
    pl.UInt64: "numeric",
    pl.Float16: "real",
    pl.Float32: "real",
    pl.Float64: "double precision",
    pl.Decimal: "numeric",
    pl.String: "text",
    pl.Binary: "bytea",
    pl.Date: "date",
    pl.Time: "time without time zone",
    pl.Null: "text",
}
"""Of the columns of a new table."""
_IN_ARRAYS = frozenset({pl.Boolean, pl.String, *(kind for kind in _FITTING if kind.is_numeric())} - {pl.Decimal})
_NANOSECONDS = 1000


@dataclass(frozen=True, slots=True)
class Column:
    """A column of a table. `kind`: the name of its type in the catalog; of an array, of the type of its elements."""

    name: str
    type: str
    kind: str
    modifier: int = -1
    """Such as the length of a text; -1: none."""
    is_array: bool = False
    is_required: bool = False
    """Whether a row must have a value for it."""
    is_computed: bool = False
    """Whether the database alone gives its values."""


def columns_of(connection: psycopg.Connection[Any], table: int) -> list[Column]:
    """`table`: its OID."""
    return [Column(*row) for row in connection.execute(_COLUMNS, [table]).fetchall()]


def made_for(schema: Mapping[str, pl.DataType], what: str) -> list[Column]:
    """The columns of a new table for the rows of a result. Raises TableMismatch."""
    made = []
    for name, kind in schema.items():
        if not name or len(name.encode()) > _LONGEST_NAME:
            raise TableMismatch(f"{what}: {name!r} cannot name a column; expected 1 to {_LONGEST_NAME} bytes")
        inner = _element(kind)
        type_ = _new_type(kind if inner is None else inner)
        if type_ is None:
            raise _unfit(what, name, kind, "no type of PostgreSQL that holds it")
        made.append(Column(name, type_ if inner is None else f"{type_}[]", type_, is_array=inner is not None))
    return made


def _new_type(kind: pl.DataType) -> str | None:
    match kind:
        case pl.Datetime():
            return f"timestamp {'without' if kind.time_zone is None else 'with'} time zone"
        case pl.Decimal():
            return f"numeric({kind.precision or 38},{kind.scale})"
    return _NEW.get(type(kind))


def require_fit(columns: Sequence[Column], schema: Mapping[str, pl.DataType], what: str) -> list[Column]:
    """The columns of a table that the rows of a result fill, in their order. Raises TableMismatch, which names those
    that are missing, those that the table requires, and those of another type."""
    known = {column.name: column for column in columns}
    if extra := [name for name in schema if name not in known]:
        has = ", ".join(map(repr, known)) or "none"
        raise TableMismatch(f"{what} has no column {', '.join(map(repr, extra))}, which the result has; it has {has}")
    if computed := [name for name in schema if known[name].is_computed]:
        raise TableMismatch(f"{what}: the database alone gives the values of {', '.join(map(repr, computed))}")
    if lacking := [column.name for column in columns if column.is_required and column.name not in schema]:
        raise TableMismatch(f"{what} requires a value for {', '.join(map(repr, lacking))}, and the result has none")
    for name, kind in schema.items():
        _require_type(known[name], kind, what)
    return [known[name] for name in schema]


def _require_type(column: Column, kind: pl.DataType, what: str) -> None:
    if isinstance(kind, pl.Null):
        return
    inner = _element(kind)
    if (inner is not None) != column.is_array or not _fits(kind if inner is None else inner, column):
        raise _unfit(what, column.name, kind, f"{column.type}, which does not hold all of its values exactly")


def _fits(kind: pl.DataType, column: Column) -> bool:
    match kind:
        case pl.Datetime():
            # A modifier is a number of digits below those that are kept.
            return column.kind == ("timestamp" if kind.time_zone is None else "timestamptz") and column.modifier < 0
        case pl.Decimal():
            return column.kind == "numeric" and (column.modifier < 0 or _scale(column) >= kind.scale)
        case pl.Time():
            return column.kind == "time" and column.modifier < 0
    if column.kind == "numeric" and column.modifier >= 0 and _scale(column) < 0:
        return False
    return column.kind in _FITTING.get(type(kind), ())


def _scale(column: Column) -> int:
    """Digits after the point of a numeric type, which may be negative: a field of eleven bits."""
    scale = (column.modifier - 4) & 0x7FF
    return scale - 0x800 if scale & 0x400 else scale


def _element(kind: pl.DataType) -> pl.DataType | None:
    """The type of the elements of a list; None for what is no list, or one of what no array holds."""
    if not isinstance(kind, pl.List | pl.Array):
        return None
    inner = kind.inner if isinstance(kind.inner, pl.DataType) else kind.inner()
    return inner if type(inner) in _IN_ARRAYS else None


def _unfit(what: str, name: str, kind: pl.DataType, found: str) -> TableMismatch:
    return TableMismatch(f"{what}: column {name!r} of the result is {kind}; found {found}")


# --- values ----------------------------------------------------------------------------------------------------------


def texts_of(frame: pl.DataFrame, columns: Sequence[Column], what: str) -> pl.DataFrame:
    """The rows as COPY takes them in the format CSV. Raises TableMismatch for a value that a column cannot hold."""
    return frame.select([_texts(frame[column.name], column, what) for column in columns])


def _texts(values: pl.Series, column: Column, what: str) -> pl.Series:
    kind = values.dtype
    if isinstance(kind, pl.List | pl.Array):
        return _arrays(values, column, what)
    match kind:
        case pl.String():
            _require_texts(values, column, what)
        case pl.Binary():
            shown = pl.concat_str(pl.lit("\\x"), pl.col(values.name).bin.encode("hex"))
            return values.to_frame().select(shown.alias(values.name)).to_series()
        case pl.Datetime():
            return _microseconds(values, what).dt.strftime(_MOMENT if kind.time_zone is None else f"{_MOMENT}+00")
        case pl.Time():
            if (values.cast(pl.Int64) % _NANOSECONDS != 0).any():
                raise _too_precise(values, what)
        case pl.Float16():
            return values.cast(pl.Float32)
        case pl.Float32() if column.kind == "float8":
            return values.cast(pl.Float64)  # the same number: the shortest text of a float32 is that of another float64
    return values


_MOMENT = "%Y-%m-%d %H:%M:%S%.6f"


def _microseconds(values: pl.Series, what: str) -> pl.Series:
    """In UTC, if it has a time zone."""
    kind = values.dtype
    assert isinstance(kind, pl.Datetime)
    if kind.time_zone is not None:
        values = values.dt.convert_time_zone("UTC")
    if kind.time_unit == "ns" and (values.cast(pl.Int64) % _NANOSECONDS != 0).any():
        raise _too_precise(values, what)
    return values.dt.cast_time_unit("us")


def _too_precise(values: pl.Series, what: str) -> TableMismatch:
    return TableMismatch(
        f"{what}: column {values.name!r} has times below a microsecond, which PostgreSQL does not keep"
    )


def _require_texts(values: pl.Series, column: Column, what: str) -> None:
    if values.str.contains("\0", literal=True).any():
        raise TableMismatch(f"{what}: column {values.name!r} has a text with the character NUL, which PostgreSQL lacks")
    longest = column.modifier - 4
    if column.kind == "varchar" and column.modifier >= 0 and (values.str.len_chars() > longest).any():
        raise TableMismatch(
            f"{what}: column {values.name!r} has a text longer than the {longest} characters of its type"
        )


def _arrays(values: pl.Series, column: Column, what: str) -> pl.Series:
    """As array literals."""
    kind, name = values.dtype, values.name
    if isinstance(kind, pl.Array):
        values = values.arr.to_list()
    inner = _element(kind)
    element = pl.element()
    if isinstance(inner, pl.String):
        _require_texts(values.explode(), column, what)
        escaped = element.str.replace_all("\\", "\\\\", literal=True).str.replace_all('"', '\\"', literal=True)
        shown = pl.concat_str(pl.lit('"'), escaped, pl.lit('"'))
    elif isinstance(inner, pl.Float32 | pl.Float16):
        wide = pl.Float64() if column.kind == "float8" else pl.Float32()
        shown = element.cast(wide).cast(pl.String)
    else:
        shown = element.cast(pl.String)
    joined = pl.col(name).list.eval(shown.fill_null("NULL")).list.join(",")
    return values.to_frame().select(pl.concat_str(pl.lit("{"), joined, pl.lit("}")).alias(name)).to_series()


def identifiers(columns: Sequence[Column]) -> sql.Composed:
    return sql.SQL(", ").join(sql.Identifier(column.name) for column in columns)
