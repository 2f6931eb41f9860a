"""Roles of a model's outputs: which is the label, which are probabilities, and of which classes and targets.

Read from the metadata, from the graph, and only then from the values of a probe run, which may be rounded.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
from onnx import ModelProto

from batchserve.admission import graph
from batchserve.admission.makers import role_by_operator
from batchserve.domain import DType, OutputTensor
from batchserve.errors import ModelRefused
from batchserve.formats.schema import POLARS
from batchserve.inference.kernels import Arrays

__all__ = ["read_outputs"]

_REGRESSORS = {"LinearRegressor", "SVMRegressor", "TreeEnsembleRegressor"}


def read_outputs(
    model: ModelProto,
    metadata: Mapping[str, Any],
    rows: Arrays,
    runs: Sequence[Arrays],
    groups: Mapping[str, int],
    known: Mapping[str, tuple[str, ...]],
    lists: Collection[str] = (),
) -> tuple[str, tuple[OutputTensor, ...]]:
    """The task of the model and its outputs, with their roles and labels.

    `rows`: the outputs of a probe run; `runs`: those of other runs, to tell fixed sizes from free ones.
    `groups`: output -> its target; `known`: output -> certain class labels. `lists`: outputs that are lists of
    any length for each record, and no classes.
    """
    targets = tuple(str(target) for target in metadata.get("targets", ()))
    label = _label_output(metadata, {name: array for name, array in rows.items() if name not in lists})
    inside = graph.class_labels(model)
    several = _several(targets, rows[label]) if label else ()
    outputs: list[OutputTensor] = []
    for name, array in rows.items():
        shape = _true_shape(name, runs, array)
        width = shape[1] if len(shape) == 2 else 1 if len(shape) == 1 else None
        group = _target(targets, groups[name]) if name in groups else None
        labels = _class_labels(metadata, groups.get(name), known.get(name, ()) or inside, width)
        output = OutputTensor(name, _array_dtype(name, array), shape, group=group)
        if name in lists:
            outputs.append(output)
            continue
        if name == label:
            output = replace(output, role="label", labels=several)
        elif array.dtype.kind == "f" and width is not None and (label or labels or graph.is_softmax(model, name)):
            # Without classes of its own, a column beside several labels is about the label in its place.
            by_target = several if group is None and len(several) == width else ()
            output = replace(output, role=_float_role(model, metadata, name, array), labels=labels or by_target)
        outputs.append(output)
    task = str(metadata.get("task") or _guess_task(model, outputs, rows))
    if task == "regression":
        outputs[0] = replace(outputs[0], labels=_several(targets, rows[outputs[0].name]))
    return task, tuple(outputs)


def _label_output(metadata: Mapping[str, Any], rows: Arrays) -> str | None:
    """The output that holds the predicted class, cluster or verdict."""
    discrete = [name for name, array in rows.items() if array.dtype.kind in "iubO" and array.ndim <= 2]
    named = [name for name in discrete if "label" in name.lower()]
    if named:
        return named[0]
    return discrete[0] if discrete and metadata.get("task") in ("classification", "clustering", "outliers") else None


def _class_labels(
    metadata: Mapping[str, Any], target: int | None, inside: tuple[str, ...], width: int | None
) -> tuple[str, ...]:
    """The labels for as many classes as the output has; empty when none are known."""
    recorded = metadata.get("labels") or ()
    if recorded and isinstance(recorded[0], list):
        recorded = recorded[target] if target is not None and target < len(recorded) else ()
    for labels in (tuple(str(label) for label in recorded), inside):
        # Forests pad the classes of each target to the longest list.
        if labels and width is not None and (len(labels) == width or (target is not None and len(labels) < width)):
            return labels
    return ()


def _float_role(
    model: ModelProto, metadata: Mapping[str, Any], name: str, array: np.ndarray
) -> Literal["probabilities", "scores"]:
    """What the conversion says, else the operator that makes the numbers; only where both are silent their values."""
    method = metadata.get("method")
    if method is not None:
        return "probabilities" if method == "predict_proba" else "scores"
    if (known := role_by_operator(model, name)) is not None:
        return known
    values = array.reshape(len(array), -1)
    within = bool(np.isfinite(values).all() and (values >= -1e-4).all() and (values <= 1 + 1e-4).all())
    sums = values.shape[1] > 1 and bool(np.allclose(values.sum(axis=1), 1, atol=1e-3))
    return "probabilities" if within and (sums or "prob" in name.lower()) else "scores"


def _guess_task(model: ModelProto, outputs: list[OutputTensor], rows: Arrays) -> str:
    roles = {output.role for output in outputs}
    if "label" in roles:
        scores = next((output for output in outputs if output.role == "scores"), None)
        if scores is None or scores.labels or "score" not in scores.name.lower():
            return "classification"
        label = next(output for output in outputs if output.role == "label")
        verdicts = set(np.unique(rows[label.name]).tolist()) <= {-1, 1} and (scores.shape[1:] or (1,)) == (1,)
        return "outliers" if verdicts else "clustering"
    if "probabilities" in roles:
        return "classification"
    single = outputs[0].name == "variable" and (outputs[0].shape[1:] or (1,)) == (1,)
    regressor = any(node.op_type in _REGRESSORS and node.domain == "ai.onnx.ml" for node in graph.nodes(model))
    return "regression" if single or regressor else "unknown"


def _several(targets: tuple[str, ...], array: np.ndarray) -> tuple[str, ...]:
    """The targets of a prediction's columns; empty when there is only one."""
    width = array.shape[1] if array.ndim == 2 else 1
    return tuple(_target(targets, index) for index in range(width)) if width > 1 else ()


def _target(targets: tuple[str, ...], index: int) -> str:
    return targets[index] if index < len(targets) else str(index + 1)


def _true_shape(name: str, runs: Sequence[Arrays], array: np.ndarray) -> tuple[int | None, ...]:
    shapes = [run[name].shape[1:] for run in runs] + [array.shape[1:]]
    if any(len(shape) != len(shapes[0]) for shape in shapes):
        raise ModelRefused(f"output {name!r} has a rank that changes between runs")
    return None, *(sizes[0] if len(set(sizes)) == 1 else None for sizes in zip(*shapes, strict=True))


def _array_dtype(name: str, array: np.ndarray) -> DType:
    if array.dtype.kind == "O":
        return "string"
    if array.dtype.name not in POLARS:
        raise ModelRefused(f"output {name!r} has elements of {array.dtype.name}, which is not supported")
    return array.dtype.name
