"""Types of columns: the polars type of a dtype, and the cast of values to a dtype."""

import re
from functools import cache
from typing import Any

import numpy as np
import polars as pl

from batchserve.domain import DType, RowError

__all__ = [
    "EXACT",
    "POLARS",
    "as_base64",
    "cast_column",
    "holds_bytes",
    "instance",
    "numpy_type",
    "polars_type",
    "reaches_limits",
    "shorten",
]

POLARS: dict[DType, pl.DataType] = {
    "float16": pl.Float16(),
    "float32": pl.Float32(),
    "float64": pl.Float64(),
    "int8": pl.Int8(),
    "int16": pl.Int16(),
    "int32": pl.Int32(),
    "int64": pl.Int64(),
    "uint8": pl.UInt8(),
    "uint16": pl.UInt16(),
    "uint32": pl.UInt32(),
    "uint64": pl.UInt64(),
    "bool": pl.Boolean(),
    "string": pl.String(),
}

_WORDS = {"true": True, "false": False}
"""What pandas, R and JSON write for truth values, in any case."""
_TRUTH = {**_WORDS, "1": True, "0": False}
_SHOWN = 80
_DECIMAL = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)
_INFINITY = r"(?i)^[+-]?inf(inity)?$"
EXACT = 2**53 - 1
"""Up to here distinct integers are distinct as float64."""


def polars_type(dtype: DType) -> pl.DataType:
    """The type that a column of `dtype` has in a polars frame."""
    return POLARS[dtype]


@cache
def numpy_type(dtype: DType) -> np.dtype[Any]:
    """The type of a tensor's array; strings are Python objects."""
    return np.dtype(object if dtype == "string" else dtype)


def holds_bytes(kind: pl.DataType | None) -> bool:
    """Whether a column of this type holds files: bytes, or structs with a field `bytes`, as Hugging Face's datasets."""
    if isinstance(kind, pl.Struct):
        return any(field.name == "bytes" for field in kind.fields)
    return isinstance(kind, pl.Binary)


def as_base64(frame: pl.DataFrame) -> pl.DataFrame:
    """The frame with bytes as base64, also those in lists and structs: texts cannot hold raw bytes."""
    texts = [_as_base64(pl.col(name), kind).alias(name) for name, kind in frame.schema.items() if _has_bytes(kind)]
    return frame.with_columns(texts) if texts else frame


def _has_bytes(kind: pl.DataType) -> bool:
    match kind:
        case pl.Struct():
            return any(_has_bytes(instance(field.dtype)) for field in kind.fields)
        case pl.List() | pl.Array():
            return _has_bytes(instance(kind.inner))
    return isinstance(kind, pl.Binary)


def _as_base64(values: pl.Expr, kind: pl.DataType) -> pl.Expr:
    match kind:
        case pl.Binary():
            return values.bin.encode("base64")
        case pl.Struct():
            fields = (_as_base64(pl.field(field.name), instance(field.dtype)) for field in kind.fields)
            return values.struct.with_fields(*fields)
        case pl.List():
            return values.list.eval(_as_base64(pl.element(), instance(kind.inner)))
        case pl.Array():
            return values.arr.eval(_as_base64(pl.element(), instance(kind.inner)))
    return values


def instance(kind: Any) -> pl.DataType:
    """polars gives the type inside of another as an instance or as a class."""
    return kind if isinstance(kind, pl.DataType) else kind()


def cast_column(series: pl.Series, dtype: DType, first: int = 0) -> tuple[pl.Series, list[RowError]]:
    """The values as `dtype`, under the same name, and an error for each that does not fit: it becomes null.

    Fitting is about values, not about types: 3.0 and "3.0" are integers, 1 and "true" are booleans, true and "true" are
    the number 1.
    Nothing is truncated and no integer wraps around; a number is rounded to the precision of a float type, but not to
    infinity. Nulls stay nulls and are no error. `first` is the number of the first value's record.
    """
    target = POLARS[dtype]
    if series.dtype == target:
        return series, []
    cast = _cast(series, target)
    if cast.null_count() == series.null_count():
        return cast, []
    faulty = (cast.is_null() & series.is_not_null()).arg_true()
    errors = [
        RowError(first + index, "wrong-type", f"expected {dtype}, got {shown(value, dtype)}", series.name)
        for index, value in zip(faulty.to_list(), series.gather(faulty).to_list(), strict=True)
    ]
    return cast, errors


def with_points(text: pl.Series) -> pl.Series:
    """Numbers with decimal commas as numbers with points. One that has a point, which may group thousands, is none."""
    return text.str.replace_all(".", "\0", literal=True).str.replace_all(",", ".", literal=True)


def reaches_limits(series: pl.Series) -> bool:
    """Whether a column of floats holds infinity, or a number that is as large as its type can hold."""
    limit = _LIMITS[series.dtype]
    low, high = series.min(), series.max()
    return bool((high is not None and high >= limit) or (low is not None and low <= -limit))  # type: ignore[operator]


_LIMITS: dict[pl.DataType, float] = {
    pl.Float16(): 65504.0,
    pl.Float32(): float(np.finfo(np.float32).max),
    pl.Float64(): float(np.finfo(np.float64).max),
}


def shown(value: object, dtype: DType) -> str:
    """The value that does not fit. Only too large numbers do not fit a float: they are shown in the same way for every
    format."""
    if dtype.startswith("float") and not isinstance(value, bool):
        text = str(value).strip()
        if _DECIMAL.fullmatch(text):
            number = float(text)
            return f"{shorten(number) if np.isfinite(number) else text[:_SHOWN]}, which is beyond its range"
    return shorten(value)


def shorten(value: object) -> str:
    """The value for a message: one line of at most 80 characters."""
    text = repr(value[:_SHOWN] if isinstance(value, str | bytes) else value)
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}..."


def _cast(series: pl.Series, target: pl.DataType) -> pl.Series:
    source = series.dtype
    if isinstance(source, pl.Categorical | pl.Enum):
        return _cast(series.cast(pl.String()), target)
    if source == pl.String():
        return _parse(series, target)
    if target == pl.String():
        castable = source.is_numeric() or source.is_temporal() or isinstance(source, pl.Boolean | pl.Null)
        return series.cast(target) if castable else _nothing(series, target)
    if isinstance(source, pl.Boolean | pl.Null):
        return series.cast(target)
    if not source.is_numeric():
        return _nothing(series, target)
    if target == pl.Boolean():
        return series.cast(target).set((series != 0) & (series != 1), None)
    cast = series.cast(target, strict=False)
    if target.is_integer() and not source.is_integer():
        # A cast of 1.5 gives 1: a value fits only if it survives a round trip.
        cast = cast.set(cast.cast(source, strict=False) != series, None)
        return cast.set(series.abs() > EXACT, None) if source.is_float() else cast
    if target.is_float() and reaches_limits(cast):
        finite = series.is_finite() if source.is_float() else pl.Series([True])
        return cast.set(cast.is_infinite() & finite, None)
    return cast


def _parse(text: pl.Series, target: pl.DataType) -> pl.Series:
    if target == pl.String():
        return text
    text = text.str.strip_chars()
    if target == pl.Boolean():
        return _truth(text, _TRUTH)
    numbers = _parse_numbers(text, target)
    if numbers.null_count() == text.null_count():
        return numbers
    # A column of truth values is text where it comes from a CSV, or has other values beside them.
    return numbers.zip_with(numbers.is_not_null(), _truth(text, _WORDS).cast(target))


def _truth(text: pl.Series, words: dict[str, bool]) -> pl.Series:
    return text.str.to_lowercase().replace_strict(words, default=None, return_dtype=pl.Boolean())


def _parse_numbers(text: pl.Series, target: pl.DataType) -> pl.Series:
    cast = text.cast(target, strict=False)
    if target.is_float() and reaches_limits(cast):
        # Through float64, as numbers other than texts come: so the same ones are rounded to infinity.
        number = text.cast(pl.Float64(), strict=False)
        number = number.set(number.is_infinite() & ~text.str.contains(_INFINITY), None)
        return _cast(number, target) if target != number.dtype else number
    if target.is_integer() and cast.null_count() > text.null_count():
        number = text.cast(pl.Float64(), strict=False)
        exact = number.set(number.abs() > EXACT, None)
        return cast.zip_with(cast.is_not_null(), _cast(exact, target))
    return cast


def _nothing(series: pl.Series, target: pl.DataType) -> pl.Series:
    return pl.Series(series.name, [None], dtype=target).new_from_index(0, len(series))
