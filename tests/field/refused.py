"""What is refused, each with the sentence that says why and what to do."""

import pickle
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pandas as pd
from sklearn.cluster import DBSCAN
from sklearn.compose import make_column_transformer
from sklearn.decomposition import NMF, LatentDirichletAllocation
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.feature_extraction.text import HashingVectorizer, TfidfVectorizer
from sklearn.gaussian_process import GaussianProcessClassifier
from sklearn.gaussian_process.kernels import Matern
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LogisticRegression
from sklearn.manifold import Isomap
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer, OneHotEncoder, StandardScaler

from batchserve.conversion import convert
from batchserve.errors import ConversionFailed
from field.cases import catboost, lightgbm, xgboost
from field.data import categorical, diabetes, digits, iris, lines, load, mixed, texts, two_numbers


def _after(case: Callable[[], tuple[Any, Any]]) -> Callable[[], None]:
    def refuse() -> None:
        model, records = case()
        convert(model, records)

    return refuse


def _without_its_module() -> None:
    """A pickle of a class from a module that is not there when it is loaded."""
    module = ModuleType("features_of_the_shop")
    module.Ratio = type("Ratio", (), {"__module__": module.__name__})  # type: ignore[attr-defined]
    sys.modules[module.__name__] = module
    data = pickle.dumps(module.Ratio())
    del sys.modules[module.__name__]
    _stored("model.pkl", data)


def _from_a_main_file() -> None:
    _stored("model.pkl", b"c__main__\nlog_of_price\n.")


def _stored(name: str, data: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        path.write_bytes(data)
        convert(path, np.zeros((3, 2)))


def _folder_without_mlmodel() -> None:
    with tempfile.TemporaryDirectory() as folder:
        convert(Path(folder), np.zeros((3, 2)))


def _dates() -> None:
    frame = pd.DataFrame({"sold": pd.to_datetime(["2026-01-01", "2026-02-01"] * 10), "area": range(20)})
    model = make_pipeline(FunctionTransformer(lambda x: x[["area"]]), LogisticRegression()).fit(frame, [0, 1] * 10)
    convert(model, frame)


def _texts_beside_numbers() -> None:
    filled = make_column_transformer(
        (SimpleImputer(strategy="most_frequent"), ["city", "plan"]),
        (SimpleImputer(), ["distance km"]),
        verbose_feature_names_out=False,
    )
    encoded = make_column_transformer(
        (OneHotEncoder(handle_unknown="ignore"), ["city", "plan"]), (StandardScaler(), ["distance km"])
    )
    model, frame = mixed(make_pipeline(filled.set_output(transform="pandas"), encoded, LogisticRegression()))
    convert(model, frame)


def _formula() -> None:
    import pytest

    package = pytest.importorskip("statsmodels.formula.api")
    x, y, _ = load("diabetes")
    frame = x.assign(y=y)
    convert(package.ols("y ~ bmi + I(bp ** 2)", frame).fit(), frame)


def _two_texts() -> None:
    rows, topics = lines()
    model = make_pipeline(TfidfVectorizer(), LogisticRegression()).fit(rows, topics)
    convert(model, pd.DataFrame({"title": rows, "text": rows}))


def _not_fitted() -> None:
    convert(HistGradientBoostingClassifier(), np.zeros((3, 2)))


def _lacking() -> None:
    model, frame = iris(LogisticRegression(max_iter=500))
    convert(model, frame.iloc[:, :3])


def _mean_of_all(x: Any) -> Any:
    return x - x.mean(axis=0)


def _booster_without_probabilities() -> None:
    import pytest

    xgboost = pytest.importorskip("xgboost")
    x, y, _ = load("wine")
    matrix = xgboost.DMatrix(x, y)
    convert(xgboost.train({"objective": "multi:softmax", "num_class": 3}, matrix, 2), x)


REFUSED: dict[str, Callable[[], None]] = {
    "a clusterer without `predict`": _after(lambda: iris(DBSCAN())),
    "NMF": _after(lambda: digits(NMF(2, max_iter=500))),
    "LatentDirichletAllocation": _after(lambda: digits(LatentDirichletAllocation(2))),
    "Isomap": _after(lambda: iris(Isomap())),
    "HashingVectorizer": _after(lambda: texts(HashingVectorizer(n_features=64), LogisticRegression())),
    "a rare kernel of a Gaussian process": _after(
        lambda: iris(GaussianProcessClassifier(Matern(nu=3.0), optimizer=None))
    ),
    "a function that mixes records": _after(
        lambda: iris(make_pipeline(FunctionTransformer(_mean_of_all), LogisticRegression(max_iter=500)))
    ),
    "categories of CatBoost": _after(catboost("CatBoostClassifier", categorical, cat_features=["city", "plan"])),
    "linear models in the leaves of LightGBM": _after(
        lightgbm("LGBMRegressor", diabetes, linear_tree=True, min_data_in_leaf=20)
    ),
    "leaves with several targets of XGBoost": _after(
        xgboost("XGBRegressor", two_numbers, multi_strategy="multi_output_tree")
    ),
    "a Booster that gives labels": _booster_without_probabilities,
    "a formula that computes columns": _formula,
    "a pickle whose module is missing": _without_its_module,
    "a pickle of a program's main file": _from_a_main_file,
    "a folder": _folder_without_mlmodel,
    "texts and numbers behind a ColumnTransformer": _texts_beside_numbers,
    "dates": _dates,
    "two columns for a text model": _two_texts,
    "a sample that lacks columns": _lacking,
    "a model that is not fitted": _not_fitted,
}


def refusal(name: str) -> str:
    """The message. Raises AssertionError when nothing is refused."""
    try:
        REFUSED[name]()
    except ConversionFailed as refused:
        folder = tempfile.gettempdir()
        words = [
            word if not word.startswith(folder) else "model.pkl" if word.endswith(".pkl") else "FOLDER"
            for word in str(refused).split(" ")
        ]
        return " ".join(words).partition("\n")[0]
    raise AssertionError(f"{name} was not refused")
