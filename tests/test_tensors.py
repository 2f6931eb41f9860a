"""Records other than rows of numbers: arrays, several inputs, integers, text, and values that all records share."""

import io
import json
import subprocess
import sys
import tracemalloc
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import graphs
import numpy as np
import onnx.parser
import onnxruntime
import polars as pl
import pytest
from service import Api, decoded, encoded, problem, running

from batchserve.domain import InputTensor, RowError, Signature
from batchserve.errors import SchemaMismatch
from batchserve.inference.arrays import array_fault, read_arrays
from batchserve.inference.binding import bind

TABLES = ("parquet", "arrow", "arrows", "jsonl", "json", "csv")

MIXED = """
<ir_version: 8, opset_import: ["" : 17]>
mixed (int64[N, 4] tokens, uint8[N, 2, 3] pixels, string[N, 2] words, float threshold)
    => (float[N] total, bool[N] above, float[N, 2, 3] bright, string[N, 2] echo, float level)
{
    numbers = Cast <to = 1> (tokens)
    axes = Constant <value = int64[1] {1}> ()
    total = ReduceSum <keepdims = 0> (numbers, axes)
    above = Greater (total, threshold)
    light = Cast <to = 1> (pixels)
    bright = Mul (light, threshold)
    echo = Identity (words)
    level = Identity (threshold)
}
"""
"""Inputs and outputs of four types and ranks; `level` is not an output per record."""


def graph(text: str) -> bytes:
    content: bytes = onnx.parser.parse_model(text).SerializeToString()
    return content


def read(series: pl.Series, tensor: InputTensor) -> tuple[np.ndarray, list[RowError]]:
    """The arrays of records of one size, and the errors."""
    values, errors = read_arrays(series, tensor)
    return values if isinstance(values, np.ndarray) else values.take(np.arange(len(values))), errors


def body(columns: dict[str, np.ndarray], format: str) -> bytes:
    """Arrays [N, ...] as a file with one column for each: as lists, or as JSON text in a CSV."""
    target = io.BytesIO()
    if format == "npz":
        np.savez(target, **columns)  # type: ignore[arg-type]
        return target.getvalue()
    lists = {name: array.tolist() for name, array in columns.items()}
    if format == "csv":
        lists = {name: [json.dumps(one) for one in values] for name, values in lists.items()}
    return encoded(pl.DataFrame(lists), format)


def records(count: int) -> dict[str, np.ndarray]:
    random = np.random.default_rng(7)
    return {
        "tokens": random.integers(-9, 9, (count, 4)),
        "pixels": random.integers(0, 256, (count, 2, 3), dtype=np.uint8),
        "words": np.array([[f"a{i}", "é, ü"] for i in range(count)]),
    }


# --- whole jobs ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    with running(tmp_path_factory.mktemp("tensors"), chunk_records=7) as api:
        api.register("mixed", graph(MIXED))
        yield api


@pytest.mark.parametrize("format", ["parquet", "jsonl", "csv", "arrow"])
def test_a_model_of_several_ranks_and_types_scores_columns_of_arrays(service: Api, format: str) -> None:
    given = records(20)
    job = service.run(body(given, format), "mixed", inputs='{"threshold": 0.5}', passthrough="none")
    assert (job["state"], job["rows"]) == ("completed", {"total": 20, "ok": 20, "failed": 0}), job
    assert job["chunks"]["total"] > 1
    assert job["options"]["inputs"] == {"threshold": 0.5}
    result = decoded(service.result(job).content, format)
    totals = given["tokens"].sum(axis=1)
    assert result["total"].to_list() == totals.tolist()
    assert result["above"].to_list() == (totals > 0.5).tolist()
    assert result["echo_0"].to_list() == given["words"][:, 0].tolist()
    assert result["echo_1"].to_list() == given["words"][:, 1].tolist()
    bright = result["bright"].str.json_decode(pl.List(pl.List(pl.Float64))) if format == "csv" else result["bright"]
    assert bright.to_list() == (given["pixels"] * 0.5).tolist()
    assert "level" not in result.columns


def test_arrays_in_give_arrays_out_one_for_each_output(service: Api) -> None:
    given = records(20)
    job = service.run(body(given | {"threshold": np.array(0.25)}, "npz"), "mixed")
    assert job["state"] == "completed", job
    result = np.load(io.BytesIO(service.result(job).content))
    assert {name: result[name].shape for name in result} == {
        "total": (20,), "above": (20,), "bright": (20, 2, 3), "echo": (20, 2),
    }  # fmt: skip
    assert result["bright"].tolist() == (given["pixels"] * 0.25).tolist()
    assert result["echo"].tolist() == given["words"].tolist()


def test_a_shared_value_may_come_as_a_column_or_an_option_and_the_option_wins(service: Api) -> None:
    given = records(3)
    frame = pl.DataFrame({name: array.tolist() for name, array in given.items()} | {"threshold": [2.0] * 3})
    by_column = service.run(encoded(frame, "parquet"), "mixed")
    by_option = service.run(encoded(frame, "parquet"), "mixed", inputs='{"threshold": 3}')
    assert decoded(service.result(by_column).content, "parquet")["bright"].to_list() == (given["pixels"] * 2.0).tolist()
    assert decoded(service.result(by_option).content, "parquet")["bright"].to_list() == (given["pixels"] * 3.0).tolist()
    arrays = body(given | {"threshold": np.array(2.0)}, "npz")
    job = service.run(arrays, "mixed", inputs='{"threshold": 3}')
    assert np.load(io.BytesIO(service.result(job).content))["bright"].tolist() == (given["pixels"] * 3.0).tolist()


GAIN = """
<ir_version: 8, opset_import: ["" : 17]>
g (float[N, 1] x, float gain) => (float[N, 1] y) { y = Mul(x, gain) }
"""


def gained(service: Api, gains: Sequence[float | None]) -> dict[str, Any]:
    service.register("gain", graph(GAIN))
    lines = [json.dumps({"x": 1, "gain": gain}) for gain in gains]
    return service.run("\n".join(lines), "gain", passthrough="none")


@pytest.mark.parametrize("at", [0, 2, 9])
def test_a_record_without_the_shared_value_fails_alone(service: Api, at: int) -> None:
    job = gained(service, [None if record == at else 3.0 for record in range(10)])
    assert (job["state"], job["rows"]) == ("completed", {"total": 10, "ok": 9, "failed": 1})
    assert decoded(service.result(job).content, "jsonl")["y"].to_list() == [
        None if record == at else 3.0 for record in range(10)
    ]
    assert [(error["record"], error["code"]) for error in service.errors(job)] == [(at, "missing-value")]


@pytest.mark.parametrize("other", [3, 8])
def test_several_values_of_a_shared_one_fail_the_job_however_it_is_cut_into_chunks(service: Api, other: int) -> None:
    job = gained(service, [2.0] * other + [5.0] * (14 - other))
    assert (job["state"], job["error"]["code"]) == ("failed", "schema-mismatch")
    assert "input 'gain' is one value for all records, but the input has several" in job["error"]["message"]


def test_a_model_that_scores_all_records_at_once_gets_none_that_failed(service: Api) -> None:
    service.register("centred", graphs.centred())
    lines = [json.dumps({"work": value}) for value in (1, 2, "x", None, 9)]
    job = service.run("\n".join(lines), "centred")
    assert job["rows"] == {"total": 5, "ok": 3, "failed": 2}
    assert decoded(service.result(job).content, "jsonl")["doubled"].to_list() == [-3, -2, None, None, 5]
    alone = service.run("\n".join([lines[0], lines[1], lines[4]]), "centred")
    assert decoded(service.result(alone).content, "jsonl")["doubled"].to_list() == [-3, -2, 5]
    nothing = service.run(body({"work": np.full((3, 1), np.nan, np.float32)}, "npz"), "centred", max_errors=3)
    assert nothing["rows"] == {"total": 3, "ok": 0, "failed": 3}


def test_a_single_probability_cannot_be_ranked(service: Api) -> None:
    text = """
        <ir_version: 8, opset_import: ["" : 17]>
        g (float[N, 1] x) => (int64[N] label, float[N] prob) {
            one = Sigmoid(x) flat = Constant<value_ints = [-1]>() prob = Reshape(one, flat)
            half = Constant<value = float {0.5}>() more = Greater(prob, half) label = Cast<to = 7>(more)
        }"""
    service.register("single", graph(text))
    answer = service.http.post("/v1/predict?model=single&top_k=1", content="x\n1\n")
    problem(answer, 422, "invalid-options")


def test_jobs_that_differ_only_in_a_shared_value_do_not_share_a_result(service: Api) -> None:
    content = body(records(3), "parquet")
    first = service.run(content, "mixed", inputs='{"threshold": 5}', reuse=True)
    again = service.run(content, "mixed", inputs='{"threshold": 5}', reuse=True)
    other = service.run(content, "mixed", inputs='{"threshold": 6}', reuse=True)
    assert again["reused_from"] == first["id"]
    assert other["reused_from"] is None


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (
            '{"treshold": 1}',
            "'treshold' is not an input of the model; those with one value for all records are 'threshold' (float32)",
        ),
        ('{"tokens": 1}', "'tokens' takes a value from each record"),
        ('{"threshold": "high"}', "'threshold': expected float32, got 'high'"),
        ("[1]", "inputs: expected a JSON object, got [1]"),
        ('{"threshold": 1e999}', "inputs.threshold: expected a finite number, a text, true or false, got inf"),
        ('{"threshold": null}', "inputs.threshold: expected a finite number, a text, true or false, got None"),
        ('{"threshold": [1]}', "inputs.threshold: expected a finite number, a text, true or false, got [1]"),
    ],
)
def test_a_shared_value_that_the_model_does_not_take_is_refused_at_once(
    service: Api, inputs: str, message: str
) -> None:
    with service.unchanged():
        params = {"model": "mixed", "inputs": inputs}
        answer = service.http.post("/v1/predict", content=body(records(2), "jsonl"), params=params)
        refused = problem(answer, 422, "invalid-options")
        assert message in json.dumps(refused, ensure_ascii=False)


def test_a_column_that_cannot_hold_the_arrays_is_refused_before_the_job_is_queued(service: Api) -> None:
    given = records(2)
    flat = given | {"pixels": given["pixels"].reshape(2, 6)}
    for format in ("parquet", "jsonl", "csv"):
        answer = service.http.post(
            "/v1/predict", content=body(flat, format), params={"model": "mixed", "inputs": '{"threshold": 1}'}
        )
        refused = problem(answer, 422, "schema-mismatch")
        assert "'pixels': expected an array [2, 3] of uint8, got" in refused["detail"]


# --- faults of single records ----------------------------------------------------------------------------------------

PAIR = InputTensor("x", "float32", (None, 2))
BLOCK = InputTensor("x", "int16", (None, 2, 2))

FAULTY = [
    [1, 2], None, [1], [1, 2, 3], ["a", "b"], [1, None], [[1, 2]], [3.5, True], [], {"a": 1}, "[[", 7, [1, [2]],
]  # fmt: skip


def test_each_fault_of_an_array_in_json_is_an_error_of_its_record_alone() -> None:
    texts = [None if value is None else value if isinstance(value, str) else json.dumps(value) for value in FAULTY]
    values, errors = read(pl.Series("x", texts), PAIR)
    assert (values.dtype.name, values.shape) == ("float32", (len(FAULTY), 2))
    assert values[[0, 7]].tolist() == [[1, 2], [3.5, 1]]
    assert not values[[i for i in range(len(FAULTY)) if i not in (0, 7)]].any()
    assert [(error.record, error.code, error.message.rpartition(", got ")[2]) for error in errors] == [
        (1, "missing-value", "no value for 'x', and the model needs one"),
        (2, "wrong-shape", "[1]"),
        (3, "wrong-shape", "[3]"),
        (4, "wrong-type", "'a' in it"),
        (5, "missing-value", "one with values missing"),
        (6, "wrong-shape", "[1, 2]"),
        (8, "wrong-shape", "[0]"),
        (9, "wrong-type", "'{\"a\": 1}'"),
        (10, "wrong-type", "'[['"),
        (11, "wrong-type", "'7'"),
        (12, "wrong-shape", "lists of different lengths"),
    ]
    assert {error.column for error in errors} == {"x"}
    assert errors[1].message == "expected an array [2] of float32, got [1]"


def test_each_fault_of_an_array_in_a_list_column_is_an_error_of_its_record() -> None:
    lists = [
        [[1, 2], [3, 4]], None, [[1, 2]], [[1, 2], [3]], [[1, 2], None], [[1, None], [2, 3]], [[1.5, 2], [3, 4]],
        [[1, 2], [3, 40_000]], [], [[-1, 0], [0, 1]],
    ]  # fmt: skip
    series = pl.Series("x", lists, dtype=pl.List(pl.List(pl.Float64)))
    values, errors = read(series, BLOCK)
    assert (values.dtype.name, values.shape) == ("int16", (10, 2, 2))
    assert values[[0, 9]].tolist() == [lists[0], lists[9]]
    assert [(error.record, error.code, error.message.rpartition(", got ")[2]) for error in errors] == [
        (1, "missing-value", "no value for 'x', and the model needs one"),
        (2, "wrong-shape", "[1, 2]"),
        (3, "wrong-shape", "lists of different lengths"),
        (4, "missing-value", "one with values missing"),
        (5, "missing-value", "one with values missing"),
        (6, "wrong-type", "1.5 in it"),
        (7, "wrong-type", "40000.0 in it"),
        (8, "wrong-shape", "[0, 0]"),
    ]


def test_fixed_size_lists_of_every_number_type_are_read() -> None:
    for kind in (pl.Float16(), pl.Float32(), pl.Float64(), pl.Int8(), pl.UInt64(), pl.Boolean()):
        series = pl.Series("x", [[1, 0], [0, 1]]).cast(pl.List(kind)).cast(pl.Array(kind, 2))
        for dtype in ("float16", "float64", "int8", "uint64", "bool"):
            values, errors = read(series, InputTensor("x", dtype, (None, 2)))
            assert (values.tolist(), values.dtype.name, errors) == ([[1, 0], [0, 1]], dtype, [])


def test_lists_of_odd_types_are_read_or_refused() -> None:
    whole = InputTensor("x", "int64", (None, 2))
    decimals = pl.Series("x", [[1.0, 2.0], [1.5, 2.0]]).cast(pl.List(pl.Decimal(9, 1)))
    huge = pl.Series("x", [[1, 2], [2**70, 1]], dtype=pl.List(pl.Int128()))
    for series in (decimals, huge):
        values, errors = read(series, whole)
        assert (values[0].tolist(), [(error.record, error.code) for error in errors]) == ([1, 2], [(1, "wrong-type")])
    values, errors = read(pl.Series("x", [[1e300, -1e300]]), PAIR)
    assert errors == [RowError(0, "wrong-type", "expected an array [2] of float32, got 1e+300 in it", "x")]
    values, errors = read(pl.Series("x", [[np.inf, -np.inf]]), PAIR)
    assert (values.tolist(), errors) == ([[np.inf, -np.inf]], [])
    for missing in (pl.Series("x", [None]), pl.Series("x", [[None, None]])):
        assert [error.code for error in read_arrays(missing, whole)[1]] == ["missing-value"]
    for series in (pl.Series("x", [[1, 2]]).cast(pl.List(pl.Date())), pl.Series("x", [1.5]), pl.Series("x", [["1"]])):
        assert array_fault(whole, None, series) == f"expected an array [2] of int64, got {series.dtype}"
        with pytest.raises(SchemaMismatch, match="column 'x': expected an array"):
            read_arrays(series, whole)


def test_large_integers_are_kept_exactly_or_refused() -> None:
    tensor = InputTensor("x", "int64", (None, 2))
    values, errors = read(pl.Series("x", ["[9223372036854775807, 1]", "[9223372036854775808, 1]"]), tensor)
    assert values[0].tolist() == [2**63 - 1, 1]
    assert [(error.record, error.code) for error in errors] == [(1, "wrong-type")]
    _, errors = read_arrays(pl.Series("x", ["[9007199254740993, 1.0]", "[3.0, 1]", "[-1e30, 1]"]), tensor)
    assert [error.record for error in errors] == [0, 2]  # next to a fraction, JSON numbers are floats


def test_a_missing_number_in_an_array_reaches_a_model_that_takes_it_as_nan() -> None:
    tolerant = InputTensor("x", "float32", (None, 2), nullable=True)
    for series in (pl.Series("x", [[1, None]], dtype=pl.List(pl.Int64())), pl.Series("x", ["[1, null]"])):
        values, errors = read(series, tolerant)
        assert np.array_equal(values, [[1, np.nan]], equal_nan=True)
        assert errors == []


def test_arrays_of_text_hold_only_text() -> None:
    tensor = InputTensor("x", "string", (None, 1, 2))
    for series in (pl.Series("x", [[["a\0", ""]]]), pl.Series("x", ['[["a\\u0000", ""]]'])):
        values, errors = read(series, tensor)
        assert (values.tolist(), values.dtype, errors) == ([[["a\0", ""]]], np.dtype(object), [])
    _, errors = read_arrays(pl.Series("x", ['[["a", 1]]', '[["a", null]]']), tensor)
    assert [error.code for error in errors] == ["wrong-type", "missing-value"]
    with pytest.raises(SchemaMismatch, match=r"expected an array \[1, 2\] of string, got List\(List\(Int64\)\)"):
        read_arrays(pl.Series("x", [[[1, 2]]]), tensor)


def test_which_column_holds_the_arrays_of_an_input() -> None:
    def bound(tensor: InputTensor, columns: list[str], *arrays: str) -> dict[str, str]:
        return bind(Signature((tensor,), ()), columns, None, lambda name: name in arrays).arrays

    assert bound(PAIR, ["id", "x"], "x") == {"x": "x"}
    assert bound(PAIR, ["id", "y", "z"], "y") == {"x": "y"}
    assert bound(PAIR, ["id", "x"]) == {}  # two numbers, one of them called as the input is
    assert bound(PAIR, ["a", "b"], "a") == {}
    assert bound(BLOCK, ["x"]) == {"x": "x"}
    for tensor, columns, arrays in ((PAIR, ["a", "b", "c"], "ab"), (BLOCK, ["a", "b"], "ab"), (BLOCK, ["a"], "")):
        with pytest.raises(SchemaMismatch):
            bound(tensor, columns, *arrays)
    words = InputTensor("x", "string", (None, 2))
    with pytest.raises(SchemaMismatch):
        bound(words, ["a", "b", "note"], "note")  # a text in brackets
    assert bound(words, ["a", "x", "b"], "x") == {"x": "x"}


def test_a_scalar_column_never_fills_an_input_whose_array_is_missing() -> None:
    tokens, mask = (InputTensor(name, "int64", (None, None)) for name in ("tokens", "mask"))
    with pytest.raises(SchemaMismatch, match=r"input 'mask' takes an array \[N\] of int64 from each record"):
        bind(Signature((tokens, mask), ()), ["id", "tokens"], None, lambda name: name == "tokens")


def test_no_records_and_no_good_records_give_empty_and_blank_arrays() -> None:
    for series in (pl.Series("x", [], dtype=pl.List(pl.Float32())), pl.Series("x", [], dtype=pl.String())):
        values, errors = read(series, PAIR)
        assert (values.shape, errors) == ((0, 2), [])
    values, errors = read(pl.Series("x", [None, "7"], dtype=pl.String()), PAIR)
    assert (values.tolist(), len(errors)) == ([[0, 0], [0, 0]], 2)


def test_records_without_an_array_share_one_blank() -> None:
    texts = pl.Series("x", ["[" + "1," * 9_999 + "1]", *["x"] * 20_000])
    tracemalloc.start()
    try:
        values, errors = read_arrays(texts, InputTensor("x", "float32", (None, None)))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert (len(values), len(errors)) == (20_001, 20_000)
    assert peak < 50 * 2**20  # as separate arrays they would take 800 MB
    assert not isinstance(values, np.ndarray)
    assert values.take(np.array([0, 7])).tolist() == [[1.0] * 10_000, [0.0] * 10_000]


# --- graphs of every kind --------------------------------------------------------------------------------------------

HEAD = '<ir_version: 8, opset_import: ["" : 17]>\n'
LENGTHS = f"""{HEAD}
lengths (int64[N, T] tokens) => (float[N] total, int64[N, T] same)
{{
    numbers = Cast <to = 1> (tokens)
    axes = Constant <value = int64[1] {{1}}> ()
    total = ReduceSum <keepdims = 0> (numbers, axes)
    same = Identity (tokens)
}}
"""
FOURS = f"""{HEAD}
fours (float[4, 3] x) => (float[4] total, float[4, 3, 2] cube, float level)
{{
    axes = Constant <value = int64[1] {{1}}> ()
    total = ReduceSum <keepdims = 0> (x, axes)
    last = Constant <value = int64[1] {{2}}> ()
    column = Unsqueeze (x, last)
    cube = Concat <axis = 2> (column, column)
    level = ReduceMean <keepdims = 0> (x)
}}
"""
SINGLE = f"{HEAD} single (float[1, 3] x) => (float score) {{ score = ReduceSum <keepdims = 0> (x) }}"
CENTRED = f"""{HEAD}
centred (float[N, 2, 2] x) => (float[N, 2, 2] far)
{{
    mean = ReduceMean <axes = [0], keepdims = 1> (x)
    far = Sub (x, mean)
}}
"""
TEXTS = f"""{HEAD}
texts (string[N] a, string[N, 1] b) => (string[N] c, string[N, 1] d)
{{
    c = Identity (a)
    d = Identity (b)
}}
"""
KINDS = f"""{HEAD}
kinds (float16[N, 2] half, double[N, 2] wide, bool[N, 2] flags, int8[N, 2] small)
    => (float16[N, 2] a, double[N, 2] b, bool[N, 2] c, int32[N, 2] d)
{{
    a = Add (half, half)
    b = Add (wide, wide)
    c = Not (flags)
    d = Cast <to = 6> (small)
}}
"""


@pytest.fixture(scope="module")
def lengths(service: Api) -> Api:
    service.register("lengths", graph(LENGTHS))
    return service


@pytest.mark.parametrize("format", ["parquet", "jsonl"])
def test_arrays_of_different_lengths_are_scored_by_length_and_come_back_in_order(lengths: Api, format: str) -> None:
    tokens = [[1, 2, 3], [4], None, [5, 6], [7, 8, 9], [2], [10] * 20, [], [3, 3]]
    job = lengths.run(encoded(pl.DataFrame({"id": range(9), "tokens": tokens}), format), "lengths")
    assert job["rows"] == {"total": 9, "ok": 8, "failed": 1}, job
    result = decoded(lengths.result(job).content, format)
    assert result["id"].to_list() == list(range(9))
    assert result["total"].to_list() == [None if one is None else sum(one) for one in tokens]
    assert result["same"].to_list() == tokens
    assert [(error["record"], error["code"]) for error in lengths.errors(job)] == [(2, "missing-value")]


def test_a_column_of_arrays_needs_no_name_when_it_is_the_only_one_or_named_in_columns(lengths: Api) -> None:
    frame = pl.DataFrame({"id": [1, 2], "ids": [[1, 2], [3, 4]], "more": [[5, 6], [7, 8]]})
    alone = lengths.run(encoded(frame.drop("more"), "parquet"), "lengths")
    assert decoded(lengths.result(alone).content, "parquet")["total"].to_list() == [3, 7]
    for columns in ('{"tokens": "more"}', '["more"]'):
        chosen = lengths.run(encoded(frame, "jsonl"), "lengths", columns=columns)
        assert decoded(lengths.result(chosen).content, "jsonl")["total"].to_list() == [11, 15]


def test_a_result_of_several_lengths_cannot_be_npz(lengths: Api) -> None:
    frame = pl.DataFrame({"tokens": [[1, 2], [3]]})
    job = lengths.run(encoded(frame, "parquet"), "lengths", format="npz")
    assert (job["state"], job["error"]["code"]) == ("failed", "invalid-options")
    assert "'same' differs in size between records" in job["error"]["message"]


@pytest.fixture(scope="module")
def fours(service: Api) -> Api:
    notes = service.register("fours", graph(FOURS))["notes"]
    assert notes == ["Output 'level' is not per record and was dropped."]
    return service


MATRIX = np.arange(27, dtype=np.float32).reshape(9, 3)


@pytest.mark.parametrize("given", ["npy", "npz", "parquet", "csv"])
def test_a_graph_of_four_records_gives_arrays_of_its_outputs_to_all(fours: Api, given: str) -> None:
    """The last run is padded, and the default format of the result can hold arrays."""
    columns = pl.DataFrame(MATRIX, schema=["a", "b", "c"], orient="row")
    target = io.BytesIO()
    np.save(target, MATRIX)
    content = {
        "npy": target.getvalue(),
        "npz": body({"x": MATRIX}, "npz"),
        "parquet": body({"x": MATRIX}, "parquet"),
        "csv": encoded(columns, "csv"),
    }[given]
    job = fours.run(content, "fours", **({} if given.startswith("np") else {"format": "npz"}))
    assert (job["state"], job["rows"]["ok"], job["result"]["format"]) == ("completed", 9, "npz"), job
    result = np.load(io.BytesIO(fours.result(job).content))
    assert result["total"].tolist() == MATRIX.sum(axis=1).tolist()
    assert result["cube"].tolist() == np.stack([MATRIX, MATRIX], axis=2).tolist()


def test_several_arrays_as_npy_are_refused_at_once(fours: Api) -> None:
    params = {"model": "fours", "format": "npy"}
    answer = fours.http.post("/v1/predict", content=body({"x": MATRIX}, "parquet"), params=params)
    assert "request npz" in problem(answer, 422, "invalid-options")["detail"]


def test_graphs_of_one_record_of_all_records_and_of_every_type_are_scored(service: Api) -> None:
    for name, text in (("single", SINGLE), ("centred", CENTRED), ("texts", TEXTS), ("kinds", KINDS)):
        service.register(name, graph(text))
    target = io.BytesIO()
    np.save(target, MATRIX)
    job = service.run(target.getvalue(), "single")
    assert np.load(io.BytesIO(service.result(job).content)).tolist() == MATRIX.sum(axis=1).tolist()

    cubes = np.arange(36, dtype=np.float32).reshape(9, 2, 2)
    target = io.BytesIO()
    np.save(target, cubes)
    job = service.run(target.getvalue(), "centred")
    assert np.load(io.BytesIO(service.result(job).content)).tolist() == (cubes - cubes.mean(axis=0)).tolist()

    words = pl.DataFrame({"a": ["[1]", "é"], "b": ["", "x,\n"]})
    for format in ("parquet", "jsonl"):
        result = decoded(service.result(service.run(encoded(words, format), "texts")).content, format)
        assert result.rows() == words.rows()

    kinds = {
        "half": np.array([[0.5, 2], [3, 65504]], np.float16),
        "wide": np.array([[0.1, 1e300], [2, 3]]),
        "flags": np.array([[True, False], [False, True]]),
        "small": np.array([[-128, 127], [0, 1]], np.int8),
    }
    for format in ("npz", "parquet", "jsonl", "csv"):
        job = service.run(body(kinds, format), "kinds", format="npz", passthrough="none")
        result_arrays = np.load(io.BytesIO(service.result(job).content))
        flat = {name: np.ravel(result_arrays[name]).tolist() for name in result_arrays}
        expected: dict[str, list[float]] = {
            "a": [1, 4, 6, np.inf],
            "b": [0.2, 2e300, 4, 6],
            "c": [0, 1, 1, 0],
            "d": [-128, 127, 0, 1],
        }
        if format != "npz":
            expected = {f"{name}_{i}": values[i::2] for name, values in expected.items() for i in range(2)}
        assert flat == expected


# --- a published model -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def magika_onnx(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A network that detects types of files from 2,048 of their bytes: int32 [N, 2048] -> float32 [N, 214]."""
    folder = tmp_path_factory.mktemp("magika")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), "magika==1.0.3"]
    if subprocess.run(command, check=False, capture_output=True, timeout=100).returncode:
        pytest.skip("no package index answers")
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        return wheel.read("magika/models/standard_v3_3/model.onnx")


@pytest.mark.slow
def test_a_published_network_answers_a_job_as_it_answers_onnx_runtime(service: Api, magika_onnx: bytes) -> None:
    batch = service.register("magika", magika_onnx)["batch"]
    session = onnxruntime.InferenceSession(magika_onnx, providers=["CPUExecutionProvider"])
    (name,), (output,) = ([one.name for one in ends] for ends in (session.get_inputs(), session.get_outputs()))
    files = sorted(Path(onnxruntime.__file__).parent.rglob("*.py"))[:40]
    heads = [file.read_bytes()[:2048].ljust(2048, b"\0") for file in files]
    given = np.frombuffer(b"".join(heads), np.uint8).reshape(-1, 2048).astype(np.int32)
    # ONNX Runtime computes a record alone in another way than several: 6e-4 apart.
    step = 1 if batch == 1 else len(given)
    expected = np.concatenate(
        [session.run([output], {name: given[start : start + step]})[0] for start in range(0, len(given), step)]
    )
    for format in ("npz", "parquet", "jsonl"):
        job = service.run(body({name: given}, format), "magika", format="npz")
        assert job["rows"] == {"total": len(given), "ok": len(given), "failed": 0}, job
        answers = np.load(io.BytesIO(service.result(job).content))[output]
        assert np.abs(answers - expected).max() <= 1e-5
        assert (answers.argmax(axis=1) == expected.argmax(axis=1)).all()
