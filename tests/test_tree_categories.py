"""The tree kernel on trees that split by sets of categories, and on graphs of several inputs: as ONNX Runtime."""

from collections.abc import Callable, Mapping
from typing import Any

import lightgbm
import numpy as np
import onnx
import pandas as pd
import pytest
import xgboost
from graphs import assert_same
from onnx import ModelProto, TensorProto, helper
from selection import quick_of
from sklearn.ensemble import HistGradientBoostingClassifier, HistGradientBoostingRegressor

from batchserve.admission import admit
from batchserve.conversion import convert
from batchserve.errors import ScoringFailed
from batchserve.inference.kernels import Arrays, trees
from batchserve.inference.kernels.trees import TreeModel, hard_records, load_trees
from batchserve.inference.session import open_session

RANDOM = np.random.default_rng(0)
COUNT = 1500
CITIES = [f"city {place}" for place in range(70)]
FRAME = pd.DataFrame(
    {
        "city": pd.Categorical(RANDOM.choice(CITIES, COUNT), categories=CITIES),
        "area": RANDOM.normal(size=COUNT).astype(np.float32),
        "plan": pd.Categorical(RANDOM.choice(["a", "b", "c", "\u00f6"], COUNT)),
        "age": RANDOM.normal(size=COUNT).astype(np.float32),
    }
)
NUMBER = (np.sin(FRAME["city"].cat.codes * 7.0) + FRAME["area"] * (FRAME["plan"].cat.codes - 1.5)).to_numpy(float)
TWO, THREE = (NUMBER > 0).astype(int), np.array(["low", "mid", "high"])[np.digitize(NUMBER, [-0.7, 0.7])]
LIGHT: dict[str, Any] = {"n_estimators": 12, "verbose": -1, "n_jobs": 1, "min_data_per_group": 5, "cat_smooth": 1}
EXTREME: dict[str, Any] = {"n_estimators": 12, "n_jobs": 1, "enable_categorical": True, "max_cat_to_onehot": 1}

CASES: dict[str, Callable[[], Any]] = {
    "lightgbm, two classes": lambda: lightgbm.LGBMClassifier(**LIGHT).fit(FRAME, TWO),
    "lightgbm, three classes": lambda: lightgbm.LGBMClassifier(**LIGHT).fit(FRAME, THREE),
    "lightgbm, a number": lambda: lightgbm.LGBMRegressor(**LIGHT).fit(FRAME, NUMBER),
    "lightgbm, one category against all": lambda: lightgbm.LGBMClassifier(**LIGHT, max_cat_to_onehot=100).fit(
        FRAME, TWO
    ),
    "xgboost, two classes": lambda: xgboost.XGBClassifier(**EXTREME).fit(FRAME, TWO),
    "xgboost, a number": lambda: xgboost.XGBRegressor(**EXTREME).fit(FRAME, NUMBER),
    "hist boosting, two classes": lambda: HistGradientBoostingClassifier(
        max_iter=12, categorical_features="from_dtype"
    ).fit(FRAME, TWO),
    "hist boosting, a number": lambda: HistGradientBoostingRegressor(
        max_iter=12, categorical_features="from_dtype"
    ).fit(FRAME, NUMBER),
    "a Booster of lightgbm": lambda: lightgbm.LGBMClassifier(**LIGHT).fit(FRAME, TWO).booster_,
}


def converted(case: Callable[[], Any], frame: pd.DataFrame = FRAME) -> bytes:
    return admit(convert(case(), frame.head(300), tolerance=1.0).onnx).model


def loaded(model: bytes | ModelProto) -> TreeModel:
    found = load_trees(model)
    assert found is not None
    return found


def run(model: bytes | ModelProto, inputs: Arrays) -> Arrays:
    session = trees.open_trees(loaded(model))
    assert session is not None
    return session.run(inputs)


def columns(frame: pd.DataFrame) -> Arrays:
    return {
        str(name): column.astype(object).fillna("").to_numpy().reshape(-1, 1)
        if isinstance(column.dtype, pd.CategoricalDtype)
        else column.to_numpy().reshape(-1, 1)
        for name, column in frame.items()
    }


# --- converted models ------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "name", quick_of(CASES, {"lightgbm, three classes", "xgboost, two classes", "hist boosting, a number"})
)
def test_sets_of_categories_are_scored_as_by_onnxruntime(name: str) -> None:
    model = converted(CASES[name])
    usual = columns(FRAME)
    hard = hard_records(loaded(model), columns(pd.concat([FRAME, FRAME])))
    for inputs in (usual, hard):
        assert_same(run(model, inputs), open_session(model).run(inputs))


@pytest.mark.filterwarnings("ignore")
def test_each_set_is_one_node_however_many_categories_it_has() -> None:
    model = converted(CASES["lightgbm, two classes"])
    ensemble = next(node for node in onnx.load_model_from_string(model).graph.node if "Tree" in node.op_type)
    modes = next(list(attribute.strings) for attribute in ensemble.attribute if attribute.name == "nodes_modes")
    assert modes.count(b"BRANCH_EQ") > 100
    forest = loaded(model).forest
    # Between the inner nodes of binary trees and their leaves there is a difference of one for each tree.
    leaves = modes.count(b"LEAF")
    assert len(forest.words) // 2 == 2 * leaves - len(forest.roots)
    assert forest.members is not None
    assert sum(map(len, forest.members.codes.values())) > 20


@pytest.mark.filterwarnings("ignore")
def test_admission_chooses_the_kernel_for_categories() -> None:
    case = lightgbm.LGBMClassifier(**LIGHT | {"n_estimators": 60}).fit(FRAME, TWO)
    signature = admit(convert(case, FRAME.head(300), tolerance=1.0).onnx).signature
    assert signature.kernel == "trees"
    assert any("tree kernel" in note for note in signature.notes)


def test_the_kernel_is_tried_on_known_and_unknown_categories() -> None:
    model = converted(CASES["lightgbm, two classes"])
    cities = hard_records(loaded(model), columns(FRAME))["city"]
    unknown = ~np.isin(cities.astype(str), CITIES)
    assert 0 < unknown.mean() < 0.2
    assert len(np.unique(cities[~unknown].astype(str))) == len(CITIES)


@pytest.mark.parametrize("package", [lightgbm, xgboost])
def test_a_booster_of_numbers_is_one_ensemble(package: Any) -> None:
    x = FRAME[["area", "age"]].to_numpy()
    data = lightgbm.Dataset(x, TWO) if package is lightgbm else xgboost.DMatrix(x, TWO)
    objective = "binary" if package is lightgbm else "binary:logistic"
    booster = package.train({"objective": objective, "verbosity": -1 if package is lightgbm else 0}, data, 8)
    model = admit(convert(booster, x[:300]).onnx).model
    assert_same(run(model, {"input": x}), open_session(model).run({"input": x}))


# --- graphs written by hand ------------------------------------------------------------------------------------------

TREE: dict[str, Any] = {
    # x0 in (4, 0, 2.5) ? a : (x1 <= 1.5 ? b : c)
    "nodes_treeids": [0] * 7,
    "nodes_nodeids": [0, 1, 2, 3, 4, 5, 6],
    "nodes_modes": ["BRANCH_EQ", "BRANCH_EQ", "BRANCH_EQ", "LEAF", "BRANCH_LEQ", "LEAF", "LEAF"],
    "nodes_featureids": [0, 0, 0, 0, 1, 0, 0],
    "nodes_values": [4.0, 0.0, 2.5, 0.0, 1.5, 0.0, 0.0],
    "nodes_truenodeids": [3, 3, 3, 0, 5, 0, 0],
    "nodes_falsenodeids": [1, 2, 4, 0, 6, 0, 0],
}
ROWS = np.array(
    [[4, 0], [0, 0], [-0.0, 9], [2.5, 9], [2.4999, 9], [3, 0], [np.nan, 0], [np.nan, 9], [4, np.nan], [7, np.nan],
     [np.inf, 0], [-np.inf, 9]],
    dtype=np.float32,
)  # fmt: skip


def chain(**changes: Any) -> ModelProto:
    leaves = {"target_ids": [0] * 3, "target_treeids": [0] * 3, "target_nodeids": [3, 5, 6], "n_targets": 1}
    node = helper.make_node(
        "TreeEnsembleRegressor",
        ["x"],
        ["y"],
        domain="ai.onnx.ml",
        **TREE | leaves | {"target_weights": [1.0, 2.0, 3.0]} | changes,
    )
    return graph([node], {"x": (TensorProto.FLOAT, 2)})


def graph(nodes: list[Any], inputs: Mapping[str, tuple[int, int]]) -> ModelProto:
    made = helper.make_graph(
        nodes,
        "trees",
        [helper.make_tensor_value_info(name, kind, [None, width]) for name, (kind, width) in inputs.items()],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("ai.onnx.ml", 3)]
    model: ModelProto = helper.make_model(made, opset_imports=opsets, ir_version=8)
    return model


@pytest.mark.parametrize("missing", [0, 1])
def test_equalities_in_a_row_are_a_set_and_missing_values_go_where_they_are_sent(missing: int) -> None:
    model = chain(nodes_missing_value_tracks_true=[missing] * 3 + [0] * 4)
    results = run(model, {"x": ROWS})
    assert_same(results, open_session(model.SerializeToString()).run({"x": ROWS}))
    members = [1.0, 1.0, 1.0, 1.0]
    assert results["y"][:, 0].tolist() == [*members, 3, 2, *([1, 1] if missing else [2, 3]), 1, 3, 2, 3]


def test_equalities_with_ways_of_their_own_stay_apart() -> None:
    model = chain(nodes_missing_value_tracks_true=[0, 1, 0, 0, 0, 0, 0])
    assert load_trees(model) is None  # two nodes share a child that are not one set
    single = chain(nodes_modes=["BRANCH_LEQ", "BRANCH_EQ", *TREE["nodes_modes"][2:]])
    assert load_trees(single) is None


UNKNOWN: dict[str, Callable[[], ModelProto]] = {
    "a threshold for a category": lambda: chain(nodes_featureids=[0, 0, 0, 0, 0, 0, 0]),
    "a chain that ends in itself": lambda: chain(nodes_falsenodeids=[1, 2, 0, 0, 6, 0, 0]),
    "a chain in a circle behind the root": lambda: chain(nodes_falsenodeids=[1, 2, 1, 0, 6, 0, 0]),
    "a node that is its own end": lambda: chain(nodes_falsenodeids=[0, 2, 4, 0, 6, 0, 0]),
    "a chain that another node enters": lambda: chain(nodes_falsenodeids=[1, 2, 4, 0, 2, 0, 0]),
    "codes that are whole numbers": lambda: coded(keys_int64s=[1, 2], values_floats=[0.0, 1.0]),
    "two codes of one category": lambda: coded(keys_floats=[1.0, 1.0], values_floats=[0.0, 1.0]),
    "texts for numbers": lambda: coded(keys_strings=["a", "b"], values_floats=[0.0, 1.0]),
    "a text in another encoding": lambda: coded(keys_strings=[b"\xff", b"a"], values_floats=[0.0, 1.0]),
    "columns below each other": lambda: coded(axis=0, keys_floats=[1.0, 2.0], values_floats=[0.0, 1.0]),
    "an input beside the trees": lambda: coded(more=1, keys_floats=[1.0, 2.0], values_floats=[0.0, 1.0]),
}


def coded(axis: int = 1, more: int = 0, **keys: Any) -> ModelProto:
    """The chain behind codes of its first column."""
    nodes = [
        helper.make_node("LabelEncoder", ["a"], ["code"], domain="ai.onnx.ml", default_float=np.nan, **keys),
        helper.make_node("Concat", ["code", "b"], ["x"], axis=axis),
        chain().graph.node[0],
    ]
    texts = isinstance(keys.get("keys_strings", [""])[0], bytes)
    inputs = {"a": (TensorProto.STRING if texts else TensorProto.FLOAT, 1), "b": (TensorProto.FLOAT, 1)}
    return graph(nodes, inputs | ({"c": (TensorProto.FLOAT, 1)} if more else {}))


@pytest.mark.parametrize("name", UNKNOWN)
def test_other_graphs_are_left_to_onnxruntime(name: str) -> None:
    assert load_trees(UNKNOWN[name]()) is None


def test_categories_that_are_numbers_are_coded_as_by_onnxruntime() -> None:
    model = coded(keys_floats=[9.0, -1.0, 0.0], values_floats=[4.0, 2.5, 3.0])
    a = np.array([9, -1, 0, -0.0, 5, np.nan, np.inf], dtype=np.float32).reshape(-1, 1)
    inputs = {"a": a, "b": np.zeros_like(a)}
    results = run(model, inputs)
    assert_same(results, open_session(model.SerializeToString()).run(inputs))
    assert results["y"][:, 0].tolist() == [1, 1, 2, 2, 2, 2, 2]


@pytest.mark.parametrize("kind", [TensorProto.INT64, TensorProto.INT32, TensorProto.BOOL, TensorProto.DOUBLE])
def test_columns_of_other_types_may_be_cast(kind: int) -> None:
    nodes = [
        helper.make_node("Cast", ["a"], ["cast"], to=TensorProto.FLOAT),
        helper.make_node("Concat", ["cast", "b"], ["joined"], axis=-1),
        helper.make_node("Identity", ["joined"], ["x"]),
        chain().graph.node[0],
    ]
    model = graph(nodes, {"a": (kind, 1), "b": (TensorProto.FLOAT, 1)})
    a = np.arange(500).reshape(-1, 1) % 6
    given = {"a": a.astype(helper.tensor_dtype_to_np_dtype(kind)), "b": np.zeros((500, 1), np.float32)}
    inputs = hard_records(loaded(model), given)
    assert inputs["a"].dtype == given["a"].dtype
    assert_same(run(model, inputs), open_session(model.SerializeToString()).run(inputs))


@pytest.mark.parametrize("name", ["a", "b"])
def test_an_input_that_does_not_fit_is_refused(name: str) -> None:
    model = coded(keys_floats=[1.0, 2.0], values_floats=[0.0, 1.0])
    fitting = {"a": np.zeros((3, 1), np.float32), "b": np.zeros((3, 1), np.float32)}
    for wrong in (np.zeros((2, 1), np.float32), np.zeros((3, 2), np.float32), np.zeros((3, 1)), np.float32(1)):
        with pytest.raises(ScoringFailed):
            run(model, fitting | {name: np.asarray(wrong)})
    with pytest.raises(ScoringFailed):
        run(model, {name: fitting[name]})
