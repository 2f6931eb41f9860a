"""Some rows of a large Arrow record batch as a small one, read without the rest of it."""

import struct
from typing import Any, BinaryIO, NoReturn

import numpy as np

from batchserve.errors import InvalidInput
from batchserve.formats.wire.ipc import (
    BODY_LIMIT,
    DAMAGE,
    OFFSET_WIDTHS,
    Field,
    Flat,
    Kind,
    Message,
    Schema,
    encapsulate,
    read_metadata,
)

__all__ = ["Unsliceable", "slice_batch"]

_VIEW_WIDTH = 16
"""Bytes of one value in a view column: its text, or where its text is."""


def slice_batch(source: BinaryIO, schema: Schema, message: Message, first: int, stop: int) -> tuple[bytes, int]:
    """A record-batch message with the rows `first` to `stop` of a flat one, and how many rows before `first` it holds.

    Only the bytes of these rows are read. The new message begins up to 7 rows early, where bitmaps have a byte border.
    Numbers in the metadata are overwritten in place. Raises Unsliceable for compressed bodies and nested columns, and
    InvalidInput when buffers are shorter than the rows need.
    """
    metadata = bytearray(read_metadata(source, message.start, message.body))
    try:
        slicer = _Slicer(source, message, metadata, first - first % 8, stop)
        slicer.cut(schema)
    except DAMAGE as error:
        raise InvalidInput(f"the record batch at byte {message.start} is damaged") from error
    body = b"".join(slicer.body)
    slicer.finish(len(body))
    return encapsulate(bytes(metadata), body), first % 8


class Unsliceable(Exception):
    """The rows of this record batch can only be had by reading it as a whole."""


class _Slicer:
    def __init__(self, source: BinaryIO, message: Message, metadata: bytearray, first: int, stop: int) -> None:
        self._source, self._message, self._metadata = source, message, metadata
        self._first, self._stop = first, stop
        self._root = Flat.root(bytes(metadata))
        self._batch = self._root.required(2)
        self._nodes, self._node_count = self._batch.vector(1, 16)
        self._buffers, self._buffer_count = self._batch.vector(2, 16)
        views, count = self._batch.vector(4, 8)
        self._variadic = iter(struct.unpack_from(f"<{count}q", metadata, views))
        self._node = self._buffer = 0
        self.body: list[bytes] = []
        self._length = 0

    def cut(self, schema: Schema) -> None:
        if not schema.flat or self._batch.place(3) is not None:
            raise Unsliceable
        for column in schema.columns:
            self._cut_column(column)
        if (self._node, self._buffer) != (self._node_count, self._buffer_count):
            self._damaged("it has buffers that no column needs")

    def finish(self, length: int) -> None:
        for table, field, value in ((self._batch, 0, self._stop - self._first), (self._root, 3, length)):
            place = table.place(field)
            if place is None:
                if value:
                    self._damaged("its length is missing")
            else:
                struct.pack_into("<q", self._metadata, place, value)

    def _cut_column(self, column: Field) -> None:
        if self._node >= self._node_count:
            self._damaged("a column is missing")
        node = self._nodes + 16 * self._node
        self._node += 1
        rows = self._stop - self._first
        if column.kind == Kind.NULL and not column.encoded:
            struct.pack_into("<qq", self._metadata, node, rows, rows)
            return
        validity = self._copy(1, optional=True)
        valid = int(np.unpackbits(np.frombuffer(validity, np.uint8), count=rows, bitorder="little").sum())
        struct.pack_into("<qq", self._metadata, node, rows, rows - valid if validity else 0)
        if column.width is not None:
            self._copy(column.width)
        elif column.kind in OFFSET_WIDTHS:
            self._copy_variable(OFFSET_WIDTHS[column.kind])
        else:
            self._copy(8 * _VIEW_WIDTH)
            for _ in range(next(self._variadic, 0)):
                offset, length = self._next_buffer()
                self._check_bound(length)
                self._add(self._read(offset, length))

    def _copy(self, width: int, *, optional: bool = False) -> bytes:
        """Copies the rows of a buffer with `width` bits per row."""
        offset, length = self._next_buffer()
        if optional and not length:
            self._add(b"")
            return b""
        start, stop = self._first * width // 8, (self._stop * width + 7) // 8
        if stop > length:
            self._damaged(f"a buffer has {length} bytes, its rows need {stop}")
        data = self._read(offset + start, stop - start)
        self._add(data)
        return data

    def _copy_variable(self, width: int) -> None:
        offset, length = self._next_buffer()
        stop = (self._stop + 1) * width
        if stop > length:
            self._damaged(f"a buffer has {length} bytes, its rows need {stop}")
        start = self._first * width
        ends = np.frombuffer(self._read(offset + start, stop - start), f"<i{width}")
        offset, length = self._next_buffer_after(ends - ends[0])
        first, last = int(ends[0]), int(ends[-1])
        if first < 0 or last > length or np.any(ends[1:] < ends[:-1]):
            self._damaged("the offsets of a column lead out of its values")
        self._check_bound(last - first)
        self._add(self._read(offset + first, last - first))

    def _next_buffer_after(self, offsets: "np.ndarray[Any, Any]") -> tuple[int, int]:
        self._add(offsets.tobytes())
        return self._next_buffer()

    def _next_buffer(self) -> tuple[int, int]:
        if self._buffer >= self._buffer_count:
            self._damaged("a buffer is missing")
        offset, length = struct.unpack_from("<qq", self._metadata, self._buffers + 16 * self._buffer)
        self._buffer += 1
        if offset < 0 or length < 0 or self._message.body + offset + length > self._message.stop:
            self._damaged("a buffer lies outside of its body")
        return offset, length

    def _read(self, offset: int, length: int) -> bytes:
        self._source.seek(self._message.body + offset)
        return self._source.read(length)

    def _add(self, data: bytes) -> None:
        """Puts the data of the current buffer at the end of the body, padded to 64 bytes."""
        place = self._buffers + 16 * (self._buffer - 1)
        struct.pack_into("<qq", self._metadata, place, self._length, len(data))
        padding = -len(data) % 64
        self.body += [data, bytes(padding)]
        self._length += len(data) + padding

    def _check_bound(self, length: int) -> None:
        if self._length + length > BODY_LIMIT:
            raise InvalidInput(
                f"{self._stop - self._first} rows of the record batch at byte {self._message.start} "
                f"hold more than {BODY_LIMIT} bytes: write smaller record batches"
            )

    def _damaged(self, why: str) -> NoReturn:
        raise InvalidInput(f"the record batch at byte {self._message.start} is damaged: {why}")
