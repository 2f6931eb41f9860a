"""Models that take arrays: what fills them, what passes through beside it, and what a refusal says."""

import io
import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx.parser
import PIL.Image
import polars as pl
import pytest
from service import Api, decoded, encoded, problem, running

HEAD = '<ir_version: 8, opset_import: ["" : 17]>'
NET = f"""{HEAD} net (float[N, 3, 8, 8] x) => (float[N] total) {{
    axes = Constant <value = int64[3] {{1, 2, 3}}> () total = ReduceSum <keepdims = 0> (x, axes)
}}"""
WIDE = f"""{HEAD} wide (float[N, 4] x) => (float[N] total) {{
    axes = Constant <value = int64[1] {{1}}> () total = ReduceSum <keepdims = 0> (x, axes)
}}"""
PAIR = f"""{HEAD} pair (int64[N, T] tokens, int64[N, T] mask) => (float[N] total) {{
    product = Mul (tokens, mask) number = Cast <to = 1> (product)
    axes = Constant <value = int64[1] {{1}}> () total = ReduceSum <keepdims = 0> (number, axes)
}}"""
ONE = f"""{HEAD} one (float[N, 3, 2] x, float[N, 1] age, float[N, 1] weight) => (float[N, 1] total) {{
    axes = Constant <value = int64[2] {{1, 2}}> () flat = ReduceSum <keepdims = 0> (x, axes)
    last = Constant <value = int64[1] {{1}}> () tall = Unsqueeze (flat, last)
    sum = Add (tall, age) total = Add (sum, weight)
}}"""
HELD = f"""{HEAD} held (float[N, 2] x, float[1] gain) => (float[N, 2] y) {{ y = Mul (x, gain) }}"""

X = np.random.default_rng(1).random((20, 3, 8, 8), np.float32)
TOTALS = X.sum(axis=(1, 2, 3))


def graph(text: str, **metadata: str) -> bytes:
    model = onnx.parser.parse_model(text)
    for key, value in metadata.items():
        model.metadata_props.add(key=f"batchserve.{key}", value=value)
    content: bytes = model.SerializeToString()
    return content


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    with running(tmp_path_factory.mktemp("arrays"), chunk_records=7) as api:
        for name, text in (("net", NET), ("wide", WIDE), ("pair", PAIR), ("one", ONE), ("held", HELD)):
            api.register(name, graph(text))
        api.register("photos", graph(NET, image='{"resize": "stretch", "size": [8, 8]}'))
        yield api


def npy(array: np.ndarray) -> bytes:
    target = io.BytesIO()
    np.save(target, array)
    return target.getvalue()


def npz(**arrays: np.ndarray) -> bytes:
    target = io.BytesIO()
    np.savez(target, **arrays)  # type: ignore[arg-type]
    return target.getvalue()


def parquet(**columns: Any) -> bytes:
    return encoded(pl.DataFrame(columns), "parquet")


def arrays_of(service: Api, job: dict[str, Any]) -> dict[str, np.ndarray]:
    assert job["state"] == "completed", job["error"]
    return dict(np.load(io.BytesIO(service.result(job).content)))


def refusal(service: Api, model: str, content: bytes, **params: Any) -> dict[str, Any]:
    answer = service.http.post("/v1/predict", content=content, params={"model": model, **params})
    return problem(answer, 422, "schema-mismatch")


# --- what a refusal says ---------------------------------------------------------------------------------------------

PNG = io.BytesIO()
PIL.Image.new("RGB", (9, 9)).save(PNG, "PNG")
TAKES = "input 'x' takes an array [3, 8, 8] of float32 from each record. The input has "
WAYS = (
    "Send it in an npy or npz file, or in a column of lists (Parquet, Arrow, NDJSON, JSON; in a CSV as JSON text) "
    """named 'x', or pass columns, as in {"x": "..."}, to name the column"""
)
NUMBERS = "\n".join(",".join(f"{prefix}{index}" for index in range(192)) for prefix in ("c", "")).encode()


@pytest.mark.parametrize(
    ("content", "has"),
    [
        (NUMBERS, "'c0', 'c1'"),
        (b'{"a":1}\n', "'a', of which none holds arrays. "),
        (npy(np.zeros(3, [("a", "f4"), ("b", "f4")])), "'a', 'b', of which none holds arrays. "),
        (parquet(y=X[:2].tolist(), z=X[:2].tolist()), "'y', 'z', of which 'y', 'z' hold arrays. "),
        (PNG.getvalue(), None),
    ],
)
def test_a_table_without_the_array_is_told_the_array_and_how_to_send_it(
    service: Api, content: bytes, has: str | None
) -> None:
    refused = refusal(service, "net", content)
    images = "files or bytes ('image'): of a graph of images, the metadata batchserve.image says how an image fills it"
    assert refused["detail"].startswith(TAKES + (images if has is None else has))
    assert refused["detail"].endswith(WAYS)
    assert refused["errors"] == [
        {
            "column": "x",
            "expected": "an array [3, 8, 8] of float32",
            "message": "expected an array [3, 8, 8] of float32: no column holds it",
        }
    ]


@pytest.mark.parametrize(
    ("model", "content", "message"),
    [
        ("net", b"x\n1\n", "column 'x': expected an array [3, 8, 8] of float32, got '1'"),
        ("net", parquet(x=[[1.0]]), "column 'x': expected an array [3, 8, 8] of float32, got List(Float64)"),
        ("net", npy(X[:, :2]), "input 'x': expected an array of shape [N, 3, 8, 8], got [20, 2, 8, 8]"),
        ("net", npy(X[:, 0]), "input 'x': expected an array of shape [N, 3, 8, 8], got [20, 8, 8]"),
        (
            "net",
            npy(X[:, 0].astype(str)),
            "input 'x': expected an array of shape [N, 3, 8, 8], got [20, 8, 8] of string, and the model takes float32",
        ),
        ("net", npy(X.astype(str)), "input 'x': expected float32, got string"),
        (
            "net",
            npz(a=X, b=X),
            (
                "the model takes the array 'x' (float32 [N, 3, 8, 8]), and the input has the arrays "
                "'a' (float32 [20, 3, 8,"
                " 8]), 'b' (float32 [20, 3, 8, 8]): none is known to be that of 'x'. Pass columns"
            ),
        ),
        (
            "net",
            json.dumps(X[:2].tolist()).encode(),
            """record 0: expected 1 value, for 'x', got 3; a record with an array is an object, as {"x": [...]}""",
        ),
        (
            "wide",
            b"a,b,c\n1,2,3\n",
            (
                "the model takes 4 columns that have no names, and the input has 3 to fill them: 'a', 'b', 'c'. Pass "
                "columns with the 4 to take, in order, or give each record an array: 'x' an array "
                "[4] of float32. Send it"
            ),
        ),
        (
            "wide",
            b"a,b,c,d\nu,1,2,3\n",
            (
                "column 'a': expected float32, got 'u' in record 0; input 'x' takes an array [4] of "
                "float32, or a number in"
                " each column"
            ),
        ),
        (
            "pair",
            b"a,b,c\n1,2,3\n",
            (
                "the model takes arrays from each record: 'tokens' an array [N] of int64, 'mask' an "
                "array [N] of int64. "
                "The input has 'a', 'b', 'c', of which none holds arrays. Send them in an npz as "
                "'tokens', 'mask', or each in"
            ),
        ),
        (
            "pair",
            npy(np.ones((3, 4), int)),
            (
                "the model takes the arrays 'tokens' (int64 [N, N]), 'mask' (int64 [N, N]), and the "
                "input has one array "
                "without a name (int64 [3, 4]). Send an npz that holds them by these names"
            ),
        ),
        (
            "one",
            parquet(age=[1.0], weight=[2.0], note=["a"]),
            (
                "input 'x' takes an array [3, 2] of float32 from each record. The input has 'age', "
                "'weight', 'note', of "
                "which none holds arrays. Send it in an npz file with all arrays of the model, or in a column"
            ),
        ),
        (
            "one",
            parquet(x=[[[1, 2]] * 3], age=[1.0], wieght=[2.0]),
            (
                "the model takes 2 columns, of which the input has 1: it lacks 'weight'; the model does not take its "
                "'wieght'. Pass columns to map them"
            ),
        ),
        (
            "one",
            b"a\n1\n",
            (
                "the model takes 2 columns, of which the input has 0: it lacks 'age', 'weight'. "
                "Input 'x' takes an array "
                "[3, 2] of float32 from each record. The input has 'a', of which none holds arrays"
            ),
        ),
        (
            "one",
            npz(x=np.ones((5, 3, 2), "f4"), age=np.ones(5, "f4")),
            (
                "the model takes the arrays 'x' (float32 [N, 3, 2]), 'age' (float32 [N, 1]), "
                "'weight' (float32 [N, 1]), and"
                " the input has the arrays 'x' (float32 [5, 3, 2]), 'age' (float32 [5]): none is known to be that of "
                "'weight'"
            ),
        ),
        (
            "photos",
            npy(np.zeros((4, 9), np.float32)),
            (
                "input 'x': expected an array of shape [N, 3, 8, 8], or images of uint8 [N, height, "
                "width, channels] or [N,"
                " height, width], got [4, 9]"
            ),
        ),
        ("photos", b"a,b\n1,2\n", "input 'x' takes an image from each record. The input has 'a', 'b'. Send files of"),
    ],
)
def test_an_input_that_does_not_fill_a_model_of_arrays_is_told_why(
    service: Api, model: str, content: bytes, message: str
) -> None:
    detail = refusal(service, model, content)["detail"]
    assert message in detail
    assert "lacks 'x'" not in detail


def test_an_array_in_a_field_of_a_structured_array_is_refused_with_what_to_send(service: Api) -> None:
    content = npy(np.zeros(3, [("x", "f4", (3, 8, 8))]))
    answer = service.http.post("/v1/predict", content=content, params={"model": "net"})
    detail = problem(answer, 422, "invalid-input")["detail"]
    assert detail == (
        "the input has an array in its field 'x', expected numbers, booleans or strings: "
        "save an npz with one array for each field"
    )


# --- npz with other arrays -------------------------------------------------------------------------------------------


def test_the_only_array_of_an_archive_fills_the_input_under_any_name(service: Api) -> None:
    result = arrays_of(service, service.run(npz(data=X), "net"))
    assert list(result) == ["total"]
    np.testing.assert_allclose(result["total"], TOTALS, rtol=1e-5)
    wrong = refusal(service, "net", npz(data=X[:, 0]))
    assert wrong["detail"] == "input 'x': expected an array of shape [N, 3, 8, 8], got [20, 8, 8]"


def test_arrays_of_the_records_pass_through_and_all_others_are_ignored(service: Api) -> None:
    ids, names = np.arange(20), np.array([f"é{index}" for index in range(20)])
    others: dict[str, Any] = {"classes": np.array(["a", "b"]), "objects": np.array([{}]), "scale": np.float32(2)}
    job = service.run(npz(**others, x=X, id=ids, total=names), "net")
    assert job["chunks"]["total"] == 3
    result = arrays_of(service, job)
    assert list(result) == ["id", "input_total", "total"]
    assert result["id"].tolist() == ids.tolist()
    assert result["input_total"].tolist() == names.tolist()
    np.testing.assert_allclose(result["total"], TOTALS, rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"passthrough": "none"}, ["total"]),
        ({"passthrough": "all"}, ["id", "total"]),
        ({"passthrough": "x"}, ["x", "total"]),
        ({"passthrough": "none", "key": "id"}, ["id", "total"]),
    ],
)
def test_passthrough_and_key_choose_among_arrays(service: Api, options: dict[str, Any], names: list[str]) -> None:
    result = arrays_of(service, service.run(npz(id=np.arange(20), x=X), "net", **options))
    assert list(result) == names
    if "x" in names:
        np.testing.assert_array_equal(result["x"], X)


@pytest.mark.parametrize("format", ["parquet", "csv", "jsonl"])
def test_arrays_pass_through_to_tables(service: Api, format: str) -> None:
    content = npz(x=X, id=np.arange(20), words=np.array([["é", "b"]] * 20), flags=np.arange(20) % 2 == 0)
    table = decoded(service.result(service.run(content, "net", format=format)).content, format)
    assert table.columns == ["id", "words", "flags", "total"]
    assert table["id"].to_list() == list(range(20))
    assert table["flags"].to_list() == [index % 2 == 0 for index in range(20)]
    words = table["words"].str.json_decode(pl.List(pl.String)) if format == "csv" else table["words"]
    assert words.to_list() == [["é", "b"]] * 20


def test_npy_holds_what_passes_through_only_if_it_is_numbers(service: Api) -> None:
    job = service.run(npz(x=X, id=np.arange(20)), "net", format="npy")
    matrix = np.load(io.BytesIO(service.result(job).content))
    assert matrix[:, 0].tolist() == list(range(20))
    np.testing.assert_allclose(matrix[:, 1], TOTALS, rtol=1e-5)
    detail = refusal(service, "net", npz(x=X, words=np.array(["a"] * 20)), format="npy")["detail"]
    assert detail == "npy cannot hold column 'words', which is String: request parquet, or passthrough=none"


def test_the_key_of_an_archive_is_in_each_entry_of_the_errors(service: Api) -> None:
    faulty = X.copy()
    faulty[9, 0, 0, 0] = np.nan
    job = service.run(npz(x=faulty, id=np.arange(100, 120)), "net", key="id")
    assert [(error["record"], error["key"]) for error in service.errors(job)] == [(9, 109)]


def test_the_option_columns_names_the_arrays_of_an_archive(service: Api) -> None:
    content = npz(a=X, b=2 * X, classes=np.zeros(3))
    for columns in ('{"x": "b"}', '["b"]'):
        result = arrays_of(service, service.run(content, "net", columns=columns))
        assert list(result) == ["a", "total"]
        np.testing.assert_allclose(result["total"], 2 * TOTALS, rtol=1e-5)
    both = npz(first=np.full((5, 3), 2), second=np.full((5, 3), 7))
    result = arrays_of(service, service.run(both, "pair", columns='{"tokens": "second", "mask": "first"}'))
    assert result["total"].tolist() == [42.0] * 5
    content = npz(a=X, b=2 * X)
    absent = refusal(service, "net", content, columns='{"x": "c"}')["detail"]
    assert absent == "columns: there is no 'c' in the input; it has 'a', 'b'"
    answer = service.http.post("/v1/predict", content=content, params={"model": "net", "columns": '{"y": "a"}'})
    assert "the model has no input 'y' for an array; it takes 'x'" in problem(answer, 422, "invalid-options")["detail"]


def test_the_last_input_takes_the_only_array_with_its_axes(service: Api) -> None:
    tokens = np.full((5, 3), 2)
    result = arrays_of(service, service.run(npz(tokens=tokens, attention=tokens, id=np.arange(5)), "pair"))
    assert list(result) == ["id", "total"]
    assert result["total"].tolist() == [12.0] * 5


def test_a_value_for_all_records_may_have_an_axis_of_its_own(service: Api) -> None:
    x = np.arange(40, dtype=np.float32).reshape(20, 2)
    result = arrays_of(service, service.run(npz(x=x, gain=np.array([3], np.float32)), "held"))
    assert result["y"].tolist() == (3 * x).tolist()


def test_arrays_of_the_records_that_differ_in_length_fail(service: Api) -> None:
    content = npz(tokens=np.ones((5, 3), int), mask=np.ones((4, 3), int))
    answer = service.http.post("/v1/predict", content=content, params={"model": "pair"})
    assert "differ in length along axis 0: tokens: 5, mask: 4" in problem(answer, 422, "invalid-input")["detail"]


def test_online_records_of_an_archive_have_what_passes_through(service: Api) -> None:
    content = npz(x=X[:2], id=np.array([7, 9]))
    answer = service.http.post("/v1/models/net/predict", content=content).json()
    assert [record["id"] for record in answer["prediction"]] == [7, 9]


# --- batchserve.sample -----------------------------------------------------------------------------------------------

EMBEDDING = f"""{HEAD} embedding (int64[N, T] tokens, float[N, 2] scale) => (float[N] total)
<float[12, 1] table = {{{", ".join(str(float(index)) for index in range(12))}}}, int64[1] shift = {{20}}> {{
    places = Sub (tokens, shift) rows = Gather <axis = 0> (table, places)
    axes = Constant <value = int64[2] {{1, 2}}> () flat = ReduceSum <keepdims = 0> (rows, axes)
    last = Constant <value = int64[1] {{1}}> () factor = ReduceSum <keepdims = 0> (scale, last)
    total = Mul (flat, factor)
}}"""
"""Takes tokens from 20 to 31 alone: neither zeros nor ones."""
TOKENS: list[dict[str, Any]] = [
    {"tokens": [20, 21, 31], "scale": [1.0, 0.5]},
    {"tokens": [25, 26], "scale": [1.0, 1.0]},
    {"tokens": [22, 23, 30], "scale": [2.0, 1.0]},
    {"tokens": None, "scale": [2.0, 1.0]},
    {"tokens": [27, 28, 29], "scale": [0.0, 1.0]},
]


def test_a_sample_of_nested_lists_admits_a_model_that_takes_only_such_values(service: Api) -> None:
    refused = service.http.put("/v1/models/embedding", content=graph(EMBEDDING))
    assert "no run on sample records succeeds" in problem(refused, 422, "model-refused")["detail"]
    model = service.register("embedding", graph(EMBEDDING, sample=json.dumps(TOKENS)))
    assert (model["mode"], model["sample"]) == ("rows", TOKENS)
    answer = service.http.post(model["links"]["predict"], json=model["sample"]).json()
    expected = [sum(token - 20 for token in one["tokens"] or ()) * sum(one["scale"]) for one in TOKENS]
    given = [record["total"] for record in answer["prediction"]]
    assert given == [None if one["tokens"] is None else total for one, total in zip(TOKENS, expected, strict=True)]
    job = service.run("".join(f"{json.dumps(one)}\n" for one in TOKENS), "embedding")
    assert (job["state"], job["rows"]) == ("completed", {"total": 5, "ok": 4, "failed": 1})


def test_a_sample_that_does_not_fill_the_arrays_is_no_probe(service: Api) -> None:
    wrong = json.dumps([{"tokens": [[20]], "scale": [1.0, 0.5]}, {"tokens": "a", "scale": [1.0, 0.5]}])
    refused = service.http.put("/v1/models/embedding", content=graph(EMBEDDING, sample=wrong))
    problem(refused, 422, "model-refused")
    assert service.register("wide", graph(WIDE, sample=json.dumps([{"x": [1, 2]}])))["mode"] == "rows"
