"""Inputs and models of the benchmarks: made from fixed seeds, kept in a folder between runs."""

from pathlib import Path

import joblib
import numpy as np
import pandas as pd
import polars as pl
from sklearn.linear_model import LogisticRegression

from batchserve import convert

FEATURES = [f"f{number}" for number in range(20)]
BLOCK = 500_000


def logistic_regression(folder: Path) -> tuple[Path, Path]:
    """Three classes from 20 floats: the pickled estimator and its ONNX graph."""
    pickled, graph = folder / "logistic.joblib", folder / "logistic.onnx"
    if not graph.exists():
        random = np.random.default_rng(1)
        table = pd.DataFrame(random.standard_normal((20_000, 20), dtype=np.float32), columns=FEATURES)
        score = table["f0"] + 0.5 * table["f1"] + 0.3 * random.standard_normal(len(table))
        joblib.dump(LogisticRegression(max_iter=300).fit(table, np.digitize(score, [-0.5, 0.8])), pickled)
        convert(pickled, table.head(2000), graph)
    return pickled, graph


def csv(folder: Path, rows: int) -> Path:
    """A CSV of an id and 20 standard normal floats: about 225 bytes a row."""
    path = folder / f"table-{rows}.csv"
    if path.exists():
        return path
    random = np.random.default_rng(2)
    partial = path.with_suffix(".partial")
    with partial.open("wb") as file:
        for start in range(0, rows, BLOCK):
            count = min(BLOCK, rows - start)
            values = random.standard_normal((count, 20), dtype=np.float32)
            columns = {"id": np.arange(start, start + count)} | dict(zip(FEATURES, values.T, strict=True))
            pl.DataFrame(columns).write_csv(file, include_header=start == 0)
    partial.rename(path)
    return path
