"""JSON records: one object in each line (NDJSON), or an array of records, or one record alone.

The records of an array may be arrays themselves: values without names, which the dialect gives them by their place.

The columns are the keys of the first 100 records and those that the model asks for; a key that first appears later and
that nobody asks for is dropped. So are the types of columns that the model does not ask for: every chunk of an input
gets the same, from its first records. A column whose values there are of several types, or arrays or objects, comes as
JSON text.

A key that stands twice makes a record faulty. polars keeps the first of two values in silence, so the fast road counts
keys (see `_has_other_keys`). It is blind only to a second value that is null, or that a text with `:null` makes up for.

A few records are read and written without polars' readers and writers, each call of which takes longer than they do.
"""

import io
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from decimal import Decimal
from functools import partial
from types import NoneType
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import orjson
import polars as pl

from batchserve.domain import Chunk, ChunkLimits, Dialect, DType, RowError
from batchserve.errors import InvalidInput, SchemaMismatch
from batchserve.formats.protocol import Header, Open, Part, Reading, Records
from batchserve.formats.records import (
    MAX_RECORD,
    Offsets,
    Scanned,
    Window,
    blocks,
    check_names,
    check_width,
    cut,
    drop_blank,
    has_lone_returns,
    line_at,
    read_span,
    read_up_to,
    table,
)
from batchserve.formats.schema import as_base64, cast_column, polars_type, reaches_limits, shorten
from batchserve.storage import Piece, Span

__all__ = ["Json", "Jsonl"]

_BOM = b"\xef\xbb\xbf"
_FEW = 100
"""Records that tell the columns and types of an input, and that are quicker read without polars."""
_SAMPLE = ChunkLimits(records=_FEW)
_MAX_EDGE = 2**20
"""How much may stand before the array of an `{"data": [...]}`, and after it."""
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
"""polars makes NUL of half a character, which is no JSON text in UTF-8."""
_INT64 = range(-(2**63), 2**63)
_INT128 = range(-(2**127), 2**127)
_LARGE = 2.0**63
"""From here on an integer may be more than orjson has integers for."""
_EXACT = range(-(2**53), 2**53 + 1)
"""Integers that are float64 without rounding."""
_LISTED = 20
"""So many faults or names a message lists at most."""
_BRACKET = re.compile(rb"\s*\[")
_SPACE = b" \t\r\n"
"""Of JSON; whatever else is blank is a fault."""
_BETWEEN_LINES = re.compile(rb"\}[ \t\r]*\r[ \t\r]*\{")
"""Of two objects in one line: never part of a value, as no text holds a carriage return."""
_BETWEEN_RECORDS = re.compile(rb"\}\s*,\s*\{|\]\s*,\s*\[")
_TOKEN = re.compile(
    rb'"(?:[^"\\]|\\.)*+"|(?<![\w.+-])-?(?:0|[1-9][0-9]*+)(?:\.[0-9]++)?(?:[eE][+-]?[0-9]++)?(?![\w.+-])', re.DOTALL
)
"""A text or a number."""
_BLOCK = 128 * 2**10
"""Bytes that numpy looks at together."""

Bytes = npt.NDArray[np.uint8]
Mask = npt.NDArray[np.bool_]
Row = dict[str, Any] | None
Names = tuple[str, ...]
"""Of the values of records that are arrays; (): such a record is a fault."""
Columns = dict[str, DType | None]
"""The dtype of each column; None is JSON text."""


class Jsonl:
    """One JSON object in each line; blank lines, also those of spaces, are no records."""

    name = "jsonl"
    media_type = "application/x-ndjson"
    suffix = ".jsonl"

    def header(self, source: BinaryIO, dialect: Dialect) -> Header:
        first = next(self.plan(source, dialect, None, _SAMPLE))
        if not first.records:
            raise InvalidInput("the input is empty; expected one JSON object in each line")
        return _header(self.read(source, dialect, first, {}))

    def plan(self, source: BinaryIO, dialect: Dialect, after: Chunk | None, limits: ChunkLimits) -> Iterator[Chunk]:  # noqa: ARG002
        source.seek(0)
        start = len(_BOM) if read_up_to(source, len(_BOM)) == _BOM else 0
        return cut(source, start, partial(_scan_lines, source), after, limits)

    def end(self, source: BinaryIO) -> int:
        return source.seek(0, io.SEEK_END)

    def read(
        self,
        source: BinaryIO,
        dialect: Dialect,
        chunk: Chunk,
        types: Mapping[str, DType],
        columns: Sequence[str] | None = None,
    ) -> Reading:
        lines = read_span(source, chunk.start, chunk.stop)
        if _may_be_all(chunk) and not read_up_to(source, 1):
            return _read_few(lines, chunk, types, columns)
        first = next(self.plan(source, dialect, None, _SAMPLE))
        sample = _parse_lines(read_span(source, first.start, first.stop))
        return _read_lines(lines, chunk, _columns(sample, types), columns)

    def write(self, records: Records, dialect: Dialect) -> bytes:  # noqa: ARG002
        return _ndjson(table(records, self.name))

    def assemble(self, parts: Iterable[Part], open: Open, dialect: Dialect, records: int) -> Iterator[Piece]:  # noqa: ARG002
        for part in parts:
            if part.bytes:
                yield Span(part.key, 0, part.bytes)


class Json:
    """An array of records, alone or under the key `data` of an object whose other values are scalars; or an object that
    is one record. A record of an array is an object, or an array with a value for each of `Dialect.columns`."""

    name = "json"
    media_type = "application/json"
    suffix = ".json"

    def header(self, source: BinaryIO, dialect: Dialect) -> Header:
        first = next(self.plan(source, dialect, None, _SAMPLE))
        reading = self.read(source, dialect, first, {})
        if any(error.code == "wrong-length" for error in reading.errors):
            lines = _array_to_lines(read_span(source, first.start, first.stop))
            _check_lengths(lines, _names(lines, dialect))
        return _header(reading)

    def plan(self, source: BinaryIO, dialect: Dialect, after: Chunk | None, limits: ChunkLimits) -> Iterator[Chunk]:  # noqa: ARG002
        start, brackets = _beginning(source)
        if not brackets:
            if after is None:
                yield Chunk(0, 1, start, source.seek(0, io.SEEK_END))
            return
        if after and read_span(source, after.stop - 1, after.stop) != b",":
            return
        last: Chunk | None = None
        for chunk in cut(source, start, _scan_array, after, limits):
            if last:
                yield last
            last = chunk
        if last:
            _check_tail(source, last.stop, brackets)
            yield last

    def end(self, source: BinaryIO) -> int:
        return source.seek(0, io.SEEK_END)

    def read(
        self,
        source: BinaryIO,
        dialect: Dialect,
        chunk: Chunk,
        types: Mapping[str, DType],
        columns: Sequence[str] | None = None,
    ) -> Reading:
        lines = _array_to_lines(read_span(source, chunk.start, chunk.stop))
        if _may_be_all(chunk) and read_up_to(source, 1) in (b"]", b""):
            reading = _read_few(lines, chunk, types, columns, _names(lines, dialect))
        else:
            first = next(self.plan(source, dialect, None, _SAMPLE))
            beginning = _array_to_lines(read_span(source, first.start, first.stop))
            names = _names(beginning, dialect)
            reading = _read_lines(lines, chunk, _columns(_parse_lines(beginning, names), types), columns, names)
        _check_elements(lines, chunk, reading.errors)
        return reading

    def write(self, records: Records, dialect: Dialect) -> bytes:  # noqa: ARG002
        return b"[%b]\n" % _ndjson(table(records, self.name)).removesuffix(b"\n").replace(b"\n", b",\n")

    def assemble(self, parts: Iterable[Part], open: Open, dialect: Dialect, records: int) -> Iterator[Piece]:  # noqa: ARG002
        before = b"["
        for part in parts:
            if part.records:
                yield before
                yield Span(part.key, len(b"["), part.bytes - len(b"]\n"))
                before = b",\n"
        yield b"]\n" if before != b"[" else b"[]\n"


# Lines


def _scan_lines(source: BinaryIO, window: Window) -> Scanned:
    _, ends, consumed = _lines(window.data, window.final)
    if b"\r" in window.data:
        _check_returns(source, window, ends)
    return Scanned(ends, consumed, done=False)


def _check_returns(source: BinaryIO, window: Window, ends: Offsets) -> None:
    """Raises InvalidInput for lines that end with CR alone: their records would be one that is malformed."""
    array = np.frombuffer(window.data, np.uint8)
    lines = np.flatnonzero(array == ord("\n")) + 1
    if has_lone_returns(array, lines) and (found := _BETWEEN_LINES.search(window.data)):
        at = window.data.index(b"\r", found.start())
        record = window.record + int(np.searchsorted(ends, at, side="right"))
        place = window.offset + at
        what = "a carriage return ends an object, with no line feed behind it: save the input with LF or CRLF"
        raise InvalidInput(
            f"record {record}, in line {line_at(source, place)} at byte {place}: {what}",
            errors=[{"row": record, "message": what}],
        )


def _lines(data: bytes, final: bool) -> tuple[Offsets, Offsets, int]:
    """Starts and ends of the lines that are not blank, and how much all whole lines cover."""
    array = np.frombuffer(data, np.uint8)
    ends = np.flatnonzero(array == ord("\n")) + 1
    consumed = int(ends[-1]) if len(ends) else 0
    if final and consumed < len(data):
        consumed = len(data)
        ends = np.append(ends, consumed)
    starts, ends = drop_blank(ends, array)
    suspects = np.flatnonzero(array[starts] <= ord(" ")).tolist()
    if blank := [number for number in suspects if not data[starts[number] : ends[number]].strip(_SPACE)]:
        starts, ends = np.delete(starts, blank), np.delete(ends, blank)
    return starts, ends, consumed


# Arrays

_DEPTH = np.zeros(256, np.int64)
_DEPTH[list(b"[{")] = 1
_DEPTH[list(b"]}")] = -1


def _elements(array: Bytes) -> tuple[Offsets, int | None, Mask]:
    """For bytes that begin inside an array: the commas between its elements, where its closing bracket is, and which
    bytes stand outside of texts."""
    quotes = array == ord('"')
    if (array == ord("\\")).any():
        at = np.flatnonzero(quotes)
        quotes[at[_escaped(array, at)]] = False
    outside: Mask = ~np.bitwise_xor.accumulate(quotes)
    # One bit tells [ from {, and ] from }.
    brace = array | 0x20
    marks = np.flatnonzero(outside & ((brace == ord("{")) | (brace == ord("}")) | (array == ord(","))))
    depth = np.cumsum(_DEPTH[array[marks]])
    closing = np.flatnonzero(depth < 0)
    if len(closing):
        marks, depth = marks[: closing[0] + 1], depth[: closing[0] + 1]
    commas = marks[(depth == 0) & (array[marks] == ord(","))]
    return commas, int(marks[-1]) if len(closing) else None, outside


def _escaped(array: Bytes, quotes: Offsets) -> Mask:
    """Which quotes follow an odd number of backslashes."""
    slashes = np.flatnonzero(array == ord("\\"))
    begins = np.concatenate([np.ones(1, bool), np.diff(slashes) > 1])
    run_start = np.maximum.accumulate(np.where(begins, slashes, 0))
    nearest = np.searchsorted(slashes, quotes) - 1
    adjacent = (nearest >= 0) & (slashes[nearest] == quotes - 1)
    escaped: Mask = adjacent & ((quotes - run_start[nearest]) % 2 == 1)
    return escaped


def _scan_array(window: Window) -> Scanned:
    array = np.frombuffer(window.data, np.uint8)
    commas, closing, _ = _elements(array)
    ends = commas + 1
    starts = np.concatenate([np.zeros(1, np.int64), ends[:-1]]) if len(ends) else ends
    # An element that is nothing but whitespace begins with whitespace or is empty: look only at those.
    first = array[starts]
    for number in np.flatnonzero((first <= ord(" ")) | (first == ord(","))).tolist():
        if not window.data[starts[number] : ends[number] - 1].strip():
            raise _malformed(window, int(ends[number]) - 1, number, "expected a record, got a comma")
    begin = int(ends[-1]) if len(ends) else 0
    if closing is None:
        if window.final:
            raise _malformed(window, len(window.data), len(ends), "the input ends before the array does")
        return Scanned(ends, begin, done=False)
    if window.data[begin:closing].strip():
        ends = np.append(ends, closing)
    elif window.record + len(ends):
        raise _malformed(window, closing, len(ends), "expected a record after the comma, got ]")
    return Scanned(ends, closing, done=True)


def _malformed(window: Window, at: int, number: int, what: str) -> InvalidInput:
    record, offset = window.record + number, window.offset + at
    return InvalidInput(
        f"malformed JSON at byte {offset}, in record {record}: {what}", errors=[{"row": record, "message": what}]
    )


def _array_to_lines(data: bytes) -> bytes:
    """The elements of a chunk as lines. Between values a newline is whitespace and becomes a space; inside a text it
    is a fault and becomes another one, that does not end the line."""
    array = np.frombuffer(data, np.uint8).copy()
    commas, _, outside = _elements(array)
    newlines = (array == ord("\n")) | (array == ord("\r"))
    array[newlines & outside] = ord(" ")
    array[newlines & ~outside] = 1
    array[commas] = ord("\n")
    lines = array.tobytes()
    return lines if lines.strip() else b""


_ALONE, _ARRAY, _WRAPPED = b"", b"[", b'{"data":['
"""What stands around records: nothing, where an object is the only one."""


def _beginning(source: BinaryIO) -> tuple[int, bytes]:
    """Where the first record may begin, and what stands before it."""
    source.seek(0)
    head = read_up_to(source, _MAX_EDGE)
    skipped = len(_BOM) if head.startswith(_BOM) else 0
    # One character for each byte, so that positions are offsets: names and values here are not looked at.
    text = head[skipped:].decode("latin-1")
    start = at = _skip_space(text, 0)
    if text[at : at + 1] == "[":
        return skipped + at + 1, _ARRAY
    if not text[at:]:
        raise InvalidInput("the input is empty; expected a JSON array of objects")
    decoder = json.JSONDecoder()
    comma = "{"
    while text[at : at + 1] == comma:
        try:
            key, at = decoder.raw_decode(text, _skip_space(text, at + 1))
            at = _skip_space(text, at)
            if not isinstance(key, str) or text[at : at + 1] != ":":
                break
            at = _skip_space(text, at + 1)
            if key == "data" and text[at : at + 1] == "[":
                return skipped + at + 1, _WRAPPED
            value, end = decoder.raw_decode(text, at)
        except json.JSONDecodeError as error:
            at = error.pos
            break
        except RecursionError:  # a value that is nested too deeply
            break
        if isinstance(value, dict | list):
            break
        at, comma = _skip_space(text, end), ","
    if text.startswith("{", start) and _is_record(source, skipped + start):
        return skipped + start, _ALONE
    raise InvalidInput(
        f'malformed JSON at byte {skipped + at}: expected an array of objects, alone or under the key "data" '
        f"next to numbers and texts only, or one object, got {shorten(text[at : at + 40])}"
    )


def _is_record(source: BinaryIO, start: int) -> bool:
    """Whether all from here on is one object, and not one that wraps an array."""
    source.seek(start)
    text = read_up_to(source, MAX_RECORD + 1)
    try:
        record = _loads(text) if len(text) <= MAX_RECORD else None
    except orjson.JSONDecodeError:
        return False
    return isinstance(record, dict) and not isinstance(record.get("data"), list)


def _skip_space(text: str, at: int) -> int:
    while text[at : at + 1] in {" ", "\n", "\r", "\t"}:
        at += 1
    return at


def _check_tail(source: BinaryIO, closing: int, before: bytes) -> None:
    """Raises InvalidInput when anything but scalars of the wrapping object follows the array."""
    source.seek(closing)
    tail = read_up_to(source, _MAX_EDGE)
    try:
        rest = _loads(before + tail)
    except orjson.JSONDecodeError as error:
        raise InvalidInput(f"malformed JSON after the array, which ends at byte {closing}: {error.msg}") from None
    if before == _WRAPPED and any(isinstance(value, dict | list) for key, value in rest.items() if key != "data"):
        raise InvalidInput(f"after the array, which ends at byte {closing}, only numbers and texts may follow")


def _check_elements(lines: bytes, chunk: Chunk, errors: Iterable[RowError]) -> None:
    """Raises InvalidInput for an element that is malformed and may hold others: a quotation mark or a bracket that is
    missing would make one record of many."""
    malformed = [error for error in errors if error.code == "invalid-json" and error.column is None]
    if not malformed:
        return
    starts, ends, _ = _lines(lines, final=True)
    for error in malformed:
        number = error.record - chunk.first_record
        start = int(starts[number])
        element = lines[start : int(ends[number])]
        if _BETWEEN_RECORDS.search(element) and not _is_but_unusual(element):
            raise InvalidInput(
                f"record {error.record}, which begins at byte {chunk.start + start}, is malformed and seems to hold "
                f"others, as where a quotation mark or a bracket is missing: {error.message}",
                errors=[{"row": error.record, "message": error.message}],
            )


def _is_but_unusual(element: bytes) -> bool:
    """Whether an element is whole, and refused for such things as NaN, a newline in a text or its depth."""
    try:
        json.loads(element.decode(errors="replace"), strict=False)
    except RecursionError:
        return True
    except ValueError:
        return False
    return True


# Columns


def _columns(sample: list[Row], types: Mapping[str, DType]) -> Columns:
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
    if kinds and kinds <= {int, float}:
        return "float64"
    return "string" if kinds == {str} else None


def _names(lines: bytes, dialect: Dialect) -> Names:
    """Of the values of records that are arrays. () where there are none, or nothing names them."""
    if dialect.columns or not _BRACKET.match(lines):
        return dialect.columns
    try:
        first = _loads(lines.partition(b"\n")[0])
    except orjson.JSONDecodeError:
        return ()
    check_width(len(first))
    return tuple(f"column_{number}" for number in range(1, len(first) + 1))


def _check_lengths(lines: bytes, names: Names) -> None:
    """Raises SchemaMismatch when no record has a value for each name."""
    if any(_parse_lines(lines, names)):
        return
    faults: list[dict[str, Any]] = []
    for row, line in enumerate(_split(lines)):
        with suppress(orjson.JSONDecodeError):
            if isinstance(values := _loads(line), list):
                fault = _length_fault(values, names)
                faults.append({"row": row, "expected": len(names), "got": len(values), "message": fault})
    raise SchemaMismatch(f"record {faults[0]['row']}: {faults[0]['message']}", errors=faults[:_LISTED])


def _length_fault(values: Sequence[Any], names: Sequence[str]) -> str:
    lacking = f": there is none for {', '.join(map(repr, names[len(values) :][:_LISTED]))}"
    return f"expected {len(names)} values, got {len(values)}{lacking if len(values) < len(names) else ''}"


def _header(reading: Reading) -> Header:
    sample = reading.records
    assert isinstance(sample, pl.DataFrame)
    if sample.height and not sample.width:
        fault = f": {reading.errors[0].message}" if reading.errors else ""
        raise InvalidInput(
            f"none of the first {sample.height} records is a JSON object with keys, "
            f"or in JSON an array of values{fault}"
        )
    return Header(dict.fromkeys(sample.columns), lambda: sample)


# Reading


def _may_be_all(chunk: Chunk) -> bool:
    """Whether the chunk holds the records that tell the columns, if it is the only one."""
    return chunk.first_record == 0 and chunk.records <= _FEW and chunk.stop - chunk.start <= _SAMPLE.bytes


def _read_few(
    data: bytes, chunk: Chunk, types: Mapping[str, DType], columns: Sequence[str] | None, names: Names = ()
) -> Reading:
    """All records of an input, which tell their columns themselves."""
    rows, errors = _parse_records(_split(data), 0, names)
    _check_count(len(rows), chunk)
    schema = _columns(rows, types)
    if columns is not None:
        schema = {name: dtype for name, dtype in schema.items() if name in columns}
    frame, faults = _to_table(rows, schema, 0)
    return Reading(frame, sorted(errors + faults, key=lambda error: error.record))


def _read_lines(
    data: bytes, chunk: Chunk, schema: Columns, columns: Sequence[str] | None, names: Names = ()
) -> Reading:
    errors: list[RowError] = []
    frame = None if names and _BRACKET.match(data) else _read_table(data, schema, chunk.records)
    if frame is None:
        frame, errors = _read_blocks(data, schema, chunk, names)
    if columns is not None:
        frame = frame.select(name for name in schema if name in set(columns))
        errors = [error for error in errors if error.column is None or error.column in columns]
    return Reading(frame, errors)


def _read_table(data: bytes, schema: Columns, records: int) -> pl.DataFrame | None:
    """The table as polars reads it, or None where it cannot, or where it cannot be trusted."""
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
        # polars gives the JSON text of an array or object, which is no string.
        if column.dtype == pl.String() and column.str.contains(r"^[\[{]").any():
            return None
        if column.dtype.is_float() and reaches_limits(column):
            return None  # polars reads infinity where a number is too large
        series, errors = cast_column(column, schema[column.name] or "string", 0)
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
    """Whether there may be more keys in the data than values and nulls in the table: some twice, or of no column."""
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
    starts, ends, _ = _lines(data, final=True)
    _check_count(len(ends), chunk)
    frames: list[pl.DataFrame] = []
    errors: list[RowError] = []
    for first, block, begins, stops in blocks(data, starts, ends):
        frame = None if names and _BRACKET.match(block) else _read_table(block, schema, len(stops))
        if frame is None:
            lines = [block[a:b] for a, b in zip(begins.tolist(), stops.tolist(), strict=True)]
            rows, faults = _parse_records(lines, chunk.first_record + first, names)
            frame, more = _to_table(rows, schema, chunk.first_record + first)
            errors += sorted(faults + more, key=lambda error: error.record)
        frames.append(frame)
    return pl.concat(frames), errors


def _check_count(records: int, chunk: Chunk) -> None:
    if records != chunk.records:
        raise InvalidInput(
            f"bytes {chunk.start} to {chunk.stop} hold {records} records, planning counted {chunk.records}: "
            "the input has changed"
        )


def _parse_records(lines: Iterable[bytes], first_record: int, names: Names) -> tuple[list[Row], list[RowError]]:
    rows: list[Row] = []
    errors: list[RowError] = []
    for record, line in enumerate(lines, first_record):
        row, fault = _parse_line(line, names)
        rows.append(row)
        if fault:
            errors.append(RowError(record, *fault))
    return rows, errors


def _to_table(rows: Sequence[Row], schema: Columns, first_record: int) -> tuple[pl.DataFrame, list[RowError]]:
    series: list[pl.Series] = []
    errors: list[RowError] = []
    for name, dtype in schema.items():
        values = [row.get(name) if row else None for row in rows]
        column, faults = _column(name, values, dtype, first_record)
        series.append(column)
        errors += faults
    return pl.DataFrame(series) if series else pl.DataFrame(height=len(rows)), errors


def _parse_line(line: bytes, names: Names = ()) -> tuple[Row, tuple[str, str] | None]:
    """The record in a line, or the code and message of its fault."""
    try:
        row = _loads(line.rstrip(b"\r\n"))  # or its end would count as a character of the record
        if names and isinstance(row, list):
            if len(row) != len(names):
                return None, ("wrong-length", _length_fault(row, names))
            return dict(zip(names, row, strict=True)), None
        if not isinstance(row, dict):
            return None, ("not-an-object", f"expected a JSON object, got {shorten(row)}")
        if any(type(value) is float and abs(value) >= _LARGE for value in row.values()):
            row |= _large_integers(line, row)
        # orjson keeps the last of two values: look twice where there are more colons than keys.
        if line.count(b":") > len(row):
            json.loads(line, object_pairs_hook=_distinct)
    except orjson.JSONDecodeError as error:
        return None, ("invalid-json", f"malformed JSON at character {error.pos} of the record: {error.msg}")
    except _DuplicateKeyError as error:
        return None, ("duplicate-key", f"the key {shorten(error.args[0])} stands more than once")
    except RecursionError:
        return None, ("invalid-json", "arrays and objects are nested too deeply")
    return row, None


def _loads(data: bytes) -> Any:
    """The value in the bytes; a number too large for any float is the text that it is written as. Raises
    orjson.JSONDecodeError."""
    try:
        return orjson.loads(data)
    except orjson.JSONDecodeError as error:
        if "infinity" not in error.msg:
            raise
        return orjson.loads(_TOKEN.sub(_quoted_if_infinite, data))


def _large_integers(line: bytes, row: dict[str, Any]) -> dict[str, Any]:
    """The integers that orjson has rounded, as they are written; beyond 128 bits they are texts."""
    values = {key: value for key, value in json.loads(line).items() if type(value) is int and type(row[key]) is float}
    return {key: value if value in _INT128 else str(value) for key, value in values.items()}


def _quoted_if_infinite(token: re.Match[bytes]) -> bytes:
    text = token[0]
    return b'"%b"' % text if text[:1] != b'"' and math.isinf(float(text)) else text


class _DuplicateKeyError(Exception):
    pass


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = dict(pairs)
    if len(keys) < len(pairs):
        names = [name for name, _ in pairs]
        raise _DuplicateKeyError(next(name for name in names if names.count(name) > 1))
    return keys


def _split(data: bytes) -> Iterator[bytes]:
    return (line for line in data.split(b"\n") if line.strip(_SPACE))


def _parse_lines(data: bytes, names: Names = ()) -> list[Row]:
    return _parse_records(_split(data), 0, names)[0]


def _column(name: str, values: list[Any], dtype: DType | None, first_record: int) -> tuple[pl.Series, list[RowError]]:
    if dtype is None:
        texts, faults = _json_texts(name, values, first_record)
        return pl.Series(name, texts, dtype=pl.String()), faults
    if dtype == "string":
        values = [_as_written_by_polars(value) if isinstance(value, float) else value for value in values]
    kinds = {type(value) for value in values} - {NoneType}
    if kinds == {int, float} and dtype.startswith("float") and all(type(v) is not int or v in _EXACT for v in values):
        values, kinds = [None if value is None else float(value) for value in values], {float}
    if len(kinds) == 1 and (source := _KINDS.get(kinds.pop())):
        return cast_column(pl.Series(name, values, dtype=source), dtype, first_record)
    column = pl.Series(name, [None] * len(values), dtype=polars_type(dtype))
    errors: list[RowError] = []
    for kind, source in _KINDS.items():
        if any(type(value) is kind for value in values):
            of_kind = pl.Series(name, [v if type(v) is kind else None for v in values], dtype=source)
            cast, faults = cast_column(of_kind, dtype, first_record)
            column = column.zip_with(cast.is_null(), cast)
            errors += faults
    for record, value in enumerate(values, first_record):
        if isinstance(value, list | dict):
            errors.append(RowError(record, "wrong-type", f"expected {dtype}, got {shorten(value)}", name))
    return column, errors


def _json_texts(name: str, values: list[Any], first_record: int) -> tuple[list[str | None], list[RowError]]:
    try:
        return [_json_text(value) for value in values], []
    except TypeError:  # what orjson has read, it may not write: lists in lists in lists
        texts: list[str | None] = []
        errors: list[RowError] = []
        for record, value in enumerate(values, first_record):
            try:
                texts.append(_json_text(value))
            except TypeError:
                texts.append(None)
                errors.append(RowError(record, "invalid-json", "more than 254 levels are nested in it", name))
        return texts, errors


def _json_text(value: Any) -> str | None:
    return value if value is None or isinstance(value, str) else orjson.dumps(value).decode()


def _as_written_by_polars(value: float) -> str:
    """The same text as on the fast road: all digits, no exponent."""
    return format(Decimal(repr(value)), "f").removesuffix(".0")


# Writing


def _ndjson(frame: pl.DataFrame) -> bytes:
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
