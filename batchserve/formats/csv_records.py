"""Where the records of a CSV end, which quotation marks decide.

A quote that opens a field and is out of place would swallow records in silence: what cannot be cut for certain is
refused. That is a quote that is never closed, one whose field goes over several lines and ends in the middle of a text,
a field full of lines that look like records, and lines that end with CR alone.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from batchserve.errors import InvalidInput
from batchserve.formats.records import MAX_RECORD, Offsets, Scan, Scanned, Window, drop_blank, has_lone_returns, line_at

__all__ = [
    "LONE_RETURN",
    "OPEN",
    "find_records",
    "lone_return",
    "quoted_fields",
    "scan_records",
    "well_quoted",
]

_QUOTE = ord('"')
_NEWLINE = ord("\n")
_RETURN = ord("\r")
_MOST_LINES = 50
"""A record of more lines is suspected to contain others."""
_ALIKE = 0.9
"""Share of its lines with as many delimiters as a record from which on it does."""
OPEN = "that is never closed"
LONE_RETURN = (
    "with no line feed behind it: does the file come from an old Mac? Save it with LF or CRLF at the end of each line, "
    "or put the field in quotation marks"
)


@dataclass(frozen=True, slots=True)
class Found:
    """Positions in bytes that begin with a record.

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
class Quoted:
    """A quoted field: its quotation marks are at `start` and, if it is `closed`, before `stop`. `well`: a delimiter or
    the end of the record follows."""

    start: int
    stop: int
    closed: bool
    well: bool


def scan_records(source: BinaryIO, delimiter: int, columns: int) -> Scan:
    """The function by which `cut` finds the records of an input of so many columns. It raises InvalidInput, as
    described in this module."""

    def scan(window: Window) -> Scanned:
        found = find_records(window.data, delimiter, window.final)
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


def find_records(data: bytes, delimiter: int, final: bool) -> Found:
    """Where records end; the last one may end with the bytes if these are `final`."""
    array = np.frombuffer(data, np.uint8)
    ends = lines = np.flatnonzero(array == _NEWLINE) + 1
    at, quotes, by_parity = None, _NONE, True
    if b'"' in data:
        quotes = np.flatnonzero(array == _QUOTE)
        by_parity = well_quoted(array, quotes, delimiter)
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
    return Found(ends, consumed, lines, at, quotes, by_parity)


_NONE = np.empty(0, np.int64)


def _fault(window: Window, found: Found, delimiter: int, columns: int) -> tuple[int, str] | None:
    """The first ambiguous record: one of its bytes, and the fault."""
    data = window.data
    # Beyond the largest record length, nothing can end the last one.
    endless = not window.final and len(data) - found.consumed > MAX_RECORD
    known = len(data) if endless else found.consumed
    if b"\r" in data and (at := lone_return(data, found, delimiter, known)) is not None:
        return at, f"has a carriage return at byte {window.offset + at}, {LONE_RETURN}"
    if not len(found.quotes):
        return None
    if (window.final or endless) and (at := _unclosed(data, found, delimiter, endless)) is not None:
        longer = f"is longer than {MAX_RECORD >> 20} MiB: it" if endless else ""
        return at, f"{longer} has a quotation mark at byte {window.offset + at} {OPEN}".lstrip()
    if found.at is None or len(found.ends) >= len(found.lines):
        return None
    spans = np.diff(found.at, prepend=-1)
    if not found.by_parity and (field := _malformed(data, found, spans, delimiter)):
        return field.start, (
            f"has a quotation mark at byte {window.offset + field.start} that opens a field of several lines, and the "
            f"one that closes it, at byte {window.offset + field.stop - 1}, is in the middle of a text: one of them is "
            "misplaced (double those inside of a quoted field)"
        )
    if (at := _swallowing(data, found, spans, delimiter, columns)) is not None:
        field = max(quoted_fields(data[at:], delimiter), key=lambda field: field.stop - field.start)
        lines = data.count(b"\n", at + field.start, at + field.stop)
        return at, (
            f"has a quotation mark at byte {window.offset + at + field.start} that opens a field of {lines + 1} lines, "
            "nearly all of which look like records: it is misplaced, or the input must be sent as NDJSON or Parquet"
        )
    return None


def lone_return(data: bytes, found: Found, delimiter: int, known: int) -> int | None:
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
        quoted = [(start + field.start, start + field.stop) for field in quoted_fields(data[start:stop], delimiter)]
        for at in lone[records == record].tolist():
            if not any(begin < at < end for begin, end in quoted):
                return int(at)
    return None


def _unclosed(data: bytes, found: Found, delimiter: int, endless: bool) -> int | None:
    """The quotation mark in the last record that is never closed."""
    if found.by_parity:
        return int(found.quotes[-1]) if len(found.quotes) % 2 else None
    last = found.consumed if endless else int(found.ends[-2]) if len(found.ends) > 1 else 0
    return next((last + f.start for f in quoted_fields(data[last:], delimiter) if not f.closed), None)


def _malformed(data: bytes, found: Found, spans: Offsets, delimiter: int) -> Quoted | None:
    """The first field that is malformed and goes over several lines. Within one line, it only costs its record."""
    mark = re.escape(bytes([delimiter]))
    well = re.compile(rb'(?:(?:"[^"]*+(?:""[^"]*+)*+"|(?!")[^%b\n]*+)(?:%b|\r?\n|\r?\Z))*+' % (mark, mark))
    for record in np.flatnonzero(spans > 1).tolist():
        start, stop = int(found.ends[record - 1]) if record else 0, int(found.ends[record])
        if well.fullmatch(data, start, stop):
            continue
        for field in quoted_fields(data[start:stop], delimiter):
            if not field.well and data.find(b"\n", start + field.start, start + field.stop) >= 0:
                return Quoted(start + field.start, start + field.stop, field.closed, field.well)
    return None


def _swallowing(data: bytes, found: Found, spans: Offsets, delimiter: int, columns: int) -> int | None:
    """Start of the first record whose many lines look like records themselves. In a single column any text does."""
    assert found.at is not None
    long = np.flatnonzero(spans > _MOST_LINES)
    if columns < 2 or not len(long):
        return None
    delimiters = np.flatnonzero(np.frombuffer(data, np.uint8) == delimiter)
    alike = np.diff(np.searchsorted(delimiters, found.lines), prepend=0) == columns - 1
    before = np.concatenate([np.zeros(1, np.int64), np.cumsum(alike)])
    last, first = found.at[long], found.at[long] - spans[long] + 1
    inner = last - first - 1  # the first and the last one contain other fields, too
    suspect = long[before[last] - before[first + 1] >= _ALIKE * inner]
    if not len(suspect):
        return None
    return int(found.ends[suspect[0] - 1]) if suspect[0] else 0


def quoted_fields(record: bytes, delimiter: int) -> Iterator[Quoted]:
    """The fields of the first record in these bytes that begin with a quotation mark."""
    mark = re.escape(bytes([delimiter]))
    field = re.compile(rb'(?:("[^"]*+(?:""[^"]*+)*+)("?+))?([^%b\n]*+)(%b|\n|\Z)' % (mark, mark))
    position, more = 0, b"%c" % delimiter
    while more not in (b"", b"\n"):
        match = field.match(record, position)
        assert match, "a quote that does not end a field belongs to it"
        quoted, closing, rest, more = match.groups()
        if quoted is not None:
            yield Quoted(position, match.end(2), bool(closing), bool(closing) and rest in (b"", b"\r"))
        position = match.end()


def well_quoted(array: npt.NDArray[np.uint8], quotes: Offsets, delimiter: int) -> bool:
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
