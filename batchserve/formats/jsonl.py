"""NDJSON: a JSON object in each line."""

import io
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import BinaryIO

import numpy as np

from batchserve.domain import Chunk, ChunkLimits, DType
from batchserve.errors import InvalidInput
from batchserve.formats.json_matrices import read_matrices
from batchserve.formats.json_rows import Row, parse_rows
from batchserve.formats.json_table import (
    SAMPLE,
    columns_of,
    find_lines,
    header_of,
    may_be_all,
    ndjson,
    read_few,
    read_lines,
)
from batchserve.formats.lines import cut_lines
from batchserve.formats.protocol import Block, Header, Holds, MatrixReader, Open, Part, Reading, Records
from batchserve.formats.records import (
    Offsets,
    Scanned,
    Window,
    has_lone_returns,
    line_at,
    read_span,
    read_up_to,
    table,
)
from batchserve.storage import Piece, Span

__all__ = ["Jsonl"]

_BOM = b"\xef\xbb\xbf"
_BETWEEN_LINES = re.compile(rb"\}[ \t\r]*\r[ \t\r]*\{")
"""Between two objects in one line: never part of a value, as no text contains a carriage return."""


class Jsonl(MatrixReader):
    """One JSON object in each line; blank lines, even with spaces, are not records."""

    name = "jsonl"
    media_type = "application/x-ndjson"
    suffix = ".jsonl"
    family = "json"
    holds: Holds = "table"
    is_text = True
    has_types = True
    chunk_scale = 1

    def header(self, source: BinaryIO) -> Header:
        first = next(self.plan(source, None, SAMPLE))
        if not first.records:
            raise InvalidInput("the input is empty; expected one JSON object in each line")
        return header_of(self.read(source, first, {}))

    def plan(self, source: BinaryIO, after: Chunk | None, limits: ChunkLimits) -> Iterator[Chunk]:
        source.seek(0)
        start = len(_BOM) if read_up_to(source, len(_BOM)) == _BOM else 0
        return cut_lines(source, start, partial(_scan_lines, source), after, limits, is_json=True)

    def end(self, source: BinaryIO) -> int:
        return source.seek(0, io.SEEK_END)

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
        sample = None if may_be_all(chunk) else self._sample(source)
        if blocks and sample is not None:
            reading = read_matrices(source, sample, types, chunk, blocks, kept)
            if reading is not None:
                return reading
        lines = read_span(source, chunk.start, chunk.stop)
        if sample is None:
            if not read_up_to(source, 1):
                return read_few(lines, chunk, types, columns)
            sample = self._sample(source)
        return read_lines(lines, chunk, columns_of(sample, types), columns)

    def _sample(self, source: BinaryIO) -> list[Row]:
        """The first records, which determine the columns."""
        first = next(self.plan(source, None, SAMPLE))
        return parse_rows(read_span(source, first.start, first.stop))

    def write(self, records: Records) -> bytes:
        return ndjson(table(records, self.name))

    def assemble(self, parts: Iterable[Part], _open: Open, _records: int) -> Iterator[Piece]:
        for part in parts:
            if part.bytes:
                yield Span(part.key, 0, part.bytes)


def _scan_lines(source: BinaryIO, window: Window) -> Scanned:
    _, ends, consumed = find_lines(window.data, window.final)
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
