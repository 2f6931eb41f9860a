"""The promise of `convert`: the graph predicts like the estimator, or the user gets the reason why not."""

import hashlib
import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import onnx
import pandas as pd
import polars as pl
import pytest
from onnxruntime import InferenceSession
from selection import quick_first
from skl2onnx import to_onnx
from skl2onnx._parse import sklearn_parsers_map
from skl2onnx._supported_operators import sklearn_operator_name_map
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.calibration import CalibratedClassifierCV
from sklearn.cluster import DBSCAN, KMeans
from sklearn.compose import make_column_selector, make_column_transformer
from sklearn.datasets import load_iris
from sklearn.ensemble import (
    ExtraTreesRegressor,
    HistGradientBoostingClassifier,
    IsolationForest,
    RandomForestClassifier,
    VotingClassifier,
)
from sklearn.feature_extraction.text import CountVectorizer, TfidfVectorizer
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LinearRegression, LogisticRegression, Ridge, SGDClassifier
from sklearn.model_selection import FixedThresholdClassifier, GridSearchCV, TunedThresholdClassifierCV
from sklearn.multioutput import MultiOutputClassifier
from sklearn.neighbors import KNeighborsClassifier, KNeighborsRegressor
from sklearn.pipeline import FeatureUnion, make_pipeline
from sklearn.preprocessing import FunctionTransformer, OneHotEncoder, OrdinalEncoder, StandardScaler
from sklearn.svm import SVC
from sklearn.tree import DecisionTreeClassifier, DecisionTreeRegressor

from batchserve.conversion import Conversion, convert
from batchserve.conversion.parity import Answers, Parity, compare
from batchserve.conversion.served import Served
from batchserve.errors import ConversionFailed, ParityFailed
from batchserve.inference.outputs import ResultSchema

IRIS = load_iris(as_frame=True)
X, Y = IRIS.data.astype("float32"), IRIS.target
NAMES = ("sepal length (cm)", "sepal width (cm)", "petal length (cm)", "petal width (cm)")


def facts(conversion: Conversion) -> dict[str, Any]:
    """The `batchserve.*` metadata, without the prefix."""
    graph = onnx.load_model_from_string(conversion.onnx)
    return {prop.key.removeprefix("batchserve."): json.loads(prop.value) for prop in graph.metadata_props}


def inputs(conversion: Conversion) -> dict[str, tuple[int, list[int]]]:
    """Element type and shape of the graph's inputs; 0 is a free dimension."""
    graph = onnx.load_model_from_string(conversion.onnx).graph
    types = {tensor.name: tensor.type.tensor_type for tensor in graph.input}
    return {name: (t.elem_type, [d.dim_value for d in t.shape.dim]) for name, t in types.items()}


def houses(rows: int = 400) -> pd.DataFrame:
    """Mixed columns of real tables: a name with a blank, missing numbers, integers that are categories, booleans."""
    rng = np.random.default_rng(0)
    frame = pd.DataFrame(
        {
            "area": rng.normal(90, 20, rows).astype("float32"),
            "City Name": rng.choice(["Ulm", "Bonn", "Köln"], rows),
            "rooms": rng.integers(1, 6, rows),
            "zone": rng.integers(10_000_001, 10_000_004, rows),
            "garden": rng.random(rows) < 0.4,
            "sold": pd.Timestamp("2026-01-01"),
        }
    )
    frame.loc[::7, "area"] = np.nan
    return frame


def prices(frame: pd.DataFrame) -> Any:
    return np.where(frame["rooms"] + frame["garden"] * 2 > 3, "dear", "cheap")


def mixed_pipeline() -> Any:
    numbers = make_pipeline(SimpleImputer(), StandardScaler())
    names = OneHotEncoder(handle_unknown="ignore")
    columns = make_column_transformer((numbers, ["area", "rooms", "garden"]), (names, ["City Name", "zone"]))
    return make_pipeline(columns, LogisticRegression())


# --- columns and types -----------------------------------------------------------------------------------------------


def test_a_mixed_pipeline_gets_one_input_for_each_column_that_it_uses() -> None:
    frame = houses()
    conversion = convert(mixed_pipeline().fit(frame, prices(frame)), frame)
    assert conversion.report.passed
    assert conversion.report.rows == len(frame)  # the model imputes, so no record is left out
    assert [(c.name, c.dtype) for c in conversion.columns] == [
        ("area", "float32"),
        ("City Name", "string"),
        ("rooms", "float32"),
        ("zone", "int64"),  # a category: float32 cannot distinguish 10,000,001 from its neighbours at twice the size
        ("garden", "float32"),
    ]
    assert inputs(conversion).keys() == {"area", "City_Name", "rooms", "zone", "garden"}


def test_names_that_are_invalid_in_onnx_are_kept_in_the_metadata() -> None:
    frame = houses().rename(columns={"rooms": "label", "area": "straße ($)"})
    frame["City_Name"] = frame["City Name"]
    columns = make_column_transformer(
        (make_pipeline(SimpleImputer(), StandardScaler()), ["straße ($)", "label"]),
        (OneHotEncoder(), ["City Name", "City_Name"]),
    )
    model = make_pipeline(columns, LogisticRegression()).fit(frame, frame["label"] > 2)
    conversion = convert(model, frame)
    written = facts(conversion)["columns"]
    assert [column["name"] for column in written] == ["straße ($)", "City Name", "label", "City_Name"]
    assert [column["input"] for column in written] == list(inputs(conversion))


def test_a_matrix_keeps_the_names_of_its_columns() -> None:
    conversion = convert(LogisticRegression(max_iter=500).fit(X, Y), X)
    assert inputs(conversion) == {"input": (onnx.TensorProto.FLOAT, [0, 4])}
    assert facts(conversion)["columns"] == [
        {"name": name, "dtype": "float32", "input": "input", "nullable": False} for name in NAMES
    ]


def test_a_matrix_without_names_gets_none() -> None:
    conversion = convert(LogisticRegression(max_iter=500).fit(X.to_numpy(), Y), X.to_numpy())
    assert "columns" not in facts(conversion)
    assert [column.name for column in conversion.columns] == ["x0", "x1", "x2", "x3"]


def test_names_come_from_the_sample_when_the_model_has_none_and_from_the_model_when_the_sample_has_none() -> None:
    of_array = LogisticRegression(max_iter=500).fit(X.to_numpy(), Y)
    of_frame = LogisticRegression(max_iter=500).fit(X, Y)
    for conversion in (convert(of_array, X), convert(of_frame, X.to_numpy())):
        assert tuple(column["name"] for column in facts(conversion)["columns"]) == NAMES


def test_columns_that_the_model_does_not_use_are_dropped_and_the_order_is_the_models() -> None:
    model = LogisticRegression(max_iter=500).fit(X, Y)
    sample = pl.DataFrame({"species": Y.to_numpy()} | {name: X[name].to_numpy() for name in reversed(NAMES)})
    conversion = convert(model, sample)
    assert tuple(column.name for column in conversion.columns) == NAMES
    assert conversion.report.label_flips == 0


def test_a_column_selector_and_a_remainder_are_supported() -> None:
    frame = houses().drop(columns="sold")
    by_type = make_column_transformer(
        (OneHotEncoder(), make_column_selector(dtype_exclude=["number", "bool"])), remainder="passthrough"
    )
    model = make_pipeline(by_type, HistGradientBoostingClassifier(max_iter=5)).fit(frame, prices(frame))
    assert len(convert(model, frame).columns) == 5


def test_integers_and_booleans_and_floats_together_become_one_float_matrix() -> None:
    frame = houses()[["rooms", "garden", "area"]].fillna(0)
    conversion = convert(make_pipeline(StandardScaler(), LogisticRegression()).fit(frame, prices(frame)), frame)
    assert inputs(conversion) == {"input": (onnx.TensorProto.FLOAT, [0, 3])}


def test_a_matrix_of_texts_is_one_input() -> None:
    frame = pd.DataFrame({"a": ["x", "y", "z"] * 10, "b": ["u", "v"] * 15})
    model = make_pipeline(OrdinalEncoder(), DecisionTreeClassifier()).fit(frame, frame["a"] == "x")
    assert inputs(convert(model, frame)) == {"input": (onnx.TensorProto.STRING, [0, 2])}


def test_a_pandas_category_is_a_text() -> None:
    frame = houses().astype({"City Name": "category"})
    conversion = convert(mixed_pipeline().fit(frame, prices(frame)), frame)
    assert {column.name: column.dtype for column in conversion.columns}["City Name"] == "string"


@pytest.mark.parametrize(
    "vectorizer",
    [
        TfidfVectorizer(),
        CountVectorizer(ngram_range=(1, 2)),
        FeatureUnion([("words", TfidfVectorizer()), ("letters", CountVectorizer(analyzer="char"))]),
    ],
    ids=["tfidf", "count", "union"],
)
def test_a_text_pipeline_takes_its_column_out_of_the_sample(vectorizer: Any) -> None:
    frame = pd.DataFrame(
        {"text": ["Good film", "bad FILM", "good, good day", "awful bad"] * 20, "stars": [5, 1, 4, 2] * 20}
    )
    frame["seen"] = pd.Timestamp("2026-01-01")
    model = make_pipeline(vectorizer, LogisticRegression()).fit(frame["text"], frame["stars"] > 3)
    conversion = convert(model, frame)
    assert [column.name for column in conversion.columns] == ["text"]
    assert conversion.report.differences[0].max_relative < 1e-6
    graph = onnx.load_model_from_string(conversion.onnx).graph
    locales = [
        a.s for node in graph.node if node.op_type == "StringNormalizer" for a in node.attribute if a.name == "locale"
    ]
    assert set(locales) <= {b"C.UTF-8"}


@pytest.mark.parametrize(
    "words",
    [
        ["schön", "Köln", "größe", "ö"],
        ["привет", "мир", "Дом", "я"],
        ["你好", "世界", "我"],
        ["don't", "a.b", "x_y", "42 %"],
    ],
    ids=["German", "Russian", "Chinese", "signs"],
)
@pytest.mark.parametrize("pattern", [r"(?u)\b\w\w+\b", r"(?u)\b\w+\b"], ids=["default", "single letters"])
def test_words_of_any_script_are_found_and_paired_as_scikit_learn_does(words: list[str], pattern: str) -> None:
    random = np.random.default_rng(0)
    lines = [" ".join(random.choice(words, 5)) for _ in range(100)]
    vectorizer = TfidfVectorizer(ngram_range=(1, 2), token_pattern=pattern)
    model = make_pipeline(vectorizer, LogisticRegression()).fit(lines, [words[0] in line for line in lines])
    assert convert(model, lines).report.differences[0].max_relative < 1e-6


@pytest.mark.parametrize(
    "vectorizer",
    [
        TfidfVectorizer(stop_words="english", ngram_range=(1, 2)),
        CountVectorizer(stop_words=["cheap"], ngram_range=(2, 3), binary=True),
        TfidfVectorizer(stop_words="english", ngram_range=(1, 2), sublinear_tf=True),
        CountVectorizer(token_pattern=r"\S+"),  # noqa: S106 - no secret
    ],
)
def test_words_are_paired_across_stop_words_and_cut_at_every_blank(vectorizer: Any) -> None:
    rows = ["cheap flight rome", "hotel paris cheap", "best offer now", "rome paris flight"] * 10
    model = make_pipeline(vectorizer, LogisticRegression()).fit(rows, ["rome" in row for row in rows])
    asked = [
        "cheap the flight of rome", "CHEAP flight, rome", "the of", "", "hotel is in paris", "rome\u00a0flight paris",
        "rome cheap paris", "the rome the paris the",
    ]  # fmt: skip
    scored = Served(convert(model, rows).onnx).score(pl.DataFrame({"text": asked}))
    assert not scored.errors
    assert np.allclose(scored.outputs["probabilities"], model.predict_proba(asked), atol=1e-5)


def test_a_text_column_may_be_combined_with_numbers() -> None:
    frame = pd.DataFrame(
        {"text": ["Good film", "bad FILM", "fine day"] * 20, "words": [2, 2, 2] * 20, "likes": range(60)}
    )
    columns = make_column_transformer((TfidfVectorizer(), "text"), (StandardScaler(), ["words", "likes"]))
    model = make_pipeline(columns, LogisticRegression()).fit(frame, ["pos", "neg", "pos"] * 20)
    assert convert(model, frame).report.label_flips == 0


# --- missing values --------------------------------------------------------------------------------------------------


def test_records_that_the_model_itself_refuses_are_left_out_and_counted() -> None:
    sample = X.copy()
    sample.iloc[::10, 0] = np.nan
    report = convert(LogisticRegression(max_iter=500).fit(X, Y), sample).report
    assert report.rows == 135
    assert report.notes == ("15 of 150 records have missing values, which the model refuses: left out.",)


@pytest.mark.parametrize("missing", [None, np.nan])
def test_an_imputer_of_texts_takes_the_empty_text_for_a_missing_one(missing: Any) -> None:
    frame = houses()
    frame["City Name"] = frame["City Name"].astype(object)
    frame.loc[::5, "City Name"] = missing
    texts = make_pipeline(
        SimpleImputer(strategy="most_frequent", missing_values=missing), OneHotEncoder(handle_unknown="ignore")
    )
    model = make_pipeline(make_column_transformer((texts, ["City Name"])), DecisionTreeClassifier())
    conversion = convert(model.fit(frame, frame["City Name"].isna()), frame)
    assert conversion.report.rows == len(frame)
    assert conversion.report.label_flips == 0
    assert conversion.columns[0].nullable


def test_an_imputer_with_its_own_placeholder_text_keeps_it() -> None:
    frame = houses()
    frame.loc[::5, "City Name"] = "?"
    texts = make_pipeline(
        SimpleImputer(strategy="most_frequent", missing_values="?"), OneHotEncoder(handle_unknown="ignore")
    )
    model = make_pipeline(make_column_transformer((texts, ["City Name"])), DecisionTreeClassifier())
    conversion = convert(model.fit(frame, frame["City Name"] == "Ulm"), frame)
    assert conversion.report.label_flips == 0


@pytest.mark.parametrize("fill", [-1, 0.5, None])
@pytest.mark.parametrize("indicates", [False, True])
def test_a_constant_number_is_put_in_the_place_of_missing_ones(fill: float | None, indicates: bool) -> None:
    frame = X.astype("float64").mask(np.random.default_rng(0).random(X.shape) < 0.2)
    imputer = SimpleImputer(strategy="constant", fill_value=fill, add_indicator=indicates)
    report = convert(make_pipeline(imputer, LogisticRegression(max_iter=500)).fit(frame, Y), frame).report
    assert report.rows == len(frame)
    assert report.differences[0].max_relative < 1e-5


def test_the_most_frequent_truth_value_is_put_in_the_place_of_missing_ones() -> None:
    random = np.random.default_rng(0)
    truths = pd.Series(random.choice([True, False, np.nan], 200), dtype=object).replace({1.0: True, 0.0: False})
    frame = pd.DataFrame({"known": truths, "size": random.normal(size=200)})
    texts = make_pipeline(SimpleImputer(strategy="most_frequent"), OneHotEncoder(handle_unknown="ignore"))
    model = make_pipeline(
        make_column_transformer((texts, ["known"]), (StandardScaler(), ["size"])), LogisticRegression()
    )
    conversion = convert(model.fit(frame, (frame["known"] == True) ^ (frame["size"] > 1)), frame)  # noqa: E712
    assert conversion.report.label_flips == 0
    assert next(column for column in conversion.columns if column.name == "known").nullable


def test_an_encoder_with_missing_as_a_category_keeps_it() -> None:
    frame = houses()
    frame["City Name"] = frame["City Name"].astype(object)
    frame.loc[::5, "City Name"] = np.nan
    model = make_pipeline(make_column_transformer((OneHotEncoder(), ["City Name"])), DecisionTreeClassifier())
    conversion = convert(model.fit(frame, frame["City Name"].isna()), frame)
    assert conversion.report.label_flips == 0
    assert conversion.columns[0].nullable


def test_missing_texts_that_were_trained_as_a_category_are_scored_like_the_original() -> None:
    frame = houses()
    frame["City Name"] = frame["City Name"].astype(object)
    frame.loc[::5, "City Name"] = np.nan
    model = make_pipeline(
        make_column_transformer((OrdinalEncoder(), ["City Name"]), remainder="drop"),
        HistGradientBoostingClassifier(max_iter=5, min_samples_leaf=2),
    ).fit(frame, frame["City Name"].isna() | (frame["City Name"] == "Ulm"))
    conversion = convert(model, frame)
    assert conversion.report.rows == 400
    assert conversion.report.label_flips == 0
    assert conversion.report.notes == ()
    assert conversion.columns[0].nullable


# --- kinds of models -------------------------------------------------------------------------------------------------


def test_hist_gradient_boosting_routes_missing_numbers() -> None:
    sample = X.copy()
    sample.iloc[::10, 2] = np.nan
    conversion = convert(HistGradientBoostingClassifier(max_iter=5).fit(sample, Y), sample)
    assert conversion.report.rows == 150
    assert conversion.report.label_flips == 0


def test_lightgbm_converts_alone_and_in_a_pipeline_and_keeps_blanks_in_names() -> None:
    lightgbm = pytest.importorskip("lightgbm")
    alone = lightgbm.LGBMClassifier(n_estimators=5, verbose=-1).fit(X, IRIS.target_names[Y])
    conversion = convert(alone, X)
    assert tuple(column.name for column in conversion.columns) == NAMES
    assert facts(conversion)["labels"] == ["setosa", "versicolor", "virginica"]
    assert facts(conversion)["versions"]["lightgbm"] == lightgbm.__version__
    last = make_pipeline(StandardScaler(), lightgbm.LGBMRegressor(n_estimators=5, verbose=-1)).fit(X, Y)
    assert convert(last, X).task == "regression"


def test_xgboost_converts_alone_and_in_a_pipeline_and_is_left_as_it_was() -> None:
    xgboost = pytest.importorskip("xgboost")
    alone = xgboost.XGBClassifier(n_estimators=5).fit(X, Y)
    conversion = convert(alone, X)
    assert tuple(column.name for column in conversion.columns) == NAMES
    assert tuple(alone.get_booster().feature_names) == NAMES  # the converter needs f0, f1 ...: a copy has them
    last = make_pipeline(StandardScaler(), xgboost.XGBRegressor(n_estimators=5)).fit(X, Y)
    assert convert(last, X).report.passed


def test_a_multi_output_classifier_has_labels_for_each_target() -> None:
    texts = np.stack([IRIS.target_names[Y], np.where(Y > 1, "late", "early")], axis=1)
    conversion = convert(
        MultiOutputClassifier(LogisticRegression(max_iter=500)).fit(X, texts), X, targets=["species", "season"]
    )
    assert facts(conversion)["labels"] == [["setosa", "versicolor", "virginica"], ["early", "late"]]
    assert facts(conversion)["targets"] == ["species", "season"]
    assert len(conversion.report.differences) == 2


def test_a_forest_that_fills_up_its_probabilities_is_compared_in_each_target() -> None:
    numbers = np.stack([Y, Y % 2], axis=1)
    conversion = convert(RandomForestClassifier(n_estimators=5, random_state=0).fit(X, numbers), X)
    assert facts(conversion)["labels"] == [[0, 1, 2], [0, 1]]
    assert [difference.output for difference in conversion.report.differences] == ["probabilities_0", "probabilities_1"]
    assert conversion.report.label_flips == 0


def test_a_multi_output_regressor_is_compared_in_all_its_targets() -> None:
    conversion = convert(LinearRegression().fit(X, X.iloc[:, :2] * [1, 2]), X, targets=["one", "two"])
    assert facts(conversion)["targets"] == ["one", "two"]
    assert conversion.report.differences[0].max_relative < 1e-4


def test_a_wrong_number_of_target_names_is_refused() -> None:
    with pytest.raises(ConversionFailed, match="has 1 targets, and 2 names were given: 'a', 'b'"):
        convert(Ridge().fit(X, Y), X, targets=["a", "b"])


@pytest.mark.parametrize(
    ("model", "task", "method"),
    [
        (KMeans(3, n_init=1, random_state=0), "clustering", "transform"),
        (IsolationForest(n_estimators=10, random_state=0), "outliers", "decision_function"),
        (StandardScaler(), "transform", "transform"),
        (SVC(), "classification", "decision_function"),
        (Ridge(), "regression", "predict"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseEstimator) else None,
)
def test_the_task_says_what_the_numbers_mean(model: Any, task: str, method: str) -> None:
    conversion = convert(model.fit(X, Y), X)
    assert conversion.task == facts(conversion)["task"] == task
    assert [difference.method for difference in conversion.report.differences] == [method]


def test_a_search_converts_as_its_best_estimator() -> None:
    search = GridSearchCV(make_pipeline(StandardScaler(), SVC()), {"svc__C": [1, 5]}, cv=2).fit(X, Y)
    assert facts(convert(search, X))["labels"] == [0, 1, 2]


def test_a_voting_classifier_converts_and_is_left_as_it_was() -> None:
    parts = [("line", LogisticRegression(max_iter=500)), ("tree", DecisionTreeClassifier(max_depth=2))]
    model = VotingClassifier(parts, voting="soft").fit(X, Y)
    assert convert(model, X).report.label_flips == 0
    assert model.flatten_transform is True


@pytest.mark.parametrize("forest", [RandomForestClassifier(n_estimators=20, random_state=0), DecisionTreeClassifier()])
def test_trees_behind_a_scaler_split_as_they_did_when_all_is_float32(forest: Any) -> None:
    conversion = convert(make_pipeline(StandardScaler(), forest).fit(X, Y), X)
    assert conversion.report.label_flips == 0
    assert conversion.report.differences[0].max_relative < 1e-6


# --- the report ------------------------------------------------------------------------------------------------------


def test_scaling_takes_float64_where_rounding_would_decide() -> None:
    x = np.linspace(1, 1 + 1e-5, 400).reshape(-1, 1)
    model = make_pipeline(StandardScaler(), DecisionTreeClassifier()).fit(x, np.arange(400) % 2)
    conversion = convert(model, x)
    assert [column.dtype for column in conversion.columns] == ["float64"]
    assert conversion.report.label_flips == 0


UNSCALED = FunctionTransformer(np.abs)
"""Leaves the numbers as they are, and is computed in float32."""


def test_a_model_that_needs_float64_fails_the_parity_run() -> None:
    x = np.linspace(1, 1 + 1e-5, 400).reshape(-1, 1)
    model = make_pipeline(UNSCALED, StandardScaler(), DecisionTreeClassifier()).fit(x, np.arange(400) % 2)
    with pytest.raises(ParityFailed) as caught:
        convert(model, x)
    report = Parity.from_json(caught.value.extra["parity"])
    assert not report.passed
    assert report.label_flips > 100
    assert len(report.worst) > 0
    flip = report.worst[0]
    assert flip.output == "label"
    assert flip.expected != flip.got
    assert f"{report.label_flips} label flips in 400 records" in str(caught.value)


def test_a_converter_that_computes_something_else_is_not_excused_by_rounding() -> None:
    x = np.random.default_rng(0).normal(size=(200, 2)).astype("float32")
    model = LinearRegression().fit(x, x.sum(axis=1))
    model.predict = lambda given: np.asarray(given).sum(axis=1) + 1  # as its graph does not
    with pytest.raises(ParityFailed, match=r"rounding does not explain(.|\n)*update_registered_converter") as caught:
        convert(model, x)
    assert "float32" not in str(caught.value)


def test_rounding_is_not_excluded_where_trees_split_by_what_is_computed() -> None:
    x = np.random.default_rng(0).normal(size=(300, 1)) * 1e-6 + 1
    model = make_pipeline(UNSCALED, StandardScaler(), DecisionTreeRegressor()).fit(x, np.arange(300.0) % 2)
    with pytest.raises(ParityFailed, match="where the graph rounds that to float32") as caught:
        convert(model, x)
    assert "does not explain" not in str(caught.value)


def test_labels_that_differ_where_the_numbers_agree_are_not_put_down_to_rounding() -> None:
    model = LogisticRegression(max_iter=500).fit(X, Y)
    model.predict = lambda given: np.zeros(len(given), int)  # as its graph does not
    with pytest.raises(ParityFailed, match="The numbers agree and the labels do not") as caught:
        convert(model, X)
    assert "float32" not in str(caught.value)


def test_a_failed_parity_run_writes_no_file(tmp_path: Path) -> None:
    x = np.linspace(1, 1 + 1e-5, 400).reshape(-1, 1)
    model = make_pipeline(UNSCALED, StandardScaler(), DecisionTreeClassifier()).fit(x, np.arange(400) % 2)
    with pytest.raises(ParityFailed):
        convert(model, x, tmp_path / "model.onnx")
    assert list(tmp_path.iterdir()) == []


def test_a_larger_tolerance_accepts_larger_differences_but_no_more_flips() -> None:
    x = np.linspace(1, 1 + 1e-5, 400).reshape(-1, 1)
    model = make_pipeline(UNSCALED, StandardScaler(), LinearRegression()).fit(x, np.linspace(0, 1, 400))
    with pytest.raises(ParityFailed, match="DISAGREES"):
        convert(model, x)
    assert convert(model, x, tolerance=0.5).report.tolerance == 0.5


@pytest.mark.parametrize("threshold", quick_first([0.93, "tuned"], 1))
def test_a_threshold_decides_the_label_and_leaves_the_probabilities(threshold: str | float) -> None:
    inner = LogisticRegression()
    if threshold == "tuned":
        model = TunedThresholdClassifierCV(inner, scoring="precision", random_state=0).fit(X, Y == 1)
    else:
        model = FixedThresholdClassifier(inner, threshold=threshold).fit(X, Y == 1)
    plain = model.estimator_.predict_proba(X)[:, 1] > 0.5
    assert (plain != model.predict(X)).any(), "the threshold must matter, or nothing is tested"
    report = convert(model, X).report
    assert report.label_flips == 0
    assert [difference.method for difference in report.differences] == ["predict_proba"]


def test_a_forest_fitted_on_float64_splits_at_the_numbers_next_to_its_thresholds_as_it_did() -> None:
    random = np.random.default_rng(0)
    x = random.integers(0, 300, (2000, 3)) / 100
    model = RandomForestClassifier(41, random_state=0).fit(x[:1000], x[:1000].sum(axis=1) % 0.2 > 0.1)
    report = convert(model, x).report
    assert report.label_flips == 0
    assert report.differences[0].max_absolute < 1e-6


def test_the_first_of_two_equally_probable_classes_is_the_label_of_a_forest() -> None:
    random = np.random.default_rng(0)
    x = random.normal(size=(300, 2)).astype(np.float32)
    model = RandomForestClassifier(10, random_state=0).fit(x, random.random(300) < 0.5)
    chances = model.predict_proba(asked := random.normal(size=(2000, 2)).astype(np.float32))
    assert (chances == 0.5).all(axis=1).sum() > 20, "there must be ties, or nothing is tested"
    assert convert(model, asked).report.label_flips == 0


@pytest.mark.parametrize("kind", [RandomForestClassifier, ExtraTreesRegressor, DecisionTreeClassifier])
def test_trees_that_were_trained_with_missing_values_route_them_as_they_did(kind: Any) -> None:
    frame = X.astype("float64").mask(np.random.default_rng(0).random(X.shape) < 0.2)
    model = kind(random_state=0).fit(frame, Y)
    served = Served(convert(make_pipeline(FunctionTransformer(), model).fit(frame, Y), frame).onnx)
    asked = frame.assign(**{frame.columns[0]: np.nan})
    scored = served.score(pl.from_pandas(asked))
    assert not scored.errors
    expected = model.predict_proba(asked) if hasattr(model, "classes_") else model.predict(asked)
    given = list(scored.outputs.values())[-1]
    assert np.allclose(np.squeeze(given), expected, atol=1e-5)


def test_labels_that_are_truth_values_stay_so() -> None:
    conversion = convert(RandomForestClassifier(5, random_state=0).fit(X, Y == 1), X)
    graph = onnx.load_model_from_string(conversion.onnx)
    assert graph.graph.output[0].type.tensor_type.elem_type == onnx.TensorProto.BOOL
    assert facts(conversion)["labels"] == [False, True]


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda x: x - x.mean(axis=0), "it mixes its records"),
        (lambda x: x if x[0, 0] > 1 else -x, "it picks records, not columns"),
        (lambda x: np.sort(x, axis=1), "it uses np.sort"),
        (lambda x: np.zeros((len(x), 1)), "it counts its records"),
        (lambda x: np.asarray([[float(v) for v in row] for row in x]), "it goes over the records one by one"),
    ],
    ids=["mean", "branch", "sort", "count", "loop"],
)
def test_a_function_that_is_no_graph_is_refused_with_what_it_does(function: Any, reason: str) -> None:
    model = make_pipeline(FunctionTransformer(function), LogisticRegression(max_iter=500)).fit(X.to_numpy(), Y)
    with pytest.raises(ConversionFailed, match=f"cannot be written as a graph: {reason}"):
        convert(model, X.to_numpy())


@pytest.mark.parametrize("loss", ["log_loss", "modified_huber", "hinge"])
@pytest.mark.parametrize("classes", [["hi", "lo", "mid"], [False, True]])
@pytest.mark.parametrize("wrap", [lambda m: m, lambda m: CalibratedClassifierCV(m, cv=2)], ids=["alone", "calibrated"])
def test_the_scores_of_stochastic_gradient_descent_decide_its_label(loss: str, classes: list[Any], wrap: Any) -> None:
    random = np.random.default_rng(0)
    frames = [
        pd.DataFrame({"a": random.normal(size=n), "b": random.lognormal(2, 1.5, n).round(1)}) for n in (600, 3000)
    ]
    score = frames[0].a + np.log(frames[0].b) / 2 + random.normal(0, 0.3, 600)
    limits = [0.6, 1.6] if len(classes) == 3 else [1.0]
    model = wrap(SGDClassifier(loss=loss, random_state=0)).fit(frames[0], np.array(classes)[np.digitize(score, limits)])
    conversion = convert(model, frames[0])
    served = Served(conversion.onnx)
    answers = ResultSchema(served.signature).frame(served.score(pl.from_pandas(frames[1])).outputs)
    assert answers["prediction"].to_list() == model.predict(frames[1]).tolist()
    if hasattr(model, "predict_proba"):
        chances, expected = answers.select(pl.exclude("prediction")).to_numpy(), model.predict_proba(frames[1])
        assert np.quantile(np.abs(chances - expected), 0.99) < 1e-4


@pytest.mark.parametrize("loss", ["log_loss", "modified_huber"])
def test_stochastic_gradient_descent_behind_columns_that_no_class_is_near_to(loss: str) -> None:
    model = make_pipeline(
        make_column_transformer((StandardScaler(), list(X))), SGDClassifier(loss=loss, random_state=0)
    )
    model.fit(IRIS.data, IRIS.target_names[Y])
    model[-1].intercept_ -= 1000  # all probabilities are 0 before they are divided by their sum
    asked = pd.concat([IRIS.data, IRIS.data * 1000], ignore_index=True)
    assert (model.predict_proba(asked) == 1 / 3).all(axis=1).any(), "there must be such records, or nothing is tested"
    report = convert(model, asked).report
    assert report.label_flips == 0
    assert report.differences[0].max_absolute < 1e-4


def test_ties_between_neighbours_are_named() -> None:
    report = convert(KNeighborsClassifier().fit(X, Y), X).report
    assert any("KNeighborsClassifier" in note for note in report.notes)


def test_a_record_at_the_place_of_a_neighbour_has_the_answer_of_that_neighbour() -> None:
    x = np.random.default_rng(0).normal(size=(200, 4)) * [1, 10, 1000, 0.001]
    model = make_pipeline(StandardScaler(), KNeighborsRegressor(weights="distance")).fit(x, np.arange(200.0))
    conversion = convert(model, x)
    assert {column.dtype for column in conversion.columns} == {"float64"}
    (answers,) = InferenceSession(conversion.onnx).run(None, {"input": x})
    np.testing.assert_array_equal(answers[:, 0], np.arange(200.0))


def test_of_two_ways_that_agree_enough_the_one_that_agrees_on_every_record_is_taken() -> None:
    x = np.random.default_rng(0).normal(1000, 1, size=(2000, 1))
    x[1] = x[0] + 1e-5  # two classes, of which float32 makes one number before it is scaled
    model = make_pipeline(StandardScaler(), DecisionTreeClassifier()).fit(x, np.arange(2000) == 1)
    conversion = convert(model, x)
    assert (conversion.report.label_flips, conversion.report.is_exact) == (0, True)
    assert conversion.columns[0].dtype == "float64"


def test_neighbours_at_the_same_distance_are_named_where_they_decide() -> None:
    grid = np.stack(np.meshgrid(np.arange(8.0), np.arange(8.0)), axis=-1).reshape(-1, 2)
    model = KNeighborsRegressor(3, metric="chebyshev").fit(grid, np.arange(64.0) ** 2)
    with pytest.raises(ParityFailed, match="Neighbours at the same distance are chosen in an order"):
        convert(model, grid)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"metric": "canberra"}, r"KNeighborsClassifier\(metric='canberra'\) has no ONNX converter. Use 'euclidean'"),
        ({"weights": np.exp}, "weighs its neighbours by a function of its own"),
    ],
)
def test_neighbours_that_no_graph_finds_are_refused_with_a_way_out(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConversionFailed, match=reason):
        convert(KNeighborsClassifier(**options).fit(X, Y), X)


def test_weighted_neighbours_of_several_labels_are_refused_with_a_way_out() -> None:
    model = KNeighborsClassifier(weights="distance").fit(X, np.stack([Y, Y], axis=1))
    with pytest.raises(ConversionFailed, match="converts with one target"):
        convert(model, X)


def test_a_report_survives_json_and_the_error_that_carries_it_a_pickle() -> None:
    numbers = Answers(None, {"value": np.array([[1.0], [np.nan], [3.0]])})
    other = Answers(None, {"value": np.array([[1.0], [2.0], [3.5]])})
    report = compare(numbers, other, rows=np.arange(3), methods={"value": "predict"}, tolerance=0.1)
    assert not report.passed
    assert report.differences[0].max_absolute == np.inf
    assert [worst.row for worst in report.worst] == [1, 2]
    stored = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert Parity.from_json(stored).differences == report.differences
    error = pickle.loads(pickle.dumps(ParityFailed("no", parity=stored)))
    assert error.extra["parity"] == stored


@pytest.mark.parametrize(("flips", "passed"), [(1, True), (2, False)])
def test_one_label_in_a_thousand_may_differ_and_is_reported(flips: int, passed: bool) -> None:
    labels = np.zeros(1000, dtype=np.int64)
    other = labels.copy()
    other[500 : 500 + flips] = 1
    report = compare(Answers(labels, {}), Answers(other, {}), rows=np.arange(1000), methods={}, tolerance=1e-4)
    assert (report.label_flips, report.passed) == (flips, passed)
    assert report.worst[0].row == 500


def test_equal_infinities_and_missing_numbers_on_both_sides_do_not_differ() -> None:
    values = Answers(None, {"value": np.array([[np.inf, np.nan, -np.inf]])})
    report = compare(values, values, rows=np.arange(1), methods={"value": "predict"}, tolerance=0.0)
    assert report.passed
    assert report.differences[0].max_absolute == 0


def test_large_numbers_are_compared_relatively_and_small_ones_absolutely() -> None:
    expected = Answers(None, {"value": np.array([[1e6], [1e-6]])})
    got = Answers(None, {"value": np.array([[1e6 + 10], [2e-6]])})
    report = compare(expected, got, rows=np.arange(2), methods={"value": "predict"}, tolerance=1e-4)
    assert report.passed
    assert report.differences[0].max_relative == pytest.approx(1e-5)


def test_a_report_reads_as_sentences() -> None:
    report = convert(LogisticRegression(max_iter=500).fit(X, Y), X).report
    assert str(report).startswith("The graph agrees with the original: 0 label flips in 150 records.\nprobabilities")


# --- files -----------------------------------------------------------------------------------------------------------


def test_a_pickle_is_named_by_its_digest_and_a_csv_is_a_sample(tmp_path: Path) -> None:
    frame = houses()
    joblib.dump(mixed_pipeline().fit(frame, prices(frame)), tmp_path / "model.joblib")
    frame.to_csv(tmp_path / "sample.csv", index=False)
    conversion = convert(tmp_path / "model.joblib", tmp_path / "sample.csv", tmp_path / "model.onnx")
    digest = hashlib.sha256((tmp_path / "model.joblib").read_bytes()).hexdigest()
    assert facts(conversion)["training_digest"] == digest
    assert (tmp_path / "model.onnx").read_bytes() == conversion.onnx
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.joblib", "model.onnx", "sample.csv"]


def test_a_parquet_sample_gives_the_same_graph_as_the_frame(tmp_path: Path) -> None:
    pl.DataFrame({name: X[name].to_numpy() for name in NAMES}).write_parquet(tmp_path / "sample.parquet")
    model = LogisticRegression(max_iter=500).fit(X, Y)
    assert convert(model, tmp_path / "sample.parquet").onnx == convert(model, X).onnx


@pytest.mark.slow
def test_the_same_inputs_give_the_same_bytes_in_another_process(tmp_path: Path) -> None:
    frame = houses()
    joblib.dump(mixed_pipeline().fit(frame, prices(frame)), tmp_path / "model.joblib")
    frame.to_parquet(tmp_path / "sample.parquet")
    here = convert(tmp_path / "model.joblib", tmp_path / "sample.parquet").onnx
    program = "import sys; from batchserve.conversion import convert; convert(*sys.argv[1:])"
    files = [str(tmp_path / name) for name in ("model.joblib", "sample.parquet", "model.onnx")]
    subprocess.run([sys.executable, "-c", program, *files], check=True, timeout=60)
    assert (tmp_path / "model.onnx").read_bytes() == here


def test_the_graph_is_one_that_the_server_loads() -> None:
    graph = onnx.load_model_from_string(convert(LogisticRegression(max_iter=500).fit(X, Y), X).onnx)
    assert graph.ir_version <= 10
    domains = [opset.domain for opset in graph.opset_import]
    assert len(set(domains)) == len(domains)
    assert all(opset.version <= 22 for opset in graph.opset_import)
    assert not any(node.op_type == "ZipMap" for node in graph.graph.node)


def test_a_sample_is_embedded_with_complete_records_first() -> None:
    frame = houses()
    conversion = convert(mixed_pipeline().fit(frame, prices(frame)), frame)
    sample = facts(conversion)["sample"]
    assert len(sample) == 8
    assert sample[0].keys() == {"area", "City Name", "rooms", "zone", "garden"}
    assert all(value is not None for record in sample for value in record.values())
    assert isinstance(sample[0]["zone"], int)
    assert isinstance(sample[0]["garden"], bool)


def test_a_sample_can_be_left_out_of_the_graph() -> None:
    conversion = convert(LogisticRegression(max_iter=500).fit(X, Y), X, embed_sample=False)
    assert "sample" not in facts(conversion)


# --- refusals --------------------------------------------------------------------------------------------------------


class Doubler(TransformerMixin, BaseEstimator):  # type: ignore[misc]
    def fit(self, _x: Any, _y: Any = None) -> "Doubler":
        self.fitted_ = True
        return self

    def transform(self, x: Any) -> Any:
        return x * 2


@pytest.mark.parametrize(
    ("model", "step"),
    [
        (Doubler(), "Doubler"),
        (make_pipeline(Doubler(), LogisticRegression(max_iter=500)), "Doubler"),
    ],
    ids=["model", "step"],
)
def test_a_step_without_a_converter_is_named_with_what_to_do(model: Any, step: str) -> None:
    with pytest.raises(ConversionFailed, match=rf"{step} has no ONNX converter.*update_registered_converter\({step}"):
        convert(model.fit(X, Y), X)


def test_a_sample_that_lacks_columns_is_refused_by_name() -> None:
    model = LogisticRegression(max_iter=500).fit(X, Y)
    with pytest.raises(ConversionFailed, match=r"lacks columns .*: 'petal width \(cm\)'"):
        convert(model, X.iloc[:, :3])


def test_a_sample_of_another_width_is_refused_when_nothing_has_names() -> None:
    model = LogisticRegression(max_iter=500).fit(X.to_numpy(), Y)
    with pytest.raises(ConversionFailed, match="takes 4 columns and does not know their names; the sample has 5"):
        convert(model, X.assign(species=Y))


def test_two_columns_of_text_are_one_too_many_for_a_text_model() -> None:
    frame = pd.DataFrame({"title": ["good", "bad"] * 10, "text": ["fine", "poor"] * 10})
    model = make_pipeline(TfidfVectorizer(), LogisticRegression()).fit(frame["text"], [1, 0] * 10)
    with pytest.raises(ConversionFailed, match="takes one column of texts, and the sample has 2: 'title', 'text'"):
        convert(model, frame)


def test_a_date_is_not_a_number() -> None:
    frame = houses()
    columns = make_column_transformer((OneHotEncoder(), ["sold"]))
    model = make_pipeline(columns, LogisticRegression()).fit(frame, prices(frame))
    with pytest.raises(ConversionFailed, match="Column 'sold' holds datetime64 values"):
        convert(model, frame)


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        ({"weights": [1, 2]}, "dict is not an estimator"),
        (DBSCAN().fit(X), "DBSCAN is not an estimator that can `predict` or `transform`"),
        (LogisticRegression(), "NotFittedError"),
    ],
    ids=["dict", "transductive", "unfitted"],
)
def test_an_object_that_cannot_predict_is_refused(model: Any, reason: str) -> None:
    with pytest.raises(ConversionFailed, match=reason):
        convert(model, X)


def test_an_empty_sample_and_duplicate_columns_are_refused() -> None:
    model = LogisticRegression(max_iter=500).fit(X, Y)
    with pytest.raises(ConversionFailed, match="sample is empty"):
        convert(model, X.head(0))
    with pytest.raises(ConversionFailed, match="columns of the same name: 'petal width"):
        convert(model, pd.concat([X, X.iloc[:, 3:]], axis=1))


def test_invalid_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "model.joblib").write_bytes(b"no pickle")
    (tmp_path / "sample.xlsx").write_bytes(b"PK")
    model = LogisticRegression(max_iter=500).fit(X, Y)
    with pytest.raises(ConversionFailed, match="could not be unpickled"):
        convert(tmp_path / "model.joblib", X)
    with pytest.raises(ConversionFailed, match="There is no file"):
        convert(tmp_path / "other.joblib", X)
    with pytest.raises(ConversionFailed, match=r"none of '\.csv'"):
        convert(model, tmp_path / "sample.xlsx")
    with pytest.raises(ConversionFailed, match="could not be read"):
        convert(model, tmp_path / "absent.csv")


def test_what_skl2onnx_knows_is_left_as_it_was() -> None:
    before = dict(sklearn_operator_name_map), dict(sklearn_parsers_map)
    estimator = MultiOutputClassifier(LogisticRegression(max_iter=500)).fit(X, np.c_[Y, Y % 2])
    convert(estimator, X)
    assert (sklearn_operator_name_map, sklearn_parsers_map) == before
    without_maps = {id(estimator): {"zipmap": False}}
    own = to_onnx(estimator, X.to_numpy()[:1], options=without_maps, target_opset={"": 17, "ai.onnx.ml": 3})
    assert own.graph.output
