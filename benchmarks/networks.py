"""Convolutional networks built by hand: the topology and the cost of published ones, with weights of a fixed seed."""

import json
from typing import Any

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

__all__ = ["Layers", "resnet18"]

IMAGENET = {
    "resize": "stretch",
    "size": [224, 224],
    "scale": 1 / 255,
    "mean": [0.485, 0.456, 0.406],
    "std": [0.229, 0.224, 0.225],
}


class Layers:
    """A graph on images [N, 3, size, size] to which layers are appended, with weights of a fixed seed."""

    def __init__(self, size: int) -> None:
        self._size = size
        self.last, self.channels = "image", 3
        self._nodes: list[NodeProto] = []
        self._weights: list[TensorProto] = []
        self._random = np.random.default_rng(0)

    def add(self, operator: str, *more: str, **attributes: Any) -> str:
        name = f"{operator.lower()}_{len(self._nodes)}"
        self._nodes.append(helper.make_node(operator, [self.last, *more], [name], name=name, **attributes))
        self.last = name
        return name

    def weight(self, *shape: int) -> str:
        """Scaled as He et al. (2015) do, so that the activations of deep networks keep their size."""
        deviation = np.sqrt(2 / np.prod(shape[1:]))
        values = (self._random.standard_normal(shape) * deviation).astype(np.float32)
        name = f"weight_{len(self._weights)}"
        self._weights.append(numpy_helper.from_array(values, name))
        return name

    def convolve(self, channels: int, size: int = 3, stride: int = 1, *, relu: bool = True) -> str:
        weight = self.weight(channels, self.channels, size, size)
        self.channels = channels
        self.add("Conv", weight, kernel_shape=[size] * 2, strides=[stride] * 2, pads=[size // 2] * 4)
        return self.add("Relu") if relu else self.last

    def pool(self, size: int = 2, stride: int = 2, pad: int = 0) -> None:
        self.add("MaxPool", kernel_shape=[size] * 2, strides=[stride] * 2, pads=[pad] * 4)

    def residual(self, channels: int, stride: int) -> None:
        """Two convolutions with a skip connection."""
        start, before = self.last, self.channels
        self.convolve(channels, stride=stride)
        inner = self.convolve(channels, relu=False)
        self.last, self.channels = start, before
        if (before, stride) != (channels, 1):
            self.convolve(channels, 1, stride, relu=False)
        self.add("Add", inner)
        self.add("Relu")

    def model(self, output: str, shape: list[int], opset: int = 17) -> ModelProto:
        self._nodes.append(helper.make_node("Identity", [self.last], [output]))
        graph = helper.make_graph(
            self._nodes,
            "network",
            [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["records", 3, self._size, self._size])],
            [helper.make_tensor_value_info(output, TensorProto.FLOAT, ["records", *shape])],
            self._weights,
        )
        model: ModelProto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
        return model


def resnet18(classes: tuple[str, ...]) -> bytes:
    """ResNet-18 of He et al. (2016), [N, 3, 224, 224] -> probabilities [N, classes], 1.8 billion multiplications."""
    layers = Layers(224)
    layers.convolve(64, 7, 2)
    layers.pool(3, pad=1)
    for channels, stride in ((64, 1), (128, 2), (256, 2), (512, 2)):
        layers.residual(channels, stride)
        layers.residual(channels, 1)
    layers.add("GlobalAveragePool")
    layers.add("Flatten")
    layers.add("Gemm", layers.weight(len(classes), 512), transB=1)
    layers.add("Softmax", axis=1)
    model = layers.model("probabilities", [len(classes)])
    entries = {"image": IMAGENET, "labels": classes, "task": "classification"}
    helper.set_model_props(model, {f"batchserve.{key}": json.dumps(value) for key, value in entries.items()})
    return model.SerializeToString()
