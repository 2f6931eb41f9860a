"""A result is written in another format, chunk by chunk."""

from dataclasses import dataclass

import polars as pl

from batchserve.domain import Chunk, Dialect, DType, ModelVersion
from batchserve.formats import get_format
from batchserve.formats.csv import escape_formulas
from batchserve.formats.protocol import Part
from batchserve.formats.schema import POLARS
from batchserve.inference.outputs import ResultSchema
from batchserve.scoring.faults import by_name
from batchserve.scoring.inputs import Input, header_of, storage_at

DTYPES = {kind: dtype for dtype, kind in POLARS.items()}


@dataclass(frozen=True, slots=True)
class ConvertTask:
    """One chunk of a result, to be written in another format."""

    input: Input
    """The result."""
    chunk: Chunk
    model: ModelVersion
    top_k: int | None
    format: str
    dialect: Dialect
    key: str
    """Key of the part to write."""
    escape: bool
    """Whether texts that a spreadsheet would evaluate as formulas are escaped."""


@by_name
def convert_chunk(task: ConvertTask) -> Part:
    """Writes one chunk of a result in another format. Types that the result's format lacks come from the model. Between
    formats without types all is text, so that numbers keep their digits.
    """
    reader, writer_format = task.input.reader, get_format(task.format, task.dialect)
    types = _types_of(task) if reader.has_types or writer_format.has_types else {}
    with task.input.open() as source:
        records = reader.read(source, task.chunk, types).records
    if task.escape and isinstance(records, pl.DataFrame):
        records = escape_formulas(records)
    with storage_at(task.input.storage).create(task.key) as writer:
        writer.write(writer_format.write(records))
        return Part(task.key, writer.commit().bytes, task.chunk.records)


def _types_of(task: ConvertTask) -> dict[str, DType]:
    """The types of a result's columns: the model's outputs have those of its signature, the others stay text."""
    there, signature = header_of(task.input).columns, task.model.signature
    if task.input.reader.holds == "table" and None not in there.values():
        return {}  # the file tells the types in which the values came: no other type holds them all
    taken = {
        column.name: column.dtype for column in signature.columns if column.name in there and column.dtype != "image"
    }
    given = ResultSchema(signature, task.top_k).columns
    return taken | {name: dtype for name, kind in given.items() if (dtype := DTYPES.get(kind))}
