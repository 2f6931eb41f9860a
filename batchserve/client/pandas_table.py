"""Tables of pandas. Columns are taken one by one, which needs no pyarrow unless a column is made of it."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pandas as pd
import polars as pl

from batchserve.client.tables import Origins, Table, plain, require_names, series_of, series_of_array, slices
from batchserve.errors import InvalidInput

_REFUSED = (pd.PeriodDtype, pd.IntervalDtype)
_Take = Callable[[int, int], pl.Series]
"""The values of a column from one record to another."""


class PandasTable(Table):
    """A DataFrame or Series of pandas; a Series is a column. The index stays behind, and is that of the result."""

    repeatable = True

    def __init__(self, data: Any) -> None:
        if isinstance(data, pd.Series):
            data = data.to_frame()
        if not isinstance(data, pd.DataFrame):
            raise TypeError(f"cannot send a {type(data).__name__} of pandas: expected a DataFrame or Series")
        self._frame: pd.DataFrame = data
        self._names = [str(label) for label in data.columns]
        require_names(self._names)
        self._places = {name: place for place, name in enumerate(self._names)}
        self._takes = [_taking(data.iloc[:, place], name) for name, place in self._places.items()]

    @property
    def names(self) -> Sequence[str]:
        return self._names

    def frames(self) -> Iterator[pl.DataFrame]:
        taken = slices(len(self._frame), lambda start, stop: pl.DataFrame([take(start, stop) for take in self._takes]))
        return map(plain, taken)

    def restored(self, result: pl.DataFrame, origins: Origins) -> pd.DataFrame:
        columns: dict[Any, Any] = {}
        for name in result.columns:
            column = result.drop_in_place(name)  # so that no column is held twice
            if name not in origins:
                columns[name] = series_of_polars(column)
                continue
            place = self._places[origins[name]]
            original = self._frame.iloc[:, place]
            label = self._frame.columns[place] if name == origins[name] else name
            if original.dtype == object or isinstance(original.dtype, pd.CategoricalDtype):
                columns[label] = original.reset_index(drop=True)  # as it went, values of any kind
            else:
                columns[label] = _of_dtype(column, original.dtype)
        labels = list(columns)
        frame = pd.DataFrame(dict(enumerate(columns.values())), index=pd.RangeIndex(len(self._frame)), copy=False)
        frame.columns = pd.Index(labels, tupleize_cols=all(isinstance(label, tuple) for label in labels))
        if frame.columns.nlevels == self._frame.columns.nlevels:
            frame.columns.names = self._frame.columns.names
        frame.index = self._frame.index
        return frame


def _taking(column: "pd.Series[Any]", name: str) -> _Take:
    """Raises InvalidInput for a type that cannot be sent."""
    wide = isinstance(column.dtype, np.dtype) and column.dtype.kind == "f" and column.dtype.itemsize > 8
    if isinstance(column.dtype, _REFUSED) or getattr(column.dtype, "kind", "O") == "c" or wide:
        way = "float" if wide else "str"
        raise InvalidInput(
            f"column {name!r} holds {column.dtype}, which cannot be sent: convert it, as with astype({way})"
        )
    if column.dtype == object:
        whole = _of_objects(column, name)
        return lambda start, stop: whole[start:stop]
    if isinstance(column.dtype, pd.CategoricalDtype):
        categories = _series(column.dtype.categories.to_series().reset_index(drop=True), name)
        return lambda start, stop: _of_codes(column.iloc[start:stop], categories)
    return lambda start, stop: _series(column.iloc[start:stop], name)


def _of_codes(column: "pd.Series[Any]", categories: pl.Series) -> pl.Series:
    codes = pl.Series(column.cat.codes.to_numpy(), dtype=pl.Int64)
    return categories.gather(codes.set(codes < 0, None))


def _of_objects(column: "pd.Series[Any]", name: str) -> pl.Series:
    try:
        inferred = column.infer_objects()
    except UnicodeEncodeError:  # half of a pair of surrogates, which pandas' own type for texts does not hold
        inferred = column
    if inferred.dtype != object and not isinstance(inferred.dtype, _REFUSED):
        return _series(inferred, name)
    missing = column.isna().to_numpy()
    return series_of(name, [None if gone else value for value, gone in zip(column.array, missing, strict=True)])


def _series(column: "pd.Series[Any]", name: str) -> pl.Series:
    """A column of one type; what is missing is null."""
    dtype: Any = column.dtype
    if isinstance(dtype, pd.SparseDtype):
        return _series(column.sparse.to_dense(), name)  # type: ignore[attr-defined]
    if isinstance(dtype, pd.DatetimeTZDtype):
        naive = series_of_array(name, column.dt.tz_convert("UTC").dt.tz_localize(None).to_numpy())
        return _in_zone(naive.dt.replace_time_zone("UTC"), str(dtype.tz))
    if isinstance(dtype, pd.ArrowDtype) or getattr(dtype, "storage", None) == "pyarrow":
        from batchserve.client.arrow_table import series_of_arrow

        return series_of_arrow(name, column.array.__arrow_array__())
    if isinstance(dtype, np.dtype) and dtype.kind != "O":
        series = series_of_array(name, column.to_numpy())
        return series.fill_nan(None) if series.dtype.is_float() else series
    missing = column.isna().to_numpy()
    if getattr(dtype, "numpy_dtype", None) is not None and dtype.kind in "biuf":
        values = pl.Series(name, column.to_numpy(dtype.numpy_dtype, na_value=dtype.numpy_dtype.type(0)))
        return values.set(pl.Series(missing), None)
    return _of_objects(column.astype(object), name)


def _in_zone(times: pl.Series, zone: str) -> pl.Series:
    """In their time zone where it has a name that is known everywhere; an offset is told by UTC."""
    try:
        return times.dt.convert_time_zone(zone)
    except pl.exceptions.PolarsError:
        return times


def _of_dtype(column: pl.Series, dtype: Any) -> Any:
    """The values with the type that they had before they were sent."""
    if isinstance(dtype, pd.ArrowDtype):
        from batchserve.client.arrow_table import arrow_of

        return pd.array(arrow_of(column.to_arrow(), dtype.pyarrow_dtype), dtype=dtype)
    if getattr(dtype, "storage", None) == "pyarrow":
        return dtype.__from_arrow__(column.to_arrow())  # a list of Python's texts is several times as large
    if isinstance(dtype, pd.SparseDtype):
        return pd.arrays.SparseArray(column.to_numpy(), dtype=dtype)
    if getattr(dtype, "numpy_dtype", None) is not None and dtype.kind in "biuf":
        missing = column.is_null().to_numpy()
        array = pd.array(column.fill_null(0 if dtype.kind != "b" else False).to_numpy(), dtype=dtype)
        array[missing] = pd.NA
        return array
    if isinstance(dtype, pd.DatetimeTZDtype):
        return pd.Series(_utc(column)).dt.tz_convert(dtype.tz).astype(dtype)
    if isinstance(dtype, np.dtype) and dtype.kind != "O":
        return column.to_numpy().astype(dtype, copy=False)
    return pd.Series(column.to_list(), dtype=dtype)


def _utc(column: pl.Series) -> pd.DatetimeIndex:
    return pd.DatetimeIndex(column.dt.convert_time_zone("UTC").dt.replace_time_zone(None).to_numpy()).tz_localize("UTC")


def series_of_polars(column: pl.Series) -> Any:
    """The values in the type of pandas that holds them all: integers and booleans with nulls are nullable ones."""
    kind, gaps = column.dtype, column.null_count()
    if kind.is_integer() and kind not in (pl.Int128, pl.UInt128):
        return column.to_numpy() if not gaps else _of_dtype(column, pd.api.types.pandas_dtype(_nullable(kind)))
    if isinstance(kind, pl.Boolean):
        return column.to_numpy() if not gaps else _of_dtype(column, pd.BooleanDtype())
    if isinstance(kind, pl.Datetime) and kind.time_zone is not None:
        return pd.Series(_utc(column)).dt.tz_convert(kind.time_zone)
    if isinstance(kind, pl.Decimal | pl.Int128 | pl.UInt128 | pl.Time | pl.Struct | pl.Binary):
        return pd.Series(column.to_list(), dtype=object)
    return column.to_numpy()


def _nullable(kind: pl.DataType) -> str:
    return str(kind)  # Int8 to UInt64 are called alike
