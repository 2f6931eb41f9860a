"""The oldest scikit-learn that `[sklearn]` allows. The newest is the one that all other tests have."""

import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

PROGRAM = """
import numpy as np
import pandas as pd
import sklearn
from sklearn.compose import make_column_transformer
from sklearn.datasets import load_iris
from sklearn.ensemble import (
    GradientBoostingRegressor,
    HistGradientBoostingClassifier,
    HistGradientBoostingRegressor,
    RandomForestClassifier,
)
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder, OrdinalEncoder, StandardScaler

import batchserve

X, y = load_iris(return_X_y=True, as_frame=True)
X = X.astype("float32")
random = np.random.default_rng(0)
mixed = pd.DataFrame({
    "age": np.where(random.random(300) < 0.1, np.nan, random.integers(18, 80, 300)),
    "city": random.choice(["Bern", "Biel", "Genf"], 300),
    "visits": random.integers(0, 12, 300),
})
often = np.where(mixed["visits"] > 5, "regular", "rare")
categories = mixed.assign(city=mixed["city"].astype("category"))
texts = pd.DataFrame({"text": ["good film", "great good story", "bad film", "awful bad story"] * 10})
praise = ["good" in text for text in texts["text"]]

numbers = make_pipeline(SimpleImputer(), StandardScaler())
columns = make_column_transformer((numbers, ["age"]), (OneHotEncoder(), ["city"]), ("passthrough", ["visits"]))
ordinal = make_column_transformer((OrdinalEncoder(), ["city"]), ("passthrough", ["visits"]))
words = make_column_transformer((TfidfVectorizer(), "text"))
boosted = HistGradientBoostingClassifier(max_iter=10, categorical_features="from_dtype")
cases = [
    (LogisticRegression(max_iter=500), X, y),
    (make_pipeline(StandardScaler(), LogisticRegression()), X, y),
    (RandomForestClassifier(20, random_state=0), X, y),
    (make_pipeline(StandardScaler(), RandomForestClassifier(20, random_state=0)), X, y),
    (HistGradientBoostingClassifier(max_iter=20), X, y),
    (HistGradientBoostingRegressor(max_iter=20, loss="poisson"), X, y),
    (GradientBoostingRegressor(n_estimators=20), X, y),
    (make_pipeline(columns, LogisticRegression(max_iter=500)), mixed, often),
    (make_pipeline(ordinal, RandomForestClassifier(10, random_state=0)), mixed, often),
    (make_pipeline(words, LogisticRegression()), texts, praise),
    (boosted, categories, often),
]
for model, given, wanted in cases:
    report = batchserve.convert(model.fit(given, wanted), given).report
    assert report.passed and not report.label_flips, (model, str(report))
print(sklearn.__version__, len(cases))
"""


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_oldest_version_converts_what_the_newest_does(tmp_path: Path) -> None:
    required = next(
        requirement
        for requirement in map(Requirement, metadata.requires("batchserve") or [])
        if requirement.name == "scikit-learn"
    )
    (bound,) = (specifier.version for specifier in required.specifier if specifier.operator == ">=")
    oldest, folder = f"{bound}.0", tmp_path / "oldest"
    pip = (sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder))
    subprocess.run([*pip, f"scikit-learn=={oldest}"], check=True, timeout=300)
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env=os.environ | {"PYTHONPATH": str(folder)},
        cwd=Path(__file__).parent.parent,
        check=False,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [oldest, "11"]
