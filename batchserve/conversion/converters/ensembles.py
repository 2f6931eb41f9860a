"""Tree ensembles written node by node: those of HistGradientBoosting, LightGBM and XGBoost, with their categories."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from batchserve.conversion.converters.tape import EXAMPLES, Expression, Tape, Value

Transform = Literal["NONE", "LOGISTIC", "SOFTMAX"]


@dataclass(frozen=True, slots=True)
class Leaf:
    value: float
    target: int | None = None
    """None: that of its tree."""
    more: tuple[tuple[int, float], ...] = ()
    """Further targets, each with its value."""


@dataclass(frozen=True, slots=True)
class Split:
    """Which way a record goes: `yes` where its feature is at most (below, for `strict`) the threshold, or a member."""

    feature: int
    yes: "Split | Leaf"
    no: "Split | Leaf"
    missing_yes: bool
    threshold: float = math.nan
    strict: bool = False
    members: frozenset[int] | None = None
    """Codes of categories, for which the way is `yes`; None: a split by the threshold."""


@dataclass(frozen=True, slots=True)
class Tree:
    root: Split | Leaf
    target: int


@dataclass
class _Nodes:
    """The attributes of the operator, as lists that grow."""

    lists: dict[str, list[Any]] = field(default_factory=dict)

    def add(self, **values: Any) -> None:
        for name, value in values.items():
            self.lists.setdefault(name, []).append(value)


def attributes(trees: Sequence[Tree], kind: Literal["class", "target"]) -> dict[str, Any]:
    """The nodes of the operator. A split by members is a row of equalities that share the way of `yes`."""
    nodes = _Nodes()
    for number, tree in enumerate(trees):
        _write(nodes, tree, number, kind)
    return nodes.lists


def _write(nodes: _Nodes, tree: Tree, number: int, kind: str) -> None:
    ids: Iterator[int] = iter(range(2**31))
    waiting: list[tuple[Split | Leaf, int]] = [(tree.root, next(ids))]
    while waiting:
        node, own = waiting.pop()
        if isinstance(node, Leaf):
            _node(nodes, number, own, "LEAF", 0, 0.0, 0, 0, 0)
            for target, value in ((tree.target if node.target is None else node.target, node.value), *node.more):
                nodes.add(
                    **{f"{kind}_treeids": number, f"{kind}_nodeids": own, f"{kind}_ids": target},
                    **{f"{kind}_weights": float(np.float32(value))},
                )
            continue
        yes, no, missing = next(ids), next(ids), int(node.missing_yes)
        if node.members is None:
            mode = "BRANCH_LT" if node.strict else "BRANCH_LEQ"
            _node(nodes, number, own, mode, node.feature, _rounded(node.threshold, node.strict), yes, no, missing)
        else:
            members = sorted(node.members) or [-1]  # no category at all
            for place, member in enumerate(members):
                following = no if place == len(members) - 1 else next(ids)
                _node(nodes, number, own, "BRANCH_EQ", node.feature, float(member), yes, following, missing)
                own = following
        waiting += [(node.no, no), (node.yes, yes)]


def _node(
    nodes: _Nodes, tree: int, own: int, mode: str, feature: int, value: float, yes: int, no: int, missing: int
) -> None:
    nodes.add(
        nodes_treeids=tree, nodes_nodeids=own, nodes_modes=mode, nodes_featureids=feature, nodes_values=value,
        nodes_truenodeids=yes, nodes_falsenodeids=no, nodes_missing_value_tracks_true=missing, nodes_hitrates=1.0,
    )  # fmt: skip


def _rounded(threshold: float, strict: bool) -> float:
    """As float32: down for at most, up for below, so that each number in float32 goes the way that it went."""
    near = np.float32(threshold)
    if not strict and near > threshold:
        near = np.nextafter(near, np.float32(-np.inf))
    if strict and near < threshold:
        near = np.nextafter(near, np.float32(np.inf))
    return float(near)


def regressor(tape: Tape, x: Expression, trees: Sequence[Tree], base: Sequence[float], average: bool = False) -> Value:
    """[N, targets]: the sums (or means) of the leaves, and the base."""
    targets = len(base)
    more: dict[str, Any] = {"aggregate_function": "AVERAGE"} if average else {}
    if any(base):
        more["base_values"] = [float(value) for value in base]
    return tape.node(
        "TreeEnsembleRegressor", x, example=np.zeros((EXAMPLES, targets), np.float32), domain="ai.onnx.ml", version=3,
        n_targets=targets, post_transform="NONE", **attributes(trees, "target"), **more,
    )  # fmt: skip


def classifier(
    tape: Tape, x: Expression, trees: Sequence[Tree], base: Sequence[float], classes: Any, transform: Transform
) -> tuple[Value, Value]:
    """Label and probabilities; for two classes the trees speak of the second alone."""
    classes = np.asarray(classes)
    texts = classes.dtype.kind in "OUS"
    labels: dict[str, Any] = (
        {"classlabels_strings": [str(label) for label in classes]}
        if texts
        else {"classlabels_int64s": [int(label) for label in classes]}
    )
    if len(base) == 1 and transform == "LOGISTIC" and not _negative(trees):
        # ONNX Runtime takes a sum of weights of which none is negative for a probability.
        trees, base = [*trees, Tree(Leaf(-1.0), 0)], [base[0] + 1.0]
    if any(base):
        labels["base_values"] = [float(value) for value in base]
    examples = (np.zeros(EXAMPLES, object if texts else np.int64), np.zeros((EXAMPLES, len(classes)), np.float32))
    label, chances = tape.nodes(
        "TreeEnsembleClassifier", x, examples=examples, domain="ai.onnx.ml", version=3,
        post_transform=transform, **attributes(trees, "class"), **labels,
    )  # fmt: skip
    return label, chances


def _negative(trees: Sequence[Tree]) -> bool:
    waiting: list[Split | Leaf] = [tree.root for tree in trees]
    while waiting:
        node = waiting.pop()
        if isinstance(node, Leaf):
            if np.float32(node.value) < 0:
                return True
        else:
            waiting += [node.yes, node.no]
    return False


def codes(tape: Tape, column: Expression, categories: Sequence[Any]) -> Expression:
    """[N, 1]: the place of a category among all, NaN for others and for a missing one."""
    texts = [str(item) for item in categories]
    places = [float(place) for place in range(len(texts))]
    example = np.zeros((EXAMPLES, 1), np.float32)
    if column.kind in ("O", "U"):
        keys: dict[str, Any] = {"keys_strings": texts}
    else:
        column = column.to("f")
        keys = {"keys_floats": [float(item) for item in categories]}
    return tape.node(
        "LabelEncoder", column, example=example, domain="ai.onnx.ml", version=2, values_floats=places,
        default_float=math.nan, **keys,
    )  # fmt: skip


def encoded(tape: Tape, categories: dict[int, Sequence[Any]], order: Sequence[int] | None = None) -> Expression:
    """All columns as one matrix of float32, those with categories as their places; in this order of the columns."""
    values = [tape.value(variable) for variable in tape.variables]
    if not categories and order is None:
        return tape.concat([value.to("f") for value in values])
    columns = []
    for value in values:
        width = value.shape[1] if value.ndim == 2 else 1
        columns += [value] if width == 1 else [value[:, [place]] for place in range(width)]
    coded = [
        codes(tape, column, categories[place]) if place in categories else column.to("f")
        for place, column in enumerate(columns)
    ]
    return tape.concat([coded[place] for place in order] if order is not None else coded)


def side_by_side(tape: Tape, answers: Sequence[tuple[Expression, Expression]]) -> tuple[Expression, Expression]:
    """Labels [N] and chances [N, classes] of each target as [N, targets] and [targets, N, most classes]."""
    most = max(chance.shape[1] for _, chance in answers)
    chances = []
    for _, chance in answers:
        if (count := chance.shape[1]) < most:
            chance = tape.concat([chance, chance[:, [0] * (most - count)] * 0.0])
        chances.append(tape.node("Unsqueeze", chance, tape.constant([0], "i"), example=chance.example[None]))
    labels = [label if label.ndim == 2 else label[:, None] for label, _ in answers]
    return tape.concat(labels), tape.concat(chances, axis=0)
