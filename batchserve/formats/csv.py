"""CSV by RFC 4180, with a header: quoted fields may hold delimiters, newlines and doubled quotes.

Blank lines are no records, as in pandas. A quote inside an unquoted field is an ordinary character.

Three roads, each taken only where the one before failed: polars reads the chunk with its types; polars reads blocks of
records as text, which is cast; each record of a block is parsed alone, so that only faulty ones are lost. A record has
the same values on each road.
"""

import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import BinaryIO

import numpy as np
import numpy.typing as npt
import polars as pl

from batchserve.domain import Chunk, ChunkLimits, Dialect, DType, RowError
from batchserve.errors import InvalidInput
from batchserve.formats.protocol import Header, Open, Part, Reading, Records
from batchserve.formats.records import (
    Offsets,
    Scan,
    Scanned,
    Window,
    blocks,
    check_width,
    cut,
    drop_blank,
    read_span,
    read_up_to,
    table,
)
from batchserve.formats.schema import as_base64, cast_column, polars_type, shorten
from batchserve.storage import Piece, Span

__all__ = ["Csv", "escape_formula", "escape_formulas"]

_FORMULA = r"^[=+\-@\t\r]"
_NUMBER = r"^[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?$"
_BOM = b"\xef\xbb\xbf"
_UTF16 = (b"\xff\xfe", b"\xfe\xff")
_QUOTE = ord('"')
_NEWLINE = ord("\n")
_FIRST_READ = 4096
_MAX_HEADER = 2**20
_SAMPLE = ChunkLimits(records=100)


class Csv:
    """`Dialect.delimiter` between fields; UTF-8 with or without BOM; lines end with LF or CRLF."""

    name = "csv"
    media_type = "text/csv"
    suffix = ".csv"

    def header(self, source: BinaryIO, dialect: Dialect) -> Header:
        names, start = _head(source, dialect)
        first = next(cut(source, start, _scan(dialect), None, _SAMPLE))
        data = read_span(source, first.start, first.stop)
        return Header(dict.fromkeys(names), lambda: _read(data, dialect, names, {}, first)[0])

    def plan(self, source: BinaryIO, dialect: Dialect, after: Chunk | None, limits: ChunkLimits) -> Iterator[Chunk]:
        _, start = _head(source, dialect)
        return cut(source, start, _scan(dialect), after, limits)

    def end(self, source: BinaryIO) -> int:
        return source.seek(0, os.SEEK_END)

    def read(
        self,
        source: BinaryIO,
        dialect: Dialect,
        chunk: Chunk,
        types: Mapping[str, DType],
        columns: Sequence[str] | None = None,
    ) -> Reading:
        names, _ = _head(source, dialect)
        types = {name: dtype for name, dtype in types.items() if name in names}
        data = read_span(source, chunk.start, chunk.stop)
        frame, errors = _read(data, dialect, names, types, chunk)
        if columns is not None:
            wanted = set(columns)
            frame = pl.DataFrame([frame[name] for name in names if name in wanted])
            errors = [error for error in errors if error.column is None or error.column in columns]
        return Reading(frame, errors)

    def write(self, records: Records, dialect: Dialect) -> bytes:
        frame = as_base64(table(records, self.name))
        frame = pl.DataFrame([_writable(column) for column in frame])
        # The empty line of a null in a lone column would be no record.
        null = '""' if frame.width == 1 else ""
        return frame.write_csv(separator=dialect.delimiter, null_value=null).encode()

    def assemble(self, parts: Iterable[Part], open: Open, dialect: Dialect, records: int) -> Iterator[Piece]:  # noqa: ARG002
        parts = iter(parts)
        first = next(parts)
        yield Span(first.key, 0, first.bytes)
        with open(first.key) as source:
            _, body = _head(source, dialect)
        for part in parts:
            if part.bytes > body:
                yield Span(part.key, body, part.bytes)


def escape_formula(text: str) -> str:
    """The text behind an apostrophe if a spreadsheet would take it for a formula. A number is none."""
    return f"'{text}" if re.search(_FORMULA, text) and not re.search(_NUMBER, text) else text


def escape_formulas(frame: pl.DataFrame) -> pl.DataFrame:
    """The frame with `escape_formula` done to each text, also to the names of the columns."""
    columns = [_without_formulas(column) if column.dtype == pl.String() else column for column in frame]
    names: list[str] = []
    for name in map(escape_formula, frame.columns):
        while name in names:
            name = f"'{name}"
        names.append(name)
    return pl.DataFrame([column.alias(name) for column, name in zip(columns, names, strict=True)])


def _without_formulas(column: pl.Series) -> pl.Series:
    formula = column.str.contains(_FORMULA) & ~column.str.contains(_NUMBER)
    return column.zip_with(~formula, "'" + column) if formula.any() else column


def _head(source: BinaryIO, dialect: Dialect) -> tuple[list[str], int]:
    """The column names, and the byte where the first line after them begins."""
    source.seek(0)
    # Usually the header is the first of a few short lines.
    data = read_up_to(source, _FIRST_READ)
    if b'"' in data or b"\n" not in data.lstrip(b"\r\n"):
        data += read_up_to(source, _MAX_HEADER + 1 - len(data))
    skipped = len(_BOM) if data.startswith(_BOM) else 0
    if data.startswith(_UTF16):
        raise InvalidInput("the text is UTF-16, as its first two bytes say; expected UTF-8: save it as UTF-8")
    final = len(data) <= _MAX_HEADER and not source.read(1)
    data = data[skipped:]
    ends, _ = _record_ends(data, ord(dialect.delimiter), final)
    starts, ends = drop_blank(ends, np.frombuffer(data, np.uint8))
    if not len(ends):
        if final:
            raise InvalidInput("the input is empty; expected a header line with the column names")
        raise InvalidInput(f"the header line is longer than {_MAX_HEADER} bytes: does a quotation mark never close?")
    record = data[int(starts[0]) : int(ends[0])]
    _check_text(record, skipped + int(starts[0]))
    fields = _parse(record.decode(), dialect.delimiter)
    if fields is None:
        raise InvalidInput(f"the header line has a malformed quotation mark: {shorten(record.decode())}")
    names = [field or "" for field in fields]
    _check_names(names)
    return names, skipped + int(ends[0])


def _check_text(head: bytes, offset: int) -> None:
    if (at := head.find(0)) >= 0:
        raise InvalidInput(f"byte {offset + at} is NUL, so this is no UTF-8 text: is it UTF-16, or binary?")
    try:
        head.decode()
    except UnicodeDecodeError as error:
        raise InvalidInput(
            f"byte {offset + error.start} ({head[error.start]:#04x}) is not UTF-8; is the text Windows-1252 or "
            "Latin-1? Save it as UTF-8"
        ) from None


def _check_names(names: list[str]) -> None:
    check_width(len(names))
    if empty := [number for number, name in enumerate(names, 1) if not name.strip()]:
        raise InvalidInput(
            f"the header has no name for column {', '.join(map(str, empty[:10]))}; every column needs one "
            "(pandas writes its index so: use index=False)",
            errors=[{"column": number, "message": "no name"} for number in empty[:100]],
        )
    places: dict[str, list[int]] = {}
    for number, name in enumerate(names, 1):
        places.setdefault(name, []).append(number)
    if twice := {name: numbers for name, numbers in places.items() if len(numbers) > 1}:
        listed = "; ".join(f"{name!r} in columns {', '.join(map(str, at))}" for name, at in list(twice.items())[:10])
        raise InvalidInput(
            f"the header names columns more than once: {listed}",
            errors=[{"column": name, "message": f"columns {at}"} for name, at in list(twice.items())[:100]],
        )


# Records and their ends


def _scan(dialect: Dialect) -> Scan:
    delimiter = ord(dialect.delimiter)

    def scan(window: Window) -> Scanned:
        ends, consumed = _record_ends(window.data, delimiter, window.final)
        _, ends = drop_blank(ends, np.frombuffer(window.data, np.uint8))
        return Scanned(ends, consumed, done=False)

    return scan


def _record_ends(data: bytes, delimiter: int, final: bool) -> tuple[Offsets, int]:
    """The ends of all records and blank lines, and how much they cover. `data` begins with a record."""
    array = np.frombuffer(data, np.uint8)
    ends = np.flatnonzero(array == _NEWLINE) + 1
    if b'"' in data:
        quotes = np.flatnonzero(array == _QUOTE)
        if _well_quoted(array, quotes, delimiter):
            ends = ends[np.searchsorted(quotes, ends) % 2 == 0]
        else:
            ends = _ends_by_fields(data, delimiter)
    consumed = int(ends[-1]) if len(ends) else 0
    if final and consumed < len(data):
        return np.append(ends, len(data)), len(data)
    return ends, consumed


def _well_quoted(array: npt.NDArray[np.uint8], quotes: Offsets, delimiter: int) -> bool:
    """Whether every quote opens or closes a field, or is doubled inside one: then the parity of the quotes before it
    tells whether a byte is quoted."""
    opening, closing = quotes[::2], quotes[1::2]
    before = array[opening[opening > 0] - 1]
    after = array[closing[closing < len(array) - 1] + 1]
    return bool(
        ((before == delimiter) | (before == _NEWLINE) | (before == _QUOTE)).all()
        and ((after == delimiter) | (after == _NEWLINE) | (after == _QUOTE) | (after == ord("\r"))).all()
    )


def _ends_by_fields(data: bytes, delimiter: int) -> Offsets:
    """The same as by parity, where a quote may also stand inside an unquoted field."""
    mark = re.escape(bytes([delimiter]))
    # Possessive: millions of quotation marks would take hundreds of bytes each to go back to.
    field = rb'(?:"[^"]*+(?:""[^"]*+)*+(?:"|\Z))?[^%b\n]*+(?:%b|(\n)|\Z)' % (mark, mark)
    return np.array([match.end() for match in re.finditer(field, data) if match[1]], np.int64)


# Reading


def _read(
    data: bytes, dialect: Dialect, names: list[str], types: Mapping[str, DType], chunk: Chunk
) -> tuple[pl.DataFrame, list[RowError]]:
    frame = _read_table(data, dialect.delimiter, names, types, chunk.records)
    return _read_blocks(data, dialect.delimiter, names, types, chunk) if frame is None else (frame, [])


def _read_table(
    data: bytes, delimiter: str, names: list[str], types: Mapping[str, DType], records: int
) -> pl.DataFrame | None:
    """The table as polars reads it, or None where it can not, or where it can not be trusted."""
    if not records:
        return pl.DataFrame(schema={name: polars_type(types.get(name, "string")) for name in names})
    if not _regular(data, ord(delimiter), records * (len(names) - 1)):
        return None
    # Booleans are read as text: polars knows fewer spellings than `cast_column`.
    schema = {n: polars_type("string" if (t := types.get(n, "string")) == "bool" else t) for n in names}
    try:
        frame = pl.read_csv(data, has_header=False, schema=schema, separator=delimiter)
    except pl.exceptions.PolarsError:
        return None
    if frame.height != records:  # polars makes a row of nulls of a blank line, which is no record
        return None
    for name, dtype in types.items():
        if dtype == "bool":
            cast, errors = cast_column(_missing_if_blank(frame[name]), dtype, 0)
            if errors:
                return None
            frame = frame.with_columns(cast)
    return frame


def _regular(data: bytes, delimiter: int, delimiters: int) -> bool:
    """Whether there are as many delimiters as the records need. polars refuses a record with too many fields but
    fills up one with too few: with the right number in all, every record has the right number. polars also drops a
    carriage return at the end of any field."""
    array = np.frombuffer(data, np.uint8)
    if b"\r" in data and not (array[np.flatnonzero(array[:-1] == ord("\r")) + 1] == _NEWLINE).all():
        return False
    if b'"' not in data:
        return int(np.count_nonzero(array == delimiter)) == delimiters
    quotes = np.flatnonzero(array == _QUOTE)
    if len(quotes) % 2 or not _well_quoted(array, quotes, delimiter):
        return False
    found = np.flatnonzero(array == delimiter)
    return int(np.count_nonzero(np.searchsorted(quotes, found) % 2 == 0)) == delimiters


def _read_blocks(
    data: bytes, delimiter: str, names: list[str], types: Mapping[str, DType], chunk: Chunk
) -> tuple[pl.DataFrame, list[RowError]]:
    ends, _ = _record_ends(data, ord(delimiter), final=True)
    starts, ends = drop_blank(ends, np.frombuffer(data, np.uint8))
    if len(ends) != chunk.records:
        raise InvalidInput(
            f"bytes {chunk.start} to {chunk.stop} hold {len(ends)} records, planning counted {chunk.records}: "
            "the input has changed"
        )
    texts: list[pl.DataFrame] = []
    errors: list[RowError] = []
    for first, block, begins, stops in blocks(data, starts, ends):
        text = _read_table(block, delimiter, names, {}, len(stops))
        if text is None:
            lines = (block[a:b] for a, b in zip(begins.tolist(), stops.tolist(), strict=True))
            text, faults = _read_records(lines, delimiter, names, chunk.first_record + first)
            errors += faults
        texts.append(text)
    frame = pl.concat(texts)
    cast: list[pl.Series] = []
    for column in frame:
        dtype = types.get(column.name, "string")
        series, faults = cast_column(
            column if dtype == "string" else _missing_if_blank(column), dtype, chunk.first_record
        )
        cast.append(series)
        errors += faults
    return pl.DataFrame(cast), sorted(errors, key=lambda error: error.record)


def _missing_if_blank(column: pl.Series) -> pl.Series:
    """A quoted empty field is an empty text, but no number."""
    return column.set(column.str.strip_chars() == "", None)


def _read_records(
    lines: Iterable[bytes], delimiter: str, names: list[str], first_record: int
) -> tuple[pl.DataFrame, list[RowError]]:
    rows: list[list[str | None]] = []
    errors: list[RowError] = []
    nothing: list[str | None] = [None] * len(names)
    for record, line in enumerate(lines, first_record):
        row = nothing
        try:
            fields = _parse(line.decode(), delimiter)
        except UnicodeDecodeError as error:
            what = f"byte {error.start} of the record ({line[error.start]:#04x}) is not UTF-8"
            errors.append(RowError(record, "invalid-utf8", what))
        else:
            if fields is None:
                errors.append(
                    RowError(record, "malformed-quote", f"malformed quotation mark in {shorten(line.decode())}")
                )
            elif len(fields) != len(names):
                what = f"expected {len(names)} fields, got {len(fields)}"
                errors.append(RowError(record, "wrong-field-count", what))
            else:
                row = fields
        rows.append(row)
    return pl.DataFrame(rows, schema=dict.fromkeys(names, pl.String()), orient="row"), errors


def _parse(record: str, delimiter: str) -> list[str | None] | None:
    """The fields of one record: None for an empty one, "" for a quoted empty one. None in all: a quote is malformed."""
    record = record.removesuffix("\n").removesuffix("\r")
    mark = re.escape(delimiter)
    field = re.compile(f'(?:"([^"]*+(?:""[^"]*+)*+)"|((?!")[^{mark}]*+))({mark}|\\Z)')
    fields: list[str | None] = []
    position, more = 0, delimiter
    while more:
        match = field.match(record, position)
        if match is None:
            return None
        quoted, plain, more = match.groups()
        fields.append(plain or None if quoted is None else quoted.replace('""', '"'))
        position = match.end()
    return fields


# Writing


def _writable(column: pl.Series) -> pl.Series:
    """The column as CSV can hold it: no NaN and no infinity, lists and structs as JSON text."""
    if column.dtype.is_float():
        finite = np.isfinite(column.to_numpy())
        return column if finite.all() else column.set(pl.Series(~finite), None)
    if column.dtype.is_nested():
        # Through polars, so that floats keep the digits of their own precision.
        lines = column.alias("v").to_frame().write_ndjson().split("\n")[:-1]
        texts = [line.removeprefix('{"v":').removesuffix("}") for line in lines]
        return pl.Series(column.name, [None if text == "null" else text for text in texts], dtype=pl.String())
    return column
