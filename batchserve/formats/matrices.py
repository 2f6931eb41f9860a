"""Numbers of a text as the matrices that a model takes, and the columns that are left as a smaller text.

With the extra `fast` a text of records that all have the form of the first one is read several times as fast as by
polars, whose answers are the same. What that reading does not cover is left to polars: single records, or all.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import repeat
from types import ModuleType
from typing import BinaryIO

import numpy as np
import polars as pl

from batchserve.domain import Chunk, DType
from batchserve.formats.protocol import Block, Matrix, Reading
from batchserve.formats.schema import numpy_type
from batchserve.storage.ranged import RangedReader

__all__ = ["FEWEST_BYTES", "READABLE", "Fields", "Layout", "fast_reader", "read_layout", "with_flagged"]

FEWEST_BYTES = 2**20
"""Of a text that is read so: to load what is compiled takes longer than reading less of it."""
READABLE: tuple[DType, ...] = (*("float32", "float64", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32"),)
"""Types of numbers that are read so."""
_SLACK = 96
"""Bytes that may be read behind a record."""
_BLOCK = 2**20
"""Bytes that are read at a time: they stay in the cache, and what is left to polars is given up early."""
_NEWLINE, _RETURN = ord("\n"), ord("\r")
_LONGEST = 2**32 - 2**17
"""Places in a text are kept as 32 bits."""
_FLAGGED = 4
"""One in so many records may be left to polars, and as many more."""
_KINDS = {"float32": 1, "float64": 2}
_INTEGER = 3


@cache
def fast_reader() -> ModuleType | None:
    """The compiled reading; None where the extra `fast` is missing, or unfit for this numpy."""
    try:
        from batchserve.formats.kernels import fields  # takes seconds where it has to be compiled first
    except ImportError:
        return None
    return fields


@dataclass(frozen=True, slots=True)
class Layout:
    """The form of the records of a text, each in a line."""

    names: tuple[str, ...]
    delimiter: str
    point: str = "."
    before: tuple[bytes, ...] = ()
    """The text that the field of each column follows. (): that of a CSV, which is none."""
    after: bytes = b""
    """What stands between the last field and the newline."""

    @property
    def is_json(self) -> bool:
        return bool(self.before)


@dataclass(frozen=True, slots=True)
class Fields:
    """What was read of a text."""

    matrices: dict[str, Matrix]
    """By the names of the blocks."""
    kept: bytes
    """The columns that are kept, as a CSV without header in the order of the layout."""
    flagged: list[tuple[int, bytes]]
    """Number and line of the records whose numbers are not known."""


def read_layout(
    source: BinaryIO,
    chunk: Chunk,
    layout_of: Callable[[bytes], Layout | None],
    blocks: Sequence[Block],
    keep: Collection[str],
    texts: Collection[str],
) -> Fields | None:
    """The numbers of `blocks` in a chunk, and the columns to `keep`, of which those named by `texts` hold texts in
    JSON. None where the records have another form than the layout of the first line."""
    reader = fast_reader()
    if reader is None or not chunk.records or chunk.stop - chunk.start > _LONGEST:
        return None
    reading = None
    for text, stop in _whole_lines(source, chunk.start, chunk.stop):
        if reading is None:
            layout = layout_of(bytes(text[: int(np.argmax(text == _NEWLINE)) + 1]))
            if layout is None:
                return None
            reading = _Reading(reader, layout, blocks, keep, texts, chunk)
        if not reading.read(text, stop):
            return None
    return reading.fields() if reading is not None else None


def _whole_lines(source: BinaryIO, start: int, stop: int) -> Iterator[tuple[np.ndarray, int]]:
    """The lines of a stretch, block by block, in an array whose first bytes they are; the last one is ended. Fewer
    where the source is shorter, or a line longer than a block."""
    size = stop - start if isinstance(source, RangedReader) else min(_BLOCK, stop - start)
    text = np.empty(size + _SLACK, np.uint8)
    block = memoryview(text.data)
    have, at, ending = 0, start, b""
    while at < stop:
        source.seek(at)
        while want := min(size - have, stop - at):
            read = source.readinto(block[have : have + want])  # type: ignore[attr-defined]
            if not read:
                return
            have, at = have + read, at + read
        if not ending:
            ends = int(np.argmax(text[:have] == _NEWLINE))
            ending = b"\r\n" if ends and text[ends - 1] == _RETURN else b"\n"
        if at == stop and text[have - 1] != _NEWLINE:
            missing = b"\n" if text[have - 1] == _RETURN else ending
            block[have : have + len(missing)] = missing
            have += len(missing)
        cut = bytes(block[:have]).rfind(b"\n") + 1
        if not cut:
            return
        yield text, cut
        block[: have - cut] = bytes(block[cut:have])
        have -= cut


def with_flagged(
    reading: Reading, fields: Fields, blocks: Sequence[Block], read: Callable[[bytes, int], Reading]
) -> Reading | None:
    """The reading with the numbers and errors of the flagged records, which `read` gives for their bytes and count.
    None where one of them is no record: then it lacks its other columns, too."""
    if not fields.flagged:
        return reading
    rows = [row for row, _ in fields.flagged]
    slow = read(b"".join(line for _, line in fields.flagged), len(rows))
    assert isinstance(slow.records, pl.DataFrame)
    if any(error.column is None for error in slow.errors):
        return None
    for block in blocks:
        matrix = fields.matrices[block.name]
        for place, name in enumerate(block.columns):
            column = slow.records[name]
            if matrix.absent is not None:
                matrix.absent[rows, place] = column.is_null().to_numpy()
                column = column.fill_null(0)
            matrix.values[rows, place] = column.to_numpy()
    errors = [replace(error, record=rows[error.record]) for error in slow.errors]
    return replace(reading, errors=reading.errors + errors)


class _Reading:
    """The arrays that the compiled reading of a layout takes."""

    def __init__(
        self,
        reader: ModuleType,
        layout: Layout,
        blocks: Sequence[Block],
        keep: Collection[str],
        texts: Collection[str],
        chunk: Chunk,
    ) -> None:
        self._reader, self._layout, self._blocks, self._keeps = reader, layout, blocks, bool(keep)
        self._column = {name: number for number, name in enumerate(reader.COLUMNS)}
        self._columns = np.zeros((len(layout.names), len(self._column)), np.int64)
        before = bytearray()
        for name, text, row in zip(layout.names, layout.before or repeat(b""), self._columns, strict=False):
            row[self._column["before"]], row[self._column["before_bytes"]] = len(before), len(text)
            before += text + bytes(8)
            if name in keep:
                row[self._column["keep"]] = reader.TEXT if name in texts else reader.OTHER
        self._before = np.frombuffer(bytes(before), np.uint8)
        self._after = np.frombuffer(layout.after, np.uint8)
        self._marks = np.empty(reader.BLOCK + len(layout.names) + 64, np.uint32)
        self._records = chunk.records
        self._arrays = self._place()
        self._kept = np.empty(chunk.stop - chunk.start + _SLACK if keep else 0, np.uint8)
        self._places = np.empty((_FLAGGED + chunk.records // _FLAGGED, 3), np.int64)
        self._flagged: list[tuple[int, bytes]] = []
        self._state = np.zeros(len(reader.STATE), np.int64)

    def read(self, text: np.ndarray, stop: int) -> bool:
        """Adds the records that are the first bytes of the text. False where one has another form, or too many have odd
        numbers."""
        layout = self._layout
        if not self._reader.read_fields(
            *(text, stop, ord(layout.delimiter), ord(layout.point), layout.is_json, self._before, self._after),
            *(self._columns, *self._arrays.values(), self._kept, self._places, self._marks, self._records, self._state),
        ):
            return False
        state = dict(zip(self._reader.STATE, self._state.tolist(), strict=True))
        for row, start, end in self._places[len(self._flagged) : state["flagged"]].tolist():
            self._flagged.append((row, bytes(text[start:end])))
        return (
            len(self._flagged) <= _FLAGGED + state["row"] // _FLAGGED
            and state["returns"] == (state["lines"] if layout.after == b"\r" else 0)
            and (not state["high"] or _is_utf8(text[:stop]))
        )

    def fields(self) -> Fields | None:
        """What was read; None where it is not all of the chunk."""
        row, used = self._state[:2].tolist()
        if row != self._records:
            return None
        return Fields(self._matrices(), self._kept[:used].tobytes(), self._flagged)

    def _place(self) -> dict[str, np.ndarray]:
        """Arrays that the numbers of each kind are written to, block behind block."""
        sizes = dict.fromkeys(("float32", "float64", "int64"), 0)
        for block in self._blocks:
            kind = block.dtype if block.dtype in sizes else "int64"
            for offset, name in enumerate(block.columns):
                row = self._columns[self._layout.names.index(name)]
                row[self._column["kind"]] = _KINDS.get(block.dtype, _INTEGER)
                row[self._column["base"]] = sizes[kind] + offset
                row[self._column["stride"]] = len(block.columns)
                if kind == "int64":
                    limits = np.iinfo(block.dtype)
                    row[[self._column["low"], self._column["high"]]] = limits.min, limits.max
            sizes[kind] += self._records * len(block.columns)
        arrays = {kind: np.empty(size, kind) for kind, size in sizes.items()}
        return {**arrays, "absent": np.empty(sizes["int64"], np.bool_)}

    def _matrices(self) -> dict[str, Matrix]:
        matrices: dict[str, Matrix] = {}
        starts = dict.fromkeys(self._arrays, 0)
        for block in self._blocks:
            kind = block.dtype if block.dtype in self._arrays else "int64"
            shape = self._records, len(block.columns)
            start = starts[kind]
            starts[kind] = stop = start + self._records * len(block.columns)
            values = self._arrays[kind][start:stop].reshape(shape)
            absent = self._arrays["absent"][start:stop].reshape(shape) if kind == "int64" else None
            matrices[block.name] = Matrix(values.astype(numpy_type(block.dtype), copy=False), absent)
        return matrices


def _is_utf8(lines: np.ndarray) -> bool:
    try:
        str(lines.data, "utf-8")
    except UnicodeDecodeError:
        return False
    return True
