"""Tree ensembles without ONNX Runtime, which traverses them row by row: the same outputs, several times as fast.

Reads the graphs that converters make of forests and of boosted trees. Graphs that it does not know exactly are left to
ONNX Runtime.
"""

from dataclasses import dataclass
from types import ModuleType

import numpy as np
from google.protobuf.message import DecodeError
from onnx import AttributeProto, ModelProto, NodeProto, TensorProto, helper, load_model_from_string

from batchserve.allowance import allowance, out_of_memory
from batchserve.errors import ScoringFailed
from batchserve.inference.kernels import Arrays

__all__ = ["TreeModel", "TreeSession", "hard_records", "load_trees", "open_trees"]

_CLASSIFIER, _REGRESSOR = "TreeEnsembleClassifier", "TreeEnsembleRegressor"
BLOCK = 2048
"""Records that pass all trees before the next block, so that they and a tree stay in the cache."""
BLOCK_VALUES = 2**20
"""At most this many values in a block: wide records come fewer at a time."""
_IDS_PER_NODE = 4
"""Numbers of nodes may have gaps, as long as a table of them is at most this many times as long as the nodes."""


@dataclass(frozen=True, slots=True)
class Forest:
    """Trees as `traversal.traverse` wants them, which also says what the arrays hold."""

    words: np.ndarray
    feature_bits: int
    roots: np.ndarray
    depths: np.ndarray
    targets: np.ndarray
    answers: np.ndarray
    weights: np.ndarray

    @property
    def splits(self) -> tuple[np.ndarray, np.ndarray]:
        """Feature and threshold of every inner node."""
        links = self.words[1::2]
        roots = self.roots.astype(np.int64)
        position = np.arange(len(links)) - np.repeat(roots, np.diff(roots, append=len(links)))
        inner = links >> np.uint32(self.feature_bits + 1) != position
        features = links & np.uint32((1 << self.feature_bits) - 1)
        return features[inner].astype(np.int64), self.words[0::2].view(np.float32)[inner]


@dataclass(frozen=True, slots=True)
class TreeModel:
    """A graph of one tree ensemble with only casts and identities around it."""

    input: str
    dtype: np.dtype
    columns: int
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
            results = self._finish(model, self._sums(model, _rows(model, inputs)))
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
            if np.isnan(block).any():
                block, bits = _with_missing(block, bits), bits + 1
            self._traversal.traverse(
                block,
                (1 << bits) - 1,
                forest.words,
                forest.words.view(np.float32),
                forest.feature_bits + 1,
                forest.roots,
                forest.depths,
                forest.targets,
                forest.answers,
                forest.weights,
                sums[start : start + step],
            )
        return sums

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
    except (_Unknown, DecodeError):
        return None


def open_trees(model: TreeModel) -> TreeSession | None:
    """A session of the model, ready to run; None where the extra `trees` is missing, or unfit for this numpy."""
    try:
        from batchserve.inference.kernels import traversal  # takes seconds where it has to be compiled first
    except ImportError:
        return None
    return TreeSession(model, traversal)


def hard_records(model: TreeModel, inputs: Arrays) -> Arrays:
    """These records with edge cases: thresholds, adjacent numbers, NaN and infinity."""
    random = np.random.default_rng(0)
    rows = inputs[model.input].astype(np.float32)
    features, thresholds = model.forest.splits
    if len(features):
        chosen = random.integers(len(features), size=(len(rows), 8))
        towards = random.choice(np.array([-np.inf, np.inf], np.float32), chosen.shape)
        beside = _next(thresholds[chosen], towards)
        values = np.where(random.random(chosen.shape) < 0.5, thresholds[chosen], beside)
        rows[np.arange(len(rows))[:, None], features[chosen]] = values
    if model.dtype.kind == "f":
        quarter = rows[: len(rows) // 4]
        quarter[random.random(quarter.shape) < 0.2] = np.nan
        rows[:3] = np.array([[np.nan], [np.inf], [-np.inf]])
    return {model.input: _whole(rows, model.dtype)}


class _Unknown(Exception):
    """The graph is not exactly known to this kernel."""


def _require(known: object) -> None:
    if not known:
        raise _Unknown


def _with_missing(rows: np.ndarray, feature_bits: int) -> np.ndarray:
    """The columns twice, as they are and with NaN below everything: the bit behind the feature in a node's word picks
    the second, where NaN passes every test as it fails every test in the first."""
    half = 1 << feature_bits
    used = min(half, rows.shape[1])
    both = np.empty((len(rows), 2 * half), np.float32)
    both[:, :used] = rows[:, :used]
    both[:, half : half + used] = np.where(np.isnan(rows[:, :used]), np.float32(-np.inf), rows[:, :used])
    return both


def _rows(model: TreeModel, inputs: Arrays) -> np.ndarray:
    if set(inputs) != {model.input}:
        raise ScoringFailed(f"expected the input {model.input!r}, got {sorted(inputs)}")
    rows = inputs[model.input]
    if rows.dtype != model.dtype or rows.ndim != 2 or rows.shape[1] != model.columns:
        raise ScoringFailed(
            f"input {model.input!r}: expected {model.dtype} of shape [N, {model.columns}], "
            f"got {rows.dtype} of shape {list(rows.shape)}"
        )
    with np.errstate(over="ignore"):  # beyond the largest float32 lies infinity, here as in the graph
        return np.require(rows, np.float32, ("C_CONTIGUOUS", "ALIGNED"))


def _next(values: np.ndarray, towards: np.ndarray | np.float32) -> np.ndarray:
    with np.errstate(over="ignore"):  # next to the largest number lies infinity
        beside: np.ndarray = np.nextafter(values, towards)
    return beside


def _whole(rows: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """As that type: integers are cut to what all of them hold."""
    values: np.ndarray = rows if dtype.kind == "f" else np.clip(rows, -(2.0**30), 2.0**30)
    return values.astype(dtype)


# --- the graph around the ensemble -----------------------------------------------------------------------------------


def _read(model: ModelProto) -> TreeModel:
    graph = model.graph
    ensembles = [node for node in graph.node if node.op_type in (_CLASSIFIER, _REGRESSOR)]
    _require(len(ensembles) == 1 and ensembles[0].domain == "ai.onnx.ml" and len(graph.input) == 1)
    _require(not graph.initializer and not graph.sparse_initializer and not model.functions)
    ensemble = ensembles[0]
    source = {name: node for node in graph.node for name in node.output}
    entry = graph.input[0]
    cast = _follow(ensemble.input[0], source, entry.name)
    tensor = entry.type.tensor_type
    _require(cast or tensor.elem_type == TensorProto.FLOAT)
    _require(tensor.elem_type in _NUMBERS and len(tensor.shape.dim) == 2 and tensor.shape.dim[1].dim_value > 0)
    found = {output.name: _output(output.name, source, ensemble) for output in graph.output}
    outputs = {name: place for name, (place, _) in found.items()}
    truths = frozenset(name for name, (_, truth) in found.items() if truth)
    dtype = np.dtype(helper.tensor_dtype_to_np_dtype(tensor.elem_type))
    return _ensemble(ensemble, entry.name, dtype, tensor.shape.dim[1].dim_value, outputs, truths)


_NUMBERS = (TensorProto.FLOAT, TensorProto.DOUBLE, TensorProto.INT32, TensorProto.INT64, TensorProto.BOOL)


def _follow(name: str, source: dict[str, NodeProto], entry: str) -> bool:
    """Walks back from the ensemble to the input of the graph; returns whether a cast to float32 is on the way."""
    cast = False
    while name != entry:
        node = source.get(name)
        _require(node and not node.domain and node.op_type in ("Cast", "Identity"))
        assert node is not None
        if node.op_type == "Cast":
            _require(any(attribute.name == "to" and attribute.i == TensorProto.FLOAT for attribute in node.attribute))
            cast = True
        name = node.input[0]
    return cast


def _output(name: str, source: dict[str, NodeProto], ensemble: NodeProto) -> tuple[int, bool]:
    """Which output of the ensemble this one is under another name, and whether it is cast to a truth value."""
    truth = False
    while name not in ensemble.output:
        node = source.get(name)
        _require(node and not node.domain and node.op_type in ("Cast", "Identity"))
        assert node is not None
        if node.op_type == "Cast":
            _require(any(attribute.name == "to" and attribute.i == TensorProto.BOOL for attribute in node.attribute))
            _require(ensemble.op_type == _CLASSIFIER and node.input[0] == ensemble.output[0])
            truth = True
        name = node.input[0]
    return list(ensemble.output).index(name), truth


# --- the ensemble ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Attributes:
    """The attributes of a node as arrays; missing ones are empty."""

    found: dict[str, AttributeProto]

    def ints(self, name: str) -> np.ndarray:
        values = self.found[name].ints if name in self.found else ()
        return np.fromiter(values, np.int64, len(values))

    def floats(self, name: str) -> np.ndarray:
        values = self.found[name].floats if name in self.found else ()
        array = np.fromiter(values, np.float32, len(values))
        _require(not np.isnan(array).any())
        return array

    def strings(self, name: str) -> list[bytes]:
        return list(self.found[name].strings) if name in self.found else []

    def text(self, name: str, default: str) -> str:
        return self.found[name].s.decode(errors="replace") if name in self.found else default


def _ensemble(
    node: NodeProto, entry: str, dtype: np.dtype, columns: int, outputs: dict[str, int], truths: frozenset[str]
) -> TreeModel:
    attributes = _Attributes({attribute.name: attribute for attribute in node.attribute})
    # Thresholds in double precision come as tensors, and are compared in double precision.
    _require(not any(name.endswith("_as_tensor") for name in attributes.found))
    classifier = node.op_type == _CLASSIFIER
    transform = attributes.text("post_transform", "NONE")
    aggregate = attributes.text("aggregate_function", "SUM")
    labels = _labels(attributes) if classifier else None
    _require(not truths or (labels is not None and labels.dtype == np.int64))
    two = labels is not None and len(labels) == 2
    if labels is not None:
        width = 1 if two else len(labels)
        _require(width > 1 or two)
        _require(transform in ("NONE", "LOGISTIC", "SOFTMAX") and aggregate == "SUM")
    else:
        width = attributes.found["n_targets"].i if "n_targets" in attributes.found else 0
        _require(width > 0 and transform == "NONE" and aggregate in ("SUM", "AVERAGE"))
    base = attributes.floats("base_values")
    _require(len(base) in (0, width))
    weights = attributes.floats("class_weights" if classifier else "target_weights")
    forest = _forest(attributes, "class" if classifier else "target", weights, width, columns)
    # ONNX Runtime has special rules for outputs without a leaf: such a class never wins, such a number stays 0.
    silent = not len(forest.weights) and len(np.unique(forest.targets)) < width
    _require(not silent or (classifier and len(base)))
    return TreeModel(
        input=entry,
        dtype=dtype,
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


def _labels(attributes: _Attributes) -> np.ndarray:
    texts = [label.decode(errors="replace") for label in attributes.strings("classlabels_strings")]
    return np.array(texts, dtype=object) if texts else attributes.ints("classlabels_int64s")


def _forest(attributes: _Attributes, kind: str, values: np.ndarray, width: int, columns: int) -> Forest:
    modes = np.fromiter(attributes.strings("nodes_modes"), "S12")
    features, thresholds = attributes.ints("nodes_featureids"), attributes.floats("nodes_values")
    missing = attributes.ints("nodes_missing_value_tracks_true")
    leaf, less = modes == b"LEAF", modes == b"BRANCH_LT"
    count = len(modes)
    _require(count and (leaf | less | (modes == b"BRANCH_LEQ")).all())
    _require(len(features) == len(thresholds) == count and len(missing) in (0, count))
    _require((features[~leaf] >= 0).all() and (features[~leaf] < columns).all())
    _require(not np.isneginf(thresholds[less]).any())
    numbers = _Numbers(attributes.ints("nodes_treeids"), attributes.ints("nodes_nodeids"), count)
    true, false = numbers.children(attributes, ~leaf)
    order, depths = _breadth_first(numbers, ~leaf, true, false)
    place = np.empty(count, np.int64)
    place[order] = np.arange(count)

    feature_bits = int(features[~leaf].max(initial=0)).bit_length()
    children = place[np.where(leaf, np.arange(count), true)] - numbers.starts[numbers.rank]
    _require(int(children.max()) < 1 << (31 - feature_bits))
    features = np.where(leaf, 0, features)
    missing_left = leaf | (missing == 1 if len(missing) else False)
    # x < t is x <= the number before t.
    thresholds = np.where(less, _next(thresholds, np.float32(-np.inf)), thresholds)
    words = np.empty((count, 2), np.uint32)
    words[:, 0] = np.where(leaf, np.float32(np.inf), thresholds)[order].view(np.uint32)
    words[:, 1] = (features | missing_left.astype(np.int64) << feature_bits | children << (feature_bits + 1))[order]

    leaves = numbers.find(attributes.ints(f"{kind}_treeids"), attributes.ints(f"{kind}_nodeids"))
    ids = attributes.ints(f"{kind}_ids")
    _require(len(leaves) == len(ids) == len(values) and np.isfinite(values).all())
    _require(leaf[leaves].all() and (ids >= 0).all() and (ids < width).all())
    targets, answers, weights = _answers(numbers, leaf, leaves, ids, values, width)
    return Forest(
        words=words.reshape(-1),
        feature_bits=feature_bits,
        roots=numbers.starts.astype(np.uint64),
        depths=depths,
        targets=targets,
        answers=answers[order],
        weights=weights,
    )


class _Numbers:
    """Finds nodes by the numbers of tree and node. The nodes of a tree stand together, its root first."""

    def __init__(self, trees: np.ndarray, nodes: np.ndarray, count: int) -> None:
        _require(len(trees) == len(nodes) == count)
        first = np.append(True, trees[1:] != trees[:-1])
        self.starts = np.flatnonzero(first)
        self.rank = np.cumsum(first) - 1
        """The tree of each node, in order."""
        self._sorted = np.argsort(trees[self.starts])
        self._trees = trees[self.starts][self._sorted]
        _require((np.diff(self._trees) > 0).all() and (nodes >= 0).all())
        self._sizes = np.maximum.reduceat(nodes, self.starts) + 1
        _require((self._sizes <= _IDS_PER_NODE * count).all() and self._sizes.sum() <= _IDS_PER_NODE * count)
        self._offsets = np.cumsum(self._sizes) - self._sizes
        self._table = np.full(int(self._sizes.sum()), -1, np.int64)
        self._table[self._offsets[self.rank] + nodes] = np.arange(count)
        _require((self._table >= 0).sum() == count)

    def find(self, trees: np.ndarray, nodes: np.ndarray) -> np.ndarray:
        """Positions of these nodes."""
        _require(len(trees) == len(nodes))
        nearest = np.minimum(np.searchsorted(self._trees, trees), len(self._trees) - 1)
        _require((self._trees[nearest] == trees).all())
        return self._within(self._sorted[nearest], nodes)

    def children(self, attributes: _Attributes, inner: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Positions of the true and the false child of each node; 0 for leaves."""
        both = []
        for name in ("nodes_truenodeids", "nodes_falsenodeids"):
            nodes = attributes.ints(name)
            _require(len(nodes) == len(inner))
            places = np.zeros(len(inner), np.int64)
            places[inner] = self._within(self.rank[inner], nodes[inner])
            both.append(places)
        return both[0], both[1]

    def _within(self, rank: np.ndarray, nodes: np.ndarray) -> np.ndarray:
        _require((nodes >= 0).all() and (nodes < self._sizes[rank]).all())
        places: np.ndarray = self._table[self._offsets[rank] + nodes]
        _require((places >= 0).all())
        return places


def _breadth_first(
    numbers: _Numbers, inner: np.ndarray, true: np.ndarray, false: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The nodes tree by tree and level by level, a false child behind its true one; and the depth of each tree."""
    depths = np.zeros(len(numbers.starts), np.int64)
    levels, seen = [numbers.starts], len(numbers.starts)
    while True:
        parents = levels[-1][inner[levels[-1]]]
        if not len(parents):
            break
        levels.append(np.stack([true[parents], false[parents]], axis=1).reshape(-1))
        depths[numbers.rank[parents]] += 1
        seen += len(levels[-1])
        _require(seen <= len(inner))  # or a node has two parents, and may be its own ancestor
    everything = np.concatenate(levels)
    _require(seen == len(inner) and (np.bincount(everything, minlength=seen) == 1).all())
    return everything[np.argsort(numbers.rank[everything], kind="stable")], depths


def _answers(
    numbers: _Numbers, leaf: np.ndarray, leaves: np.ndarray, ids: np.ndarray, values: np.ndarray, width: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`targets`, `answers` and `weights` of a Forest; the answers still in the order of the graph."""
    answers = np.zeros(len(leaf), np.uint32)
    targets = np.zeros(len(numbers.starts), np.uint64)
    each = np.bincount(leaves, minlength=len(leaf))[leaf]
    if (each == 1).all():
        targets[numbers.rank[leaves]] = ids
        _require((targets[numbers.rank[leaves]] == ids).all())
        answers[leaves] = values.view(np.uint32)
        return targets, answers, np.zeros((0, width), np.float32)
    _require(width > 1 and (each == width).all())
    answers[leaf] = np.arange(leaf.sum())
    weights = np.full((int(leaf.sum()), width), np.nan, np.float32)
    weights[answers[leaves], ids] = values
    _require(not np.isnan(weights).any())  # or a leaf has two weights for one target
    return targets, answers, weights
