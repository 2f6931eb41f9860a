"""Trees of scikit-learn that skl2onnx leaves out, and what LightGBM and XGBoost store."""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from batchserve.conversion.adoption import adopt, adopt_lightgbm
from batchserve.conversion.converters.algebra import label_of, sigmoid, softmax
from batchserve.conversion.converters.ensembles import Leaf, Split, Tree, classifier, encoded, regressor, side_by_side
from batchserve.conversion.converters.tape import Expression, Tape
from batchserve.errors import ConversionFailed

# --- scikit-learn ----------------------------------------------------------------------------------------------------


def beyond_skl2onnx(model: Any) -> bool:
    """Whether it has categories, or a link that skl2onnx leaves out."""
    return model.is_categorical_ is not None or getattr(model, "loss", "") in ("poisson", "gamma")


def histogram(tape: Tape, model: Any) -> Any:
    """HistGradientBoostingClassifier and HistGradientBoostingRegressor."""
    categorical = np.zeros(model.n_features_in_, bool) if model.is_categorical_ is None else model.is_categorical_
    places = np.flatnonzero(categorical)
    encoder = model._preprocessor.named_transformers_["encoder"] if len(places) else None
    categories = dict(zip(places.tolist(), encoder.categories_, strict=True)) if encoder is not None else {}
    categories = {place: [item for item in items if item == item] for place, items in categories.items()}
    # Its own encoder puts the columns with categories first.
    order = [*places.tolist(), *np.flatnonzero(~categorical).tolist()] if len(places) else None
    x = encoded(tape, categories, order)
    trees = [
        Tree(_histogram_node(predictor, 0), target)
        for round_ in model._predictors
        for target, predictor in enumerate(round_)
    ]
    base = np.asarray(model._baseline_prediction, dtype=np.float64).reshape(-1).tolist()
    if hasattr(model, "classes_"):
        return classifier(tape, x, trees, base, model.classes_, "LOGISTIC" if len(base) == 1 else "SOFTMAX")
    raw = regressor(tape, x, trees, base)
    return np.exp(raw) if model.loss in ("poisson", "gamma") else raw


def _histogram_node(predictor: Any, place: int) -> Split | Leaf:
    node = predictor.nodes[place]
    if node["is_leaf"]:
        return Leaf(float(node["value"]))
    yes, no = _histogram_node(predictor, int(node["left"])), _histogram_node(predictor, int(node["right"]))
    feature, missing = int(node["feature_idx"]), bool(node["missing_go_to_left"])
    if not node["is_categorical"]:
        return Split(feature, yes, no, missing, threshold=float(node["num_threshold"]))
    bits = predictor.raw_left_cat_bitsets[int(node["bitset_idx"])]
    return Split(feature, yes, no, missing, members=_members(bits))


def _members(words: Any) -> frozenset[int]:
    return frozenset(32 * place + bit for place, word in enumerate(words) for bit in range(32) if int(word) >> bit & 1)


def embedding(tape: Tape, model: Any) -> Any:
    """RandomTreesEmbedding: for each leaf of each tree whether a record ends in it."""
    trees: list[Tree] = []
    width = 0
    for estimator, leaves in zip(model.estimators_, model.one_hot_encoder_.categories_, strict=True):
        targets = {int(leaf): width + place for place, leaf in enumerate(leaves)}
        trees.append(Tree(_embedded(estimator.tree_, 0, targets), 0))
        width += len(leaves)
    return regressor(tape, tape.merged(), trees, [0.0] * width)


def _embedded(tree: Any, place: int, targets: dict[int, int]) -> Split | Leaf:
    yes, no = int(tree.children_left[place]), int(tree.children_right[place])
    if yes == no:
        known = place in targets
        return Leaf(1.0 if known else 0.0, targets[place] if known else 0)
    return Split(
        int(tree.feature[place]), _embedded(tree, yes, targets), _embedded(tree, no, targets),
        bool(tree.missing_go_to_left[place]), threshold=float(tree.threshold[place]),
    )  # fmt: skip


def forest(tape: Tape, model: Any) -> Any:
    """Trees and forests of scikit-learn by the sums of their leaves, of which those of pure leaves are exact.

    So two classes of equal probability stay equal, and the first one is the label; and a missing value goes where
    training sent it.
    """
    estimators = [model] if hasattr(model, "tree_") else model.estimators_
    classes = getattr(model, "classes_", None)
    if isinstance(classes, list):
        return side_by_side(tape, [_voted(tape, estimators, known, place) for place, known in enumerate(classes)])
    if classes is not None:
        return _voted(tape, estimators, classes, 0)
    trees = [Tree(_grown(estimator.tree_, 0), 0) for estimator in estimators]
    return regressor(tape, tape.merged(), trees, [0.0] * model.n_outputs_) / float(len(trees))


def _voted(tape: Tape, estimators: Sequence[Any], classes: Any, target: int) -> tuple[Expression, Expression]:
    trees = [Tree(_grown(estimator.tree_, 0, target), 0) for estimator in estimators]
    raw = regressor(tape, tape.merged(), trees, [0.0] * len(classes))
    return label_of(tape, classes, raw.argmax()), raw / float(len(trees))


def _grown(tree: Any, place: int, output: int | None = None) -> Split | Leaf:
    """`output`: the target whose values are those of the leaves; None: all are."""
    yes, no = int(tree.children_left[place]), int(tree.children_right[place])
    if yes == no:
        held = tree.value[place].reshape(-1) if output is None else tree.value[place][output]
        values = [(target, float(value)) for target, value in enumerate(held) if value]
        (target, value), *more = values or [(0, 0.0)]
        return Leaf(value, target, tuple(more))
    return Split(
        int(tree.feature[place]), _grown(tree, yes, output), _grown(tree, no, output),
        bool(tree.missing_go_to_left[place]),
        threshold=float(tree.threshold[place]),
    )  # fmt: skip


# --- LightGBM and XGBoost --------------------------------------------------------------------------------------------


def boosted(tape: Tape, model: Any) -> Any:
    """What `batchserve.conversion.adoption` wraps, or what it would wrap: a part of another estimator."""
    adopted = adopt(model, None)
    read = _lightgbm if adopted.package == "lightgbm" else _xgboost
    return read(tape, adopted)


def lightgbm_scores(tape: Tape, model: Any) -> Expression:
    """What `decision_function` of a classifier gives."""
    scores: Expression = _lightgbm(tape, adopt_lightgbm(model.original), as_scores=True)
    return scores


def _lightgbm(tape: Tape, model: Any, *, as_scores: bool = False) -> Any:
    dump = model.booster.dump_model()
    x = encoded(tape, model.categories)
    zeros: set[int] = set()
    width = int(dump["num_tree_per_iteration"])
    trees = [
        Tree(_lightgbm_node(item["tree_structure"], zeros), place % width)
        for place, item in enumerate(dump["tree_info"])
    ]
    if zeros:
        chosen = np.isin(np.arange(x.shape[1]), sorted(zeros))
        x = np.where(chosen & (np.abs(x) <= 1e-35), np.nan, x)
    infos = [dump["feature_infos"].get(column, {}) for column in dump["feature_names"]]
    coded = np.array([bool(info.get("values")) and place not in model.categories for place, info in enumerate(infos)])
    if coded.any():  # a category that is given as a number counts without its fraction
        x = np.where(coded, np.sign(x) * np.floor(np.abs(x)), x)
    name, *options = str(dump.get("objective", "")).split()
    settings = dict(option.split(":") for option in options if ":" in option)
    base = [0.0] * width
    if dump.get("average_output"):  # a forest
        trees = [Tree(_scaled(tree.root, width / len(trees)), tree.target) for tree in trees]
    if as_scores:
        return regressor(tape, x, trees, base)
    if model.classes_ is not None and name in ("binary", "multiclass"):
        scale = float(settings.get("sigmoid", 1.0)) if name == "binary" else 1.0
        trees = [Tree(_scaled(tree.root, scale), tree.target) for tree in trees] if scale != 1.0 else trees
        return classifier(tape, x, trees, base, model.classes_, "LOGISTIC" if width == 1 else "SOFTMAX")
    raw = regressor(tape, x, trees, base)
    if model.classes_ is not None:  # multiclassova
        chances = sigmoid(raw * float(settings.get("sigmoid", 1.0)))
        return label_of(tape, model.classes_, chances.argmax()), chances
    return _lightgbm_link(raw, name, options)


def _lightgbm_link(raw: Expression, name: str, options: list[str]) -> Expression:
    if name in ("poisson", "gamma", "tweedie"):
        return np.exp(raw)
    if name == "cross_entropy":
        return sigmoid(raw)
    if name == "cross_entropy_lambda":
        return np.log(1.0 + np.exp(raw))
    if "sqrt" in options:
        return np.sign(raw) * raw * raw
    return raw


def _scaled(node: Split | Leaf, factor: float) -> Split | Leaf:
    if isinstance(node, Leaf):
        return Leaf(node.value * factor)
    return Split(
        node.feature, _scaled(node.yes, factor), _scaled(node.no, factor), node.missing_yes, node.threshold,
        node.strict, node.members,
    )  # fmt: skip


def _lightgbm_node(node: dict[str, Any], zeros: set[int]) -> Split | Leaf:
    if "leaf_value" in node:
        if node.get("leaf_coeff"):
            raise ConversionFailed("LightGBM's linear_tree has no ONNX converter. Train without it.")
        return Leaf(float(node["leaf_value"]))
    yes, no = _lightgbm_node(node["left_child"], zeros), _lightgbm_node(node["right_child"], zeros)
    feature = int(node["split_feature"])
    if node["decision_type"] == "==":
        members = frozenset(int(code) for code in str(node["threshold"]).split("||"))
        return Split(feature, yes, no, missing_yes=False, members=members)
    threshold = float(node["threshold"])
    missing = node["missing_type"]
    if missing == "Zero":
        zeros.add(feature)
    missing_yes = bool(node["default_left"]) if missing != "None" else threshold >= 0  # without a way, NaN is 0
    return Split(feature, yes, no, missing_yes, threshold=threshold)


def _xgboost(tape: Tape, model: Any) -> Any:
    learner = json.loads(bytes(model.booster.save_raw("json")))["learner"]
    booster, name, parameters = (
        learner["gradient_booster"],
        learner["objective"]["name"],
        learner["learner_model_param"],
    )
    x = encoded(tape, model.categories)
    if model.missing is not None and model.missing == model.missing:
        x = np.where(np.equal(x, float(model.missing)), np.nan, x)
    targets = int(parameters.get("num_target", 1))
    width = max(int(parameters["num_class"]), targets, 1)
    base = np.atleast_1d(np.asarray(json.loads(parameters["base_score"].lower()), dtype=np.float64))
    base = np.broadcast_to(_xgboost_margin(base, name), (width,)).tolist()
    trees = None if booster["name"] == "gblinear" else _xgboost_trees(booster, model.rounds)
    if model.classes_ is not None and targets == 1 and trees is not None and name != "binary:hinge":
        return classifier(tape, x, trees, base, model.classes_, "LOGISTIC" if width == 1 else "SOFTMAX")
    raw = _xgboost_linear(x, booster, base) if trees is None else regressor(tape, x, trees, base)
    if model.classes_ is not None:
        return _xgboost_classes(tape, model.classes_, raw, name, targets)
    if name in ("reg:logistic", "binary:logistic"):
        return sigmoid(raw)
    if name in ("count:poisson", "reg:gamma", "reg:tweedie", "survival:cox", "survival:aft"):
        return np.exp(raw)
    return raw


def _xgboost_trees(booster: dict[str, Any], end: int | None) -> list[Tree]:
    weights = booster.get("weight_drop")
    forest = booster["gbtree"]["model"] if "gbtree" in booster else booster["model"]
    trees, info = forest["trees"], forest["tree_info"]
    if end is not None:
        count = forest["iteration_indptr"][end]
        trees, info = trees[:count], info[:count]
    if any(int(tree["tree_param"]["size_leaf_vector"]) > 1 for tree in trees):
        raise ConversionFailed(
            "XGBoost's multi_strategy='multi_output_tree' has no ONNX converter. Use 'one_output_per_tree'."
        )
    return [
        Tree(_scaled(_xgboost_node(tree, 0, _xgboost_members(tree)), weights[place] if weights else 1.0), target)
        for place, (tree, target) in enumerate(zip(trees, info, strict=True))
    ]


def _xgboost_linear(x: Expression, booster: dict[str, Any], base: Sequence[float]) -> Expression:
    """gblinear: a missing value counts as 0, and all classes have the base of the first."""
    weights = np.asarray(booster["model"]["weights"], dtype=np.float64).reshape(-1, len(base))
    return np.where(np.isnan(x), 0.0, x) @ weights[:-1] + (weights[-1] + base[0])


def _xgboost_classes(tape: Tape, classes: Any, raw: Expression, name: str, targets: int) -> tuple[Any, Any]:
    if name == "binary:hinge":
        second = (raw > 0).to("f")
    elif targets > 1:  # several labels, each no or yes
        return (raw > 0).to("i"), sigmoid(raw)
    elif raw.shape[1] > 1:
        return label_of(tape, classes, raw.argmax()), softmax(tape, raw)
    else:
        second = sigmoid(raw)
    chances = tape.concat([1.0 - second, second])
    return label_of(tape, classes, chances.argmax()), chances


def _xgboost_margin(base: Any, name: str) -> Any:
    if name in ("binary:logistic", "reg:logistic"):
        return np.log(base / (1 - base))
    if name in ("count:poisson", "reg:gamma", "reg:tweedie", "survival:cox", "survival:aft"):
        return np.log(base)
    return base


def _xgboost_members(tree: dict[str, Any]) -> dict[int, frozenset[int]]:
    """The categories of a node, which go to the right."""
    rows = zip(tree["categories_nodes"], tree["categories_segments"], tree["categories_sizes"], strict=True)
    return {node: frozenset(tree["categories"][start : start + size]) for node, start, size in rows}


def _xgboost_node(tree: dict[str, Any], place: int, members: dict[int, frozenset[int]]) -> Split | Leaf:
    left, right = tree["left_children"][place], tree["right_children"][place]
    if left < 0:
        return Leaf(_float32(tree["split_conditions"][place]))
    low, high = _xgboost_node(tree, left, members), _xgboost_node(tree, right, members)
    feature, missing_low = int(tree["split_indices"][place]), bool(tree["default_left"][place])
    if place in members:
        return Split(feature, high, low, not missing_low, members=members[place])
    return Split(feature, low, high, missing_low, threshold=_float32(tree["split_conditions"][place]), strict=True)


def _float32(shortest: float) -> float:
    """The number in float32 that the file has the shortest digits of."""
    return float(np.float32(shortest))
