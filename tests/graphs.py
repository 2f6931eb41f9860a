"""Hand-made ONNX graphs whose cost is driven by their input, and the comparison of outputs."""

import time

import numpy as np
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

from batchserve.inference.kernels import Arrays
from batchserve.inference.session import open_session


def busy() -> bytes:
    """Doubles its input, and runs a loop as many times as the largest value of the batch."""
    body = helper.make_graph(
        [
            helper.make_node("MatMul", ["state", "state"], ["product"]),
            helper.make_node("Identity", ["go"], ["go_on"]),
        ],
        "turn",
        [
            helper.make_tensor_value_info("turn", TensorProto.INT64, []),
            helper.make_tensor_value_info("go", TensorProto.BOOL, []),
            helper.make_tensor_value_info("state", TensorProto.FLOAT, [32, 32]),
        ],
        [
            helper.make_tensor_value_info("go_on", TensorProto.BOOL, []),
            helper.make_tensor_value_info("product", TensorProto.FLOAT, [32, 32]),
        ],
    )
    return _model(
        [
            helper.make_node("ReduceMax", ["work"], ["most"], keepdims=0),
            helper.make_node("Cast", ["most"], ["turns"], to=TensorProto.INT64),
            helper.make_node("Loop", ["turns", "", "eye"], ["last"], body=body),
            helper.make_node("ReduceMax", ["last"], ["one"], keepdims=0),
            helper.make_node("Mul", ["work", "two"], ["twice"]),
            helper.make_node("Mul", ["twice", "one"], ["doubled"]),
        ],
        {"eye": np.eye(32, dtype=np.float32), "two": np.float32(2)},
    )


def greedy() -> bytes:
    """Doubles its input, and allocates as many MiB of memory as the largest value of the batch."""
    return _model(
        [
            helper.make_node("ReduceMax", ["work"], ["most"], keepdims=0),
            helper.make_node("Abs", ["most"], ["size"]),
            helper.make_node("Cast", ["size"], ["mebibytes"], to=TensorProto.INT64),
            helper.make_node("Mul", ["mebibytes", "mebi"], ["count"]),
            helper.make_node("Unsqueeze", ["count", "axes"], ["shape"]),
            helper.make_node("ConstantOfShape", ["shape"], ["zeros"]),
            helper.make_node("ReduceSum", ["zeros"], ["zero"], keepdims=0),
            helper.make_node("Mul", ["work", "two"], ["twice"]),
            helper.make_node("Add", ["twice", "zero"], ["doubled"]),
        ],
        {"mebi": np.int64(2**18), "axes": np.array([0], np.int64), "two": np.float32(2)},
    )


def large(size: int) -> bytes:
    """Doubles its input, and holds a constant of that many bytes."""
    return _model(
        [
            helper.make_node("Mul", ["work", "two"], ["twice"]),
            helper.make_node("Gather", ["weights", "first"], ["zero"]),
            helper.make_node("Add", ["twice", "zero"], ["doubled"]),
        ],
        {"two": np.float32(2), "weights": np.zeros(size // 4, np.float32), "first": np.int64(0)},
    )


def forgetful() -> bytes:
    """Doubles its input, and drops each record that is exactly 13."""
    return _model(
        [
            helper.make_node("Equal", ["work", "thirteen"], ["dropped"]),
            helper.make_node("Not", ["dropped"], ["kept"]),
            helper.make_node("Squeeze", ["kept", "axes"], ["rows"]),
            helper.make_node("Compress", ["work", "rows"], ["left"], axis=0),
            helper.make_node("Mul", ["left", "two"], ["doubled"]),
        ],
        {"thirteen": np.float32(13), "axes": np.array([1], np.int64), "two": np.float32(2)},
    )


def centred() -> bytes:
    """x -> x - mean(x), which needs all records at once. Its memory grows with the square of their number."""
    return _model(
        [
            helper.make_node("Transpose", ["work"], ["row"], perm=[1, 0]),
            helper.make_node("MatMul", ["work", "row"], ["products"]),
            helper.make_node("ReduceSum", ["products"], ["sum"], keepdims=0),
            helper.make_node("Mul", ["sum", "zero"], ["nothing"]),
            helper.make_node("ReduceMean", ["work"], ["mean"], keepdims=0),
            helper.make_node("Sub", ["work", "mean"], ["difference"]),
            helper.make_node("Add", ["difference", "nothing"], ["doubled"]),
        ],
        {"zero": np.float32(0)},
    )


def turns_per_second(model: bytes) -> float:
    """The number of loops of `busy` per second on this machine, with which tests can request a duration."""
    session = open_session(model)
    started = time.perf_counter()
    session.run({"work": np.array([[20_000]], np.float32)})
    return 20_000 / (time.perf_counter() - started)


def _model(nodes: list[NodeProto], constants: dict[str, np.generic | np.ndarray]) -> bytes:
    graph: GraphProto = helper.make_graph(
        nodes,
        "made",
        [helper.make_tensor_value_info("work", TensorProto.FLOAT, [None, 1])],
        [helper.make_tensor_value_info("doubled", TensorProto.FLOAT, [None, 1])],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    model: ModelProto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return model.SerializeToString()


def assert_same(results: Arrays, expected: Arrays) -> None:
    """Labels equal, numbers within 1e-6; names in order, types and shapes too."""
    assert list(results) == list(expected)
    for name, array in expected.items():
        assert (results[name].dtype, results[name].shape) == (array.dtype, array.shape)
        if array.dtype.kind == "f":
            np.testing.assert_allclose(results[name], array, rtol=1e-6, atol=1e-6)
        else:
            np.testing.assert_array_equal(results[name], array)
