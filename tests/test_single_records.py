"""With one record in a run, an output of any length belongs to that record."""

import io
import json
from collections.abc import Iterator

import numpy as np
import orjson
import polars as pl
import pytest
from onnx import parser
from service import Api, running

from batchserve.admission import admit
from batchserve.inference.session import open_session

HEAD = '<ir_version: 8, opset_import: ["":17]>'

FOUND = """
    limit = Constant<value_float=1.0>() over = Greater(%s, limit) places = NonZero(over)
    rows = Transpose<perm=[1,0]>(places)
    last = Constant<value_ints=[1]>() end = Constant<value_ints=[2]>() axis = Constant<value_ints=[1]>()
    start = Slice(rows, last, end, axis) edge = Cast<to=1>(start) far = Add(edge, limit)
"""
"""The places of the values above 1."""

DETECTOR = f"""{HEAD} detector (float[1,6] image) => (float[found,4] boxes, float[found] scores, int64 count) {{
    {FOUND % "image"} boxes = Concat<axis=1>(edge, edge, far, far) values = GatherND(image, rows) scores = Neg(values)
    size = Shape(scores) count = Squeeze(size) }}"""
"""Lists what it finds in one image, as detectors with non-maximum suppression inside do."""

BATCHED = f"""{HEAD} detector (float[batch,6] image) => (float[found,7] y) {{
    {FOUND % "image"} none = Constant<value_ints=[0]>() whose = Slice(rows, none, last, axis) of = Cast<to=1>(whose)
    y = Concat<axis=1>(of, edge, edge, far, far, edge, far) }}"""
"""The same for any number of images: all that it finds in one list, with the number of the image."""

IMAGES = [[0, 0, 0, 0, 0, 0], [2, 0, 0, 3, 0, 9], [0, 5, 0, 0, 0, 0], [2, 2, 2, 2, 2, 2]]
RAW = b"".join(orjson.dumps({"id": index, "image": image}) + b"\n" for index, image in enumerate(IMAGES))

FLAT = "s = Constant<value_ints=[-1]>()"
GRAPHS = {
    "values without a record axis": f"g (float[1,4] x) => (float[4] y) {{ {FLAT} y = Reshape(x, s) }}",
    "one value": "g (float[1,4] x) => (float y) { y = ReduceSum<keepdims=0>(x) }",
    "records on the last axis": "g (float[1,4] x) => (float[4,1] y) { y = Transpose<perm=[1,0]>(x) }",
    "steps first": "g (float[1,4,3] x) => (float[4,1,3] y) { y = Transpose<perm=[1,0,2]>(x) }",
    "steps of any number first": "g (float[1,T,3] x) => (float[T,1,3] y) { y = Transpose<perm=[1,0,2]>(x) }",
    "a flat one of any length": f"g (float[1,T,3] x) => (float[M] y) {{ {FLAT} y = Reshape(x, s) }}",
    "one of two": f"g (float[1,4] x) => (float[1,4] y, float[4] z) {{ y = Neg(x) {FLAT} z = Reshape(x, s) }}",
}


NAMED = DETECTOR.replace("float[found] scores, int64 count", "int64[found] labels, float[found] scores").replace(
    "size = Shape(scores) count = Squeeze(size)",
    "column = Constant<value_ints=[-1]>() labels = Reshape(start, column)",
)
"""The same with the outputs that detectors of torchvision have."""


def model(text: str) -> bytes:
    return bytes(parser.parse_model(text if text.startswith("<") else f"{HEAD} {text}").SerializeToString())


@pytest.mark.parametrize("opset", [12, 17])
@pytest.mark.parametrize("name", GRAPHS)
def test_the_outputs_of_a_single_record_are_its_row(name: str, opset: int) -> None:
    graph = model(f'<ir_version: 8, opset_import: ["":{opset}]> {GRAPHS[name]}')
    admitted = admit(graph, tuned=False)
    assert (admitted.signature.mode, admitted.signature.batch) == ("fixed", 1)
    shape = tuple(size or 5 for size in admitted.signature.inputs[0].shape[1:])
    record = {"x": np.random.default_rng(0).standard_normal((1, *shape), dtype=np.float32)}
    expected, got = open_session(graph).run(record), open_session(admitted.model).run(record)
    for output, array in expected.items():
        np.testing.assert_array_equal(got[output].reshape(-1), array.reshape(-1))
        assert len(got[output]) == 1


def test_lengths_that_the_values_of_a_record_decide_are_open() -> None:
    boxes, scores, count = admit(model(DETECTOR), tuned=False).signature.outputs
    assert (boxes.shape, scores.shape, count.shape) == ((None, None, 4), (None, None), (None,))


def test_labels_of_the_parts_of_a_record_are_a_list() -> None:
    graph = "g (float[N,T,3] x) => (int64[N,T] labels) { labels = ArgMax<axis=2, keepdims=0>(x) }"
    (labels,) = admit(model(graph), tuned=False).signature.outputs
    assert (labels.role, labels.shape, labels.labels) == ("value", (None, None), ())


@pytest.fixture(scope="module")
def detectors(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    with running(tmp_path_factory.mktemp("detectors"), chunk_records=3) as api:
        api.register("detector", model(DETECTOR))
        api.register("batched", model(BATCHED))
        api.register("named", model(NAMED))
        yield api


def alone(text: str) -> list[dict[str, list[object]]]:
    session = open_session(model(text))
    runs = [session.run({"image": np.array([image], np.float32)}) for image in IMAGES]
    return [{name: array.tolist() for name, array in run.items()} for run in runs]


@pytest.mark.parametrize(("name", "text"), [("detector", DETECTOR), ("batched", BATCHED), ("named", NAMED)])
@pytest.mark.parametrize("format", ["csv", "parquet", "jsonl"])
def test_a_detector_gives_each_image_all_that_it_finds_in_it(detectors: Api, name: str, text: str, format: str) -> None:
    job = detectors.run(RAW, name, format=format)
    assert (job["state"], job["rows"]["failed"]) == ("completed", 0), job
    content = detectors.result(job).content
    if format == "parquet":
        rows = pl.read_parquet(content).to_dicts()
    elif format == "jsonl":
        rows = [orjson.loads(line) for line in content.splitlines()]
    else:
        rows = pl.read_csv(io.BytesIO(content)).to_dicts()
        rows = [
            {key: json.loads(value) if isinstance(value, str) else value for key, value in row.items()} for row in rows
        ]
    assert [row["id"] for row in rows] == [0, 1, 2, 3]
    assert [{key: value for key, value in row.items() if key not in ("id", "image")} for row in rows] == alone(text)


def test_a_detector_of_any_number_of_images_says_that_it_scores_them_one_at_a_time(detectors: Api) -> None:
    shown = detectors.http.get("/v1/models/batched").json()
    assert (shown["mode"], shown["batch"]) == ("fixed", 1)
    assert any("one at a time" in note for note in shown["notes"])
