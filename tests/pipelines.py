"""Pipelines that are made by chance from a seed: columns of all types, encoders, scalers, estimators."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from sklearn.compose import ColumnTransformer
from sklearn.ensemble import (
    ExtraTreesClassifier,
    GradientBoostingClassifier,
    GradientBoostingRegressor,
    HistGradientBoostingClassifier,
    HistGradientBoostingRegressor,
    IsolationForest,
    RandomForestClassifier,
    RandomForestRegressor,
)
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LinearRegression, LogisticRegression, Ridge, RidgeClassifier
from sklearn.naive_bayes import GaussianNB
from sklearn.neighbors import KNeighborsClassifier
from sklearn.neural_network import MLPClassifier
from sklearn.pipeline import FeatureUnion, make_pipeline
from sklearn.preprocessing import (
    FunctionTransformer,
    KBinsDiscretizer,
    MaxAbsScaler,
    MinMaxScaler,
    OneHotEncoder,
    OrdinalEncoder,
    PolynomialFeatures,
    RobustScaler,
    StandardScaler,
)
from sklearn.svm import SVC, SVR, LinearSVC
from sklearn.tree import DecisionTreeClassifier, DecisionTreeRegressor

__all__ = ["Made", "make"]

ROWS = 120


@dataclass(frozen=True)
class Made:
    """A fitted pipeline and its records."""

    model: Any
    frame: pd.DataFrame
    text: str
    """How it reads."""


Random = np.random.Generator


def make(seed: int) -> Made:
    """The pipeline of this seed. Raises ValueError where scikit-learn itself does not fit it."""
    random = np.random.default_rng(seed)
    frame = _frame(random)
    steps: list[tuple[str, Any, list[str]]] = []
    for index, column in enumerate(frame.columns):
        category = column[0] in "tcb" or (column[0] == "i" and random.random() < 0.5)
        step = _encoder(random, column) if category else _scaler(random, missing=bool(frame[column].isna().any()))
        steps.append((f"s{index}", step, [column]))
    if random.random() < 0.2 and all(column[0] == "t" for column in frame.columns):
        steps = [("all", OneHotEncoder(handle_unknown="ignore"), list(frame.columns))]
    columns = ColumnTransformer(steps, sparse_threshold=0)
    first = FeatureUnion([("all", columns)]) if random.random() < 0.1 else columns
    estimator, numbers = _estimator(random)
    score = _score(random, frame)
    target = score if numbers else np.where(score > np.median(score), "high", "low")
    model = make_pipeline(first, estimator).fit(frame, target)
    return Made(model, frame, repr(model))


def _frame(random: Random) -> pd.DataFrame:
    """One to four columns; the first letter of a name says what it holds."""
    makers: dict[str, Callable[[], Any]] = {
        "text": lambda: random.choice(["Ulm", "Bonn", "Köln", "Å", "a b"], ROWS, p=[0.4, 0.3, 0.2, 0.05, 0.05]),
        "code": lambda: random.integers(1, 6, ROWS) * random.choice([1, 1000, 2**25, 2**54]),
        "bool": lambda: random.random(ROWS) < 0.4,
        "int": lambda: random.integers(-5, 50, ROWS),
        "float": lambda: random.normal(10, 5, ROWS).astype("float32"),
        "double": lambda: np.round(random.normal(0, 1, ROWS), 2),
    }
    chosen = random.choice(list(makers), random.integers(1, 5), replace=False)
    frame = pd.DataFrame({f"{name}_{index}": makers[name]() for index, name in enumerate(chosen)})
    for column in frame.columns:
        if column[0] in "fdt" and random.random() < 0.3:
            frame[column] = frame[column].astype(object if column[0] == "t" else frame[column].dtype)
            frame.loc[random.random(ROWS) < 0.1, column] = np.nan
    return frame


def _encoder(random: Random, column: str) -> Any:
    text = column[0] == "t"
    encoders: list[Any] = [
        OrdinalEncoder(),
        OneHotEncoder(),
        OneHotEncoder(handle_unknown="ignore"),
        OneHotEncoder(handle_unknown="infrequent_if_exist", min_frequency=0.1),
        OneHotEncoder(handle_unknown="warn", max_categories=3),
        OneHotEncoder(drop="first"),
        OneHotEncoder(drop="if_binary", handle_unknown="ignore"),
        OrdinalEncoder(handle_unknown="use_encoded_value", unknown_value=-1),
        OrdinalEncoder(handle_unknown="use_encoded_value", unknown_value=np.nan),
        OrdinalEncoder(handle_unknown="use_encoded_value", unknown_value=-1, encoded_missing_value=-2),
        OrdinalEncoder(min_frequency=0.1),
    ]
    encoder = encoders[random.integers(len(encoders))]
    if text and random.random() < 0.4:
        return make_pipeline(SimpleImputer(strategy="most_frequent"), encoder)
    return encoder


def _scaler(random: Random, *, missing: bool) -> Any:
    scalers: list[Any] = [
        StandardScaler(),
        MinMaxScaler(),
        MinMaxScaler(clip=True),
        RobustScaler(),
        MaxAbsScaler(),
        PolynomialFeatures(2),
        KBinsDiscretizer(3, encode="onehot-dense", quantile_method="averaged_inverted_cdf"),
        FunctionTransformer(),
    ]
    scaler = scalers[random.integers(len(scalers))]
    return make_pipeline(SimpleImputer(), scaler) if missing or random.random() < 0.3 else scaler


def _estimator(random: Random) -> tuple[Any, bool]:
    """An estimator, and whether it predicts numbers."""
    few = {"n_estimators": 7, "max_depth": 4, "random_state": 0}
    classifiers: list[Any] = [
        LogisticRegression(max_iter=500),
        RandomForestClassifier(**few),
        ExtraTreesClassifier(**few),
        GradientBoostingClassifier(**few),
        HistGradientBoostingClassifier(max_iter=7, random_state=0),
        DecisionTreeClassifier(max_depth=4, random_state=0),
        GaussianNB(),
        KNeighborsClassifier(),
        MLPClassifier((6,), max_iter=50, random_state=0),
        SVC(random_state=0),
        LinearSVC(random_state=0),
        RidgeClassifier(),
    ]
    regressors: list[Any] = [
        LinearRegression(),
        Ridge(),
        RandomForestRegressor(**few),
        GradientBoostingRegressor(**few),
        HistGradientBoostingRegressor(max_iter=7, random_state=0),
        DecisionTreeRegressor(max_depth=4, random_state=0),
        SVR(),
    ]
    if random.random() < 0.05:
        return IsolationForest(n_estimators=7, random_state=0), True
    numbers = bool(random.random() < 0.4)
    among = regressors if numbers else classifiers
    return among[random.integers(len(among))], numbers


def _score(random: Random, frame: pd.DataFrame) -> np.ndarray[Any, Any]:
    score = random.normal(0, 0.1, ROWS)
    for column in frame.columns:
        values = frame[column].astype("category").cat.codes.to_numpy().astype(float)
        score += values / max(1.0, values.max())
    return np.asarray(score)
