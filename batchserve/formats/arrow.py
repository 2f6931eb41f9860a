"""Arrow IPC, as a file and as a stream: cut at record batches, assembled by copying their messages."""

import io
import os
from abc import ABC, abstractmethod
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import takewhile
from typing import BinaryIO

import polars as pl

from batchserve.domain import Chunk, ChunkLimits, DType
from batchserve.errors import InvalidInput, SchemaMismatch
from batchserve.formats.frames import SAMPLE, decoding, plain, typed
from batchserve.formats.protocol import Header, Holds, Open, Part, Reading, Records
from batchserve.formats.records import check_names, check_width, table
from batchserve.formats.wire import ipc
from batchserve.formats.wire.ipc_slice import Unsliceable, slice_batch
from batchserve.storage import Piece, Span

__all__ = ["ArrowFile", "ArrowStream"]


class _Arrow(ABC):
    """Base of file and stream. A chunk's `start` and `stop` are the bytes from its first record-batch message to behind
    its last one; chunks that are slices of one large batch have the same, and differ in their records.

    A slice of an uncompressed batch without nested columns costs its own bytes. Any other batch is read as a whole
    for every slice of it, and refused above 256 MiB (unpacked).
    """

    name: str
    media_type: str
    suffix: str
    _lead: bytes
    """Bytes before the schema message in written files."""

    @abstractmethod
    def _schema(self, source: BinaryIO) -> ipc.Schema: ...

    @abstractmethod
    def _messages(self, source: BinaryIO, start: int) -> Iterator[ipc.Message]:
        """The messages from byte `start` on, of which the first stands there; 0: from the beginning."""

    @abstractmethod
    def _dictionaries(self, source: BinaryIO, stop: int, /) -> Iterator[ipc.Message]:
        """The dictionaries needed to read up to byte `stop`."""

    @abstractmethod
    def _contain(self, schema: bytes, pieces: Iterable[tuple[Piece, ipc.Message]]) -> Iterator[Piece]:
        """A file or stream of a schema message and record batches."""

    def header(self, source: BinaryIO) -> Header:
        chunk = next(self.plan(source, None, ChunkLimits(records=SAMPLE)))
        sample = self.read(source, chunk, {}).records
        assert isinstance(sample, pl.DataFrame)
        check_width(sample.width)
        check_names(sample.columns)
        return Header(dict(sample.schema), lambda: sample)

    def plan(
        self,
        source: BinaryIO,
        after: Chunk | None,
        limits: ChunkLimits,
    ) -> Iterator[Chunk]:
        position, first_record = self._resume(source, after)
        begin = after.first_record + after.records if after else 0
        chunk: Chunk | None = None
        self._schema(source)
        for batch in self._messages(source, position):
            last_record = first_record + batch.records
            if batch.records and last_record > begin:
                if chunk and (
                    last_record - chunk.first_record > limits.records or batch.stop - chunk.start > limits.bytes
                ):
                    yield chunk
                    chunk = None
                if chunk:
                    chunk = replace(chunk, records=last_record - chunk.first_record, stop=batch.stop)
                elif first_record >= begin and batch.records <= _step(batch, limits):
                    chunk = Chunk(first_record, batch.records, batch.start, batch.stop)
                else:
                    yield from _slices(batch, max(begin, first_record), last_record, limits)
            first_record = last_record
        if chunk:
            yield chunk
        elif after is None and first_record == 0:
            end = source.seek(0, os.SEEK_END)
            yield Chunk(0, 0, end, end)

    def end(self, source: BinaryIO) -> int:
        return source.seek(0, os.SEEK_END)

    def read(
        self,
        source: BinaryIO,
        chunk: Chunk,
        types: Mapping[str, DType],
        columns: Sequence[str] | None = None,
    ) -> Reading:
        schema = self._schema(source)
        messages = self._between(source, chunk.start, chunk.stop) if chunk.records else []
        dictionaries = list(self._dictionaries(source, chunk.start)) if schema.has_dictionaries else []
        skip = 0
        if sum(message.records for message in messages) == chunk.records:
            batches = self._whole(source, messages)
        else:
            if len(messages) != 1:
                raise InvalidInput(
                    f"the Arrow input is damaged: from byte {chunk.start} to {chunk.stop} there are {len(messages)} "
                    f"record batches, of other lengths than planning saw"
                )
            (batch,) = messages
            skip = chunk.first_record - self._records_before(source, batch.start)
            try:
                data, skip = slice_batch(source, schema, batch, skip, skip + chunk.records)
                batches = [data]
            except Unsliceable:
                batches = self._whole(source, messages)
        stream = b"".join([schema.message, *self._whole(source, dictionaries), *batches, ipc.END])
        with decoding(f"the Arrow data from byte {chunk.start} to {chunk.stop}"):
            frame = pl.read_ipc_stream(io.BytesIO(stream))
        return typed(frame.slice(skip, chunk.records), chunk, types, columns)

    def write(self, records: Records) -> bytes:
        buffer = io.BytesIO()
        # Every reader supports the oldest level; views and the like are newer than many readers.
        plain(table(records, self.name)).write_ipc_stream(buffer, compat_level=pl.CompatLevel.oldest())
        schema, *batches = ipc.walk(buffer, 0)
        view = buffer.getvalue()
        pieces = ((view[batch.start : batch.stop], batch) for batch in batches)
        return b"".join(piece for piece in self._contain(view[: schema.stop], pieces) if isinstance(piece, bytes))

    def assemble(
        self,
        parts: Iterable[Part],
        open: Open,
        records: int,
    ) -> Iterator[Piece]:
        parts = iter(parts)
        first = next(parts)
        with open(first.key) as source:
            schema = self._own_schema(source)
        yield from self._contain(schema, self._batches([first], parts, open, schema, records))

    def _batches(
        self, first: Iterable[Part], others: Iterable[Part], open: Open, schema: bytes, records: int
    ) -> Iterator[tuple[Piece, ipc.Message]]:
        """The record batches of all parts. Raises SchemaMismatch when one has another schema, ValueError when their
        records are not `records`."""
        count = 0
        for part in (part for parts in (first, others) for part in parts):
            with open(part.key) as source:
                if self._own_schema(source) != schema:
                    raise SchemaMismatch(f"part {part.key} has other columns or types than the first part")
                batches = [message for message in self._messages(source, 0) if message.is_batch and message.records]
            for batch in batches:
                count += batch.records
                yield Span(part.key, batch.start, batch.stop), batch
        if count != records:
            raise ValueError(f"expected {records} records in the parts, got {count}")

    def _own_schema(self, source: BinaryIO) -> bytes:
        """The schema message of a part: equal columns of equal types give equal bytes."""
        return next(ipc.copies(source, [ipc.read_message(source, len(self._lead))]))

    def _resume(self, source: BinaryIO, after: Chunk | None) -> tuple[int, int]:
        """Where to continue: the position of a message, and the number of the first record after it."""
        if after is None or not after.records:
            return 0, 0
        done = sum(message.records for message in self._between(source, after.start, after.stop))
        return (after.stop, after.first_record + after.records) if done == after.records else (0, 0)

    def _between(self, source: BinaryIO, start: int, stop: int) -> list[ipc.Message]:
        return list(takewhile(lambda message: message.start < stop, self._messages(source, start)))

    def _records_before(self, source: BinaryIO, stop: int) -> int:
        return sum(message.records for message in self._between(source, 0, stop))

    def _whole(self, source: BinaryIO, messages: Sequence[ipc.Message]) -> list[bytes]:
        for message in messages:
            size = ipc.decoded_bytes(source, message)
            if size > ipc.BODY_LIMIT:
                raise InvalidInput(
                    f"the record batch at byte {message.start} has {size} bytes and is compressed or nested: "
                    f"write record batches of at most {max(1, message.records * ipc.BODY_LIMIT // size)} rows"
                )
        return list(ipc.copies(source, messages))


class ArrowStream(_Arrow):
    """The stream format: messages and an end mark. A dictionary that replaces an older one is understood, a delta
    is refused by InvalidInput."""

    name = "arrows"
    media_type = "application/vnd.apache.arrow.stream"
    suffix = ".arrows"
    family = "arrow"
    holds: Holds = "table"
    is_text = False
    has_types = True
    chunk_scale = 1
    _lead = b""

    def _schema(self, source: BinaryIO) -> ipc.Schema:
        message = ipc.read_message(source, 0)
        return ipc.Schema.parse(next(ipc.copies(source, [message])))

    def _messages(self, source: BinaryIO, start: int) -> Iterator[ipc.Message]:
        return ipc.walk(source, start)

    def _dictionaries(self, source: BinaryIO, stop: int) -> Iterator[ipc.Message]:
        return (message for message in self._between(source, 0, stop) if message.is_dictionary)

    def _contain(self, schema: bytes, pieces: Iterable[tuple[Piece, ipc.Message]]) -> Iterator[Piece]:
        yield schema
        for piece, _ in pieces:
            yield piece
        yield ipc.END


class ArrowFile(_Arrow):
    """The file format (Feather 2): `ARROW1`, the stream, a footer that tells where the messages are."""

    name = "arrow"
    media_type = "application/vnd.apache.arrow.file"
    suffix = ".arrow"
    family = "arrow"
    holds: Holds = "table"
    is_text = False
    has_types = True
    chunk_scale = 1
    _lead = ipc.MAGIC.ljust(8, b"\0")

    def _schema(self, source: BinaryIO) -> ipc.Schema:
        return ipc.read_footer(source).schema

    def _messages(self, source: BinaryIO, start: int) -> Iterator[ipc.Message]:
        places = ipc.read_footer(source).batches
        for place in places[bisect_left(places, start) :]:
            yield ipc.read_message(source, place)

    def _dictionaries(self, source: BinaryIO, _stop: int) -> Iterator[ipc.Message]:
        return (ipc.read_message(source, place) for place in ipc.read_footer(source).dictionaries)

    def _contain(self, schema: bytes, pieces: Iterable[tuple[Piece, ipc.Message]]) -> Iterator[Piece]:
        yield self._lead + schema
        position = len(self._lead) + len(schema)
        blocks = []
        for piece, message in pieces:
            yield piece
            blocks.append((position, message.body - message.start, message.stop - message.body))
            position += message.stop - message.start
        yield ipc.file_footer(schema, blocks)


def _step(batch: ipc.Message, limits: ChunkLimits) -> int:
    """Records of a batch in a chunk."""
    return max(1, min(limits.records, limits.bytes * batch.records // (batch.stop - batch.start)))


def _slices(batch: ipc.Message, first_record: int, last_record: int, limits: ChunkLimits) -> Iterator[Chunk]:
    step = _step(batch, limits)
    for first in range(first_record, last_record, step):
        yield Chunk(first, min(step, last_record - first), batch.start, batch.stop)
