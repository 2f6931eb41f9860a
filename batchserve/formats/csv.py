"""CSV by RFC 4180, with a header: quoted fields may hold delimiters, newlines and doubled quotes.

Blank lines are no records, as in pandas. A quote inside an unquoted field is an ordinary character.

A quote that opens a field and is out of place would swallow records in silence: planning refuses what it cannot cut
for certain. That is a quote that is never closed, one whose field goes over several lines and ends in the middle of a
text, a field full of lines that look like records, and lines that end with CR alone.

Three roads, each taken only where the one before failed: polars reads the chunk with its types; polars reads blocks of
records as text, which is cast; each record of a block is parsed alone, so that only faulty ones are lost. A record has
the same values on each road.
"""

import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np
import numpy.typing as npt
import polars as pl

from batchserve.domain import Chunk, ChunkLimits, Dialect, DType, RowError
from batchserve.errors import InvalidInput
from batchserve.formats.protocol import Header, Open, Part, Reading, Records
from batchserve.formats.records import (
    MAX_RECORD,
    Offsets,
    Scan,
    Scanned,
    Window,
    blocks,
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

__all__ = ["Csv", "escape_formula", "escape_formulas"]

_FORMULA = r"^[=+\-@\t\r]"
_NUMBER = r"^[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?$"
_BOM = b"\xef\xbb\xbf"
_UTF16 = (b"\xff\xfe", b"\xfe\xff")
_QUOTE = ord('"')
_NEWLINE = ord("\n")
_RETURN = ord("\r")
_FIRST_READ = 4096
_MAX_HEADER = 2**20
_SAMPLE = ChunkLimits(records=100)
_MOST_LINES = 50
"""A record of more lines is suspected of holding others."""
_ALIKE = 0.9
"""It does when so great a share of its lines has as many delimiters as a record."""


class Csv:
    """`Dialect.delimiter` between fields; UTF-8 with or without BOM; lines end with LF or CRLF."""

    name = "csv"
    media_type = "text/csv"
    suffix = ".csv"

    def header(self, source: BinaryIO, dialect: Dialect) -> Header:
        names, start = _head(source, dialect)
        first = next(cut(source, start, _scan(source, dialect, len(names)), None, _SAMPLE))
        data = read_span(source, first.start, first.stop)
        return Header(dict.fromkeys(names), lambda: _read(data, dialect, names, {}, first)[0])

    def plan(self, source: BinaryIO, dialect: Dialect, after: Chunk | None, limits: ChunkLimits) -> Iterator[Chunk]:
        names, start = _head(source, dialect)
        return cut(source, start, _scan(source, dialect, len(names)), after, limits)

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
    found = _find_records(data, ord(dialect.delimiter), final)
    starts, ends = drop_blank(found.ends, np.frombuffer(data, np.uint8))
    head = data[: int(ends[0])] if len(ends) else data
    if (at := _lone_return(head, found, ord(dialect.delimiter), len(head))) is not None:
        raise InvalidInput(f"the header line has a carriage return at byte {skipped + at}, {_LONE_RETURN}")
    if not len(ends):
        if final:
            raise InvalidInput("the input is empty; expected a header line with the column names")
        raise InvalidInput(f"the header line is longer than {_MAX_HEADER} bytes: does a quotation mark never close?")
    record = data[int(starts[0]) : int(ends[0])]
    _check_text(record, skipped + int(starts[0]))
    fields = _parse(record.decode(), dialect.delimiter)
    if fields is None:
        faulty = next(field for field in _quoted_fields(record, ord(dialect.delimiter)) if not field.well)
        at = skipped + int(starts[0]) + faulty.start
        what = f"a malformed quotation mark at byte {at}" if faulty.closed else f"a quotation mark at byte {at} {_OPEN}"
        raise InvalidInput(f"the header line has {what}: {shorten(record.decode())}")
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


_OPEN = "that is never closed"
_LONE_RETURN = (
    "with no line feed behind it: does the file come from an old Mac? Save it with LF or CRLF at the end of each line, "
    "or put the field in quotation marks"
)


@dataclass(frozen=True, slots=True)
class _Found:
    """What is where in bytes that begin with a record; all offsets in them.

    `ends` of records and blank lines, how much they cover (`consumed`), `lines`: behind each newline, also a quoted
    one. `at`: the place in `lines` of each end; None: those of records and lines are the same. `quotes`: all quotation
    marks; `by_parity`: their number before a byte tells whether it is quoted.
    """

    ends: Offsets
    consumed: int
    lines: Offsets
    at: Offsets | None
    quotes: Offsets
    by_parity: bool


@dataclass(frozen=True, slots=True)
class _Quoted:
    """A quoted field: its quotation marks stand at `start` and, if it is `closed`, before `stop`. `well`: a delimiter
    or the end of the record follows."""

    start: int
    stop: int
    closed: bool
    well: bool


def _scan(source: BinaryIO, dialect: Dialect, columns: int) -> Scan:
    delimiter = ord(dialect.delimiter)

    def scan(window: Window) -> Scanned:
        found = _find_records(window.data, delimiter, window.final)
        _, ends = drop_blank(found.ends, np.frombuffer(window.data, np.uint8))
        if fault := _fault(window, found, delimiter, columns):
            at, what = fault
            before = int(np.searchsorted(found.ends, at, side="right"))
            start = int(found.ends[before - 1]) if before else 0
            record = window.record + int(np.searchsorted(ends, start, side="right"))
            place = window.offset + start
            raise InvalidInput(
                f"record {record}, which begins in line {line_at(source, place)} at byte {place}, {what}",
                errors=[{"row": record, "message": what}],
            )
        return Scanned(ends, found.consumed, done=False)

    return scan


def _find_records(data: bytes, delimiter: int, final: bool) -> _Found:
    array = np.frombuffer(data, np.uint8)
    ends = lines = np.flatnonzero(array == _NEWLINE) + 1
    at, quotes, by_parity = None, _NONE, True
    if b'"' in data:
        quotes = np.flatnonzero(array == _QUOTE)
        by_parity = _well_quoted(array, quotes, delimiter)
        if by_parity:
            at = np.flatnonzero(np.searchsorted(quotes, lines) % 2 == 0)
            ends = lines[at]
        else:
            ends = _ends_by_fields(data, delimiter)
            at = np.searchsorted(lines, ends)
    consumed = int(ends[-1]) if len(ends) else 0
    if final and consumed < len(data):
        ends, consumed = np.append(ends, len(data)), len(data)
        at = None if at is None else np.append(at, len(lines))
    return _Found(ends, consumed, lines, at, quotes, by_parity)


_NONE = np.empty(0, np.int64)


def _fault(window: Window, found: _Found, delimiter: int, columns: int) -> tuple[int, str] | None:
    """Where records cannot be told apart for certain: a byte of the record at fault, and what is wrong with it."""
    data = window.data
    # Beyond the largest record nothing can end the last one.
    endless = not window.final and len(data) - found.consumed > MAX_RECORD
    known = len(data) if endless else found.consumed
    if b"\r" in data and (at := _lone_return(data, found, delimiter, known)) is not None:
        return at, f"has a carriage return at byte {window.offset + at}, {_LONE_RETURN}"
    if not len(found.quotes):
        return None
    if (window.final or endless) and (at := _unclosed(data, found, delimiter, endless)) is not None:
        longer = f"is longer than {MAX_RECORD >> 20} MiB: it" if endless else ""
        return at, f"{longer} has a quotation mark at byte {window.offset + at} {_OPEN}".lstrip()
    if found.at is None or len(found.ends) >= len(found.lines):
        return None
    spans = np.diff(found.at, prepend=-1)
    if not found.by_parity and (field := _malformed(data, found, spans, delimiter)):
        return field.start, (
            f"has a quotation mark at byte {window.offset + field.start} that opens a field of several lines, and the "
            f"one that closes it, at byte {window.offset + field.stop - 1}, is in the middle of a text: one of them is "
            "out of place (double those inside of a quoted field)"
        )
    if (at := _swallowing(data, found, spans, delimiter, columns)) is not None:
        field = max(_quoted_fields(data[at:], delimiter), key=lambda field: field.stop - field.start)
        lines = data.count(b"\n", at + field.start, at + field.stop)
        return at, (
            f"has a quotation mark at byte {window.offset + at + field.start} that opens a field of {lines + 1} lines, "
            "nearly all of which look like records: it is out of place, or the input has to come as NDJSON or Parquet"
        )
    return None


def _lone_return(data: bytes, found: _Found, delimiter: int, known: int) -> int | None:
    """The first carriage return before byte `known` that no newline follows and that is not quoted. The last byte of an
    input may be one."""
    array = np.frombuffer(data, np.uint8)
    if not has_lone_returns(array, found.lines):
        return None
    lone = np.flatnonzero(array[: known - 1] == _RETURN)
    lone = lone[array[lone + 1] != _NEWLINE]
    if found.by_parity:
        lone = lone[np.searchsorted(found.quotes, lone) % 2 == 0]
        return int(lone[0]) if len(lone) else None
    records = np.searchsorted(found.ends, lone, side="right")
    for record in np.unique(records).tolist():
        start = int(found.ends[record - 1]) if record else 0
        stop = int(found.ends[record]) if record < len(found.ends) else len(data)
        quoted = [(start + field.start, start + field.stop) for field in _quoted_fields(data[start:stop], delimiter)]
        for at in lone[records == record].tolist():
            if not any(begin < at < end for begin, end in quoted):
                return int(at)
    return None


def _unclosed(data: bytes, found: _Found, delimiter: int, endless: bool) -> int | None:
    """The quotation mark in the last record that is never closed."""
    if found.by_parity:
        return int(found.quotes[-1]) if len(found.quotes) % 2 else None
    last = found.consumed if endless else int(found.ends[-2]) if len(found.ends) > 1 else 0
    return next((last + f.start for f in _quoted_fields(data[last:], delimiter) if not f.closed), None)


def _malformed(data: bytes, found: _Found, spans: Offsets, delimiter: int) -> _Quoted | None:
    """The first field that is malformed and goes over several lines. In one line, it costs but its record."""
    mark = re.escape(bytes([delimiter]))
    well = re.compile(rb'(?:(?:"[^"]*+(?:""[^"]*+)*+"|(?!")[^%b\n]*+)(?:%b|\r?\n|\r?\Z))*+' % (mark, mark))
    for record in np.flatnonzero(spans > 1).tolist():
        start, stop = int(found.ends[record - 1]) if record else 0, int(found.ends[record])
        if well.fullmatch(data, start, stop):
            continue
        for field in _quoted_fields(data[start:stop], delimiter):
            if not field.well and data.find(b"\n", start + field.start, start + field.stop) >= 0:
                return _Quoted(start + field.start, start + field.stop, field.closed, field.well)
    return None


def _swallowing(data: bytes, found: _Found, spans: Offsets, delimiter: int, columns: int) -> int | None:
    """Where the first record begins whose many lines look like records themselves. Of a lone column any text does."""
    assert found.at is not None
    long = np.flatnonzero(spans > _MOST_LINES)
    if columns < 2 or not len(long):
        return None
    delimiters = np.flatnonzero(np.frombuffer(data, np.uint8) == delimiter)
    alike = np.diff(np.searchsorted(delimiters, found.lines), prepend=0) == columns - 1
    before = np.concatenate([np.zeros(1, np.int64), np.cumsum(alike)])
    last, first = found.at[long], found.at[long] - spans[long] + 1
    inner = last - first - 1  # the first and the last one hold other fields, too
    suspect = long[before[last] - before[first + 1] >= _ALIKE * inner]
    if not len(suspect):
        return None
    return int(found.ends[suspect[0] - 1]) if suspect[0] else 0


def _quoted_fields(record: bytes, delimiter: int) -> Iterator[_Quoted]:
    """The fields of the first record in these bytes that begin with a quotation mark."""
    mark = re.escape(bytes([delimiter]))
    field = re.compile(rb'(?:("[^"]*+(?:""[^"]*+)*+)("?+))?([^%b\n]*+)(%b|\n|\Z)' % (mark, mark))
    position, more = 0, b"%c" % delimiter
    while more not in (b"", b"\n"):
        match = field.match(record, position)
        assert match, "whatever does not end a field belongs to it"
        quoted, closing, rest, more = match.groups()
        if quoted is not None:
            yield _Quoted(position, match.end(2), bool(closing), bool(closing) and rest in (b"", b"\r"))
        position = match.end()


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
    """The table as polars reads it, or None where it cannot, or where it cannot be trusted."""
    if not records:
        return pl.DataFrame(schema={name: polars_type(types.get(name, "string")) for name in names})
    if not _regular(data, ord(delimiter), records * (len(names) - 1)):
        return None
    if data.endswith(delimiter.encode()):
        data += b"\n"  # or polars would not see the empty field at the end, and no error where it is one too many
    # Booleans are read as text: polars knows fewer spellings than `cast_column`.
    schema = {n: polars_type("string" if (t := types.get(n, "string")) == "bool" else t) for n in names}
    try:
        frame = pl.read_csv(data, has_header=False, schema=schema, separator=delimiter)
    except pl.exceptions.PolarsError:
        return None
    if frame.height != records:  # polars makes a row of nulls of a blank line, which is no record
        return None
    if any(reaches_limits(frame[name]) for name, dtype in types.items() if dtype.startswith("float")):
        return None  # polars reads infinity where a number is too large
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
    found = _find_records(data, ord(delimiter), final=True)
    starts, ends = drop_blank(found.ends, np.frombuffer(data, np.uint8))
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
    if isinstance(column.dtype, pl.Duration):
        return column.dt.to_string("iso")
    if column.dtype.is_nested():
        # Through polars, so that floats keep the digits of their own precision.
        lines = column.alias("v").to_frame().write_ndjson().split("\n")[:-1]
        texts = [line.removeprefix('{"v":').removesuffix("}") for line in lines]
        return pl.Series(column.name, [None if text == "null" else text for text in texts], dtype=pl.String())
    return column
