"""The estimator and the rows of the wheel check: `iris.py make DIR`, later `iris.py check DIR`."""

import sys
from pathlib import Path

import joblib
import polars as pl
from sklearn.datasets import load_iris
from sklearn.linear_model import LogisticRegression


def make(folder: Path) -> None:
    """Write iris.joblib, iris.csv and the estimator's own answers, expected.csv."""
    frame = load_iris(as_frame=True)
    estimator = LogisticRegression(max_iter=1000).fit(frame.data, frame.target)
    joblib.dump(estimator, folder / "iris.joblib")
    frame.data.to_csv(folder / "iris.csv", index=False)
    pl.DataFrame({"prediction": estimator.predict(frame.data)}).write_csv(folder / "expected.csv")


def check(folder: Path) -> None:
    """Fail unless predictions.csv has exactly the estimator's answers, in the order of the rows."""
    expected = pl.read_csv(folder / "expected.csv")["prediction"]
    got = pl.read_csv(folder / "predictions.csv")["prediction"]
    if got.to_list() != expected.to_list():
        sys.exit(f"the predictions differ from the estimator's: {got.to_list()}")
    print(f"{len(got)} predictions, equal to the estimator's")


if __name__ == "__main__":
    {"make": make, "check": check}[sys.argv[1]](Path(sys.argv[2]))
