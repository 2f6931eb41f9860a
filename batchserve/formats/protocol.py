"""The interface of file formats: cutting bytes into chunks, reading, writing and assembling. Its implementations are
interchangeable. Every part that `write` makes is a complete file of its format, so a part can be read alone, and
`assemble` only copies spans of parts and adds the parts that a file has once (a header, brackets, a footer).
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, BinaryIO, Literal, Protocol

import numpy as np
import polars as pl

from batchserve.domain import Chunk, ChunkLimits, DType, RowError
from batchserve.storage import Piece

Tensors = dict[str, np.ndarray]
"""Named arrays that share axis 0, the record axis. A single npy array has the name ""."""

Records = pl.DataFrame | Tensors
"""The records of one chunk."""


@dataclass(frozen=True, slots=True)
class ArrayType:
    """What an array of a file is."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    per_record: bool = True
    """Whether axis 0 is that of the records."""


@dataclass(frozen=True, slots=True)
class Header:
    """The beginning of an input, read before planning.

    `columns`: names in file order, each with its type when the format has types (CSV and JSON: None). Empty for arrays.
    `sample`: the first records (at most 100), untyped formats as strings (CSV) or as JSON types. It is read on access,
    even after the source was closed: every scoring process needs the columns, few the sample.
    `decimal`: the decimal mark in these strings; None where numbers are typed.
    """

    columns: dict[str, pl.DataType | None]
    read_sample: Callable[[], Records]
    decimal: str | None = None
    arrays: Mapping[str, ArrayType] = field(default_factory=dict)
    """Of npy and npz, by name. Empty for tables."""

    @property
    def sample(self) -> Records:
        return self.read_sample()


@dataclass(frozen=True, slots=True)
class Block:
    """Columns of numbers, all of one type, that fill an input of a model side by side."""

    name: str
    """That of the input."""
    columns: tuple[str, ...]
    dtype: DType


@dataclass(frozen=True, slots=True)
class Matrix:
    """The numbers of a block, [records, columns]. A missing one is NaN; an integer is 0 and `absent`."""

    values: np.ndarray
    absent: np.ndarray | None = None


@dataclass(frozen=True, slots=True)
class Reading:
    """The records of one chunk: exactly `chunk.records` of them, faulty ones with nulls in the columns at fault.

    The errors count from 0 in the chunk.
    """

    records: Records
    errors: list[RowError] = field(default_factory=list)
    matrices: Mapping[str, Matrix] = field(default_factory=dict)
    """By the names of their blocks; see `MatrixReader`."""


@dataclass(frozen=True, slots=True)
class Part:
    """The output of one chunk: a stored object of `bytes` length that holds `records` records."""

    key: str
    bytes: int
    records: int


class Open(Protocol):
    """`Storage.open`."""

    def __call__(self, key: str) -> BinaryIO: ...


Holds = Literal["table", "array", "arrays"]
"""The content of a file: a table, one unnamed array, or named arrays."""


class Format(Protocol):
    """One file format, bound to the dialect that its files are read and written in (`get_format`).

    Sources are seekable binary files, opened by the caller; a real file has `name`, and of a `RangedReader` only what
    is read is fetched. Any method raises InvalidInput, with the position (line, record, column, byte), what was
    expected and what was found, when the file as a whole cannot be read. A fault of a single record is never raised: it
    is a RowError in the Reading.
    """

    @property
    def name(self) -> str:
        """The word in `?format=`: csv, jsonl, json, parquet, arrow, arrows, npy, npz. Those of images, zip, jpeg, png,
        webp and gif, are for inputs only: writing and assembling raise InvalidOptions."""
        ...

    @property
    def media_type(self) -> str: ...

    @property
    def suffix(self) -> str: ...

    @property
    def family(self) -> str:
        """The same for formats that only differ in the framing of values."""
        ...

    @property
    def holds(self) -> Holds: ...

    @property
    def is_text(self) -> bool:
        """Whether records are text of about the same length, which is cut wherever one ends."""
        ...

    @property
    def has_types(self) -> bool:
        """Whether a file distinguishes numbers from texts that look like numbers. CSV does not."""
        ...

    @property
    def chunk_scale(self) -> int:
        """Size limit of a chunk relative to one of text, by the memory for each byte."""
        ...

    def header(self, source: BinaryIO, /) -> Header: ...

    def plan(self, source: BinaryIO, after: Chunk | None, limits: ChunkLimits, /) -> Iterator[Chunk]:
        """The chunks that follow `after` (None: from the beginning), contiguous and in order.

        Cutting again after any chunk with any limits is allowed: that is how planning resumes and how a chunk is
        halved. An input without records is one chunk of 0 records. Memory is bounded by the limits, not by the input.
        """
        ...

    def end(self, source: BinaryIO, /) -> int:
        """Where the records end, in the unit of `Chunk.stop`, to compute the progress of planning."""
        ...

    def read(
        self,
        source: BinaryIO,
        chunk: Chunk,
        types: Mapping[str, DType],
        columns: Sequence[str] | None = None,
        /,
    ) -> Reading:
        """The records of a chunk. Columns named in `types` come in the polars type of that dtype; others as the
        format has them (CSV: text as written). `columns`: keep only these (None: all), in file order.

        A value that does not fit its type gives null and a RowError. An empty CSV field, a JSON null or an absent JSON
        key is null and no error: the model decides what a missing value means.
        """
        ...

    def write(self, records: Records, /) -> bytes:
        """A complete file of these records. Equal records give equal bytes."""
        ...

    def assemble(self, parts: Iterable[Part], open: Open, records: int, /) -> Iterator[Piece]:
        """The pieces of one file of all parts in order, `records` records in all. At least one part. Parts are taken
        lazily, so that a conversion can stream."""
        ...


@dataclass(frozen=True, slots=True)
class Outline:
    """What a file says of itself, without its records."""

    layout: bytes
    """The same for files whose columns have the same names and types, in the same order."""
    records: int


class FilesReader(ABC):
    """A Format that outlines a file in no time, and reads several as one table, much faster than one by one."""

    @abstractmethod
    def outline(self, source: BinaryIO, like: bytes = b"") -> Outline:
        """`like`: the layout that it probably has. Raises InvalidInput."""

    @abstractmethod
    def read_files(
        self,
        sources: Sequence[BinaryIO],
        records: int,
        types: Mapping[str, DType],
        columns: Sequence[str] | None,
    ) -> Reading | None:
        """All records of files of one layout, as `read` gives those of one. None: these cannot be read together."""


class MatrixReader(ABC):
    """A Format that may read the numbers of a model straight into its matrices, several times as fast."""

    @abstractmethod
    def read_matrices(
        self,
        source: BinaryIO,
        chunk: Chunk,
        types: Mapping[str, DType],
        columns: Sequence[str] | None,
        blocks: Sequence[Block],
        kept: Sequence[str],
    ) -> Reading:
        """The same as `read`, or the `blocks` as matrices, and as records the columns that are `kept`: those of blocks
        as they are written, all others as `read` gives them. The numbers and the errors are those of `read`."""
