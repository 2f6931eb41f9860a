"""Parts that stand for others: estimators of which only `transform` counts, zeros that are missing, steps in double
precision, exact trees."""

import copy
from collections.abc import Sequence
from typing import Any, Self

import numpy as np
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.compose import ColumnTransformer
from sklearn.ensemble import ExtraTreesClassifier, ExtraTreesRegressor, RandomForestClassifier, RandomForestRegressor
from sklearn.impute import SimpleImputer
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import (
    MaxAbsScaler,
    MinMaxScaler,
    OneHotEncoder,
    OrdinalEncoder,
    RobustScaler,
    StandardScaler,
)
from sklearn.tree import DecisionTreeClassifier, DecisionTreeRegressor, ExtraTreeClassifier, ExtraTreeRegressor

from batchserve.conversion.estimator import finds_neighbours, parts, selected
from batchserve.conversion.sample import Array


class TransformOnly(TransformerMixin, BaseEstimator):  # type: ignore[misc]
    """A fitted estimator of which only `transform` counts."""

    def __init__(self, estimator: Any) -> None:
        self.estimator = estimator
        self.n_features_in_ = estimator.n_features_in_

    def fit(self, x: Any, y: Any = None) -> Self:  # noqa: ARG002 - scikit-learn's signature
        return self

    def transform(self, x: Any) -> Array:
        transformed: Array = self.estimator.transform(x)
        return transformed


class ZerosMissing(TransformerMixin, BaseEstimator):  # type: ignore[misc]
    """What XGBoost makes of a sparse matrix: a zero that is not stored is missing."""

    def __init__(self, n_features_in_: int) -> None:
        self.n_features_in_ = n_features_in_

    def fit(self, x: Any, y: Any = None) -> Self:  # noqa: ARG002 - scikit-learn's signature
        return self

    def transform(self, x: Any) -> Array:
        return np.where(x == 0, np.nan, x)


class Chosen(ColumnTransformer):  # type: ignore[misc]
    """A ColumnTransformer behind another step, which gets one matrix."""


class InDouble(TransformerMixin, BaseEstimator):  # type: ignore[misc]
    """Fitted steps that scikit-learn computes in float64, where it gets that. The trees behind them split at values of
    the training data: what was rounded earlier than there goes another way. Neighbours are as near as in float64."""

    def __init__(self, steps: Sequence[Any], n_features_in_: int, rounds: bool, stays: bool = False) -> None:
        """`rounds`: each operation to float32, as where it gets that. `stays`: the answer is float64, too."""
        self.steps, self.n_features_in_, self.rounds, self.stays = list(steps), n_features_in_, rounds, stays

    def fit(self, x: Any, y: Any = None) -> Self:  # noqa: ARG002 - scikit-learn's signature
        return self

    def transform(self, x: Any) -> Array:
        for step in self.steps:
            x = step.transform(x)
        return np.asarray(x)


def with_double(model: Any, *, rounds: bool) -> Any:
    """A copy whose first steps compute in float64; None where these do something else than to scale and to fill in."""
    if finds_neighbours(model):
        return model
    if not isinstance(model, Pipeline):
        return None
    copied = copy.copy(model)  # it shares the steps that stay
    copied.steps = list(model.steps)
    title, head = model.steps[0]
    if isinstance(head, Pipeline) and (inner := with_double(head, rounds=rounds)) is not None:
        copied.steps[0] = (title, inner)
    elif isinstance(head, ColumnTransformer) and type(head) is not Chosen and hasattr(head, "transformers_"):
        copied.steps[0] = (title, _columns_in_double(head, rounds))
    elif count := _count_in_double(model.steps):
        first = [step for _, step in model.steps[:count]]
        stays = any(finds_neighbours(step) for _, step in model.steps[count : count + 1])
        copied.steps[:count] = [("in_double", InDouble(first, first[0].n_features_in_, rounds, stays))]
    else:
        return None
    return copied


def _columns_in_double(head: ColumnTransformer, rounds: bool) -> ColumnTransformer:
    names = list(getattr(head, "feature_names_in_", range(head.n_features_in_)))
    copied = copy.copy(head)
    copied.transformers_ = []
    for name, step, chosen in head.transformers_:
        if not isinstance(chosen, str):  # that is one column of texts
            step = _in_double(step, len(selected(chosen, names)), rounds)
        copied.transformers_.append((name, step, chosen))
    return copied


def _in_double(step: Any, width: int, rounds: bool) -> Any:
    """A part of a ColumnTransformer: what it does to numbers, as far as that is arithmetic, in float64."""
    if isinstance(step, str):
        return InDouble([], width, rounds) if step == "passthrough" else step
    if any(isinstance(part, OneHotEncoder | OrdinalEncoder) for part in parts(step)):
        return step
    steps = step.steps if isinstance(step, Pipeline) else [("step", step)]
    if isinstance(steps[0][1], SimpleImputer) and not _fills_numbers(steps[0][1]):
        return step
    count = _count_in_double(steps)
    first = InDouble([item for _, item in steps[:count]], width, rounds)
    return Pipeline([("in_double", first), *steps[count:]]) if steps[count:] else first


def _count_in_double(steps: Sequence[tuple[str, Any]]) -> int:
    count = 0
    for _, step in steps:
        if not (type(step) in _SCALERS or (isinstance(step, SimpleImputer) and _fills_numbers(step))):
            break
        count += 1
    return count


def _fills_numbers(imputer: SimpleImputer) -> bool:
    missing = imputer.missing_values
    return imputer.indicator_ is None and imputer.statistics_.dtype.kind == "f" and missing != missing


_SCALERS = (StandardScaler, MinMaxScaler, RobustScaler, MaxAbsScaler)


class ExactForestClassifier(RandomForestClassifier):  # type: ignore[misc]
    """A forest that the graph sums without rounding."""


class ExactForestRegressor(RandomForestRegressor):  # type: ignore[misc]
    """A forest whose missing values take their way in the graph."""


class ExactTreeClassifier(DecisionTreeClassifier):  # type: ignore[misc]
    """A tree whose missing values take their way in the graph."""


class ExactTreeRegressor(DecisionTreeRegressor):  # type: ignore[misc]
    """A tree whose missing values take their way in the graph."""


_EXACT = {
    DecisionTreeClassifier: ExactTreeClassifier,
    DecisionTreeRegressor: ExactTreeRegressor,
    ExtraTreeClassifier: ExactTreeClassifier,
    ExtraTreeRegressor: ExactTreeRegressor,
    ExtraTreesClassifier: ExactForestClassifier,
    ExtraTreesRegressor: ExactForestRegressor,
    RandomForestClassifier: ExactForestClassifier,
    RandomForestRegressor: ExactForestRegressor,
}


def with_exact_trees(model: Any) -> Any:
    """A copy with exact trees in place of scikit-learn's; None for a model without any."""
    copied = copy.deepcopy(model)
    found = [part for part in parts(copied) if type(part) in _EXACT and hasattr(part, "n_outputs_")]
    for part in found:
        part.__class__ = _EXACT[type(part)]
    return copied if found else None
