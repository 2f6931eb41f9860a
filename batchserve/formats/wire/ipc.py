"""The encapsulated messages of Arrow IPC: found, read, cut and put together, without decoding any values.

A message is a prefix (0xFFFFFFFF, then the length of the metadata as int32), the metadata (a flatbuffer with the table
Message at its root) and a body whose length the metadata tells. A stream is messages one after another: the schema,
dictionaries, record batches, and an end mark of 8 bytes. A file is `ARROW1`, messages, and a footer with the schema
once more and the place of every message. https://arrow.apache.org/docs/format/Columnar.html has it all.
"""

import os
import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from itertools import pairwise
from typing import BinaryIO, NoReturn, Self

from flatbuffers import number_types
from flatbuffers.table import Table

from batchserve.errors import InvalidInput

__all__ = [
    "BODY_LIMIT",
    "DAMAGE",
    "END",
    "MAGIC",
    "OFFSET_WIDTHS",
    "Field",
    "Flat",
    "Footer",
    "Kind",
    "Message",
    "Schema",
    "copies",
    "decoded_bytes",
    "encapsulate",
    "file_footer",
    "read_footer",
    "read_message",
    "read_metadata",
    "walk",
]

MAGIC = b"ARROW1"
END = struct.pack("<Ii", 0xFFFFFFFF, 0)
"""The end of a stream."""
BODY_LIMIT = 256 * 2**20
"""The largest record batch that is read as a whole."""

DAMAGE = (struct.error, TypeError, LookupError)
"""What reading a damaged flatbuffer raises."""

_MAX_ROWS = 2**31 - 1
"""The Arrow specification recommends no more; a damaged length is mostly above it."""
_CONTINUATION = 0xFFFFFFFF
_METADATA_LIMIT = 64 * 2**20
_V5 = 4

_SCHEMA, _DICTIONARY_BATCH, _RECORD_BATCH = 1, 2, 3


class Kind(IntEnum):
    """The types of Arrow that this package tells apart, with their numbers in the schema definition."""

    NULL = 1
    INT = 2
    FLOAT = 3
    BINARY = 4
    UTF8 = 5
    BOOL = 6
    DECIMAL = 7
    DATE = 8
    TIME = 9
    TIMESTAMP = 10
    FIXED_SIZE_BINARY = 15
    DURATION = 18
    LARGE_BINARY = 19
    LARGE_UTF8 = 20
    BINARY_VIEW = 23
    UTF8_VIEW = 24


OFFSET_WIDTHS: dict[int, int] = {Kind.BINARY: 4, Kind.UTF8: 4, Kind.LARGE_BINARY: 8, Kind.LARGE_UTF8: 8}
"""Bytes of one offset in the columns whose values differ in length."""


@dataclass(frozen=True, slots=True)
class Message:
    """One message that stands at `start`; `records` counts the rows of a record batch and is 0 for all else."""

    start: int
    body: int
    stop: int
    kind: int
    records: int

    @property
    def is_dictionary(self) -> bool:
        return self.kind == _DICTIONARY_BATCH

    @property
    def is_batch(self) -> bool:
        return self.kind == _RECORD_BATCH


@dataclass(frozen=True, slots=True)
class Field:
    """How one top-level column is laid out: `width` in bits of a fixed-width value, None where values are not fixed."""

    kind: int
    width: int | None
    children: int
    encoded: bool


@dataclass(frozen=True, slots=True)
class Schema:
    """The schema as a message of its own, ready to begin a stream."""

    message: bytes
    columns: tuple[Field, ...]

    @property
    def has_dictionaries(self) -> bool:
        # A nested column may hide one.
        return any(column.encoded or column.children for column in self.columns)

    @property
    def flat(self) -> bool:
        """Whether every column is of a kind that `slice_batch` cuts."""
        return all(
            not column.children
            and (
                column.width is not None or column.kind in {*OFFSET_WIDTHS, Kind.NULL, Kind.BINARY_VIEW, Kind.UTF8_VIEW}
            )
            for column in self.columns
        )

    @classmethod
    def parse(cls, message: bytes) -> Self:
        """The schema of a schema message. Raises InvalidInput."""
        try:
            table = Flat.root(message[8:])
            if table.number(1, "Uint8") != _SCHEMA:
                raise InvalidInput("expected the schema as the first Arrow message, got another message")
            return cls(message, tuple(_column(field) for field in table.required(2).tables(1)))
        except DAMAGE as error:
            raise InvalidInput("the schema of the Arrow input is damaged") from error


class Flat:
    """A table of a flatbuffer; fields are named by their number in the schema definition."""

    def __init__(self, buffer: bytes, position: int) -> None:
        if not 0 <= position <= len(buffer) - 4:
            raise struct.error(f"a table at byte {position} of {len(buffer)}")
        self._table = Table(buffer, position)

    @classmethod
    def root(cls, buffer: bytes) -> Self:
        return cls(buffer, struct.unpack_from("<I", buffer)[0])

    @property
    def position(self) -> int:
        return int(self._table.Pos)

    def place(self, field: int) -> int | None:
        """Where the value of the field stands in the buffer; None when it has its default."""
        offset = self._table.Offset(4 + 2 * field)
        return self.position + offset if offset else None

    def number(self, field: int, kind: str, default: int = 0) -> int:
        place = self.place(field)
        return default if place is None else int(self._table.Get(getattr(number_types, f"{kind}Flags"), place))

    def table(self, field: int) -> "Flat | None":
        place = self.place(field)
        return None if place is None else self._at(place)

    def required(self, field: int) -> "Flat":
        table = self.table(field)
        if table is None:
            raise struct.error(f"field {field} is missing")
        return table

    def tables(self, field: int) -> "list[Flat]":
        start, length = self.vector(field, 4)
        return [self._at(start + 4 * index) for index in range(length)]

    def vector(self, field: int, size: int) -> tuple[int, int]:
        """Place and length of a vector whose elements have `size` bytes."""
        place = self.place(field)
        if place is None:
            return 0, 0
        start = place + self._get("Uint32", place)
        length = self._get("Uint32", start)
        if start + 4 + length * size > len(self._table.Bytes):
            raise struct.error(f"a vector of {length} elements")
        return start + 4, length

    def _at(self, place: int) -> "Flat":
        return Flat(self._table.Bytes, place + self._get("Uint32", place))

    def _get(self, kind: str, place: int) -> int:
        return int(self._table.Get(getattr(number_types, f"{kind}Flags"), place))


def walk(source: BinaryIO, start: int) -> Iterator[Message]:
    """The messages of a stream from byte `start` to its end mark. A stream may also just end between two messages."""
    size = _size(source)
    while start < size:
        source.seek(start)
        prefix = source.read(8)
        if prefix == END:
            return
        message = read_message(source, start, size)
        yield message
        start = message.stop


def read_message(source: BinaryIO, start: int, size: int | None = None) -> Message:
    """What stands at byte `start`. Raises InvalidInput when it is no message, or ends behind the end of the input."""
    size = _size(source) if size is None else size
    if not 0 <= start < size:
        _cut_off(size, f"a message begins at byte {start}")
    metadata = read_metadata(source, start, size)
    try:
        table = Flat.root(metadata)
        kind = table.number(1, "Uint8")
        length = table.number(3, "Int64")
        batch = table.required(2)
        records = batch.number(0, "Int64") if kind == _RECORD_BATCH else 0
    except DAMAGE as error:
        raise InvalidInput(f"the Arrow message at byte {start} is damaged") from error
    body = start + 8 + len(metadata)
    if length < 0 or not 0 <= records <= _MAX_ROWS:
        raise InvalidInput(f"the Arrow message at byte {start} is damaged: it claims {records} rows in {length} bytes")
    if body + length > size:
        _cut_off(size, f"the message at byte {start} ends at byte {body + length}")
    return Message(start, body, body + length, kind, records)


def decoded_bytes(source: BinaryIO, message: Message) -> int:
    """How many bytes the buffers of a record batch or dictionary take once they are unpacked, as they claim.

    Raises InvalidInput when a buffer lies outside of the message, or claims a negative length.
    """
    metadata = read_metadata(source, message.start, message.body)
    total = 0
    try:
        batch = Flat.root(metadata).required(2)
        batch = batch.required(1) if message.is_dictionary else batch
        place, count = batch.vector(2, 16)
        for index in range(count):
            offset, length = struct.unpack_from("<qq", metadata, place + 16 * index)
            if offset < 0 or length < 0 or message.body + offset + length > message.stop:
                raise struct.error("a buffer lies outside of its body")
            if batch.place(3) is not None and length >= 8:
                source.seek(message.body + offset)
                (unpacked,) = struct.unpack("<q", source.read(8))
                # -1: this buffer is not compressed.
                length = length - 8 if unpacked == -1 else unpacked
            if length < 0:
                raise struct.error(f"a buffer of {length} bytes")
            total += length
    except DAMAGE as error:
        raise InvalidInput(f"the Arrow message at byte {message.start} is damaged: {error}") from error
    return total


@dataclass(frozen=True, slots=True)
class Footer:
    """What the footer of a file tells: the schema, and where dictionaries and record batches stand."""

    schema: Schema
    dictionaries: list[int]
    batches: list[int]


def read_footer(source: BinaryIO) -> Footer:
    """The footer of an Arrow file. Raises InvalidInput."""
    size = _size(source)
    source.seek(0)
    if source.read(len(MAGIC)) != MAGIC:
        raise InvalidInput("the input is not an Arrow file: it does not begin with ARROW1")
    source.seek(max(0, size - 10))
    tail = source.read(10)
    if tail[4:] != MAGIC or size < 2 * len(MAGIC) + 8:
        _cut_off(size, "an Arrow file ends with ARROW1")
    length = int.from_bytes(tail[:4], "little", signed=True)
    if not 8 <= length <= min(size - 10, _METADATA_LIMIT):
        raise InvalidInput(f"the footer of the Arrow file is damaged: it claims {length} of {size} bytes")
    source.seek(size - 10 - length)
    footer = source.read(length)
    try:
        table = Flat.root(footer)
        schema = Schema.parse(_schema_message(footer, table))
        return Footer(schema, sorted(_blocks(footer, table, 2)), _in_order(_blocks(footer, table, 3)))
    except DAMAGE as error:
        raise InvalidInput("the footer of the Arrow file is damaged") from error


def file_footer(schema: bytes, blocks: Sequence[tuple[int, int, int]]) -> bytes:
    """The end of an Arrow file: end mark, footer, its length, magic. Its position must be a multiple of 8.

    `schema` is a schema message; `blocks` tells of each record batch where it stands, how long its prefix and metadata
    are, and how long its body is. A flatbuffer table keeps its meaning in any buffer as long as its alignment does,
    so the schema message's metadata becomes the tail of the footer and the footer points into it:

        0   u32 position of the table            40  u32 length of dictionaries: 0
        4   vtable: sizes, 4 field offsets       44  u32 length of recordBatches
        16  i32 way to the vtable                48  Block structs, 24 bytes each
        20  u32 ways to schema, dictionaries,    ... metadata of the schema message
            recordBatches; 32: i16 version
    """
    metadata = schema[8:]
    table = 48 + 24 * len(blocks) + Flat.root(metadata).required(2).position
    footer = b"".join(
        (
            struct.pack("<IHHHHHHiIIIhxxxxxx", 16, 12, 20, 16, 4, 8, 12, 12, table - 20, 40 - 24, 44 - 28, _V5),
            struct.pack("<II", 0, len(blocks)),
            *(struct.pack("<qixxxxq", *block) for block in blocks),
            metadata,
        )
    )
    return b"".join((END, footer, struct.pack("<i", len(footer)), MAGIC))


def read_metadata(source: BinaryIO, start: int, size: int) -> bytes:
    """The metadata of the message at byte `start` of an input of `size` bytes. Raises InvalidInput."""
    source.seek(start)
    prefix = source.read(8)
    if len(prefix) < 8:
        _cut_off(size, f"a message begins at byte {start}")
    continuation, length = struct.unpack("<Ii", prefix)
    if continuation != _CONTINUATION:
        raise InvalidInput(
            f"expected an Arrow message at byte {start}, got {prefix.hex(' ')} "
            "(messages without the mark ff ff ff ff were written before Arrow 0.15: write the data again)"
        )
    if not 8 <= length <= _METADATA_LIMIT:
        raise InvalidInput(f"the Arrow message at byte {start} is damaged: it claims {length} bytes of metadata")
    metadata = source.read(length)
    if len(metadata) < length:
        _cut_off(size, f"the metadata of the message at byte {start} ends at byte {start + 8 + length}")
    return metadata


def _schema_message(footer: bytes, table: Flat) -> bytes:
    """A schema message made of a footer: a table Message that points to the schema inside the footer behind it."""
    head = struct.pack(
        "<IHHHHHHiIqhBxxxxx", 16, 12, 20, 16, 18, 4, 8, 12, 40 + table.required(1).position - 20, 0,
        table.number(0, "Int16"), _SCHEMA,
    )  # fmt: skip
    return encapsulate(head + footer + bytes(-len(footer) % 8))


def _blocks(footer: bytes, table: Flat, field: int) -> list[int]:
    place, count = table.vector(field, 24)
    return [struct.unpack_from("<q", footer, place + 24 * index)[0] for index in range(count)]


def _in_order(places: list[int]) -> list[int]:
    if any(a >= b for a, b in pairwise([0, *places])):
        raise InvalidInput("the record batches of the Arrow file are not in order: write the file again")
    return places


def _column(field: Flat) -> Field:
    kind = field.number(2, "Uint8")
    children = len(field.tables(5))
    encoding = field.table(4)
    width: int | None
    if encoding is not None:
        index = encoding.table(1)
        width, children = (index.number(0, "Int32") if index else 32), 0
    else:
        width = _width(kind, field)
    if width is not None and width < 1:
        raise struct.error(f"a value of {width} bits")
    return Field(kind, width, children, encoding is not None)


def _width(kind: int, field: Flat) -> int | None:
    """Bits of one value of a fixed-width type."""
    details = field.table(3)
    if details is None:
        return None
    match kind:
        case Kind.INT:
            return details.number(0, "Int32")
        case Kind.FLOAT:
            return (16, 32, 64)[details.number(0, "Int16")]
        case Kind.BOOL:
            return 1
        case Kind.DECIMAL:
            return details.number(2, "Int32", 128)
        case Kind.DATE:
            return 64 if details.number(0, "Int16", 1) else 32
        case Kind.TIME:
            return details.number(1, "Int32", 32)
        case Kind.TIMESTAMP | Kind.DURATION:
            return 64
        case Kind.FIXED_SIZE_BINARY:
            return 8 * details.number(0, "Int32")
        case _:
            return None


def _size(source: BinaryIO) -> int:
    return source.seek(0, os.SEEK_END)


def _cut_off(size: int, expected: str) -> NoReturn:
    raise InvalidInput(f"the Arrow input is cut off at byte {size}: {expected}")


def encapsulate(metadata: bytes, body: bytes = b"") -> bytes:
    """The message of metadata and body."""
    return struct.pack("<Ii", _CONTINUATION, len(metadata)) + metadata + body


def copies(source: BinaryIO, messages: Iterable[Message]) -> Iterator[bytes]:
    """The bytes of messages."""
    for message in messages:
        source.seek(message.start)
        yield source.read(message.stop - message.start)
