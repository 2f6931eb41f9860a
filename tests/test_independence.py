"""Records are cut apart only where a proof says that they do not influence each other."""

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper, parser
from recurrent import Shape, recurrent
from sklearn.compose import ColumnTransformer
from sklearn.feature_selection import SelectKBest
from sklearn.linear_model import LinearRegression
from sklearn.pipeline import FeatureUnion, make_pipeline
from sklearn.preprocessing import OneHotEncoder

from batchserve.admission import admit
from batchserve.conversion import convert
from batchserve.domain import Signature
from batchserve.errors import ModelRefused


def made(
    nodes: list[Any],
    inputs: dict[str, Shape],
    outputs: dict[str, Shape],
    constants: dict[str, np.ndarray] | None = None,
) -> bytes:
    def entries(shapes: dict[str, Shape]) -> list[Any]:
        return [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items()]

    held = [numpy_helper.from_array(array, name) for name, array in (constants or {}).items()]
    graph = helper.make_graph(nodes, "made", entries(inputs), entries(outputs), held)
    model: ModelProto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return model.SerializeToString()


def normalised(training: int) -> bytes:
    node = helper.make_node(
        "BatchNormalization", ["x", "scale", "bias", "mean", "var"], ["y", "m", "v"][: 1 + 2 * training],
        training_mode=training,
    )  # fmt: skip
    constants = {name: np.ones(3, np.float32) for name in ("scale", "bias", "mean", "var")}
    return made([node], {"x": ["batch", 3]}, {"y": ["batch", 3]}, constants)


def less_the_mean(share: float, shape: Shape) -> bytes:
    nodes = [
        helper.make_node("ReduceMean", ["x"], ["mean"], axes=[0]),
        helper.make_node("Mul", ["mean", "share"], ["part"]),
        helper.make_node("Sub", ["x", "part"], ["y"]),
    ]
    return made(nodes, {"x": shape}, {"y": shape}, {"share": np.array(share, np.float32)})


def one_node(operator: str, shape: Shape, **attributes: Any) -> bytes:
    return made([helper.make_node(operator, ["x"], ["y"], **attributes)], {"x": shape}, {"y": shape})


def summed_so_far() -> bytes:
    node = helper.make_node("CumSum", ["x", "axis"], ["y"])
    return made([node], {"x": ["N", 3]}, {"y": ["N", 3]}, {"axis": np.array(0)})


def times_their_number() -> bytes:
    nodes = [
        helper.make_node("Shape", ["x"], ["count"], start=0, end=1),
        helper.make_node("Cast", ["count"], ["number"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["x", "number"], ["y"]),
    ]
    return made(nodes, {"x": ["N", 3]}, {"y": ["N", 3]})


DEPENDENT: dict[str, Callable[[], bytes]] = {
    "LSTM over axis 0": lambda: recurrent("LSTM", [None, 1, 4]),
    "GRU over axis 0": lambda: recurrent("GRU", ["batch", 1, 4]),
    "LSTM with a state": lambda: recurrent("LSTM", [None, 1, 4], [1, 1, 8]),
    "GRU with a state": lambda: recurrent("GRU", ["seq", 1, 4], [1, 1, 8]),
    "batch normalisation in training": lambda: normalised(1),
    "less the mean": lambda: less_the_mean(1, ["N", 3]),
    "less a thousandth of the mean": lambda: less_the_mean(0.001, ["N", 3]),
    "softmax over the records": lambda: one_node("Softmax", ["N", 3], axis=0),
    "sums so far": summed_so_far,
    "times their number": times_their_number,
}


def signature_of(model: bytes) -> Signature:
    return admit(model).signature


@pytest.mark.parametrize("name", DEPENDENT)
def test_records_that_influence_each_other_are_scored_in_one_run(name: str) -> None:
    signature = signature_of(DEPENDENT[name]())
    assert signature.mode == "whole"
    assert any("depends on the other records" in note for note in signature.notes)


def noisy(shape: Shape) -> bytes:
    constants = {"ratio": np.array(0.5, np.float32), "training": np.array(True)}
    return made([helper.make_node("Dropout", ["x", "ratio", "training"], ["y"])], {"x": shape}, {"y": shape}, constants)


@pytest.mark.parametrize("shape", [["N", 64], [1, 64], [3, 64]])
def test_a_graph_that_draws_random_numbers_is_refused_with_the_operator(shape: Shape) -> None:
    with pytest.raises(ModelRefused, match=r"random numbers \(Dropout\). Export it in evaluation mode"):
        admit(noisy(shape))


def test_a_state_beside_records_that_influence_each_other_is_shared_by_all() -> None:
    signature = signature_of(recurrent("LSTM", [None, 1, 4], [1, 1, 8]))
    assert [(tensor.name, tensor.per_record) for tensor in signature.inputs] == [
        ("x", True), ("h0", False), ("c0", False)
    ]  # fmt: skip
    assert "Input 'h0' has one value for all records." in signature.notes


INDEPENDENT: dict[str, Callable[[], bytes]] = {
    "batch normalisation": lambda: normalised(0),
    "softmax of each record": lambda: one_node("Softmax", ["N", 3], axis=1),
    "softmax of each record of any length": lambda: one_node("Softmax", ["N", "T"], axis=1),
    "one step of its own state": lambda: made(
        [helper.make_node("Add", ["x", "h"], ["y"])], {"x": [None, 8], "h": [1, 8]}, {"y": [None, 8]}
    ),
}


@pytest.mark.parametrize("name", INDEPENDENT)
def test_records_that_do_not_influence_each_other_may_be_cut_apart(name: str) -> None:
    signature = signature_of(INDEPENDENT[name]())
    assert signature.mode == ("fixed" if "own state" in name else "rows")
    assert not any("depends" in note for note in signature.notes)


def test_a_graph_of_exactly_so_many_records_that_influence_each_other_is_refused() -> None:
    with pytest.raises(ModelRefused, match="exactly 4 records in a run, and the result of one depends on the others"):
        admit(less_the_mean(1, [4, 3]))
    assert signature_of(one_node("Softmax", [4, 3], axis=1)).mode == "fixed"


# --- where different records are hard to come by ---------------------------------------------------------------------

MIXED = "mean = ReduceMean<axes=[0]>(values) y = Sub(values, mean)"
APART = "y = Neg(values)"


def written(graph: str, sample: list[dict[str, Any]] | None = None) -> bytes:
    model = parser.parse_model(f'<ir_version: 8, opset_import: ["":17, "ai.onnx.ml":3]> {graph}')
    entries = {"sample": sample, "columns": [{"name": "a", "dtype": "float32", "input": "x"}]} if sample else {}
    for key, value in entries.items():
        entry = model.metadata_props.add()
        entry.key, entry.value = f"batchserve.{key}", json.dumps(value)
    return bytes(model.SerializeToString())


def looked_up(axis: str, known: int, end: str) -> bytes:
    """Looks its integers up in a table of so many entries, and fails for others."""
    table = ",".join(f"{value}.0" for value in range(2, known + 2))
    return written(f"""g (int64[{axis},2] x) => (float[M,2] y) {{ table = Constant<value_floats=[{table}]>()
        values = Gather(table, x) {end} }}""")


HARD: dict[str, tuple[Callable[[], bytes], str]] = {
    "one record in the sample": (
        lambda: written(f"g (float[N,1] x) => (float[N,1] y) {{ values = Neg(x) {MIXED} }}", [{"a": 1.5}]),
        "whole",
    ),
    "one record in the sample, apart": (
        lambda: written(f"g (float[N,1] x) => (float[N,1] y) {{ values = Neg(x) {APART} }}", [{"a": 1.5}]),
        "rows",
    ),
    "only zeros are taken": (
        lambda: written(f"""g (float[N,1] x) => (float[N,1] y) {{ table = Constant<value_floats=[5.0, 7.0, 6.0]>()
            ids = Cast<to=7>(x) half = Add(ids, ids) values = Gather(table, half) {MIXED} }}"""),
        "whole",
    ),
    "only few integers are taken": (lambda: looked_up("N", 2, MIXED), "whole"),
    "only few integers are taken, apart": (lambda: looked_up("N", 2, APART), "rows"),
    "a single integer": (lambda: looked_up("N", 1, APART), "whole"),
    "a single integer, by name": (lambda: looked_up("batch", 1, APART), "rows"),
    "one category": (
        lambda: written("""g (string[N,1] x) => (float[N,1] y) { flat = Constant<value_ints=[-1,1]>()
            hot = ai.onnx.ml.OneHotEncoder<cats_strings=["yes"], zeros=0>(x) values = Reshape(hot, flat)
            y = ai.onnx.ml.LinearRegressor<coefficients=[2.0], intercepts=[1.0]>(values) }"""),
        "rows",
    ),
    "any text": (
        lambda: written("""g (string[N,1] x) => (int64[N,1] y) {
            y = ai.onnx.ml.LabelEncoder<keys_strings=["a"], values_int64s=[1], default_int64=0>(x) }"""),
        "rows",
    ),
    "yes or no": (
        lambda: written("""g (bool[N,1] x) => (float[N,1] y) { values = Cast<to=1>(x) y = Softmax<axis=1>(values) }"""),
        "rows",
    ),
    "yes or no, mixed": (
        lambda: written(f"g (bool[N,1] x) => (float[N,1] y) {{ values = Cast<to=1>(x) {MIXED} }}"),
        "whole",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", HARD)
def test_records_are_cut_apart_only_if_three_different_ones_agree_or_nothing_else_is_possible(name: str) -> None:
    make, mode = HARD[name]
    assert signature_of(make()).mode == mode


def test_a_graph_for_which_no_different_records_are_found_says_how_to_give_some() -> None:
    notes = signature_of(looked_up("N", 1, APART)).notes
    assert any("No two different records" in note and "batchserve.sample" in note for note in notes)
    with pytest.raises(ModelRefused, match=r"exactly 4 records.*not enough different ones"):
        admit(looked_up("4", 1, APART))


@pytest.mark.parametrize("kind", [bool, str])
def test_a_pipeline_of_one_column_of_two_values_is_scored_row_by_row(kind: type) -> None:
    """There are no three different records."""
    values = [False, True] if kind is bool else ["no", "yes"]
    frame = pd.DataFrame({"a": values * 20})
    encoder = ColumnTransformer([("a", OneHotEncoder(sparse_output=False), ["a"])])
    model = make_pipeline(FeatureUnion([("all", encoder)]), SelectKBest(k=1), LinearRegression())
    model.fit(frame, np.arange(40.0) % 3)
    assert admit(convert(model, frame).onnx, tuned=False).signature.mode == "rows"
