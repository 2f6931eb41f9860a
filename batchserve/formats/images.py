"""Images as tables: one image is a table of one record, an archive of images has a record for each file in it.

They can be read and not written: a result is a table of predictions.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO, Never
from zipfile import BadZipFile, ZipInfo

import polars as pl

from batchserve.domain import Chunk, ChunkLimits, DType, RowError
from batchserve.errors import InvalidInput, InvalidOptions
from batchserve.formats.frames import SAMPLE, typed
from batchserve.formats.protocol import Header, Holds, Open, Part, Reading, Records
from batchserve.formats.records import MAX_RECORD, read_span
from batchserve.formats.wire.archive import check_directory, find_directory, read_member, walk
from batchserve.storage.folders import KeptFile
from batchserve.storage.ranged import RangedReader

__all__ = ["Image", "Zip"]

_IMAGE, _FILE = "image", "file"
_SAMPLE_BYTES = 4 * 2**20


class _InputOnly:
    """Base of image formats: read as tables, never written."""

    name: str
    family = "image"
    holds: Holds = "table"
    is_text = False
    has_types = True
    chunk_scale = 1

    def write(self, _records: Records) -> bytes:
        self._refuse()

    def assemble(self, _parts: Iterable[Part], _open: Open, _records: int) -> Never:
        self._refuse()

    def _refuse(self) -> Never:
        raise InvalidOptions(
            f"a result is a table, which {self.name} cannot hold: request csv, jsonl, json, parquet, arrow, arrows, "
            "npy or npz"
        )


@dataclass(frozen=True, slots=True)
class Image(_InputOnly):
    """One image is one record, with the column `image`: the bytes as they came. Nothing here decodes them.

    A chunk's `start` and `stop` are bytes.
    """

    name: str
    media_type: str
    suffix: str

    def header(self, source: BinaryIO) -> Header:
        chunk = Chunk(0, 1, 0, source.seek(0, os.SEEK_END))
        return Header({_IMAGE: pl.Binary()}, _lazily(source, lambda again: self.read(again, chunk, {}).records))

    def plan(
        self,
        source: BinaryIO,
        after: Chunk | None,
        _limits: ChunkLimits,
    ) -> Iterator[Chunk]:
        if after is None:
            yield Chunk(0, 1, 0, source.seek(0, os.SEEK_END))

    def end(self, source: BinaryIO) -> int:
        return source.seek(0, os.SEEK_END)

    def read(
        self,
        source: BinaryIO,
        chunk: Chunk,
        types: Mapping[str, DType],
        columns: Sequence[str] | None = None,
    ) -> Reading:
        """An image of more than 64 MiB gives null and a RowError."""
        size = chunk.stop - chunk.start
        image = read_span(source, chunk.start, chunk.stop) if size <= MAX_RECORD else None
        errors = [] if image is not None else [_too_large(0, "the image", size)]
        reading = typed(pl.DataFrame({_IMAGE: _binary([image])}), chunk, types, columns)
        return Reading(reading.records, reading.errors + errors)


class Zip(_InputOnly):
    """An archive of images. Each member that is no directory is a record, in the order of the archive, with the columns
    `file`, its path, and `image`, its bytes. They are read one by one, and nothing is ever extracted.

    A chunk's `start` and `stop` are bytes of the archive's directory, so that a chunk costs what it holds, however
    many members there are. Its limit in bytes counts them unpacked.
    """

    name = "zip"
    media_type = "application/zip"
    suffix = ".zip"

    def header(self, source: BinaryIO) -> Header:
        """Checks the whole directory, and refuses hostile entries."""
        if not check_directory(source, find_directory(source)):
            raise InvalidInput("the zip archive holds no files: expected images")

        def read_sample(again: BinaryIO) -> Records:
            chunk = next(self.plan(again, None, ChunkLimits(_SAMPLE_BYTES, SAMPLE)))
            return self.read(again, chunk, {}).records

        return Header({_FILE: pl.String(), _IMAGE: pl.Binary()}, _lazily(source, read_sample))

    def plan(
        self,
        source: BinaryIO,
        after: Chunk | None,
        limits: ChunkLimits,
    ) -> Iterator[Chunk]:
        """Directories are no records: their entries belong to the chunk of the file that follows."""
        first, start = (after.first_record + after.records, after.stop) if after else (0, 0)
        records = size = 0
        stop = start
        for member, end in walk(source, find_directory(source), start):
            if member.is_dir():
                continue
            if records and (records == limits.records or size + member.file_size > limits.bytes):
                yield Chunk(first, records, start, stop)
                first, start, records, size = first + records, stop, 0, 0
            records, size, stop = records + 1, size + member.file_size, end
        if records or after is None:
            yield Chunk(first, records, start, stop)

    def end(self, source: BinaryIO) -> int:
        return find_directory(source).bytes

    def read(
        self,
        source: BinaryIO,
        chunk: Chunk,
        types: Mapping[str, DType],
        columns: Sequence[str] | None = None,
    ) -> Reading:
        """A member that is damaged, or that has more than 64 MiB, gives null and a RowError."""
        entries = walk(source, find_directory(source), chunk.start, chunk.stop)
        members = [member for member, _ in entries if not member.is_dir()]
        frame = pl.DataFrame({_FILE: pl.Series([member.filename for member in members], dtype=pl.String())})
        errors: list[RowError] = []
        if columns is None or _IMAGE in columns:
            images: list[bytes | None] = []
            for record, member in enumerate(members):
                image = _read_image(source, member, record)
                if isinstance(image, RowError):
                    errors.append(image)
                images.append(image if isinstance(image, bytes) else None)
            frame = frame.with_columns(_binary(images))
        reading = typed(frame, chunk, types, columns)
        return Reading(reading.records, reading.errors + errors)


def _read_image(source: BinaryIO, member: ZipInfo, record: int) -> bytes | RowError:
    name = repr(member.filename)
    size = max(member.file_size, member.compress_size)
    if size > MAX_RECORD:
        return _too_large(record, name, size)
    try:
        return read_member(source, member)
    except BadZipFile as error:
        return RowError(record, "invalid-image", f"{name} is damaged in the archive: {error}", _IMAGE)


def _too_large(record: int, what: str, size: int) -> RowError:
    message = f"{what} has {size} bytes; at most {MAX_RECORD} ({MAX_RECORD >> 20} MiB) are allowed"
    return RowError(record, "image-too-large", message, _IMAGE)


def _binary(images: Sequence[bytes | None]) -> pl.Series:
    return pl.Series(_IMAGE, images, dtype=pl.Binary())


def _lazily(source: BinaryIO, read: Callable[[BinaryIO], Records]) -> Callable[[], Records]:
    """`read` for when it is asked for, if the source can be opened again: a real file, or one that is fetched by range.
    Else done now."""
    if isinstance(source, RangedReader):
        return partial(_read_again, source.stored.open, read)
    name = getattr(source, "name", None)
    if isinstance(name, str) and Path(name).is_file():
        kept = KeptFile(source, Path(name))
        return partial(_read_again, lambda: kept.path.open("rb"), read)
    records = read(source)
    return lambda: records


def _read_again(open: Callable[[], BinaryIO], read: Callable[[BinaryIO], Records]) -> Records:
    with open() as source:
        return read(source)
