"""Steps that stand in a pipeline for others: estimators of which only `transform` counts, zeros that are missing."""

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


class ZerosMissing(TransformerMixin, BaseEstimator):  # type: ignore[misc]
    """What XGBoost makes of a sparse matrix: a zero that is not stored is missing."""

    def __init__(self, n_features_in_: int) -> None:
        self.n_features_in_ = n_features_in_

    def fit(self, x: Any, y: Any = None) -> Self:  # noqa: ARG002 - scikit-learn's signature
        return self

    def transform(self, x: Any) -> Array:
        import numpy as np

        return np.where(x == 0, np.nan, x)
