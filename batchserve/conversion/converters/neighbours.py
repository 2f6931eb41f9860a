"""Nearest neighbours. Distances that are almost equal decide who counts, so all of it is computed in float64."""

from typing import Any

import numpy as np
from onnx import TensorProto

from batchserve.conversion.converters import dense
from batchserve.conversion.converters.algebra import label_of
from batchserve.conversion.converters.tape import EXAMPLES, Tape, Value
from batchserve.conversion.sample import Array
from batchserve.errors import ConversionFailed

_SPARE = 8
"""Candidates beyond the neighbours that are wanted: the distances by which they are found are rounded."""
_TINY = np.finfo(np.float64).tiny


def has_one_target_or_weights(model: Any) -> bool:
    """skl2onnx converts several targets, and answers as if there were no weights."""
    return model.weights not in (None, "uniform") or not isinstance(getattr(model, "classes_", None), list)


def nearest_neighbours(tape: Tape, model: Any) -> Any:
    """KNeighborsClassifier and KNeighborsRegressor."""
    _require_convertible(model)
    points = np.asarray(dense(model._fit_X), dtype=np.float64)
    x = tape.wide_merged()
    if not tape.is_wide:  # what the graph gets was rounded, and is at no distance from a point that is rounded, too
        points = points.astype(np.float32).astype(np.float64)
    distances, places = _nearest(tape, x, points, model)
    weights = _weights(tape, distances) if model.weights == "distance" else None
    targets = np.asarray(model._y)
    if not hasattr(model, "classes_"):
        means = _mean(tape, weights, places, targets.reshape(len(targets), -1).astype(np.float64))
        return means.to("f", force=True)
    shares = _mean(tape, weights, places, np.eye(len(model.classes_))[targets.reshape(-1)])
    return label_of(tape, model.classes_, shares.argmax()), shares.to("f", force=True)


def _require_convertible(model: Any) -> None:
    name, metric = type(model).__name__, model.effective_metric_
    if metric not in ("euclidean", "manhattan", "chebyshev", "minkowski", "cosine") or (
        metric == "minkowski" and model.effective_metric_params_.get("w") is not None
    ):
        shown = metric if isinstance(metric, str) else getattr(metric, "__name__", metric)
        raise ConversionFailed(
            f"{name}(metric={shown!r}) has no ONNX converter. Use 'euclidean', 'manhattan', 'chebyshev', 'minkowski' "
            "or 'cosine', without weights of the columns."
        )
    if model.weights not in (None, "uniform", "distance"):
        raise ConversionFailed(
            f"{name} weighs its neighbours by a function of its own, which has no ONNX converter. Use "
            "weights='distance' or 'uniform'."
        )
    if isinstance(getattr(model, "classes_", None), list):
        raise ConversionFailed(
            f"{name}(weights='distance') converts with one target; use weights='uniform', or a model for each target."
        )


def _nearest(tape: Tape, x: Value, points: Array, model: Any) -> tuple[Value, Value]:
    """Distances and places [N, k] of the nearest points, the nearest first."""
    count = min(model.n_neighbors, len(points))
    match model.effective_metric_:
        case "euclidean":
            return _nearest_euclidean(tape, x, points, count)
        case "cosine":
            distances = _cosine(tape, x, points)
        case "chebyshev":
            distances = _added(tape, "Max", [_difference(tape, x, points, i) for i in range(points.shape[1])])
        case metric:
            power = 1.0 if metric == "manhattan" else float(model.effective_metric_params_["p"])
            differences = (_difference(tape, x, points, i) for i in range(points.shape[1]))
            raised = [item if power == 1 else _raised(tape, item, power) for item in differences]
            total = _added(tape, "Add", raised)
            distances = total if power == 1 else _raised(tape, total, 1 / power)
    return _smallest(tape, distances, count)


def _nearest_euclidean(tape: Tape, x: Value, points: Array, count: int) -> tuple[Value, Value]:
    """Some candidates by a product of matrices, and of these the nearest by differences: these are 0 where both are
    equal, and are added as scikit-learn's trees add them."""
    centre = points.mean(axis=0)
    moved = _node(tape, "Sub", x, tape.constant(centre[None], "d"), like=x)
    cross = _node(tape, "MatMul", moved, tape.constant(-2 * (points - centre).T, "d"), width=len(points))
    rough = _node(tape, "Add", cross, tape.constant(((points - centre) ** 2).sum(axis=1)[None], "d"), like=cross)
    _, candidates = _smallest(tape, rough, min(len(points), count + max(count, _SPARE)))
    squares = []
    for index in range(points.shape[1]):
        found = _node(tape, "Gather", tape.constant(points[:, index], "d"), candidates, like=candidates, axis=0)
        difference = _node(tape, "Sub", found, _column(tape, x, index), like=found)
        squares.append(_node(tape, "Mul", difference, difference, like=found))
    distances, order = _smallest(tape, _added(tape, "Add", squares), count)
    places = tape.node("GatherElements", candidates, order, example=order.example, axis=1)
    return _node(tape, "Sqrt", distances, like=distances), places


def _cosine(tape: Tape, x: Value, points: Array) -> Value:
    squares = _node(tape, "Mul", x, x, like=x)
    length = _node(tape, "Sqrt", squares.sum(axis=1, keepdims=True), width=1)
    ones = tape.constant([[1.0]], "d")
    none = _node(tape, "Cast", tape.node("Equal", length, tape.constant([[0.0]], "d"), example=np.zeros((EXAMPLES, 1))),
                 width=1, to=TensorProto.DOUBLE)  # fmt: skip
    directions = _node(tape, "Div", x, _node(tape, "Add", length, none, width=1), like=x)
    lengths = np.linalg.norm(points, axis=1, keepdims=True)
    theirs = points / np.where(lengths == 0, 1.0, lengths)
    likeness = _node(tape, "MatMul", directions, tape.constant(theirs.T, "d"), width=len(points))
    distance = _node(tape, "Sub", ones, likeness, like=likeness)
    return _node(tape, "Max", distance, tape.constant([[0.0]], "d"), like=likeness)


def _weights(tape: Tape, distances: Value) -> Value:
    """1 / distance; where a neighbour is at the very place, such neighbours alone."""
    same = tape.node("Equal", distances, tape.constant([[0.0]], "d"), example=np.zeros(distances.shape, bool))
    same = _node(tape, "Cast", same, like=distances, to=TensorProto.DOUBLE)
    some = same.max(axis=1, keepdims=True)
    apart = _node(tape, "Sub", tape.constant([[1.0]], "d"), some, like=some)
    inverse = _node(tape, "Div", apart, _node(tape, "Max", distances, tape.constant([[_TINY]], "d"), like=distances),
                    like=distances)  # fmt: skip
    return _node(tape, "Add", inverse, same, like=distances)


def _mean(tape: Tape, weights: Value | None, places: Value, targets: Array) -> Value:
    """[N, targets]: means, weighted or not, of what the neighbours [N, k] have."""
    count, width = places.shape[1], targets.shape[1]
    shape = (EXAMPLES, count, width)
    theirs = tape.node("Gather", tape.constant(targets, "d"), places, example=np.zeros(shape), axis=0)
    if weights is None:
        sums = theirs.sum(axis=1)
        return _node(tape, "Div", sums, tape.constant([[float(count)]], "d"), like=sums)
    each = tape.node("Unsqueeze", weights, tape.constant([2], "i"), example=np.zeros((EXAMPLES, count, 1)))
    sums = tape.node("Mul", theirs, each, example=theirs.example).sum(axis=1)
    return _node(tape, "Div", sums, weights.sum(axis=1, keepdims=True), like=sums)


# --- nodes of float64 ------------------------------------------------------------------------------------------------


def _node(tape: Tape, kind: str, *inputs: Value, like: Value | None = None, width: int = 0, **more: Any) -> Value:
    """A node whose output is float64, [N, width] or as `like`."""
    shape = (EXAMPLES, width) if like is None else like.shape
    return tape.node(kind, *inputs, example=np.zeros(shape), **more)


def _column(tape: Tape, x: Value, index: int) -> Value:
    return _node(tape, "Gather", x, tape.constant([index], "i"), width=1, axis=1)


def _difference(tape: Tape, x: Value, points: Array, index: int) -> Value:
    """[N, points]: absolute, in one column."""
    theirs = tape.constant(points[None, :, index], "d")
    difference = _node(tape, "Sub", _column(tape, x, index), theirs, width=len(points))
    return _node(tape, "Abs", difference, like=difference)


def _raised(tape: Tape, x: Value, power: float) -> Value:
    return _node(tape, "Pow", x, tape.constant([[power]], "d"), like=x)


def _added(tape: Tape, kind: str, values: list[Value]) -> Value:
    """One after the other."""
    total = values[0]
    for value in values[1:]:
        total = _node(tape, kind, total, value, like=total)
    return total


def _smallest(tape: Tape, x: Value, count: int) -> tuple[Value, Value]:
    """The smallest of each record and their places, in ascending order."""
    found = np.zeros((EXAMPLES, count)), np.zeros((EXAMPLES, count), np.int64)
    values, places = tape.nodes("TopK", x, tape.constant([count], "i"), examples=found, axis=1, largest=0, sorted=1)
    return values, places


__all__ = ["has_one_target_or_weights", "nearest_neighbours"]
