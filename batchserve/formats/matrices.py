"""Numbers of a text as the matrices that a model takes, and the columns that are left as a smaller text.

With the extra `fast` a text of records that all have the form of the first one is read several times as fast as by
polars, whose answers are the same. What that reading does not cover is left to polars: single records, or all.
"""

import codecs
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import repeat
from types import ModuleType

import numpy as np
import polars as pl

from batchserve.domain import DType
from batchserve.formats.protocol import Block, Matrix, Reading
from batchserve.formats.schema import numpy_type

__all__ = ["FEWEST_BYTES", "READABLE", "Fields", "Layout", "fast_reader", "read_layout", "with_flagged"]

FEWEST_BYTES = 2**20
"""Of a text that is read so: to load what is compiled takes longer than reading less of it."""
READABLE: tuple[DType, ...] = (*("float32", "float64", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32"),)
"""Types of numbers that are read so."""
_SLACK = 96
"""Bytes that may be read behind a record."""
_PROBE = 2**16
"""Bytes that are tried first."""
_LONGEST = 2**32 - 2**17
"""Places in a text are kept as 32 bits."""
_FLAGGED = 4
"""One in so many records may be left to polars, and as many more."""
_KINDS = {"float32": 1, "float64": 2}
_INTEGER = 3
_FLAGGED_BEFORE = 2
"""The place of the number of flagged records in the state of the reading."""


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
    flagged: list[list[int]]
    """Number, start and stop of the records whose numbers are not known."""


def read_layout(
    data: bytes, layout: Layout, blocks: Sequence[Block], keep: Collection[str], texts: Collection[str], records: int
) -> Fields | None:
    """The numbers of `blocks`, and the columns to `keep`, of which those named by `texts` hold texts in JSON. None
    where the records have another form."""
    reader = fast_reader()
    if reader is None or not records or len(data) > _LONGEST:
        return None
    reading = _Reading(reader, layout, blocks, keep, texts)
    if len(data) > _PROBE and not reading.fits(data[: data.rfind(b"\n", 0, _PROBE) + 1]):
        return None
    return reading.read(data, records)


def with_flagged(
    reading: Reading, data: bytes, fields: Fields, blocks: Sequence[Block], read: Callable[[bytes, int], Reading]
) -> Reading | None:
    """The reading with the numbers and errors of the flagged records, which `read` gives for their bytes and count.
    None where one of them is no record: then it lacks its other columns, too."""
    if not fields.flagged:
        return reading
    ended = data if data.endswith(b"\n") else data + b"\n"
    rows = [row for row, _, _ in fields.flagged]
    slow = read(b"".join(ended[start:stop] for _, start, stop in fields.flagged), len(rows))
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

    def fits(self, lines: bytes) -> bool:
        """Whether the first records are such that the others are worth reading."""
        return bool(lines) and self.read(lines, lines.count(b"\n")) is not None

    def read(self, data: bytes, records: int) -> Fields | None:
        arrays = self._arrays(records)
        kept = np.empty(len(data) + _SLACK if self._keeps else 0, np.uint8)
        flagged = np.empty((_FLAGGED + records // _FLAGGED, 3), np.int64)
        state = np.zeros(len(self._reader.STATE), np.int64)
        # The last records are read from a copy with slack behind them.
        cut = data.rfind(b"\n", 0, max(len(data) - _SLACK, 0)) + 1
        tail = self._ended(data[cut:])
        for text, stop, start in ((data, cut, 0), (tail + bytes(_SLACK), len(tail), cut)):
            known = int(state[_FLAGGED_BEFORE])
            if not self._reader.read_fields(
                *(np.frombuffer(text, np.uint8), stop, ord(self._layout.delimiter), ord(self._layout.point)),
                *(self._layout.is_json, self._before, self._after, self._columns, *arrays.values()),
                *(kept, flagged, self._marks, records, state),
            ):
                return None
            flagged[known : int(state[_FLAGGED_BEFORE]), 1:] += start
        row, used, bad, lines, returns, high = state.tolist()
        if row != records or returns != (lines if self._layout.after == b"\r" else 0):
            return None
        if high and not _is_utf8(data):
            return None
        return Fields(self._matrices(arrays, records), kept[:used].tobytes(), flagged[:bad].tolist())

    def _ended(self, tail: bytes) -> bytes:
        if tail.endswith(b"\n"):
            return tail
        bare = self._layout.after.endswith(b"\r") and not tail.endswith(b"\r")
        return tail + (b"\r\n" if bare else b"\n")

    def _arrays(self, records: int) -> dict[str, np.ndarray]:
        """Those that the numbers of each kind are written to, block behind block."""
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
            sizes[kind] += records * len(block.columns)
        arrays = {kind: np.empty(size, kind) for kind, size in sizes.items()}
        return {**arrays, "absent": np.empty(sizes["int64"], np.bool_)}

    def _matrices(self, arrays: Mapping[str, np.ndarray], records: int) -> dict[str, Matrix]:
        matrices: dict[str, Matrix] = {}
        starts = dict.fromkeys(arrays, 0)
        for block in self._blocks:
            kind = block.dtype if block.dtype in arrays else "int64"
            shape = records, len(block.columns)
            start = starts[kind]
            starts[kind] = stop = start + records * len(block.columns)
            values = arrays[kind][start:stop].reshape(shape)
            absent = arrays["absent"][start:stop].reshape(shape) if kind == "int64" else None
            matrices[block.name] = Matrix(values.astype(numpy_type(block.dtype), copy=False), absent)
        return matrices


def _is_utf8(data: bytes) -> bool:
    """In blocks: a text of all of it would take as much memory again."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        for start in range(0, len(data), _PROBE):
            decoder.decode(data[start : start + _PROBE])
        decoder.decode(b"", final=True)
    except UnicodeDecodeError:
        return False
    return True
