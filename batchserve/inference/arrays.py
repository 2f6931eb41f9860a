"""Columns that hold an array in each record: lists in Parquet and Arrow, JSON text elsewhere."""

from collections.abc import Callable
from typing import Any

import numpy as np
import orjson
import polars as pl

from batchserve.domain import DType, InputTensor, RowError
from batchserve.errors import SchemaMismatch
from batchserve.formats.schema import numpy_type, shorten
from batchserve.inference.faults import InvalidValue, RecordErrors
from batchserve.inference.unfilled import shape_text, wanted_array

__all__ = ["Ragged", "array_fault", "holds_arrays", "misfits", "read_arrays"]

_EXACT = 2**53 - 1
"""Up to here no two integers are the same float64."""


class Ragged:
    """The arrays of one input that are not contiguous: their sizes differ, or some records have none that fits.

    `shapes` [records, axes] are their sizes, `stops` [records] tell where each ends in `values`.
    """

    def __init__(self, values: np.ndarray, shapes: np.ndarray, stops: np.ndarray) -> None:
        self.shapes = shapes
        self._values, self._stops = values, stops

    def __len__(self) -> int:
        return len(self.shapes)

    def take(self, records: np.ndarray) -> np.ndarray:
        """The arrays of these records, which have the same size."""
        shape = self.shapes[records[0]]
        size = shape.prod()
        return np.stack([self._values[stop - size : stop].reshape(shape) for stop in self._stops[records].tolist()])


def holds_arrays(kind: pl.DataType | None, first_values: Callable[[], pl.Series]) -> bool:
    """Whether a column holds arrays: by its type or, where that says nothing, by the first value there is."""
    if kind is not None and kind != pl.String():
        return isinstance(kind, pl.List | pl.Array)
    first = next((value for value in first_values().to_list() if value is not None), None)
    return isinstance(first, str) and isinstance(_json(first), list)


def array_fault(tensor: InputTensor, kind: pl.DataType | None, values: pl.Series) -> str | None:
    """Why a column of this type, or with these first values, cannot fill an input; None when it can."""
    kind = kind or values.dtype
    if not isinstance(kind, pl.String | pl.Null):
        return _type_fault(tensor, kind)
    given = values.drop_nulls()
    _, errors = read_arrays(given, tensor)
    return errors[0].message if 0 < len(given) == len(errors) else None


def read_arrays(series: pl.Series, tensor: InputTensor) -> tuple[np.ndarray | Ragged, list[RowError]]:
    """The arrays of a column, with the records on axis 0, and one error for each record that has none that fits.

    Such a record gets harmless values, shared by all of them: a few bytes must not grow to gigabytes. Ragged: there are
    such records, or they differ in a size that the model leaves open. Raises SchemaMismatch for a column whose type can
    hold no such arrays.
    """
    if series.dtype == pl.Null():
        series = series.cast(pl.String())
    faults = RecordErrors(len(series))
    faults.add_missing(series.is_null().to_numpy(), series.name)
    shapes, values = (_from_texts if series.dtype == pl.String() else _from_lists)(series, tensor, faults)
    return _assembled(tensor, ~faults.mask, shapes, values), faults.errors()


def misfits(values: np.ndarray, dtype: DType) -> np.ndarray:
    """Mask of the numbers that do not fit `dtype`. Floats may be rounded, but not to infinity."""
    target = numpy_type(dtype)
    if target.kind == "O" or values.dtype.kind == "b" or not values.size:
        return np.zeros(values.shape, bool)
    if target.kind == "f":
        return _too_large(values, target)
    if target.kind == "b":
        return ~np.isin(values, (0, 1))
    bounds = np.iinfo(target)
    if values.dtype.kind == "f":
        values = values.astype(np.float64, copy=False)
        whole = values == np.rint(values)
        return np.asarray(~(whole & (values >= max(bounds.min, -_EXACT)) & (values <= min(bounds.max, _EXACT))))
    return np.logical_or(values < bounds.min, values > bounds.max)


def _too_large(values: np.ndarray, target: np.dtype[Any]) -> np.ndarray:
    """Mask of the finite numbers that become infinite in a narrower float type."""
    limit = np.finfo(target).max
    if values.dtype.kind not in "iuf" or (-limit < values.min() and values.max() < limit):
        return np.zeros(values.shape, bool)
    with np.errstate(over="ignore"):
        return np.asarray(np.isinf(values.astype(target)) & np.isfinite(values))


# --- faults ----------------------------------------------------------------------------------------------------------


def _hole(tensor: InputTensor) -> InvalidValue:
    return InvalidValue("missing-value", f"expected {wanted_array(tensor)}, got one with values missing")


def _misshapen(tensor: InputTensor, shape: np.ndarray | tuple[int, ...] | None) -> InvalidValue:
    got = "lists of different lengths" if shape is None else shape_text(tuple(shape))
    return InvalidValue("wrong-shape", f"expected {wanted_array(tensor)}, got {got}")


def _invalid(tensor: InputTensor, value: object) -> InvalidValue:
    return InvalidValue("wrong-type", f"expected {wanted_array(tensor)}, got {shorten(value)} in it")


def _fits(tensor: InputTensor, shapes: np.ndarray) -> np.ndarray:
    """Mask of the shapes [records, axes] that the model takes."""
    wanted = np.array([-1 if size is None else size for size in tensor.shape[1:]])
    fits: np.ndarray = ((shapes == wanted) | (wanted == -1)).all(axis=1)
    return fits


# --- lists -----------------------------------------------------------------------------------------------------------


def _type_fault(tensor: InputTensor, kind: pl.DataType) -> str | None:
    axes, leaf = 0, kind
    while isinstance(leaf, pl.List | pl.Array):
        axes, leaf = axes + 1, _inner(leaf)
    text = isinstance(leaf, pl.String | pl.Categorical | pl.Enum)
    number = leaf.is_numeric() or isinstance(leaf, pl.Boolean)
    fits = isinstance(leaf, pl.Null) or (text if tensor.dtype == "string" else number)
    return None if fits and axes == len(tensor.shape) - 1 else f"expected {wanted_array(tensor)}, got {kind}"


def _inner(kind: pl.List | pl.Array) -> pl.DataType:
    return kind.inner if isinstance(kind.inner, pl.DataType) else kind.inner()


def _from_lists(series: pl.Series, tensor: InputTensor, faults: RecordErrors) -> tuple[np.ndarray, np.ndarray]:
    """The shapes and the values of the records without a fault. Nothing here goes from record to record."""
    if fault := _type_fault(tensor, series.dtype):
        raise SchemaMismatch(f"column {series.name!r}: {fault}", errors=[{"column": series.name, "message": fault}])
    records = len(series)
    owner = np.arange(records)
    shapes = np.zeros((records, len(tensor.shape) - 1), np.int64)
    holes, uneven = np.zeros(records, bool), np.zeros(records, bool)
    for sizes in shapes.T:
        if isinstance(series.dtype, pl.Array):
            series = series.arr.to_list()
        holes[owner[series.is_null().to_numpy()]] = True
        lengths = series.list.len().fill_null(0).to_numpy().astype(np.int64)
        np.maximum.at(sizes, owner, lengths)
        uneven[owner[lengths != sizes[owner]]] = True
        owner = np.repeat(owner, lengths)
        series = series.explode(empty_as_null=False, keep_nulls=False)
    values = _leaves(series, tensor)
    if not tensor.nullable:
        missing = series.is_null().to_numpy()
        holes[owner[missing | np.isnan(values) if values.dtype.kind == "f" else missing]] = True
    faults.add_each(holes, series.name, lambda _: _hole(tensor))
    faults.add_each(uneven, series.name, lambda _: _misshapen(tensor, None))
    faults.add_each(~_fits(tensor, shapes), series.name, lambda record: _misshapen(tensor, shapes[record]))
    wrong = np.flatnonzero(misfits(values, tensor.dtype) & ~faults.mask[owner])[::-1]
    firsts = dict(zip(owner[wrong].tolist(), values[wrong].tolist(), strict=True))
    faults.add_each(
        np.isin(np.arange(records), owner[wrong]), series.name, lambda record: _invalid(tensor, firsts[record])
    )
    return shapes[~faults.mask], values[~faults.mask[owner]]


def _leaves(series: pl.Series, tensor: InputTensor) -> np.ndarray:
    """The values; a missing one is NaN, if the model takes floats, else arbitrary."""
    if tensor.dtype == "string":
        return series.cast(pl.String()).fill_null("").to_numpy()
    unlike_numpy = isinstance(series.dtype, pl.Null | pl.Decimal | pl.Int128 | pl.UInt128)
    if unlike_numpy or (tensor.dtype.startswith("float") and series.null_count()):
        series = series.cast(pl.Float64())
    if series.dtype.is_float():
        return series.to_numpy()  # a null is NaN
    return series.fill_null(pl.lit(0).cast(series.dtype)).to_numpy()


# --- JSON text -------------------------------------------------------------------------------------------------------


def _from_texts(series: pl.Series, tensor: InputTensor, faults: RecordErrors) -> tuple[np.ndarray, np.ndarray]:
    """The shapes and the values of the records without a fault."""
    arrays: list[np.ndarray] = []
    for record, text in enumerate(series.to_list()):
        try:
            if text is not None:
                arrays.append(_parsed(text, tensor))
        except InvalidValue as invalid:
            faults.add_at(record, series.name, invalid)
    shapes = np.array([array.shape for array in arrays], np.int64).reshape(len(arrays), len(tensor.shape) - 1)
    return shapes, np.concatenate([np.empty(0, numpy_type(tensor.dtype)), *(array.reshape(-1) for array in arrays)])


def _parsed(text: str, tensor: InputTensor) -> np.ndarray:
    """The array in a JSON text. Raises InvalidValue."""
    value = _json(text)
    if not isinstance(value, list):
        raise InvalidValue("wrong-type", f"expected {wanted_array(tensor)}, got {shorten(text)}")
    try:
        array = np.array(value, dtype=object if tensor.dtype == "string" else None)
    except ValueError:
        raise _misshapen(tensor, None) from None
    wanted = tensor.shape[1:]
    if len(wanted) != array.ndim or any(want not in (None, got) for want, got in zip(wanted, array.shape, strict=True)):
        raise _misshapen(tensor, array.shape)
    if array.dtype.kind not in "biuf":
        array = _from_objects(value, array, tensor)
    wrong = misfits(array, tensor.dtype)
    if wrong.any():
        raise _invalid(tensor, array[wrong][0].item())
    return _typed(array, tensor)


def _from_objects(value: list[object], array: np.ndarray, tensor: InputTensor) -> np.ndarray:
    """An array with elements other than numbers: text for a text input, or null. Raises InvalidValue."""
    single = np.array(value, dtype=object).reshape(-1).tolist()
    if tensor.nullable and tensor.dtype.startswith("float"):
        single = [float("nan") if one is None else one for one in single]
    if None in single:
        raise _hole(tensor)
    kinds = (str,) if tensor.dtype == "string" else (bool, int, float)
    for one in single:
        if not isinstance(one, kinds):
            raise _invalid(tensor, one)
    if tensor.dtype == "string":
        return array
    numbers: np.ndarray = np.array(single, np.float64).reshape(array.shape)  # of any size
    return numbers


def _json(text: str) -> object:
    """The value of a JSON text; invalid JSON is returned as it is."""
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError:
        return text


# --- one array -------------------------------------------------------------------------------------------------------


def _assembled(tensor: InputTensor, good: np.ndarray, shapes: np.ndarray, values: np.ndarray) -> np.ndarray | Ragged:
    """`shapes` and `values` are those of the good records, one after the other."""
    values = _typed(values, tensor)
    shape = shapes[0] if len(shapes) else np.array([size or 1 for size in tensor.shape[1:]])
    if good.all() and (shapes == shape).all():
        return values.reshape(len(good), *shape)
    blank = np.full(shape.prod(), "" if tensor.dtype == "string" else 0, values.dtype)
    every, stops = np.tile(shape, (len(good), 1)), np.full(len(good), len(values) + len(blank))
    every[good], stops[good] = shapes, np.cumsum(shapes.prod(axis=1))
    return Ragged(np.concatenate([values, blank]), every, stops)


def _typed(values: np.ndarray, tensor: InputTensor) -> np.ndarray:
    with np.errstate(over="ignore"):  # those beyond the type have failed
        return values.astype(numpy_type(tensor.dtype), copy=False)
