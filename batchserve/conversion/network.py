"""Metadata of a network: the preprocessing of its images, the names of its classes."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import onnx
from google.protobuf.message import DecodeError
from onnx import TensorProto, ValueInfoProto, checker, helper

from batchserve.admission.bundle import is_bundle, unpack
from batchserve.admission.preprocessing import read_preprocessing, with_images
from batchserve.conversion.conversion import serialize, with_facts, write
from batchserve.conversion.sample import listed, sentence
from batchserve.domain import DType, InputTensor, Preprocessing
from batchserve.errors import ConversionFailed, ModelRefused

PRESETS: dict[str, Preprocessing] = {
    "imagenet": Preprocessing(
        resize="crop",
        size=(224, 224),
        shortest=256,
        scale=1 / 255,
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
    ),
    "img2feat": Preprocessing(
        resize="stretch",
        size=(224, 224),
        antialias=False,
        order="bgr",
        scale=1 / 255,
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
        reverse=True,
        exif=True,
    ),
}
"""imagenet: as torchvision evaluates its networks. img2feat: as its class CNN prepares what cv2.imread reads."""

Image = Preprocessing | Mapping[str, Any] | str
"""Preprocessing of images, as in docs/models.md, or the name of a preset."""


def annotate(
    model: Path | str,
    output: Path | str | None = None,
    *,
    image: Image | None = None,
    labels: Sequence[object] | None = None,
    softmax: bool = False,
) -> bytes:
    """Annotate a network in ONNX with its inputs and outputs. Returns the bytes of the new file.

    `model`: an .onnx file, whose tensors may be in separate files, or a zip bundle; they end up in one file. `image`:
    how images become its input: a preset of PRESETS, or what docs/models.md says of `batchserve.image`. `labels`: its
    classes, in the order of the values of its first output. `softmax`: the first output holds scores, and gives way to
    the probabilities that softmax makes of them.

    Raises ConversionFailed.
    """
    graph = _read(Path(model))
    if softmax:
        append_softmax(graph)
    facts: dict[str, Any] = {"image": image_facts(image_input(graph, image)) if image is not None else None}
    if labels is not None:
        check_labels(graph.graph.output[0].name, _width(graph.graph.output[0]), labels)
        facts |= {"labels": texts(labels), "task": "classification"}
    data = serialize(with_facts(graph, facts))
    if output is not None:
        write(data, Path(output))
    return data


def _read(path: Path) -> onnx.ModelProto:
    try:
        with path.open("rb") as file:
            start = file.read(4)
        graph: onnx.ModelProto = unpack(path.read_bytes()) if is_bundle(start) else onnx.load(path)
    except (OSError, DecodeError, ModelRefused, checker.ValidationError) as error:
        raise ConversionFailed(f"{path} could not be read as an ONNX model: {sentence(error)}") from error
    if not graph.graph.output:
        raise ConversionFailed(f"{path} is not an ONNX model: it has no outputs.")
    return graph


# --- images ----------------------------------------------------------------------------------------------------------


def image_input(graph: onnx.ModelProto, image: Image) -> InputTensor:
    """The input of the graph that takes such images: the named one, else the only possible one. Raises ConversionFailed
    for an unknown preset, and for an invalid or unsuitable description.
    """
    constants = {tensor.name for tensor in graph.graph.initializer}
    inputs = [_input(entry) for entry in graph.graph.input if entry.name not in constants]
    try:
        return next(tensor for tensor in with_images(inputs, _described(image)) if tensor.image is not None)
    except ModelRefused as error:
        raise ConversionFailed(error.detail) from error


def image_facts(tensor: InputTensor) -> dict[str, Any]:
    """The entry `batchserve.image` of a graph with this input."""
    assert tensor.image is not None, "it takes images"
    return {"input": tensor.name, **asdict(tensor.image)}


def preprocessing(image: Image) -> Preprocessing:
    """Raises ConversionFailed for an unknown preset, and for an invalid description."""
    try:
        return read_preprocessing({name: value for name, value in _described(image).items() if name != "input"})
    except ModelRefused as error:
        raise ConversionFailed(error.detail) from error


def _described(image: Image) -> Mapping[str, Any]:
    if isinstance(image, str):
        if image not in PRESETS:
            raise ConversionFailed(f"There is no preset {image!r} for images, only {listed(PRESETS)}.")
        image = PRESETS[image]
    return asdict(image) if isinstance(image, Preprocessing) else image


def _input(entry: ValueInfoProto) -> InputTensor:
    kind = entry.type.tensor_type
    dtype = "string" if kind.elem_type == TensorProto.STRING else helper.tensor_dtype_to_np_dtype(kind.elem_type).name
    return InputTensor(entry.name, cast("DType", dtype), tuple(size.dim_value or None for size in kind.shape.dim))


# --- classes ---------------------------------------------------------------------------------------------------------


def texts(labels: Sequence[object]) -> list[str]:
    return [str(label) for label in labels]


def check_labels(output: str, width: int | None, labels: Sequence[object]) -> None:
    """Raises ConversionFailed unless there is a label for each value of the output; a width of None is not known."""
    if width not in (None, len(labels)):
        raise ConversionFailed(
            f"Output {output!r} has {width} values for each record, and {len(labels)} labels were given: "
            f"{listed(labels)}."
        )


def append_softmax(graph: onnx.ModelProto) -> None:
    """Replaces the first output [N, k] by its softmax, under the name `probabilities`."""
    scores = graph.graph.output[0]
    shape = scores.type.tensor_type.shape.dim
    if scores.type.tensor_type.HasField("shape") and len(shape) != 2:
        raise ConversionFailed(
            f"softmax takes one row of scores for each record, and output {scores.name!r} has {len(shape)} axes."
        )
    name = "probabilities"
    taken = {value for node in graph.graph.node for value in (*node.input, *node.output)}
    if name in taken:
        raise ConversionFailed(f"The graph already has {name!r}: omit softmax.")
    graph.graph.node.append(helper.make_node("Softmax", [scores.name], [name], axis=1))
    sizes = [size.dim_value or size.dim_param or None for size in shape] or [None, None]
    scores.CopyFrom(helper.make_tensor_value_info(name, scores.type.tensor_type.elem_type, sizes))


def _width(output: ValueInfoProto) -> int | None:
    sizes = output.type.tensor_type.shape.dim
    return (sizes[-1].dim_value or None) if len(sizes) > 1 else None
