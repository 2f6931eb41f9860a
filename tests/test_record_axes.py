"""Records are found where the names of the axes say that they are, and each is answered as if it were alone."""

import io
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from onnx import parser
from recurrent import Shape, records_first, recurrent
from service import Api, running

from batchserve.admission import admit
from batchserve.domain import Signature
from batchserve.errors import ModelRefused
from batchserve.inference.session import open_session

HEAD = '<ir_version: 8, opset_import: ["":17]>'
STEPS = 5


def model(text: str) -> bytes:
    return bytes(parser.parse_model(f"{HEAD} {text}").SerializeToString())


def shapes(signature: Signature) -> dict[str, Shape]:
    return {tensor.name: list(tensor.shape) for tensor in signature.inputs}


ON_AXIS_1: dict[str, bytes] = {
    **{f"{kind}, steps first": recurrent(kind, ["seq", "batch", 4]) for kind in ("GRU", "LSTM", "RNN")},
    **{
        f"{kind} with a state": recurrent(
            kind, ["seq", "batch_size", 4], [1, "batch_size", 8], outputs={"y": [None, None, 8], "h": [1, None, 8]}
        )
        for kind in ("GRU", "LSTM", "RNN")
    },
    "two ways, letters": recurrent(
        "LSTM", ["T", "N", 4], [2, "N", 8], two_ways=True, outputs={"y": ["T", "N", 16], "h": [2, "N", 8]}
    ),
    "a fixed number of steps": recurrent("GRU", [STEPS, "N", 4]),
    "a fixed number of records": recurrent("GRU", [STEPS, 3, 4], [1, 3, 8]),
    "one record": recurrent("LSTM", [STEPS, 1, 4], [1, 1, 8]),
    "a state of one record": recurrent("LSTM", ["seq", "batch", 4], [1, 1, 8]),
    "named by the output": recurrent("LSTM", [None, None, 4], outputs={"y": ["seq", "batch", 8]}),
    "step by step": model("g (float[steps,Batch,4] x) => (float[steps,Batch,4] y) { y = Tanh(x) }"),
    "columns": model("g (float[4,batch] x) => (float[4,batch] y) { y = Softmax<axis=0>(x) }"),
    "columns to one value": model("g (float[4,N] x) => (float[N] y) { y = ReduceMax<axes=[0], keepdims=0>(x) }"),
    "the last of three": model("g (float[T,3,batch] x) => (float[T,3,batch] y) { y = Softmax<axis=1>(x) }"),
}


@pytest.mark.parametrize("name", ON_AXIS_1)
def test_each_record_is_answered_as_if_it_were_alone(name: str) -> None:
    graph = ON_AXIS_1[name]
    admitted = admit(graph, tuned=False)
    signature = admitted.signature
    assert signature.mode in ("rows", "fixed")
    assert any("records on axis" in note and "input 'x'" in note.lower() for note in signature.notes), signature.notes
    records = signature.batch if signature.mode == "fixed" else 3
    random = np.random.default_rng(1)
    given = {
        tensor.name: random.standard_normal((records, *(size or STEPS for size in tensor.shape[1:])), dtype=np.float32)
        for tensor in signature.inputs
    }
    together = open_session(admitted.model).run(given)
    axis, wanted = (2 if name == "the last of three" else 1), 3 if name == "a fixed number of records" else 1
    for record in range(records):
        own = {key: np.moveaxis(array[[record] * wanted], 0, axis) for key, array in given.items()}
        for key, array in open_session(graph).run(own).items():
            expected = np.moveaxis(array, min(axis, array.ndim - 1), 0)[0]
            np.testing.assert_allclose(together[key][record].reshape(-1), expected.reshape(-1), atol=1e-5)


STAY: dict[str, bytes] = {
    "records first": records_first("LSTM", ["batch", "seq", 4]),
    "a matrix": model("g (float[M,N] x) => (float[M,N] y) { y = Softmax<axis=1>(x) }"),
    "points of one record": model("g (float[1,N,3] x) => (float[1,N,3] y) { y = Neg(x) }"),
    "points of records": model("g (float[B,N,3] x) => (float[B,N,3] y) { y = Neg(x) }"),
    "points that influence each other": model(
        "g (float[clouds,N,3] x) => (float[clouds,N,3] y) { y = Softmax<axis=1>(x) }"
    ),
    "lengths of the batch": model("g (float[rows,batch_length] x) => (float[rows,batch_length] y) { y = Neg(x) }"),
}


@pytest.mark.parametrize("name", STAY)
def test_records_stay_on_the_first_axis_where_nothing_proves_another(name: str) -> None:
    admitted = admit(STAY[name], tuned=False)
    assert not any("has its records on axis" in note for note in admitted.signature.notes)
    assert admitted.signature.mode in ("rows", "fixed")


def test_a_state_on_axis_1_is_put_first_beside_records_that_are() -> None:
    admitted = admit(records_first("GRU", ["batch", "seq", 4], [1, "batch", 8]), tuned=False)
    assert shapes(admitted.signature) == {"x": [None, None, 4], "h0": [None, 1, 8]}
    assert admitted.signature.mode == "rows"


def test_an_input_without_records_is_refused_with_its_axis_and_the_way_out() -> None:
    graph = "g (float[seq,batch,4] x, float[seq,1,4] places) => (float[seq,batch,4] y) { y = Add(x, places) }"
    with pytest.raises(ModelRefused, match=re.escape("input 'places' has no axis of records")) as caught:
        admit(model(graph))
    assert "'seq'" in caught.value.detail
    assert "Export the model with an axis 'batch' in 'places'" in caught.value.detail


@pytest.mark.parametrize("kind", ["GRU", "LSTM", "RNN"])
def test_a_layout_that_onnx_runtime_does_not_compute_is_refused_with_its_reason(kind: str) -> None:
    with pytest.raises(ModelRefused, match="layout"):
        admit(recurrent(kind, ["batch", "seq", 4], layout=1))


def test_named_columns_say_what_the_axes_are() -> None:
    graph = parser.parse_model(f"{HEAD} g (float[3,N] x) => (float[3,N] y) {{ y = Neg(x) }}")
    entry = graph.metadata_props.add()
    entry.key = "batchserve.columns"
    entry.value = "[" + ",".join(f'{{"name": "{name}", "dtype": "float32", "input": "x"}}' for name in "ab") + "]"
    assert shapes(admit(graph.SerializeToString(), tuned=False).signature) == {"x": [3, 2]}


@pytest.fixture(scope="module")
def nets(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    with running(tmp_path_factory.mktemp("nets"), chunk_records=4) as api:
        yield api


STATES = {
    "steps without names": (recurrent("LSTM", [None, 1, 4], [1, 1, 8]), 0),
    "steps called batch": (recurrent("GRU", ["batch", 1, 4], [1, 1, 8]), 0),
    "names": (recurrent("LSTM", ["seq", "batch", 4]), 1),
    "records first": (records_first("GRU", ["batch", "seq", 4]), 0),
}


@pytest.mark.parametrize("name", STATES)
def test_a_job_of_a_recurrent_net_answers_each_record_as_alone_or_all_in_one_run(nets: Api, name: str) -> None:
    graph, axis = STATES[name]
    nets.register("net", graph)
    whole = nets.http.get("/v1/models/net").json()["mode"] == "whole"
    x = np.random.default_rng(2).standard_normal((9, *((1,) if whole else (STEPS,)), 4), dtype=np.float32)
    states = ["h0", "c0"][: 2 if b"c0" in graph else 1] if whole else []
    stream = io.BytesIO()
    arrays: dict[str, Any] = {"x": x, **dict.fromkeys(states, np.float32(0.5))}
    np.savez(stream, **arrays)
    job = nets.run(stream.getvalue(), "net", format="npy")
    assert (job["state"], job["rows"]["failed"]) == ("completed", 0), job
    got = np.load(io.BytesIO(nets.result(job).content))
    session = open_session(graph)
    if whole:
        half = np.full((1, 1, 8), 0.5, np.float32)
        np.testing.assert_allclose(got, session.run({"x": x, **dict.fromkeys(states, half)})["y"], atol=1e-5)
        return
    for record in range(9):
        alone = session.run({"x": np.moveaxis(x[record : record + 1], 0, axis)})["y"]
        np.testing.assert_allclose(got[record], np.moveaxis(alone, axis, 0)[0], atol=1e-5)
