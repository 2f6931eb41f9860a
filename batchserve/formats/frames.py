"""Shared by formats with typed columns: conversion of polars' frames to Readings."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import polars as pl

from batchserve.domain import Chunk, DType, RowError
from batchserve.errors import InvalidInput, SchemaMismatch
from batchserve.formats.protocol import Reading
from batchserve.formats.schema import cast_column, instance

__all__ = ["SAMPLE", "decoding", "plain", "typed"]

SAMPLE = 100
"""Records in the sample of a Header."""


@contextmanager
def decoding(what: str) -> Iterator[None]:
    """Turns any exception of polars for damaged bytes into InvalidInput. `what` begins the sentence."""
    try:
        yield
    except (pl.exceptions.PolarsError, pl.exceptions.PanicException, OSError, ValueError, OverflowError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise InvalidInput(f"{what} cannot be read: {reason[:200]}") from error


def plain(frame: pl.DataFrame) -> pl.DataFrame:
    """The frame with categoricals and enums as strings, also in lists and structs."""
    if not any(isinstance(kind, pl.Categorical | pl.Enum) or kind.is_nested() for kind in frame.schema.values()):
        return frame
    texts = {name: text for name, kind in frame.schema.items() if (text := _without_categories(kind)) != kind}
    return frame.cast(texts) if texts else frame  # type: ignore[arg-type]


def _without_categories(kind: pl.DataType) -> pl.DataType:
    match kind:
        case pl.Categorical() | pl.Enum():
            return pl.String()
        case pl.List():
            return pl.List(_without_categories(instance(kind.inner)))
        case pl.Array():
            return pl.Array(_without_categories(instance(kind.inner)), kind.size)
        case pl.Struct():
            return pl.Struct({field.name: _without_categories(instance(field.dtype)) for field in kind.fields})
    return kind


def typed(frame: pl.DataFrame, chunk: Chunk, types: Mapping[str, DType], columns: Sequence[str] | None) -> Reading:
    """The records of a chunk, of the columns asked for, in the types asked for.

    Raises InvalidInput when there are more or fewer records than planned, SchemaMismatch for a column whose type has
    no values that could ever become `types`.
    """
    if frame.height != chunk.records:
        raise InvalidInput(
            f"expected {chunk.records} records from record {chunk.first_record} on, got {frame.height}: "
            "the counts in the input contradict its data"
        )
    if columns is not None:
        frame = frame.select(pl.col([name for name in frame.columns if name in set(columns)]))
    frame = plain(frame)
    errors: list[RowError] = []
    casts = []
    for name, dtype in types.items():
        if name not in frame.columns:
            continue
        series = frame[name]
        if series.dtype.is_nested() or series.dtype in (pl.Binary(), pl.Object()):
            raise SchemaMismatch(
                f"column {name!r}: expected {dtype}, got {series.dtype}",
                errors=[{"column": name, "expected": dtype, "got": str(series.dtype)}],
            )
        cast, faults = cast_column(series, dtype)
        casts.append(cast)
        errors += faults
    errors.sort(key=lambda error: error.record)
    return Reading(frame.with_columns(casts), errors)
