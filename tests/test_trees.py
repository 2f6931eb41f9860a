"""The tree kernel equals ONNX Runtime on converted tree models, and is not used for other graphs."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
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
from sklearn.ensemble import (
    AdaBoostClassifier,
    ExtraTreesClassifier,
    ExtraTreesRegressor,
    GradientBoostingClassifier,
    GradientBoostingRegressor,
    HistGradientBoostingClassifier,
    HistGradientBoostingRegressor,
    IsolationForest,
    RandomForestClassifier,
    RandomForestRegressor,
)
from sklearn.tree import DecisionTreeClassifier, DecisionTreeRegressor

from batchserve.admission import admit
from batchserve.admission.probe_inputs import feeds
from batchserve.admission.tuning import MEASURED_RECORDS, tune
from batchserve.conversion import convert
from batchserve.domain import Signature
from batchserve.errors import ScoringFailed
from batchserve.inference.kernels import Arrays, Session, trees
from batchserve.inference.kernels.trees import TreeModel, TreeSession, hard_records, load_trees
from batchserve.inference.session import OnnxSession, Sessions, open_session
from batchserve.rows import signature_adapter

RANDOM = np.random.default_rng(0)
X = RANDOM.standard_normal((1200, 6)).astype(np.float32)
HOLES = np.where(RANDOM.random(X.shape) < 0.1, np.float32(np.nan), X)
NUMBER = X @ np.arange(1, 7) + np.abs(X[:, 0])
THREE = np.digitize(NUMBER, [-4, 4])
TWO = (NUMBER > 0).astype(np.int64)
NAMES = np.array(["Öl", "b", "c"])
BOOSTED = {"n_estimators": 12, "n_jobs": 1}


def seeded(kind: Callable[..., Any], **options: Any) -> Any:
    return kind(random_state=0, **options)


def light(kind: str, **options: Any) -> Any:
    return getattr(lightgbm, kind)(verbose=-1, **BOOSTED, **options)


def extreme(kind: str) -> Any:
    return getattr(xgboost, kind)(**BOOSTED)


Case = tuple[Any, np.ndarray, np.ndarray]
CASES: dict[str, Callable[[], Case]] = {
    "forest, three classes": lambda: (seeded(RandomForestClassifier, n_estimators=20, max_depth=7), X, THREE),
    "forest, three names": lambda: (seeded(RandomForestClassifier, n_estimators=20), X, NAMES[THREE]),
    "forest, two classes": lambda: (seeded(RandomForestClassifier, n_estimators=20), X, TWO + 5),
    "forest, two names": lambda: (seeded(RandomForestClassifier, n_estimators=20), X, NAMES[TWO]),
    "extra trees": lambda: (seeded(ExtraTreesClassifier, n_estimators=20), X, THREE),
    "one tree": lambda: (seeded(DecisionTreeClassifier), X, THREE),
    "one leaf": lambda: (seeded(DecisionTreeClassifier, min_samples_split=5000), X, THREE),
    "boosting, two classes": lambda: (seeded(GradientBoostingClassifier, n_estimators=12), X, NAMES[TWO]),
    "boosting, three classes": lambda: (seeded(GradientBoostingClassifier, n_estimators=12), X, THREE),
    "hist boosting, two classes": lambda: (seeded(HistGradientBoostingClassifier, max_iter=12), HOLES, TWO),
    "hist boosting, three names": lambda: (seeded(HistGradientBoostingClassifier, max_iter=12), HOLES, NAMES[THREE]),
    "xgboost, two classes": lambda: (extreme("XGBClassifier"), HOLES, TWO),
    "xgboost, three classes": lambda: (extreme("XGBClassifier"), HOLES, THREE),
    "lightgbm, two names": lambda: (light("LGBMClassifier"), HOLES, NAMES[TWO]),
    "lightgbm, three classes": lambda: (light("LGBMClassifier"), HOLES, THREE),
    "lightgbm, deep": lambda: (light("LGBMClassifier", num_leaves=200, min_child_samples=2), HOLES, THREE),
    "regression forest": lambda: (seeded(RandomForestRegressor, n_estimators=20), X, NUMBER),
    "extra trees regression": lambda: (seeded(ExtraTreesRegressor, n_estimators=20, max_depth=3), X, NUMBER),
    "two numbers": lambda: (seeded(RandomForestRegressor, n_estimators=8), X, np.stack([NUMBER, -X[:, 0]], axis=1)),
    "regression tree": lambda: (seeded(DecisionTreeRegressor), X, NUMBER),
    "a number from one leaf": lambda: (seeded(DecisionTreeRegressor, min_samples_split=5000), X, NUMBER),
    "boosted regression": lambda: (seeded(GradientBoostingRegressor, n_estimators=12), X, NUMBER),
    "hist boosted regression": lambda: (seeded(HistGradientBoostingRegressor, max_iter=12), HOLES, NUMBER),
    "xgboost regression": lambda: (extreme("XGBRegressor"), HOLES, NUMBER),
    "lightgbm regression": lambda: (light("LGBMRegressor"), HOLES, NUMBER),
}


def converted(case: Case) -> bytes:
    """The fitted estimator as ONNX. That the graph rounds differently from the estimator does not matter here."""
    estimator, x, y = case
    frame = pd.DataFrame(x, columns=[f"x{column}" for column in range(x.shape[1])])
    return convert(estimator.fit(frame, y), frame.head(200), tolerance=1.0).onnx


@pytest.fixture(scope="module")
def forest() -> bytes:
    return converted(CASES["forest, three classes"]())


def kernel(model: bytes | ModelProto) -> TreeSession:
    loaded = load_trees(model)
    assert loaded is not None
    session = trees.open_trees(loaded)
    assert session is not None
    return session


def loaded(model: bytes) -> TreeModel:
    found = load_trees(model)
    assert found is not None
    return found


# --- the same as ONNX Runtime ----------------------------------------------------------------------------------------


QUICK = (*("forest, three names", "one leaf", "hist boosting, three names", "two numbers", "xgboost regression"),)
"""The others run with the slow tests."""


@pytest.mark.parametrize("name", quick_of(CASES, QUICK))
def test_the_kernel_gives_what_onnxruntime_gives(name: str) -> None:
    model = admit(converted(CASES[name]())).model
    records = hard_records(loaded(model), {"input": np.resize(X, (3000, 6))})
    assert np.isnan(records["input"]).any()
    assert_same(kernel(model).run(records), open_session(model).run(records))
    assert_same(kernel(model).run({"input": X}), open_session(model).run({"input": X}))


def test_sums_are_equal_to_the_last_bit(forest: bytes) -> None:
    """A forest's probabilities are sums of weights in the order of the trees."""
    results, expected = kernel(forest).run({"input": HOLES}), open_session(forest).run({"input": HOLES})
    assert results["probabilities"].tobytes() == expected["probabilities"].tobytes()


@pytest.mark.parametrize("records", [0, 1, 2, 63, 64, 65, 2047, 2049, 100_003])
def test_any_number_of_records_works(forest: bytes, records: int) -> None:
    inputs = {"input": np.random.default_rng(1).standard_normal((records, 6), dtype=np.float32)}
    assert_same(kernel(forest).run(inputs), open_session(forest).run(inputs))


def test_a_record_alone_gets_what_it_gets_among_others(forest: bytes) -> None:
    session = kernel(forest)
    together = session.run({"input": HOLES[:70]})["probabilities"]
    alone = [session.run({"input": HOLES[[row]]})["probabilities"] for row in range(70)]
    assert np.concatenate(alone).tobytes() == together.tobytes()


def test_records_need_not_be_contiguous(forest: bytes) -> None:
    columns_first = np.asfortranarray(X)
    assert_same(kernel(forest).run({"input": columns_first}), open_session(forest).run({"input": X}))


def test_threads_may_share_a_session(forest: bytes) -> None:
    session, results = kernel(forest), dict[int, Arrays]()
    threads = [
        threading.Thread(target=lambda place=place: results.update({place: session.run({"input": X + place})}))
        for place in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    reference = open_session(forest)
    for place, outputs in results.items():
        assert_same(outputs, reference.run({"input": X + np.float32(place)}))
    assert len(results) == 4


# --- graphs made by hand ---------------------------------------------------------------------------------------------

TREE: dict[str, Any] = {
    # x0 <= 1.5 ? (x1 < 0 ? a : b) : c
    "nodes_treeids": [0] * 5,
    "nodes_nodeids": [0, 1, 2, 3, 4],
    "nodes_featureids": [0, 1, 0, 0, 0],
    "nodes_modes": ["BRANCH_LEQ", "BRANCH_LT", "LEAF", "LEAF", "LEAF"],
    "nodes_values": [1.5, 0.0, 0.0, 0.0, 0.0],
    "nodes_truenodeids": [1, 3, 0, 0, 0],
    "nodes_falsenodeids": [2, 4, 0, 0, 0],
}


def regressor(weights: tuple[float, ...] = (1.0, 2.0, 3.0), **changes: Any) -> ModelProto:
    targets = {"target_ids": [0] * 3, "target_treeids": [0] * 3, "target_nodeids": [3, 4, 2], "n_targets": 1}
    node = helper.make_node(
        "TreeEnsembleRegressor",
        ["x"],
        ["y"],
        domain="ai.onnx.ml",
        **TREE | targets | {"target_weights": list(weights)} | changes,
    )
    return graph([node], {"y": TensorProto.FLOAT})


def classifier(weights: tuple[float, ...], **changes: Any) -> ModelProto:
    classes = {"class_ids": [0] * 3, "class_treeids": [0] * 3, "class_nodeids": [3, 4, 2], "classlabels_int64s": [7, 9]}
    node = helper.make_node(
        "TreeEnsembleClassifier",
        ["x"],
        ["label", "scores"],
        domain="ai.onnx.ml",
        **TREE | classes | {"class_weights": list(weights)} | changes,
    )
    return graph([node], {"label": TensorProto.INT64, "scores": TensorProto.FLOAT})


def graph(nodes: list[Any], outputs: dict[str, int], kind: int = TensorProto.FLOAT, columns: Any = 2) -> ModelProto:
    made = helper.make_graph(
        nodes,
        "trees",
        [helper.make_tensor_value_info("x", kind, [None, columns])],
        [helper.make_tensor_value_info(name, output, None) for name, output in outputs.items()],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("ai.onnx.ml", 3)]
    model: ModelProto = helper.make_model(made, opset_imports=opsets, ir_version=8)
    return model


NAN, INFINITY = np.nan, np.inf
ROWS = np.array(
    [[1.5, 0], [1.5, -1e-45], [np.nextafter(np.float32(1.5), np.float32(2)), 0], [1, -0.0], [-INFINITY, INFINITY],
     [INFINITY, 0], [NAN, 0], [0, NAN], [NAN, NAN]],
    dtype=np.float32,
)  # fmt: skip


def values_of(model: ModelProto) -> list[float]:
    results = kernel(model).run({"x": ROWS})
    assert_same(results, open_session(model.SerializeToString()).run({"x": ROWS}))
    found: list[float] = results["y"][:, 0].tolist()
    return found


class Watched:
    """A session that keeps the records it was given, by their number in a run."""

    def __init__(self, session: Session) -> None:
        self.close, self._run = session.close, session.run
        self.records: dict[int, set[bytes]] = {}

    def run(self, inputs: Arrays) -> Arrays:
        (array,) = inputs.values()
        self.records.setdefault(len(array), set()).update(record.tobytes() for record in array)
        return self._run(inputs)


def test_the_batch_is_chosen_by_records_that_differ() -> None:
    """A few, scored again and again, are scored as fast in small batches as no others are."""
    content = regressor().SerializeToString()
    signature = admit(content, tuned=False).signature
    session = Watched(open_session(content))
    tune(signature, content, session, next(feeds(regressor(), signature.inputs, {})), spent=10)
    assert min(len(session.records[batch]) for batch in (1, 8, 64)) >= MEASURED_RECORDS


def test_thresholds_are_compared_exactly_and_nan_fails_every_test() -> None:
    assert values_of(regressor()) == [2, 1, 3, 2, 2, 3, 3, 2, 3]


def test_nan_goes_where_the_node_sends_it() -> None:
    assert values_of(regressor(nodes_missing_value_tracks_true=[1, 0, 0, 0, 0])) == [2, 1, 3, 2, 2, 3, 2, 2, 2]
    assert values_of(regressor(nodes_missing_value_tracks_true=[0, 1, 0, 0, 0])) == [2, 1, 3, 2, 2, 3, 3, 1, 3]
    assert values_of(regressor(nodes_missing_value_tracks_true=[1, 1, 0, 0, 0])) == [2, 1, 3, 2, 2, 3, 2, 1, 1]


def test_an_infinite_threshold_parts_what_is_missing_from_the_rest() -> None:
    assert values_of(regressor(nodes_values=[INFINITY, 0.0, 0.0, 0.0, 0.0])) == [2, 1, 2, 2, 2, 2, 3, 2, 3]


def test_sums_may_be_averaged_and_start_elsewhere() -> None:
    assert values_of(regressor(base_values=[10.0], aggregate_function="AVERAGE")) == [
        12,
        11,
        13,
        12,
        12,
        13,
        13,
        12,
        13,
    ]


def test_nodes_may_have_any_numbers_in_any_order() -> None:
    model = regressor(
        nodes_treeids=[4] * 5,
        nodes_nodeids=[3, 1, 0, 9, 7],
        nodes_truenodeids=[1, 9, 0, 0, 0],
        nodes_falsenodeids=[0, 7, 0, 0, 0],
        target_treeids=[4] * 3,
        target_nodeids=[0, 9, 7],
        target_weights=[3.0, 1.0, 2.0],
    )
    # ONNX Runtime needs numbers below the count of nodes: it gets the same tree with such numbers.
    assert kernel(model).run({"x": ROWS})["y"][:, 0].tolist() == values_of(regressor())


@pytest.mark.parametrize("transform", ["NONE", "LOGISTIC", "SOFTMAX"])
@pytest.mark.parametrize("weights", [(0.1, 0.5, 0.9), (-0.4, 0.0, 2.0)])
@pytest.mark.parametrize("base", [None, [0.25]])
def test_two_classes_share_one_sum(transform: str, weights: tuple[float, ...], base: list[float] | None) -> None:
    """The scores then depend on the signs of the weights."""
    model = classifier(weights, post_transform=transform, **{"base_values": base} if base else {})
    assert_same(kernel(model).run({"x": ROWS}), open_session(model.SerializeToString()).run({"x": ROWS}))


@pytest.mark.parametrize("transform", ["NONE", "LOGISTIC", "SOFTMAX"])
@pytest.mark.parametrize("base", [None, [0.5, -0.25, 0.5]])
def test_the_first_of_equal_classes_is_chosen(transform: str, base: list[float] | None) -> None:
    every = [(node, label) for node in (3, 4, 2) for label in range(3)]
    model = classifier(
        (0.5, 0.5, -1.0, 0.0, 2.0, 2.0, -3.0, -3.0, -3.0),
        class_nodeids=[node for node, _ in every],
        class_ids=[label for _, label in every],
        class_treeids=[0] * 9,
        classlabels_int64s=[30, 10, 20],
        post_transform=transform,
        **{"base_values": base} if base else {},
    )
    results = kernel(model).run({"x": ROWS})
    assert_same(results, open_session(model.SerializeToString()).run({"x": ROWS}))
    if base is None:
        assert set(results["label"].tolist()) == {30, 10}


@pytest.mark.parametrize(("kind", "dtype"), [(TensorProto.DOUBLE, np.float64), (TensorProto.INT64, np.int64)])
def test_a_cast_may_precede_the_trees(kind: int, dtype: type) -> None:
    cast = helper.make_node("Cast", ["x"], ["cast"], to=TensorProto.FLOAT)
    ensemble = regressor().graph.node[0]
    ensemble.input[0] = "cast"
    rename = helper.make_node("Identity", ["y"], ["named"])
    model = graph([cast, ensemble, rename], {"named": TensorProto.FLOAT}, kind)
    rows: np.ndarray = np.array([[1.5, 0], [1.5 + 1e-12, -1], [2, 5], [2**53 + 1, 3]]).astype(dtype)
    assert_same(kernel(model).run({"x": rows}), open_session(model.SerializeToString()).run({"x": rows}))


def test_outputs_keep_the_names_and_the_order_of_the_graph() -> None:
    ensemble = classifier((0.1, 0.5, 0.9)).graph.node[0]
    ensemble.output[:] = ["inner", "scores"]
    rename = helper.make_node("Identity", ["inner"], ["label"])
    model = graph([ensemble, rename], {"scores": TensorProto.FLOAT, "label": TensorProto.INT64})
    assert list(kernel(model).run({"x": ROWS})) == ["scores", "label"]
    only = graph([ensemble], {"scores": TensorProto.FLOAT})
    assert list(kernel(only).run({"x": ROWS})) == ["scores"]


# --- what is left to ONNX Runtime ------------------------------------------------------------------------------------

BOTH = {"class_ids": [0, 1, 0], "class_nodeids": [3, 4, 2]}
UNKNOWN: dict[str, Callable[[], ModelProto]] = {
    "another test": lambda: regressor(nodes_modes=["BRANCH_GT", "BRANCH_LT", "LEAF", "LEAF", "LEAF"]),
    "the least of the trees": lambda: regressor(aggregate_function="MIN"),
    "a transformed number": lambda: regressor(post_transform="LOGISTIC"),
    "probit": lambda: classifier((0.1, 0.5, 0.9), post_transform="PROBIT"),
    "weights for both of two classes": lambda: classifier((0.1, 0.5, 0.9), **BOTH),
    "two bases for two classes": lambda: classifier((0.1, 0.5, 0.9), base_values=[0.1, 0.2]),
    "one class": lambda: classifier((0.1, 0.5, 0.9), classlabels_int64s=[1]),
    "a class without trees": lambda: classifier((0.1, 0.5, 0.9), classlabels_int64s=[1, 2, 3]),
    "a number without trees": lambda: regressor(n_targets=2, base_values=[1.0, 2.0]),
    "a leaf without a weight": lambda: regressor(
        (1.0, 2.0), target_ids=[0] * 2, target_treeids=[0] * 2, target_nodeids=[3, 4]
    ),
    "a leaf with two weights": lambda: regressor(target_nodeids=[3, 3, 2]),
    "a weight at a branch": lambda: regressor(target_nodeids=[3, 4, 1]),
    "a weight that is not a number": lambda: regressor((1.0, NAN, 3.0)),
    "a threshold that is not a number": lambda: regressor(nodes_values=[NAN, 0.0, 0.0, 0.0, 0.0]),
    "a target that there is not": lambda: regressor(target_ids=[0, 0, 1]),
    "a column that there is not": lambda: regressor(nodes_featureids=[0, 2, 0, 0, 0]),
    "a column before the first": lambda: regressor(nodes_featureids=[0, -1, 0, 0, 0]),
    "a child that there is not": lambda: regressor(nodes_truenodeids=[1, 5, 0, 0, 0]),
    "a child before the first": lambda: regressor(nodes_truenodeids=[1, -1, 0, 0, 0]),
    "a node that is its own child": lambda: regressor(nodes_truenodeids=[1, 1, 0, 0, 0]),
    "a node that is its own grandchild": lambda: regressor(nodes_truenodeids=[1, 0, 0, 0, 0]),
    "a node with two parents": lambda: regressor(nodes_truenodeids=[1, 2, 0, 0, 0]),
    "two nodes of one number": lambda: regressor(nodes_nodeids=[0, 1, 2, 3, 3]),
    "huge numbers": lambda: regressor(nodes_nodeids=[0, 1, 2, 3, 2**40]),
    "a tree in two pieces": lambda: regressor(nodes_treeids=[0, 1, 0, 0, 0]),
    "lists of different lengths": lambda: regressor(nodes_featureids=[0, 1, 0, 0]),
    "numbers in double precision": lambda: regressor(
        nodes_values_as_tensor=helper.make_tensor("", TensorProto.DOUBLE, [5], [1.5, 0, 0, 0, 0])
    ),
    "records in double precision": lambda: graph(
        [regressor().graph.node[0]], {"y": TensorProto.FLOAT}, TensorProto.DOUBLE
    ),
    "an open number of columns": lambda: graph(
        [regressor().graph.node[0]], {"y": TensorProto.FLOAT}, TensorProto.FLOAT, None
    ),
    "something behind the trees": lambda: graph(
        [regressor().graph.node[0], helper.make_node("Exp", ["y"], ["z"])], {"z": TensorProto.FLOAT}
    ),
    "two ensembles": lambda: onnx.load_model_from_string(
        converted((seeded(AdaBoostClassifier, n_estimators=2), X, THREE))
    ),
    "trees inside a larger graph": lambda: onnx.load_model_from_string(
        converted((seeded(IsolationForest, n_estimators=2), X, THREE))
    ),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_graphs_that_the_kernel_does_not_support_are_left_to_onnxruntime(name: str) -> None:
    assert load_trees(UNKNOWN[name]()) is None


def test_bytes_that_are_not_a_model_have_no_trees() -> None:
    assert load_trees(b"\xff" * 100) is None


# --- sessions --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "inputs",
    [{"input": X[:, :3]}, {"input": X.astype(np.float64)}, {"input": X[0]}, {"other": X}, {"input": X, "other": X}, {}],
)
def test_an_input_that_does_not_fit_is_refused(forest: bytes, inputs: Arrays) -> None:
    with pytest.raises(ScoringFailed):
        kernel(forest).run(inputs)


def test_a_closed_session_says_so(forest: bytes) -> None:
    session = open_session(forest, kernel="trees")
    session.close()
    session.close()
    with pytest.raises(ScoringFailed, match="closed"):
        session.run({"input": X})


def test_the_kernel_is_used_when_it_is_requested(forest: bytes, tmp_path: Path) -> None:
    path = tmp_path / "forest.onnx"
    path.write_bytes(forest)
    assert isinstance(open_session(forest), OnnxSession)
    assert isinstance(open_session(forest, kernel="trees"), TreeSession)
    assert isinstance(open_session(path, kernel="trees"), TreeSession)


def test_another_graph_runs_in_onnxruntime_whatever_is_requested() -> None:
    model = UNKNOWN["something behind the trees"]().SerializeToString()
    session = open_session(model, kernel="trees")
    assert isinstance(session, OnnxSession)
    np.testing.assert_allclose(session.run({"x": ROWS[:1]})["z"], [[np.exp(2)]], rtol=1e-6)


def test_sessions_of_both_kernels_are_kept_apart(forest: bytes) -> None:
    sessions = Sessions(4)
    assert isinstance(sessions.get("digest", 1, lambda: forest), OnnxSession)
    fast = sessions.get("digest", 1, lambda: forest, "trees")
    assert isinstance(fast, TreeSession)
    assert sessions.get("digest", 1, lambda: forest, "trees") is fast


def without_numba(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "numba", None)
    monkeypatch.delitem(sys.modules, "batchserve.inference.kernels.traversal", raising=False)
    monkeypatch.delattr("batchserve.inference.kernels.traversal", raising=False)


def test_a_host_without_the_extra_uses_onnxruntime(forest: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = open_session(forest, kernel="trees").run({"input": HOLES})
    without_numba(monkeypatch)
    session = open_session(forest, kernel="trees")
    assert isinstance(session, OnnxSession)
    assert_same(session.run({"input": HOLES}), expected)


@pytest.mark.slow
def test_code_that_cannot_be_cached_is_compiled_again(forest: bytes, tmp_path: Path) -> None:
    (tmp_path / "forest.onnx").write_bytes(forest)
    program = (
        "import sys, pathlib, numpy, batchserve.inference.session as session\n"
        "opened = session.open_session(pathlib.Path('forest.onnx'), kernel='trees')\n"
        "print(type(opened).__name__, opened.run({'input': numpy.zeros((2, 6), 'f4')})['label'].tolist())"
    )
    # With this locator there is a folder only for code in zip archives.
    environment = os.environ | {"NUMBA_CACHE_LOCATOR_CLASSES": "ZipCacheLocator"}
    command = [sys.executable, "-W", "error", "-c", program]
    done = subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True, text=True)
    label = open_session(forest).run({"input": np.zeros((2, 6), np.float32)})["label"].tolist()
    assert done.stdout.strip() == f"TreeSession {label}"


# --- admission -------------------------------------------------------------------------------------------------------


def test_admission_chooses_the_kernel_where_it_is_equal_and_faster(forest: bytes) -> None:
    signature = admit(forest).signature
    assert (signature.kernel, signature.threads) == ("trees", 1)
    assert any("tree kernel" in note and "x as fast as ONNX Runtime" in note for note in signature.notes)
    assert signature.records_per_second is not None


def test_admission_rejects_a_kernel_that_differs(forest: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = TreeSession.run

    def run(session: TreeSession, inputs: Arrays) -> Arrays:
        results = honest(session, inputs)
        results["probabilities"][-1] += np.float32(3e-6)  # one record of thousands
        return results

    monkeypatch.setattr(TreeSession, "run", run)
    signature = admit(forest).signature
    assert signature.kernel == "onnxruntime"
    assert not any("kernel" in note for note in signature.notes)


def test_admission_rejects_a_kernel_that_gives_another_label(forest: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = TreeSession.run

    def run(session: TreeSession, inputs: Arrays) -> Arrays:
        results = honest(session, inputs)
        results["label"][-1] += 1
        return results

    monkeypatch.setattr(TreeSession, "run", run)
    assert admit(forest).signature.kernel == "onnxruntime"


def test_admission_rejects_a_kernel_that_is_slower(forest: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = TreeSession.run

    def run(session: TreeSession, inputs: Arrays) -> Arrays:
        threading.Event().wait(0.05)
        return honest(session, inputs)

    monkeypatch.setattr(TreeSession, "run", run)
    assert admit(forest).signature.kernel == "onnxruntime"


def test_admission_without_the_extra_chooses_onnxruntime(forest: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    without_numba(monkeypatch)
    assert admit(forest).signature.kernel == "onnxruntime"


def test_the_kernel_is_tried_on_edge_cases(forest: bytes) -> None:
    model = loaded(forest)
    features, thresholds = model.forest.splits
    assert len(features) == len(thresholds) > 100
    rows = hard_records(model, {"input": X})["input"]
    exact = np.zeros(len(rows), dtype=bool)
    for column in range(6):
        exact |= np.isin(rows[:, column], thresholds[features == column])
    assert exact.mean() > 0.9
    assert np.isnan(rows[0]).all()
    assert np.isinf(rows[1:3]).all()
    assert 0.02 < np.isnan(rows).mean() < 0.1


def test_signatures_stored_before_there_were_kernels_still_load() -> None:
    stored = json.loads(signature_adapter.dump_json(Signature((), ())))
    assert stored.pop("kernel") == "onnxruntime"
    assert signature_adapter.validate_json(json.dumps(stored)).kernel == "onnxruntime"
