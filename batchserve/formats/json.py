"""JSON documents: an array of records, or a single record. The records of an array may be arrays themselves: unnamed
values, which are named by position.
"""

import io
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, BinaryIO, ClassVar

import numpy as np
import numpy.typing as npt
import orjson

from batchserve.domain import Chunk, ChunkLimits, DType, RowError
from batchserve.errors import InvalidInput, SchemaMismatch
from batchserve.formats.json_rows import Names, length_fault, loads, parse_rows, split_lines
from batchserve.formats.json_table import (
    BRACKET,
    SAMPLE,
    columns_of,
    find_lines,
    header_of,
    may_be_all,
    ndjson,
    read_few,
    read_lines,
)
from batchserve.formats.protocol import Header, Holds, Open, Part, Reading, Records
from batchserve.formats.records import (
    MAX_RECORD,
    Offsets,
    Scanned,
    Window,
    check_width,
    cut,
    read_span,
    read_up_to,
    table,
)
from batchserve.formats.schema import shorten
from batchserve.storage import Piece, Span

__all__ = ["Json"]

_BOM = b"\xef\xbb\xbf"
_MAX_EDGE = 2**20
"""Most bytes before the array of an `{"data": [...]}`, and after it."""
_LISTED = 20
"""Most faults in a message."""
_BETWEEN_RECORDS = re.compile(rb"\}\s*,\s*\{|\]\s*,\s*\[")

Bytes = npt.NDArray[np.uint8]
Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Json:
    """An array of records, alone or under the key `data` of an object whose other values are scalars; or an object that
    is one record. A record of an array is an object, or an array with a value for each of `columns`."""

    columns: Names = ()
    """Names of the values of records that are arrays; (): column_1, column_2 and so on."""

    name = "json"
    media_type = "application/json"
    suffix = ".json"
    family = "json"
    holds: ClassVar[Holds] = "table"
    is_text = True
    has_types = True
    chunk_scale = 1

    def header(self, source: BinaryIO) -> Header:
        first = next(self.plan(source, None, SAMPLE))
        reading = self.read(source, first, {})
        if any(error.code == "wrong-length" for error in reading.errors):
            lines = _array_to_lines(read_span(source, first.start, first.stop))
            _check_lengths(lines, _names(lines, self.columns))
        if first.records == 1 and first.start == 0:
            _require_values(read_span(source, first.start, first.stop))
        return header_of(reading)

    def plan(self, source: BinaryIO, after: Chunk | None, limits: ChunkLimits) -> Iterator[Chunk]:
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
        chunk: Chunk,
        types: Mapping[str, DType],
        columns: Sequence[str] | None = None,
    ) -> Reading:
        lines = _array_to_lines(read_span(source, chunk.start, chunk.stop))
        if may_be_all(chunk) and read_up_to(source, 1) in (b"]", b""):
            reading = read_few(lines, chunk, types, columns, _names(lines, self.columns))
        else:
            first = next(self.plan(source, None, SAMPLE))
            beginning = _array_to_lines(read_span(source, first.start, first.stop))
            names = _names(beginning, self.columns)
            reading = read_lines(lines, chunk, columns_of(parse_rows(beginning, names), types), columns, names)
        _check_elements(lines, chunk, reading.errors)
        return reading

    def write(self, records: Records) -> bytes:
        return b"[%b]\n" % ndjson(table(records, self.name)).removesuffix(b"\n").replace(b"\n", b",\n")

    def assemble(self, parts: Iterable[Part], _open: Open, _records: int) -> Iterator[Piece]:
        before = b"["
        for part in parts:
            if part.records:
                yield before
                yield Span(part.key, len(b"["), part.bytes - len(b"]\n"))
                before = b",\n"
        yield b"]\n" if before != b"[" else b"[]\n"


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
    """Mask of the quotes after an odd number of backslashes."""
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
    """The elements of a chunk as lines. Between values a newline is whitespace and becomes a space; inside a text it is
    a fault and becomes one that does not end the line."""
    array = np.frombuffer(data, np.uint8).copy()
    commas, _, outside = _elements(array)
    newlines = (array == ord("\n")) | (array == ord("\r"))
    array[newlines & outside] = ord(" ")
    array[newlines & ~outside] = 1
    array[commas] = ord("\n")
    lines = array.tobytes()
    return lines if lines.strip() else b""


_ALONE, _ARRAY, _WRAPPED = b"", b"[", b'{"data":['
"""The bytes around records: none for a single object."""


def _beginning(source: BinaryIO) -> tuple[int, bytes]:
    """Where the first record may begin, and what precedes it."""
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
        f"next to numbers and texts only, or one object, got {shorten(text[at : at + 40])}{_WAY_OF_PANDAS}"
    )


_WAY_OF_PANDAS = "; pandas writes records with to_json(orient='records')"


def _require_values(record: bytes) -> None:
    """Raises InvalidInput for an object that holds nothing but objects: columns or rows by their names."""
    try:
        held = orjson.loads(record)
    except orjson.JSONDecodeError:
        return
    if isinstance(held, dict) and held and all(isinstance(value, dict) for value in held.values()):
        raise InvalidInput(
            f"the only record holds an object under each of its keys: expected values of columns{_WAY_OF_PANDAS}",
            errors=[{"column": name, "message": "an object, not a value"} for name in list(held)[:20]],
        )


def _is_record(source: BinaryIO, start: int) -> bool:
    """Whether the rest is one object that does not wrap an array."""
    source.seek(start)
    text = read_up_to(source, MAX_RECORD + 1)
    try:
        record = loads(text) if len(text) <= MAX_RECORD else None
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
        rest = loads(before + tail)
    except orjson.JSONDecodeError as error:
        raise InvalidInput(f"malformed JSON after the array, which ends at byte {closing}: {error.msg}") from None
    # The array stands for itself as an empty one, unless a second one follows under its name.
    if before == _WRAPPED and (
        rest["data"] != [] or any(isinstance(value, dict | list) for key, value in rest.items() if key != "data")
    ):
        raise InvalidInput(f"after the array, which ends at byte {closing}, only numbers and texts may follow")


def _check_elements(lines: bytes, chunk: Chunk, errors: Iterable[RowError]) -> None:
    """Raises InvalidInput for a malformed element that may contain others: a quotation mark or a bracket that is
    missing would make one record of many."""
    malformed = [error for error in errors if error.code == "invalid-json" and error.column is None]
    if not malformed:
        return
    starts, ends, _ = find_lines(lines, final=True)
    for error in malformed:
        start = int(starts[error.record])
        element = lines[start : int(ends[error.record])]
        if _BETWEEN_RECORDS.search(element) and not _is_but_unusual(element):
            raise InvalidInput(
                f"record {error.record}, which begins at byte {chunk.start + start}, is malformed and seems to hold "
                f"others, as where a quotation mark or a bracket is missing: {error.message}",
                errors=[{"row": error.record, "message": error.message}],
            )


def _is_but_unusual(element: bytes) -> bool:
    """Whether an element is complete, and only refused for NaN, a newline in a text, its depth or the like."""
    try:
        json.loads(element.decode(errors="replace"), strict=False)
    except RecursionError:
        return True
    except ValueError:
        return False
    return True


# Records that are arrays


def _names(lines: bytes, given: Names) -> Names:
    """Names of the values of records that are arrays. () where there are none, or they are unnamed."""
    if given or not BRACKET.match(lines):
        return given
    try:
        first = loads(lines.partition(b"\n")[0])
    except orjson.JSONDecodeError:
        return ()
    check_width(len(first))
    return tuple(f"column_{number}" for number in range(1, len(first) + 1))


def _check_lengths(lines: bytes, names: Names) -> None:
    """Raises SchemaMismatch when no record has a value for each name."""
    if any(parse_rows(lines, names)):
        return
    faults: list[dict[str, Any]] = []
    for row, line in enumerate(split_lines(lines)):
        with suppress(orjson.JSONDecodeError):
            if isinstance(values := loads(line), list):
                fault = length_fault(values, names)
                faults.append({"row": row, "expected": len(names), "got": len(values), "message": fault})
    raise SchemaMismatch(f"record {faults[0]['row']}: {faults[0]['message']}", errors=faults[:_LISTED])
