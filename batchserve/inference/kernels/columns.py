"""The matrix of a tree ensemble from the inputs of its graph: casts, categories as codes, and columns side by side."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import repeat

import numpy as np
from onnx import GraphProto, NodeProto, TensorProto, ValueInfoProto, helper

from batchserve.errors import ScoringFailed
from batchserve.inference.kernels import Arrays
from batchserve.inference.kernels.forest import Attributes, Unknown, require

__all__ = ["Codes", "Column", "gather", "read_columns"]

_NUMBERS = (TensorProto.FLOAT, TensorProto.DOUBLE, TensorProto.INT32, TensorProto.INT64, TensorProto.BOOL)


@dataclass(frozen=True, slots=True)
class Codes:
    """The numbers that stand for categories."""

    texts: Mapping[str, float]
    """Category -> its code; empty where the categories are numbers."""
    numbers: np.ndarray
    """Categories that are numbers, ascending, and the code of each: [2, N]."""
    default: float

    def of(self, column: np.ndarray) -> np.ndarray:
        """[N] float32"""
        if column.dtype.kind in "OU":
            found = map(self.texts.get, column.tolist(), repeat(self.default))
            return np.fromiter(found, np.float32, len(column))
        column = _as_float32(column)
        if not self.numbers.size:
            return np.full(len(column), self.default, np.float32)
        keys, codes = self.numbers
        places = np.minimum(np.searchsorted(keys, column), len(keys) - 1)
        return np.where(keys[places] == column, codes[places], np.float32(self.default))


@dataclass(frozen=True, slots=True)
class Column:
    """An input of the graph: one column or several side by side."""

    input: str
    dtype: np.dtype
    """object: texts."""
    width: int
    codes: Codes | None


def gather(columns: Sequence[Column], inputs: Arrays) -> np.ndarray:
    """[N, columns] float32. Raises ScoringFailed for inputs that the graph does not take."""
    if set(inputs) != {column.input for column in columns}:
        names = [column.input for column in columns]
        raise ScoringFailed(f"expected the inputs {names}, got {sorted(inputs)}")
    count = len(inputs[columns[0].input]) if inputs[columns[0].input].ndim else 0
    for column in columns:
        array = inputs[column.input]
        same = array.dtype == column.dtype or (array.dtype.kind in "OU" and column.dtype.kind == "O")
        if not same or array.shape != (count, column.width):
            raise ScoringFailed(
                f"input {column.input!r}: expected {column.dtype} of shape [N, {column.width}], "
                f"got {array.dtype} of shape {list(array.shape)}"
            )
    if len(columns) == 1 and columns[0].codes is None:
        return _as_float32(inputs[columns[0].input])
    matrix = np.empty((count, sum(column.width for column in columns)), np.float32)
    start = 0
    for column in columns:
        array, codes = inputs[column.input], column.codes
        if codes is None:
            with np.errstate(over="ignore"):
                matrix[:, start : start + column.width] = array
        else:
            for place in range(column.width):
                matrix[:, start + place] = codes.of(array[:, place])
        start += column.width
    return matrix


def _as_float32(array: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):  # beyond the largest float32 lies infinity, here as in the graph
        return np.require(array, np.float32, ("C_CONTIGUOUS", "ALIGNED"))


def read_columns(graph: GraphProto, name: str, source: Mapping[str, NodeProto]) -> tuple[Column, ...]:
    """The columns of this value of the graph. Raises Unknown."""
    entries = {entry.name: _entry(entry) for entry in graph.input}
    while name not in entries and _node(name, source).op_type == "Identity":
        name = source[name].input[0]
    names = [name]
    if name not in entries and _node(name, source).op_type == "Concat":
        require(len(entries) > 0 and _attribute(source[name], "axis") in (1, -1))
        names = list(source[name].input)
    columns = tuple(_column(part, source, entries) for part in names)
    require(sorted(column.input for column in columns) == sorted(entries))
    return columns


def _entry(entry: ValueInfoProto) -> Column:
    tensor = entry.type.tensor_type
    text = tensor.elem_type == TensorProto.STRING
    require(text or tensor.elem_type in _NUMBERS)
    require(len(tensor.shape.dim) == 2 and tensor.shape.dim[1].dim_value > 0)
    dtype = np.dtype(object) if text else np.dtype(helper.tensor_dtype_to_np_dtype(tensor.elem_type))
    return Column(entry.name, dtype, tensor.shape.dim[1].dim_value, None)


def _column(name: str, source: Mapping[str, NodeProto], entries: Mapping[str, Column]) -> Column:
    """Walks back from a part of the matrix to an input of the graph."""
    codes, cast = None, False
    while name not in entries:
        node = _node(name, source)
        if node.op_type == "LabelEncoder":
            require(codes is None and not cast)
            codes = _codes(node)
        else:
            require(node.op_type in ("Cast", "Identity"))
            require(node.op_type == "Identity" or _attribute(node, "to") == TensorProto.FLOAT)
            cast = cast or node.op_type == "Cast"
        name = node.input[0]
    entry = entries[name]
    if entry.dtype.kind == "O":
        require(codes is not None and not codes.numbers.size and not cast)
    else:
        require(cast or entry.dtype == np.float32)
        require(codes is None or not codes.texts)
    return Column(entry.input, entry.dtype, entry.width, codes)


def _node(name: str, source: Mapping[str, NodeProto]) -> NodeProto:
    node = source.get(name)
    require(node and node.domain in ("", "ai.onnx.ml"))
    assert node is not None
    return node


def _attribute(node: NodeProto, name: str) -> int | None:
    return next((attribute.i for attribute in node.attribute if attribute.name == name), None)


def _codes(node: NodeProto) -> Codes:
    attributes = Attributes({attribute.name: attribute for attribute in node.attribute})
    known = {"keys_strings", "keys_floats", "values_floats", "default_float"}
    require(node.domain == "ai.onnx.ml" and known >= set(attributes.found))
    default = float(attributes.found["default_float"].f) if "default_float" in attributes.found else -0.0
    try:
        texts = [text.decode() for text in attributes.strings("keys_strings")]
    except UnicodeDecodeError:
        raise Unknown from None
    keys, values = attributes.floats("keys_floats"), attributes.floats("values_floats")
    require(len(texts) + len(keys) == len(values) > 0 and not (texts and len(keys)))
    require(len(set(texts)) == len(texts) and len(np.unique(keys)) == len(keys))
    order = np.argsort(keys)
    numbers = np.stack([keys[order], values[order]]) if len(keys) else np.empty((2, 0), np.float32)
    return Codes(dict(zip(texts, values.tolist(), strict=False)) if texts else {}, numbers, default)
