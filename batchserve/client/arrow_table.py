"""Tables of pyarrow, and of everything that gives an Arrow stream: DuckDB, Ibis and more."""

from collections.abc import Iterator, Sequence
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.compute as pc

from batchserve.client.ipc import cut
from batchserve.client.tables import Origins, Table, plain, require_names
from batchserve.errors import InvalidInput

_WIDEST = 38
"""Digits of a decimal that can be sent."""


class ArrowTable(Table):
    """A Table, RecordBatch or RecordBatchReader of pyarrow, which come back as such; of what else gives a stream, a
    Table comes back. What is no table of pyarrow is read once, batch by batch."""

    def __init__(self, data: Any) -> None:
        self._data = data
        self.repeatable = isinstance(data, pa.Table | pa.RecordBatch)
        if isinstance(data, pa.RecordBatch):
            self._reader = pa.Table.from_batches([data]).to_reader()
        elif isinstance(data, pa.Table):
            self._reader = data.to_reader()
        else:
            self._reader = pa.RecordBatchReader.from_stream(data)
        self._schema: pa.Schema = self._reader.schema
        require_names(self._schema.names)

    @property
    def names(self) -> Sequence[str]:
        return list(self._schema.names)

    def frames(self) -> Iterator[pl.DataFrame]:
        return map(plain, cut(self._given()))

    def _given(self) -> Iterator[pl.DataFrame]:
        nothing = [pa.nulls(0, field.type) for field in self._schema]
        yield self._frame(pa.RecordBatch.from_arrays(nothing, schema=self._schema))
        batches = pa.Table.from_batches([self._data]) if isinstance(self._data, pa.RecordBatch) else self._data
        yield from map(self._frame, batches.to_batches() if self.repeatable else self._reader)

    def _frame(self, batch: pa.RecordBatch) -> pl.DataFrame:
        return pl.DataFrame([series_of_arrow(name, column) for name, column in zip(self.names, batch, strict=True)])

    def restored(self, result: pl.DataFrame, origins: Origins) -> Any:
        fields, columns = [], []
        for column in result:
            given = column.to_arrow()
            field = pa.field(column.name, given.type)
            if column.name in origins:
                field = self._schema.field(origins[column.name]).with_name(column.name)
                given = arrow_of(given, field.type)
                field = field if field.nullable or not given.null_count else field.with_nullable(True)
            fields.append(field)
            columns.append(given)
        table = pa.Table.from_arrays(columns, schema=pa.schema(fields, self._schema.metadata))
        if isinstance(self._data, pa.RecordBatch):
            return (
                table.combine_chunks().to_batches()[0]
                if table.num_rows
                else pa.RecordBatch.from_pylist([], schema=table.schema)
            )
        return table.to_reader() if isinstance(self._data, pa.RecordBatchReader) else table


def series_of_arrow(name: str, array: Any) -> pl.Series:
    """An Array or ChunkedArray as a column. Raises InvalidInput for a type that cannot be sent."""
    try:
        return pl.Series(name, pl.from_arrow(arrow_of(array, _sent(array.type))))
    except (pa.ArrowException, pl.exceptions.PolarsError, pl.exceptions.PanicException) as error:
        kind = array.type
        raise InvalidInput(f"column {name!r} holds {kind}, which cannot be sent: cast it to another type") from error


def _sent(kind: Any) -> Any:
    """The type that polars reads for values of this one: without dictionaries, runs, views and extensions."""
    if isinstance(kind, pa.BaseExtensionType):
        return _sent(kind.storage_type)
    if pa.types.is_dictionary(kind) or pa.types.is_run_end_encoded(kind):
        return _sent(kind.value_type)
    if pa.types.is_fixed_size_list(kind):
        return pa.list_(_sent(kind.value_type), kind.list_size)
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or _is_list_view(kind):
        return pa.large_list(_sent(kind.value_type))
    if pa.types.is_struct(kind):
        return pa.struct([pa.field(field.name, _sent(field.type)) for field in kind])
    if pa.types.is_map(kind):
        return pa.map_(_sent(kind.key_type), _sent(kind.item_type))
    if pa.types.is_timestamp(kind) and kind.tz is not None and kind.tz.startswith(("+", "-")):
        return pa.timestamp(kind.unit, "UTC")  # an offset is no zone with a name
    if pa.types.is_decimal(kind) and (kind.scale < 0 or kind.precision > _WIDEST):
        scale = max(0, kind.scale)
        return pa.decimal128(min(_WIDEST, kind.precision - kind.scale + scale), scale)
    return kind


def _is_list_view(kind: Any) -> bool:
    return bool(pa.types.is_list_view(kind) or pa.types.is_large_list_view(kind))


def _holds_views(kind: Any) -> bool:
    return _is_list_view(kind) or any(_holds_views(kind.field(place).type) for place in range(kind.num_fields))


def arrow_of(array: Any, kind: Any) -> Any:
    """The values as another type that holds them: on the way, and as they were before."""
    given = array.type
    if given == kind:
        return array
    if isinstance(array, pa.ChunkedArray):
        return pa.chunked_array([arrow_of(chunk, kind) for chunk in array.chunks], kind)
    if isinstance(given, pa.BaseExtensionType):
        return arrow_of(array.storage, kind)
    if pa.types.is_dictionary(given):
        return arrow_of(array.dictionary_decode(), kind)
    if pa.types.is_run_end_encoded(given):
        return arrow_of(pc.run_end_decode(array), kind)
    return _encoded(array, kind)


def _encoded(array: Any, kind: Any) -> Any:
    if isinstance(kind, pa.BaseExtensionType):
        return pa.ExtensionArray.from_storage(kind, arrow_of(array, kind.storage_type))
    if pa.types.is_dictionary(kind):
        encoded = arrow_of(array, kind.value_type).dictionary_encode()
        indices = encoded.indices.cast(kind.index_type)
        return pa.DictionaryArray.from_arrays(indices, encoded.dictionary, ordered=kind.ordered)
    if pa.types.is_run_end_encoded(kind):
        return pc.run_end_encode(arrow_of(array, kind.value_type), run_end_type=kind.run_end_type)
    if _holds_views(array.type):
        return pa.array(array.to_pylist(), kind)  # pyarrow's cast of these gives other values
    try:
        return array.cast(kind)
    except (pa.ArrowNotImplementedError, pa.ArrowIndexError):
        return pa.array(array.to_pylist(), kind)
