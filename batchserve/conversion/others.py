"""CatBoost's estimators and the results of statsmodels, as estimators of scikit-learn."""

import json
import tempfile
from pathlib import Path
from typing import Any, Self

import numpy as np
from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin

from batchserve.conversion.sample import Array, listed
from batchserve.errors import ConversionFailed


class CatBoosted(BaseEstimator):  # type: ignore[misc]
    """An estimator of CatBoost; predicts as it does."""

    classes_: Array | None = None

    def __init__(self, original: Any) -> None:
        self.original = original
        names = [str(name) for name in original.feature_names_]
        self.n_features_in_ = len(names)
        if names != [str(place) for place in range(len(names))]:
            self.feature_names_in_ = np.asarray(names, dtype=object)

    def fit(self, x: Any, y: Any = None) -> Self:  # noqa: ARG002 - scikit-learn's signature
        return self

    def predict(self, x: Any) -> Array:
        """[N]: labels or numbers."""
        answers = np.asarray(self.original.predict(x))
        return answers.reshape(len(answers)) if answers.size == len(answers) else answers

    def loss(self) -> str:
        """The name of what was minimised."""
        return str(self.original.get_all_params().get("loss_function", "")).partition(":")[0]

    def stored(self) -> dict[str, Any]:
        """What CatBoost writes as JSON."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.json"
            self.original.save_model(str(path), format="json")
            stored: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return stored


class CatBoostedClassifier(ClassifierMixin, CatBoosted):  # type: ignore[misc]
    """With labels and probabilities."""

    def predict(self, x: Any) -> Array:
        """[N]: the labels, as the classes have them."""
        assert self.classes_ is not None
        labels = super().predict(x)
        return labels == "True" if self.classes_.dtype == bool and labels.dtype.kind in "OU" else labels

    def predict_proba(self, x: Any) -> Array:
        """[N, classes]"""
        return np.asarray(self.original.predict_proba(x))


class CatBoostedRegressor(RegressorMixin, CatBoosted):  # type: ignore[misc]
    """With one number."""


class Linear(RegressorMixin, BaseEstimator):  # type: ignore[misc]
    """The results of a GLM, Logit, Probit, Poisson, OLS or WLS of statsmodels."""

    def __init__(self, original: Any, columns: list[str], coefficients: Array, intercept: float, link: str) -> None:
        self.original, self.coefficients, self.intercept, self.link = original, coefficients, intercept, link
        self.n_features_in_ = len(columns)
        if not all((column.startswith("x") and column[1:].isdigit()) or column == "const" for column in columns):
            self.feature_names_in_ = np.asarray(columns, dtype=object)

    def fit(self, x: Any, y: Any = None) -> Self:  # noqa: ARG002 - scikit-learn's signature
        return self

    def predict(self, x: Any) -> Array:
        """[N]: the mean that the model expects, for a binary one its probability."""
        return np.asarray(self.original.predict(x)).reshape(-1)


_LINKS = {
    "Logit": "logit", "Probit": "probit", "Poisson": "log", "NegativeBinomial": "log", "OLS": "identity",
    "WLS": "identity", "GLS": "identity", "RLM": "identity",
}  # fmt: skip


def adopt_other(model: Any) -> Any:
    """These two as estimators of scikit-learn; anything else is given back as it is."""
    package = type(model).__module__.partition(".")[0]
    if package == "catboost":
        return _adopt_catboost(model)
    return _adopt_statsmodels(model) if package == "statsmodels" else model


def _adopt_catboost(model: Any) -> Any:
    if not model.is_fitted():
        raise ConversionFailed("The model of CatBoost is not fitted.")
    classes = np.asarray(model.classes_)
    if not len(classes):
        return CatBoostedRegressor(model)
    adopted = CatBoostedClassifier(model)
    adopted.classes_ = classes == "True" if set(classes.tolist()) == {"False", "True"} else classes
    return adopted


def _adopt_statsmodels(model: Any) -> Any:
    inner = model.model
    kind = type(inner).__name__
    link = type(inner.family.link).__name__ if kind == "GLM" else _LINKS.get(kind)
    if link is None:
        raise ConversionFailed(
            f"{kind} of statsmodels has no ONNX converter. GLM, Logit, Probit, Poisson, OLS and WLS have."
        )
    names = [str(name) for name in inner.exog_names]
    parameters = np.asarray(model.params, dtype=np.float64)[: len(names)]
    intercept = 0.0
    if hasattr(inner, "formula"):
        if "Intercept" in names:
            place = names.index("Intercept")
            intercept, parameters = float(parameters[place]), np.delete(parameters, place)
            names.remove("Intercept")
        known = set(inner.data.frame.columns)
        if strange := [name for name in names if name not in known]:
            raise ConversionFailed(
                f"The formula computes {listed(strange)} from the columns, which is not in the graph. Fit on columns "
                "that are computed before (statsmodels.api with add_constant), or use a pipeline of scikit-learn."
            )
    return Linear(model, names, parameters, intercept, str(link))
