"""Cutting bytes into chunks of whole records, for formats whose records have no stored length."""

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np
import numpy.typing as npt
import polars as pl

from batchserve.domain import Chunk, ChunkLimits
from batchserve.errors import InvalidInput, InvalidOptions
from batchserve.formats.protocol import Records

__all__ = [
    "BLOCK_RECORDS",
    "MAX_COLUMNS",
    "MAX_RECORD",
    "Offsets",
    "Scan",
    "Scanned",
    "Window",
    "blocks",
    "check_names",
    "check_width",
    "cut",
    "drop_blank",
    "has_lone_returns",
    "line_at",
    "read_span",
    "read_up_to",
    "table",
]

Offsets = npt.NDArray[np.int64]

BLOCK_RECORDS = 4096
"""Records that are read together after a chunk was found faulty: a fault slows down only its block."""
MAX_COLUMNS = 16_384
"""Most columns of an input, or arrays of an npz."""
MAX_RECORD = 64 * 2**20
"""Most bytes of a record or an image."""
_FIRST_READ = 64 * 2**10
_MAX_READ = 4 * 2**20


@dataclass(frozen=True, slots=True)
class Window:
    """Bytes that begin with a record. `offset` and `record` are its position in the input; `final`: nothing follows."""

    data: bytes
    offset: int
    record: int
    final: bool


@dataclass(frozen=True, slots=True)
class Scanned:
    """`ends` of the whole records in a window (blank ones left out), how much of it is `consumed`, and whether the
    records of the input end there (`done`)."""

    ends: Offsets
    consumed: int
    done: bool


Scan = Callable[[Window], Scanned]


def cut(source: BinaryIO, start: int, scan: Scan, after: Chunk | None, limits: ChunkLimits) -> Iterator[Chunk]:
    """The chunks that follow `after` in an input whose records begin at byte `start`.

    A chunk is closed only when a further record is known, so the last one reaches to the end of the records.
    Raises InvalidInput for a record longer than 64 MiB.
    """
    begin, first = (after.stop, after.first_record + after.records) if after else (start, 0)
    rest, position, size = b"", begin, _FIRST_READ
    pending = np.empty(0, np.int64)
    done = False
    while not done:
        source.seek(position + len(rest))  # the consumer of the chunks may read the source meanwhile
        fresh = source.read(size)
        window = Window(rest + fresh, position, first + len(pending), final=not fresh)
        found = scan(window)
        pending = np.concatenate([pending, found.ends + position])
        position += found.consumed
        rest = window.data[found.consumed :]
        done = found.done or window.final
        if len(rest) > MAX_RECORD and not done:
            raise _too_long(source, position, first + len(pending))
        # Twice the unfinished record: rescanning it stays linear in its length.
        size = max(min(size * 4, _MAX_READ), 2 * len(rest))
        while (count := _fitting(pending, begin, limits)) < len(pending):
            stop = int(pending[count - 1])
            yield Chunk(first, count, begin, stop)
            pending, begin, first = pending[count:], stop, first + count
    if len(pending) or (after is None and first == 0):
        yield Chunk(first, len(pending), begin, position)


def _fitting(ends: Offsets, begin: int, limits: ChunkLimits) -> int:
    fitting = int(np.searchsorted(ends, begin + limits.bytes, side="right"))
    return max(1, min(fitting, limits.records))


def _too_long(source: BinaryIO, position: int, record: int) -> InvalidInput:
    return InvalidInput(
        f"record {record}, which begins in line {line_at(source, position)} at byte {position}, is longer than "
        f"{MAX_RECORD >> 20} MiB",
        errors=[{"row": record, "message": "record too long"}],
    )


def line_at(source: BinaryIO, position: int) -> int:
    """The number of the line of a byte, as in an editor."""
    source.seek(0)
    line, left = 1, position
    while left and (block := source.read(min(left, _MAX_READ))):
        line += block.count(b"\n")
        left -= len(block)
    return line


def drop_blank(ends: Offsets, data: npt.NDArray[np.uint8]) -> tuple[Offsets, Offsets]:
    """Starts and ends of the lines that are not empty."""
    starts = np.concatenate([np.zeros(1, np.int64), ends[:-1]]) if len(ends) else ends
    lengths = ends - starts
    if not len(ends) or int(lengths.min()) > 2:
        return starts, ends
    first = data[starts]
    blank = (lengths == 1) & ((first == 10) | (first == 13))
    short = np.flatnonzero(lengths == 2)
    blank[short] = (first[short] == 13) & (data[starts[short] + 1] == 10)
    return (starts[~blank], ends[~blank]) if blank.any() else (starts, ends)


def has_lone_returns(array: npt.NDArray[np.uint8], lines: Offsets) -> bool:
    """Whether there are carriage returns that no newline follows. `lines`: behind each newline."""
    first, last = np.searchsorted(lines, [2, len(array) + 1])
    returns = int(np.count_nonzero(array == ord("\r")))
    return returns != int(np.count_nonzero(array[lines[first:last] - 2] == ord("\r")))


def blocks(data: bytes, starts: Offsets, ends: Offsets) -> Iterator[tuple[int, bytes, Offsets, Offsets]]:
    """Runs of BLOCK_RECORDS records: number of the first, the bytes without blank lines, starts and ends in them."""
    for first in range(0, len(starts), BLOCK_RECORDS):
        s, e = starts[first : first + BLOCK_RECORDS], ends[first : first + BLOCK_RECORDS]
        begin, stop = int(s[0]), int(e[-1])
        if (s[1:] == e[:-1]).all():
            yield first, data[begin:stop], s - begin, e - begin
        else:
            block = b"".join(data[a:b] for a, b in zip(s.tolist(), e.tolist(), strict=True))
            stops = np.cumsum(e - s)
            yield first, block, stops - (e - s), stops


def check_names(names: Collection[str]) -> None:
    """Raises InvalidInput for a column without a name."""
    if any(not name.strip() for name in names):
        raise InvalidInput(
            "the input has a column with an empty name; every column needs a name",
            errors=[{"column": name, "message": "no name"} for name in names if not name.strip()],
        )


def name_outer(names: Sequence[str]) -> list[str]:
    """The names of a header, with those that pandas gives to columns before the first name and behind the last: an
    index is written without a name, and lines may end with a delimiter."""
    named = [place for place, name in enumerate(names) if name.strip()]
    return [
        f"Unnamed: {place}" if named and not named[0] <= place <= named[-1] else name
        for place, name in enumerate(names)
    ]


def check_width(columns: int) -> None:
    """Raises InvalidInput for too many columns: each costs memory in every chunk."""
    if columns > MAX_COLUMNS:
        raise InvalidInput(f"the input has {columns} columns; at most {MAX_COLUMNS} are allowed")


def read_span(source: BinaryIO, start: int, stop: int) -> bytes:
    """Bytes `start` to `stop`. Raises InvalidInput when the input has become shorter."""
    source.seek(start)
    data = read_up_to(source, stop - start)
    if len(data) != stop - start:
        raise InvalidInput(f"the input ends at byte {start + len(data)}, planning saw at least {stop} bytes")
    return data


def read_up_to(source: BinaryIO, size: int) -> bytes:
    """`size` bytes, fewer only at the end of the source: a single `read` may return less."""
    data = source.read(size)
    while len(data) < size and (more := source.read(size - len(data))):
        data += more
    return data


def table(records: Records, format: str) -> pl.DataFrame:
    """The records as a table. Raises InvalidOptions for tensors: a text format has columns."""
    if not isinstance(records, pl.DataFrame):
        raise InvalidOptions(f"{format} holds a table, these records are tensors: choose npz or npy")
    return records
