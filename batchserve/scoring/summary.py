"""What a result says as a whole: how often each class, and how the numbers are spread. Of a large result a sample of
whole chunks, evenly spread over it."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import polars as pl

from batchserve.domain import Chunk, DType, ModelVersion, OutputTensor
from batchserve.formats.protocol import Records
from batchserve.inference.outputs import ResultSchema, column_names
from batchserve.scoring.faults import by_name
from batchserve.scoring.inputs import Input, header_of
from batchserve.scoring.preview import places_of

_MOST_CLASSES = 20
_MOST_HISTOGRAMS = 4
_BINS = 24
_WIDE = 16
"""Probabilities of a record from which on fewer records are read."""
_SECONDS = 8.0
"""To find the chunks of the result; those found by then are sampled."""


@dataclass(frozen=True, slots=True)
class SummaryTask:
    input: Input
    """The result."""
    model: ModelVersion
    top_k: int | None
    records: int
    """Most records to read; a chunk more at most."""


class Histogram(NamedTuple):
    name: str
    counts: tuple[int, ...]
    """Of bins of one width."""
    low: float
    high: float
    mean: float
    others: int
    """Values that are missing or infinite."""


class Classes(NamedTuple):
    name: str
    counts: tuple[tuple[str, int], ...]
    """The most frequent classes."""
    rest: tuple[int, int]
    """How many other classes there are, and how often they are predicted."""
    others: int
    """Records without a class."""


@dataclass(slots=True)
class Summary:
    records: int = 0
    """How many were read."""
    is_whole: bool = True
    """Whether these are all records."""
    classes: list[Classes] = field(default_factory=list)
    probabilities: list[Histogram] = field(default_factory=list)
    """Of the predicted class."""
    numbers: list[Histogram] = field(default_factory=list)


@by_name
def summarize(task: SummaryTask) -> Summary:
    """Raises InvalidInput."""
    summary, (wanted, types) = Summary(), _wanted(task)
    if not wanted:
        return summary
    with task.input.open() as source:
        places = places_of(task.input)
        places.extend(source, lambda _: False, _SECONDS)
        chosen = _spread(places.chunks, task.records // _values_of_record(task))
        summary.is_whole = places.is_complete and len(chosen) == len(places.chunks)
        frames = []
        for chunk in chosen:
            records = task.input.reader.read(source, chunk, types, wanted).records
            frames.append(_frame(records, task.model))
            summary.records += chunk.records
    frame = pl.concat(frames, how="vertical_relaxed")
    if frame.height:
        _add(summary, frame, task)
    return summary


def _spread(chunks: list[Chunk], most: int) -> list[Chunk]:
    """Chunks of about so many records, evenly spread."""
    total = sum(chunk.records for chunk in chunks)
    if total <= most:
        return chunks
    count = max(1, round(len(chunks) * most / total))
    return [chunks[place] for place in np.linspace(0, len(chunks) - 1, count).round().astype(int).tolist()]


def _values_of_record(task: SummaryTask) -> int:
    """By how much fewer records are read where each has many probabilities."""
    widths = [output.shape[1] or 1 for output in task.model.signature.outputs if len(output.shape) == 2]
    return max(1, max(widths, default=1) // _WIDE)


def _wanted(task: SummaryTask) -> tuple[list[str], dict[str, DType]]:
    """The columns to read, and their types; lists come as the format has them."""
    header = header_of(task.input)
    if header.arrays:
        return list(header.arrays), {}
    schema = ResultSchema(task.model.signature, task.top_k)
    kinds = {name: kind for name, kind in schema.columns.items() if name in header.columns}
    lists = {name for name, kind in kinds.items() if kind.is_nested()}
    types: dict[str, DType] = {
        name: "float64" if kind.is_float() else "string" for name, kind in kinds.items() if name not in lists
    }
    ranked = {output.name for output in task.model.signature.outputs if output.role == "probabilities"}
    return [name for name in kinds if name not in lists or schema.lists.get(name) in ranked], types


def _frame(records: Records, model: ModelVersion) -> pl.DataFrame:
    """The columns of the result, also where it is one of arrays."""
    if isinstance(records, pl.DataFrame):
        return records
    signature, columns = model.signature, []
    for name, array in records.items():
        output = next((output for output in signature.outputs if output.name == name or not name), None)
        names = [name] if output is None else column_names(signature, output)
        if array.ndim == 1 or (array.ndim == 2 and len(names) == 1 and array.shape[1] > 1):
            columns.append(pl.Series(names[0], array))
        elif array.ndim == 2 and array.shape[1] == len(names):
            columns += [pl.Series(each, array[:, index]) for index, each in enumerate(names)]
    return pl.DataFrame(columns)


def _add(summary: Summary, frame: pl.DataFrame, task: SummaryTask) -> None:
    signature, top_k = task.model.signature, task.top_k
    for output in signature.outputs:
        names = [name for name in column_names(signature, output) if name in frame.columns]
        if output.role == "label" or (output.role == "value" and signature.task in ("clustering", "outliers")):
            summary.classes += [_classes(name, frame[name]) for name in names[:_MOST_HISTOGRAMS]]
        elif output.role == "value" or (output.role == "scores" and len(names) == 1 and not top_k):
            numbers = [name for name in names if frame[name].dtype.is_numeric()]
            summary.numbers += [_histogram(name, frame[name]) for name in numbers[:_MOST_HISTOGRAMS]]
        elif output.role == "probabilities" and not top_k:
            _add_probabilities(summary, frame, output, names, task)
    if top_k:
        for name in [name for name in frame.columns if name.startswith("label") and name.endswith("_1")]:
            summary.classes.append(_classes(name, frame[name]))
        for name in [name for name in frame.columns if name.startswith("probability") and name.endswith("_1")]:
            summary.probabilities.append(_histogram(name, frame[name]))
    summary.numbers = summary.numbers[:_MOST_HISTOGRAMS]


def _add_probabilities(
    summary: Summary, frame: pl.DataFrame, output: OutputTensor, names: list[str], task: SummaryTask
) -> None:
    """Of the predicted class; in a model that gives no class, of the most probable one, which is counted as well."""
    matrix = _matrix(frame.select(names))
    if matrix is None or not matrix.shape[1]:
        return
    failed = np.isnan(matrix).all(axis=1)
    most = np.where(failed, 0, np.nan_to_num(matrix, nan=-np.inf).argmax(axis=1))
    labels = output.labels or (tuple(names) if len(names) > 1 else tuple(map(str, range(matrix.shape[1]))))
    label = next((name for name in _labels_of(task, output) if name in frame.columns), None)
    if label is not None:
        places = {text: place for place, text in enumerate(labels)}
        predicted = frame[label].cast(pl.String()).replace_strict(places, default=None, return_dtype=pl.Int64())
        most = predicted.fill_null(pl.Series(most)).to_numpy() if predicted.null_count() else predicted.to_numpy()
    elif matrix.shape[1] > 1:
        texts = [None if is_failed else labels[place] for is_failed, place in zip(failed, most.tolist(), strict=True)]
        summary.classes.append(_classes(output.group or "most probable class", pl.Series(texts, dtype=pl.String())))
    chosen = np.where(failed, np.nan, matrix[np.arange(len(matrix)), most])
    name = "probability" if output.group is None else f"probability of {output.group}"
    summary.probabilities.append(_histogram(name, pl.Series(chosen), (0.0, 1.0)))


def _matrix(frame: pl.DataFrame) -> np.ndarray | None:
    """The numbers of columns, or of one column of lists, with NaN in failed rows; None where there are none."""
    if all(column.dtype.is_numeric() for column in frame):
        return frame.cast(pl.Float64()).fill_null(float("nan")).to_numpy()
    if frame.width != 1:
        return None
    lists = frame.to_series()
    if lists.dtype == pl.String():
        lists = lists.str.json_decode(pl.List(pl.Float64()))
    given = lists.drop_nulls()
    if not len(given) or not given.dtype.is_nested():
        return None
    if isinstance(given.dtype, pl.List) and given.list.len().n_unique() > 1:
        return None
    rows = given.explode().cast(pl.Float64()).fill_null(float("nan")).to_numpy().reshape(len(given), -1)
    matrix = np.full((len(lists), rows.shape[1]), np.nan)
    matrix[lists.is_not_null().to_numpy()] = rows
    return matrix


def _labels_of(task: SummaryTask, output: OutputTensor) -> Iterator[str]:
    """The columns with the class that an output gives the probabilities of."""
    for other in task.model.signature.outputs:
        names = column_names(task.model.signature, other) if other.role == "label" else []
        its = names if other.group == output.group else [f"prediction_{output.group}"]
        yield from (name for name in names if name in its)


def _classes(name: str, column: pl.Series) -> Classes:
    counts = Counter(_class(value) for value in column.drop_nulls().to_list())
    missing = column.null_count() + counts.pop("", 0)
    frequent = counts.most_common(_MOST_CLASSES)
    rest = sum(counts.values()) - sum(count for _, count in frequent)
    return Classes(name, tuple(frequent), (len(counts) - len(frequent), rest), missing)


def _class(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) and value.is_integer() else str(value)


def _histogram(name: str, column: pl.Series, within: tuple[float, float] | None = None) -> Histogram:
    values = column.cast(pl.Float64()).fill_null(float("nan")).to_numpy()
    finite = values[np.isfinite(values)]
    low, high = within or ((float(finite.min()), float(finite.max())) if len(finite) else (0.0, 1.0))
    if within and len(finite):  # by a hair beyond them, as sums of floats are
        finite = finite.clip(low, high)
    if low == high:
        low, high = low - 0.5, high + 0.5
    counts, _ = np.histogram(finite, _BINS, (low, high))
    mean = float(finite.mean()) if len(finite) else float("nan")
    return Histogram(name, tuple(counts.tolist()), low, high, mean, len(values) - len(finite))
