"""Parts that stand for others: estimators of which only `transform` counts, zeros that are missing, steps in double
precision, exact trees."""

import copy
import itertools
from collections.abc import Iterator, Sequence
from typing import Any, Self

import numpy as np
from sklearn.base import BaseEstimator, RegressorMixin, TransformerMixin
from sklearn.compose import ColumnTransformer
from sklearn.decomposition import PCA, TruncatedSVD
from sklearn.ensemble import ExtraTreesClassifier, ExtraTreesRegressor, RandomForestClassifier, RandomForestRegressor
from sklearn.feature_selection import SelectorMixin
from sklearn.impute import SimpleImputer
from sklearn.pipeline import FeatureUnion, Pipeline
from sklearn.preprocessing import (
    FunctionTransformer,
    MaxAbsScaler,
    MinMaxScaler,
    OneHotEncoder,
    OrdinalEncoder,
    PolynomialFeatures,
    RobustScaler,
    StandardScaler,
)
from sklearn.tree import DecisionTreeClassifier, DecisionTreeRegressor, ExtraTreeClassifier, ExtraTreeRegressor

from batchserve.conversion.estimator import fills_numbers, finds_neighbours, has_trees, last_step, parts, selected
from batchserve.conversion.sample import Array, Rounds


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

    def get_feature_names_out(self) -> Array:
        """As many as there are columns, where `transform` does not take an array without names."""
        return np.asarray(self.steps[-1].get_feature_names_out())


def scales_before_trees(model: Any) -> bool:
    """Whether trees split by numbers that are computed first, and `with_double` knows how.

    What lies exactly between two numbers of the training is common where these are whole, or have few digits, and on
    which side of a split it falls is then a matter of the last bit of float64.
    """
    if not has_trees(model) or (wide := with_double(model, rounds=lambda _: False)) is None:
        return False
    return any(type(step) in _ARITHMETIC for part in parts(wide) if isinstance(part, InDouble) for step in parts(part))


def with_double(model: Any, *, rounds: Rounds) -> Any:
    """A copy whose first steps compute in float64, as scikit-learn does; None where these are no arithmetic."""
    if finds_neighbours(model):
        return model
    if not isinstance(model, Pipeline):
        return _parts_in_double(model, rounds)
    copied = copy.copy(model)  # it shares the steps that stay
    steps = copied.steps = list(_flat(model))
    title, head = steps[0] if steps else ("", None)
    count = _count_in_double(steps)
    if isinstance(head, FeatureUnion) and not count:
        copied.steps[0] = (title, _union_in_double(head, model.n_features_in_, rounds(None)))
    elif (
        isinstance(head, ColumnTransformer)
        and type(head) is not Chosen
        and hasattr(head, "transformers_")
        and count < 2
    ):
        copied.steps[0] = (title, _columns_in_double(head, rounds))
    elif count:
        first = [step for _, step in steps[:count]]
        stays = any(finds_neighbours(step) for _, step in steps[count : count + 1])
        copied.steps[:count] = [("in_double", InDouble(first, first[0].n_features_in_, rounds(None), stays))]
    else:
        return None
    return copied


def _flat(pipeline: Pipeline) -> Iterator[tuple[str, Any]]:
    """Its steps, with those of pipelines among them."""
    for name, step in pipeline.steps:
        if isinstance(step, Pipeline):
            yield from ((f"{name}_{inner}", part) for inner, part in _flat(step))
        elif step not in (None, "passthrough"):
            yield name, step


def _parts_in_double(model: Any, rounds: Rounds) -> Any:
    """A copy of an estimator made of others that all read what it reads, where any of these has such first steps."""
    copied, found = copy.copy(model), False

    def in_double(part: Any) -> Any:
        nonlocal found
        if (wide := with_double(part, rounds=rounds)) is not None:
            found = True
            return wide
        return Pipeline([("in_double", InDouble([], part.n_features_in_, rounds(None))), ("part", part)])

    kind = type(model).__name__
    if kind in _OF_SEVERAL and _all_read_all(model):
        copied.estimators_ = [in_double(part) for part in model.estimators_]
    elif kind in _OF_ONE:
        setattr(copied, _OF_ONE[kind], in_double(getattr(model, _OF_ONE[kind])))
    elif kind == "CalibratedClassifierCV":
        copied.calibrated_classifiers_ = [copy.copy(one) for one in model.calibrated_classifiers_]
        for one in copied.calibrated_classifiers_:
            one.estimator = in_double(one.estimator)
    return copied if found else None


_OF_SEVERAL = {
    "BaggingClassifier", "BaggingRegressor", "MultiOutputClassifier", "MultiOutputRegressor", "OneVsRestClassifier",
    "StackingClassifier", "StackingRegressor", "VotingClassifier", "VotingRegressor",
}  # fmt: skip
_OF_ONE = {
    "FixedThresholdClassifier": "estimator_",
    "TransformedTargetRegressor": "regressor_",
    "TunedThresholdClassifierCV": "estimator_",
}


def _all_read_all(model: Any) -> bool:
    """Whether each of the estimators gets all columns, and says one thing of each record."""
    everything = np.arange(model.n_features_in_)
    return (
        all(hasattr(part, "n_features_in_") for part in model.estimators_)  # not of a class that all records have
        and all(np.array_equal(chosen, everything) for chosen in getattr(model, "estimators_features_", ()))
        and not getattr(model, "multilabel_", False)
    )


def has_double(model: Any) -> bool:
    """Whether `with_double` has made it."""
    return any(isinstance(part, InDouble) for part in parts(model))


def _columns_in_double(head: ColumnTransformer, rounds: Rounds) -> ColumnTransformer:
    names = list(getattr(head, "feature_names_in_", range(head.n_features_in_)))
    copied = copy.copy(head)
    copied.transformers_ = []
    for name, step, chosen in head.transformers_:
        if not isinstance(chosen, str):  # that is one column of texts
            own = selected(chosen, names)
            step = _in_double(step, len(own), rounds(own))
        copied.transformers_.append((name, step, chosen))
    return copied


def _union_in_double(head: FeatureUnion, width: int, rounds: bool) -> FeatureUnion:
    copied = copy.copy(head)
    copied.transformer_list = [(name, _in_double(step, width, rounds)) for name, step in head.transformer_list]
    return copied


def _in_double(step: Any, width: int, rounds: bool) -> Any:
    """A part of a ColumnTransformer, or of a FeatureUnion: what it does to numbers, as far as that is arithmetic, in
    float64."""
    if isinstance(step, str):
        return InDouble([], width, rounds) if step == "passthrough" else step
    if any(isinstance(part, OneHotEncoder | OrdinalEncoder) for part in parts(step)):
        return step
    steps = step.steps if isinstance(step, Pipeline) else [("step", step)]
    if isinstance(steps[0][1], SimpleImputer) and not fills_numbers(steps[0][1]):
        return step
    count = _count_in_double(steps)
    first = InDouble([item for _, item in steps[:count]], width, rounds)
    return Pipeline([("in_double", first), *steps[count:]]) if steps[count:] else first


def _count_in_double(steps: Sequence[tuple[str, Any]]) -> int:
    return sum(1 for _ in itertools.takewhile(_is_arithmetic, (step for _, step in steps)))


def _is_arithmetic(step: Any) -> bool:
    """Whether a step, with all that it is made of, is computed of numbers alone, in a way that is known here."""
    kind = type(step)
    if kind is Pipeline:
        return all(_is_arithmetic(part) for _, part in step.steps)
    if kind is FeatureUnion:
        return not step.transformer_weights and all(_is_arithmetic(part) for _, part in step.transformer_list)
    if kind in (ColumnTransformer, Chosen):
        made = [(part, chosen) for _, part, chosen in getattr(step, "transformers_", [("", "drop", "")])]
        plain = not step.transformer_weights
        return plain and all(_is_arithmetic(part) and not isinstance(chosen, str) for part, chosen in made)
    if kind is SimpleImputer:
        return fills_numbers(step)
    passes = step == "passthrough" if isinstance(step, str) else kind is FunctionTransformer and step.func is None
    return passes or kind in _ARITHMETIC or isinstance(step, SelectorMixin)


_ARITHMETIC = (StandardScaler, MinMaxScaler, RobustScaler, MaxAbsScaler, PolynomialFeatures, PCA, TruncatedSVD)


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


class LightGBMScores(RegressorMixin, BaseEstimator):  # type: ignore[misc]
    """What the trees of a classifier of LightGBM sum up to, before it is a probability."""

    def __init__(self, original: Any) -> None:
        self.original, self.n_features_in_ = original, original.n_features_in_

    def fit(self, x: Any, y: Any = None) -> Self:  # noqa: ARG002 - scikit-learn's signature
        return self

    def predict(self, x: Any) -> Array:
        return np.asarray(self.original.booster_.predict(x, raw_score=True))


def with_scores(model: Any) -> Any:
    """A copy that answers with the scores of its last step, where that is a classifier of LightGBM; else None."""
    last = last_step(model)
    if type(last).__name__ != "LGBMClassifier":
        return None
    if not isinstance(model, Pipeline):
        return LightGBMScores(last)
    copied = copy.copy(model)
    copied.steps = [*list(_flat(model))[:-1], ("scores", LightGBMScores(last))]
    return copied


def with_exact_trees(model: Any) -> Any:
    """A copy with exact trees in place of scikit-learn's; None for a model without any."""
    copied = copy.deepcopy(model)
    found = [part for part in parts(copied) if type(part) in _EXACT and hasattr(part, "n_outputs_")]
    for part in found:
        part.__class__ = _EXACT[type(part)]
    return copied if found else None
