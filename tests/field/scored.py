"""A model converted, admitted and scored as the server does it, and whether the answers are those of the original."""

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import polars as pl

from batchserve.admission import admit
from batchserve.conversion import convert
from batchserve.errors import ConversionFailed, ParityFailed
from batchserve.inference.binding import bind
from batchserve.inference.inputs import build_inputs
from batchserve.inference.outputs import ResultSchema, check_count
from batchserve.inference.session import open_session

TOLERANCE = 1e-4
"""Relative to max(1, |expected|)."""

EQUAL = "equal"


def outcome(case: Callable[[], Any]) -> str:
    """`equal`, or the reason for which the model was refused. Raises AssertionError where an answer differs."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, records = case()
        try:
            conversion = convert(model, pd.DataFrame(records) if are_dicts(records) else records)
        except (ConversionFailed, ParityFailed) as refused:
            return str(refused).partition("\n")[0]
        assert_equal(model, records, str(conversion.task), score_as_the_server(conversion.onnx, as_table(records)))
    return EQUAL


def score_as_the_server(graph: bytes, table: pl.DataFrame) -> pl.DataFrame:
    admitted = admit(graph)
    signature = admitted.signature
    binding = bind(signature, table.columns)
    inputs, failed, errors = build_inputs(signature, binding, table)
    assert not failed.any(), errors[:3]
    assert not errors
    arrays = {name: array for name, array in inputs.items() if isinstance(array, np.ndarray)}
    outputs = open_session(admitted.model, signature.threads).run(arrays)
    check_count(outputs, len(table))
    return ResultSchema(signature).frame(outputs)


def are_dicts(records: Any) -> bool:
    return isinstance(records, list) and isinstance(records[0], dict)


def as_table(records: Any) -> pl.DataFrame:
    """The records as a file has them: numbers, texts, truth values, and nothing where a value is missing."""
    if isinstance(records, list) and not are_dicts(records):
        records = pd.DataFrame({"text": records})
    frame = pd.DataFrame(records)
    frame.columns = [f"x{column}" if str(column).isdigit() else str(column) for column in frame.columns]
    values = frame.astype(object)
    return pl.DataFrame(values.where(values.notna(), None).to_dict("list"))


METHODS: dict[str, tuple[str, ...]] = {
    "classification": ("predict_proba", "decision_function"),
    "regression": ("predict",),
    "clustering": ("transform", "predict_proba"),
    "outliers": ("decision_function",),
    "transform": ("transform",),
}


def assert_equal(model: Any, records: Any, task: str, result: pl.DataFrame) -> None:
    """Its labels, and the numbers of the first of its methods that gives any, are those of the original."""
    if not hasattr(model, "fit") and hasattr(model, "predict"):  # a Booster
        assert_near(
            as_matrix(result.drop("prediction") if task == "classification" else result),
            booster_numbers(model, records),
        )
        return
    if task not in ("regression", "transform"):
        labels = [column for column in result.columns if column.startswith("prediction")]
        expected = np.asarray(model.predict(records)).reshape(len(records), -1)
        got = result.select(labels).to_numpy()
        same = got == expected if expected.dtype.kind == "f" else got.astype(str) == expected.astype(str)
        assert same.all(), (got[:3].tolist(), expected[:3].tolist())
        result = result.drop(labels)
    method = next((name for name in METHODS[task] if hasattr(model, name)), None)
    if method is not None:
        assert_near(as_matrix(result), as_numbers(getattr(model, method)(records)))


def booster_numbers(model: Any, records: Any) -> np.ndarray[Any, Any]:
    if type(model).__module__.startswith("xgboost"):
        from xgboost import DMatrix

        records = DMatrix(records, enable_categorical=True)
    return as_numbers(model.predict(records))


def as_numbers(numbers: Any) -> np.ndarray[Any, Any]:
    numbers = numbers if isinstance(numbers, list) else [numbers]
    numbers = [n.toarray() if hasattr(n, "toarray") else n for n in numbers]
    return np.column_stack([np.asarray(target, dtype=np.float64) for target in numbers])


def as_matrix(result: pl.DataFrame) -> np.ndarray[Any, Any]:
    """The numbers of a result; an output of many columns comes as lists."""
    if result.width == 1 and isinstance(result.dtypes[0], pl.List):
        return np.array(result.to_series().to_list())
    return result.to_numpy()


def assert_near(got: np.ndarray[Any, Any], expected: np.ndarray[Any, Any]) -> None:
    if expected.shape[1] == 1 and got.shape[1] == 2:
        got = got[:, 1:]  # one score for the second class, where the graph has one for each
    assert got.shape == expected.shape, (got.shape, expected.shape)
    difference = np.abs(got - expected) / np.maximum(1, np.abs(expected))
    assert difference.max() <= TOLERANCE, difference.max()
