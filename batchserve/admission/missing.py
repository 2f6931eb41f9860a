"""For which columns a missing value has an answer that the model was built to give."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from onnx import ModelProto

from batchserve.admission import graph
from batchserve.admission.domains import known_missing
from batchserve.admission.probe_inputs import Feed
from batchserve.domain import InputTensor, Signature
from batchserve.errors import OutOfMemory, ScoringFailed
from batchserve.inference.kernels import Arrays, Session

__all__ = ["with_nullable"]

NULLABLE_COLUMNS = 2048
"""Wider inputs are tried with all columns missing at once."""

_NULL_AWARE = {"Imputer", "IsNaN"}
"""Operators, beside tree ensembles, that know what to do with a missing value."""


def with_nullable(
    signature: Signature, model: ModelProto, session: Session, feed: Feed, metadata: Mapping[str, Any]
) -> Signature:
    """Marks the number columns for which a missing value still gives an answer that the model was built to give.

    A network can turn NaN into a number by accident, so the graph must hold an operator that knows missing values, or
    the metadata must say so. What the metadata says of texts stays as it is: there "" stands for a missing one.
    """
    aware = any(node.op_type in _NULL_AWARE or node.op_type.startswith("TreeEnsemble") for node in graph.nodes(model))
    inputs: list[InputTensor] = []
    for tensor in signature.inputs:
        if (known := known_missing(metadata, tensor)) is not None:
            inputs.append(_with_known_nullable(tensor, known))
            continue
        if tensor.dtype == "string" or tensor.image is not None:
            inputs.append(tensor)
            continue
        probed = tensor.per_record and tensor.dtype.startswith("float") and len(tensor.shape) <= 2
        answered = _answers_nan(signature, session, feed, tensor.name) if probed else np.zeros(0, dtype=bool)
        if tensor.columns is None:
            inputs.append(replace(tensor, nullable=aware and bool(answered.size and answered.all())))
            continue
        columns = (
            replace(column, nullable=probed and bool(answered[index]) and (aware or column.nullable))
            for index, column in enumerate(tensor.columns)
        )
        inputs.append(replace(tensor, columns=tuple(columns)))
    return replace(signature, inputs=tuple(inputs))


def _with_known_nullable(tensor: InputTensor, known: Sequence[bool]) -> InputTensor:
    if tensor.columns is None:
        return replace(tensor, nullable=all(known))
    columns = zip(tensor.columns, known, strict=True)
    return replace(tensor, columns=tuple(replace(column, nullable=nullable) for column, nullable in columns))


def _answers_nan(signature: Signature, session: Session, feed: Feed, name: str) -> np.ndarray:
    """For each column of an input whether all float outputs stay numbers when its value is missing."""
    width = feed.arrays[name][:1].size
    if not width or signature.mode == "whole":
        return np.zeros(width, dtype=bool)
    together = width > NULLABLE_COLUMNS
    records = 1 if together else width
    inputs = feed.take(np.zeros(records, dtype=np.int64))
    flat = inputs[name].reshape(records, -1)
    if together:
        flat[:] = np.nan
    else:
        flat[np.arange(width), np.arange(width)] = np.nan
    step = signature.batch if signature.mode == "fixed" else records
    while True:
        try:
            answers = list(_finite_answers(session, feed, inputs, records, step))
            return np.broadcast_to(np.concatenate(answers), width)
        except OutOfMemory:
            if signature.mode == "fixed" or step == 1:
                return np.zeros(width, dtype=bool)
            step //= 2
        except ScoringFailed:
            return np.zeros(width, dtype=bool)


def _finite_answers(session: Session, feed: Feed, inputs: Arrays, records: int, step: int) -> Iterator[np.ndarray]:
    for start in range(0, records, step):
        indices = np.minimum(np.arange(start, start + step), records - 1)
        part = {key: array if key in feed.shared else array[indices] for key, array in inputs.items()}
        yield _finite(session.run(part), step)[: records - start]


def _finite(outputs: Arrays, records: int) -> np.ndarray:
    good = np.ones(records, dtype=bool)
    for array in outputs.values():
        if array.dtype.kind == "f":
            good &= ~np.isnan(array.reshape(records, -1)).any(axis=1)
    return good
