"""Convolutional networks built by hand: topologies that img2feat offers at 1/16 of their width, with seeded weights."""

from onnx import ModelProto

from benchmarks.networks import Layers

SIZE = 96


def alexnet(opset: int = 17) -> ModelProto:
    """[N, 3, 96, 96] -> [N, 16, 1, 1]"""
    layers = Layers(SIZE)
    layers.convolve(4, 11, 4)
    layers.pool(3)
    layers.convolve(12, 5)
    layers.pool(3)
    for channels in (24, 16, 16):
        layers.convolve(channels)
    return _pooled(layers, opset)


def vgg11(opset: int = 17) -> ModelProto:
    """[N, 3, 96, 96] -> [N, 32, 1, 1]"""
    layers = Layers(SIZE)
    for block in ((4,), (8,), (16, 16), (32, 32), (32, 32)):
        for channels in block:
            layers.convolve(channels)
        layers.pool()
    return _pooled(layers, opset)


def resnet18(opset: int = 17) -> ModelProto:
    """[N, 3, 96, 96] -> [N, 32, 1, 1]"""
    layers = Layers(SIZE)
    layers.convolve(4, 7, 2)
    layers.pool(3)
    for channels, stride in ((4, 1), (8, 2), (16, 2), (32, 2)):
        layers.residual(channels, stride)
        layers.residual(channels, 1)
    return _pooled(layers, opset)


def classifier(classes: int) -> ModelProto:
    """[N, 3, 96, 96] -> scores [N, classes]"""
    layers = Layers(SIZE)
    layers.convolve(4, 11, 8)
    layers.convolve(8, 3, 2)
    layers.add("GlobalAveragePool")
    layers.add("Flatten")
    layers.add("Gemm", layers.weight(classes, 8), transB=1)
    return layers.model("scores", [classes])


def _pooled(layers: Layers, opset: int) -> ModelProto:
    layers.add("GlobalAveragePool")
    return layers.model("features", [layers.channels, 1, 1], opset)
