"""Parts that stand for others: estimators of which only `transform` counts, zeros that are missing, exact trees."""

import copy
from typing import Any, Self

from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.compose import ColumnTransformer
from sklearn.ensemble import ExtraTreesClassifier, ExtraTreesRegressor, RandomForestClassifier, RandomForestRegressor
from sklearn.tree import DecisionTreeClassifier, DecisionTreeRegressor, ExtraTreeClassifier, ExtraTreeRegressor

from batchserve.conversion.estimator import parts
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
        import numpy as np

        return np.where(x == 0, np.nan, x)


class Chosen(ColumnTransformer):  # type: ignore[misc]
    """A ColumnTransformer behind another step, which gets one matrix."""


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
