"""Conversion of records to model inputs. All functions are pure, and vectorised over the records of a batch."""

import re
from collections.abc import Iterator, Mapping, Sequence
from math import prod
from types import MappingProxyType
from typing import Any, Protocol

import numpy as np
import polars as pl

from batchserve.allowance import IMAGE_PIXELS
from batchserve.domain import Column, Domain, DType, InputTensor, RowError, Scalar, Signature
from batchserve.errors import InvalidOptions, SchemaMismatch
from batchserve.formats.protocol import Matrix, Records, Tensors
from batchserve.formats.schema import cast_column, numpy_type, polars_type, shorten, shown, with_points
from batchserve.inference.arrays import Ragged, array_fault, misfits, read_arrays
from batchserve.inference.binding import Binding, columns_of
from batchserve.inference.domains import find_infinite, find_outside, find_outside_array
from batchserve.inference.faults import RecordErrors
from batchserve.inference.images import image_fault, images_of_array, images_of_column
from batchserve.inference.unfilled import dtype_text, shape_text, wanted_array

__all__ = ["Batchwise", "Inputs", "build_inputs", "check_types", "is_plain", "several_values", "shared_inputs"]


class Batchwise(Protocol):
    """An input built batch by batch: its records differ in size, or are decoded on access."""

    @property
    def shapes(self) -> np.ndarray:
        """The shape of each record [records, axes]."""

    def take(self, records: np.ndarray) -> np.ndarray:
        """The array of these records [records, ...], which have the same shape."""


Inputs = dict[str, np.ndarray | Batchwise]
"""Inputs of a model, by name."""


# --- are the types right, before a job is queued? --------------------------------------------------------------------


def check_types(
    signature: Signature,
    binding: Binding | None,
    header_columns: Mapping[str, pl.DataType | None],
    sample: Records,
    decimal: str | None = None,
) -> None:
    """Refuses an input that cannot be scored, by its header and first records.

    A column with a type must be castable; in a column without one at least one value of the sample must fit. Raises
    SchemaMismatch that lists the columns at fault. `decimal`: the decimal mark of
    numbers that are texts. Tensors, by the names of the inputs, are checked for shapes and types.
    """
    if not isinstance(sample, pl.DataFrame):
        for tensor, array in zip(signature.inputs, _match_tensors(signature, sample).values(), strict=True):
            if _are_pixels(tensor, array):
                continue
            beyond = _beyond_range(tensor, array)
            if beyond.size and beyond.all():
                column, message = _misfit(tensor, array[0], _array_name(tensor, binding))
                raise SchemaMismatch(
                    f"column {column!r}: {message} in record 0",
                    errors=[{"row": 0, "column": column, "expected": tensor.dtype, "message": message}],
                )
        return
    assert binding is not None, "a table is bound"
    faults = list(_column_faults(signature, binding, header_columns, sample, decimal))
    if faults:
        raise SchemaMismatch(
            "; ".join(f"column {fault['column']!r}: {fault['message']}" for fault in faults[:3])
            + (f"; and {len(faults) - 3} more" if len(faults) > 3 else ""),
            errors=faults,
        )


def _column_faults(
    signature: Signature,
    binding: Binding,
    kinds: Mapping[str, pl.DataType | None],
    sample: pl.DataFrame,
    decimal: str | None,
) -> Iterator[dict[str, Any]]:
    unnamed = {
        source: tensor
        for tensor in signature.inputs
        if tensor.columns is None and tensor.name not in binding.arrays
        for source in binding.sources[tensor.name]
    }
    for name, dtype in binding.types.items():
        if (fault := _type_fault(name, dtype, kinds.get(name), sample, decimal)) is not None:
            if (tensor := unnamed.pop(name, None)) is not None:
                unnamed = {source: other for source, other in unnamed.items() if other != tensor}  # told once
                fault["message"] += f"; input {tensor.name!r} takes {wanted_array(tensor)}, or a number in each column"
            yield fault
    for tensor in signature.inputs:
        name = binding.sources[tensor.name][0]
        if tensor.image is not None:
            message = image_fault(kinds.get(name), sample[name])
        else:
            message = array_fault(tensor, kinds.get(name), sample[name]) if tensor.name in binding.arrays else None
        if message is not None:
            expected = "image" if tensor.image is not None else tensor.dtype
            yield {"column": name, "expected": expected, "message": message}


def _type_fault(
    name: str, dtype: DType, kind: pl.DataType | None, sample: pl.DataFrame, decimal: str | None
) -> dict[str, Any] | None:
    if kind is not None and not _castable(kind, dtype):
        return {"column": name, "expected": dtype, "message": f"expected {dtype}, got {kind}"}
    if name not in sample.columns:
        return None
    series = sample[name]
    commas = decimal == "," and dtype != "string"
    if not commas and _fits_plainly(series, dtype):
        return None
    given = series.is_not_null() & (series != "") if series.dtype == pl.String() else series.is_not_null()
    rows = given.arg_true()
    if rows.is_empty():
        return None
    values = series.gather(rows)
    if _castable(values.dtype, dtype):
        fitting, _ = cast_column(with_points(values) if commas else values, dtype)
        if fitting.null_count() < len(values):
            return None
    value = shorten(values[0])
    message = f"expected {dtype}, got {value} in record {rows[0]}"
    if decimal == "." and _COMMA.fullmatch(str(values[0])):
        message += "; if the comma is a decimal mark, send the option decimal=,"
    return {"row": rows[0], "column": name, "value": value, "expected": dtype, "message": message}


def _fits_plainly(series: pl.Series, dtype: DType) -> bool:
    """Whether the first value certainly fits, without a cast: polars' casts take longer than scoring a small job."""
    if dtype == "string":
        return isinstance(series.dtype, pl.String)
    if not isinstance(series.dtype, pl.String) and not series.dtype.is_numeric():
        return False
    first = next(iter(series.head(1).to_list()), None)
    if series.dtype.is_numeric() and dtype.startswith("float"):
        return first is not None and abs(first) < _SURE.get(dtype, 1e15)
    if not dtype.startswith("float") or not isinstance(first, str) or not _DECIMAL.fullmatch(first):
        return False
    return dtype not in _SURE or abs(float(first)) < _SURE[dtype]


_COMMA = re.compile(r"\s*[+-]?[0-9]*,[0-9]+([eE][+-]?[0-9]+)?\s*")
_DECIMAL = re.compile(r"-?[0-9]{1,15}(\.[0-9]{1,15})?")
_SURE = {"float16": 2.0**15}
"""Below, a number certainly fits; the other floats hold any with 15 digits."""


def _castable(kind: pl.DataType, dtype: DType) -> bool:
    if isinstance(kind, pl.String | pl.Categorical | pl.Enum | pl.Boolean | pl.Null) or kind.is_numeric():
        return True
    return dtype == "string" and kind.is_temporal()


# --- records -> inputs -----------------------------------------------------------------------------------------------


def build_inputs(
    signature: Signature,
    binding: Binding | None,
    records: Records,
    image_pixels: int = IMAGE_PIXELS,
    matrices: Mapping[str, Matrix] = MappingProxyType({}),
) -> tuple[Inputs, np.ndarray, list[RowError]]:
    """The inputs for all records, a mask of those that cannot be scored, and one error for each of these.

    A masked record gets harmless values, so that the others can be scored in the same run; its outputs are meaningless.
    Tensors have the names of the inputs and need no binding: it tells those that they have in the file. The columns of
    errors are called as in the file. Images of at most `image_pixels` are decoded on access, when undecodable ones are
    reported. `matrices`: inputs whose columns were read as such, and are not in the records.

    Raises SchemaMismatch when tensors do not fit, or a value for all records differs between them.
    """
    if isinstance(records, pl.DataFrame):
        assert binding is not None, "a table is bound"
        faults = RecordErrors(records.height)
        inputs: Inputs = {}
        for tensor in signature.inputs:
            sources = binding.sources[tensor.name]
            if tensor.image is not None:
                images, missing = images_of_column(records[sources[0]], tensor, image_pixels)
                faults.add_missing(missing, sources[0])
                inputs[tensor.name] = images
            elif tensor.name in matrices:
                inputs[tensor.name] = _checked(tensor, sources, matrices[tensor.name], faults)
            elif tensor.name in binding.arrays:
                inputs[tensor.name] = _fill_array(tensor, records[sources[0]], faults)
            else:
                inputs[tensor.name] = _fill(tensor, sources, records, faults)
        return inputs, faults.mask, faults.errors()
    matched = _match_tensors(signature, records)
    lengths = [len(records[tensor.name]) for tensor in signature.inputs if tensor.per_record]
    faults = RecordErrors(max(lengths, default=0))
    inputs = {}
    for tensor in signature.inputs:
        array, name = matched[tensor.name], _array_name(tensor, binding)
        if _are_pixels(tensor, array):
            inputs[tensor.name] = images_of_array(array, tensor, image_pixels, name)
            continue
        _find_misfits(tensor, array, name, faults)
        _find_nan(tensor, array, name, faults)
        if tensor.per_record:
            find_outside_array(tensor, array, name, faults)
        inputs[tensor.name] = _typed(tensor, array)
    return inputs, faults.mask, faults.errors()


def _fill_array(tensor: InputTensor, series: pl.Series, faults: RecordErrors) -> np.ndarray | Ragged:
    values, errors = read_arrays(series, tensor)
    for error in errors:
        faults.add(error)
    if isinstance(values, np.ndarray):
        find_outside_array(tensor, values, series.name, faults)
    elif tensor.domains and (values.shapes == values.shapes[0]).all():  # a record failed, which has harmless values
        find_outside_array(tensor, values.take(np.arange(len(values))), series.name, faults)
    return values


def is_plain(tensor: InputTensor) -> bool:
    """Whether an input is a matrix of the values of its columns, record by record, of which infinite ones may be the
    only faults."""
    return (
        tensor.per_record
        and tensor.image is None
        and len(tensor.shape) <= 2
        and all(domain.is_plain for domain in tensor.domains)
    )


def _fill(tensor: InputTensor, sources: Sequence[str], table: pl.DataFrame, faults: RecordErrors) -> np.ndarray:
    columns = columns_of(tensor, sources)
    limited = [None if domain.is_plain else domain for domain in tensor.domains] or [None] * len(columns)
    values = (
        _values(table[source], column, tensor.dtype, faults, domain)
        for column, source, domain in zip(columns, sources, limited, strict=True)
    )
    if not tensor.per_record:
        given = next(values)  # which reports the faults, too
        return _one_for_all(tensor, given[~faults.mask])
    if len(tensor.shape) == 1:
        matrix = np.ascontiguousarray(next(values))
    else:
        matrix = np.empty((table.height, len(columns)), numpy_type(tensor.dtype))
        for index, column_values in enumerate(values):
            matrix[:, index] = column_values
    find_infinite(tensor, matrix, sources, faults)
    return matrix


def _checked(tensor: InputTensor, sources: Sequence[str], matrix: Matrix, faults: RecordErrors) -> np.ndarray:
    columns = columns_of(tensor, sources)
    absent, values = matrix.absent, matrix.values
    if absent is None and values.size and np.isnan(values.min()):
        absent = np.isnan(values)
    if absent is not None and absent.any():
        for column, source, of_column in zip(columns, sources, absent.T, strict=True):
            if not column.nullable:
                faults.add_missing(of_column, source)
    find_infinite(tensor, values, sources, faults)
    return values.reshape(-1) if len(tensor.shape) == 1 else values


def _values(series: pl.Series, column: Column, dtype: DType, faults: RecordErrors, domain: Domain | None) -> np.ndarray:
    assert column.dtype != "image", "images fill a tensor of their own"
    series, errors = cast_column(series, column.dtype)
    for error in errors:
        faults.add(error)
    if domain is not None:
        find_outside(series, domain, series.name, faults)
        series, errors = cast_column(series, dtype)
        for error in errors:
            faults.add(error)
    series = series.cast(polars_type(dtype), strict=False)
    if dtype.startswith("float"):
        values = series.to_numpy()
        if not column.nullable and len(values) and np.isnan(values.min()):  # one NaN makes the minimum NaN
            faults.add_missing(np.isnan(values), series.name)
        return values
    if series.null_count():
        if not column.nullable:
            faults.add_missing(series.is_null().to_numpy(), series.name)
        blank = "" if dtype == "string" else False if dtype == "bool" else 0
        series = series.fill_null(pl.lit(blank, dtype=series.dtype))
    return _objects(series) if dtype == "string" else series.to_numpy()


def _objects(text: pl.Series) -> np.ndarray:
    """The strings as Python objects; frequent ones are created once each."""
    distinct = text.unique()
    if len(distinct) * 16 > len(text):
        return text.to_numpy()
    codes = text.cast(pl.Enum(distinct)).to_physical().to_numpy()
    objects: np.ndarray = distinct.to_numpy()[codes]
    return objects


def shared_inputs(signature: Signature, given: Mapping[str, Scalar]) -> dict[str, np.ndarray]:
    """The option `inputs` as arrays. Raises InvalidOptions for values that do not belong to a shared input."""
    shared = {tensor.name: tensor for tensor in signature.inputs if not tensor.per_record}
    arrays = {}
    for name, value in given.items():
        if name not in shared:
            others = any(name == tensor.name for tensor in signature.inputs)
            own = "takes a value from each record" if others else "is not an input of the model"
            takes = ", ".join(f"{tensor.name!r} ({tensor.dtype})" for tensor in shared.values())
            there = f"those with one value for all records are {takes}" if shared else "no input has one"
            raise InvalidOptions(f"inputs: {name!r} {own}; {there}")
        dtype = shared[name].dtype
        try:
            series = pl.Series(name, [value])
        except (OverflowError, UnicodeEncodeError) as error:
            raise InvalidOptions(f"inputs: {name!r}: expected {dtype}, got {shorten(value)}", expected=dtype) from error
        values, errors = cast_column(series, dtype)
        if errors:
            raise InvalidOptions(f"inputs: {name!r}: {errors[0].message}", expected=dtype)
        arrays[name] = _one_for_all(shared[name], values.to_numpy())
    return arrays


def _one_for_all(tensor: InputTensor, values: np.ndarray) -> np.ndarray:
    shape = tuple(size or 1 for size in tensor.shape)
    if len(values) == 0:
        return np.zeros(shape, numpy_type(tensor.dtype))
    first = values[0]
    if (values != first).any() and first == first:  # NaN is unequal to itself
        raise several_values(tensor.name)
    return np.full(shape, first, numpy_type(tensor.dtype))


def several_values(name: str) -> SchemaMismatch:
    return SchemaMismatch(f"input {name!r} is one value for all records, but the input has several")


def _match_tensors(signature: Signature, arrays: Tensors) -> Tensors:
    """Input name -> array in the shape of the input and of a type that can be cast to its own."""
    return {tensor.name: _fit(tensor, arrays[tensor.name]) for tensor in signature.inputs}


def _fit(tensor: InputTensor, array: np.ndarray) -> np.ndarray:
    if not tensor.per_record:
        values = _castable_array(tensor, array.reshape(-1))
        if misfits(values, tensor.dtype).any():
            raise _wrong_dtype(tensor, values)
        return _one_for_all(tensor, values)
    if _are_pixels(tensor, array):
        if array.ndim == 3 or (array.ndim == 4 and array.shape[3] in (1, 3, 4)):
            return array
        raise SchemaMismatch(f"input {tensor.name!r}: expected {_PIXELS}, got {shape_text(array.shape)}")
    trailing = tensor.shape[1:]
    if array.ndim and prod(array.shape[1:]) == 1 and all(size in (1, None) for size in trailing) and len(trailing) < 2:
        array = array.reshape(len(array), *(1 for _ in trailing))  # [N] and [N, 1] are the same values
    fits = array.ndim == len(tensor.shape) and all(
        want in (None, got) for want, got in zip(trailing, array.shape[1:], strict=True)
    )
    if not fits:
        expected, got = shape_text((None, *trailing)), shape_text(array.shape)
        images = f", or {_PIXELS}" if tensor.image is not None else ""
        raise SchemaMismatch(
            f"input {tensor.name!r}: expected an array of shape {expected}{images}, got {got}"
            f"{_other_type(tensor, array)}",
            expected=expected,
            got=got,
        )
    return _castable_array(tensor, array)


_PIXELS = "images of uint8 [N, height, width, channels] or [N, height, width]"


def _are_pixels(tensor: InputTensor, array: np.ndarray) -> bool:
    """Whether an array holds decoded images, and not preprocessed input of the model."""
    if tensor.image is None or array.dtype != np.uint8:
        return False
    wanted = tensor.shape[1:]
    ready = array.ndim == len(tensor.shape) and all(map(_suits, wanted, array.shape[1:]))
    return tensor.dtype != "uint8" or not ready


def _suits(want: int | None, got: int) -> bool:
    return want in (None, got)


def _other_type(tensor: InputTensor, array: np.ndarray) -> str:
    return "" if _has_type(tensor, array) else f" of {dtype_text(array.dtype)}, and the model takes {tensor.dtype}"


def _castable_array(tensor: InputTensor, array: np.ndarray) -> np.ndarray:
    if not _has_type(tensor, array):
        raise _wrong_dtype(tensor, array)
    return array


def _has_type(tensor: InputTensor, array: np.ndarray) -> bool:
    """Whether the values of an array can be those of an input, or some of them."""
    target = numpy_type(tensor.dtype)
    if tensor.dtype == "string":
        return array.dtype.kind in "UT"
    if array.dtype.kind in "iu" and target.kind in "iu":
        return True  # as types; single values may not: `_find_misfits`
    return np.can_cast(array.dtype, target, "same_kind")


def _wrong_dtype(tensor: InputTensor, array: np.ndarray) -> SchemaMismatch:
    expected, got = tensor.dtype, dtype_text(array.dtype)
    return SchemaMismatch(f"input {tensor.name!r}: expected {expected}, got {got}", expected=expected, got=got)


def _typed(tensor: InputTensor, array: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):  # those beyond the type have failed
        return np.ascontiguousarray(array, numpy_type(tensor.dtype)) if tensor.per_record else array


def _array_name(tensor: InputTensor, binding: Binding | None) -> str:
    """What the file calls the array that fills an input; an npy gives it no name."""
    return (binding.arrays.get(tensor.name) if binding is not None else None) or tensor.name


def _find_misfits(tensor: InputTensor, array: np.ndarray, name: str, faults: RecordErrors) -> None:
    """Numbers beyond the range of the input: a cast would wrap them around, or make them infinite."""
    for index in np.flatnonzero(_beyond_range(tensor, array)).tolist():
        column, message = _misfit(tensor, array[index], name)
        faults.add(RowError(index, "wrong-type", message, column))


def _misfit(tensor: InputTensor, record: np.ndarray, name: str) -> tuple[str, str]:
    """The column and the message of the first number of a record that is beyond the range of the input. `name`: of the
    array."""
    values = record.reshape(-1)
    place = int(np.flatnonzero(misfits(values, tensor.dtype))[0])
    named = tensor.columns is not None and tensor.image is None and len(tensor.columns) == len(values)
    column = tensor.columns[place].name if tensor.columns is not None and named else name
    return column, f"expected {tensor.dtype}, got {shown(values[place].item(), tensor.dtype)}"


def _beyond_range(tensor: InputTensor, array: np.ndarray) -> np.ndarray:
    """Mask of records with such numbers."""
    if array.dtype.kind not in "iuf" or not tensor.per_record or array.dtype == numpy_type(tensor.dtype):
        return np.zeros(len(array) if tensor.per_record else 1, dtype=bool)
    return np.asarray(misfits(array, tensor.dtype).any(axis=tuple(range(1, array.ndim))))


def _find_nan(tensor: InputTensor, array: np.ndarray, name: str, faults: RecordErrors) -> None:
    if array.dtype.kind != "f" or not array.size or not tensor.per_record or not np.isnan(array.min()):
        return
    if tensor.columns is None or tensor.image is not None:
        if not tensor.nullable:
            faults.add_missing(np.isnan(array.reshape(len(array), -1)).any(axis=1), name)
        return
    for column, values in zip(tensor.columns, array.reshape(len(array), -1).T, strict=True):
        if not column.nullable:
            faults.add_missing(np.isnan(values), column.name)
