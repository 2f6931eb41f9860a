"""The sample that verifies a conversion: read, typed and reduced to the model's columns."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np

from batchserve.errors import ConversionFailed

if TYPE_CHECKING:
    import pandas
    import polars

Array = np.ndarray[Any, Any]
INSTALL = "Install it with: pip install 'batchserve[sklearn]'"
Kind = Literal["bool", "int", "float", "string"]
Rounds = Callable[[Sequence[str] | None], bool]
"""Whether what is computed of these columns (None: of all) is rounded to float32."""


@dataclass(frozen=True)
class Table:
    """The records of the sample, with only the model's columns, in its order."""

    frame: "pandas.DataFrame"
    form: Literal["frame", "matrix", "texts", "dicts"]
    """The estimator's argument: a DataFrame, an array [n, k], or a list of texts or of dicts."""
    named: bool = True
    """Whether the columns have names; without, any k columns fit."""

    def kind(self, column: str) -> Kind:
        """The type of a column's values. Raises ConversionFailed for types that ONNX does not have."""
        match self._inferred(column):
            case "boolean" | "integer" if self.frame[column].isna().any():
                return "float"
            case "boolean":
                return "bool"
            case "integer":
                return "int"
            case "floating" | "mixed-integer-float" | "decimal" | "empty":
                return "float"
            case "string":
                return "string"
            case other:
                raise ConversionFailed(
                    f"Column {column!r} holds {other} values, and a model in ONNX takes numbers and texts. "
                    "Turn it into numbers before the pipeline, or omit it."
                )

    def texts(self) -> list[str]:
        """The columns that hold texts."""
        return [column for column in self.columns if self._inferred(column) == "string"]

    def _inferred(self, column: str) -> str:
        import pandas

        series = self.frame[column]
        if isinstance(series.dtype, pandas.CategoricalDtype):
            series = series.astype(series.dtype.categories.dtype)
        return pandas.api.types.infer_dtype(series.dropna())

    def cells(self, columns: Sequence[str], dtype: Literal["float32", "float64", "int64", "string"]) -> Array:
        """Columns as an array [n, k] for the graph. A missing text becomes empty: ONNX has no other."""
        frame = self.frame[list(columns)]
        if dtype == "string":
            return np.asarray(frame.astype(object).where(frame.notna(), ""), dtype=object)
        return np.asarray(frame.astype(dtype))

    def native(self) -> Any:
        """The records in the form that the estimator takes."""
        if self.form == "frame":
            return self.frame
        if self.form == "dicts":
            records = self.frame.astype(object).to_dict("records")
            return [{str(name): value for name, value in record.items() if value == value} for record in records]
        return self.frame.iloc[:, 0].tolist() if self.form == "texts" else self.frame.to_numpy()

    def in_float32(self, columns: Sequence[str] | None = None) -> bool:
        """Whether scikit-learn computes with these columns, or all, in float32, which it does where it gets that."""
        own = [name for name in columns or () if name in self.frame] if self.form == "frame" else []
        dtypes = list(self.frame[own].dtypes if own else self.frame.dtypes)  # a sample may lack what is not used
        if any(getattr(dtype, "kind", "O") not in "fiu" for dtype in dtypes):
            return False
        return bool(np.result_type(*(getattr(dtype, "numpy_dtype", dtype) for dtype in dtypes)) == np.float32)

    def take(self, rows: Array | slice) -> Self:
        return replace(self, frame=self.frame.iloc[rows])

    def without(self, columns: Sequence[str]) -> Array:
        """bool [n]: whether a record lacks a value in one of these columns."""
        return np.asarray(self.frame[list(columns)].isna().any(axis=1), dtype=bool)

    def records(self, most: int) -> list[dict[str, Any]]:
        """The first records as JSON values, complete ones before those with missing values (null)."""
        order = np.argsort(self.without(self.columns), kind="stable")[:most]
        frame = self.frame.iloc[order].astype(object)
        records = frame.where(frame.notna(), None).to_dict("records")
        return [{str(name): _plain(value) for name, value in record.items()} for record in records]

    @property
    def columns(self) -> tuple[str, ...]:
        return tuple(self.frame.columns)


def as_frame(sample: Any) -> tuple["pandas.DataFrame", bool]:
    """The sample as a DataFrame with texts for column names, and whether these come from the user."""
    import pandas
    import polars

    if isinstance(sample, Path | str):
        sample = _read(Path(sample))
    if isinstance(sample, pandas.Series | polars.Series):
        sample = sample.to_frame()
    if isinstance(sample, polars.DataFrame):
        sample = pandas.DataFrame({name: sample[name].to_numpy() for name in sample.columns})
    named = isinstance(sample, pandas.DataFrame)
    if named:
        frame = sample.rename(columns=str).reset_index(drop=True)
    else:
        array = np.asarray(sample)
        frame = pandas.DataFrame(array.reshape(len(array), -1) if array.ndim else array.reshape(1, 1)).infer_objects()
        frame.columns = [f"x{i}" for i in range(frame.shape[1])]  # scikit-learn's default names
    if frame.empty:
        raise ConversionFailed("The sample is empty. Pass some records like those of the training; 1,000 are enough.")
    if not frame.columns.is_unique:
        twice = sorted(set(frame.columns[frame.columns.duplicated()]))
        raise ConversionFailed(f"The sample has columns of the same name: {listed(twice)}.")
    return frame, named


def _read(path: Path) -> "polars.DataFrame":
    import polars

    readers: dict[str, Callable[[Path], polars.DataFrame]] = {
        ".csv": partial(polars.read_csv, infer_schema_length=None),
        ".tsv": partial(polars.read_csv, infer_schema_length=None, separator="\t"),
        ".parquet": polars.read_parquet,
        ".ndjson": polars.read_ndjson,
        ".jsonl": polars.read_ndjson,
    }
    if path.suffix not in readers:
        raise ConversionFailed(f"The sample {path.name} is none of {listed(readers)}.")
    try:
        return readers[path.suffix](path)
    except (OSError, polars.exceptions.PolarsError) as error:
        raise ConversionFailed(f"The sample {path.name} could not be read: {sentence(error)}") from error


def sentence(error: Exception) -> str:
    """The first line of another library's message, for quoting."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0].rstrip('.')}."


def listed(names: Iterable[object]) -> str:
    """Names for a message, the first twelve of many."""
    quoted = [repr(str(name)) for name in names]
    more = f" and {len(quoted) - 12} more" if len(quoted) > 12 else ""
    return (", ".join(quoted[:12]) + more) or "none"


def _plain(value: Any) -> Any:
    value = value.item() if isinstance(value, np.generic) else value
    return None if isinstance(value, float) and not math.isfinite(value) else value
