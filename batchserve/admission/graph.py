"""ONNX graphs as data: what may be loaded, and the small rewrites that make a graph load and run well.

Nothing here runs a graph or opens a file.
"""

from collections.abc import Collection, Iterable, Iterator, Sequence

import numpy as np
from google.protobuf.message import DecodeError, Message
from onnx import (
    AttributeProto,
    GraphProto,
    ModelProto,
    NodeProto,
    TensorProto,
    TensorShapeProto,
    ValueInfoProto,
    helper,
    load_model_from_string,
    numpy_helper,
)

from batchserve.errors import ModelRefused

__all__ = [
    "VARYING",
    "check_graph",
    "class_labels",
    "constant",
    "declared_axes",
    "drop_output",
    "inputs",
    "is_external",
    "is_softmax",
    "lower_ir_version",
    "makers",
    "mend_locales",
    "move_input",
    "move_output",
    "nodes",
    "parse",
    "reshape_output",
    "split_output",
    "strip_zipmaps",
    "tensors",
    "unsqueeze_output",
]

IR_VERSION = 13
"""The newest file format that ONNX Runtime 1.31 loads."""

_DOMAINS = ("", "ai.onnx.ml")

_MICROSOFT = frozenset(
    """
    Attention BiasAdd BiasGelu BiasSoftmax BiasSplitGelu CDist ConvTransposeWithDynamicPads Crop CropAndResize
    DequantizeLinear DynamicQuantizeLSTM DynamicQuantizeMatMul EmbedLayerNormalization ExpandDims FastGelu FusedConv
    FusedGemm FusedMatMul FusedMatMulActivation GatherBlockQuantized GatherND Gelu GemmFastGelu GridSample GroupNorm
    GroupQueryAttention ImageScaler Inverse Irfft LayerNormalization MatMulBnb4 MatMulFpQ4 MatMulInteger16
    MatMulIntegerToFloat MatMulNBits MaxpoolWithMask MulInteger MultiHeadAttention MurmurHash3 NGramRepeatBlock
    NhwcConv NhwcFusedConv NhwcMaxPool Pad QAttention QEmbedLayerNormalization QGemm QLinearAdd QLinearAveragePool
    QLinearConcat QLinearConv QLinearGlobalAveragePool QLinearLeakyRelu QLinearMul QLinearReduceMean QLinearSigmoid
    QLinearSoftmax QLinearWhere QMoE QOrderedMatMul QuantizeLinear QuantizeWithOrder QuickGelu Range ReduceSumInteger
    Rfft RotaryEmbedding SimplifiedLayerNormalization SkipGroupNorm SkipLayerNormalization
    SkipSimplifiedLayerNormalization SparseToDenseMatMul Tokenizer TorchEmbedding TransposeMatMul Trilu Unique
    WordConvEmbedding
    """.split()  # noqa: SIM905 - a list of 80 strings is harder to read
)
"""Operators of com.microsoft that compute and do nothing else: EPContext, for one, loads compiled code."""

VARYING = frozenset(
    {"Compress", "If", "Loop", "NonMaxSuppression", "NonZero", "Range", "StringSplit", "Tokenizer", "Unique"}
)
"""Operators whose output is as long as the values of their input make it."""

_FORMATS = {
    b"\x80": "a Python pickle, which can run any code when it is loaded",
    b"\x1f\x8b": "gzip-compressed data, perhaps of joblib",
    b"x\x9c": "zlib-compressed data, perhaps of joblib",
    b"x\x01": "zlib-compressed data, perhaps of joblib",
    b"\x89HDF": "an HDF5 file, perhaps of Keras",
    b"PK\x03\x04": "a zip archive",
}


def parse(data: bytes) -> ModelProto:
    """The model in these bytes, without opening any file. Raises ModelRefused, saying what the bytes are instead."""
    for magic, kind in _FORMATS.items():
        if data.startswith(magic):
            raise ModelRefused(
                f"expected an ONNX model, got {kind}: convert it with `batchserve convert` where it is trusted"
            )
    if data[4:8] == b"ORTM":
        raise ModelRefused("expected an ONNX model, got ONNX Runtime's own format: send the .onnx it was made from")
    try:
        model = load_model_from_string(data)
    except DecodeError as error:
        raise ModelRefused(f"expected an ONNX model, got {len(data)} bytes of another format") from error
    if not model.HasField("graph") or not model.graph.node:
        raise ModelRefused(f"expected an ONNX model, got {len(data)} bytes without a graph")
    model.ClearField("training_info")
    _check_texts(model)
    return model


def _check_texts(message: Message) -> None:
    """Raises ModelRefused for a name or another text that is not UTF-8: protobuf gives bytes where it says text."""
    for field, value in message.ListFields():
        if field.type == field.TYPE_STRING:
            for text in (value,) if isinstance(value, str | bytes) else value:
                if isinstance(text, bytes):
                    raise ModelRefused(f"a text of the model, its {field.full_name}, is not UTF-8: {text[:80]!r}")
        elif field.type == field.TYPE_MESSAGE:
            for inner in (value,) if isinstance(value, Message) else value:
                _check_texts(inner)


# --- walking ---------------------------------------------------------------------------------------------------------


def nodes(model: ModelProto) -> Iterator[NodeProto]:
    """All nodes: of the graph, of the graphs inside its nodes, and of its functions."""
    yield from _walk(model.graph.node)
    for function in model.functions:
        yield from _walk(function.node)


def tensors(model: ModelProto) -> Iterator[TensorProto]:
    """All constants, wherever they stand: initializers, sparse ones, attributes, graphs inside nodes, functions."""
    yield from _constants(model.graph)
    for node in nodes(model):
        yield from _held(node.attribute)
    for function in model.functions:
        yield from _held(function.attribute_proto)
        for attribute in function.attribute_proto:
            for graph in (attribute.g, *attribute.graphs):
                yield from _constants(graph)
                for node in _walk(graph.node):
                    yield from _held(node.attribute)


def is_external(tensor: TensorProto) -> bool:
    """Whether the values stand outside of the model."""
    return tensor.data_location == TensorProto.EXTERNAL or len(tensor.external_data) > 0


def _walk(layer: Iterable[NodeProto]) -> Iterator[NodeProto]:
    for node in layer:
        yield node
        for attribute in node.attribute:
            for graph in (attribute.g, *attribute.graphs):
                yield from _walk(graph.node)


def _constants(graph: GraphProto) -> Iterator[TensorProto]:
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield from (sparse.values, sparse.indices)


def _held(attributes: Iterable[AttributeProto]) -> Iterator[TensorProto]:
    for attribute in attributes:
        yield from (attribute.t, *attribute.tensors)
        for sparse in (attribute.sparse_tensor, *attribute.sparse_tensors):
            yield from (sparse.values, sparse.indices)
        for graph in (attribute.g, *attribute.graphs):
            yield from _constants(graph)


def inputs(model: ModelProto) -> list[ValueInfoProto]:
    """The inputs of a run: those without a constant."""
    constants = {tensor.name for tensor in model.graph.initializer}
    return [entry for entry in model.graph.input if entry.name not in constants]


# --- what may be loaded ----------------------------------------------------------------------------------------------


def check_graph(model: ModelProto) -> None:
    """Refuses what this server does not load: data outside, foreign operators, no way in or out."""
    for tensor in tensors(model):
        if is_external(tensor):
            raise ModelRefused(
                f"tensor {tensor.name!r} is stored in a file outside of the model: upload a zip archive with both"
            )
    own = {(_domain(function.domain), function.name) for function in model.functions}
    for node in nodes(model):
        _check_operator(node, own)
    if not inputs(model):
        raise ModelRefused("the graph has no inputs")
    if not model.graph.output:
        raise ModelRefused("the graph has no outputs")


def _check_operator(node: NodeProto, own: set[tuple[str, str]]) -> None:
    domain = _domain(node.domain)
    if domain in _DOMAINS or (domain, node.op_type) in own:
        return
    if domain == "com.microsoft" and node.op_type in _MICROSOFT:
        return
    raise ModelRefused(
        f"operator {node.op_type!r} of {domain!r} is not supported: only those of ONNX, of ai.onnx.ml and a list of "
        "com.microsoft"
    )


def _domain(name: str) -> str:
    return "" if name == "ai.onnx" else name


# --- rewrites --------------------------------------------------------------------------------------------------------


def lower_ir_version(model: ModelProto) -> list[str]:
    """Marks a newer file as the newest that can be loaded, and says so. ONNX Runtime judges the operator sets."""
    if model.ir_version <= IR_VERSION:
        return []
    note = f"The file format was IR {model.ir_version} and is now IR {IR_VERSION}; the graph is the same."
    model.ir_version = IR_VERSION
    return [note]


def strip_zipmaps(model: ModelProto) -> dict[str, tuple[str, ...]]:
    """Replaces each ZipMap (a dictionary for each record, 15 times slower) by its matrix. Output -> class labels."""
    labels: dict[str, tuple[str, ...]] = {}
    for node in model.graph.node:
        if (node.domain, node.op_type) != ("ai.onnx.ml", "ZipMap") or not node.output:
            continue
        labels[node.output[0]] = _labels_of(node)
        node.op_type, node.domain = "Identity", ""
        node.ClearField("attribute")
    for output in model.graph.output:
        if output.name in labels:
            width = len(labels[output.name])
            output.CopyFrom(helper.make_tensor_value_info(output.name, TensorProto.FLOAT, [None, width]))
    if labels and not any(_domain(entry.domain) == "" for entry in model.opset_import):
        model.opset_import.append(helper.make_opsetid("", 13))
    return labels


def mend_locales(model: ModelProto) -> list[str]:
    """Gives every StringNormalizer the locale that each host has, and says so."""
    mended: set[str] = set()
    for node in nodes(model):
        if node.op_type != "StringNormalizer":
            continue
        locale = next((attribute for attribute in node.attribute if attribute.name == "locale"), None)
        if locale is None:
            mended.add("en_US")
            node.attribute.append(helper.make_attribute("locale", "C.UTF-8"))
        elif locale.s != b"C.UTF-8":
            mended.add(locale.s.decode(errors="replace"))
            locale.s = b"C.UTF-8"
    names = ", ".join(sorted(mended))
    return [f"Text is folded by the rules of the locale C.UTF-8 instead of {names}."] if mended else []


def is_softmax(model: ModelProto, name: str) -> bool:
    """Whether this output comes straight from a Softmax."""
    return any(node.op_type == "Softmax" and name in node.output for node in model.graph.node)


def class_labels(model: ModelProto) -> tuple[str, ...]:
    """The labels that the classifier in the graph names; empty when there is none, or more than one list."""
    found = {labels for node in nodes(model) if (labels := _labels_of(node))}
    return found.pop() if len(found) == 1 else ()


def reshape_output(model: ModelProto, name: str, shape: Sequence[int]) -> None:
    """Gives an output another shape; -1 stands for the records."""
    inner = _rename_inside(model, name)
    constant = numpy_helper.from_array(np.array(shape, dtype=np.int64), f"{name}__shape")
    model.graph.initializer.append(constant)
    model.graph.node.append(helper.make_node("Reshape", [inner, constant.name], [name]))
    _forget_shape(_output(model, name))


def unsqueeze_output(model: ModelProto, name: str, rank: int) -> None:
    """Puts an axis of length 1 in front of an output, which has so many axes."""
    declared = [1, *(size.dim_value or size.dim_param or None for size in declared_axes(model, name))]
    inner = _rename_inside(model, name)
    node = helper.make_node("Unsqueeze", [inner], [name])
    if _opset(model) < 13:
        node.attribute.append(helper.make_attribute("axes", [0]))
    else:
        constant = numpy_helper.from_array(np.array([0], dtype=np.int64), f"{name}__axes")
        model.graph.initializer.append(constant)
        node.input.append(constant.name)
    model.graph.node.append(node)
    output = _output(model, name)
    _forget_shape(output)
    if len(declared) == rank + 1:
        kind = output.type.tensor_type.elem_type
        output.CopyFrom(helper.make_tensor_value_info(name, kind, declared))


def move_input(model: ModelProto, name: str, axis: int) -> None:
    """Puts this axis of an input first; the graph computes the same."""
    entry = next(entry for entry in model.graph.input if entry.name == name)
    sizes = [size.dim_value or size.dim_param or None for size in entry.type.tensor_type.shape.dim]
    order = _in_front(axis, len(sizes))
    inner = _rename_inside(model, name)
    back = [order.index(place) for place in range(len(order))]
    model.graph.node.insert(0, helper.make_node("Transpose", [name], [inner], perm=back))
    kind = entry.type.tensor_type.elem_type
    entry.CopyFrom(helper.make_tensor_value_info(name, kind, [sizes[place] for place in order]))


def move_output(model: ModelProto, name: str, axis: int, rank: int) -> None:
    """Puts this axis of an output of so many first."""
    sizes = [size.dim_value or size.dim_param or None for size in declared_axes(model, name)]
    order = _in_front(axis, rank)
    inner = _rename_inside(model, name)
    model.graph.node.append(helper.make_node("Transpose", [inner], [name], perm=order))
    output = _output(model, name)
    _forget_shape(output)
    if len(sizes) == rank:
        kind = output.type.tensor_type.elem_type
        output.CopyFrom(helper.make_tensor_value_info(name, kind, [sizes[place] for place in order]))


def _in_front(axis: int, rank: int) -> list[int]:
    return [axis, *(place for place in range(rank) if place != axis)]


def split_output(model: ModelProto, name: str, count: int) -> list[str]:
    """Replaces an output of `count` slices along axis 0 by as many outputs, and gives their names."""
    parts = [f"{name}_{index}" for index in range(count)]
    kind = _output(model, name).type.tensor_type.elem_type
    for index, part in enumerate(parts):
        constant = numpy_helper.from_array(np.array(index, dtype=np.int64), f"{part}__index")
        model.graph.initializer.append(constant)
        model.graph.node.append(helper.make_node("Gather", [name, constant.name], [part], axis=0))
    outputs: list[ValueInfoProto] = []
    for output in model.graph.output:
        made = [helper.make_tensor_value_info(part, kind, None) for part in parts]
        outputs.extend(made if output.name == name else [output])
    del model.graph.output[:]
    model.graph.output.extend(outputs)
    return parts


def declared_axes(model: ModelProto, name: str) -> Sequence[TensorShapeProto.Dimension]:
    """The declared axes of an output, which may be wrong; () where none are declared."""
    return next((entry.type.tensor_type.shape.dim for entry in model.graph.output if entry.name == name), ())


def constant(model: ModelProto, name: str) -> np.ndarray | None:
    """The constant of this name; None where a run computes the value."""
    for tensor in model.graph.initializer:
        if tensor.name == name:
            return numpy_helper.to_array(tensor)
    for node in model.graph.node:
        if node.op_type == "Constant" and name in node.output:
            value = helper.get_attribute_value(node.attribute[0])
            return numpy_helper.to_array(value) if isinstance(value, TensorProto) else np.asarray(value)
    return None


def makers(model: ModelProto, operators: Collection[str]) -> set[str]:
    """The values that these operators make, or that are computed from such."""
    made: set[str] = set()
    for node in model.graph.node:  # in the order of their computation
        inside = any(inner.op_type in operators for inner in _walk([node]))
        if inside or not made.isdisjoint(node.input):
            made.update(node.output)
    return made


def drop_output(model: ModelProto, name: str) -> None:
    """Takes an output away."""
    model.graph.output.remove(_output(model, name))


def _opset(model: ModelProto) -> int:
    """The version of ONNX's own operators."""
    return next((entry.version for entry in model.opset_import if _domain(entry.domain) == ""), 1)


def _output(model: ModelProto, name: str) -> ValueInfoProto:
    return next(output for output in model.graph.output if output.name == name)


def _forget_shape(value: ValueInfoProto) -> None:
    value.type.tensor_type.ClearField("shape")


def _rename_inside(model: ModelProto, name: str) -> str:
    inner = f"{name}__inner"
    for node in _walk(model.graph.node):
        for values in (node.input, node.output):
            for index, value in enumerate(values):
                if value == name:
                    values[index] = inner
    return inner


def _labels_of(node: NodeProto) -> tuple[str, ...]:
    for attribute in node.attribute:
        if not attribute.name.startswith("classlabels"):
            continue
        if attribute.ints or attribute.strings:
            return (
                *(str(label) for label in attribute.ints),
                *(label.decode(errors="replace") for label in attribute.strings),
            )
    return ()
