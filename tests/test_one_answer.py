"""The same value has the same outcome in every format, in a job and online, alone and among others."""

import io
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pandas as pd
import polars as pl
import pytest
from selection import quick_first
from service import Api, encoded, ok, running
from sklearn.cluster import KMeans
from sklearn.compose import make_column_transformer
from sklearn.datasets import make_classification
from sklearn.decomposition import PCA
from sklearn.ensemble import HistGradientBoostingClassifier, RandomForestRegressor
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LinearRegression, LogisticRegression, Ridge
from sklearn.naive_bayes import GaussianNB
from sklearn.neighbors import KNeighborsClassifier
from sklearn.neural_network import MLPClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder, PolynomialFeatures, QuantileTransformer, StandardScaler
from sklearn.svm import SVC, SVR, LinearSVC

from batchserve.admission import admit
from batchserve.admission.probe_inputs import Feed
from batchserve.admission.run_sizes import with_multiple
from batchserve.conversion import convert
from batchserve.inference.run import run
from batchserve.inference.session import open_session

TABLES = ("csv", "jsonl", "json", "parquet", "arrow", "arrows")
FORMATS = (*TABLES, "npy", "npz", "lists")
"""`lists`: JSON whose records are arrays."""
MEDIA = {
    "csv": "text/csv",
    "jsonl": "application/x-ndjson",
    "json": "application/json",
    "lists": "application/json",
    "parquet": "application/vnd.apache.parquet",
    "arrow": "application/vnd.apache.arrow.file",
    "arrows": "application/vnd.apache.arrow.stream",
    "npy": "application/x-npy",
    "npz": "application/x-npz",
}
GOOD = 250
"""The number of records before and after the tested one, so that it is in no sample."""


def doubling(dtype: str) -> bytes:
    """A model of two columns, a and b, that gives each value twice."""
    model = onnx.parser.parse_model(
        f"""<ir_version: 8, opset_import: ["" : 17]>
        g ({dtype}[N, 2] x) => ({dtype}[N, 2] y) {{ y = Add(x, x) }}"""
    )
    kinds = {"float": "float32", "double": "float64"}
    columns = [{"name": name, "dtype": kinds.get(dtype, dtype), "input": "x"} for name in "ab"]
    onnx.helper.set_model_props(model, {"batchserve.columns": json.dumps(columns)})
    return model.SerializeToString()


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    with running(tmp_path_factory.mktemp("models"), chunk_records=200) as api:
        for dtype in ("float16", "float", "double", "int32", "uint8", "int64"):
            api.register(dtype, doubling(dtype))
        yield api


def written(values: list[str], format: str) -> bytes | None:
    """A file of records {a: value, b: 1}, the values as JSON writes them; None where the format has no such value."""
    if format == "csv":
        return "\n".join(["a,b", *(v.strip('"') + ",1" for v in values), ""]).encode()
    if format in ("jsonl", "json"):
        records = [f'{{"a":{value},"b":1}}' for value in values]
        return "\n".join(records).encode() if format == "jsonl" else f"[{','.join(records)}]".encode()
    if format == "lists":
        return f"[{','.join(f'[{value},1]' for value in values)}]".encode()
    numbers = [float(json.loads(value)) if value[0] == '"' else json.loads(value) for value in values]
    if any(isinstance(n, float) and np.isinf(n) and v[0] != '"' for n, v in zip(numbers, values, strict=True)):
        return None  # larger than any float64
    whole = all(isinstance(number, int) for number in numbers)
    if not whole:
        numbers = [float(number) for number in numbers]
    if whole and not -(2**63) <= min(numbers) <= max(numbers) < 2**63:
        return None
    file = io.BytesIO()
    if format in ("npy", "npz"):
        matrix = np.array([[number, 1] for number in numbers], np.int64 if whole else np.float64)
        np.save(file, matrix) if format == "npy" else np.savez(file, x=matrix)
    else:
        frame = pl.DataFrame({"a": numbers, "b": [1] * len(numbers)})
        writers: dict[str, Callable[..., Any]] = {
            "parquet": frame.write_parquet,
            "arrow": frame.write_ipc,
            "arrows": frame.write_ipc_stream,
        }
        writers[format](file)
    return file.getvalue()


def outcomes(api: Api, model: str, value: str, good: int = GOOD) -> dict[str, Any]:
    """The outcome of a record with this value among valid ones, by format: its error, or None if it is scored."""
    found: dict[str, Any] = {}
    for format in FORMATS:
        body = written(["1"] * good + [value] + ["2"] * good, format)
        if body is None:
            continue
        job = api.run(body, model)
        assert job["state"] == "completed", (format, job["error"])
        errors = [(e["record"], e["column"], e["code"], e["message"]) for e in api.errors(job)]
        assert job["rows"] == {"total": 2 * good + 1, "ok": 2 * good + 1 - len(errors), "failed": len(errors)}, format
        found[format] = errors
        few = written(["1", value], format)
        assert few is not None
        answer = ok(api.http.post(f"/v1/models/{model}/predict", content=few, headers={"content-type": MEDIA[format]}))
        online = [(e["record"] + good - 1, e["column"], e["code"], e["message"]) for e in answer["errors"]]
        assert online == errors, format
    return found


@pytest.mark.parametrize(
    ("model", "value", "shown"),
    quick_first(
        [
            ("float", "1e39", "1e+39"),
            ("double", "1e400", "1e400"),
            ("float16", "65520", "65520.0"),
            ("float", "-1e39", "-1e+39"),
            ("float", "1e400", "1e400"),
            ("float", "-1E+400", "-1E+400"),
            ("float", "1" + "0" * 400, "1" + "0" * 79),
            ("float", "3.4028235677973366e38", "3.4028235677973366e+38"),
            ("float16", "-1e39", "-1e+39"),
        ],
        3,
    ),
)
def test_a_number_too_large_for_the_model_is_an_error_in_every_format(
    models: Api, model: str, value: str, shown: str
) -> None:
    dtype = {"float": "float32", "double": "float64"}.get(model, model)
    error = (GOOD, "a", "wrong-type", f"expected {dtype}, got {shown}, which is beyond its range")
    found = outcomes(models, model, value)
    assert found == {format: [error] for format in found}
    assert len(found) >= 4


@pytest.mark.parametrize(
    "value", quick_first(['"inf"', "3.4028235e38", '"-Infinity"', "-3.4028234663852886e38", "1e-400"], 2)
)
def test_infinity_and_what_rounds_to_a_number_are_scored_in_every_format(models: Api, value: str) -> None:
    found = outcomes(models, "float", value)
    assert found == {format: [] for format in FORMATS}


@pytest.mark.parametrize(
    ("model", "value"),
    quick_first(
        [
            ("int32", "2147483648"),
            ("uint8", "-1"),
            ("int64", "9007199254740993.0"),
            ("int32", "1.5"),
            ("int32", "-2147483649"),
            ("uint8", "256"),
            ("int64", "9223372036854775808"),
            ("int64", "-9223372036854775809"),
            ("int64", "1" + "0" * 400),
            ("int32", "1e39"),
            ("int32", "1e400"),
        ],
        4,
    ),
)
def test_a_number_that_is_no_integer_of_the_model_is_an_error_in_every_format(
    models: Api, model: str, value: str
) -> None:
    for format in FORMATS:
        body = written(["1"] * GOOD + [value] + ["2"] * GOOD, format)
        if body is None:
            continue
        typed = format in ("npy", "npz") and not value.lstrip("-").isdigit()
        if typed:  # an array of floats is refused as a whole
            answer = models.http.post("/v1/predict", params={"model": model}, content=body)
            assert answer.status_code == 422, answer.text
            continue
        job = models.run(body, model)
        assert job["rows"] == {"total": 2 * GOOD + 1, "ok": 2 * GOOD, "failed": 1}, format
        ((record, column, code),) = [(e["record"], e["column"], e["code"]) for e in models.errors(job)]
        assert (record, column, code) == (GOOD, "a", "wrong-type"), format


NAMED_OTHERWISE = {
    "wrong": ('"x"', "1", "w", "wrong-type"),
    "missing": ("null", "1", "w", "missing-value"),
    "infinite": ('"inf"', "1", "w", "out-of-range"),
    "wrong and limited": ("1", '"x"', " b", "wrong-type"),
    "missing and limited": ("1", "null", " b", "missing-value"),
    "limited": ("1", "1000", " b", "out-of-range"),
}


def test_the_errors_of_a_column_all_have_its_name_in_the_input(models: Api) -> None:
    model = onnx.load_from_string(doubling("float"))
    limits = [{"missing": False, "infinite": False}, {"missing": False, "high": 100}]
    columns = next(entry.value for entry in model.metadata_props if entry.key == "batchserve.columns")
    domains = json.dumps({"x": limits})
    onnx.helper.set_model_props(model, {"batchserve.columns": columns, "batchserve.domains": domains})
    models.register("limited", model.SerializeToString())
    wanted = [(number, column, code) for number, (_, _, column, code) in enumerate(NAMED_OTHERWISE.values(), 1)]
    rows = [("1", "1"), *((a, b) for a, b, _, _ in NAMED_OTHERWISE.values())]
    lines = [f'{{"w":{a}," b":{b}}}' for a, b in rows]
    texts = {"null": ""}
    table = "".join(f"{texts.get(a, a)},{texts.get(b, b)}\n".replace('"', "") for a, b in rows)
    bodies = {"csv": "w, b\n" + table, "jsonl": "\n".join(lines), "json": f"[{','.join(lines)}]"}
    renamed = json.dumps({"a": "w"})
    for format, body in bodies.items():
        job = models.run(body, "limited", columns=renamed)
        errors = models.errors(job)
        assert [(e["record"], e["column"], e["code"]) for e in errors] == wanted, format
        assert all(repr(e["column"]) in e["message"] for e in errors if e["code"] != "wrong-type")
        for verb in ("predict", "validate"):
            path, headers = f"/v1/models/limited/{verb}", {"content-type": MEDIA[format]}
            answer = ok(models.http.post(path, content=body, params={"columns": renamed}, headers=headers))
            assert [(e["record"], e["column"], e["code"]) for e in answer["errors"]] == wanted, (format, verb)


def test_the_errors_of_an_array_all_have_its_name_in_the_input(models: Api) -> None:
    graph = """<ir_version: 8, opset_import: ["" : 17]> g (float[N, 2] x) => (float[N, 2] y) { y = Add(x, x) }"""
    model = onnx.parser.parse_model(graph)
    limits = [{"missing": False, "infinite": False}, {"missing": False, "high": 100}]
    onnx.helper.set_model_props(model, {"batchserve.domains": json.dumps({"x": limits})})
    models.register("unnamed", model.SerializeToString())
    rows = [[1.0, 1.0], [1e39, 1.0], [np.nan, 1.0], [np.inf, 1.0], [1.0, 1000.0]]
    codes = ["wrong-type", "missing-value", "out-of-range", "out-of-range"]
    for row, code in zip(rows[1:], codes, strict=True):
        arrays, lists = io.BytesIO(), io.BytesIO()
        np.savez(arrays, features=np.array([rows[0], row]))
        pl.DataFrame({"features": [rows[0], row]}).write_parquet(lists)
        for body in (arrays.getvalue(), lists.getvalue()):
            (error,) = models.errors(models.run(body, "unnamed"))
            assert (error["record"], error["column"], error["code"]) == (1, "features", code)
            assert row[1] == 1.0 or "for 'features'[1], got 1000.0" in error["message"]


@pytest.mark.parametrize("format", ["parquet", "arrow", "jsonl"])
def test_an_array_that_fails_hides_no_value_out_of_range_in_others(models: Api, format: str) -> None:
    graph = """<ir_version: 8, opset_import: ["" : 17]> g (float[N, 2] x) => (float[N, 2] y) { y = Add(x, x) }"""
    model = onnx.parser.parse_model(graph)
    limits = [{"missing": False}, {"missing": False, "high": 100}]
    onnx.helper.set_model_props(model, {"batchserve.domains": json.dumps({"x": limits})})
    models.register("high", model.SerializeToString())
    job = models.run(encoded(pl.DataFrame({"x": [[1.0, 1.0], [1.0, None], [1.0, 1000.0]]}), format), "high")
    assert [(e["record"], e["code"]) for e in models.errors(job)] == [(1, "missing-value"), (2, "out-of-range")]


@pytest.mark.parametrize("format", FORMATS)
def test_a_column_in_which_nothing_fits_is_refused_in_every_format(models: Api, format: str) -> None:
    body = written(["1e39"] * 3, format)
    assert body is not None
    answer = models.http.post(
        "/v1/predict", params={"model": "float"}, content=body, headers={"content-type": MEDIA[format]}
    )
    assert answer.status_code == 422, answer.text
    assert "column 'a': expected float32, got " in answer.json()["detail"]


@pytest.mark.parametrize("model", ["float", "int64"])
@pytest.mark.parametrize("word", quick_first(["true", '"False"', '"TRUE"', "false", '" true"'], 2))
def test_a_truth_value_is_a_number_in_every_format_whatever_its_neighbours(models: Api, model: str, word: str) -> None:
    doubled = 2 * (word.strip('" ').lower() == "true")
    kind = "float32" if model == "float" else model
    for format in ("csv", "jsonl", "json", "lists"):
        for values in ([word], [word, "1"], [word, '"x"'], [*["1"] * GOOD, word, '"x"'], [*[word] * GOOD, '"x"']):
            body = written(values, format)
            assert body is not None
            wanted = [None if value == '"x"' else 2 if value == "1" else doubled for value in values]
            faults = [(row, f"expected {kind}, got 'x'") for row, value in enumerate(wanted) if value is None]
            job = models.run(body, model, format="jsonl")
            results = [json.loads(line)["y_0"] for line in models.result(job).text.splitlines()]
            assert results == wanted, (format, values[:2])
            assert [(e["record"], e["message"]) for e in models.errors(job)] == faults
            if len(values) > GOOD:
                continue  # too many for an online request
            headers = {"content-type": MEDIA[format]}
            answer = ok(models.http.post(f"/v1/models/{model}/predict", content=body, headers=headers))
            assert [record["y_0"] for record in answer["prediction"]] == wanted, (format, values[:2])
            assert [(e["record"], e["message"]) for e in answer["errors"]] == faults


def test_the_csv_that_pandas_writes_of_dummies_has_the_answers_of_its_frame(models: Api) -> None:
    chance = np.random.default_rng(0)
    raw = pd.DataFrame({"age": chance.integers(18, 90, 300), "plan": chance.choice(["a", "b", "c"], 300)})
    sent = pd.get_dummies(raw).to_csv(index=False)
    assert "True" in sent
    frame = pd.read_csv(io.StringIO(sent))
    target = frame.age + 30 * frame.plan_a > 60
    encoder = make_column_transformer((OneHotEncoder(drop="if_binary"), ["plan_a"]), remainder="passthrough")
    for name, first in (("dummies", StandardScaler()), ("encoded", encoder)):
        estimator = make_pipeline(first, LogisticRegression(max_iter=500)).fit(frame, target)
        models.register(name, convert(estimator, frame).onnx)
        job = models.run(sent, name, passthrough="all")
        assert job["rows"] == {"total": 300, "ok": 300, "failed": 0}
        result = pd.read_csv(io.StringIO(models.result(job).text))
        assert result[list(frame.columns)].to_csv(index=False) == sent
        assert result.prediction.tolist() == estimator.predict(frame).tolist()


def test_arrays_with_a_number_too_large_fail_alone(tmp_path: Path) -> None:
    model = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["" : 17]>
        g (float[N, 2, 2] x) => (float[N, 2, 2] y) { y = Add(x, x) }"""
    ).SerializeToString()
    values = np.ones((3, 2, 2))
    values[1, 0, 1] = 1e39
    with running(tmp_path) as api:
        api.register("arrays", model)
        lines = [json.dumps({"x": record}) for record in values.tolist()]
        frame = pl.DataFrame({"x": values.tolist()})
        parquet, npy = io.BytesIO(), io.BytesIO()
        frame.write_parquet(parquet)
        np.save(npy, values)
        huge = lines[1].replace("1e+39", "1e400")
        for body, shown in (
            ("\n".join(lines).encode(), "1e+39"),
            ("\n".join([lines[0], huge, lines[2]]).encode(), "'1e400'"),
            (parquet.getvalue(), "1e+39"),
            (npy.getvalue(), "1e+39"),
        ):
            job = api.run(body, "arrays")
            assert job["rows"] == {"total": 3, "ok": 2, "failed": 1}, job
            (error,) = api.errors(job)
            assert (error["record"], error["column"], error["code"]) == (1, "x", "wrong-type")
            assert shown in error["message"]


# --- alone and among others -------------------------------------------------------------------------------------------

X, Y = make_classification(400, 20, n_informative=10, n_classes=3, random_state=0)
X = X.astype(np.float32)
OTHERS = np.random.default_rng(1).standard_normal((512, 20)).astype(np.float32)
ESTIMATORS: list[tuple[Any, int]] = [
    (LogisticRegression(), 2),
    (LinearRegression(), 2),
    (RandomForestRegressor(40, random_state=0), 1),
    (LinearSVC(), 2),
    (SVR(), 2),
    (make_pipeline(StandardScaler(), PCA(5), LogisticRegression()), 2),
    (make_pipeline(PolynomialFeatures(2), Ridge()), 2),
    (make_pipeline(QuantileTransformer(n_quantiles=50), LogisticRegression()), 2),
    (MLPClassifier((50,), max_iter=30), 1),
    (SVC(), 1),
    (KNeighborsClassifier(), 1),
    (KMeans(3, n_init="auto"), 1),
    (GaussianNB(), 1),
    (HistGradientBoostingClassifier(max_iter=20), 1),
]
"""With the multiple that ONNX Runtime 1.32 needs at least."""
QUICK = 3
"""So many of the first; the others run with the slow tests."""


@pytest.mark.parametrize(
    ("estimator", "least"),
    [
        pytest.param(estimator, least, id=str(estimator), marks=[] if number < QUICK else [pytest.mark.slow])
        for number, (estimator, least) in enumerate(ESTIMATORS)
    ],
)
@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_a_record_has_the_same_answer_in_runs_of_any_size(estimator: Any, least: int) -> None:
    admitted = admit(convert(estimator.fit(X, Y), X, tolerance=0.1).onnx)
    signature = admitted.signature
    assert signature.multiple >= least or signature.batch == 1
    if any("last digits" in note for note in signature.notes):
        assert "QuantileTransformer" in str(estimator)  # its sums depend on the alignment of a row
        return
    (name,) = (tensor.name for tensor in signature.inputs)
    session = open_session(admitted.model, signature.threads, signature.kernel)
    together = run(session, signature, {name: OTHERS}, 512).outputs
    many = run(session, signature, {name: np.tile(OTHERS, (40, 1))}, 512 * 40).outputs  # in full batches
    for output, array in many.items():
        for turn in range(40):
            np.testing.assert_array_equal(array[512 * turn : 512 * (turn + 1)], together[output], err_msg=f"{turn}")
    for size in (1, 2, 3, 4, 5, 7, 16, 65, 511):
        for start in range(0, 512, max(size, 16)):
            part = OTHERS[start : start + size]
            outputs = run(session, signature, {name: part}, len(part)).outputs
            for output, array in outputs.items():
                np.testing.assert_array_equal(array, together[output][start : start + size], err_msg=f"{size} {start}")


def test_a_batch_that_is_computed_otherwise_than_small_runs_is_not_taken() -> None:
    x = X[:, :4]
    model = onnx.load_from_string(convert(LogisticRegression().fit(x, Y), x, tolerance=0.1).onnx)
    admitted = admit(model.SerializeToString())
    (name,) = (tensor.name for tensor in admitted.signature.inputs)
    values = np.random.default_rng(2).standard_normal((16_384, 4)).astype(np.float32)
    session = open_session(admitted.model)
    whole, parts = session.run({name: values}), [session.run({name: part}) for part in np.split(values, 256)]
    if all(np.array_equal(array, np.concatenate([part[key] for part in parts])) for key, array in whole.items()):
        pytest.skip("this processor computes large runs as small ones")
    fast = replace(admitted.signature, batch=16_384)
    found = with_multiple(fast, onnx.load_from_string(admitted.model), session, Feed({name: values[:50]}))
    assert found.batch == 4096


def test_two_threads_are_taken_only_where_they_give_the_answers_of_one() -> None:
    model = make_pipeline(SimpleImputer(), HistGradientBoostingClassifier(max_iter=60)).fit(X, Y)
    admitted = admit(convert(model, X).onnx)
    (name,) = (tensor.name for tensor in admitted.signature.inputs)
    one, two = (open_session(admitted.model, threads).run({name: OTHERS}) for threads in (1, 2))
    assert any((array != one[output]).any() for output, array in two.items())  # sums in another order
    assert (admitted.signature.kernel, admitted.signature.threads) == ("onnxruntime", 1)
    assert not any("last digits" in note for note in admitted.signature.notes)


def test_a_record_has_the_same_answer_online_in_a_small_job_and_in_a_file(tmp_path: Path) -> None:
    model = convert(LogisticRegression().fit(X, Y), X, tolerance=0.1).onnx
    columns = [column.name for column in admit(model, tuned=False).signature.columns] or [str(i) for i in range(20)]
    lines = pl.DataFrame(OTHERS[:401], columns).write_ndjson().splitlines(keepends=True)
    with running(tmp_path, chunk_records=200) as api:  # the last chunk has one record
        api.register("m", model)
        results = api.result(api.run("".join(lines), "m")).text.splitlines()
        for record in (0, 7, 400):
            assert api.result(api.run(lines[record], "m")).text.splitlines() == [results[record]]
            headers = {"content-type": "application/x-ndjson"}
            online = ok(api.http.post("/v1/models/m/predict", content=lines[record], headers=headers))
            assert online["prediction"] == [json.loads(lines[record]) | json.loads(results[record])]
