"""Online predictions: every way to send a few records, and the same predictions as those of a job."""

import base64
import gzip
import io
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import orjson
import pandas as pd
import polars as pl
import pytest
from PIL import Image
from service import Api, encoded, ok, problem, running
from sklearn.datasets import load_iris
from sklearn.ensemble import RandomForestClassifier

from batchserve.conversion import convert

CSV = b"sepal length (cm),sepal width (cm),petal length (cm),petal width (cm)\n5.1,3.5,1.4,0.2\n"
ROW = {"sepal length (cm)": 5.1, "sepal width (cm)": 3.5, "petal length (cm)": 1.4, "petal width (cm)": 0.2}
VALUES = list(ROW.values())
PREDICT = "/v1/models/iris/predict"
TABLES = ["csv", "jsonl", "json", "parquet", "arrow", "arrows"]


def model(graph: str, **metadata: str) -> bytes:
    made = onnx.parser.parse_model('<ir_version: 8, opset_import: ["": 17]> ' + graph)
    onnx.helper.set_model_props(made, {name.replace("_", "."): value for name, value in metadata.items()})
    return bytes(made.SerializeToString())


# --- the same predictions as a job -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def records(api: Api, iris: pd.DataFrame, flowers: pl.DataFrame) -> dict[str, pl.DataFrame]:
    """Records of every kind of model: numbers, trees, mixed columns with missing values, text, a regression."""
    names = load_iris().target_names[load_iris().target]
    api.register("woods", convert(RandomForestClassifier(5, random_state=0).fit(iris, names), iris).onnx)
    people = pl.DataFrame(
        {
            "age": [None if index % 5 == 0 else 20.5 + index for index in range(90)],
            "city": [["Bern", "Genf", 'Bi"el', "Zürich\t"][index % 4] for index in range(90)],
            "visits": [float(index % 12) for index in range(90)],
            "id": range(90),
        }
    )
    reviews = pl.DataFrame({"text": ["good film", "awful\nstory, 1/2", "", "great «cast»"] * 20})
    some = flowers[30:120]
    return {"iris": some, "woods": some, "petals": some, "people": people, "reviews": reviews}


def assert_same(api: Api, model: str, body: bytes, **query: Any) -> dict[str, Any]:
    """The response to a body, whose predictions and errors equal those of a job, byte for byte."""
    answer = api.http.post(f"/v1/models/{model}/predict", content=body, params=query)
    job = api.run(body, model, format="jsonl", passthrough="all", **query)
    assert job["state"] == "completed", job["error"]
    lines = api.result(job).content.splitlines()
    assert answer.content.startswith(b'{"prediction":[' + b",".join(lines) + b'],"errors":[')
    body_: dict[str, Any] = ok(answer)
    assert [{"record": error["record"], **error} for error in api.errors(job)] == body_["errors"]
    assert body_["inference_ms"] >= 0
    return body_


@pytest.mark.parametrize("format", TABLES)
@pytest.mark.parametrize("name", ["iris", "woods", "petals", "people", "reviews"])
def test_an_online_answer_equals_the_result_of_a_job(
    api: Api, records: dict[str, pl.DataFrame], name: str, format: str
) -> None:
    table = records[name]
    answer = assert_same(api, name, encoded(table, format))
    assert len(answer["prediction"]) == len(table)
    assert list(answer["prediction"][0])[: table.width] == table.columns


@pytest.mark.parametrize("format", ["npy", "npz"])
def test_arrays_get_the_answers_of_a_job(api: Api, flowers: pl.DataFrame, format: str) -> None:
    answer = assert_same(api, "iris", encoded(flowers.drop("flower")[:3], format))
    assert [record["prediction"] for record in answer["prediction"]] == ["setosa"] * 3


@pytest.mark.parametrize("name", ["iris", "people", "reviews"])
def test_a_record_alone_is_answered_as_among_many(api: Api, records: dict[str, pl.DataFrame], name: str) -> None:
    """A few records are read and written by other code than many."""
    many = pl.concat([records[name]] * 3)
    lines = api.result(api.run(encoded(many, "jsonl"), name, passthrough="all")).content.splitlines()
    for index in (0, 1, 7, 58):
        record = many[index].write_json().encode()
        (alone,) = ok(api.http.post(f"/v1/models/{name}/predict", content=record))["prediction"]
        among = orjson.loads(lines[index])
        assert list(alone) == list(among)
        for field, value in among.items():
            # ONNX Runtime multiplies one row in another order than many: the last digit of a float32 may differ.
            assert alone[field] == (pytest.approx(value, rel=1e-5) if isinstance(value, float) else value)


def test_a_record_that_fails_online_has_its_place_and_its_error(api: Api) -> None:
    rows = [ROW, {**ROW, "petal width (cm)": None}, {**ROW, "petal width (cm)": "wide"}, ROW]
    answer = assert_same(api, "iris", orjson.dumps(rows))
    assert [record["prediction"] for record in answer["prediction"]] == ["setosa", None, None, "setosa"]
    assert [(error["record"], error["column"], error["code"]) for error in answer["errors"]] == [
        (1, "petal width (cm)", "missing-value"),
        (2, "petal width (cm)", "wrong-type"),
    ]
    assert "'wide'" in answer["errors"][1]["message"]


# --- ways to send ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("body", [[ROW, ROW], {"data": [ROW, ROW]}, [VALUES, VALUES], {"data": [VALUES, VALUES]}])
def test_rows_are_objects_or_arrays_alone_or_wrapped_as_data(api: Api, body: Any) -> None:
    answer = ok(api.http.post("/v1/models/iris@1/predict", json=body))
    assert [record["prediction"] for record in answer["prediction"]] == ["setosa", "setosa"]
    assert [{name: record[name] for name in ROW} for record in answer["prediction"]] == [ROW, ROW]
    assert assert_same(api, "iris", orjson.dumps(body))["prediction"] == answer["prediction"]


@pytest.mark.parametrize("media_type", ["application/json", "application/x-ndjson", None])
def test_an_object_alone_is_a_record(api: Api, media_type: str | None) -> None:
    headers = {"content-type": media_type} if media_type else {}
    answer = ok(api.http.post(PREDICT, content=orjson.dumps(ROW), headers=headers))
    assert [record["prediction"] for record in answer["prediction"]] == ["setosa"]


def test_arrays_hold_text_and_missing_values_too(api: Api) -> None:
    rows = [[31.5, "Bern", 4], [None, "Biel", 2.0], [40, "Genf"], [None, 5, "many"]]
    answer = assert_same(api, "people", orjson.dumps({"data": rows}))
    objects = [{"age": 31.5, "city": "Bern", "visits": 4}, {"age": None, "city": "Biel", "visits": 2.0}]
    expected = ok(api.http.post("/v1/models/people/predict", json=objects))["prediction"]
    assert [record["prediction"] for record in answer["prediction"][:2]] == [one["prediction"] for one in expected]
    assert [(error["record"], error["code"], error["column"]) for error in answer["errors"]] == [
        (2, "wrong-length", None),
        (3, "wrong-type", "visits"),
    ]
    assert answer["errors"][0]["message"] == "expected 3 values, got 2: there is none for 'visits'"


def test_arrays_fill_a_model_without_column_names_by_their_place(api: Api) -> None:
    graph = """g (float[N, 2] x, float[N] z) => (float[N, 2] y) {
        one = Constant <value = int64[1] {1}> ()
        column = Unsqueeze (z, one)
        y = Add (x, column)
    }"""
    api.register("add", model(graph))
    answer = assert_same(api, "add", b"[[1, 2, 10], [3, 4, 20]]")
    assert [[record["y_0"], record["y_1"]] for record in answer["prediction"]] == [[11, 12], [23, 24]]


def test_a_form_holds_one_file(api: Api) -> None:
    csv = ok(api.http.post(PREDICT, files={"file": ("new.csv", CSV, "text/csv")}))
    assert csv["prediction"] == ok(api.http.post(PREDICT, content=CSV))["prediction"]
    two = [("file", ("a.csv", CSV)), ("file", ("b.csv", CSV))]
    assert "one file" in problem(api.http.post(PREDICT, files=two), 422, "invalid-options")["detail"]


def test_an_image_is_sent_as_it_is_or_as_base64_and_is_not_returned(api: Api) -> None:
    api.register(
        "hues",
        model(
            "g (float[N, 3, 4, 4] image) => (float[N, 3] hue) {"
            "hue = ReduceMean <axes = [2, 3], keepdims = 0> (image) }",
            batchserve_image='{"resize": "stretch", "size": [4, 4]}',
        ),
    )
    file = io.BytesIO()
    Image.fromarray(np.full((9, 7, 3), (10, 20, 30), np.uint8)).save(file, "PNG")
    png = file.getvalue()
    text = base64.b64encode(png).decode()
    url = "/v1/models/hues/predict"
    ways = [
        api.http.post(url, content=png, headers={"content-type": "image/png"}),
        api.http.post(url, files={"file": ("a.png", png, "image/png")}),
        api.http.post(url, json={"image": text}),
        api.http.post(url, json={"data": [{"image": f"data:image/png;base64,{text}"}]}),
        api.http.post(url, json=[[text]]),
        api.http.post(url, content=b"image\n" + text.encode() + b"\n", headers={"content-type": "text/csv"}),
    ]
    for answer in ways:
        assert ok(answer)["prediction"] == [{"hue_0": 10.0, "hue_1": 20.0, "hue_2": 30.0}]
    assert_same(api, "hues", png)
    broken = ok(api.http.post(url, json={"image": text[:60]}))
    assert [error["code"] for error in broken["errors"]] == ["invalid-image"]
    assert ok(api.http.post("/v1/models/hues/validate", json={"image": text[:60]}))["valid"] is False


# --- options and limits ----------------------------------------------------------------------------------------------


def test_online_options_are_those_of_a_job(api: Api) -> None:
    answer = assert_same(api, "iris", orjson.dumps([ROW]), top_k=1)
    assert answer["prediction"][0]["label_1"] == "setosa"
    problem(api.http.post(f"{PREDICT}?top_k=9", json=[ROW]), 422, "invalid-options")
    ok(api.http.post(f"{PREDICT}?delimiter=tab", content=CSV.replace(b",", b"\t")))
    renamed = {**ROW, "width": ROW["petal width (cm)"]}
    del renamed["petal width (cm)"]
    assert_same(api, "iris", orjson.dumps([renamed]), columns='{"petal width (cm)": "width"}')
    for verb, query in (("predict", "topk=1"), ("validate", "top_k=1"), ("predict", "columns={")):
        answer = problem(api.http.post(f"/v1/models/iris/{verb}?{query}", json=[ROW]), 422, "invalid-options")
        assert answer["errors"][0]["parameter"] == query.partition("=")[0]


def test_a_value_for_all_records_comes_as_an_option(api: Api) -> None:
    api.register("scaled", model("g (float[N, 1] x, float[1] factor) => (float[N, 1] y) { y = Mul (x, factor) }"))
    given = {"inputs": '{"factor": 2.5}'}
    answer = assert_same(api, "scaled", b"[[2], [4]]", **given)
    assert [record["y"] for record in answer["prediction"]] == [5.0, 10.0]


def test_an_online_request_has_a_limit_of_records_and_of_bytes(tmp_path: Path) -> None:
    with running(tmp_path, worker=False, chunk_records=10, online_bytes=1000) as api:
        api.register("double", model("g (float[N, 1] x) => (float[N, 1] y) { y = Add (x, x) }"))
        rows = [{"x": number} for number in range(11)]
        assert len(ok(api.http.post("/v1/models/double/predict", json=rows[:10]))["prediction"]) == 10
        for verb in ("predict", "validate"):
            url = f"/v1/models/double/{verb}"
            assert "10 records" in problem(api.http.post(url, json=rows), 413, "payload-too-large")["detail"]
            long = b"x\n" + b"1.000000\n" * 200
            problem(api.http.post(url, content=long), 413, "payload-too-large")
            problem(api.http.post(url, content=gzip.compress(long)), 413, "payload-too-large")


def test_the_newest_version_answers_as_soon_as_it_is_registered(api: Api) -> None:
    for factor in (2, 3):
        nodes = f"{{ factor = Constant <value = float {{{factor}}}> () y = Mul (x, factor) }}"
        version = api.register("changing", model(f"g (float[N, 1] x) => (float[N, 1] y) {nodes}"))["version"]
        for _ in range(2):
            answer = ok(api.http.post("/v1/models/changing/predict", json=[[10]]))
            assert (answer["model"]["version"], answer["prediction"][0]["y"]) == (version, 10.0 * factor)
    assert api.http.delete("/v1/models/changing/versions/2").status_code == 204
    assert ok(api.http.post("/v1/models/changing/predict", json=[[10]]))["model"]["version"] == 1


# --- refused requests ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", ["predict", "validate"])
@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        (b"", 422, "invalid-input"),
        (b"a,b\n1,2\n", 422, "schema-mismatch"),
        (b'[{"a": ', 422, "invalid-input"),
        (b"{]", 422, "invalid-input"),
        (b"[[[", 422, "invalid-input"),
        (b"[5]", 422, "invalid-input"),
        (b"[[]]", 422, "schema-mismatch"),
        (b"BM\x8a\x00\x00\x00", 415, "unsupported-media-type"),
        (b"PAR1" + bytes(100), 422, "invalid-input"),
    ],
)
def test_an_online_body_that_cannot_be_read_is_a_problem(
    api: Api, verb: str, body: bytes, status: int, code: str
) -> None:
    with api.unchanged():
        problem(api.http.post(f"/v1/models/iris/{verb}", content=body), status, code)


@pytest.mark.parametrize("verb", ["predict", "validate"])
def test_a_record_that_does_not_fit_is_refused_with_fields_and_counts(api: Api, verb: str) -> None:
    url = f"/v1/models/iris/{verb}"
    short = {name: value for name, value in ROW.items() if name != "petal width (cm)"}
    lacking = problem(api.http.post(url, json=[{**short, "petal widht (cm)": 0.2}]), 422, "schema-mismatch")
    assert (lacking["expected"], lacking["got"]) == (4, 3)
    assert lacking["detail"].startswith(
        "the model takes 4 columns, of which the input has 3: it lacks 'petal width (cm)'; "
        "the model does not take its 'petal widht (cm)'"
    )
    assert [error["column"] for error in lacking["errors"]] == ["petal width (cm)"]
    wrong = problem(api.http.post(url, json=[{**ROW, "petal width (cm)": "wide"}]), 422, "schema-mismatch")
    assert wrong["detail"] == "column 'petal width (cm)': expected float32, got 'wide' in record 0"
    for values, fault in (
        (VALUES[:3], "expected 4 values, got 3: there is none for 'petal width (cm)'"),
        ([*VALUES, 1], "expected 4 values, got 5"),
    ):
        counted = problem(api.http.post(url, json={"data": [values]}), 422, "schema-mismatch")
        assert counted["detail"] == f"record 0: {fault}"
        assert counted["errors"] == [{"row": 0, "expected": 4, "got": len(values), "message": fault}]


@pytest.mark.parametrize("verb", ["predict", "validate"])
def test_a_model_that_is_unknown_is_not_found(api: Api, verb: str) -> None:
    problem(api.http.post(f"/v1/models/rose/{verb}", json=[ROW]), 404, "model-not-found")


def test_a_sample_is_validated_without_a_job(api: Api) -> None:
    with api.unchanged():
        good = ok(api.http.post("/v1/models/iris/validate", content=CSV))
        assert (good["valid"], good["errors"], good["model"]["name"]) == (True, [], "iris")
        bad = ok(api.http.post("/v1/models/iris/validate", content=CSV + b"5.1,3.5,,wide\n"))
        assert bad["valid"] is False
        assert sorted((error["record"], error["column"], error["code"]) for error in bad["errors"]) == [
            (1, "petal length (cm)", "missing-value"),
            (1, "petal width (cm)", "wrong-type"),
        ]


def test_an_online_request_without_records_has_an_empty_answer(api: Api) -> None:
    header = CSV[: CSV.index(b"\n") + 1]
    assert ok(api.http.post(PREDICT, content=header))["prediction"] == []
    for nothing in (b"[]", b'{"data": []}'):
        body = problem(api.http.post(PREDICT, content=nothing), 422, "invalid-input")
        assert "no records" in body["detail"]
