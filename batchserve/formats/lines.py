"""Planning of texts whose records are lines: chunks are cut by counting newlines, several times as fast as by looking
for the records, as long as nothing says that lines and records may differ."""

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from types import ModuleType
from typing import BinaryIO

import numpy as np

from batchserve.domain import Chunk, ChunkLimits
from batchserve.formats.matrices import FEWEST_BYTES
from batchserve.formats.records import MAX_RECORD, Scan, cut

__all__ = ["cut_lines"]

_FEWEST_RECORDS = 10_000
"""In chunks of fewer, as slow models get, a block would be looked at for each of them."""
_BLOCK = 4 * 2**20
_SLACK = 64


@cache
def fast_counter() -> ModuleType | None:
    """The compiled counting; None where the extra `fast` is missing, or unfit for this numpy."""
    try:
        from batchserve.formats.kernels import newlines  # takes seconds where it has to be compiled first
    except ImportError:
        return None
    return newlines


def cut_lines(
    source: BinaryIO, start: int, scan: Scan, after: Chunk | None, limits: ChunkLimits, *, is_json: bool
) -> Iterator[Chunk]:
    """The chunks of `cut`, for a CSV or for JSON in lines: counted, from the first odd line on found by `scan`."""
    end = source.seek(0, os.SEEK_END)
    begin = after.stop if after else start
    is_worth = end - begin >= FEWEST_BYTES and limits.records >= _FEWEST_RECORDS and limits.bytes <= MAX_RECORD
    if is_worth and (counter := fast_counter()) is not None:
        lines = _Lines(counter, source, end, is_json)
        while (chunk := lines.next_chunk(after, begin, limits)) is not None:
            yield chunk
            if chunk.stop == end:
                return
            after, begin = chunk, chunk.stop
    yield from cut(source, start, scan, after, limits)


@dataclass(slots=True)
class _Lines:
    """The lines of a source that ends at byte `end`, in blocks."""

    counter: ModuleType
    source: BinaryIO
    end: int
    is_json: bool
    text: np.ndarray = field(default_factory=lambda: np.zeros(_BLOCK + _SLACK, np.uint8))
    start: int = 0
    stop: int = 0
    """Where the bytes of the block are in the source."""

    def next_chunk(self, after: Chunk | None, begin: int, limits: ChunkLimits) -> Chunk | None:
        """None: it is not known by counting."""
        limit = min(begin + limits.bytes, self.end)
        at, stop, records, opened, returned = begin, begin, 0, 1, 0
        while at < limit and records < limits.records:
            if not self._holds(at):
                return None
            until = min(limit, self.stop)
            found, behind, odd, opened, returned = self.counter.count_records(
                *(self.text, at - self.start, until - self.start, limits.records - records),
                *(self.is_json, opened, returned),
            )
            if odd:
                return None
            records += int(found)
            stop = self.start + int(behind) if behind else stop
            at = until
        if limit == self.end and records < limits.records and not opened:
            if returned:
                return None
            records, stop = records + 1, self.end  # the last line has no newline
        if stop == begin or (stop < self.end and not self._begins(stop)):
            return None
        return Chunk(after.first_record + after.records if after else 0, records, begin, stop)

    def _holds(self, at: int) -> bool:
        """Whether the block has this byte of the source, once another was read."""
        if not self.start <= at < self.stop:
            self.source.seek(at)
            self.start = self.stop = at
            block = memoryview(self.text.data)[:_BLOCK]
            while (more := block[self.stop - at :]) and (read := self.source.readinto(more)):  # type: ignore[attr-defined]
                self.stop += read
        return at < self.stop

    def _begins(self, at: int) -> bool:
        """Whether a record begins at this byte: a chunk is closed only when a further one is known."""
        if not self._holds(at):
            return False
        byte = chr(self.text[at - self.start])
        return byte == "{" if self.is_json else byte not in "\r\n"
