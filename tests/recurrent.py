"""Recurrent nets as exporters write them: steps, records and states on their axes, with names or without."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from onnx import ModelProto, TensorProto, helper, numpy_helper

HIDDEN = 8
FEATURES = 4
Shape = list[int | str | None]


def recurrent(
    kind: str,
    x: Shape,
    state: Shape | None = None,
    *,
    outputs: Mapping[str, Shape] | None = None,
    two_ways: bool = False,
    layout: int = 0,
) -> bytes:
    """A GRU, LSTM or RNN; with `state`, what it starts from is an input of its own. Outputs: `y` [steps, records,
    values] and, where they are asked for, the last state `h` [directions, records, values]. `x` of more than three
    axes, or with the records first, is up to the shape: the graph is what an exporter writes for it."""
    random = np.random.default_rng(3)
    gates, ways = {"LSTM": 4, "GRU": 3, "RNN": 1}[kind], 1 + two_ways
    constants = {
        "w": random.standard_normal((ways, gates * HIDDEN, FEATURES), dtype=np.float32),
        "r": random.standard_normal((ways, gates * HIDDEN, HIDDEN), dtype=np.float32),
    }
    states = (["h0", "c0"] if kind == "LSTM" else ["h0"]) if state is not None else []
    given = ["x", "w", "r", "", "", *states]
    wanted = outputs or {"y": [None, None, HIDDEN]}
    direction = "bidirectional" if two_ways else "forward"
    made = ["all", "h"]
    nodes = [helper.make_node(kind, given, made, hidden_size=HIDDEN, direction=direction, layout=layout)]
    if two_ways:
        nodes.append(helper.make_node("Transpose", ["all"], ["apart"], perm=[0, 2, 1, 3]))
        constants["joined"] = np.array([0, 0, -1])
        nodes.append(helper.make_node("Reshape", ["apart", "joined"], ["y"]))
    else:
        constants["axis"] = np.array([1])
        nodes.append(helper.make_node("Squeeze", ["all", "axis"], ["y"]))
    return _model(nodes, {"x": x, **{name: state or [] for name in states}}, wanted, constants)


def records_first(kind: str, x: Shape, state: Shape | None = None) -> bytes:
    """The same with `batch_first`: what reads the records transposes them, and what is made of them back again."""
    inner: ModelProto = ModelProto.FromString(recurrent(kind, x, state))
    for node in inner.graph.node:
        for values in (node.input, node.output):
            values[:] = [{"x": "x_steps", "y": "y_steps"}.get(value, value) for value in values]
    inner.graph.node.insert(0, helper.make_node("Transpose", ["x"], ["x_steps"], perm=[1, 0, 2]))
    inner.graph.node.append(helper.make_node("Transpose", ["y_steps"], ["y"], perm=[1, 0, 2]))
    return inner.SerializeToString()


def _model(
    nodes: list[Any], inputs: Mapping[str, Shape], outputs: Mapping[str, Shape], constants: Mapping[str, np.ndarray]
) -> bytes:
    def entries(shapes: Mapping[str, Shape]) -> list[Any]:
        return [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items()]

    held = [numpy_helper.from_array(array, name) for name, array in constants.items()]
    graph = helper.make_graph(nodes, "recurrent", entries(inputs), entries(outputs), held)
    model: ModelProto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return model.SerializeToString()
