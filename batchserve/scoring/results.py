"""From answers to the records of a result, and to the entries of its errors list."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import orjson
import polars as pl

from batchserve.domain import RowError
from batchserve.errors import InvalidOptions
from batchserve.formats.protocol import Format, Records, Tensors
from batchserve.formats.schema import as_base64
from batchserve.formats.tensors import frame_of, vector
from batchserve.inference.answers import Scored
from batchserve.inference.matching import Match


def result_of(format: Format, scored: Scored, passed: Records, match: Match) -> Records:
    """A row for each record, null or blank where it failed: what travels along, then the outputs of the model."""
    if isinstance(passed, dict) and format.holds != "arrays":
        passed = frame_of(passed)
    if isinstance(passed, dict):
        own = _arrays_of(scored, match)
        renamed = names_beside(passed, own)
        return dict(zip(renamed, passed.values(), strict=True)) | own
    outputs = _columns_of(scored, match)
    inputs = [
        column.alias(name) for column, name in zip(passed, names_beside(passed.columns, outputs.columns), strict=True)
    ]
    outputs = pl.DataFrame([*inputs, *outputs]) if inputs else outputs
    lists = match.result().lists if format.holds != "table" else {}
    return _as_arrays(outputs, lists, scored) if lists else outputs


def names_beside(passed: Iterable[str], own: Iterable[str]) -> list[str]:
    """What travels along is called in the result: one that is called like a column of the model is `input_<name>`."""
    passed, taken = list(passed), set(own)
    if taken.isdisjoint(passed):
        return passed
    models, taken = taken, taken | set(passed)
    names = []
    for name in passed:
        if name in models:
            while name in taken:
                name = f"input_{name}"
            taken.add(name)
        names.append(name)
    return names


def _arrays_of(scored: Scored, match: Match) -> Tensors:
    """The outputs of the graph, unless they are ranked."""
    if match.options.top_k is None:
        return {name: _blanked(array, scored.failed) for name, array in scored.outputs.items()}
    return _as_arrays(_columns_of(scored, match), match.result().lists, scored)


def _columns_of(scored: Scored, match: Match) -> pl.DataFrame:
    outputs = match.result().frame(scored.outputs)
    if scored.failed.any():
        keep = pl.Series(~scored.failed)
        outputs = outputs.select(
            pl.when(keep).then(pl.col(name)).otherwise(None).alias(name) for name in outputs.columns
        )
    return outputs


def _as_arrays(outputs: pl.DataFrame, lists: Mapping[str, str], scored: Scored) -> Tensors:
    """An array for each column; for one of lists the output that it holds."""
    return {
        column.name: _blanked(_of_one_size(scored.outputs[lists[name]], name), scored.failed)
        if (name := column.name) in lists
        else vector(column)
        for column in outputs
    }


def _of_one_size(array: np.ndarray, name: str) -> np.ndarray:
    if array.dtype == object and array.ndim == 1 and any(isinstance(value, list) for value in array):
        raise InvalidOptions(
            f"{name!r} differs in size between records, which npy and npz cannot hold: request parquet"
        )
    return array


def _blanked(array: np.ndarray, failed: np.ndarray) -> np.ndarray:
    """The array with failed rows blanked: NaN, "" or 0. The errors list distinguishes them from real zeros."""
    if not failed.any():
        return array
    array = array.copy()
    array[failed] = np.nan if array.dtype.kind == "f" else "" if array.dtype.kind in "OU" else 0
    return array


def error_lines(
    errors: Iterable[RowError],
    keys: pl.Series | np.ndarray | None,
    first_record: int,
    place: Callable[[int], Mapping[str, Any]] | None = None,
) -> bytes:
    """An entry for each failed record, numbered over all inputs of the job, as NDJSON.

    `keys`: of the column or array that identifies a record. `place`: gives further fields by a record's number in the
    chunk, of a job of several inputs.
    """
    if keys is not None:
        table = frame_of({"key": keys}) if isinstance(keys, np.ndarray) else pl.DataFrame({"key": keys})
        keys = as_base64(table)["key"]
    lines = []
    for error in errors:
        line: dict[str, Any] = {"record": first_record + error.record}
        if place is not None:
            line |= place(error.record)
        if keys is not None:
            line["key"] = _plain_value(keys, error.record)
        line |= {"column": error.column, "code": error.code, "message": error.message}
        lines.append(orjson.dumps(line, default=str, option=orjson.OPT_APPEND_NEWLINE))
    return b"".join(lines)


def _plain_value(column: pl.Series, place: int) -> Any:
    """A value as a Python object, of float32 with no more digits than a result has; None where Python has none, such as
    for years beyond 9999."""
    if column.dtype == pl.Float32() and column[place] is not None:
        return float(str(np.float32(column[place])))
    try:
        return column[place]
    except (ValueError, OverflowError, pl.exceptions.PanicException):
        return None
