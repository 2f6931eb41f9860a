"""Conversion of model outputs to result columns. All functions are pure, and vectorised over records."""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain

import numpy as np
import polars as pl

from batchserve.domain import DType, OutputTensor, Signature
from batchserve.errors import InvalidOptions, ScoringFailed
from batchserve.formats.schema import numpy_type, polars_type

__all__ = ["ResultSchema", "check_count"]

_WIDE = 64
"""An output with more columns than this becomes one list column."""
_STEMS = {"label": "prediction", "probabilities": "probability", "scores": "score"}


class ResultSchema:
    """The columns that a model adds to a result, made once from its signature and the `top_k` of a job.

    Raises InvalidOptions when `top_k` is asked of a model that has nothing to rank, or fewer classes.
    """

    columns: dict[str, pl.DataType]
    """Names and types, exactly as `frame` gives them."""
    lists: dict[str, str]
    """Column of lists -> the output whose arrays it holds."""

    def __init__(self, signature: Signature, top_k: int | None = None) -> None:
        self._signature, self._top_k = signature, top_k
        self._ranked = _told_apart(signature, _ranked(signature, top_k), top_k) if top_k is not None else {}
        self.columns, self.lists = {}, {}
        for output in signature.outputs:
            if top_k and (ranked := self._ranked.get(output.name)):
                self.columns.update(_ranking_columns(signature, ranked, top_k))
                continue
            names = column_names(signature, output)
            self.columns.update(dict.fromkeys(names, _column_type(output)))
            if _listy(output):
                self.lists[names[0]] = output.name

    def frame(self, outputs: Mapping[str, np.ndarray]) -> pl.DataFrame:
        """The outputs of a run as these columns, one row for each record."""
        series: list[pl.Series] = []
        for output in self._signature.outputs:
            array = outputs[output.name]
            if self._top_k and (ranked := self._ranked.get(output.name)):
                series.extend(_ranking(self._signature, ranked, array, self._top_k))
            else:
                series.extend(_series(column_names(self._signature, output), output, array))
        return pl.DataFrame(series)


def check_count(outputs: Mapping[str, np.ndarray], records: int) -> None:
    """Raises ScoringFailed unless each output has exactly one row for each record: misaligned rows are not written."""
    for name, array in outputs.items():
        rows = len(array) if array.ndim else 0
        if rows != records:
            raise ScoringFailed(f"output {name!r} has {rows} rows for {records} records", expected=records, got=rows)


def _ranked(signature: Signature, top_k: int) -> tuple[OutputTensor, ...]:
    """The outputs that `top_k` ranks: the probabilities, or in a model without any the scores of named classes."""
    if top_k < 1:
        raise InvalidOptions(f"top_k must be at least 1, got {top_k}")
    several = [output for output in signature.outputs if (_output_width(output) or 0) > 1]
    probabilities = tuple(output for output in several if output.role == "probabilities")
    scores = tuple(output for output in several if output.role == "scores" and output.labels)
    ranked = probabilities or scores
    if not ranked:
        raise InvalidOptions("top_k: the model gives no probabilities, and no scores of named classes")
    classes = min(len(output.labels) or _output_width(output) or 0 for output in ranked)
    if top_k > classes:
        raise InvalidOptions(f"top_k: the model has {classes} classes, got {top_k}")
    return ranked


def _told_apart(signature: Signature, ranked: Sequence[OutputTensor], top_k: int) -> dict[str, OutputTensor]:
    """The ranked outputs by name: those whose columns are also columns of another have their names in them.

    Raises InvalidOptions where two columns would still have one name.
    """
    others = [output for output in signature.outputs if output not in ranked]
    plain = [name for output in others for name in set(column_names(signature, output))]

    def taken(outputs: Iterable[OutputTensor]) -> Counter[str]:
        return Counter(chain(plain, *(_ranking_columns(signature, output, top_k) for output in outputs)))

    used = taken(ranked)
    apart = {
        output.name: output
        if all(used[name] == 1 for name in _ranking_columns(signature, output, top_k))
        else replace(output, group=f"{output.group}_{output.name}" if output.group else output.name)
        for output in ranked
    }
    if twice := [name for name, count in taken(apart.values()).items() if count > 1]:
        raise InvalidOptions(f"top_k: two columns of the result would be called {twice[0]!r}")
    return apart


def column_names(signature: Signature, output: OutputTensor) -> list[str]:
    """The columns of one output in a result."""
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
    """Number of values of each record; None: an array."""
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
    label, value = (f"{stem}_{output.group}" if output.group else stem for stem in ("label", _STEMS[output.role]))
    columns: dict[str, pl.DataType] = {}
    for place in range(1, top_k + 1):
        columns[f"{label}_{place}"] = polars_type(_label_type(signature, output))
        columns[f"{value}_{place}"] = polars_type(output.dtype)
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
    """The type of class labels: that of the model's label output."""
    if not output.labels:
        return "int64"
    own = [other.dtype for other in signature.outputs if other.role == "label"]
    numeric = all(re.fullmatch(r"-?\d+", label) for label in output.labels)
    return own[0] if own and numeric else "string"
