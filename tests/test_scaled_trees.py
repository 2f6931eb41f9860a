"""Trees split at values of the training data: a value that is rounded before it is scaled goes another way. So what is
in front of them is computed in float64, as by scikit-learn, wherever in a model they are.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import polars as pl
import pytest
from selection import quick_of
from sklearn.calibration import CalibratedClassifierCV
from sklearn.compose import TransformedTargetRegressor, make_column_transformer
from sklearn.datasets import load_iris
from sklearn.decomposition import PCA
from sklearn.ensemble import (
    AdaBoostClassifier,
    BaggingClassifier,
    BaggingRegressor,
    ExtraTreesClassifier,
    GradientBoostingClassifier,
    HistGradientBoostingClassifier,
    RandomForestClassifier,
    RandomForestRegressor,
    StackingClassifier,
    VotingClassifier,
    VotingRegressor,
)
from sklearn.feature_selection import SelectKBest
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LogisticRegression, Ridge, RidgeClassifier
from sklearn.multiclass import OneVsRestClassifier
from sklearn.multioutput import MultiOutputRegressor
from sklearn.pipeline import make_pipeline, make_union
from sklearn.preprocessing import MaxAbsScaler, MinMaxScaler, PolynomialFeatures, RobustScaler, StandardScaler
from sklearn.tree import DecisionTreeClassifier, DecisionTreeRegressor

from batchserve.conversion import Conversion, convert
from batchserve.conversion.served import Served
from batchserve.inference.outputs import ResultSchema

IRIS = load_iris(as_frame=True)
X, Y = IRIS.data, IRIS.target


def scaled(model: Any) -> Any:
    return make_pipeline(StandardScaler(), model)


def forest() -> Any:
    return RandomForestClassifier(n_estimators=10, random_state=0)


def numbers() -> Any:
    return RandomForestRegressor(n_estimators=10, random_state=0)


def several() -> list[tuple[str, Any]]:
    return [("forest", scaled(forest())), ("line", scaled(LogisticRegression())), ("tree", DecisionTreeClassifier())]


MODELS = {
    "votes of probabilities": lambda: VotingClassifier(several(), voting="soft"),
    "votes of labels": lambda: VotingClassifier(several()),
    "a stack": lambda: StackingClassifier(several(), cv=2),
    "calibrated": lambda: CalibratedClassifierCV(scaled(forest()), cv=2),
    "a bag of trees": lambda: BaggingClassifier(scaled(DecisionTreeClassifier()), random_state=0),
    "a bag of trees of which some know two classes": lambda: BaggingClassifier(
        scaled(DecisionTreeClassifier()), max_samples=4, random_state=0
    ),
    "a bag of lines": lambda: BaggingClassifier(scaled(RidgeClassifier()), random_state=0),
    "one against the rest": lambda: OneVsRestClassifier(scaled(forest())),
    "one against the rest by its decision": lambda: OneVsRestClassifier(
        scaled(GradientBoostingClassifier(n_estimators=5, random_state=0))
    ),
    "votes of numbers": lambda: VotingRegressor([("forest", scaled(numbers())), ("line", Ridge())]),
    "a bag of numbers": lambda: BaggingRegressor(scaled(DecisionTreeRegressor()), random_state=0),
    "a log of the target": lambda: TransformedTargetRegressor(scaled(numbers()), func=np.log1p, inverse_func=np.expm1),
    "behind a selection": lambda: make_pipeline(SelectKBest(k=3), scaled(forest())),
    "of products": lambda: make_pipeline(PolynomialFeatures(3), scaled(forest())),
    "of interactions": lambda: make_pipeline(PolynomialFeatures(2, interaction_only=True), forest()),
    "of a union": lambda: make_pipeline(make_union(StandardScaler(), PCA(2)), forest()),
}


@pytest.mark.parametrize("name", quick_of(MODELS, ["votes of probabilities", "of products"]))
def test_trees_behind_a_scaler_answer_equally_wherever_they_are(name: str) -> None:
    conversion = convert(MODELS[name]().fit(X, Y), X)
    assert conversion.report.label_flips == 0
    assert all(difference.max_relative < 1e-4 for difference in conversion.report.differences)


@pytest.mark.slow
@pytest.mark.parametrize("inner", [forest(), GradientBoostingClassifier(n_estimators=5, random_state=0)])
def test_one_class_against_another_is_told_by_its_threshold(inner: Any) -> None:
    few = Y < 2
    conversion = convert(OneVsRestClassifier(scaled(inner)).fit(X[few], IRIS.target_names[Y[few]]), X[few])
    assert conversion.report.label_flips == 0


@pytest.mark.slow
def test_a_number_for_each_target_of_scaled_trees() -> None:
    model = MultiOutputRegressor(scaled(DecisionTreeRegressor(max_depth=6, random_state=0)))
    conversion = convert(model.fit(X, X.iloc[:, :2] * [1, -2]), X, targets=["one", "two"])
    assert conversion.report.differences[0].max_relative < 1e-4


@pytest.mark.parametrize(
    "first",
    [
        PCA(1, whiten=True),
        make_pipeline(SelectKBest(k=1), StandardScaler()),
        make_pipeline(PolynomialFeatures(2), StandardScaler()),
        make_union(StandardScaler(), MinMaxScaler()),
    ],
    ids=["components", "a selection", "products", "a union"],
)
def test_what_is_in_front_of_trees_takes_float64_where_rounding_would_decide(first: Any) -> None:
    numbers = np.linspace(1, 1 + 1e-5, 400)
    x, y = np.column_stack([numbers, 3 * numbers]), np.arange(400) % 2
    conversion = convert(make_pipeline(first, DecisionTreeClassifier(random_state=0)).fit(x, y), x)
    assert {column.dtype for column in conversion.columns} == {"float64"}
    assert conversion.report.label_flips == 0


def whole(records: int, seed: int) -> pd.DataFrame:
    random = np.random.default_rng(seed)
    columns = {"age": random.integers(18, 90, records), "income": random.integers(200, 3000, records) * 10}
    return pd.DataFrame(columns).astype("float64")


SAMPLE, NEW = whole(300, 0), whole(3000, 1)
THIRDS = np.digitize(SAMPLE.age / 90 + SAMPLE.income / 30000, [0.9, 1.3])


def wrong(model: Any, conversion: Conversion, asked: pd.DataFrame) -> int:
    """For how many records a server answers otherwise than the model."""
    served = Served(conversion.onnx)
    frame = ResultSchema(served.signature).frame(served.score(pl.from_pandas(asked)).outputs)
    chances = frame.select(pl.exclude("prediction")).to_numpy()
    differ = (np.abs(chances - model.predict_proba(asked)) > 1e-4).any(axis=1)
    return int((differ | (frame["prediction"].to_numpy() != model.predict(asked))).sum())


def tree() -> Any:
    return DecisionTreeClassifier(max_depth=5, random_state=0)


def of_each(numbers: Any, more: Any) -> Any:
    return make_column_transformer((numbers, ["age"]), (more, ["income"]))


WHOLE = {
    "a tree": lambda: scaled(tree()),
    "a forest": lambda: scaled(forest()),
    "extra trees": lambda: scaled(ExtraTreesClassifier(10, random_state=0)),
    "gradient boosting": lambda: scaled(GradientBoostingClassifier(n_estimators=5, random_state=0)),
    "histogram boosting": lambda: scaled(HistGradientBoostingClassifier(max_iter=5)),
    "adaptive boosting": lambda: scaled(AdaBoostClassifier(tree(), n_estimators=5, random_state=0)),
    "a bag": lambda: scaled(BaggingClassifier(tree(), random_state=0)),
    "between limits": lambda: make_pipeline(MinMaxScaler(), tree()),
    "by quartiles": lambda: make_pipeline(RobustScaler(), tree()),
    "by the largest": lambda: make_pipeline(MaxAbsScaler(), forest()),
    "filled in": lambda: make_pipeline(SimpleImputer(), scaled(tree())),
    "each column otherwise": lambda: make_pipeline(of_each(StandardScaler(), MinMaxScaler()), tree()),
    "scaled behind the columns": lambda: make_pipeline(of_each(SimpleImputer(), "passthrough"), scaled(tree())),
    "a union of scalers": lambda: make_pipeline(
        make_union(StandardScaler(), MinMaxScaler()), AdaBoostClassifier(tree(), n_estimators=5, random_state=0)
    ),
    "a union within columns": lambda: make_pipeline(
        of_each(make_union(StandardScaler(), PCA(1)), MinMaxScaler()), tree()
    ),
    "votes": lambda: VotingClassifier([("one", scaled(tree())), ("two", tree())], voting="soft"),
    "a stack": lambda: StackingClassifier([("one", scaled(tree())), ("two", scaled(LogisticRegression()))], cv=2),
}


@pytest.mark.parametrize("name", quick_of(WHOLE, ["a tree", "each column otherwise", "scaled behind the columns"]))
def test_records_on_the_middle_of_two_of_the_training_go_the_way_they_went(name: str) -> None:
    model = WHOLE[name]().fit(SAMPLE, THIRDS)
    assert wrong(model, convert(model, SAMPLE), NEW) == 0


@pytest.mark.slow
@pytest.mark.parametrize("package", ["lightgbm", "xgboost"])
def test_records_on_the_middle_of_two_go_the_way_they_went_in_boosters(package: str) -> None:
    made = pytest.importorskip(package)
    booster = made.LGBMClassifier(n_estimators=9, verbose=-1) if package == "lightgbm" else made.XGBClassifier()
    model = scaled(booster).fit(SAMPLE, THIRDS)
    assert wrong(model, convert(model, SAMPLE), NEW) == 0


@pytest.mark.parametrize("kind", ["float32", "float64"])
def test_what_is_scaled_before_trees_is_computed_in_the_type_of_the_training(kind: Any) -> None:
    model = scaled(tree()).fit(SAMPLE.astype(kind), THIRDS)
    conversion = convert(model, SAMPLE.astype(kind))
    assert {column.dtype for column in conversion.columns} == {kind}
    assert wrong(model, conversion, NEW.astype(kind)) == 0


def test_a_constant_before_scaled_trees_is_put_in_in_float64() -> None:
    some = [frame.mask(np.random.default_rng(0).random(frame.shape) < 0.1) for frame in (SAMPLE, NEW)]
    model = make_pipeline(SimpleImputer(strategy="constant", fill_value=-1), scaled(tree())).fit(some[0], THIRDS)
    assert wrong(model, convert(model, some[0]), some[1]) == 0


@pytest.mark.parametrize("strategy", ["median", "constant"])
def test_which_values_were_missing_is_told_to_scaled_trees(strategy: str) -> None:
    some = [frame.mask(np.random.default_rng(0).random(frame.shape) < 0.1) for frame in (SAMPLE, NEW)]
    filled = make_pipeline(SimpleImputer(strategy=strategy, add_indicator=True), StandardScaler())
    for preparation in (filled, of_each(filled, "passthrough")):
        model = make_pipeline(preparation, tree()).fit(some[0], THIRDS + 4 * some[0].age.isna())
        assert wrong(model, convert(model, some[0]), some[1]) == 0


def test_trees_of_columns_as_they_are_take_float32() -> None:
    model = make_pipeline(SimpleImputer(), tree()).fit(SAMPLE, THIRDS)
    assert {column.dtype for column in convert(model, SAMPLE).columns} == {"float32"}


@pytest.mark.slow
@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("method", ["sigmoid", "isotonic"])
@pytest.mark.parametrize("wrap", [scaled, lambda model: model], ids=["scaled", "alone"])
def test_lightgbm_is_calibrated_by_its_scores(classes: int, method: str, wrap: Callable[[Any], Any]) -> None:
    lightgbm = pytest.importorskip("lightgbm")
    some = classes > Y
    model = CalibratedClassifierCV(wrap(lightgbm.LGBMClassifier(n_estimators=5, verbose=-1)), method=method, cv=2)
    assert convert(model.fit(X[some], Y[some]), X[some]).report.passed
