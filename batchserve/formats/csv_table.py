"""Records of CSV as a table.

Three parsers, each used only where the previous one failed: polars reads the chunk with its types; polars reads blocks
of records as text, which is cast; each record of a block is parsed alone, so that only faulty ones are lost. All give
the same values for a record.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace

import numpy as np
import polars as pl

from batchserve.domain import Chunk, Dialect, DType, RowError
from batchserve.errors import InvalidInput
from batchserve.formats.csv_records import find_records, well_quoted
from batchserve.formats.encodings import HINT
from batchserve.formats.records import blocks, drop_blank
from batchserve.formats.schema import cast_column, polars_type, reaches_limits, shorten, with_points

__all__ = ["parse_fields", "read_kept", "read_table"]

_QUOTE = ord('"')
_NEWLINE = ord("\n")


def read_table(
    data: bytes, dialect: Dialect, names: list[str], types: Mapping[str, DType], chunk: Chunk
) -> tuple[pl.DataFrame, list[RowError]]:
    """The records of a chunk, whose bytes are `data`, and an error for each that is lost or has a value that does not
    fit. Raises InvalidInput when there are more or fewer than planned."""
    frame = _read_regular(data, dialect, names, types, chunk.records)
    return _read_blocks(data, dialect, names, types, chunk) if frame is None else (frame, [])


def _read_regular(
    data: bytes, dialect: Dialect, names: list[str], types: Mapping[str, DType], records: int
) -> pl.DataFrame | None:
    """The table as polars reads it, or None where it fails, or is unreliable."""
    if not records:
        return pl.DataFrame(schema={name: polars_type(types.get(name, "string")) for name in names})
    delimiter = dialect.delimiter
    if not _regular(data, ord(delimiter), records * (len(names) - 1)) or _has_odd_numbers(data, dialect, types):
        return None
    if data.endswith(delimiter.encode()):
        data += b"\n"  # or polars would not see the empty field at the end, and no error where it is one too many
    # Booleans are read as text: polars knows fewer spellings than `cast_column`.
    schema = {n: polars_type("string" if (t := types.get(n, "string")) == "bool" else t) for n in names}
    try:
        commas = dialect.decimal == "," != delimiter
        frame = pl.read_csv(data, has_header=False, schema=schema, separator=delimiter, decimal_comma=commas)
    except pl.exceptions.PolarsError:
        return None
    if frame.height != records:  # polars turns a blank line, which is not a record, into a row of nulls
        return None
    if any(reaches_limits(frame[name]) for name, dtype in types.items() if dtype.startswith("float")):
        return None  # polars reads infinity where a number is too large
    for name, dtype in types.items():
        if dtype == "bool":
            cast, errors = cast_column(_missing_if_blank(frame[name]), dtype)
            if errors:
                return None
            frame = frame.with_columns(cast)
    return frame


def read_kept(
    data: bytes, dialect: Dialect, names: list[str], types: Mapping[str, DType], records: int
) -> pl.DataFrame | None:
    """The same for the columns that a compiled reading has kept, which may be none."""
    return _read_regular(data, dialect, names, types, records) if names else pl.DataFrame(height=records)


def _has_odd_numbers(data: bytes, dialect: Dialect, types: Mapping[str, DType]) -> bool:
    """Whether there may be numbers that polars reads otherwise than `_cast_number`: it takes a point for a decimal mark
    also where that is a comma and a point groups thousands, and reads no decimal commas between commas."""
    if dialect.decimal == "." or all(dtype == "string" for dtype in types.values()):
        return False
    return dialect.delimiter == "," or b"." in data


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
    if len(quotes) % 2 or not well_quoted(array, quotes, delimiter):
        return False
    found = np.flatnonzero(array == delimiter)
    return int(np.count_nonzero(np.searchsorted(quotes, found) % 2 == 0)) == delimiters


def _read_blocks(
    data: bytes, dialect: Dialect, names: list[str], types: Mapping[str, DType], chunk: Chunk
) -> tuple[pl.DataFrame, list[RowError]]:
    found = find_records(data, ord(dialect.delimiter), final=True)
    starts, ends = drop_blank(found.ends, np.frombuffer(data, np.uint8))
    if len(ends) != chunk.records:
        raise InvalidInput(
            f"bytes {chunk.start} to {chunk.stop} hold {len(ends)} records, planning counted {chunk.records}: "
            "the input has changed"
        )
    texts: list[pl.DataFrame] = []
    errors: list[RowError] = []
    for first, block, begins, stops in blocks(data, starts, ends):
        text = _read_regular(block, dialect, names, {}, len(stops))
        if text is None:
            lines = (block[a:b] for a, b in zip(begins.tolist(), stops.tolist(), strict=True))
            text, faults = _read_records(lines, dialect.delimiter, names, first)
            errors += faults
        texts.append(text)
    frame = pl.concat(texts)
    cast: list[pl.Series] = []
    for column in frame:
        dtype = types.get(column.name, "string")
        series, faults = cast_column(column, dtype) if dtype == "string" else _cast_number(column, dtype, dialect)
        cast.append(series)
        errors += faults
    return pl.DataFrame(cast), sorted(errors, key=lambda error: error.record)


def _cast_number(column: pl.Series, dtype: DType, dialect: Dialect) -> tuple[pl.Series, list[RowError]]:
    column = _missing_if_blank(column)
    if dialect.decimal == ".":
        return cast_column(column, dtype)
    series, faults = cast_column(with_points(column), dtype)
    return series, [replace(e, message=f"expected {dtype}, got {shorten(column[e.record])}") for e in faults]


def _missing_if_blank(column: pl.Series) -> pl.Series:
    """A quoted empty field is an empty text, but not a number."""
    return column.set(column.str.strip_chars() == "", None)


def _read_records(
    lines: Iterable[bytes], delimiter: str, names: list[str], first: int
) -> tuple[pl.DataFrame, list[RowError]]:
    rows: list[list[str | None]] = []
    errors: list[RowError] = []
    nothing: list[str | None] = [None] * len(names)
    for record, line in enumerate(lines, first):
        row = nothing
        try:
            fields = parse_fields(line.decode(), delimiter)
        except UnicodeDecodeError as error:
            what = f"byte {error.start} of the record ({line[error.start]:#04x}) is not UTF-8; {HINT}"
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


def parse_fields(record: str, delimiter: str) -> list[str | None] | None:
    """The fields of one record: None for an empty one, "" for a quoted empty one. Returns None where a quote is
    malformed."""
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
