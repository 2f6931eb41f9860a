"""Inputs that hold a table and are none themselves become that table: in scoring processes, as all that parses is."""

import io
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from typing import BinaryIO

from batchserve.domain import Dialect, ReadOptions, StoredInput
from batchserve.errors import PayloadTooLarge, UnsupportedMedia
from batchserve.formats import encoding_of, get_format, sniff
from batchserve.formats.encodings import Transcoder
from batchserve.formats.excel import read_workbook
from batchserve.formats.packed import TABLES, Contents, contents_of, unpacked
from batchserve.scoring.faults import by_name
from batchserve.scoring.inputs import storage_at

__all__ = ["Unpacking", "inspect", "unpack", "unpack_bytes"]

_WORKBOOK_AS = "parquet"
"""The format in which the table of a workbook is stored: one with types."""


@dataclass(frozen=True, slots=True)
class Unpacking:
    """What is to be done with a stored zip."""

    storage: str
    key: str
    target: str
    """The key of the table."""
    read: ReadOptions
    columns: frozenset[str]
    """The names that the table is expected to have."""
    most: int
    """Bytes that the table may have."""


@dataclass(frozen=True, slots=True)
class _Table:
    format: str
    dialect: Dialect
    filename: str | None
    blocks: Iterator[bytes]


def inspect(storage: str, key: str) -> Contents:
    """What a stored zip holds. Raises InvalidInput and UnsupportedMedia."""
    with storage_at(storage).open(key) as source:
        return contents_of(source)


@by_name
def unpack(task: Unpacking, contents: Contents) -> StoredInput | None:
    """Stores the table in a zip as an object of its own. None: it is an archive of images after all."""
    store = storage_at(task.storage)
    with store.open(task.key) as source:
        table = _table(source, contents, task.read, task.columns, task.most)
        if table is None:
            return None
        with store.create(task.target) as writer:
            for block in table.blocks:
                writer.write(block)
            stored = writer.commit()
    return StoredInput(task.target, table.format, table.dialect, stored.bytes, stored.sha256, table.filename)


@by_name
def unpack_bytes(
    body: bytes, read: ReadOptions, columns: frozenset[str], most: int
) -> tuple[bytes, str, Dialect] | None:
    """The same for a small zip: the bytes of its table, their format and dialect."""
    source = io.BytesIO(body)
    table = _table(source, contents_of(source), read, columns, most)
    return None if table is None else (b"".join(table.blocks), table.format, table.dialect)


def _table(
    source: BinaryIO, contents: Contents, read: ReadOptions, columns: frozenset[str], most: int
) -> _Table | None:
    if contents.is_workbook:
        source.seek(0)
        return _of_workbook(source.read(), read, None, most)
    if contents.table is None:
        return None
    name = contents.table
    blocks = unpacked(source, name, most)
    beginning = next(blocks, b"")
    if name.lower().endswith(".xlsx"):
        return _of_workbook(beginning + b"".join(blocks), read, name, most)
    if (encoding := encoding_of(beginning, read)) is not None:
        blocks = _bounded(Transcoder(encoding).blocks(chain([beginning], blocks)), name, most)
        beginning = next(blocks, b"")
    is_named = any(name.lower().endswith(suffix) for suffix in TABLES)
    try:
        format, dialect = sniff(beginning, None, name, read, columns)
    except UnsupportedMedia:
        if is_named:
            raise
        return None
    if not is_named and format.family == "image":
        return None
    return _Table(format.name, dialect, name, chain([beginning], blocks))


def _of_workbook(content: bytes, read: ReadOptions, name: str | None, most: int) -> _Table:
    table = get_format(_WORKBOOK_AS).write(read_workbook(content, read.sheet))
    return _Table(_WORKBOOK_AS, Dialect(), name, _bounded(iter([table]), name or "the workbook", most))


def _bounded(blocks: Iterator[bytes], name: str, most: int) -> Iterator[bytes]:
    size = 0
    for block in blocks:
        size += len(block)
        if size > most:
            raise PayloadTooLarge(f"{name!r} has more than {most} bytes")
        yield block
