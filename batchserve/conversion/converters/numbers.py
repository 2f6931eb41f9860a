"""CatBoost's trees and the linear predictors of statsmodels."""

from typing import Any

import numpy as np

from batchserve.conversion.converters.algebra import sigmoid
from batchserve.conversion.converters.ensembles import Leaf, Split, Tree, classifier, encoded, regressor
from batchserve.conversion.converters.tape import Expression, Tape
from batchserve.conversion.converters.transforms import normal_cdf
from batchserve.errors import ConversionFailed


def catboost(tape: Tape, model: Any) -> Any:
    """From what CatBoost exports as JSON: trees, and a scale and a bias."""
    stored = model.stored()
    floats = stored["features_info"].get("float_features", [])
    if stored["features_info"].get("categorical_features") or stored["features_info"].get("text_features"):
        raise ConversionFailed(
            "CatBoost's cat_features and text_features have no ONNX form: it stores hashes of their values. Put an "
            "OrdinalEncoder or OneHotEncoder in front and train without cat_features."
        )
    scale, bias = stored["scale_and_bias"]
    columns = [int(item["flat_feature_index"]) for item in floats]
    missing = [item["nan_value_treatment"] == "AsTrue" for item in floats]
    trees = [
        tree
        for item in stored.get("oblivious_trees") or stored.get("trees", [])
        for tree in (
            _oblivious(item, columns, missing, scale, len(bias))
            if "splits" in item
            else _free(item, columns, missing, scale, len(bias))
        )
    ]
    x = encoded(tape, {})
    loss = model.loss()
    if model.classes_ is not None and loss != "MultiClassOneVsAll":
        return classifier(tape, x, trees, bias, model.classes_, "LOGISTIC" if len(bias) == 1 else "SOFTMAX")
    raw = regressor(tape, x, trees, bias)
    if model.classes_ is not None:
        raise ConversionFailed("CatBoost's MultiClassOneVsAll has no ONNX converter. Train with MultiClass.")
    return np.exp(raw) if loss in ("Poisson", "Tweedie") else raw


def _oblivious(tree: dict[str, Any], columns: list[int], missing: list[bool], scale: float, width: int) -> list[Tree]:
    """A tree whose levels share a split; the bit of a split in the number of a leaf says: above the border."""
    values, splits = tree["leaf_values"], tree["splits"]

    def grow(level: int, leaf: int, target: int) -> Split | Leaf:
        if level < 0:
            return Leaf(float(values[leaf * width + target]) * scale)
        below, above = grow(level - 1, leaf, target), grow(level - 1, leaf | 1 << level, target)
        return _border(splits[level], below, above, columns, missing)

    return [Tree(grow(len(splits) - 1, 0, target), target) for target in range(width)]


def _free(tree: dict[str, Any], columns: list[int], missing: list[bool], scale: float, width: int) -> list[Tree]:
    """A tree of grow_policy Depthwise or Lossguide."""

    def grow(node: dict[str, Any], target: int) -> Split | Leaf:
        if "split" not in node:
            value = node["value"]
            return Leaf(float(value[target] if isinstance(value, list) else value) * scale)
        below, above = grow(node["left"], target), grow(node["right"], target)
        return _border(node["split"], below, above, columns, missing)

    return [Tree(grow(tree, target), target) for target in range(width)]


def _border(
    split: dict[str, Any], below: Split | Leaf, above: Split | Leaf, columns: list[int], missing: list[bool]
) -> Split:
    place = int(split["float_feature_index"])
    border = float(np.float32(split["border"]))
    return Split(columns[place], below, above, not missing[place], threshold=border)


def linear(tape: Tape, model: Any) -> Expression:
    """A linear predictor of statsmodels, and the inverse of its link."""
    raw = tape.merged() @ np.asarray(model.coefficients)[:, None] + float(model.intercept)
    match model.link:
        case "identity" | "Identity":
            return raw
        case "log" | "Log":
            return np.exp(raw)
        case "logit" | "Logit":
            return sigmoid(raw)
        case "probit" | "Probit" | "CDFLink":
            return normal_cdf(raw)
        case "InversePower" | "inverse_power":
            return 1.0 / raw
        case "InverseSquared":
            return 1.0 / np.sqrt(raw)
        case "Sqrt" | "sqrt":
            return raw * raw
        case "CLogLog" | "cloglog":
            return 1.0 - np.exp(np.exp(raw) * -1.0)
    raise ConversionFailed(f"The link {model.link} of statsmodels has no ONNX converter. Use log, logit or probit.")
