"""Fuses a feature network and the estimator fitted on its features into one graph."""

import warnings
from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import version
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, compose, helper

from batchserve.conversion.check import answers
from batchserve.conversion.conversion import (
    Conversion,
    check_parity,
    opsets,
    serialize,
    set_opsets,
    tidy,
    with_facts,
)
from batchserve.conversion.estimator import Reference, ask, choose_columns, class_labels
from batchserve.conversion.export import ML_OPSET, convertible, layouts, to_onnx
from batchserve.conversion.network import (
    Image,
    check_labels,
    image_facts,
    image_input,
    texts,
)
from batchserve.conversion.parity import compare
from batchserve.conversion.sample import Array, as_frame
from batchserve.domain import InputTensor
from batchserve.errors import ConversionFailed
from batchserve.inference.images import images_of_array
from batchserve.inference.kernels import Arrays

BATCH = 32
"""Images in a run: each takes as much memory as thousands of table rows."""


def fuse(
    network: onnx.ModelProto,
    estimator: Any,
    images: Sequence[Array],
    features: Array,
    *,
    image: Image,
    labels: Sequence[object] | None = None,
    tolerance: float = 1e-4,
    packages: Sequence[str] = (),
    notes: Sequence[str] = (),
) -> Conversion:
    """One graph from images to the outputs of the estimator.

    `network`: a graph from images [N, ...] to features [N, d] or [N, d, 1, 1]; it gets them preprocessed by `image`.
    `images`: a sample to prove the graph on, uint8 [height, width, 3] in RGB; `features` [n, d] are what the original
    network gives for them. `labels`: names for the classes of the estimator, in the order of its `classes_`; the
    answers are these names then. `packages`: whose versions go into the metadata.

    Raises ConversionFailed and ParityFailed.
    """
    estimator = getattr(estimator, "best_estimator_", estimator)  # a search predicts with its best estimator
    reference, graph = _head(estimator, features, opsets(network).get("", 0))
    if labels is not None:
        reference = _rename_classes(graph, estimator, reference, labels)
    graph, tensor = join(network, graph), image_input(network, image)

    def feed(rows: slice) -> Arrays:
        return {tensor.name: prepare([images[row] for row in reference.rows[rows]], tensor)}

    theirs, ours, more = answers(graph, feed, reference, BATCH)
    report = compare(
        theirs,
        ours,
        rows=reference.rows,
        methods=dict.fromkeys(ours.numbers, reference.method),
        tolerance=tolerance,
        notes=[*notes, *reference.notes, *more],
    )
    check_parity(report, "Pass a larger tolerance if you accept this.")
    classifies = reference.task == "classification"
    facts = {
        "task": reference.task,
        "labels": (texts(labels) if labels is not None else class_labels(estimator, 1)) if classifies else None,
        "image": image_facts(tensor),
        "parity": report.to_json(),
        "versions": {name: version(name) for name in ("onnx", "scikit-learn", "skl2onnx", *packages)},
    }
    return Conversion(serialize(with_facts(graph, facts)), report, tensor.columns or (), reference.task)


def prepare(images: Sequence[Array], tensor: InputTensor) -> Array:
    """[n, ...]: images, uint8 [height, width, 3] in RGB, as a server hands them to this input of a graph."""
    taken = [images_of_array(image[np.newaxis], tensor).take(np.array([0])) for image in images]
    return np.concatenate(taken)


def _head(estimator: Any, features: Array, opset: int) -> tuple[Reference, onnx.ModelProto]:
    """The estimator's outputs for the features, and its graph."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # as in convert
        reference = ask(estimator, choose_columns(estimator, *as_frame(features)))
        layout = next(iter(layouts(estimator, reference.table)))
        return reference, to_onnx(convertible(estimator, reference.table), layout, opset)


def join(network: onnx.ModelProto, head: onnx.ModelProto) -> onnx.ModelProto:
    """The network's output, one row for each record, as the input of the head. Inputs and outputs keep their names."""
    if len(network.graph.output) != 1 or len(head.graph.input) != 1:
        raise ConversionFailed(
            f"The network must have one output, and has {len(network.graph.output)}; "
            f"the estimator one input, and has {len(head.graph.input)}."
        )
    # The converter declares the lowest sufficient versions; its output is valid for the requested one.
    versions = opsets(head) | {"ai.onnx.ml": ML_OPSET} | opsets(network)
    network = compose.add_prefix(network, "network/", rename_inputs=False)
    head = compose.add_prefix(head, "head/", rename_outputs=False)
    features, rows = network.graph.output[0], "network/rows"
    network.graph.node.append(helper.make_node("Flatten", [features.name], [rows], name=rows, axis=1))
    features.CopyFrom(helper.make_tensor_value_info(rows, TensorProto.FLOAT, ["records", None]))
    for part in (network, head):
        set_opsets(part, versions)
        tidy(part)
    head.ir_version = network.ir_version = min(head.ir_version, network.ir_version)
    graph: onnx.ModelProto = compose.merge_models(network, head, [(rows, head.graph.input[0].name)])
    return graph


def _rename_classes(head: onnx.ModelProto, estimator: Any, reference: Reference, labels: Sequence[object]) -> Reference:
    """Maps the first output, the labels, to these names; returns the estimator's outputs in the same names."""
    classes = getattr(estimator, "classes_", None)
    if reference.labels is None or classes is None or isinstance(classes, list) or reference.labels.ndim > 1:
        raise ConversionFailed("labels are for a classifier with one target.")
    check_labels("classes_", len(classes), labels)
    names = dict(zip(np.asarray(classes).tolist(), texts(labels), strict=True))
    label = head.graph.output[0]
    inner = f"{label.name}__class"
    for node in head.graph.node:
        for values in (node.input, node.output):
            for index, value in enumerate(values):
                if value == label.name:
                    values[index] = inner
    keys: dict[str, Any]
    if label.type.tensor_type.elem_type == TensorProto.STRING:
        keys = {"keys_strings": [str(key) for key in names]}
    else:
        keys = {"keys_int64s": [int(key) for key in names]}
    encoder = helper.make_node(
        "LabelEncoder", [inner], [label.name], domain="ai.onnx.ml", values_strings=list(names.values()), **keys
    )
    head.graph.node.append(encoder)
    label.type.tensor_type.elem_type = TensorProto.STRING
    return replace(reference, labels=np.array([names[label] for label in reference.labels.tolist()]))
