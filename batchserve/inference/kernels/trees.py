"""Tree ensembles without ONNX Runtime, which traverses them row by row: the same outputs, several times as fast.

Reads the graphs that converters make of forests and of boosted trees. Graphs that it does not know exactly are left to
ONNX Runtime.
"""

from dataclasses import dataclass
from types import ModuleType

import numpy as np
from google.protobuf.message import DecodeError
from onnx import ModelProto, NodeProto, TensorProto, load_model_from_string

from batchserve.allowance import allowance, out_of_memory
from batchserve.errors import ScoringFailed
from batchserve.inference.kernels import Arrays
from batchserve.inference.kernels.columns import Codes, Column, gather, read_columns
from batchserve.inference.kernels.forest import Attributes, Forest, Unknown, beside, read_forest, require

__all__ = ["TreeModel", "TreeSession", "hard_records", "load_trees", "open_trees"]

_CLASSIFIER, _REGRESSOR = "TreeEnsembleClassifier", "TreeEnsembleRegressor"
BLOCK = 2048
"""Records that pass all trees before the next block, so that they and a tree stay in the cache."""
BLOCK_VALUES = 2**20
"""At most this many values in a block: wide records come fewer at a time."""


@dataclass(frozen=True, slots=True)
class TreeModel:
    """A graph of one tree ensemble; around it only casts, identities, codes of categories and columns side by side."""

    columns: tuple[Column, ...]
    outputs: dict[str, int]
    """Output -> which one of the ensemble: 0 the label and 1 the scores of a classifier, 0 the value of a regressor."""
    truths: frozenset[str]
    """The outputs that are cast to False and True."""
    forest: Forest
    width: int
    """Targets of a regressor, or sums for classes: one for two classes, k for k."""
    base: np.ndarray
    labels: np.ndarray | None
    """The classes, int64 or str objects; None for a regressor."""
    transform: str
    positive: bool
    """No weight is negative."""
    average: bool


class TreeSession:
    """A Session of a TreeModel. `run` may be called from several threads concurrently."""

    def __init__(self, model: TreeModel, traversal: ModuleType) -> None:
        self._model: TreeModel | None = model
        self._traversal = traversal

    def run(self, inputs: Arrays) -> Arrays:
        """The outputs by name, as the graph gives them in ONNX Runtime. Raises ScoringFailed and OutOfMemory."""
        model = self._model
        if model is None:
            raise ScoringFailed("the session is closed")
        try:
            results = self._finish(model, self._sums(model, gather(model.columns, inputs)))
        except MemoryError as error:
            raise out_of_memory("the model", allowance()) from error
        return {
            name: results[place].astype(np.bool_) if name in model.truths else results[place]
            for name, place in model.outputs.items()
        }

    def close(self) -> None:
        """Frees the model after running calls have ended. Idempotent."""
        self._model = None

    def _sums(self, model: TreeModel, rows: np.ndarray) -> np.ndarray:
        forest = model.forest
        sums = np.zeros((len(rows), model.width), np.float32)
        step = max(64, min(BLOCK, BLOCK_VALUES >> (forest.feature_bits + 1)))
        for start in range(0, len(rows), step):
            block, bits = rows[start : start + step], forest.feature_bits
            if forest.members:
                block = forest.members.coded(block)
            if np.isnan(block).any():
                block, bits = _with_missing(block, bits), bits + 1
            self._traverse(forest, block, bits, sums[start : start + step])
        return sums

    def _traverse(self, forest: Forest, block: np.ndarray, bits: int, sums: np.ndarray) -> None:
        thresholds, members = forest.words.view(np.float32), forest.members
        nodes = ((1 << bits) - 1, forest.words, thresholds, forest.feature_bits + 1, forest.roots, forest.depths)
        leaves = (forest.targets, forest.answers, forest.weights)
        if members is None:
            self._traversal.traverse(block, *nodes, *leaves, sums)
        else:
            sets = (block.view(np.uint32), members.nodes, members.bits)
            self._traversal.traverse_sets(block, *nodes, *leaves, *sets, sums)

    def _finish(self, model: TreeModel, sums: np.ndarray) -> tuple[np.ndarray, ...]:
        if model.labels is None:
            if model.average:
                sums /= np.float32(len(model.forest.roots))
            return (sums + model.base,)
        winners = np.empty(len(sums), np.int64)
        logistic, softmax = model.transform == "LOGISTIC", model.transform == "SOFTMAX"
        if model.width == 1:
            scores = np.empty((len(sums), 2), np.float32)
            self._traversal.decide_two(sums, model.base[0], model.positive, logistic, winners, scores)
        else:
            scores = sums
            self._traversal.decide_many(scores, model.base, logistic, softmax, winners)
        return model.labels[winners], scores


def load_trees(model: bytes | ModelProto) -> TreeModel | None:
    """The tree ensemble that a graph consists of; None for any other graph, and for what only ONNX Runtime knows."""
    try:
        return _read(load_model_from_string(model) if isinstance(model, bytes) else model)
    except (Unknown, DecodeError):
        return None


def open_trees(model: TreeModel) -> TreeSession | None:
    """A session of the model, ready to run; None where the extra `fast` is missing, or unfit for this numpy."""
    try:
        from batchserve.inference.kernels import traversal  # takes seconds where it has to be compiled first
    except ImportError:
        return None
    return TreeSession(model, traversal)


def hard_records(model: TreeModel, inputs: Arrays) -> Arrays:
    """These records with edge cases: thresholds, adjacent numbers, categories known and unknown, NaN and infinity."""
    random = np.random.default_rng(0)
    rows = gather(model.columns, inputs).copy()
    features, thresholds = model.forest.splits
    if len(features):
        chosen = random.integers(len(features), size=(len(rows), 8))
        towards = random.choice(np.array([-np.inf, np.inf], np.float32), chosen.shape)
        near = beside(thresholds[chosen], towards)
        values = np.where(random.random(chosen.shape) < 0.5, thresholds[chosen], near)
        rows[np.arange(len(rows))[:, None], features[chosen]] = values
    for feature, categories in (model.forest.members.codes if model.forest.members else {}).items():
        some = random.random(len(rows)) < 0.5
        rows[some, feature] = random.choice(categories, int(some.sum()))
    holes = rows.copy()
    quarter = holes[: len(rows) // 4]
    quarter[random.random(quarter.shape) < 0.2] = np.nan
    holes[:3] = np.array([[np.nan], [np.inf], [-np.inf]])
    hard: Arrays = {}
    start = 0
    for column in model.columns:
        share = slice(start, start + column.width)
        if column.codes is None:
            hard[column.input] = _whole((holes if column.dtype.kind == "f" else rows)[:, share], column.dtype)
        else:
            hard[column.input] = _categories(column.codes, inputs[column.input], random)
        start += column.width
    return hard


def _categories(codes: Codes, given: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """These values, half of them replaced by known ones and a few by one that is not known."""
    known = np.array(list(codes.texts), dtype=object) if codes.texts else codes.numbers[0]
    chosen = random.choice(known, given.shape).astype(given.dtype)
    chosen = np.where(random.random(given.shape) < 0.5, given, chosen).astype(given.dtype)
    unknown = max(codes.texts, key=len) + "?" if codes.texts else known.max(initial=0) + 1
    chosen[random.random(given.shape) < 0.05] = unknown
    return chosen


def _with_missing(rows: np.ndarray, feature_bits: int) -> np.ndarray:
    """The columns twice, as they are and with NaN below everything: the bit behind the feature in a node's word picks
    the second, where NaN passes every test as it fails every test in the first."""
    half = 1 << feature_bits
    used = min(half, rows.shape[1])
    both = np.empty((len(rows), 2 * half), np.float32)
    both[:, :used] = rows[:, :used]
    both[:, half : half + used] = np.where(np.isnan(rows[:, :used]), np.float32(-np.inf), rows[:, :used])
    return both


def _whole(rows: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """As that type: integers are cut to what all of them hold."""
    values: np.ndarray = rows if dtype.kind == "f" else np.clip(rows, -(2.0**30), 2.0**30)
    return values.astype(dtype)


# --- the graph around the ensemble -----------------------------------------------------------------------------------


def _read(model: ModelProto) -> TreeModel:
    graph = model.graph
    ensembles = [node for node in graph.node if node.op_type in (_CLASSIFIER, _REGRESSOR)]
    require(len(ensembles) == 1 and ensembles[0].domain == "ai.onnx.ml")
    require(not graph.initializer and not graph.sparse_initializer and not model.functions)
    ensemble = ensembles[0]
    source = {name: node for node in graph.node for name in node.output}
    columns = read_columns(graph, ensemble.input[0], source)
    found = {output.name: _output(output.name, source, ensemble) for output in graph.output}
    outputs = {name: place for name, (place, _) in found.items()}
    truths = frozenset(name for name, (_, truth) in found.items() if truth)
    return _ensemble(ensemble, columns, outputs, truths)


def _output(name: str, source: dict[str, NodeProto], ensemble: NodeProto) -> tuple[int, bool]:
    """Which output of the ensemble this one is under another name, and whether it is cast to a truth value."""
    truth = False
    while name not in ensemble.output:
        node = source.get(name)
        require(node and not node.domain and node.op_type in ("Cast", "Identity"))
        assert node is not None
        if node.op_type == "Cast":
            require(any(attribute.name == "to" and attribute.i == TensorProto.BOOL for attribute in node.attribute))
            require(ensemble.op_type == _CLASSIFIER and node.input[0] == ensemble.output[0])
            truth = True
        name = node.input[0]
    return list(ensemble.output).index(name), truth


# --- the ensemble ----------------------------------------------------------------------------------------------------


def _ensemble(
    node: NodeProto, columns: tuple[Column, ...], outputs: dict[str, int], truths: frozenset[str]
) -> TreeModel:
    attributes = Attributes({attribute.name: attribute for attribute in node.attribute})
    # Thresholds in double precision come as tensors, and are compared in double precision.
    require(not any(name.endswith("_as_tensor") for name in attributes.found))
    classifier = node.op_type == _CLASSIFIER
    transform = attributes.text("post_transform", "NONE")
    aggregate = attributes.text("aggregate_function", "SUM")
    labels = _labels(attributes) if classifier else None
    require(not truths or (labels is not None and labels.dtype == np.int64))
    two = labels is not None and len(labels) == 2
    if labels is not None:
        width = 1 if two else len(labels)
        require(width > 1 or two)
        require(transform in ("NONE", "LOGISTIC", "SOFTMAX") and aggregate == "SUM")
    else:
        width = attributes.found["n_targets"].i if "n_targets" in attributes.found else 0
        require(width > 0 and transform == "NONE" and aggregate in ("SUM", "AVERAGE"))
    base = attributes.floats("base_values")
    require(len(base) in (0, width))
    weights = attributes.floats("class_weights" if classifier else "target_weights")
    forest = read_forest(
        attributes, "class" if classifier else "target", weights, width, sum(column.width for column in columns)
    )
    # ONNX Runtime has special rules for outputs without a leaf: such a class never wins, such a number stays 0.
    silent = not len(forest.weights) and len(np.unique(forest.targets)) < width
    require(not silent or (classifier and len(base)))
    return TreeModel(
        columns=columns,
        outputs=outputs,
        truths=truths,
        forest=forest,
        width=width,
        base=base if len(base) else np.zeros(width, np.float32),
        labels=labels,
        transform=transform,
        positive=bool((weights >= 0).all()),
        average=aggregate == "AVERAGE",
    )


def _labels(attributes: Attributes) -> np.ndarray:
    texts = [label.decode(errors="replace") for label in attributes.strings("classlabels_strings")]
    return np.array(texts, dtype=object) if texts else attributes.ints("classlabels_int64s")
