"""Files as people have them: with semicolons and decimal commas, in other encodings, packed, from spreadsheets."""

import base64
import gzip
import hashlib
from pathlib import Path
from typing import Any

import orjson
import polars as pl
import pytest
from service import Api, encoded, ok, problem, running

from batchserve.direct import Direct
from batchserve.domain import Options, ReadOptions
from batchserve.errors import InvalidInput

PREDICT = "/v1/models/iris/predict"


def german(frame: pl.DataFrame) -> bytes:
    """As a spreadsheet of that country saves a table."""
    return frame.write_csv(separator=";", decimal_comma=True).encode()


# --- delimiters and decimal commas -----------------------------------------------------------------------------------


@pytest.mark.parametrize("delimiter", [";", "\t", "|"])
def test_a_delimiter_is_recognised_at_upload_and_kept_for_the_result(
    api: Api, flowers: pl.DataFrame, delimiter: str
) -> None:
    expected = api.result(api.run(encoded(flowers, "csv"), "iris", passthrough="all")).content
    data = flowers.write_csv(separator=delimiter).encode()
    for job in (api.run(data, "iris", passthrough="all"), _in_two_calls(api, data, passthrough="all")):
        assert job["rows"] == {"total": flowers.height, "ok": flowers.height, "failed": 0}
        assert api.result(job).content == expected.replace(b",", delimiter.encode())


def test_a_delimiter_is_recognised_by_the_columns_that_are_mapped(api: Api, flowers: pl.DataFrame) -> None:
    names = {name: f"{name}, about" for name in flowers.columns[1:]}
    data = german(flowers.rename(names))
    few = german(flowers.rename(names)[:90])
    answer = ok(api.http.post(PREDICT, content=few, params={"columns": orjson.dumps(names).decode(), "decimal": ","}))
    assert len(answer["prediction"]) == 90
    job = api.run(data, "iris", columns=orjson.dumps(names).decode(), decimal=",")
    assert job["rows"]["failed"] == 0


def test_decimal_commas_give_the_predictions_of_decimal_points(api: Api, flowers: pl.DataFrame) -> None:
    points = api.run(encoded(flowers, "csv"), "iris", passthrough="all", format="parquet")
    expected = pl.read_parquet(api.result(points).content)
    data = german(flowers)
    jobs = [api.run(data, "iris", decimal=",", passthrough="all"), _in_two_calls(api, data, decimal=",")]
    for job in jobs:
        assert (job["state"], job["rows"]["failed"]) == ("completed", 0)
    written = pl.read_csv(api.result(jobs[0]).content, separator=";", decimal_comma=True)
    assert written.columns == expected.columns
    # The result is written like its input, which anything that read that can read.
    assert written["probability_setosa"].to_list() == pytest.approx(expected["probability_setosa"].to_list(), rel=1e-6)
    assert written[flowers.columns[0]].to_list() == flowers[flowers.columns[0]].to_list()
    converted = pl.read_parquet(api.result(jobs[0], format="parquet").content)
    assert converted["probability_setosa"].to_list() == expected["probability_setosa"].to_list()
    few = german(flowers[:90])
    online = ok(api.http.post(PREDICT, content=few, params={"decimal": ","}))
    assert [row["prediction"] for row in online["prediction"]] == expected["prediction"].to_list()[:90]
    valid = ok(api.http.post("/v1/models/iris/validate", content=few, params={"decimal": ","}))
    assert valid["valid"]


def test_a_column_of_decimal_commas_is_refused_with_the_option_that_reads_it(api: Api, flowers: pl.DataFrame) -> None:
    for url in ("/v1/predict?model=iris", "/v1/upload?model=iris", PREDICT):
        refused = problem(api.http.post(url, content=german(flowers)), 422, "schema-mismatch")
        assert "if the comma is a decimal mark, send the option decimal=," in refused["detail"]
    problem(api.http.post("/v1/predict?model=iris&decimal=x", content=german(flowers)), 422, "invalid-options")


def test_the_same_bytes_with_another_decimal_mark_are_another_input(api: Api) -> None:
    data = "sepal length (cm);sepal width (cm);petal length (cm);petal width (cm)\n5;3;1;0\n"
    first = api.run(data, "iris", reuse=True)
    assert api.run(data, "iris", reuse=True)["reused_from"] == first["id"]
    assert api.run(data, "iris", decimal=",", reuse=True)["reused_from"] is None


def test_a_file_that_is_submitted_directly_is_read_as_the_api_reads_it(
    tmp_path: Path, iris_onnx: Path, flowers: pl.DataFrame
) -> None:
    file = tmp_path / "flowers.csv"
    file.write_bytes(german(flowers))
    with running(tmp_path / "site") as api, Direct.open(api.settings) as direct:
        model = direct.register("iris", iris_onnx)
        job = api.finished(direct.submit(file, model, Options("jsonl"), read=ReadOptions(decimal=",")))
        assert job["rows"] == {"total": flowers.height, "ok": flowers.height, "failed": 0}


# --- encodings -------------------------------------------------------------------------------------------------------

CITIES = "age,city,visits,region\n30,Bern,7,Zürich\n31,Genf,3,Genève\n32,Biel,9,Zürich\n"


@pytest.mark.parametrize("encoding", ["latin-1", "windows-1252", "utf-16", "utf-16-le"])
def test_a_text_is_stored_as_utf8(api: Api, encoding: str) -> None:
    plain = api.run(CITIES, "people", passthrough="all", reuse=True)
    sent = CITIES.encode(encoding)
    option = {} if encoding == "utf-16" else {"encoding": encoding}  # a byte order mark says it
    for body, headers in ((sent, {}), (gzip.compress(sent), {"content-encoding": "gzip"})):
        headers |= {"content-digest": f"sha-256=:{base64.b64encode(hashlib.sha256(body).digest()).decode()}:"}
        job = ok(api.http.post("/v1/upload", content=body, params=option, headers=headers), 201)
        assert job["input"]["sha256"] == plain["input"]["sha256"]
        assert api.http.get(job["links"]["input"]).content == CITIES.encode()
    job = api.run(sent, "people", passthrough="all", reuse=True, **option)
    assert job["reused_from"] is not None
    assert api.result(job).content == api.result(plain).content
    online = ok(api.http.post("/v1/models/people/predict", content=sent, params=option))
    assert [row["region"] for row in online["prediction"]] == ["Zürich", "Genève", "Zürich"]


def test_a_text_in_another_encoding_is_refused_at_upload_and_leaves_nothing(api: Api) -> None:
    sent = CITIES.encode("latin-1")
    for url in ("/v1/upload", "/v1/predict?model=people", "/v1/models/people/predict"):
        with api.unchanged():
            refused = problem(api.http.post(url, content=sent), 422, "invalid-input")
            assert "send the option encoding=windows-1252 or encoding=latin-1" in refused["detail"]
    with api.unchanged():
        problem(api.http.post("/v1/upload?encoding=ebcdic", content=sent), 422, "invalid-options")
    with api.unchanged():
        wrong = CITIES.encode("utf-16-le")[:-1]
        refused = problem(api.http.post("/v1/upload?encoding=utf-16-le", content=wrong), 422, "invalid-input")
        assert "ends within a character" in refused["detail"]


def test_a_long_text_is_made_utf8_within_the_limit_of_the_server(tmp_path: Path) -> None:
    with running(tmp_path, worker=False, upload_bytes=4_000_000) as api:
        text = "größe\n" + "äöü\n" * 500_000
        job = api.upload(text.encode("latin-1"), encoding="latin-1")
        assert api.http.get(job["links"]["input"]).text == text
        with api.unchanged():
            more = "größe\n" + "äöüäöü\n" * 450_000
            assert len(more) < 4_000_000
            problem(
                api.http.post("/v1/upload?encoding=latin-1", content=more.encode("latin-1")), 413, "payload-too-large"
            )


def test_a_file_in_another_encoding_is_submitted_directly(tmp_path: Path, people_onnx: bytes) -> None:
    file = tmp_path / "cities.csv"
    file.write_bytes(CITIES.encode("windows-1252"))
    with running(tmp_path / "site") as api, Direct.open(api.settings) as direct:
        model = direct.register("people", people_onnx)
        with pytest.raises(InvalidInput, match="encoding=windows-1252"):
            direct.submit(file, model)
        job = api.finished(direct.submit(file, model, read=ReadOptions(encoding="windows-1252")))
        assert job["rows"]["ok"] == 3


def _in_two_calls(api: Api, data: bytes, passthrough: str = "unused", **query: Any) -> dict[str, Any]:
    uploaded = api.upload(data, **query)
    url = f"/v1/predict/{uploaded['id']}?model=iris&passthrough={passthrough}&reuse=false"
    job: dict[str, Any] = ok(api.http.post(url, headers={"prefer": "wait=30"}))
    return job
