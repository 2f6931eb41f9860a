"""Estimators that transform where they stand within a pipeline, and would predict at its end."""

from typing import Any, Self

from sklearn.base import BaseEstimator, TransformerMixin

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
