"""The data that the estimators of the table are trained on: small, deterministic, and as people have it."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
from sklearn import datasets
from sklearn.base import is_classifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

Case = tuple[Any, Any]
"""A fitted model and the records to score: a frame, an array or texts."""

Array = np.ndarray[Any, Any]


def load(name: str, rows: int = 300) -> tuple[pd.DataFrame, Array, Array]:
    """Records, targets, and the names of the classes, of one of scikit-learn's data sets."""
    data = getattr(datasets, f"load_{name}")(as_frame=True)
    order = np.random.default_rng(0).permutation(len(data.data))[:rows]
    frame = data.data.iloc[order].reset_index(drop=True)
    return frame, data.target.to_numpy()[order], np.asarray(getattr(data, "target_names", []))


def iris(model: Any) -> Case:
    """Three classes, whose labels are texts."""
    x, y, names = load("iris")
    return model.fit(x, names[y]), x


def wine(model: Any) -> Case:
    """Three classes, whose labels are numbers, and columns of very different sizes."""
    x, y, _ = load("wine")
    return model.fit(x, y), x


def cancer(model: Any) -> Case:
    """Two classes."""
    x, y, _ = load("breast_cancer")
    return model.fit(x, y), x


def cancer_bool(model: Any) -> Case:
    """Two classes, which are False and True."""
    x, y, _ = load("breast_cancer")
    return model.fit(x, y == 1), x


def digits(model: Any) -> Case:
    """Counts, without names of columns."""
    x, y, _ = load("digits")
    return model.fit(x.to_numpy(), y), x.to_numpy()


def diabetes(model: Any) -> Case:
    """A number to predict."""
    x, y, _ = load("diabetes")
    return model.fit(x, y), x


def counts(model: Any) -> Case:
    """A count to predict."""
    x, y, _ = load("diabetes")
    return model.fit(x, np.floor(y / 20)), x


def gaps(model: Any, targets: int = 1) -> Case:
    """Numbers of which many are missing, which tells something; a class, or numbers."""
    x, y, _ = load("diabetes")
    x = x.mask(np.random.default_rng(0).random(x.shape) < 0.1).assign(bmi=x["bmi"].mask(y > 180))
    target = np.where(y > 140, "ill", "well") if is_classifier(model) else np.column_stack([y, -y][:targets])
    return model.fit(x, target if target.ndim == 1 or targets > 1 else y), x


def ranked(model: Any) -> Case:
    """Thirty results of each query, with their relevance."""
    x, y, _ = load("diabetes")
    relevance = np.digitize(y, [90, 140, 200])
    if type(model).__name__ == "XGBRanker":
        return model.fit(x, relevance, qid=np.arange(len(x)) // 30), x
    return model.fit(x, relevance, group=[30] * (len(x) // 30)), x


def two_numbers(model: Any) -> Case:
    x, y, _ = load("diabetes")
    return model.fit(x, np.column_stack([y, x["bmi"] * 100 - y])), x


def two_labels(model: Any) -> Case:
    x, y, _ = load("wine")
    return model.fit(x, np.column_stack([y, y % 2])), x


def yes_and_no(model: Any) -> Case:
    """Several labels of a record, each 0 or 1."""
    x, y, _ = load("wine")
    return model.fit(x, np.column_stack([y > 0, y > 1, x["alcohol"] > 13]).astype(int)), x


def codes(model: Any) -> Case:
    """Categories as small whole numbers."""
    x, y, _ = load("iris")
    x = x.round().astype(int)
    return model.fit(x, y), x


def trips(rows: int = 300) -> tuple[pd.DataFrame, Array]:
    """Numbers with holes, texts, integers, booleans; and a number to predict."""
    random = np.random.default_rng(1)
    frame = pd.DataFrame(
        {
            "distance km": random.gamma(3, 4, rows).round(3),
            "city": random.choice(["Graz", "Linz", "Wien", "Zürich"], rows),
            "plan": random.choice(["basic", "plus", "max"], rows, p=[0.6, 0.3, 0.1]),
            "month": random.integers(1, 13, rows),
            "weekend": random.random(rows) < 2 / 7,
            "weight": random.gamma(2, 3, rows),
        }
    )
    price = (
        frame["distance km"] * 2 + frame["city"].str.len() * 3 + frame["plan"].map({"basic": 0, "plus": 5, "max": 9})
    )
    frame.loc[::11, "distance km"] = np.nan
    return frame, np.asarray(price + frame["month"] % 4 + 1)


def mixed(model: Any) -> Case:
    """Two classes, which are texts, of records with columns of several types."""
    frame, price = trips()
    return model.fit(frame, np.where(price > np.median(price), "dear", "cheap")), frame


def mixed_numbers(model: Any) -> Case:
    frame, price = trips()
    return model.fit(frame, price), frame


def categories() -> tuple[pd.DataFrame, Array]:
    """As pandas' categories, one of them ordered."""
    frame, price = trips()
    plans = pd.CategoricalDtype(["basic", "plus", "max"], ordered=True)
    return frame.astype({"city": "category", "plan": plans}), price


def categorical(model: Any, *, number: bool = False, **options: Any) -> Case:
    """Columns that are pandas' categories."""
    frame, price = categories()
    target = price if number else (price > np.median(price)).astype(int)
    return model.fit(frame, target, **options), frame


def categorical_numbers(model: Any) -> Case:
    return categorical(model, number=True)


def categorical_classes(model: Any, **options: Any) -> Case:
    frame, price = categories()
    return model.fit(frame, np.array(["low", "mid", "high"])[np.digitize(price, [30, 45])], **options), frame


def lines(rows: int = 200) -> tuple[list[str], Array]:
    random = np.random.default_rng(0)
    words = {"sport": ["Goal", "team", "match", "Win", "café"], "food": ["Salt", "soup", "bread", "Pan", "naïve"]}
    topics = random.choice(list(words), rows)
    return [" ".join(random.choice([*words[topic], "the", "a", "of"], 7)) for topic in topics], topics


def texts(*steps: Any) -> Case:
    rows, topics = lines()
    return make_pipeline(*steps).fit(rows, topics), rows


def standardized(model: Any) -> Any:
    return make_pipeline(StandardScaler(), model)


def seeded(kind: Callable[..., Any], **options: Any) -> Any:
    return kind(random_state=0, **options)
