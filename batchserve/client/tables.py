"""Tables that users hand in: how each becomes frames of polars to send, and how a result becomes one of its kind.

A table remembers its columns. What passed through to the result gets the type again that it had there.
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain, pairwise
from typing import TYPE_CHECKING, Any

from batchserve.client.extras import require_polars
from batchserve.client.ipc import FIRST_BLOCK, cut, records_in_block
from batchserve.errors import InvalidInput

if TYPE_CHECKING:
    import numpy as np
    import polars as pl

Origins = Mapping[str, str]
"""The columns of a result that passed through, each with the name that it had in the input."""


class Table(ABC):
    """A table that was handed in."""

    @property
    @abstractmethod
    def names(self) -> Sequence[str]:
        """Of the columns, as they are sent."""

    repeatable: bool
    """Whether `frames` can be read more than once."""

    @abstractmethod
    def frames(self) -> "Iterator[pl.DataFrame]":
        """The records in blocks; at least one. Raises InvalidInput that names a column which cannot be sent."""

    @abstractmethod
    def restored(self, result: "pl.DataFrame", origins: Origins) -> Any:
        """A result as a table of this kind."""


def table_of(data: object) -> Table | None:
    """None for what is no table. Raises InvalidInput for columns of one name, and of types that cannot be sent."""
    if is_table(data):
        require_polars(f"a table (a {type(data).__name__})")
    match type(data).__module__.partition(".")[0]:
        case "polars":
            return PolarsTable(data)
        case "pandas":
            from batchserve.client.pandas_table import PandasTable

            return PandasTable(data)
        case "numpy":
            return StructuredTable(data) if getattr(getattr(data, "dtype", None), "names", None) else None
    if hasattr(data, "__arrow_c_stream__"):
        return _of_stream(data)
    return _of_stream(_Batch(data)) if hasattr(data, "__arrow_c_array__") else None


def is_table(data: object) -> bool:
    """Whether `table_of` takes it for a table."""
    streams = hasattr(data, "__arrow_c_stream__") or hasattr(data, "__arrow_c_array__")
    fields = getattr(getattr(data, "dtype", None), "names", None) is not None
    return streams or fields or type(data).__module__.partition(".")[0] in ("pandas", "polars")


def _of_stream(data: Any) -> Table:
    """Read batch by batch where pyarrow is there to do it, which also gives the result; else as a whole, by polars."""
    try:
        import pyarrow as pa  # noqa: F401
    except ImportError:
        import polars as pl

        return PolarsTable(pl.DataFrame(data))
    from batchserve.client.arrow_table import ArrowTable

    return ArrowTable(data)


def require_names(names: Sequence[str]) -> None:
    """Raises InvalidInput that names a column which appears twice, or for one without a name."""
    if len(set(names)) < len(names):
        twice = next(name for name in names if list(names).count(name) > 1)
        raise InvalidInput(f"column {twice!r} appears more than once: rename one, or drop it")
    if any(not name.strip() for name in names):
        raise InvalidInput("the table has a column whose name is empty or blank; every column needs a name")


def origins_of(
    columns: Sequence[str], names: Sequence[str], passthrough: str | Sequence[str], key: str | None
) -> dict[str, str]:
    """The columns of a result that may have passed through under the options of its job, from those of the input."""
    chosen = set(names) if passthrough in ("all", "unused") else set() if passthrough == "none" else set(passthrough)
    passed = [name for name in names if name in chosen or name == key]
    # A column that is called like one of the model's travels as `input_` and its name, until that is no column's.
    renamed: dict[str, str] = {}
    for name in sorted(passed, key=len):
        new = f"input_{name}"
        while new in names:
            new = f"input_{new}"
        if new in columns:
            renamed.setdefault(new, name)
    return renamed | {name: name for name in passed if name in columns and name not in renamed.values()}


class PolarsTable(Table):
    """A DataFrame, LazyFrame or Series of polars. A LazyFrame is collected batch by batch while it is sent, at each
    try anew; a Series is a column."""

    repeatable = True

    def __init__(self, data: Any) -> None:
        import polars as pl

        if isinstance(data, pl.Series):
            data = data.alias(data.name or "column_0").to_frame()
        if not isinstance(data, pl.DataFrame | pl.LazyFrame):
            raise TypeError(f"cannot send a {type(data).__name__} of polars: expected a DataFrame, LazyFrame or Series")
        self._data: pl.DataFrame | pl.LazyFrame = data
        self._schema = data.collect_schema()
        require_names(self._schema.names())

    @property
    def names(self) -> Sequence[str]:
        return self._schema.names()

    def frames(self) -> "Iterator[pl.DataFrame]":
        import polars as pl

        if isinstance(self._data, pl.LazyFrame):
            first = pl.DataFrame(schema=self._schema)
            given: Iterator[pl.DataFrame] = chain([first], self._data.collect_batches(maintain_order=True))
        else:
            given = iter([self._data])
        return map(plain, cut(map(self._without_objects, given)))

    def restored(self, result: "pl.DataFrame", origins: Origins) -> "pl.DataFrame | pl.LazyFrame":
        import polars as pl

        columns = []
        for column in result:
            kind = self._schema.get(origins.get(column.name, ""))
            if isinstance(kind, pl.Object) and isinstance(self._data, pl.DataFrame):
                column = self._data[origins[column.name]].alias(column.name)
            columns.append(column if kind is None or column.dtype == kind else column.cast(kind))
        frame = pl.DataFrame(columns)
        return frame.lazy() if isinstance(self._data, pl.LazyFrame) else frame

    def _without_objects(self, frame: "pl.DataFrame") -> "pl.DataFrame":
        import polars as pl

        objects = [name for name, kind in frame.schema.items() if isinstance(kind, pl.Object)]
        return frame.with_columns(series_of(name, frame[name].to_list()) for name in objects) if objects else frame


class StructuredTable(Table):
    """A structured array of numpy, of which each field is a column."""

    repeatable = True

    def __init__(self, data: Any) -> None:
        import numpy as np

        if data.ndim != 1:
            raise InvalidInput(f"a structured array of shape {list(data.shape)} is no table: expected one axis")
        if masked := [name for name in data.dtype.names if np.ma.is_masked(data[name])]:
            raise InvalidInput(f"column {masked[0]!r} has masked values: fill them (filled), or pass a DataFrame")
        self._data = data
        self._fields: dict[str, np.dtype[Any]] = {name: data.dtype[name] for name in data.dtype.names}
        for name, kind in self._fields.items():
            if kind.base.kind not in "?biufSUMmO" or (kind.base.kind == "f" and kind.base.itemsize > 8):
                raise InvalidInput(f"column {name!r} holds {kind}, which cannot be sent: expected plain values")
        # Their type is known only from all values.
        self._whole = {
            name: _of_bytes(name, data[name].tolist())
            if kind.base.kind == "S"
            else series_of(name, data[name].tolist())
            for name, kind in self._fields.items()
            if kind.base.kind in "OS"
        }

    @property
    def names(self) -> Sequence[str]:
        return list(self._fields)

    def frames(self) -> "Iterator[pl.DataFrame]":
        return slices(len(self._data), self._slice)

    def _slice(self, start: int, stop: int) -> "pl.DataFrame":
        import polars as pl

        part = self._data[start:stop]
        columns = (
            self._whole[name][start:stop] if name in self._whole else series_of_array(name, part[name])
            for name in self._fields
        )
        return pl.DataFrame(list(columns))

    def restored(self, result: "pl.DataFrame", origins: Origins) -> "np.ndarray[Any, Any]":
        import numpy as np

        values: dict[str, Any] = {}
        kinds: list[Any] = []
        for column in result:
            name = column.name
            kind = self._fields.get(origins.get(name, ""))
            if kind is None:
                values[name] = column.to_numpy()
            elif kind.base.kind == "O":
                values[name] = self._data[origins[name]]  # as it went, an object of any kind
            elif kind.base.kind in "SU" or (kind.shape and kind.base.kind in "Mm"):
                given = column.to_list()
                encoded = kind.base.kind == "S" and not _holds_bytes(column.dtype)
                values[name] = np.array(_encoded(given) if encoded else given, kind.base)
            else:
                values[name] = column.to_numpy()
            kinds.append((name, values[name].dtype if kind is None else kind))
        array = np.empty(result.height, dtype=kinds)
        for name, given in values.items():
            array[name] = given
        return array


class _Batch:
    """One record batch as a stream of one."""

    def __init__(self, data: Any) -> None:
        self._data = data

    def __arrow_c_stream__(self, requested_schema: object = None) -> object:
        import polars as pl

        return pl.DataFrame(self._data).__arrow_c_stream__(requested_schema)


def slices(records: int, take: "Callable[[int, int], pl.DataFrame]") -> "Iterator[pl.DataFrame]":
    """A table in blocks, of which `take` makes each from the numbers of its first record and of that behind it."""
    first = take(0, min(records, FIRST_BLOCK))
    yield first
    if records > FIRST_BLOCK:
        step = records_in_block(first)
        for start, stop in pairwise([*range(FIRST_BLOCK, records, step), records]):
            yield take(start, stop)


def plain(frame: "pl.DataFrame") -> "pl.DataFrame":
    """The frame with the texts that categories stand for, also those in lists and structs."""
    changed = {name: text for name, kind in frame.schema.items() if (text := without_categories(kind)) != kind}
    return frame.cast(changed) if changed else frame  # type: ignore[arg-type]


def without_categories(kind: Any) -> Any:
    """The type of texts instead of categories, inside and out."""
    import polars as pl

    match kind:
        case pl.Categorical() | pl.Enum():
            return pl.String()
        case pl.List():
            return pl.List(without_categories(kind.inner))
        case pl.Array():
            return pl.Array(without_categories(kind.inner), kind.size)
        case pl.Struct():
            return pl.Struct({field.name: without_categories(field.dtype) for field in kind.fields})
    return kind


def series_of_array(name: str, array: "np.ndarray[Any, Any]") -> "pl.Series":
    """A column of a plain numpy type; NaN stays NaN, NaT is null."""
    import numpy as np
    import polars as pl

    array = array.astype(array.dtype.newbyteorder("="), copy=False)
    if array.dtype.kind in "Mm":
        unit, count = np.datetime_data(array.dtype)
        coarse = {"Y": "D", "M": "D", "W": "D", "h": "ms", "m": "ms", "s": "ms"} if array.dtype.kind == "M" else {}
        known = {"D"} if array.dtype.kind == "M" else set()
        target = unit if count == 1 and unit in known | {"ms", "us", "ns"} else coarse.get(unit, "ms")
        array = array.astype(f"{array.dtype.kind}8[{target}]")
    if array.dtype.kind == "U":
        return series_of(name, array.tolist())
    return pl.Series(name, np.ascontiguousarray(array))


def series_of(name: str, values: list[Any]) -> "pl.Series":
    """A column of Python objects: of their type where they have one in common, else of their texts, so that a value
    that does not fit costs its record."""
    import polars as pl

    try:
        series = pl.Series(name, values, strict=True)
    except (TypeError, ValueError, OverflowError, pl.exceptions.PolarsError):
        series = None
    if series is not None and not isinstance(series.dtype, pl.Object):
        return series
    if all(_is_exact(value) for value in values if value is not None):
        return pl.Series(name, [None if value is None else float(value) for value in values], pl.Float64())
    return pl.Series(name, [_text(value) for value in values], pl.String())


def _of_bytes(name: str, values: list[Any]) -> "pl.Series":
    """Bytes are texts in numpy, too, where they are UTF-8."""
    try:
        return series_of(name, _decoded(values))
    except UnicodeDecodeError:
        return series_of(name, values)


def _decoded(value: Any) -> Any:
    return [_decoded(inner) for inner in value] if isinstance(value, list) else value.decode()


def _encoded(value: Any) -> Any:
    return [_encoded(inner) for inner in value] if isinstance(value, list) else value.encode()


def _holds_bytes(kind: Any) -> bool:
    return _holds_bytes(kind.inner) if hasattr(kind, "inner") else str(kind) == "Binary"


def _is_exact(value: object) -> bool:
    """Whether a value is a number that a float64 holds as it is."""
    return isinstance(value, float) or (isinstance(value, int) and abs(value) <= 2**53)


def _text(value: Any) -> str | None:
    if value is None:
        return None
    if isinstance(value, str):  # half of a pair of surrogates is no character
        return value.encode(errors="backslashreplace").decode()
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, list | tuple | dict):
        return json.dumps(value, default=str)
    if isinstance(value, bytes):
        return value.decode(errors="backslashreplace")
    return value.isoformat() if hasattr(value, "isoformat") else str(value)
