"""Parquet: read in slices by polars, assembled by copying row groups and writing one footer."""

import io
import os
import struct
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache, partial
from itertools import accumulate, chain
from pathlib import Path
from typing import Any, BinaryIO

import polars as pl

from batchserve.domain import Chunk, ChunkLimits, DType
from batchserve.errors import InvalidInput, SchemaMismatch
from batchserve.formats.frames import SAMPLE, decoding, plain, typed
from batchserve.formats.protocol import FilesReader, Header, Holds, Open, Outline, Part, Reading, Records
from batchserve.formats.records import check_names, check_width, table
from batchserve.formats.wire import thrift
from batchserve.storage import Piece, Span
from batchserve.storage.folders import KeptFile
from batchserve.storage.ranged import RangedObject, RangedReader

__all__ = ["Parquet"]

_MAGIC = b"PAR1"
_MAX_ROWS = 2**31 - 1
"""Most rows of a row group; more count as damage."""
_FOOTER_LIMIT = 256 * 2**20
_GAP = 256 * 2**10
"""Bytes between two stretches that are fetched along: another request would take longer."""
_MOST_KEPT = 128 * 2**20
"""Bytes of row groups that a process keeps for the next chunk of them."""

# Fields of the structs in https://github.com/apache/parquet-format/blob/master/src/main/thrift/parquet.thrift
_SCHEMA, _NUM_ROWS, _ROW_GROUPS = 2, 3, 4  # FileMetaData
_COLUMNS, _TOTAL_BYTE_SIZE, _GROUP_ROWS, _GROUP_OFFSET, _ORDINAL = 1, 2, 3, 5, 7  # RowGroup
_CHUNK_OFFSET, _META_DATA, _PAGE_INDEX = 2, 3, (4, 5, 6, 7)  # ColumnChunk
_PATH, _COMPRESSED_SIZE, _DATA_PAGE, _DICTIONARY_PAGE = 3, 7, 9, 11  # ColumnMetaData
_META_DATA_OFFSETS = (_DATA_PAGE, 10, _DICTIONARY_PAGE, 14)  # of them: also index page, bloom filter
_MAX_ORDINAL = 2**15 - 1


class Parquet(FilesReader):
    """Parquet. A chunk's `start` and `stop` are record numbers.

    Every chunk of a file unpacks the dictionaries of its row group anew, so chunks get twice the size: there is no text
    besides the values, and one takes less memory than one of CSV. A real file is passed to polars by its path, so only
    the pages of a slice are read. Of an object that is fetched by range, each process fetches the footer once, and the
    row groups of a slice. Any other source is read whole.
    """

    name = "parquet"
    media_type = "application/vnd.apache.parquet"
    suffix = ".parquet"
    family = "parquet"
    holds: Holds = "table"
    is_text = False
    has_types = True
    chunk_scale = 2

    def header(self, source: BinaryIO) -> Header:
        records = min(_num_rows(_read_footer(source)), SAMPLE)
        given = _for_polars(source)
        with decoding("the Parquet input"):
            columns = plain(pl.DataFrame(schema=_scan(given).collect_schema())).schema
        check_width(len(columns))
        check_names(list(columns))
        # For a few records polars unpacks whole pages and dictionaries.
        if isinstance(given, RangedObject):
            return Header(dict(columns), partial(_slice, given, 0, records, None))
        if isinstance(given, Path):
            kept = KeptFile(source, given)
            return Header(dict(columns), lambda: _slice(kept.path, 0, records, None))
        sample = _slice(given, 0, records, None)
        return Header(dict(columns), lambda: sample)

    def plan(
        self,
        source: BinaryIO,
        after: Chunk | None,
        limits: ChunkLimits,
    ) -> Iterator[Chunk]:
        """Whole row groups together while they are within the limits; a larger one in slices of even size."""
        start = stop = after.stop if after else 0
        size = last = 0
        for rows, group_bytes in _row_groups(_read_footer(source)):
            last += rows
            left = last - stop
            if left <= 0:
                continue
            left_bytes = group_bytes * left // rows
            if stop > start and (last - start > limits.records or size + left_bytes > limits.bytes):
                yield Chunk(start, stop - start, start, stop)
                start, size = stop, 0
            step = max(1, min(limits.records, limits.bytes * rows // max(1, group_bytes)))
            while last - start > step and start == stop:
                stop += step
                yield Chunk(start, step, start, stop)
                start = stop
            size += group_bytes * (last - stop) // rows
            stop = last
        if stop > start or (after is None and stop == 0):
            yield Chunk(start, stop - start, start, stop)

    def end(self, source: BinaryIO) -> int:
        return sum(rows for rows, _ in _row_groups(_read_footer(source)))

    def read(
        self,
        source: BinaryIO,
        chunk: Chunk,
        types: Mapping[str, DType],
        columns: Sequence[str] | None = None,
    ) -> Reading:
        return typed(_slice(_for_polars(source), chunk.start, chunk.records, columns), chunk, types, columns)

    def outline(self, source: BinaryIO, like: bytes = b"") -> Outline:
        footer = _footer_bytes(source)
        with _damage_named():
            layout = like if like and footer.startswith(like) else footer[: thrift.end_of(footer, _SCHEMA)]
            return Outline(layout, thrift.number_at(footer, len(layout)))

    def read_files(
        self,
        sources: Sequence[BinaryIO],
        records: int,
        types: Mapping[str, DType],
        columns: Sequence[str] | None,
    ) -> Reading | None:
        paths = [path for source in sources if isinstance(path := getattr(source, "name", None), str)]
        if len(paths) < len(sources):
            return None
        try:
            scan = pl.scan_parquet(paths, glob=False, hive_partitioning=False)
            frame = (scan if columns is None else scan.select(columns)).collect(engine="in-memory")
        except pl.exceptions.PolarsError:
            return None
        if frame.height != records:
            return None
        return typed(plain(frame), Chunk(0, records, 0, records), types, columns)

    def write(self, records: Records) -> bytes:
        frame = plain(table(records, self.name))
        buffer = io.BytesIO()
        frame.write_parquet(buffer, compression="zstd", compression_level=1, row_group_size=max(1, frame.height))
        return buffer.getvalue()

    def assemble(self, parts: Iterable[Part], open: Open, records: int) -> Iterator[Piece]:
        """Row groups are copied unchanged; the footer is rewritten with shifted offsets.

        Page indexes are left out: their entries hold offsets in the file, and readers fall back to the statistics of
        the row groups. Raises SchemaMismatch when parts differ in their schema, ValueError when their records are not
        `records`.
        """
        parts = iter(parts)
        first = next(parts)
        with open(first.key) as source:
            footer = _read_footer(source)
        yield _MAGIC
        position, count = len(_MAGIC), 0
        groups: list[thrift.Encoded] = []
        for part in chain([first], parts):
            with open(part.key) as source:
                metadata = _read_footer(source)
                stop = _data_stop(metadata, source)
            if metadata[_SCHEMA] != footer[_SCHEMA]:
                raise SchemaMismatch(f"part {part.key} has other columns or types than the first part")
            if not (rows := _num_rows(metadata)):
                continue
            count += rows
            for group in metadata[_ROW_GROUPS][1][1]:
                # Encoded at once: thousands of row groups as dicts would fill the memory.
                groups.append(thrift.Encoded(thrift.dump(_moved(group, position - len(_MAGIC), len(groups)))))
            yield Span(part.key, len(_MAGIC), stop)
            position += stop - len(_MAGIC)
        if count != records:
            raise ValueError(f"expected {records} records in the parts, got {count}")
        yield _footer_of(footer, count, groups)


_Given = Path | RangedObject | BinaryIO


def _scan(given: _Given | bytes) -> pl.LazyFrame:
    """Of an object that is fetched by range: its columns, no records."""
    if isinstance(given, RangedObject):
        given = _fetch_excerpt(given, range(0), None)
    return pl.scan_parquet(given, glob=False, hive_partitioning=False)


def _slice(given: _Given | bytes, start: int, records: int, columns: Sequence[str] | None) -> pl.DataFrame:
    if isinstance(given, RangedObject):
        given, start = _excerpt(given, start, records, columns)
    with decoding("the Parquet input"):
        scan = _scan(given).slice(start, records)
        if columns is not None:
            known = set(columns)
            scan = scan.select([name for name in scan.collect_schema().names() if name in known])
        frame = scan.collect(engine="in-memory")
    return plain(frame)


def _for_polars(source: BinaryIO) -> _Given:
    if isinstance(source, RangedReader):
        return source.stored
    name = getattr(source, "name", None)
    if isinstance(name, str) and Path(name).is_file():
        return Path(name)
    source.seek(0)
    return source


# --- objects that are fetched by range -------------------------------------------------------------------------------


def _excerpt(stored: RangedObject, start: int, records: int, columns: Sequence[str] | None) -> tuple[bytes, int]:
    """A Parquet file of the row groups that a slice touches, and where the slice begins in it.

    Chunks that cut a row group share it: a process fetches it for the first of them, and keeps it up to the last.
    """
    with _damage_named():
        touched, first, last = _touched(_fetch_footer(stored), start, start + records)
        is_cut = first < start or last > start + records
        size = sum(end - begin for begin, end in _stretches(stored, touched, columns))
        fetch = _keep_excerpt if is_cut and size <= _MOST_KEPT else _fetch_excerpt
        data = fetch(stored, touched, None if columns is None else tuple(columns))
    if is_cut and last <= start + records:
        _keep_excerpt.cache_clear()
    return data, start - first


def _touched(footer: thrift.Struct, start: int, stop: int) -> tuple[range, int, int]:
    """The row groups that have some of the records `start` to `stop`, and which records they have."""
    ends = list(accumulate(int(group[_GROUP_ROWS][1]) for group in footer[_ROW_GROUPS][1][1]))
    if stop <= start or not ends or start >= ends[-1]:
        return range(0), start, start
    begin, end = bisect_right(ends, start), bisect_left(ends, min(stop, ends[-1])) + 1
    return range(begin, end), ends[begin - 1] if begin else 0, ends[end - 1]


def _fetch_excerpt(stored: RangedObject, numbers: range, columns: Sequence[str] | None) -> bytes:
    """A Parquet file of some row groups. `columns`: the bytes of others may be missing (None: of none)."""
    footer = _fetch_footer(stored)
    shift = len(_MAGIC) - min((start for start, _ in _stretches(stored, numbers, None)), default=0)
    groups = [_moved(footer[_ROW_GROUPS][1][1][number], shift, place) for place, number in enumerate(numbers)]
    file = io.BytesIO()
    file.write(_MAGIC)
    for start, stop in _stretches(stored, numbers, columns):
        file.seek(start + shift)
        file.write(stored.read(start, stop))
    file.write(_footer_of(footer, sum(int(group[_GROUP_ROWS][1]) for group in groups), groups))
    return file.getvalue()


_keep_excerpt = lru_cache(maxsize=1)(_fetch_excerpt)


def _stretches(stored: RangedObject, numbers: range, columns: Sequence[str] | None) -> list[tuple[int, int]]:
    """The bytes to fetch for columns of row groups, in order. Raises ValueError when they are not in the object."""
    groups = _fetch_footer(stored)[_ROW_GROUPS][1][1]
    roots = None if columns is None else {name.encode() for name in columns}
    found: list[tuple[int, int]] = []
    for number in numbers:
        for column in groups[number][_COLUMNS][1][1]:
            metadata = column[_META_DATA][1]
            if roots is None or metadata[_PATH][1][1][0] in roots:
                found.append(_span_of(metadata, stored.size))
    merged: list[tuple[int, int]] = []
    for start, stop in sorted(found):
        if merged and start <= merged[-1][1] + _GAP:
            start, stop = merged[-1][0], max(merged.pop()[1], stop)
        merged.append((start, stop))
    return merged


def _span_of(metadata: thrift.Struct, size: int) -> tuple[int, int]:
    start, length = int(metadata[_DATA_PAGE][1]), int(metadata[_COMPRESSED_SIZE][1])
    if _DICTIONARY_PAGE in metadata:
        start = min(start, int(metadata[_DICTIONARY_PAGE][1]) or start)
    if start < 0 or length < 0 or start + length > size:
        raise ValueError(f"the values of a column are in bytes {start} to {start + length} of {size}")
    return start, start + length


@lru_cache(maxsize=2)
def _fetch_footer(stored: RangedObject) -> thrift.Struct:
    """Of the objects that are read now: every chunk asks for it, and the bytes of an object never change."""
    with stored.open() as source:
        return _parse_footer(source)


# --- footers ---------------------------------------------------------------------------------------------------------


def _read_footer(source: BinaryIO) -> thrift.Struct:
    """FileMetaData. Raises InvalidInput when it is missing or inconsistent."""
    return _fetch_footer(source.stored) if isinstance(source, RangedReader) else _parse_footer(source)


def _footer_of(footer: thrift.Struct, records: int, groups: Sequence[thrift.Struct | thrift.Encoded]) -> bytes:
    """The end of a file like that of `footer`, with other row groups."""
    changed = {
        **footer,
        _NUM_ROWS: (thrift.I64, records),
        _ROW_GROUPS: (thrift.LIST, (thrift.STRUCT, groups)),
    }
    data = thrift.dump(changed)
    return data + struct.pack("<I", len(data)) + _MAGIC


def _footer_bytes(source: BinaryIO) -> bytes:
    """FileMetaData as it is. Raises InvalidInput when it is missing."""
    size = source.seek(0, os.SEEK_END)
    source.seek(0)
    if (magic := source.read(4)) != _MAGIC:
        raise InvalidInput(f"the input is not a Parquet file: it begins with {magic!r} instead of {_MAGIC!r}")
    source.seek(max(4, size - 8))
    tail = source.read(8)
    if tail[4:] == b"PARE":
        raise InvalidInput("the footer of the Parquet file is encrypted: write it without encryption")
    if tail[4:] != _MAGIC:
        raise InvalidInput(f"the Parquet file is cut off: at its end, byte {size}, the mark {_MAGIC!r} is missing")
    length = int.from_bytes(tail[:4], "little")
    if length > min(size - 12, _FOOTER_LIMIT):
        raise InvalidInput(f"the footer of the Parquet file is damaged: it claims {length} of {size} bytes")
    source.seek(size - 8 - length)
    return source.read(length)


def _parse_footer(source: BinaryIO) -> thrift.Struct:
    data = _footer_bytes(source)
    with _damage_named():
        footer = thrift.load(data)
        rows, expected = sum(rows for rows, _ in _row_groups(footer)), _num_rows(footer)
    if rows != expected:
        raise InvalidInput(
            f"the footer of the Parquet file is damaged: expected {expected} records in its row groups, got {rows}"
        )
    return footer


@contextmanager
def _damage_named() -> Iterator[None]:
    """What fails in a footer of odd fields is damage of the input."""
    try:
        yield
    except (LookupError, TypeError, ValueError) as error:
        raise InvalidInput(f"the footer of the Parquet file is damaged: {error}") from error


def _num_rows(footer: thrift.Struct) -> int:
    return int(footer[_NUM_ROWS][1])


def _row_groups(footer: thrift.Struct) -> Iterator[tuple[int, int]]:
    """Records and uncompressed bytes of each row group that has records."""
    _, groups = footer[_ROW_GROUPS][1]
    for group in groups:
        rows, size = int(group[_GROUP_ROWS][1]), int(group[_TOTAL_BYTE_SIZE][1])
        if not 0 <= rows <= _MAX_ROWS or size < 0:
            raise ValueError(f"a row group of {rows} records in {size} bytes")
        if rows:
            yield rows, size


def _data_stop(footer: thrift.Struct, source: BinaryIO) -> int:
    """Where row groups end, and page indexes or the footer begin."""
    size = source.seek(0, os.SEEK_END)
    source.seek(size - 8)
    stops = [size - 8 - int.from_bytes(source.read(4), "little")]
    for group in footer[_ROW_GROUPS][1][1]:
        for column in group[_COLUMNS][1][1]:
            stops += [column[field][1] for field in (_PAGE_INDEX[0], _PAGE_INDEX[2]) if field in column]
    return min(stops)


def _moved(group: thrift.Struct, shift: int, ordinal: int) -> thrift.Struct:
    """A row group moved by `shift` bytes and renumbered to `ordinal`."""
    kind, columns = group[_COLUMNS][1]
    moved = {**group, _COLUMNS: (thrift.LIST, (kind, [_moved_column(column, shift) for column in columns]))}
    _shift(moved, _GROUP_OFFSET, shift)
    if ordinal <= _MAX_ORDINAL:
        moved[_ORDINAL] = (thrift.I16, ordinal)
    else:
        moved.pop(_ORDINAL, None)
    return moved


def _moved_column(column: thrift.Struct, shift: int) -> thrift.Struct:
    moved = {field: value for field, value in column.items() if field not in _PAGE_INDEX}
    _shift(moved, _CHUNK_OFFSET, shift)
    metadata: dict[int, Any] = dict(moved[_META_DATA][1])
    for field in _META_DATA_OFFSETS:
        _shift(metadata, field, shift)
    moved[_META_DATA] = (thrift.STRUCT, metadata)
    return moved


def _shift(fields: thrift.Struct, field: int, shift: int) -> None:
    # Writers put 0 for an unknown offset: that is the position of the magic.
    if field in fields and fields[field][1]:
        kind, value = fields[field]
        fields[field] = (kind, value + shift)
