"""Arrays without column names: npy with one array, npz with one for each input or output of a model.

A chunk's `start` and `stop` are record numbers; axis 0 is the record axis.
"""

import os
import zlib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import reduce
from itertools import chain
from typing import IO, Any, BinaryIO
from zipfile import ZipFile

import numpy as np
import numpy.typing as npt
import polars as pl

from batchserve.domain import Chunk, ChunkLimits, DType
from batchserve.errors import InvalidInput, InvalidOptions, SchemaMismatch
from batchserve.formats.frames import SAMPLE, typed
from batchserve.formats.protocol import ArrayType, Header, Holds, Open, Part, Reading, Records, Tensors
from batchserve.formats.records import check_names
from batchserve.formats.wire import npy
from batchserve.formats.wire.archive import DAMAGED, StoredMember, checked_members, member_data, stored_archive
from batchserve.storage import Piece, Span

__all__ = ["Npy", "Npz", "empty", "frame_of", "vector"]

_NUMBERS_ONLY = "npy holds numbers, the result has text: request format=npz, csv or parquet"


class Npy:
    """One array. A structured array is a table: each field is a column."""

    name = "npy"
    media_type = "application/x-npy"
    suffix = ".npy"
    family = "npy"
    holds: Holds = "array"
    is_text = False
    has_types = True
    chunk_scale = 1

    def header(self, source: BinaryIO) -> Header:
        array = _lone(source)
        chunk = Chunk(0, min(array.records, SAMPLE), 0, min(array.records, SAMPLE))
        sample = self.read(source, chunk, {}).records
        if isinstance(sample, pl.DataFrame):
            check_names(sample.columns)
            return Header(dict(sample.schema), lambda: sample)
        return Header({}, lambda: sample, arrays={"": ArrayType(array.dtype, array.shape)})

    def plan(
        self,
        source: BinaryIO,
        after: Chunk | None,
        limits: ChunkLimits,
    ) -> Iterator[Chunk]:
        array = _lone(source)
        return _cut(array.records, array.bytes_per_record, after, limits)

    def end(self, source: BinaryIO) -> int:
        return _lone(source).records

    def read(
        self,
        source: BinaryIO,
        chunk: Chunk,
        types: Mapping[str, DType],
        columns: Sequence[str] | None = None,
    ) -> Reading:
        header = _lone(source)
        array = npy.read_records(source, header, chunk.start, chunk.records)
        if header.dtype.names is None:
            return Reading({"": array})
        frame = pl.DataFrame({name: npy.native(array[name]) for name in header.dtype.names})
        return typed(frame, chunk, types, columns)

    def write(self, records: Records) -> bytes:
        """A table becomes a matrix of its columns, float32 when all of them are, else float64; a single column becomes
        a vector. Nulls become NaN. Raises InvalidOptions for text, and for more than one array."""
        if isinstance(records, pl.DataFrame):
            return npy.array_bytes(_matrix(records))
        if len(records) != 1:
            raise InvalidOptions(f"npy holds one array, the result has {sorted(records)}: request format=npz")
        (array,) = records.values()
        if array.dtype.kind not in "biuf":
            raise InvalidOptions(_NUMBERS_ONLY)
        return npy.array_bytes(array)

    def assemble(self, parts: Iterable[Part], open: Open, records: int) -> Iterator[Piece]:
        """One header with the sum of the records, then the values of each part.

        Raises SchemaMismatch when parts differ in dtype or shape, ValueError when their records are not `records`.
        """
        parts = iter(parts)
        first = next(parts)
        with open(first.key) as source:
            whole = _lone(source)
        yield npy.header_bytes(whole.dtype, (records, *whole.shape[1:]))
        count = 0
        for part in chain([first], parts):
            with open(part.key) as source:
                array = _lone(source)
            if (array.dtype, array.shape[1:]) != (whole.dtype, whole.shape[1:]):
                raise SchemaMismatch(
                    f"part {part.key} holds {array.dtype} {array.shape[1:]} in each record, "
                    f"the first part {whole.dtype} {whole.shape[1:]}"
                )
            count += array.records
            yield Span(part.key, array.data, array.data + array.bytes)
        if count != records:
            raise ValueError(f"expected {records} records in the parts, got {count}")


class Npz:
    """A ZIP archive of arrays that share axis 0. An array without axes belongs to every record and is in every chunk.

    `arrays` names those that hold the records, if one of them is in the archive: then others may have other lengths, or
    types that are not read.

    Members that were saved with numpy.savez are read at any place; those of numpy.savez_compressed are unpacked from
    their beginning for every chunk.
    """

    name = "npz"
    media_type = "application/x-npz"
    suffix = ".npz"
    family = "npz"
    holds: Holds = "arrays"
    is_text = False
    has_types = True
    chunk_scale = 1

    def __init__(self, arrays: Collection[str] = ()) -> None:
        self._arrays = arrays

    def header(self, source: BinaryIO) -> Header:
        with _members(source, self._arrays) as members:
            records = self._records(members)
            count = min(records, SAMPLE)
            sample: Tensors = {member.name: member.read(0, min(count, member.length)) for member in members}
        kinds = {
            member.name: ArrayType(member.header.dtype, member.header.shape, member.length == records)
            for member in members
        }
        return Header({}, lambda: sample, arrays=kinds)

    def plan(
        self,
        source: BinaryIO,
        after: Chunk | None,
        limits: ChunkLimits,
    ) -> Iterator[Chunk]:
        with _members(source, self._arrays) as members:
            records = self._records(members)
            size = sum(member.header.bytes_per_record for member in members if member.length == records)
        return _cut(records, size, after, limits)

    def end(self, source: BinaryIO) -> int:
        with _members(source, self._arrays) as members:
            return self._records(members)

    def read(
        self,
        source: BinaryIO,
        chunk: Chunk,
        _types: Mapping[str, DType],
        columns: Sequence[str] | None = None,
    ) -> Reading:
        with _members(source, self._arrays) as members:
            records = self._records(members)
            wanted = [member for member in members if columns is None or member.name in columns]
            return Reading(
                {
                    member.name: member.read(chunk.start, chunk.records)
                    if member.length == records
                    else member.read(0, member.length)
                    for member in wanted
                }
            )

    def _records(self, members: Sequence["_Member"]) -> int:
        """The length of the arrays that hold the records."""
        named = [member for member in members if member.name in self._arrays and member.header.shape]
        return _common_length(named or members)

    def write(self, records: Records) -> bytes:
        """One array for each array or column. Nulls become NaN in numbers and "" in text."""
        arrays: Tensors = (
            {column.name: vector(column) for column in records} if isinstance(records, pl.DataFrame) else records
        )
        files = [(f"{name}.npy", npy.array_bytes(array)) for name, array in arrays.items()]
        members = [StoredMember(name, len(data), zlib.crc32(data), [data]) for name, data in files]
        return b"".join(piece for piece in stored_archive(members) if isinstance(piece, bytes))

    def assemble(self, parts: Iterable[Part], open: Open, records: int) -> Iterator[Piece]:
        """Each member with a new header and the values of all parts. A ZIP needs their checksums first, so every
        part is read once, 1 MiB at a time.

        Where parts differ in dtype (a longer string, a null among integers), the values of narrower parts are
        converted to the widest. Raises SchemaMismatch when parts differ in names or shapes, ValueError when their
        records are not `records`.
        """
        headers = [(part.key, _headers(open, part.key)) for part in parts]
        names = list(headers[0][1])
        for key, arrays in headers:
            if list(arrays) != names:
                raise SchemaMismatch(f"part {key} holds the arrays {list(arrays)}, the first part {names}")
        return stored_archive(
            _member(name, [(key, arrays[name]) for key, arrays in headers], open, records) for name in names
        )


@dataclass(frozen=True, slots=True)
class _Member:
    name: str
    stream: IO[bytes]
    header: npy.ArrayHeader

    @property
    def length(self) -> int:
        """Of axis 0; -1 for an array without axes."""
        return self.header.records if self.header.shape else -1

    def read(self, first: int, records: int) -> npt.NDArray[Any]:
        if not self.header.shape:
            return npy.read_scalar(self.stream, self.header)
        return npy.read_records(self.stream, self.header, first, records)


@contextmanager
def _members(source: BinaryIO, wanted: Collection[str] = ()) -> Iterator[list[_Member]]:
    """The arrays of an archive; beside those that are `wanted`, only arrays that can be read. Raises InvalidInput, also
    for faults found while reading."""
    try:
        with ZipFile(source) as archive:
            members = []
            infos = checked_members(archive)
            among = any(info.filename.removesuffix(".npy") in wanted for info in infos)
            for info in infos:
                if not info.filename.endswith(".npy"):
                    raise InvalidInput(f"the archive has a member {info.filename!r}: expected arrays, named *.npy")
                stream, start = member_data(source, archive, info)
                name = info.filename.removesuffix(".npy")
                try:
                    header = _plain_header(stream, start, start + info.file_size, name)
                except InvalidInput:
                    if name in wanted or not among:
                        raise
                else:
                    members.append(_Member(name, stream, header))
            yield members
    except DAMAGED as error:
        raise InvalidInput(f"the npz archive cannot be read, it is damaged or cut off: {error}") from error


def _plain_header(stream: IO[bytes], start: int, stop: int, name: str) -> npy.ArrayHeader:
    """The header of an array of an archive. Raises InvalidInput for one that is not read."""
    header = npy.read_header(stream, start, stop, f"the array {name!r}")
    if header.dtype.names:
        raise InvalidInput(f"the array {name!r} has fields (dtype {header.dtype}): save one array for each")
    return header


def _common_length(members: Sequence[_Member]) -> int:
    lengths = {member.name: member.length for member in members if member.header.shape}
    if not lengths:
        raise InvalidInput("the npz archive has no array with a record axis")
    if len(set(lengths.values())) > 1:
        listed = ", ".join(f"{name}: {length}" for name, length in lengths.items())
        raise InvalidInput(
            f"the arrays of the npz archive differ in length along axis 0: {listed}; give those that the model takes "
            "the names of its inputs, or name them by the option columns"
        )
    return next(iter(lengths.values()))


def _headers(open: Open, key: str) -> dict[str, npy.ArrayHeader]:
    with open(key) as source, _members(source) as members:
        return {member.name: member.header for member in members}


def _lone(source: BinaryIO) -> npy.ArrayHeader:
    """The header of an npy input that has a record axis."""
    header = npy.read_header(source, 0, source.seek(0, os.SEEK_END), "the input")
    if not header.shape:
        raise InvalidInput("the input is an array without axes: expected one record for each index of axis 0")
    return header


def _cut(records: int, bytes_per_record: int, after: Chunk | None, limits: ChunkLimits) -> Iterator[Chunk]:
    step = max(1, min(limits.records, limits.bytes // bytes_per_record))
    if records == 0 and after is None:
        yield Chunk(0, 0, 0, 0)
    for start in range(after.stop if after else 0, records, step):
        stop = min(start + step, records)
        yield Chunk(start, stop - start, start, stop)


def _member(name: str, arrays: Sequence[tuple[str, npy.ArrayHeader]], open: Open, records: int) -> StoredMember:
    """One array of all parts, in the widest of their dtypes."""
    _, first = arrays[0]
    if not first.shape:
        arrays, shape = arrays[:1], first.shape
    else:
        shape = (records, *first.shape[1:])
        if (count := sum(array.records for _, array in arrays if array.shape)) != records:
            raise ValueError(f"expected {records} records of {name!r} in the parts, got {count}")
    for key, array in arrays:
        if array.shape[1:] != shape[1:] or (array.dtype.kind == "U") != (first.dtype.kind == "U"):
            raise SchemaMismatch(
                f"part {key} holds {array.dtype} {array.shape[1:]} in each record of {name!r}, "
                f"the first part {first.dtype} {shape[1:]}"
            )
    dtype = reduce(np.promote_types, (array.dtype for _, array in arrays))
    header = npy.header_bytes(dtype, shape)
    crc, length = zlib.crc32(header), len(header)
    pieces: list[Iterable[Piece]] = [[header]]
    for key, array in arrays:
        for block in _values(open, key, array, dtype):
            crc = zlib.crc32(block, crc)
            length += len(block)
        if array.dtype == dtype:
            pieces.append([Span(key, array.data, array.data + array.bytes)])
        else:
            pieces.append(_values(open, key, array, dtype))
    return StoredMember(f"{name}.npy", length, crc, chain.from_iterable(pieces))


def _values(open: Open, key: str, array: npy.ArrayHeader, dtype: np.dtype[Any]) -> Iterator[bytes]:
    """The values of an array of a part as `dtype`, in blocks of whole values."""
    with open(key) as source:
        for block in npy.blocks(source, array):
            yield block if array.dtype == dtype else np.frombuffer(block, array.dtype).astype(dtype).tobytes()


def _matrix(frame: pl.DataFrame) -> npt.NDArray[Any]:
    if not all(column.dtype.is_numeric() or column.dtype in (pl.Boolean(), pl.Null()) for column in frame):
        raise InvalidOptions(_NUMBERS_ONLY)
    small = all(column.dtype in (pl.Float16(), pl.Float32()) for column in frame)
    kind = pl.Float32() if small else pl.Float64()
    columns = [column.cast(kind).fill_null(float("nan")).to_numpy() for column in frame]
    return columns[0] if len(columns) == 1 else np.column_stack(columns)


def empty(kind: ArrayType) -> npt.NDArray[Any]:
    """An array of that type without records."""
    return np.empty((0, *kind.shape[1:]), np.str_ if kind.dtype.kind in "SU" else kind.dtype.newbyteorder("="))


def frame_of(arrays: Tensors) -> pl.DataFrame:
    """A column for each array, of lists where a record has several values."""
    columns = []
    for name, array in arrays.items():
        text = array.dtype.kind == "U"
        kind: pl.DataType = pl.String() if text else pl.Series(values=np.empty(0, array.dtype)).dtype
        for _ in array.shape[1:]:
            kind = pl.List(kind)
        values = array.tolist() if text or not array.size else array
        columns.append(pl.Series(name, values).cast(kind) if len(array) else pl.Series(name, [], dtype=kind))
    return pl.DataFrame(columns)


def vector(column: pl.Series) -> npt.NDArray[Any]:
    """A column of numbers or text as an npz array. Raises InvalidOptions for other types."""
    if column.dtype.is_nested() or column.dtype in (pl.Binary(), pl.Object()):
        raise InvalidOptions(f"npz holds numbers and text, column {column.name!r} is {column.dtype}: request parquet")
    if column.dtype.is_float():
        return column.fill_null(float("nan")).to_numpy()
    if column.dtype.is_integer() or column.dtype in (pl.Boolean(), pl.Null()):
        return (
            column.cast(pl.Float64()).fill_null(float("nan")).to_numpy() if column.null_count() else column.to_numpy()
        )
    return np.asarray(column.cast(pl.String()).fill_null("").to_list(), np.str_)
