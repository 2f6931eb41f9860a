"""Which values the encoders in an estimator know, by the column of the input that they come from."""

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from batchserve.conversion.estimator import selected

Path = Sequence[str | None]
"""For each column at some place of a pipeline the input column whose values it has; None: it was computed."""


class Known:
    """What was found: for each column the categories of its encoders."""

    def __init__(self) -> None:
        self.refusing: dict[str, list[Any]] = {}
        """Column -> what all its encoders take that raise for anything else."""
        self.all: dict[str, list[Any]] = {}
        """Column -> what all its encoders know, whatever they do with anything else."""

    def add(self, column: str | None, categories: Iterable[Any], *, raises: bool) -> None:
        if column is None:
            return
        values = [_plain(value) for value in categories if not _is_missing(value)]
        for found in (self.all, self.refusing) if raises else (self.all,):
            both = set(found.get(column, values))
            found[column] = [value for value in values if value in both]


def known_categories(model: Any, columns: Sequence[str]) -> Known:
    """The categories of all encoders that see the values of a column as they come, or with missing ones filled in."""
    known = Known()
    own = [str(name) for name in getattr(model, "feature_names_in_", ())]  # also those that its first step drops
    named = any(name in columns for name in own)
    _follow(model, [name if name in columns else None for name in own] if named else list(columns), known)
    return known


def _follow(step: Any, columns: Path, known: Known) -> list[str | None]:
    """The columns that a step gives, after adding what its encoders know."""
    from sklearn.compose import ColumnTransformer
    from sklearn.impute import SimpleImputer
    from sklearn.pipeline import FeatureUnion, Pipeline
    from sklearn.preprocessing import FunctionTransformer

    match step:
        case None | "passthrough":
            return list(columns)
        case FunctionTransformer() if step.func is None:
            return list(columns)
        case SimpleImputer():
            return _imputed(step, columns)
        case Pipeline():
            for _, part in step.steps:
                columns = _follow(part, columns, known)
            return list(columns)
        case ColumnTransformer():
            return [name for part, chosen in _shares(step, columns) for name in _follow(part, chosen, known)]
        case FeatureUnion():
            parts = [part for _, part in step.transformer_list if part != "drop"]
            return [name for part in parts for name in _follow(part, columns, known)]
    _read(step, columns, known)
    return [None] * _width(step)


def _read(step: Any, columns: Path, known: Known) -> None:
    """Add what an encoder knows, or what those know that are inside of a step."""
    from sklearn.preprocessing import LabelEncoder, OneHotEncoder, OrdinalEncoder

    from batchserve.conversion.adoption import Boosted

    match step:
        case OneHotEncoder() | OrdinalEncoder():
            for column, categories in zip(columns, step.categories_, strict=False):
                known.add(column, categories, raises=step.handle_unknown == "error")
        case Boosted():
            for place, items in step.categories.items():
                known.add(columns[place], items, raises=step.refuses_unknown)
        case LabelEncoder():
            known.add(columns[0], step.classes_, raises=True)
        case _:
            for part in _inside(step):
                if getattr(part, "n_features_in_", None) == len(columns):
                    _follow(part, columns, known)


def _imputed(imputer: Any, columns: Path) -> list[str | None]:
    width = _width(imputer)
    if width < len(columns):  # columns without any value were dropped: which, does not matter
        return [None] * width
    return [*columns, *[None] * (width - len(columns))]


def _shares(transformer: Any, columns: Path) -> Iterator[tuple[Any, list[str | None]]]:
    """The steps of a ColumnTransformer, each with its columns."""
    names = [str(name) for name in getattr(transformer, "feature_names_in_", range(len(columns)))]
    places = {name: place for place, name in enumerate(names)}
    for _, part, chosen in transformer.transformers_:
        if part != "drop":
            yield part, [columns[places[name]] for name in selected(chosen, names) if places[name] < len(columns)]


def _inside(step: Any) -> Iterator[Any]:
    """The fitted estimators that an estimator holds itself."""
    from sklearn.base import BaseEstimator

    if not isinstance(step, BaseEstimator) and type(step).__name__ != "_CalibratedClassifier":
        return
    for name, value in vars(step).items():
        for part in value if isinstance(value, list | tuple) and len(value) < 1000 else [value]:
            if isinstance(part, BaseEstimator) and (name.endswith("_") or hasattr(part, "n_features_in_")):
                yield part
            elif type(part).__name__ == "_CalibratedClassifier":
                yield part.estimator


def _width(step: Any) -> int:
    try:
        return len(step.get_feature_names_out())
    except Exception:  # noqa: BLE001 - whatever a step has to say; where it is the last one, nothing follows
        return 0


def _is_missing(value: Any) -> bool:
    return value is None or (isinstance(value, float | np.floating) and math.isnan(value)) or str(value) == "<NA>"


def _plain(value: Any) -> str | float:
    value = value.item() if isinstance(value, np.generic) else value
    return int(value) if isinstance(value, bool) else value if isinstance(value, int | float) else str(value)
