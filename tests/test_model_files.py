"""Trained models as files and folders, converters of one's own, and graphs one behind the other."""

import json
import pickle
from functools import partial
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import onnx
import pandas as pd
import pytest
from commands import in_a_process, in_this_process
from field.cases import BOOSTED
from field.data import categories, load
from field.scored import as_table, score_as_the_server
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from batchserve.conversion import chain, convert
from batchserve.conversion.served import Served, as_polars
from batchserve.errors import ConversionFailed
from batchserve.inference.session import open_session

X, Y, _ = load("breast_cancer")


def assert_as(path: Path, frame: pd.DataFrame, numbers: Any) -> None:
    """What is converted from the path gives these numbers in its last column."""
    conversion = convert(path, frame)
    result = score_as_the_server(conversion.onnx, as_table(frame))
    assert np.allclose(result.to_series(result.width - 1).to_numpy(), np.asarray(numbers), atol=1e-4, rtol=1e-4)


def test_a_text_file_of_lightgbm_is_a_model(tmp_path: Path) -> None:
    pytest.importorskip("lightgbm")
    model, frame = BOOSTED["lightgbm.Booster, binary"]()
    model.save_model(tmp_path / "model.txt")
    assert_as(tmp_path / "model.txt", frame, model.predict(frame))


def test_a_text_file_of_lightgbm_knows_its_categories_and_a_sample_of_texts_will_do(tmp_path: Path) -> None:
    lightgbm = pytest.importorskip("lightgbm")
    frame, price = categories()
    frame = frame.drop(columns="plan")
    model = lightgbm.LGBMRegressor(n_estimators=10, min_data_per_group=5, verbose=-1).fit(frame, price)
    model.booster_.save_model(tmp_path / "model.txt")
    plain = frame.assign(city=frame["city"].astype(str))
    assert_as(tmp_path / "model.txt", plain, model.predict(frame))


def test_a_category_that_is_a_number_counts_without_its_fraction() -> None:
    lightgbm = pytest.importorskip("lightgbm")
    random = np.random.default_rng(0)
    x = np.column_stack([random.integers(0, 8, 400), random.random(400)])
    y = np.isin(x[:, 0], [1, 4, 6]) * 2 + x[:, 1]
    settings = {"objective": "regression", "verbose": -1, "min_data_per_group": 5}
    booster = lightgbm.train(settings, lightgbm.Dataset(x, y, categorical_feature=[0]), 10)
    x[::3, 0] += 0.7
    x[::7, 0] = -0.2
    x[::11, 0] = 99
    x[::13, 0] = np.nan
    assert convert(booster, x).report.differences[0].max_relative < 1e-5


def test_a_category_that_is_new_is_a_row_error_with_xgboost_and_missing_with_lightgbm() -> None:
    lightgbm, xgboost = pytest.importorskip("lightgbm"), pytest.importorskip("xgboost")
    frame, price = categories()
    frame = frame.assign(city=frame["city"].astype(str).astype("category"))[["city"]].assign(
        size=np.arange(len(frame)) % 7, code=pd.Categorical(np.arange(len(frame)) % 3)
    )
    new = frame.head(3).astype({"city": object})
    new.loc[1, "city"] = "nowhere"
    trained = lightgbm.LGBMRegressor(n_estimators=5, min_data_per_group=5, verbose=-1).fit(frame, price)
    answers = Served(convert(trained, frame).onnx).score(as_polars(new))
    assert not answers.failed.any()
    known = new.assign(city=new["city"].replace("nowhere", None).astype(frame["city"].dtype))
    expected = trained.predict(known)
    assert np.allclose(next(iter(answers.outputs.values())).ravel(), expected, atol=1e-4, rtol=1e-4)
    model = xgboost.XGBRegressor(n_estimators=5, enable_categorical=True).fit(frame, price)
    refused = Served(convert(model, frame).onnx).score(as_polars(new))
    assert refused.failed.tolist() == [False, True, False]
    assert [(error.code, error.column) for error in refused.errors] == [("unknown-category", "city")]


@pytest.mark.parametrize("suffix", [".json", ".ubj"])
def test_a_file_of_xgboost_is_a_model(tmp_path: Path, suffix: str) -> None:
    xgboost = pytest.importorskip("xgboost")
    model, frame = BOOSTED["xgboost.Booster, enable_categorical"]()
    model.save_model(tmp_path / f"model{suffix}")
    matrix = xgboost.DMatrix(frame, enable_categorical=True)
    assert_as(tmp_path / f"model{suffix}", frame, model.predict(matrix))


def test_a_file_of_catboost_is_a_model(tmp_path: Path) -> None:
    catboost = pytest.importorskip("catboost")
    model = catboost.CatBoostClassifier(iterations=5, verbose=0, allow_writing_files=False).fit(X, Y)
    model.save_model(tmp_path / "model.cbm")
    assert_as(tmp_path / "model.cbm", X, model.predict_proba(X)[:, 1])


def test_a_skops_file_is_a_model(tmp_path: Path) -> None:
    io = pytest.importorskip("skops.io")
    model = make_pipeline(StandardScaler(), LogisticRegression()).fit(X, Y)
    io.dump(model, tmp_path / "model.skops")
    assert_as(tmp_path / "model.skops", X, model.predict_proba(X)[:, 1])


def mlflow_folder(folder: Path, flavor: str, facts: dict[str, Any], names: list[str]) -> None:
    """As MLflow writes it."""
    folder.mkdir(exist_ok=True)
    inputs = json.dumps([{"name": name, "type": "double", "required": True} for name in names])
    lines = ["flavors:", "  python_function:", f"    loader_module: mlflow.{flavor}", f"  {flavor}:"]
    lines += [f"    {key}: {value}" for key, value in facts.items()]
    lines += ["mlflow_version: 3.5.0", "signature:", f"  inputs: '{inputs}'", "  params: null"]
    (folder / "MLmodel").write_text("\n".join(lines))


def test_a_folder_of_mlflow_names_the_columns_of_a_model_that_was_fitted_on_an_array(tmp_path: Path) -> None:
    model = make_pipeline(StandardScaler(), LogisticRegression()).fit(X.to_numpy(), Y)
    mlflow_folder(tmp_path, "sklearn", {"pickled_model": "model.pkl"}, list(X.columns))
    (tmp_path / "model.pkl").write_bytes(pickle.dumps(model))
    mixed_up = X[X.columns[::-1]].assign(more=1)
    assert_as(tmp_path, mixed_up, model.predict_proba(X.to_numpy())[:, 1])


def test_a_folder_of_mlflow_with_an_input_example_needs_no_sample(tmp_path: Path) -> None:
    model = LogisticRegression(max_iter=5000).fit(X, Y)
    mlflow_folder(tmp_path, "sklearn", {"pickled_model": "model.pkl"}, list(X.columns))
    with (tmp_path / "MLmodel").open("a") as file:
        file.write("\nsaved_input_example_info:\n  artifact_path: input_example.json\n  type: dataframe\n")
    (tmp_path / "model.pkl").write_bytes(pickle.dumps(model))
    (tmp_path / "input_example.json").write_text(X.head(5).to_json(orient="split"))
    assert convert(tmp_path).report.rows == 5


def test_a_folder_of_mlflow_with_lightgbm_or_xgboost(tmp_path: Path) -> None:
    lightgbm, xgboost = pytest.importorskip("lightgbm"), pytest.importorskip("xgboost")
    light = lightgbm.LGBMClassifier(n_estimators=5, verbose=-1).fit(X, Y)
    mlflow_folder(tmp_path / "light", "lightgbm", {"data": "model.lgb"}, list(X.columns))
    light.booster_.save_model(tmp_path / "light" / "model.lgb")
    assert_as(tmp_path / "light", X, light.predict_proba(X)[:, 1])
    boosted = xgboost.XGBClassifier(n_estimators=5).fit(X, np.where(Y == 1, 1, 0))
    facts = {"data": "model.ubj", "model_class": "xgboost.sklearn.XGBClassifier"}
    mlflow_folder(tmp_path / "boosted", "xgboost", facts, list(X.columns))
    boosted.save_model(tmp_path / "boosted" / "model.ubj")
    assert_as(tmp_path / "boosted", X, boosted.predict_proba(X)[:, 1])


def test_a_folder_of_mlflow_with_a_graph_gives_it_names_of_columns(tmp_path: Path) -> None:
    model = LogisticRegression(max_iter=5000).fit(X.to_numpy(), Y)
    mlflow_folder(tmp_path, "onnx", {"data": "model.onnx"}, list(X.columns))
    convert(model, X.to_numpy(), tmp_path / "model.onnx")
    graph = convert(tmp_path).onnx
    result = score_as_the_server(graph, as_table(X[X.columns[::-1]]))
    assert np.allclose(
        result.to_series(result.width - 1).to_numpy(), model.predict_proba(X.to_numpy())[:, 1], atol=1e-4
    )


def test_a_folder_of_mlflow_may_not_point_out_of_itself(tmp_path: Path) -> None:
    (tmp_path / "secret.pkl").write_bytes(b"")
    mlflow_folder(tmp_path / "model", "sklearn", {"pickled_model": "../secret.pkl"}, ["a"])
    with pytest.raises(ConversionFailed, match=r"names the file '../secret.pkl', which is not in the folder"):
        convert(tmp_path / "model", X)


STEP = """
import numpy as np
from sklearn.base import BaseEstimator, TransformerMixin


class Halver(TransformerMixin, BaseEstimator):
    def fit(self, x, y=None):
        self.n_features_in_ = x.shape[1]
        return self

    def transform(self, x):
        return np.asarray(x) / 2
"""
CONVERTER = """
from skl2onnx import update_registered_converter
from skl2onnx.algebra.onnx_ops import OnnxMul
from skl2onnx.common.data_types import FloatTensorType
from shop_step import Halver
import numpy as np


def shape(operator):
    operator.outputs[0].type = FloatTensorType([None, operator.raw_operator.n_features_in_])


def write(scope, operator, container):
    half = OnnxMul(operator.inputs[0], np.array([0.5], dtype=np.float32), op_version=14,
                   output_names=operator.outputs[:1])
    half.add_to(scope, container)


update_registered_converter(Halver, "ShopHalver", shape, write)
"""


@pytest.fixture
def shop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with the module of a step, a converter for it, a pickle and a sample."""
    (tmp_path / "shop_step.py").write_text(STEP)
    (tmp_path / "shop_converters.py").write_text(CONVERTER)
    monkeypatch.syspath_prepend(tmp_path)
    from shop_step import Halver  # type: ignore[import-not-found]

    joblib.dump(make_pipeline(Halver(), LogisticRegression(max_iter=5000)).fit(X, Y), tmp_path / "model.joblib")
    X.to_csv(tmp_path / "sample.csv", index=False)
    return tmp_path


@pytest.mark.slow
def test_the_command_finds_the_module_of_a_pickle_and_takes_converters_of_ones_own(shop: Path) -> None:
    command = ("convert", "model.joblib", "--sample", "sample.csv")
    run = partial(in_this_process, shop, *command)
    refused = run()
    assert refused.returncode == 1
    assert "Halver has no ONNX converter" in refused.stderr.replace("\n", " ")
    assert "--converters MODULE" in " ".join(refused.stderr.split())
    taken = in_a_process(shop, *command, "--converters", "shop_converters")
    assert taken.returncode == 0, taken.stderr
    assert (shop / "model.onnx").exists()
    absent = run("--converters", "no_such_module")
    assert absent.returncode == 1
    assert "no_such_module" in absent.stderr


def test_a_chain_answers_as_its_links_one_after_the_other(tmp_path: Path) -> None:
    scaler = StandardScaler().fit(X)
    model = LogisticRegression().fit(scaler.transform(X), Y)
    first = convert(scaler, X)
    second = convert(model, scaler.transform(X), tmp_path / "model.onnx")
    whole = chain(first, tmp_path / "model.onnx", output=tmp_path / "whole.onnx")
    assert (tmp_path / "whole.onnx").read_bytes() == whole
    result = score_as_the_server(whole, as_table(X))
    assert [column for column in result.columns if column.startswith("prob")] == ["probability_0", "probability_1"]
    assert np.allclose(result["probability_1"].to_numpy(), model.predict_proba(scaler.transform(X))[:, 1], atol=1e-4)
    again = score_as_the_server(chain(onnx.load_model_from_string(first.onnx), second.onnx), as_table(X))
    assert again.equals(result)


def test_a_chain_of_three_keeps_its_names_apart() -> None:
    halves = convert(StandardScaler().fit(X), X)
    whole = chain(halves, halves, halves)
    session = open_session(whole)
    graph = onnx.load_model_from_string(whole).graph
    x = X.to_numpy(dtype=np.float32)
    got = next(iter(session.run({graph.input[0].name: x}).values()))
    scaler = StandardScaler().fit(X)
    expected = X.to_numpy()
    for _ in range(3):
        expected = (expected - scaler.mean_) / scaler.scale_
    assert np.allclose(got, expected, rtol=1e-3, atol=1e-3)


def test_links_that_do_not_fit_are_refused_with_what_they_give_and_take() -> None:
    scaler = convert(StandardScaler().fit(X), X)
    classifier = convert(LogisticRegression(max_iter=5000).fit(X, Y), X)
    with pytest.raises(ConversionFailed, match="gives 'label', 'probabilities' and the next one takes 'input'"):
        chain(classifier, scaler)
    with pytest.raises(ConversionFailed, match="two links or more, got 1"):
        chain(scaler)
