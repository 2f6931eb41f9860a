"""Tables as Arrow IPC streams: written block by block while they are sent, read batch by batch as they come."""

import io
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Iterator
from typing import TYPE_CHECKING, Any, Literal

from batchserve.errors import DigestMismatch, InvalidInput

if TYPE_CHECKING:
    import polars as pl

FIRST_BLOCK = 4_096
"""Records of the first block: by its size the others are cut."""
_BLOCK_BYTES = 16 * 2**20
"""About what the records of a block take in memory."""
_MOST_RECORDS = 262_144
_MARK = b"\xff\xff\xff\xff"
END = _MARK + bytes(4)
"""The last block of a stream."""
_BATCH = 3
"""Of the kinds of messages, a record batch."""


def blocks_of(frames: "Iterable[pl.DataFrame]") -> Iterator[bytes]:
    """One Arrow IPC stream of all frames, which have the same columns; at least one. Equal frames give equal bytes."""
    schema = None
    for frame in frames:
        check_columns(frame)
        written = _written(frame)
        lead = _message_bytes(written)
        if schema is None:
            schema = written[:lead]
            yield schema
        elif written[:lead] != schema:
            raise InvalidInput("the blocks of the table differ in their columns or types")
        yield written[lead : -len(END)]
    yield END


def records_in_block(frame: "pl.DataFrame") -> int:
    """How many records make a block of a table that begins with these."""
    head = frame.head(FIRST_BLOCK)
    # What is written is measured, since `estimated_size` counts all texts of the frame that a slice belongs to.
    size = len(_written(head, "uncompressed")) // max(1, head.height)
    return max(1, min(_MOST_RECORDS, _BLOCK_BYTES // max(1, size)))


def cut(frames: "Iterable[pl.DataFrame]") -> "Iterator[pl.DataFrame]":
    """The records of all frames in blocks of even size."""
    import polars as pl

    size: int | None = None
    waiting: list[pl.DataFrame] = []
    for frame in frames:
        waiting.append(frame)
        if size is None and frame.height:
            size = records_in_block(frame)
        if size is not None and (height := sum(part.height for part in waiting)) >= size:
            whole = pl.concat(waiting, rechunk=False) if len(waiting) > 1 else frame
            full = height - height % size
            yield from whole.head(full).iter_slices(size)
            waiting = [whole.tail(height - full)] if height > full else []
    if waiting:
        yield pl.concat(waiting, rechunk=False)


def check_columns(frame: "pl.DataFrame") -> None:
    """Raises InvalidInput that names a column which Arrow IPC cannot carry."""
    import polars as pl

    for name, kind in frame.schema.items():
        if _holds(kind, lambda inner: isinstance(inner, pl.Object)):
            raise InvalidInput(f"column {name!r} holds Python objects: expected values of one type")
        if _holds(kind, lambda inner: isinstance(inner, pl.Array) and 0 in inner.shape):
            raise InvalidInput(f"column {name!r} holds arrays without elements, which cannot be sent")


def _holds(kind: Any, wanted: Any) -> bool:
    inner = [field.dtype for field in kind.fields] if hasattr(kind, "fields") else [getattr(kind, "inner", None)]
    return wanted(kind) or any(_holds(one, wanted) for one in inner if one is not None)


def _written(frame: "pl.DataFrame", compression: Literal["zstd", "uncompressed"] = "zstd") -> bytes:
    buffer = io.BytesIO()
    frame.rechunk().write_ipc_stream(buffer, compression=compression)
    return buffer.getvalue()


async def frames_of(blocks: AsyncIterator[bytes]) -> "AsyncGenerator[pl.DataFrame]":
    """The record batches of an Arrow IPC stream, as they come; one without records where there are none."""
    import polars as pl

    schema, dictionaries, batches = b"", b"", 0
    async for message in _messages(blocks):
        if not schema:
            schema = message
        elif _kind(message) == _BATCH:
            batches += 1
            yield pl.read_ipc_stream(io.BytesIO(b"".join((schema, dictionaries, message, END))))
        else:
            dictionaries += message
    if not schema:
        raise DigestMismatch("the result is no Arrow stream: it has no schema")
    if not batches:
        yield pl.read_ipc_stream(io.BytesIO(schema + END))


async def _messages(blocks: AsyncIterator[bytes]) -> AsyncGenerator[bytes]:
    """Each message with its body. Bytes are joined once for each message, however small the blocks are."""
    waiting: list[bytes] = []
    size, wanted, ended = 0, 8, False
    async for block in blocks:
        if ended:
            continue  # to the end, where the digest is verified
        waiting.append(block)
        size += len(block)
        if size < wanted:
            continue
        data, place = b"".join(waiting), 0
        while (wanted := _needed(data, place)) <= len(data) - place:
            if ended := data[place : place + 8] == END:
                break
            yield data[place : place + wanted]
            place += wanted
        waiting, size = [data[place:]], len(data) - place
    if not ended:
        raise DigestMismatch("the result ends in the middle of an Arrow stream")


def _needed(data: bytes, place: int) -> int:
    """Bytes of the message that begins here, or of as much of it as tells that."""
    if len(data) - place < 8:
        return 8
    lead = 8 + int.from_bytes(data[place + 4 : place + 8], "little")
    return lead if len(data) - place < lead else _message_bytes(data, place)


def _message_bytes(data: bytes, place: int = 0) -> int:
    lead = int.from_bytes(data[place + 4 : place + 8], "little")
    return 8 + lead + (_field(data[place + 8 : place + 8 + lead], 3, 8) if lead else 0)


def _kind(message: bytes) -> int:
    return _field(message[8:], 1, 1)


def _field(metadata: bytes, number: int, size: int) -> int:
    """A number in the flatbuffer table `Message` of Arrow: header_type is field 1, bodyLength field 3."""
    table = int.from_bytes(metadata[:4], "little")
    fields = table - int.from_bytes(metadata[table : table + 4], "little", signed=True)
    entry = 4 + 2 * number
    if entry >= int.from_bytes(metadata[fields : fields + 2], "little"):
        return 0
    offset = int.from_bytes(metadata[fields + entry : fields + entry + 2], "little")
    return int.from_bytes(metadata[table + offset : table + offset + size], "little") if offset else 0
