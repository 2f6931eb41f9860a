"""Inputs and models of the benchmarks, generated from fixed seeds and kept in a folder between runs."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import polars as pl
import pyarrow.parquet as pq
from sklearn.compose import make_column_transformer
from sklearn.ensemble import HistGradientBoostingClassifier, RandomForestClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder, StandardScaler

from batchserve.conversion import convert

FEATURES = [f"f{number}" for number in range(20)]
NUMBERS = FEATURES[:10]
CATEGORIES = {"region": 8, "category": 30, "branch": 200}
BLOCK = 500_000
TRAINING = 20_000


@dataclass(frozen=True, slots=True)
class Model:
    """A fitted estimator, pickled, and its ONNX graph."""

    name: str
    pickled: Path
    graph: Path


def model(folder: Path, name: str) -> Model:
    """One of `ESTIMATORS`, trained on the first rows of its table to distinguish three classes."""
    made = Model(name, folder / f"{name}.joblib", folder / f"{name}.onnx")
    if not made.graph.exists():
        estimator, kind = ESTIMATORS[name]
        frame = next(_blocks(kind, TRAINING)).drop("id").to_pandas()
        noise = np.random.default_rng(1).standard_normal(TRAINING)
        score = frame["f0"] + 0.5 * frame["f1"] + 0.3 * noise
        joblib.dump(estimator().fit(frame, np.digitize(score, [-0.5, 0.8])), made.pickled)
        convert(made.pickled, frame.head(2000), made.graph)
    return made


def table(folder: Path, kind: str, suffix: str, rows: int) -> Path:
    """An id and 20 standard normal floats (`numbers`), or 10 of them and 3 columns of strings (`mixed`)."""
    path = folder / f"{kind}-{rows}{suffix}"
    if not path.exists():
        partial = path.with_suffix(".partial")
        WRITERS[suffix](partial, _blocks(kind, rows))
        partial.rename(path)
    return path


def _blocks(kind: str, rows: int) -> Iterator[pl.DataFrame]:
    random = np.random.default_rng(2)
    for start in range(0, rows, BLOCK):
        count = min(BLOCK, rows - start)
        names = FEATURES if kind == "numbers" else NUMBERS
        values = random.standard_normal((count, len(names)), dtype=np.float32)
        columns: dict[str, Any] = {"id": np.arange(start, start + count)}
        columns |= {name: values[:, index] for index, name in enumerate(names)}
        if kind == "mixed":
            for name, distinct in CATEGORIES.items():
                words = np.array([f"{name} {number}" for number in range(distinct)])
                columns[name] = words[random.integers(0, distinct, count)]
        yield pl.DataFrame(columns)


def _write_csv(path: Path, blocks: Iterator[pl.DataFrame]) -> None:
    with path.open("wb") as file:
        for number, block in enumerate(blocks):
            block.write_csv(file, include_header=number == 0)


def _write_jsonl(path: Path, blocks: Iterator[pl.DataFrame]) -> None:
    with path.open("wb") as file:
        for block in blocks:
            block.write_ndjson(file)


def _write_parquet(path: Path, blocks: Iterator[pl.DataFrame]) -> None:
    """Writes the table as pandas and pyarrow do by default."""
    first = next(blocks).to_arrow()
    with pq.ParquetWriter(path, first.schema) as writer:
        writer.write_table(first)
        for block in blocks:
            writer.write_table(block.to_arrow())


def _pipeline() -> Any:
    columns = make_column_transformer(
        (StandardScaler(), NUMBERS), (OneHotEncoder(handle_unknown="ignore"), list(CATEGORIES))
    )
    return make_pipeline(columns, LogisticRegression(max_iter=300))


ESTIMATORS: dict[str, tuple[Callable[[], Any], str]] = {
    "logistic": (lambda: LogisticRegression(max_iter=300), "numbers"),
    "pipeline": (_pipeline, "mixed"),
    "forest": (lambda: RandomForestClassifier(100, max_depth=12, random_state=1, n_jobs=2), "numbers"),
    "boosting": (lambda: HistGradientBoostingClassifier(max_iter=100, random_state=1), "numbers"),
}
WRITERS: dict[str, Callable[[Path, Iterator[pl.DataFrame]], None]] = {
    ".csv": _write_csv,
    ".jsonl": _write_jsonl,
    ".parquet": _write_parquet,
}
