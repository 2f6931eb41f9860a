"""Inspection of scikit-learn estimators: parts, columns, task and outputs."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from batchserve.conversion.sample import Array, Table, listed, sentence
from batchserve.errors import ConversionFailed

if TYPE_CHECKING:
    import pandas

Task = Literal["classification", "regression", "clustering", "outliers", "transform"]

BOOSTERS = frozenset({"lightgbm", "xgboost"})

TRANSDUCTIVE = (
    " It labels only the records that it was fitted on. Fit a classifier, such as KNeighborsClassifier, on them and "
    "its labels_."
)

NUMERIC_METHODS: dict[Task, tuple[str, ...]] = {
    "classification": ("predict_proba", "decision_function"),
    "regression": ("predict",),
    "clustering": ("transform", "predict_proba"),
    "outliers": ("decision_function", "score_samples"),
    "transform": ("transform",),
}
"""Methods of the estimator that the graph's numeric outputs may correspond to; the first that it has counts."""

_TREES = ("Boosted", "CatBoosted", "GradientBoosting", "HistGradientBoosting")
_NUMBERS = (bool, int, float, np.number, np.bool_)
_NEAREST = frozenset({"AffinityPropagation", "MeanShift"})
_ROUNDED = 1e-12
"""Relative difference of two numbers in double precision that are equal up to their rounding."""


# --- its parts -------------------------------------------------------------------------------------------------------


def parts(model: object) -> Iterator[Any]:
    """The estimator and all its parts, at any depth."""
    from sklearn.base import BaseEstimator

    if isinstance(model, BaseEstimator):
        yield model
        yield from parts(list(vars(model).values()))
    elif isinstance(model, list | tuple):
        for item in model:
            yield from parts(item)
    elif type(model).__name__ == "_CalibratedClassifier":  # contains an estimator without being one
        yield from parts(list(vars(model).values()))


def head_of(model: object) -> object:
    """The first step."""
    from sklearn.pipeline import Pipeline

    while isinstance(model, Pipeline):
        model = model.steps[0][1]
    return model


def last_step(model: object) -> object:
    """The step that gives the answer."""
    from sklearn.pipeline import Pipeline

    while isinstance(model, Pipeline):
        model = model.steps[-1][1]
    return model


def finds_neighbours(step: object) -> bool:
    """Whether its answers depend on distances that are almost equal."""
    from sklearn.neighbors import KNeighborsClassifier, KNeighborsRegressor

    return isinstance(step, KNeighborsClassifier | KNeighborsRegressor)


def fills_numbers(imputer: Any) -> bool:
    """Whether a fitted SimpleImputer puts numbers in the place of NaN. Those of a constant, and truth values, are in an
    array of objects."""
    missing, statistics = imputer.missing_values, getattr(imputer, "statistics_", [None])
    return isinstance(missing, float) and math.isnan(missing) and all(isinstance(s, _NUMBERS) for s in statistics)


def has(model: object, kind: Any) -> bool:
    return any(isinstance(part, kind) for part in parts(model))


def has_trees(model: object) -> bool:
    """Whether trees decide, by themselves or within it."""
    return any(
        hasattr(part, "tree_") or package(part) in BOOSTERS or type(part).__name__.startswith(_TREES)
        for part in parts(model)
    )


def boosters(model: object) -> frozenset[str]:
    return BOOSTERS & {package(part) for part in parts(model)}


def package(part: object) -> str:
    return type(part).__module__.partition(".")[0]


# --- its columns -----------------------------------------------------------------------------------------------------


def choose_columns(model: object, frame: "pandas.DataFrame", named: bool) -> Table:
    """The columns that the model takes, by name where it has names, else by count."""
    if _takes_texts(model):
        table = Table(frame, "texts", named)
        texts = table.texts()
        if len(texts) != 1:
            raise ConversionFailed(
                f"The model takes one column of texts, and the sample has {len(texts)}: {listed(texts)}. "
                "Pass a sample with that column alone."
            )
        return replace(table, frame=frame[texts])
    if dicts := _takes_dicts(model, frame):
        return Table(frame[dicts], "dicts")
    names = _used_names(model)
    count = len(names) or getattr(model, "n_features_in_", frame.shape[1])
    if not named and frame.shape[1] == count:
        return Table(frame.set_axis(names, axis=1) if names else frame, "frame" if names else "matrix", bool(names))
    if names:
        # LightGBM replaces blanks in names by underscores.
        own = {column.replace(" ", "_"): column for column in frame.columns}
        chosen = [name if name in frame.columns else own.get(name, name) for name in names]
        missing = [name for name in chosen if name not in frame.columns]
        if missing:
            raise ConversionFailed(
                f"The sample lacks columns that the model was trained on: {listed(missing)}. "
                f"It has {listed(frame.columns)}."
            )
        return Table(frame[chosen], "frame")
    if frame.shape[1] != count:
        raise ConversionFailed(
            f"The model takes {count} columns and does not know their names; the sample has {frame.shape[1]}: "
            f"{listed(frame.columns)}. Pass a sample with the model's columns alone, in its order."
        )
    return Table(frame, "matrix", named)


def _takes_texts(model: object) -> bool:
    from sklearn.compose import ColumnTransformer
    from sklearn.feature_extraction.text import CountVectorizer, HashingVectorizer

    return has(model, CountVectorizer | HashingVectorizer) and not has(model, ColumnTransformer)


def _takes_dicts(model: object, frame: "pandas.DataFrame") -> list[str]:
    """The columns of a model whose records are dicts; empty for any other."""
    from sklearn.feature_extraction import DictVectorizer

    head = head_of(model)
    if not isinstance(head, DictVectorizer) or not hasattr(head, "feature_names_"):
        return []
    known = set(head.feature_names_) | {name.partition(head.separator)[0] for name in head.feature_names_}
    columns = [str(column) for column in frame.columns if str(column) in known]
    lacking = [
        name for name in head.feature_names_ if name not in columns and name.partition(head.separator)[0] not in columns
    ]
    if lacking:
        raise ConversionFailed(f"The sample lacks columns for {listed(lacking)}. It has {listed(frame.columns)}.")
    return columns


def _used_names(model: object) -> list[str]:
    """The columns that the model was trained on, without those that a ColumnTransformer at its head drops."""
    from sklearn.compose import ColumnTransformer

    names = [str(name) for name in getattr(model, "feature_names_in_", ())]
    head = head_of(model)
    if names and isinstance(head, ColumnTransformer):
        used = [columns for _, step, columns in head.transformers_ if step != "drop"]
        if all(_by_name(columns) for columns in used):  # positions count in all columns
            chosen = {name for columns in used for name in selected(columns, names)}
            return [name for name in names if name in chosen]
    return names


def _by_name(columns: Any) -> bool:
    if isinstance(columns, slice):
        return isinstance(columns.start or columns.stop, str)
    return isinstance(columns, str) or all(isinstance(item, str) for item in np.atleast_1d(columns).tolist())


def selected(columns: Any, names: Sequence[str]) -> list[str]:
    """The names selected by a ColumnTransformer: by a name, names, positions, a slice or a mask."""
    if not _by_name(columns):
        return [str(name) for name in np.atleast_1d(np.asarray(names, dtype=object)[columns])]
    if isinstance(columns, slice):
        start = names.index(columns.start) if columns.start else None
        stop = names.index(columns.stop) + 1 if columns.stop else None
        return list(names[start:stop])
    return [columns] if isinstance(columns, str) else list(columns)


def encoded_columns(model: object, names: Sequence[str]) -> set[str]:
    """The columns of categorical encoders, for which 3 is a name and not a number."""
    from sklearn.compose import ColumnTransformer
    from sklearn.preprocessing import OneHotEncoder, OrdinalEncoder, TargetEncoder

    encoders = OneHotEncoder | OrdinalEncoder | TargetEncoder
    if isinstance(head_of(model), encoders):
        return set(names)
    known = [str(name) for name in getattr(model, "feature_names_in_", names)]
    return {
        name
        for part in parts(model)
        if isinstance(part, ColumnTransformer)
        for _, step, columns in getattr(part, "transformers_", ())  # a template inside of another has none
        if has(step, encoders)
        for name in selected(columns, known)
    }


def class_labels(model: Any, count: int) -> list[Any] | None:
    """The classes in the order of the probabilities; a list for each target where there are several."""
    classes = getattr(model, "classes_", None)
    if classes is None:
        return None
    if isinstance(classes, list):
        return [_json_labels(target) for target in classes]
    # The classes of a multi-label model are its targets; each target is no (0) or yes (1).
    return _json_labels(np.asarray(classes)) if count == 1 else [[0, 1]] * count


def _json_labels(classes: Array) -> list[str | int | bool]:
    """Truth values, integers and texts; the graph gives 1.0 as 1."""
    if classes.dtype.kind == "b":
        return [bool(label) for label in classes]
    return [int(label) for label in classes] if classes.dtype.kind in "iuf" else [str(label) for label in classes]


# --- its answers -----------------------------------------------------------------------------------------------------


def _task(model: object) -> Task:
    from sklearn import base

    if not isinstance(model, base.BaseEstimator) or not (hasattr(model, "predict") or hasattr(model, "transform")):
        raise ConversionFailed(
            f"{type(model).__name__} is not an estimator that can `predict` or `transform` records."
            + (TRANSDUCTIVE if hasattr(model, "labels_") else "")
        )
    if base.is_classifier(model):
        return "classification"
    if base.is_regressor(model) or type(last_step(model)).__name__ in ("LGBMRanker", "XGBRanker"):
        return "regression"
    if base.is_outlier_detector(model):
        return "outliers"
    # Mixtures are not clusterers by type, but predict clusters.
    return "clustering" if hasattr(model, "predict") else "transform"


def equidistant(model: Any, table: Table) -> Array | None:
    """bool [n]: whether the two nearest centres are at the same distance, so that rounding chooses between them.

    None: the model is not a clusterer that gives the nearest centre without its distance.
    """
    step: Any = last_step(model)
    if type(step).__name__ not in _NEAREST or len(step.cluster_centers_) < 2:
        return None
    x = np.asarray(_before_last(model, table), dtype=np.float64)
    return _tied(np.sort([((x - centre) ** 2).sum(axis=1) for centre in step.cluster_centers_], axis=0)[:2].T)


def neighbours_tie(model: Any, table: Table) -> bool:
    """Whether, for some record, the last neighbour and the next one are at the same distance, so that the order of
    training chooses between them."""
    step: Any = last_step(model)
    if not finds_neighbours(step) or step.n_neighbors >= step.n_samples_fit_:
        return False
    found = step.kneighbors(_before_last(model, table), step.n_neighbors + 1)[0]
    return bool(_tied(found[:, -2:]).any())


def _before_last(model: Any, table: Table) -> Any:
    """What the last step of a model gets."""
    from sklearn.pipeline import Pipeline

    x = table.native()
    while isinstance(model, Pipeline):
        x, model = model[:-1].transform(x) if len(model.steps) > 1 else x, model.steps[-1][1]
    return x


def _tied(two: Array) -> Array:
    """bool [n]: whether two distances are equal up to their rounding."""
    tied: Array = two[:, 1] - two[:, 0] <= _ROUNDED * two[:, 1]
    return tied


def known_differences(model: object) -> list[str]:
    """Notes on known silent differences of converters."""
    return [
        f"{type(part).__name__}: neighbours at the same distance may be chosen differently."
        for part in parts(model)
        if finds_neighbours(part)
    ] + [
        f"{type(part).__name__}: of centres at the same distance another may be chosen."
        for part in parts(model)
        if type(part).__name__ in _NEAREST
    ]


@dataclass(frozen=True)
class Reference:
    """The estimator's own outputs for the sample."""

    task: Task
    table: Table
    rows: Array
    """[n]: positions of the table's records in the sample."""
    labels: Array | None
    """[n] or [n, targets]"""
    method: str
    numbers: tuple[Array, ...]
    """Outputs of `method`, one array [n, k] for each target."""
    notes: tuple[str, ...] = ()


def ask(model: Any, table: Table) -> Reference:
    """Predict all records, or those without missing values when the model refuses the others."""
    task = _task(model)
    complete = ~table.without(table.columns)
    try:
        try:
            return Reference(task, table, np.arange(len(complete)), *answers_of(model, task, table))
        except Exception:
            if complete.all() or not complete.any():
                raise
        table = table.take(complete)
        note = f"{(~complete).sum()} of {len(complete)} records have missing values, which the model refuses: left out."
        return Reference(task, table, np.flatnonzero(complete), *answers_of(model, task, table), notes=(note,))
    except Exception as error:  # estimators raise many types
        raise ConversionFailed(f"The estimator itself cannot predict the sample: {sentence(error)}") from error


def answers_of(model: Any, task: Task, table: Table) -> tuple[Array | None, str, tuple[Array, ...]]:
    """Labels, the name of the method that gives the numbers, and these: one array [n, k] for each target."""
    native, n = table.native(), len(table.frame)
    labels = np.asarray(model.predict(native)) if task not in ("regression", "transform") else None
    method = next((name for name in NUMERIC_METHODS[task] if hasattr(model, name)), "")
    numbers = getattr(model, method)(native) if method else []
    if hasattr(numbers, "toarray"):
        numbers = numbers.toarray()
    targets = numbers if isinstance(numbers, list) else [np.asarray(numbers)]
    return labels, method, tuple(np.asarray(target, dtype=np.float64).reshape(n, -1) for target in targets)
