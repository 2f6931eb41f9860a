"""Records of CSV as matrices of the numbers that a model takes, and a table of the other columns."""

from collections.abc import Mapping, Sequence
from typing import BinaryIO

from batchserve.domain import Chunk, Dialect, DType
from batchserve.formats.csv_table import read_kept, read_table
from batchserve.formats.matrices import Layout, read_layout, with_flagged
from batchserve.formats.protocol import Block, Reading

__all__ = ["read_matrices"]


def read_matrices(
    source: BinaryIO,
    dialect: Dialect,
    names: Sequence[str],
    types: Mapping[str, DType],
    chunk: Chunk,
    blocks: Sequence[Block],
    kept: Sequence[str],
) -> Reading | None:
    """The `blocks` of a chunk, and the columns that are `kept`: those of blocks as they are written. None where polars
    must read it: quotation marks, lines that differ in form, many odd numbers."""
    if dialect.decimal == dialect.delimiter:
        return None

    def layout_of(line: bytes) -> Layout:
        after = b"\r" if line.endswith(b"\r\n") else b""
        return Layout(tuple(names), dialect.delimiter, dialect.decimal, after=after)

    fields = read_layout(source, chunk, layout_of, blocks, kept, ())
    if fields is None:
        return None
    rest = [name for name in names if name in set(kept)]
    numbers = {name: block.dtype for block in blocks for name in block.columns}
    others = {name: dtype for name, dtype in types.items() if name in rest and name not in numbers}
    frame = read_kept(fields.kept, dialect, rest, others, chunk.records)
    if frame is None:
        return None

    def read(lines: bytes, records: int) -> Reading:
        return Reading(*read_table(lines, dialect, list(names), numbers, Chunk(0, records, 0, len(lines))))

    return with_flagged(Reading(frame, [], fields.matrices), fields, blocks, read)
