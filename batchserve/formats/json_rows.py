"""JSON records one by one: the value in a line, its faults, and its numbers as written."""

import json
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import orjson

from batchserve.domain import RowError
from batchserve.formats.schema import shorten

__all__ = [
    "SPACE",
    "Names",
    "Row",
    "length_fault",
    "loads",
    "parse_records",
    "parse_rows",
    "split_lines",
    "written",
]

SPACE = b" \t\r\n"
"""Whitespace of JSON; other blanks are faults."""
_INT128 = range(-(2**127), 2**127)
_DIGITS = 300
"""Integers from this length on stay texts."""
_NO_NUMBER = re.compile(r"-?(NaN|Infinity)")
_LONG = re.compile(rb"\d{19}")
"""From this length on an integer may exceed those of orjson."""
_LISTED = 20
"""Most names in a message."""
_TOKEN = re.compile(
    rb'"(?:[^"\\]|\\.)*+"|(?<![\w.+-])-?(?:0|[1-9][0-9]*+)(?:\.[0-9]++)?(?:[eE][+-]?[0-9]++)?(?![\w.+-])', re.DOTALL
)
"""A text or a number."""

Row = dict[str, Any] | None
Names = tuple[str, ...]
"""Names of the values of records that are arrays; (): such a record is a fault."""


def parse_records(lines: Iterable[bytes], first: int, names: Names) -> tuple[list[Row], list[RowError]]:
    rows: list[Row] = []
    errors: list[RowError] = []
    for record, line in enumerate(lines, first):
        row, fault = parse_line(line, names)
        rows.append(row)
        if fault:
            errors.append(RowError(record, *fault))
    return rows, errors


def parse_line(line: bytes, names: Names = ()) -> tuple[Row, tuple[str, str] | None]:
    """The record in a line, or the code and message of its fault."""
    try:
        row = loads(line.rstrip(b"\r\n"))  # otherwise its end would count as a character of the record
        if names and isinstance(row, list):
            if len(row) != len(names):
                return None, ("wrong-length", length_fault(row, names))
            return dict(zip(names, row, strict=True)), None
        if not isinstance(row, dict):
            return None, ("not-an-object", f"expected a JSON object, got {shorten(row)}")
        if _LONG.search(line):
            row |= _large_integers(line, row)
        # orjson keeps the last of two values: check again where there are more colons than keys.
        if line.count(b":") > len(row):
            json.loads(line, object_pairs_hook=_distinct)
    except orjson.JSONDecodeError as error:
        way = "; send null for NaN, and infinity as a text" if _NO_NUMBER.match(error.doc, error.pos) else ""
        return None, ("invalid-json", f"malformed JSON at character {error.pos} of the record: {error.msg}{way}")
    except _DuplicateKeyError as error:
        return None, ("duplicate-key", f"the key {shorten(error.args[0])} appears more than once")
    except RecursionError:
        return None, ("invalid-json", "arrays and objects are nested too deeply")
    return row, None


def loads(data: bytes) -> Any:
    """The value in the bytes; a number too large for any float stays text. Raises orjson.JSONDecodeError."""
    try:
        return orjson.loads(data)
    except orjson.JSONDecodeError as error:
        if "infinity" not in error.msg:
            raise
        return orjson.loads(_TOKEN.sub(_quoted_if_infinite, data))


def _large_integers(line: bytes, row: dict[str, Any]) -> dict[str, Any]:
    """The values with integers that orjson has rounded, as written; beyond 128 bits they are texts."""
    rounded = {key for key, value in row.items() if type(value) is float or isinstance(value, dict | list)}
    read = json.loads(line, parse_int=_whole)
    values = {key: value for key, value in read.items() if key in rounded and type(value) is not float}
    return {key: value if type(value) is not int or value in _INT128 else str(value) for key, value in values.items()}


def _whole(digits: str) -> int | str:
    """Python reads no integer of thousands of digits."""
    return int(digits) if len(digits) < _DIGITS else digits


def written(value: Any) -> str:
    """A value as JSON, also with integers of more than 64 bits. Raises TypeError for one that is nested too deep."""
    try:
        return orjson.dumps(value).decode()
    except orjson.JSONEncodeError as error:
        if "64-bit" not in str(error):
            raise
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


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


def split_lines(data: bytes) -> Iterator[bytes]:
    return (line for line in data.split(b"\n") if line.strip(SPACE))


def parse_rows(data: bytes, names: Names = ()) -> list[Row]:
    return parse_records(split_lines(data), 0, names)[0]


def length_fault(values: Sequence[Any], names: Sequence[str]) -> str:
    if len(names) == 1:
        hint = f'; a record with an array is an object, as {{"{names[0]}": [...]}}'
        return f"expected 1 value, for {names[0]!r}, got {len(values)}{hint}"
    lacking = f": there is none for {', '.join(map(repr, names[len(values) :][:_LISTED]))}"
    return f"expected {len(names)} values, got {len(values)}{lacking if len(values) < len(names) else ''}"
