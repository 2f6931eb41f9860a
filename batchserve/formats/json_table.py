"""Records of JSON as a table: its columns, its values by polars or one by one, and the lines that are written of it.

The columns are the keys of the first 100 records and those that the model takes; any other key that first appears later
is dropped. The types of columns that the model does not take come from the first records, too: every chunk of an input
gets the same. A column whose values there are of several types, arrays or objects, or integers that none of the types
holds exactly, comes as JSON text.

A duplicate key makes a record faulty. polars silently keeps the first of two values, so the fast path counts keys (see
`_has_other_keys`). It only misses a second value that is null, or one offset by a text with `:null`.

A few records are read and written without polars' readers and writers, each call of which takes longer than they do.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from decimal import Decimal
from types import NoneType
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson
import polars as pl

from batchserve.domain import Chunk, ChunkLimits, DType, RowError
from batchserve.errors import InvalidInput
from batchserve.formats.json_rows import SPACE, Names, Row, parse_records, split_lines, written
from batchserve.formats.protocol import Header, Reading
from batchserve.formats.records import Offsets, blocks, check_names, check_width, drop_blank
from batchserve.formats.schema import as_base64, cast_column, polars_type, reaches_limits, shorten

__all__ = [
    "BRACKET",
    "SAMPLE",
    "columns_of",
    "find_lines",
    "header_of",
    "may_be_all",
    "ndjson",
    "read_few",
    "read_lines",
]

BRACKET = re.compile(rb"\s*\[")
_FEW = 100
"""Records that determine the columns and types of an input, and are read faster without polars."""
SAMPLE = ChunkLimits(records=_FEW)
_KINDS: dict[type, pl.DataType] = {
    bool: pl.Boolean(),
    int: pl.Int128(),
    float: pl.Float64(),
    str: pl.String(),
}
_AS_ORJSON_WRITES = {
    *(pl.Boolean(), pl.String(), pl.Float32(), pl.Float64()),
    *(pl.Int8(), pl.Int16(), pl.Int32(), pl.Int64(), pl.UInt8(), pl.UInt16(), pl.UInt32(), pl.UInt64()),
}
"""Types whose values polars writes as orjson does, to the byte."""
_LONE_SURROGATE = re.compile(rb"\\u[dD][89abAB][0-9a-fA-F]{2}(?!\\u[dD][c-fC-F])|(?<!\\u[dD][89abAB]..)\\u[dD][c-fC-F]")
"""polars turns a lone surrogate, which is not valid in UTF-8, into NUL."""
_INT64, _UINT64 = range(-(2**63), 2**63), range(2**64)
_EXACT = range(-(2**53), 2**53 + 1)
"""Integers that float64 represents exactly."""
_BLOCK = 128 * 2**10
"""Bytes that numpy processes together."""

Bytes = npt.NDArray[np.uint8]
Columns = dict[str, DType | None]
"""The dtype of each column; None is JSON text."""


# Columns


def header_of(reading: Reading) -> Header:
    sample = reading.records
    assert isinstance(sample, pl.DataFrame)
    if sample.height and not sample.width:
        fault = f": {reading.errors[0].message}" if reading.errors else ""
        raise InvalidInput(
            f"none of the first {sample.height} records is a JSON object with keys, "
            f"or in JSON an array of values{fault}"
        )
    return Header(dict.fromkeys(sample.columns), lambda: sample)


def columns_of(sample: list[Row], types: Mapping[str, DType]) -> Columns:
    values: dict[str, list[Any]] = {}
    for row in sample:
        for key, value in (row or {}).items():
            values.setdefault(key, []).append(value)
    check_width(len(values))
    check_names(values)
    columns: Columns = {key: types[key] if key in types else _infer(of_key) for key, of_key in values.items()}
    return {**columns, **types}


def _infer(values: list[Any]) -> DType | None:
    kinds = {type(value) for value in values if value is not None}
    if kinds == {bool}:
        return "bool"
    if kinds == {int} and all(value is None or value in _INT64 for value in values):
        return "int64"
    if kinds == {int} and all(value is None or value in _UINT64 for value in values):
        return "uint64"
    if kinds and kinds <= {int, float} and all(type(value) is not int or value in _EXACT for value in values):
        return "float64"
    return "string" if kinds == {str} else None


# Reading


def find_lines(data: bytes, final: bool) -> tuple[Offsets, Offsets, int]:
    """Starts and ends of the lines that are not blank, and how much all whole lines cover."""
    array = np.frombuffer(data, np.uint8)
    ends = np.flatnonzero(array == ord("\n")) + 1
    consumed = int(ends[-1]) if len(ends) else 0
    if final and consumed < len(data):
        consumed = len(data)
        ends = np.append(ends, consumed)
    starts, ends = drop_blank(ends, array)
    suspects = np.flatnonzero(array[starts] <= ord(" ")).tolist()
    if blank := [number for number in suspects if not data[starts[number] : ends[number]].strip(SPACE)]:
        starts, ends = np.delete(starts, blank), np.delete(ends, blank)
    return starts, ends, consumed


def may_be_all(chunk: Chunk) -> bool:
    """Whether the chunk is the only one and contains the records that determine the columns."""
    return chunk.first_record == 0 and chunk.records <= _FEW and chunk.stop - chunk.start <= SAMPLE.bytes


def read_few(
    data: bytes, chunk: Chunk, types: Mapping[str, DType], columns: Sequence[str] | None, names: Names = ()
) -> Reading:
    """All records of an input, which determine their columns."""
    rows, errors = parse_records(split_lines(data), 0, names)
    _check_count(len(rows), chunk)
    schema = columns_of(rows, types)
    if columns is not None:
        schema = {name: dtype for name, dtype in schema.items() if name in columns}
    frame, faults = rows_to_table(rows, schema, 0)
    return Reading(frame, sorted(errors + faults, key=lambda error: error.record))


def read_lines(data: bytes, chunk: Chunk, schema: Columns, columns: Sequence[str] | None, names: Names = ()) -> Reading:
    errors: list[RowError] = []
    frame = None if names and BRACKET.match(data) else _read_table(data, schema, chunk.records)
    if frame is None:
        frame, errors = _read_blocks(data, schema, chunk, names)
    if columns is not None:
        frame = frame.select(name for name in schema if name in set(columns))
        errors = [error for error in errors if error.column is None or error.column in columns]
    return Reading(frame, errors)


def _read_table(data: bytes, schema: Columns, records: int) -> pl.DataFrame | None:
    """The table as polars reads it, or None where it fails, or is unreliable."""
    if not records:
        return pl.DataFrame(schema={name: polars_type(dtype or "string") for name, dtype in schema.items()})
    if not schema or None in schema.values() or _has_lone_surrogate(data):
        return None
    try:
        frame = pl.read_ndjson(data, schema={name: _readable(dtype or "string") for name, dtype in schema.items()})
    except pl.exceptions.PolarsError:
        return None
    if frame.height != records or _has_other_keys(data, frame):
        return None
    cast: list[pl.Series] = []
    for column in frame:
        # polars gives the JSON text of an array or object, which is not a string.
        if column.dtype == pl.String() and column.str.contains(r"^[\[{]").any():
            return None
        if column.dtype.is_float() and reaches_limits(column):
            return None  # polars reads infinity where a number is too large
        series, errors = cast_column(column, schema[column.name] or "string")
        if errors:
            return None
        cast.append(series)
    return pl.DataFrame(cast)


def _readable(dtype: DType) -> pl.DataType:
    """polars reads no small integers from JSON."""
    return pl.Int64() if "int" in dtype else polars_type(dtype)


def _has_lone_surrogate(data: bytes) -> bool:
    # One byte is found some sixty times as fast as two, and most data has no backslash.
    return b"\\" in data and b"\\u" in data and _LONE_SURROGATE.search(data) is not None


def _has_other_keys(data: bytes, frame: pl.DataFrame) -> bool:
    """Whether the data may have more keys than the table has values and nulls: duplicates, or keys without a column."""
    array = np.frombuffer(data, np.uint8)
    keys = sum(_count_keys(block) for _, block in _pair_blocks(array))
    nulls = sum(column.null_count() for column in frame)
    values = frame.height * frame.width - nulls
    if nulls:
        values += _count_nulls(array)
    return keys != values


def _pair_blocks(array: Bytes) -> Iterator[tuple[int, Bytes]]:
    """The array in blocks, and where each begins. A block ends with the first byte of the next one, so that every pair
    of neighbours is whole in one of them. What numpy makes of a block stays in the cache."""
    return ((start, array[start : start + _BLOCK + 1]) for start in range(0, len(array), _BLOCK))


def _count_keys(block: Bytes) -> int:
    """Colons after a quotation mark or a space."""
    before = block[:-1]
    return int(np.count_nonzero((block[1:] == ord(":")) & ((before == ord('"')) | (before <= ord(" ")))))


def _count_nulls(array: Bytes) -> int:
    """`null` after a colon, or after a colon and a space. `bytes.count` takes four times as long for each of them."""
    found = [
        start + np.flatnonzero((block[:-1] == ord("n")) & (block[1:] == ord("u")))
        for start, block in _pair_blocks(array)
    ]
    at = np.concatenate(found)
    at = at[(at >= 2) & (at + 3 < len(array))]
    before, earlier = array[at - 1], array[at - 2]
    follows = (before == ord(":")) | ((before == ord(" ")) & (earlier == ord(":")))
    return int(np.count_nonzero(follows & (array[at + 2] == ord("l")) & (array[at + 3] == ord("l"))))


def _read_blocks(data: bytes, schema: Columns, chunk: Chunk, names: Names) -> tuple[pl.DataFrame, list[RowError]]:
    starts, ends, _ = find_lines(data, final=True)
    _check_count(len(ends), chunk)
    frames: list[pl.DataFrame] = []
    errors: list[RowError] = []
    for first, block, begins, stops in blocks(data, starts, ends):
        frame = None if names and BRACKET.match(block) else _read_table(block, schema, len(stops))
        if frame is None:
            lines = [block[a:b] for a, b in zip(begins.tolist(), stops.tolist(), strict=True)]
            rows, faults = parse_records(lines, first, names)
            frame, more = rows_to_table(rows, schema, first)
            errors += sorted(faults + more, key=lambda error: error.record)
        frames.append(frame)
    return pl.concat(frames), errors


def _check_count(records: int, chunk: Chunk) -> None:
    if records != chunk.records:
        raise InvalidInput(
            f"bytes {chunk.start} to {chunk.stop} hold {records} records, planning counted {chunk.records}: "
            "the input has changed"
        )


def rows_to_table(rows: Sequence[Row], schema: Columns, first: int) -> tuple[pl.DataFrame, list[RowError]]:
    series: list[pl.Series] = []
    errors: list[RowError] = []
    for name, dtype in schema.items():
        values = [row.get(name) if row else None for row in rows]
        column, faults = _column(name, values, dtype, first)
        series.append(column)
        errors += faults
    return pl.DataFrame(series) if series else pl.DataFrame(height=len(rows)), errors


def _column(name: str, values: list[Any], dtype: DType | None, first: int) -> tuple[pl.Series, list[RowError]]:
    if dtype is None:
        texts, faults = _json_texts(name, values, first)
        return pl.Series(name, texts, dtype=pl.String()), faults
    if dtype == "string":
        values = [_as_written_by_polars(value) if isinstance(value, float) else value for value in values]
    kinds = {type(value) for value in values} - {NoneType}
    if kinds == {int, float} and dtype.startswith("float") and all(type(v) is not int or v in _EXACT for v in values):
        values, kinds = [None if value is None else float(value) for value in values], {float}
    if len(kinds) == 1 and (source := _KINDS.get(kinds.pop())):
        return cast_column(pl.Series(name, values, dtype=source), dtype, first)
    column = pl.Series(name, [None] * len(values), dtype=polars_type(dtype))
    errors: list[RowError] = []
    for kind, source in _KINDS.items():
        if any(type(value) is kind for value in values):
            of_kind = pl.Series(name, [v if type(v) is kind else None for v in values], dtype=source)
            cast, faults = cast_column(of_kind, dtype, first)
            column = column.zip_with(cast.is_null(), cast)
            errors += faults
    for record, value in enumerate(values, first):
        if isinstance(value, list | dict):
            errors.append(RowError(record, "wrong-type", f"expected {dtype}, got {shorten(value)}", name))
    return column, errors


def _json_texts(name: str, values: list[Any], first: int) -> tuple[list[str | None], list[RowError]]:
    try:
        return [_json_text(value) for value in values], []
    except TypeError:  # orjson may not write all that it reads: deeply nested lists
        texts: list[str | None] = []
        errors: list[RowError] = []
        for record, value in enumerate(values, first):
            try:
                texts.append(_json_text(value))
            except TypeError:
                texts.append(None)
                errors.append(RowError(record, "invalid-json", "more than 254 levels are nested in it", name))
        return texts, errors


def _json_text(value: Any) -> str | None:
    return value if value is None or isinstance(value, str) else written(value)


def _as_written_by_polars(value: float) -> str:
    """The same text as on the fast path: all digits, no exponent."""
    return format(Decimal(repr(value)), "f").removesuffix(".0")


# Writing


def ndjson(frame: pl.DataFrame) -> bytes:
    frame = as_base64(frame)
    if frame.height > _FEW or not _AS_ORJSON_WRITES.issuperset(frame.dtypes):
        return frame.write_ndjson().encode()
    # numpy's float32 has the digits of its precision, Python's float would show those of a float64.
    columns = [column.to_numpy() if column.dtype == pl.Float32() else column.to_list() for column in frame]
    return b"".join(
        orjson.dumps(dict(zip(frame.columns, values, strict=True)), option=_LINE)
        for values in zip(*columns, strict=True)
    )


_LINE = orjson.OPT_APPEND_NEWLINE | orjson.OPT_SERIALIZE_NUMPY
