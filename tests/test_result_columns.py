"""The meaning of an output is decided by what makes it, and a version that changes its columns says so."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import pytest
from onnx import helper
from selection import quick_first
from service import problem, running
from sklearn.datasets import load_iris
from sklearn.ensemble import GradientBoostingClassifier, RandomForestClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.svm import SVC, LinearSVC

from batchserve.admission import admit
from batchserve.admission.makers import role_by_operator
from batchserve.admission.output_roles import read_outputs
from batchserve.conversion import convert

X, Y = load_iris(return_X_y=True)
X = X.astype("float32")


def bare(model: Any, y: Any = Y) -> onnx.ModelProto:
    """The graph without what the conversion says of it."""
    graph = onnx.load_model_from_string(convert(model.fit(X, y), X).onnx)
    del graph.metadata_props[:]
    return graph


@pytest.mark.parametrize("two", quick_first([False, True], 1))
@pytest.mark.parametrize(
    ("model", "role"),
    [
        (RandomForestClassifier(10, random_state=0), "probabilities"),
        pytest.param(RandomForestClassifier(20, random_state=0), "probabilities", marks=pytest.mark.slow),
        (GradientBoostingClassifier(n_estimators=3), "probabilities"),
        (LogisticRegression(max_iter=500), "probabilities"),
        (LinearSVC(), "scores"),
        (SVC(), "scores"),
    ],
)
def test_the_operator_decides_whatever_was_rounded_below_zero(model: Any, role: str, two: bool) -> None:
    graph = bare(model, Y > 0 if two else Y)
    name = graph.graph.output[1].name
    assert role_by_operator(graph, name) in (role, None)
    (_, output) = admit(graph.SerializeToString(), tuned=False).signature.outputs
    assert output.role == role
    rows: dict[str, np.ndarray[Any, Any]] = {
        graph.graph.output[0].name: np.zeros(3, np.int64),
        name: np.full((3, 3), [1.2, -1.2e-7, -0.2], np.float32),
    }
    if role_by_operator(graph, name) is not None:
        _, outputs = read_outputs(graph, {}, rows, [rows], {}, {})
        assert outputs[1].role == role


def test_a_softmax_behind_casts_and_reshapes_is_found() -> None:
    nodes = [
        helper.make_node("Softmax", ["x"], ["p"]),
        helper.make_node("Cast", ["p"], ["q"], to=1),
        helper.make_node("Identity", ["q"], ["y"]),
    ]
    graph = helper.make_model(helper.make_graph(nodes, "g", [], []))
    assert role_by_operator(graph, "y") == "probabilities"
    assert role_by_operator(graph, "x") is None


@pytest.mark.slow
def test_a_version_with_other_result_columns_says_so(tmp_path: Path) -> None:
    three = convert(LogisticRegression(max_iter=500).fit(X, Y), X).onnx
    two = convert(LogisticRegression(max_iter=500).fit(X, np.where(Y > 0, "yes", "no")), X).onnx
    same = convert(LogisticRegression(max_iter=400, C=2).fit(X, Y), X).onnx
    with running(tmp_path, worker=False) as api:
        assert api.register("iris", three)["changes"] is None
        changed = api.register("iris", two)
        assert changed["changes"] == {
            "before": 1,
            "added": {"probability_no": "Float32", "probability_yes": "Float32"},
            "removed": {f"probability_{label}": "Float32" for label in range(3)},
            "retyped": {"prediction": ["Int64", "String"]},
        }
        assert any("other columns than that of version 1" in note for note in changed["notes"])
        assert api.http.get("/v1/models/iris").json()["changes"] == changed["changes"]
        assert api.register("iris", three)["changes"] is None  # the first version again
    with running(tmp_path / "other", worker=False) as api:
        api.register("iris", three)
        assert api.register("iris", same)["changes"] is None


# --- several outputs under top_k -------------------------------------------------------------------------------------

TWO_HEADS = """
<ir_version: 8, opset_import: ["" : 17]>
g (float[N, 2] x) => (float[N, 3] colour, float[N, 2] size, float[N] OTHER)
<float[2, 3] a = {1, 0, 2, 0, 1, 0}> {
    wide = MatMul (x, a)
    colour = Softmax <axis = 1> (wide)
    size = Softmax <axis = 1> (x)
    last = Constant <value = int64[1] {1}> ()
    OTHER = ReduceSum <keepdims = 0> (x, last)
}"""


def two_heads(other: str) -> bytes:
    graph = onnx.parser.parse_model(TWO_HEADS.replace("OTHER", other))
    entry = graph.metadata_props.add()
    entry.key, entry.value = "batchserve.labels", json.dumps(["red", "green", "blue"])
    content: bytes = graph.SerializeToString()
    return content


def test_two_outputs_that_top_k_ranks_have_their_names_in_their_columns(tmp_path: Path) -> None:
    x = np.array([[1, 2], [3, -1], [0, 0.5]], np.float32)
    records = [{"x": row} for row in x.tolist()]
    with running(tmp_path) as api:
        api.register("heads", two_heads("total"))
        plain = api.http.post("/v1/models/heads/predict", json=records).json()["prediction"]
        assert set(plain[0]) >= {"probability_red", "probability_0", "total"}
        ranked = api.http.post("/v1/models/heads/predict?top_k=2", json=records).json()["prediction"]
        job = api.run("".join(f"{json.dumps(record)}\n" for record in records), "heads", top_k=2, passthrough="none")
        assert job["state"] == "completed", job["error"]
        lines = [json.loads(line) for line in api.result(job).text.splitlines()]
        for given, best, line in zip(plain, ranked, lines, strict=True):
            assert best | line == best
            for output, classes in (("colour", ("red", "green", "blue")), ("size", (0, 1))):
                first, second = sorted(classes, key=lambda label: -given[f"probability_{label}"])[:2]
                assert (best[f"label_{output}_1"], best[f"label_{output}_2"]) == (first, second)
                assert best[f"probability_{output}_2"] == pytest.approx(given[f"probability_{second}"])
            assert best["total"] == given["total"]


def test_a_ranking_whose_columns_another_output_has_is_refused_with_the_options(tmp_path: Path) -> None:
    with running(tmp_path) as api:
        api.register("heads", two_heads("label_size_1"))
        answer = api.http.post("/v1/predict?model=heads&top_k=1", content="a,b\n1,2\n")
        detail = problem(answer, 422, "invalid-options")["detail"]
        assert detail == "top_k: two columns of the result would be called 'label_size_1'"
        assert api.run("a,b\n1,2\n", "heads")["state"] == "completed"
