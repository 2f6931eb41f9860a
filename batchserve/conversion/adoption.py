"""Boosters of LightGBM and XGBoost, and their estimators with pandas' categories, as estimators of scikit-learn."""

import json
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin

from batchserve.conversion.sample import Array, listed
from batchserve.errors import ConversionFailed

if TYPE_CHECKING:
    import pandas


class Boosted(BaseEstimator):  # type: ignore[misc]
    """Trees of one of the two packages, with the categories of their columns; predicts as the original does."""

    classes_: Array | None = None

    def __init__(
        self,
        original: Any,
        booster: Any,
        package: str,
        categories: Mapping[int, Sequence[Any]],
        missing: float | None = None,
        rounds: int | None = None,
    ) -> None:
        self.original, self.booster, self.package, self.categories = original, booster, package, categories
        self.missing, self.rounds = missing, rounds
        names = booster.feature_name() if package == "lightgbm" else booster.feature_names
        self.n_features_in_ = booster.num_feature() if package == "lightgbm" else booster.num_features()
        if names and not all(str(name).startswith(("Column_", "f")) and str(name)[-1:].isdigit() for name in names):
            self.feature_names_in_ = np.asarray(names, dtype=object)

    def fit(self, x: Any, y: Any = None) -> Self:  # noqa: ARG002 - scikit-learn's signature
        return self

    def _raw(self, x: Any) -> Array:
        """What a Booster itself gives."""
        frame = self._with_categories(x)
        if self.package == "lightgbm":
            return np.asarray(self.booster.predict(frame))
        from xgboost import DMatrix

        if self.feature_names_ and not hasattr(frame, "columns"):
            import pandas

            frame = pandas.DataFrame(frame, columns=self.feature_names_)
        matrix = DMatrix(frame, missing=np.nan if self.missing is None else self.missing, enable_categorical=True)
        return np.asarray(self.booster.predict(matrix, iteration_range=(0, self.rounds or 0)))

    @property
    def refuses_unknown(self) -> bool:
        """XGBoost raises for a category that training did not have; to LightGBM it is missing."""
        return bool(self.package == "xgboost")

    @property
    def feature_names_(self) -> list[str]:
        return list(self.booster.feature_names or []) if self.package == "xgboost" else []

    def _with_categories(self, x: Any) -> Any:
        if not self.categories or not hasattr(x, "columns"):
            return x
        return as_categories(x, self.categories, refuse=self.refuses_unknown)


class BoostedClassifier(ClassifierMixin, Boosted):  # type: ignore[misc]
    """Its labels are those of the estimator, or the numbers of the classes of a Booster."""

    def predict(self, x: Any) -> Array:
        """The label of the largest probability."""
        if self.original is not self.booster:
            return np.asarray(self.original.predict(self._with_categories(x)))
        assert self.classes_ is not None
        labels: Array = self.classes_[self.predict_proba(x).argmax(axis=1)]
        return labels

    def predict_proba(self, x: Any) -> Array:
        """[N, classes]"""
        if self.original is not self.booster:
            return np.asarray(self.original.predict_proba(self._with_categories(x)))
        raw = self._raw(x)
        return np.column_stack([1 - raw, raw]) if raw.ndim == 1 else raw


class BoostedRegressor(RegressorMixin, Boosted):  # type: ignore[misc]
    """Gives the number that the original gives."""

    def predict(self, x: Any) -> Array:
        """[N] or [N, targets]"""
        if self.original is not self.booster:
            return np.asarray(self.original.predict(self._with_categories(x)))
        return self._raw(x)


def as_categories(
    frame: "pandas.DataFrame", categories: Mapping[int, Sequence[Any]], *, refuse: bool
) -> "pandas.DataFrame":
    """The frame with these columns as pandas' categories; a value that is none of them is missing, or a ValueError."""
    import pandas

    columns = {}
    for place, items in categories.items():
        name = frame.columns[place]
        column = frame[name]
        if isinstance(column.dtype, pandas.CategoricalDtype):
            column = column.astype(column.dtype.categories.dtype)
        if refuse and (unknown := [value for value in column.dropna().unique() if value not in set(items)]):
            raise ValueError(f"Found categories not in the training set: column {name!r} has {listed(unknown)}.")
        columns[name] = column.where(column.isin(list(items))).astype(pandas.CategoricalDtype(list(items)))
    return frame.assign(**columns)


def adopt(model: Any, frame: "pandas.DataFrame | None") -> Any:
    """A Booster, or an estimator that onnxmltools does not write as it predicts, as an estimator with trees of its own.

    Anything else is given back as it is. `frame`: the sample, for which columns are categories where the model does
    not say so.
    """
    package = type(model).__module__.partition(".")[0]
    if package not in ("lightgbm", "xgboost"):
        return model
    booster = model if type(model).__name__ == "Booster" else getattr(model, "_Booster", None)
    if booster is None or not (booster is model or beyond_onnxmltools(model)):
        return model
    return (_adopt_lightgbm if package == "lightgbm" else _adopt_xgboost)(model, booster, frame)


_LIGHTGBM_PLAIN = frozenset(
    {"binary", "multiclass", "regression", "regression_l1", "huber", "fair", "quantile", "poisson", "gamma", "tweedie"}
)
_LIGHTGBM_OTHER = ("\naverage_output", "\n[linear_tree: 1]", "\n[zero_as_missing: 1]")
_XGBOOST_PLAIN = frozenset(
    {
        "binary:logistic", "multi:softprob", "reg:squarederror", "reg:absoluteerror", "reg:squaredlogerror",
        "reg:pseudohubererror", "reg:quantileerror", "count:poisson", "reg:gamma", "reg:tweedie",
    }
)  # fmt: skip


def beyond_onnxmltools(model: Any) -> bool:
    """Whether a fitted estimator of LightGBM or XGBoost predicts in a way that onnxmltools does not write.

    Pandas' categories, forests, dart and gblinear of XGBoost, several targets, ranks, other objectives and links, and
    other missing values than NaN.
    """
    booster = getattr(model, "_Booster", None)
    if booster is None:
        return False
    if type(model).__module__.partition(".")[0] == "lightgbm":
        text = booster.model_to_string(num_iteration=1)
        name, *options = next((line for line in text.split("\n") if line.startswith("objective=")), "=").split()
        plain = name.partition("=")[2] in _LIGHTGBM_PLAIN and "sqrt" not in options
        return bool(booster.pandas_categorical) or not plain or any(line in text for line in _LIGHTGBM_OTHER)
    learner = json.loads(booster.save_config())["learner"]
    missing = getattr(model, "missing", np.nan)
    return (
        "c" in (booster.feature_types or [])
        or type(model).__name__.startswith("XGBRF")
        or learner["gradient_booster"]["name"] != "gbtree"
        or learner["objective"]["name"] not in _XGBOOST_PLAIN
        or int(learner["learner_model_param"].get("num_target", 1)) > 1
        or (missing is not None and missing == missing)
    )


def adopt_lightgbm(model: Any) -> Any:
    """A fitted estimator of LightGBM as one with trees of its own, whatever onnxmltools makes of it."""
    return _adopt_lightgbm(model, model.booster_, None)


def _adopt_lightgbm(model: Any, booster: Any, frame: "pandas.DataFrame | None") -> Any:
    dump = booster.dump_model(num_iteration=1)
    categories = _lightgbm_categories(booster, dump, frame)
    name = str(dump.get("objective", "")).split(" ")[0]
    classes = getattr(model, "classes_", None) if booster is not model else None
    if classes is None and name in ("binary", "multiclass", "multiclassova"):
        classes = np.arange(max(int(dump["num_class"]), 2))
    return _wrapped(model, booster, "lightgbm", categories, classes)


def _lightgbm_categories(booster: Any, dump: Any, frame: Any) -> Mapping[int, Sequence[Any]]:
    import pandas

    lists = booster.pandas_categorical or []
    if not lists:
        return {}
    infos = [dump["feature_infos"].get(name, {}) for name in dump["feature_names"]]
    places = [place for place, info in enumerate(infos) if info.get("values")]
    if len(places) != len(lists) and frame is not None and frame.shape[1] >= len(infos):
        known = [name.replace(" ", "_") for name in map(str, frame.columns)]
        places = [
            place
            for place, name in enumerate(dump["feature_names"])
            if name in known and isinstance(frame.iloc[:, known.index(name)].dtype, pandas.CategoricalDtype)
        ]
    if len(places) != len(lists):
        raise ConversionFailed(
            f"The booster was trained on {len(lists)} columns of pandas' categories and does not say which. Pass a "
            f"sample in which they are: frame.astype({{'city': 'category'}}). It has {listed(dump['feature_names'])}."
        )
    return dict(zip(places, lists, strict=True))


def _adopt_xgboost(model: Any, booster: Any, frame: "pandas.DataFrame | None") -> Any:
    learner = json.loads(bytes(booster.save_raw("json")))["learner"]
    gradient = learner["gradient_booster"]
    forest = gradient["gbtree"]["model"] if "gbtree" in gradient else gradient.get("model", {})
    encoders = forest.get("cats", {}).get("enc", [])
    categories = {
        place: items
        for place, encoder in enumerate(encoders)
        if (items := _xgboost_items(encoder, _texts_of(frame, place, booster.feature_names)))
    }
    name = learner["objective"]["name"]
    classes = getattr(model, "classes_", None) if booster is not model else None
    targets = int(learner["learner_model_param"].get("num_target", 1))
    if classes is not None and targets > 1:
        classes = np.arange(targets)  # of several labels, each is no or yes
    if classes is None and name in ("binary:logistic", "multi:softprob"):
        classes = np.arange(max(int(learner["learner_model_param"]["num_class"]), 2))
    if name in ("multi:softmax", "binary:hinge") and booster is model:
        raise ConversionFailed(
            f"A Booster with objective {name!r} gives no probabilities. Train with 'multi:softprob'."
        )
    best = booster.attr("best_iteration") if booster is not model else None
    missing = getattr(model, "missing", None)
    return _wrapped(model, booster, "xgboost", categories, classes, missing, int(best) + 1 if best else None)


def _xgboost_items(encoder: dict[str, Any], texts: Sequence[str]) -> list[Any]:
    """The categories of a column as XGBoost stores them: texts as the ends of each in their bytes, or numbers.

    XGBoost 3.2 takes the count of letters for that of bytes, so a text with letters beyond ASCII is cut; `texts`, the
    values of the sample, tell which one it was.
    """
    values = encoder.get("values", [])
    ends = encoder.get("offsets")
    if ends is None:
        return list(values)
    whole = {text.encode()[: len(text)]: text for text in texts}
    data = bytes(value % 256 for value in values)
    return [whole.get(data[start:end]) or data[start:end].decode(errors="replace") for start, end in pairwise(ends)]


def _texts_of(frame: "pandas.DataFrame | None", place: int, names: Sequence[str] | None) -> list[str]:
    import pandas

    if frame is None or place >= frame.shape[1]:
        return []
    named = names is not None and names[place] in frame.columns
    column = frame[names[place]] if named and names is not None else frame.iloc[:, place]
    values = column.dtype.categories if isinstance(column.dtype, pandas.CategoricalDtype) else column.dropna().unique()
    return [value for value in values if isinstance(value, str)]


def _wrapped(
    model: Any,
    booster: Any,
    package: str,
    categories: Mapping[int, Sequence[Any]],
    classes: Any,
    missing: float | None = None,
    rounds: int | None = None,
) -> Any:
    kind = BoostedClassifier if classes is not None else BoostedRegressor
    wrapped = kind(model, booster, package, categories, missing, rounds)
    if classes is not None:
        wrapped.classes_ = np.asarray(classes)
    return wrapped
