"""CSV by RFC 4180, with a header: quoted fields may hold delimiters, newlines and doubled quotes.

Blank lines are no records, as in pandas. A quote inside an unquoted field is an ordinary character.
"""

import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import BinaryIO, ClassVar

import numpy as np
import polars as pl

from batchserve.domain import Chunk, ChunkLimits, Dialect, DType
from batchserve.errors import InvalidInput
from batchserve.formats.csv_dialect import told_delimiter
from batchserve.formats.csv_matrices import read_matrices
from batchserve.formats.csv_records import (
    LONE_RETURN,
    OPEN,
    find_records,
    lone_return,
    quoted_fields,
    scan_records,
)
from batchserve.formats.csv_table import parse_fields, read_table
from batchserve.formats.encodings import HINT
from batchserve.formats.lines import cut_lines
from batchserve.formats.protocol import Block, Header, Holds, MatrixReader, Open, Part, Reading, Records
from batchserve.formats.records import Scan, check_width, cut, drop_blank, name_outer, read_span, read_up_to, table
from batchserve.formats.schema import as_base64, shorten
from batchserve.storage import Piece, Span

__all__ = ["Csv", "escape_formula", "escape_formulas"]

_FORMULA = r"^[=+\-@\t\r]"
_NUMBER = r"^[+-]?(\d+[.,]?\d*|[.,]\d+)([eE][+-]?\d+)?$"
_BOM = b"\xef\xbb\xbf"
_UTF16 = (b"\xff\xfe", b"\xfe\xff")
_FIRST_READ = 4096
_MAX_HEADER = 2**20
_SAMPLE = ChunkLimits(records=100)


@dataclass(frozen=True, slots=True)
class Csv(MatrixReader):
    """`delimiter` between fields, `decimal` in numbers; UTF-8 with or without BOM; lines end with LF or CRLF."""

    delimiter: str = ","
    decimal: str = "."

    name = "csv"
    media_type = "text/csv"
    suffix = ".csv"
    family = "csv"
    holds: ClassVar[Holds] = "table"
    is_text = True
    has_types = False
    chunk_scale = 1

    def header(self, source: BinaryIO) -> Header:
        names, start = _head(source, self.delimiter)
        first = next(cut(source, start, self._scan(source, names), None, _SAMPLE))
        data = read_span(source, first.start, first.stop)
        return Header(dict.fromkeys(names), lambda: read_table(data, self._dialect, names, {}, first)[0], self.decimal)

    def plan(self, source: BinaryIO, after: Chunk | None, limits: ChunkLimits) -> Iterator[Chunk]:
        names, start = _head(source, self.delimiter)
        return cut_lines(source, start, self._scan(source, names), after, limits, is_json=False)

    def end(self, source: BinaryIO) -> int:
        return source.seek(0, os.SEEK_END)

    def read(
        self,
        source: BinaryIO,
        chunk: Chunk,
        types: Mapping[str, DType],
        columns: Sequence[str] | None = None,
    ) -> Reading:
        return self.read_matrices(source, chunk, types, columns, (), ())

    def read_matrices(
        self,
        source: BinaryIO,
        chunk: Chunk,
        types: Mapping[str, DType],
        columns: Sequence[str] | None,
        blocks: Sequence[Block],
        kept: Sequence[str],
    ) -> Reading:
        names, _ = _head(source, self.delimiter)
        types = {name: dtype for name, dtype in types.items() if name in names}
        if blocks and (reading := read_matrices(source, self._dialect, names, types, chunk, blocks, kept)) is not None:
            return reading
        data = read_span(source, chunk.start, chunk.stop)
        frame, errors = read_table(data, self._dialect, names, types, chunk)
        if columns is not None:
            wanted = set(columns)
            frame = pl.DataFrame([frame[name] for name in names if name in wanted])
            errors = [error for error in errors if error.column is None or error.column in columns]
        return Reading(frame, errors)

    def write(self, records: Records) -> bytes:
        frame = as_base64(table(records, self.name))
        frame = pl.DataFrame([_writable(column) for column in frame])
        # The empty line of a null in a single column would not be a record.
        null = '""' if frame.width == 1 else ""
        comma = self.decimal == ","
        return frame.write_csv(separator=self.delimiter, null_value=null, decimal_comma=comma).encode()

    def assemble(self, parts: Iterable[Part], open: Open, _records: int) -> Iterator[Piece]:
        parts = iter(parts)
        first = next(parts)
        yield Span(first.key, 0, first.bytes)
        with open(first.key) as source:
            _, body = _head(source, self.delimiter)
        for part in parts:
            if part.bytes > body:
                yield Span(part.key, body, part.bytes)

    @property
    def _dialect(self) -> Dialect:
        return Dialect(self.delimiter, decimal=self.decimal)

    def _scan(self, source: BinaryIO, names: Sequence[str]) -> Scan:
        return scan_records(source, ord(self.delimiter), len(names))


def escape_formula(text: str) -> str:
    """The text with a leading apostrophe if a spreadsheet would evaluate it as a formula. Numbers stay."""
    return f"'{text}" if re.search(_FORMULA, text) and not re.search(_NUMBER, text) else text


def escape_formulas(frame: pl.DataFrame) -> pl.DataFrame:
    """The frame with `escape_formula` applied to each text, and to the names of the columns."""
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


def _head(source: BinaryIO, delimiter: str) -> tuple[list[str], int]:
    """The column names, and the byte where the first line after them begins."""
    source.seek(0)
    # Usually the header is the first of a few short lines.
    data = read_up_to(source, _FIRST_READ)
    is_told = told_delimiter(data) is not None  # by a line above the header
    if b'"' in data or is_told or b"\n" not in data.lstrip(b"\r\n"):
        data += read_up_to(source, _MAX_HEADER + 1 - len(data))
    skipped = len(_BOM) if data.startswith(_BOM) else 0
    if data.startswith(_UTF16):
        raise InvalidInput("the text is UTF-16, as its first two bytes show, and was not made UTF-8: upload it again")
    final = len(data) <= _MAX_HEADER and not source.read(1)
    data = data[skipped:]
    found = find_records(data, ord(delimiter), final)
    starts, ends = drop_blank(found.ends, np.frombuffer(data, np.uint8))
    if is_told:
        starts, ends = starts[1:], ends[1:]
    head = data[: int(ends[0])] if len(ends) else data
    if (at := lone_return(head, found, ord(delimiter), len(head))) is not None:
        raise InvalidInput(f"the header line has a carriage return at byte {skipped + at}, {LONE_RETURN}")
    if not len(ends):
        if final:
            raise InvalidInput("the input is empty; expected a header line with the column names")
        raise InvalidInput(f"the header line is longer than {_MAX_HEADER} bytes: is a quotation mark never closed?")
    record = data[int(starts[0]) : int(ends[0])]
    _check_text(record, skipped + int(starts[0]))
    fields = parse_fields(record.decode(), delimiter)
    if fields is None:
        faulty = next(field for field in quoted_fields(record, ord(delimiter)) if not field.well)
        at = skipped + int(starts[0]) + faulty.start
        what = f"a malformed quotation mark at byte {at}" if faulty.closed else f"a quotation mark at byte {at} {OPEN}"
        raise InvalidInput(f"the header line has {what}: {shorten(record.decode())}")
    names = name_outer([field or "" for field in fields])
    _check_names(names)
    return names, skipped + int(ends[0])


def _check_text(head: bytes, offset: int) -> None:
    if (at := head.find(0)) >= 0:
        raise InvalidInput(
            f"byte {offset + at} is NUL, so this is not UTF-8 text; if it is UTF-16, send encoding=utf-16"
        )
    try:
        head.decode()
    except UnicodeDecodeError as error:
        raise InvalidInput(f"byte {offset + error.start} ({head[error.start]:#04x}) is not UTF-8; {HINT}") from None


def _check_names(names: list[str]) -> None:
    check_width(len(names))
    if empty := [number for number, name in enumerate(names, 1) if not name.strip()]:
        raise InvalidInput(
            f"the header has no name for column {', '.join(map(str, empty[:10]))}; every column between others needs a "
            "name",
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


def _writable(column: pl.Series) -> pl.Series:
    """The column in a form that CSV can hold: no NaN and no infinity, lists and structs as JSON text."""
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
