"""What the numbers of an output are, by the operator that makes them: values of one run may be rounded."""

from collections.abc import Mapping
from typing import Literal

import numpy as np
from onnx import AttributeProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

__all__ = ["role_by_operator"]

Role = Literal["probabilities", "scores"]

_PASSING = frozenset({
    "ArrayFeatureExtractor", "Cast", "Flatten", "Gather", "Identity", "Reshape", "SequenceAt", "Slice", "Squeeze",
    "Transpose", "Unsqueeze", "ZipMap",
})  # fmt: skip
"""Operators that give numbers on as they are."""
_TOLERANCE = 1e-3


def role_by_operator(model: ModelProto, name: str) -> Role | None:
    """Probabilities or scores; None: the operator leaves it open."""
    makers = {output: node for node in model.graph.node for output in node.output if output}
    named = "prob" in name.lower()
    node = makers.get(name)
    while node is not None and node.op_type in _PASSING and node.input:
        name = node.input[0]
        node = makers.get(name)
    if node is not None and node.op_type == "Sigmoid":  # of each class alone: they need not add up to 1
        return "probabilities" if named else "scores"
    return None if node is None else _role(node)


def _role(node: NodeProto) -> Role | None:
    given = {attribute.name: attribute for attribute in node.attribute}
    match node.op_type:
        case "Softmax":
            return "probabilities"
        case "LogSoftmax":
            return "scores"
        case "Normalizer":
            return "probabilities" if _text(given, "norm", "MAX") == "L1" else None
        case "LinearClassifier":
            return "scores" if _text(given, "post_transform", "NONE") == "NONE" else "probabilities"
        case "SVMClassifier":
            return "probabilities" if "prob_a" in given and given["prob_a"].floats else "scores"
        case "TreeEnsembleClassifier":
            if _text(given, "post_transform", "NONE") != "NONE":
                return "probabilities"
            return "probabilities" if _adds_up_to_one(given) else "scores"
    return None


def _text(given: Mapping[str, AttributeProto], name: str, default: str) -> str:
    return given[name].s.decode(errors="replace") if name in given else default


def _adds_up_to_one(given: Mapping[str, AttributeProto]) -> bool:
    """Whether the leaves of a forest hold shares of the classes: whichever it reaches, they add up to 1."""

    def values(name: str) -> np.ndarray:
        if name not in given:
            return np.zeros(0)
        value = helper.get_attribute_value(given[name])
        return numpy_helper.to_array(value) if isinstance(value, TensorProto) else np.asarray(value)

    weights = values("class_weights") if "class_weights" in given else values("class_weights_as_tensor")
    trees, leaves, classes = (values(f"class_{of}") for of in ("treeids", "nodeids", "ids"))
    if not len(weights) or not len(trees) == len(leaves) == len(classes) == len(weights) or (weights < 0).any():
        return False
    if values("base_values").any() or values("base_values_as_tensor").any():
        return False
    _, place = np.unique(np.stack([trees, leaves]), axis=1, return_inverse=True)
    sums = np.bincount(place.reshape(-1), weights)
    of_leaf = np.zeros(len(sums), dtype=np.int64)
    of_leaf[place.reshape(-1)] = np.unique(trees, return_inverse=True)[1].reshape(-1)
    most = np.full(of_leaf.max() + 1, -np.inf)
    least = np.full(of_leaf.max() + 1, np.inf)
    np.maximum.at(most, of_leaf, sums)
    np.minimum.at(least, of_leaf, sums)
    alone = len(np.unique(classes)) == 1  # the share of one class of two: the other one has the rest
    return bool(most.sum() <= 1 + _TOLERANCE and (alone or least.sum() >= 1 - _TOLERANCE))
