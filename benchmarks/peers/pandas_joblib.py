"""The usual script: read the whole file with pandas, predict with the pickled estimator, write the whole file.
Loading the estimator, which imports scikit-learn, is not counted.

usage: python pandas_joblib.py MODEL.joblib INPUT OUTPUT
"""

import sys
from pathlib import Path

import joblib
import pandas as pd
from stopwatch import Stopwatch

READ = {".csv": pd.read_csv, ".jsonl": lambda path: pd.read_json(path, lines=True), ".parquet": pd.read_parquet}


def scored(model, frame: pd.DataFrame) -> pd.DataFrame:  # noqa: ANN001
    features = frame[list(model.feature_names_in_)]
    probabilities = model.predict_proba(features)
    result = frame.drop(columns=features.columns)
    result["prediction"] = model.classes_[probabilities.argmax(axis=1)]
    for index, label in enumerate(model.classes_):
        result[f"probability_{label}"] = probabilities[:, index]
    return result


if __name__ == "__main__":
    model = joblib.load(sys.argv[1])
    source, target = map(Path, sys.argv[2:])
    watch = Stopwatch()
    result = scored(model, READ[source.suffix](source))
    if target.suffix == ".csv":
        result.to_csv(target, index=False)
    elif target.suffix == ".jsonl":
        result.to_json(target, orient="records", lines=True)
    else:
        result.to_parquet(target, index=False)
    print(watch)
