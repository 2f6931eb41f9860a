"""Between tables and tensors: how columns fill the inputs of a model, and which columns its outputs become.

All functions are pure, and vectorised over the records of a batch.
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from math import prod
from typing import Any

import numpy as np
import polars as pl

from batchserve.domain import Column, DType, InputTensor, OutputTensor, RowError, Signature
from batchserve.errors import InvalidOptions, SchemaMismatch, ScoringFailed
from batchserve.formats.protocol import Records, Tensors
from batchserve.formats.schema import cast_column, polars_type, shorten

__all__ = [
    "Binding",
    "bind",
    "build_inputs",
    "check_count",
    "check_types",
    "numpy_type",
    "output_columns",
    "to_columns",
]

_WIDE = 64
"""An output with more columns than this becomes one list column."""
_LISTED = 20
"""So many names a message lists at most."""
_STEMS = {"label": "prediction", "probabilities": "probability", "scores": "score"}


@dataclass(frozen=True, slots=True)
class Binding:
    """Which columns of a file fill which inputs of a model: the columns of each input, in its order."""

    sources: dict[str, tuple[str, ...]]
    types: dict[str, DType]
    """File column -> the dtype it is to be read as."""

    @property
    def used(self) -> tuple[str, ...]:
        """The file columns that the model consumes."""
        return tuple(self.types)


def numpy_type(dtype: DType) -> np.dtype[Any]:
    """The type of a tensor's array; strings are Python objects."""
    return np.dtype(object if dtype == "string" else dtype)


# --- columns of a file -> inputs -----------------------------------------------------------------------------------


def bind(
    signature: Signature,
    columns: Sequence[str],
    rename: Mapping[str, str] | Sequence[str] | None = None,
) -> Binding:
    """How the columns of a table fill the inputs.

    Named inputs take their columns by name; spaces and signs count as underscores where that is unambiguous. What is
    left over fills the inputs without names, in file order, when the count is right. `rename` is the option `columns`:
    a list names the columns to take, in order; a mapping says {model column: file column}.

    Raises SchemaMismatch when the columns do not fit, and InvalidOptions when `rename` does not suit the model.
    """
    twice = [name for name, count in Counter(columns).items() if count > 1]
    if twice:
        raise SchemaMismatch(
            f"column names must differ: {_listed(twice)} stands there more than once",
            errors=[{"column": name, "message": "the name stands there more than once"} for name in twice],
        )
    unbindable = [tensor for tensor in signature.inputs if tensor.columns is None and len(tensor.shape) > 2]
    if unbindable:
        raise SchemaMismatch(
            f"input {unbindable[0].name!r} takes arrays of shape {_shape(unbindable[0].shape)}, which a table can not "
            "hold: send an npy or npz file"
        )
    mapping: Mapping[str, str] = rename if isinstance(rename, Mapping) else {}
    _check_mapping(signature, mapping, columns)
    if rename is not None and not isinstance(rename, Mapping):
        columns = _chosen(rename, columns)
        if len(columns) == 1 and len(signature.columns) == 1:
            # One column that was asked for and one that is wanted: no name is needed.
            mapping = {signature.columns[0].name: columns[0]}
    return _join(signature, _find_named(signature, columns, mapping), columns)


def _join(signature: Signature, named: dict[str, str], columns: Sequence[str]) -> Binding:
    taken = set(named.values())
    unnamed = [tensor for tensor in signature.inputs if tensor.columns is None]
    shares = _share_out(unnamed, [column for column in columns if column not in taken])
    sources: dict[str, tuple[str, ...]] = {}
    types: dict[str, DType] = {}
    for tensor in signature.inputs:
        if tensor.columns is None:
            sources[tensor.name] = shares[tensor.name]
        else:
            sources[tensor.name] = tuple(named[column.name] for column in tensor.columns)
        for column, source in zip(_columns(tensor, sources[tensor.name]), sources[tensor.name], strict=True):
            types.setdefault(source, column.dtype)
    return Binding(sources, types)


def _check_mapping(signature: Signature, mapping: Mapping[str, str], columns: Sequence[str]) -> None:
    wanted = [column.name for column in signature.columns]
    for name, source in mapping.items():
        if name not in wanted:
            there = f"it takes {_listed(wanted)}" if wanted else "its columns have no names, so pass a list of yours"
            raise InvalidOptions(f"columns: the model has no column {name!r}; {there}")
        if source not in columns:
            raise SchemaMismatch(
                f"columns: there is no {source!r} in the input{_hint(source, columns)}; it has {_listed(columns)}",
                errors=[{"column": source, "message": "is not in the input"}],
            )


def _chosen(names: Sequence[str], columns: Sequence[str]) -> Sequence[str]:
    absent = [name for name in names if name not in columns]
    if absent:
        raise SchemaMismatch(
            f"columns: there is no {_listed(absent)} in the input; it has {_listed(columns)}",
            errors=[{"column": name, "message": f"is not in the input{_hint(name, columns)}"} for name in absent],
        )
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise InvalidOptions(f"columns: {_listed(twice)} stands there more than once")
    return names


def _find_named(signature: Signature, columns: Sequence[str], mapping: Mapping[str, str]) -> dict[str, str]:
    """Model column -> file column, for all columns that have names."""
    plain = Counter(_plain(column.name) for column in signature.columns)
    alike: dict[str, list[str]] = {}
    for name in columns:
        alike.setdefault(_plain(name), []).append(name)
    found: dict[str, str] = {}
    missing: list[Column] = []
    for column in signature.columns:
        candidates = alike.get(_plain(column.name), [])
        if column.name in mapping:
            found[column.name] = mapping[column.name]
        elif column.name in columns:
            found[column.name] = column.name
        elif len(candidates) == 1 and plain[_plain(column.name)] == 1:
            found[column.name] = candidates[0]
        else:
            missing.append(column)
    if missing:
        raise _missing_columns(missing, columns)
    return found


def _missing_columns(missing: Sequence[Column], columns: Sequence[str]) -> SchemaMismatch:
    errors = [
        {
            "column": column.name,
            "expected": column.dtype,
            "message": f"the model takes this column and the input has none of that name{_hint(column.name, columns)}",
        }
        for column in missing
    ]
    names = _listed([column.name for column in missing])
    return SchemaMismatch(
        f"the input lacks {names}; it has {_listed(columns)}. Pass columns to say which of yours is meant",
        errors=errors,
    )


def _share_out(tensors: Sequence[InputTensor], columns: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """The columns, cut in file order into as many as each input wants."""
    widths = [_width(tensor) for tensor in tensors]
    if len(tensors) == 1 and widths[0] is None and columns:
        return {tensors[0].name: tuple(columns)}
    wanted = sum(width or 1 for width in widths)
    if wanted != len(columns) and tensors:
        raise SchemaMismatch(
            f"the model takes {wanted} columns that have no names, and the input has {len(columns)} to fill them: "
            f"{_listed(columns)}. Pass columns with the {wanted} to take, in order",
            expected=wanted,
            got=len(columns),
        )
    shares: dict[str, tuple[str, ...]] = {}
    start = 0
    for tensor, width in zip(tensors, widths, strict=True):
        stop = start + (width or 1)
        shares[tensor.name] = tuple(columns[start:stop])
        start = stop
    return shares


def _width(tensor: InputTensor) -> int | None:
    """How many columns fill the input; None: any number."""
    return tensor.shape[1] if len(tensor.shape) == 2 and tensor.per_record else 1


def _columns(tensor: InputTensor, sources: Sequence[str]) -> tuple[Column, ...]:
    """What each column of the input is, under the model's name or, where it has none, the file's."""
    if tensor.columns is not None:
        return tensor.columns
    return tuple(Column(source, tensor.dtype, tensor.nullable) for source in sources)


def _plain(name: str) -> str:
    return re.sub(r"\W", "_", name)


def _hint(name: str, columns: Iterable[str]) -> str:
    lower = {column.lower(): column for column in columns}
    close = [lower[match] for match in get_close_matches(name.lower(), lower, n=3, cutoff=0.7)]
    return f" (close: {_listed(close)})" if close else ""


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(repr(name) for name in names[:_LISTED])
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return f"{shown}{more}" if names else "no columns"


def _shape(shape: Iterable[int | None]) -> str:
    return f"[{', '.join('N' if size is None else str(size) for size in shape)}]"


# --- are the types right, before a job is queued? --------------------------------------------------------------------


def check_types(
    signature: Signature,
    binding: Binding | None,
    header_columns: Mapping[str, pl.DataType | None],
    sample: Records,
) -> None:
    """Refuses an input that can not be scored, by its header and first records alone.

    A column with a type must be castable; in a column without one at least one value of the sample must fit. Raises
    SchemaMismatch that lists the columns at fault. Tensors (no binding) are checked for names, shapes and types.
    """
    if not isinstance(sample, pl.DataFrame):
        _match_tensors(signature, sample)
        return
    if binding is None:
        raise SchemaMismatch("the model takes arrays: send an npy or npz file")
    faults = [
        fault
        for name, dtype in binding.types.items()
        if (fault := _type_fault(name, dtype, header_columns.get(name), sample)) is not None
    ]
    if faults:
        raise SchemaMismatch(
            "; ".join(f"column {fault['column']!r}: {fault['message']}" for fault in faults[:3])
            + (f"; and {len(faults) - 3} more" if len(faults) > 3 else ""),
            errors=faults,
        )


def _type_fault(name: str, dtype: DType, kind: pl.DataType | None, sample: pl.DataFrame) -> dict[str, Any] | None:
    if kind is not None and not _castable(kind, dtype):
        return {"column": name, "expected": dtype, "message": f"expected {dtype}, got {kind}"}
    if name not in sample.columns:
        return None
    series = sample[name]
    if _fits_plainly(series, dtype):
        return None
    given = series.is_not_null() & (series != "") if series.dtype == pl.String() else series.is_not_null()
    rows = given.arg_true()
    if rows.is_empty():
        return None
    values = series.gather(rows)
    if _castable(values.dtype, dtype):
        fitting, _ = cast_column(values, dtype, 0)
        if fitting.null_count() < len(values):
            return None
    value = shorten(values[0])
    message = f"expected {dtype}, got {value} in record {rows[0]}"
    return {"row": rows[0], "column": name, "value": value, "expected": dtype, "message": message}


def _fits_plainly(series: pl.Series, dtype: DType) -> bool:
    """Whether the first value surely fits, without a cast: those of polars take longer than a small job's scoring."""
    if series.dtype == pl.String() if dtype == "string" else series.dtype.is_numeric() and dtype.startswith("float"):
        return True
    first = next(iter(series.head(1).to_list()), None)
    return dtype.startswith("float") and isinstance(first, str) and _DECIMAL.fullmatch(first) is not None


_DECIMAL = re.compile(r"-?[0-9]{1,15}(\.[0-9]{1,15})?")


def _castable(kind: pl.DataType, dtype: DType) -> bool:
    if isinstance(kind, pl.String | pl.Categorical | pl.Enum | pl.Boolean | pl.Null) or kind.is_numeric():
        return True
    return dtype == "string" and kind.is_temporal()


# --- records -> inputs -----------------------------------------------------------------------------------------------


class _Faults:
    """The first fault of each record that can not be scored."""

    def __init__(self, records: int, first_record: int) -> None:
        self.mask = np.zeros(records, dtype=bool)
        self._first_record = first_record
        self._errors: dict[int, RowError] = {}

    def add(self, error: RowError) -> None:
        self.mask[error.record - self._first_record] = True
        self._errors.setdefault(error.record, error)

    def add_missing(self, missing: np.ndarray, column: str) -> None:
        for index in np.flatnonzero(missing & ~self.mask).tolist():
            record = self._first_record + index
            self.add(RowError(record, "missing-value", f"no value for {column!r}, and the model needs one", column))

    def errors(self) -> list[RowError]:
        return [self._errors[record] for record in sorted(self._errors)]


def build_inputs(
    signature: Signature, binding: Binding | None, records: Records, first_record: int
) -> tuple[dict[str, np.ndarray], np.ndarray, list[RowError]]:
    """The inputs for all records, a mask of those that can not be scored, and one error for each of these.

    A masked record stands in the inputs with harmless values, so that the others can be scored in the same run; its
    outputs mean nothing. `first_record` is the number of the first record in the whole input. Tensors need no binding.

    Raises SchemaMismatch when tensors do not fit, or a value for all records differs between them.
    """
    if isinstance(records, pl.DataFrame):
        if binding is None:
            raise SchemaMismatch("the model takes arrays: send an npy or npz file")
        faults = _Faults(records.height, first_record)
        inputs = {
            tensor.name: _fill(tensor, binding.sources[tensor.name], records, faults, first_record)
            for tensor in signature.inputs
        }
        return inputs, faults.mask, faults.errors()
    matched = _match_tensors(signature, records)
    faults = _Faults(max((len(array) for array in records.values() if array.ndim), default=0), first_record)
    for tensor in signature.inputs:
        _find_nan(tensor, matched[tensor.name], faults)
    inputs = {name: np.ascontiguousarray(array) for name, array in matched.items()}
    return inputs, faults.mask, faults.errors()


def _fill(
    tensor: InputTensor, sources: Sequence[str], table: pl.DataFrame, faults: _Faults, first_record: int
) -> np.ndarray:
    columns = _columns(tensor, sources)
    values = (
        _values(table[source], column, tensor.dtype, faults, first_record)
        for column, source in zip(columns, sources, strict=True)
    )
    if not tensor.per_record:
        return _one_for_all(tensor, next(values))
    if len(tensor.shape) == 1:
        return np.ascontiguousarray(next(values))
    matrix = np.empty((table.height, len(columns)), numpy_type(tensor.dtype))
    for index, column_values in enumerate(values):
        matrix[:, index] = column_values
    return matrix


def _values(series: pl.Series, column: Column, dtype: DType, faults: _Faults, first_record: int) -> np.ndarray:
    series, errors = cast_column(series, column.dtype, first_record)
    for error in errors:
        faults.add(error)
    series = series.cast(polars_type(dtype), strict=False)
    if dtype.startswith("float"):
        values = series.to_numpy()
        if not column.nullable and len(values) and np.isnan(values.min()):  # one NaN makes the minimum NaN
            faults.add_missing(np.isnan(values), column.name)
        return values
    if series.null_count():
        if not column.nullable:
            faults.add_missing(series.is_null().to_numpy(), column.name)
        blank = "" if dtype == "string" else False if dtype == "bool" else 0
        series = series.fill_null(pl.lit(blank, dtype=series.dtype))
    return _objects(series) if dtype == "string" else series.to_numpy()


def _objects(text: pl.Series) -> np.ndarray:
    """The strings as Python objects; a few that repeat often are made once each."""
    distinct = text.unique()
    if len(distinct) * 16 > len(text):
        return text.to_numpy()
    codes = text.cast(pl.Enum(distinct)).to_physical().to_numpy()
    objects: np.ndarray = distinct.to_numpy()[codes]
    return objects


def _one_for_all(tensor: InputTensor, values: np.ndarray) -> np.ndarray:
    shape = tuple(size or 1 for size in tensor.shape)
    if len(values) == 0:
        return np.zeros(shape, numpy_type(tensor.dtype))
    first = values[0]
    if first == first and (values != first).any():  # NaN, unlike itself, is reported as a missing value
        raise SchemaMismatch(f"input {tensor.name!r} is one value for all records, but the input has several")
    return np.full(shape, values[0], numpy_type(tensor.dtype))


def _match_tensors(signature: Signature, arrays: Tensors) -> Tensors:
    """Input name -> array in the shape and type of the input. A lone array without a name fills the only input."""
    if set(arrays) == {""} and len(signature.inputs) == 1:
        arrays = {signature.inputs[0].name: arrays[""]}
    wanted = [tensor.name for tensor in signature.inputs]
    if set(arrays) != set(wanted):
        got = [name or "one array without a name" for name in arrays]
        raise SchemaMismatch(
            f"the model takes the arrays {_listed(wanted)}, and the input has {_listed(got)}", expected=wanted, got=got
        )
    return {tensor.name: _fit(tensor, arrays[tensor.name]) for tensor in signature.inputs}


def _fit(tensor: InputTensor, array: np.ndarray) -> np.ndarray:
    if not tensor.per_record:
        return _one_for_all(tensor, _typed(tensor, array.reshape(-1)))
    trailing = tensor.shape[1:]
    if array.ndim and prod(array.shape[1:]) == 1 and all(size in (1, None) for size in trailing) and len(trailing) < 2:
        array = array.reshape(len(array), *(1 for _ in trailing))  # [N] and [N, 1] are the same values
    fits = array.ndim == len(tensor.shape) and all(
        want in (None, got) for want, got in zip(trailing, array.shape[1:], strict=True)
    )
    if not fits:
        expected, got = _shape((None, *trailing)), _shape(array.shape)
        raise SchemaMismatch(
            f"input {tensor.name!r}: expected an array of shape {expected}, got {got}", expected=expected, got=got
        )
    return _typed(tensor, array)


def _typed(tensor: InputTensor, array: np.ndarray) -> np.ndarray:
    target = numpy_type(tensor.dtype)
    if array.dtype == target:
        return array
    if tensor.dtype == "string":
        fits = array.dtype.kind in "UT"
    elif array.dtype.kind in "iu" and target.kind in "iu":
        bounds = np.iinfo(target)
        fits = not array.size or (int(array.min()) >= bounds.min and int(array.max()) <= bounds.max)
    else:
        fits = np.can_cast(array.dtype, target, "same_kind")
    if not fits:
        raise SchemaMismatch(
            f"input {tensor.name!r}: expected {tensor.dtype}, got {array.dtype}",
            expected=tensor.dtype,
            got=str(array.dtype),
        )
    with np.errstate(over="ignore"):  # beyond float32 is infinity, as from a table
        return array.astype(target)


def _find_nan(tensor: InputTensor, array: np.ndarray, faults: _Faults) -> None:
    if array.dtype.kind != "f" or not array.size or not tensor.per_record or not np.isnan(array.min()):
        return
    if tensor.columns is None:
        if not tensor.nullable:
            faults.add_missing(np.isnan(array.reshape(len(array), -1)).any(axis=1), tensor.name)
        return
    for column, values in zip(tensor.columns, array.reshape(len(array), -1).T, strict=True):
        if not column.nullable:
            faults.add_missing(np.isnan(values), column.name)


# --- outputs -> columns ----------------------------------------------------------------------------------------------


def output_columns(signature: Signature, top_k: int | None = None) -> dict[str, pl.DataType]:
    """Names and types of the result's columns, exactly as `to_columns` gives them.

    Raises InvalidOptions when `top_k` is asked of a model without probabilities or with fewer classes.
    """
    _check_top_k(signature, top_k)
    columns: dict[str, pl.DataType] = {}
    for output in signature.outputs:
        if top_k and output.role == "probabilities":
            columns.update(_ranking_columns(signature, output, top_k))
        else:
            columns.update(dict.fromkeys(_names(signature, output), _column_type(output)))
    return columns


def to_columns(signature: Signature, outputs: dict[str, np.ndarray], top_k: int | None = None) -> pl.DataFrame:
    """The outputs of a run as columns of the result, one row for each record."""
    _check_top_k(signature, top_k)
    series: list[pl.Series] = []
    for output in signature.outputs:
        array = outputs[output.name]
        if top_k and output.role == "probabilities":
            series.extend(_ranking(signature, output, array, top_k))
        else:
            series.extend(_series(_names(signature, output), output, array))
    return pl.DataFrame(series)


def check_count(outputs: Mapping[str, np.ndarray], records: int) -> None:
    """Raises ScoringFailed when an output has not exactly one row for each record: misaligned rows are not written."""
    for name, array in outputs.items():
        rows = len(array) if array.ndim else 0
        if rows != records:
            raise ScoringFailed(f"output {name!r} has {rows} rows for {records} records", expected=records, got=rows)


def _check_top_k(signature: Signature, top_k: int | None) -> None:
    if top_k is None:
        return
    if top_k < 1:
        raise InvalidOptions(f"top_k must be at least 1, got {top_k}")
    classes = [
        len(output.labels) or _output_width(output) or 1
        for output in signature.outputs
        if output.role == "probabilities"
    ]
    if not classes:
        raise InvalidOptions("top_k: the model gives no probabilities")
    if top_k > min(classes):
        raise InvalidOptions(f"top_k: the model knows {min(classes)} classes, got {top_k}")


def _names(signature: Signature, output: OutputTensor) -> list[str]:
    stem = _STEMS.get(output.role, output.name)
    if output.role == "value" and signature.task == "regression" and output == signature.outputs[0]:
        stem = "prediction"
    if output.group is not None:
        stem = f"{stem}_{output.group}"
    width = _output_width(output)
    if width is None or width > _WIDE or len(output.shape) == 1 or (width == 1 and not output.labels):
        return [stem]
    labels = output.labels or tuple(str(index) for index in range(width))
    return [f"{stem}_{label}" for label in labels]


def _output_width(output: OutputTensor) -> int | None:
    """How many values each record has; None: an array of its own."""
    if len(output.shape) == 1:
        return 1
    return output.shape[1] if len(output.shape) == 2 else None


def _listy(output: OutputTensor) -> bool:
    width = _output_width(output)
    return width is None or width > _WIDE


def _column_type(output: OutputTensor) -> pl.DataType:
    kind = polars_type(output.dtype)
    for _ in range(len(output.shape) - 1 if _listy(output) else 0):
        kind = pl.List(kind)
    return kind


def _series(names: Sequence[str], output: OutputTensor, array: np.ndarray) -> Iterator[pl.Series]:
    kind = _column_type(output)
    if _listy(output):
        values = array.tolist() if array.dtype == object or not array.size else array
        yield pl.Series(names[0], values).cast(kind) if len(array) else pl.Series(names[0], [], dtype=kind)
        return
    matrix = array[:, np.newaxis] if array.ndim == 1 else array
    for index, name in enumerate(names):
        yield _flat(name, matrix[:, index], kind)


def _flat(name: str, values: np.ndarray, kind: pl.DataType) -> pl.Series:
    if values.dtype == object:
        return pl.Series(name, values.tolist(), dtype=kind)
    return pl.Series(name, np.ascontiguousarray(values), dtype=kind)


def _ranking_columns(signature: Signature, output: OutputTensor, top_k: int) -> dict[str, pl.DataType]:
    label, probability = (f"{stem}_{output.group}" if output.group else stem for stem in ("label", "probability"))
    columns: dict[str, pl.DataType] = {}
    for place in range(1, top_k + 1):
        columns[f"{label}_{place}"] = polars_type(_label_type(signature, output))
        columns[f"{probability}_{place}"] = polars_type(output.dtype)
    return columns


def _ranking(signature: Signature, output: OutputTensor, array: np.ndarray, top_k: int) -> Iterator[pl.Series]:
    labels: np.ndarray = np.array(output.labels or range(array.shape[1]), dtype=object)
    array = array[:, : len(labels)]  # forests pad the classes of each target to the longest list
    order = np.argsort(-array, axis=1, kind="stable")[:, :top_k]
    labels = labels.astype(numpy_type(_label_type(signature, output)))
    ranked = np.take_along_axis(array, order, axis=1)
    for index, (name, kind) in enumerate(_ranking_columns(signature, output, top_k).items()):
        place = index // 2
        yield _flat(name, ranked[:, place] if index % 2 else labels[order[:, place]], kind)


def _label_type(signature: Signature, output: OutputTensor) -> DType:
    """The type of a class label: the one that the model's own label output has."""
    if not output.labels:
        return "int64"
    own = [other.dtype for other in signature.outputs if other.role == "label"]
    numeric = all(re.fullmatch(r"-?\d+", label) for label in output.labels)
    return own[0] if own and numeric else "string"
