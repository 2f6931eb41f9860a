"""Different records for the proof that they do not influence each other, where a feed has fewer than that takes."""

from collections.abc import Callable, Iterator

import numpy as np
from onnx import ModelProto, NodeProto, helper

from batchserve.admission import graph
from batchserve.admission.probe_inputs import Feed
from batchserve.errors import ScoringFailed
from batchserve.inference.kernels import Arrays, Session

__all__ = ["RECORDS", "different_records", "is_rowwise"]

RECORDS = 3
"""So many different records are scored alone and together."""
_TURNS = 3
"""Records that are made in each of the ways below."""
_WORDS = ("a", "b", "c")

_ROWWISE = frozenset(
    """
    Abs Add And Binarizer Cast CategoryMapper Ceil Clip Div Equal Erf Exp FeatureVectorizer Floor Greater
    GreaterOrEqual Identity Imputer IsInf IsNaN LabelEncoder LeakyRelu Less LessOrEqual LinearClassifier LinearRegressor
    Log Max Min Mul Neg Normalizer Not OneHotEncoder Or Pow Reciprocal Relu Round SVMClassifier SVMRegressor Scaler
    Sigmoid Sign Sqrt Sub Tanh TreeEnsemble TreeEnsembleClassifier TreeEnsembleRegressor Where Xor
    """.split()  # noqa: SIM905 - a list of 50 strings is harder to read
)
"""Operators that compute each record from itself."""
_AXIS = {"ArgMax": 0, "ArgMin": 0, "Concat": 0, "LogSoftmax": -1, "Softmax": -1, "Split": 0, "TopK": -1}
"""Operators that do so unless their axis, by default this one, is that of the records."""
_AXES = {"Slice": 3, "Squeeze": 1, "Unsqueeze": 1} | dict.fromkeys(
    ("ReduceL2", "ReduceLogSumExp", "ReduceMax", "ReduceMean", "ReduceMin", "ReduceSum", "ReduceSumSquare"), 1
)
"""The same with several axes: an attribute or this input."""


def different_records(session: Session, feed: Feed, batch: int = 1) -> Feed:
    """The different records of a feed, and others made of them where these are fewer than a proof takes; as many as the
    model accepts. `batch`: the only number that the graph takes."""
    seen: dict[bytes, Arrays] = {}
    for index in range(feed.examples()):
        record = {name: array[index : index + 1] for name, array in feed.arrays.items()}
        seen.setdefault(_content(record), record)
        if len(seen) == RECORDS:
            break
    for record in _varied(feed) if len(seen) < RECORDS else ():
        if _content(record) not in seen and _is_accepted(session, Feed(record, feed.shared), batch):
            seen[_content(record)] = record
        if len(seen) == RECORDS:
            break
    records = list(seen.values())
    return Feed({name: np.concatenate([record[name] for record in records]) for name in feed.arrays}, feed.shared)


def is_rowwise(model: ModelProto) -> bool:
    """Whether each operator of the graph is known to compute each record from itself."""
    constants = {tensor.name for tensor in model.graph.initializer}
    constants |= {name for node in model.graph.node if node.op_type == "Constant" for name in node.output}
    return not model.functions and all(_keeps_records(model, node, constants) for node in model.graph.node)


def _keeps_records(model: ModelProto, node: NodeProto, constants: set[str]) -> bool:
    attributes = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
    others = all(name in constants for name in node.input[1:])
    match node.op_type:
        case "Constant":
            return True
        case "MatMul" | "Gemm":
            return others and not attributes.get("transA") and node.input[0] not in constants
        case "ArrayFeatureExtractor":  # takes from the last axis
            return others and node.input[0] not in constants
        case "Gather":  # all records take the same columns
            return others and node.input[0] not in constants and bool(attributes.get("axis", 0))
        case kind if kind in _AXIS:
            return bool(attributes.get("axis", _AXIS[kind]))
        case kind if kind in _AXES:
            return _avoids_records(model, node, attributes, _AXES[kind])
        case "Reshape":
            target = graph.constant(model, node.input[1])
            return target is not None and target.size > 0 and int(target.reshape(-1)[0]) == -1
        case _:
            return node.op_type in _ROWWISE


def _avoids_records(model: ModelProto, node: NodeProto, attributes: dict[str, object], place: int) -> bool:
    """Whether a node has axes, by its attribute or by this input of it, and the first is none of them."""
    given = attributes.get("axes")
    axes = graph.constant(model, node.input[place]) if given is None and len(node.input) > place else given
    return axes is not None and 0 not in np.asarray(axes).reshape(-1).tolist()


def _is_accepted(session: Session, feed: Feed, batch: int) -> bool:
    try:
        session.run(feed.first(batch))
    except ScoringFailed:  # also for lack of memory: the records that are there may take less
        return False
    return True


def _content(record: Arrays) -> bytes:
    return b"".join(
        repr(array.tolist()).encode() if array.dtype == object else array.tobytes() for array in record.values()
    )


# --- ways to make a record of another --------------------------------------------------------------------------------

Way = Callable[[np.ndarray, int], np.ndarray]


def _varied(feed: Feed) -> Iterator[Arrays]:
    """Records like the first one, with other numbers and texts, in ways that fewer and fewer models refuse."""
    first = {name: array[:1] for name, array in feed.arrays.items()}
    for number, text in ((_noise, _word), (_noise, _same), (_ones, _word), (_ones, _same), (_count, _same)):
        for turn in range(_TURNS):
            yield {
                name: text(array, turn) if array.dtype == object else number(array, turn)
                for name, array in first.items()
            }


def _noise(array: np.ndarray, turn: int) -> np.ndarray:
    random = np.random.default_rng(turn)
    if array.dtype.kind != "f":
        return _ones(array, turn)
    return np.asarray(array + random.standard_normal(array.shape, dtype=np.float32), array.dtype)


def _ones(array: np.ndarray, turn: int) -> np.ndarray:
    """Zeros and ones in turns: numbers that most encoders and tables know."""
    places = np.arange(array.size).reshape(array.shape)
    return np.asarray(((turn + 1) >> (places % 2)) % 2, array.dtype)


def _count(array: np.ndarray, turn: int) -> np.ndarray:
    return np.full(array.shape, turn, array.dtype)


def _word(array: np.ndarray, turn: int) -> np.ndarray:
    return np.full(array.shape, _WORDS[turn], object)


def _same(array: np.ndarray, turn: int) -> np.ndarray:
    del turn
    return array
