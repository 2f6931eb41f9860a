"""The types in which columns of several inputs pass through to one result.

Files of formats with types have one type for a column, or no value in it. Those of JSON have none, and each is read by
its first records: together their values pass as they would from one file that has them all.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import polars as pl

from batchserve.domain import DType
from batchserve.errors import UnlikeInputs
from batchserve.formats.json_rows import written
from batchserve.formats.protocol import Header
from batchserve.formats.schema import cast_column, shorten

__all__ = ["Kinds", "Seen", "common_kinds", "fitted", "seen_in"]

Kinds = Mapping[str, pl.DataType]
"""The types of passed columns, by name."""

_EXACT = 2**53
"""Up to here float64 represents every integer."""
_INTEGERS = (pl.Int64(), pl.UInt64())
_READ_AS: dict[pl.DataType, DType] = {
    pl.Boolean(): "bool",
    pl.Int64(): "int64",
    pl.UInt64(): "uint64",
    pl.Float64(): "float64",
}
"""The types of JSON, besides texts."""


@dataclass(frozen=True, slots=True)
class Seen:
    """What one input has in a column."""

    kind: pl.DataType
    is_typed: bool
    """Whether the file says so, and not its first values."""
    low: int = 0
    high: int = 0
    """The least and the largest of its first integers."""


def seen_in(header: Header, names: Iterable[str]) -> dict[str, Seen]:
    """What an input has in its columns, without those that have no value."""
    found: dict[str, Seen] = {}
    for name in names:
        kind = header.columns.get(name)
        if kind is not None and kind != pl.Null():
            found[name] = Seen(kind, is_typed=True)
        elif kind is None and header.decimal is None and name in header.columns:  # in CSV all are texts
            sample = header.sample
            if isinstance(sample, pl.DataFrame) and sample[name].null_count() < sample.height:
                found[name] = _by_values(sample[name])
    return found


def _by_values(values: pl.Series) -> Seen:
    if values.dtype not in _INTEGERS:
        return Seen(values.dtype, is_typed=False)
    low, high = values.min(), values.max()
    assert isinstance(low, int)
    assert isinstance(high, int)
    return Seen(values.dtype, is_typed=False, low=low, high=high)


def common_kinds(inputs: Iterable[tuple[str, Mapping[str, Seen]]]) -> tuple[Kinds, dict[str, list[str]]]:
    """The type of each column that has a value in any input, and what is unlike, by the names of the inputs."""
    by_column: dict[str, list[tuple[str, Seen]]] = {}
    for key, columns in inputs:
        for name, seen in columns.items():
            by_column.setdefault(name, []).append((key, seen))
    kinds: dict[str, pl.DataType] = {}
    faults: dict[str, list[str]] = {}
    for name, found in by_column.items():
        first, begun = found[0]
        kinds[name] = begun.kind if begun.is_typed else _of_json([seen for _, seen in found])
        for key, seen in found if begun.is_typed else ():
            if seen.kind != begun.kind:
                fault = f"has {seen.kind} in {name!r} instead of {begun.kind}, which {first} has"
                faults.setdefault(key, []).append(fault)
    return kinds, faults


def _of_json(found: Sequence[Seen]) -> pl.DataType:
    """The type that the values would have in one file."""
    kinds = {seen.kind for seen in found}
    if len(kinds) == 1:
        return found[0].kind
    low, high = min(seen.low for seen in found), max(seen.high for seen in found)
    if kinds <= set(_INTEGERS) and low >= 0:
        return pl.UInt64()
    if kinds <= {*_INTEGERS, pl.Float64()} and pl.Float64() in kinds and -_EXACT <= low <= high <= _EXACT:
        return pl.Float64()
    return pl.String()


def fitted(columns: pl.DataFrame, kinds: Kinds, header: Header, key: str) -> pl.DataFrame:
    """Columns of an input in the types that they have in all. Raises UnlikeInputs, where values behind the first ones
    of the input do not fit."""
    return columns.with_columns(_fitted(columns, kinds, header, key))


def _fitted(columns: pl.DataFrame, kinds: Kinds, header: Header, key: str) -> Iterator[pl.Series]:
    for column in columns:
        kind = kinds.get(column.name, column.dtype)
        if column.dtype == kind:
            continue
        if column.dtype == pl.Null() or column.null_count() == len(column):
            yield pl.Series(column.name, [None], dtype=kind).new_from_index(0, len(column))
        elif header.columns.get(column.name) is None and (cast := _as_json(column, kind)) is not None:
            yield cast
        else:
            has = f"has {column.dtype} in {column.name!r} instead of {kind}, for example {_example(column)}"
            raise UnlikeInputs(f"{key} is unlike the other inputs: {has}")


def _as_json(column: pl.Series, kind: pl.DataType) -> pl.Series | None:
    """The values of a column that were read in another type. None: some cannot have this one."""
    if kind == pl.String():
        if column.dtype == pl.Float64():
            return pl.Series(column.name, [None if value is None else written(value) for value in column], kind)
        return column.cast(kind)
    if column.dtype in _INTEGERS and kind == pl.Float64() and not column.is_between(-_EXACT, _EXACT).all():
        return None
    cast, faults = cast_column(column, _READ_AS[kind]) if kind in _READ_AS else (None, [])
    return None if faults else cast


def _example(column: pl.Series) -> str:
    return shorten(column.drop_nulls()[0])
