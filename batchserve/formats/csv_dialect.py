"""The delimiter of a CSV that no option tells: told by its first line, or recognised by its first records and by the
columns that a model takes."""

import re
from collections.abc import Collection

import numpy as np

from batchserve.formats.csv_records import find_records
from batchserve.formats.csv_table import parse_fields
from batchserve.formats.records import drop_blank

__all__ = ["recognise_delimiter", "told_delimiter"]

_BOM = b"\xef\xbb\xbf"
_OTHERS = (";", "\t", "|")
_TOLD = re.compile(rb"(?:\xef\xbb\xbf)?[\r\n]*+sep=([,;\t|])\r?\n", re.IGNORECASE)
_BEGINNING = 2**16
_RECORDS = 20
"""That are compared with the header, at most."""


def told_delimiter(data: bytes) -> str | None:
    """The delimiter that the first line tells Excel, as in `sep=;`. Such a line is not the header."""
    told = _TOLD.match(data)
    return None if told is None else told[1].decode()


def recognise_delimiter(prefix: bytes, columns: Collection[str] = ()) -> str:
    """The delimiter of a CSV that begins with `prefix`. `columns`: names that the header is expected to have.

    That which its first line tells; else that in which the header has the most of these names; among equals the comma
    if each of the first records has as many fields as the header, and more than one; else the first of semicolon, tab
    and bar of which that is true; else the comma. Delimiters in quoted fields do not count.
    """
    if (told := told_delimiter(prefix)) is not None:
        return told
    data = prefix.removeprefix(_BOM)[:_BEGINNING]
    line = data.lstrip(b"\r\n").partition(b"\n")[0]
    if b'"' not in line and not any(mark.encode() in line for mark in _OTHERS):
        return ","  # as nearly always
    widths = {mark: _widths(data, mark) for mark in (",", *_OTHERS)}
    found = {mark: len(set(fields[0]) & set(columns)) if fields else 0 for mark, fields in widths.items()}
    best = [mark for mark in widths if found[mark] == max(found.values())]
    return next((mark for mark in best if _is_table(widths[mark])), best[0])


def _widths(data: bytes, delimiter: str) -> list[list[str | None]]:
    """The fields of the header and of the first records that are complete; [] where one cannot be read."""
    final = len(data) < _BEGINNING
    found = find_records(data, ord(delimiter), final)
    starts, ends = drop_blank(found.ends, np.frombuffer(data, np.uint8))
    spans = list(zip(starts.tolist(), ends.tolist(), strict=True))[: 1 + _RECORDS]
    records: list[list[str | None]] = []
    for start, end in spans:
        try:
            fields = parse_fields(data[start:end].decode(), delimiter)
        except UnicodeDecodeError:
            fields = None
        if fields is None:
            return []
        records.append(fields)
    return records


def _is_table(records: list[list[str | None]]) -> bool:
    """Whether there are records, all as wide as the header, which has several columns."""
    return len(records) > 1 and len(records[0]) > 1 and len({len(fields) for fields in records}) == 1
