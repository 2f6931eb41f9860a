"""Files as people have them: with semicolons and decimal commas, in other encodings, packed, from spreadsheets."""

import base64
import gzip
import hashlib
import io
import socket
import time
import zipfile
from collections.abc import Callable, Mapping
from datetime import date, datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx2
import onnx
import orjson
import polars as pl
import pytest
import xlsxwriter
from conftest import serving
from service import Api, encoded, ok, problem, running

from batchserve.direct import Direct
from batchserve.domain import Options, ReadOptions
from batchserve.errors import InvalidInput, UnsupportedMedia
from batchserve.formats.excel import read_workbook
from batchserve.formats.packed import contents_of, unpacked

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


# --- packed tables ---------------------------------------------------------------------------------------------------


def zipped(files: Mapping[str, bytes], method: int = zipfile.ZIP_DEFLATED, level: int | None = None) -> bytes:
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w", method, compresslevel=level) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return target.getvalue()


@pytest.mark.parametrize("format", ["csv", "jsonl", "json", "parquet", "arrow", "arrows"])
@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_STORED])
def test_a_zip_of_one_table_is_that_table(api: Api, flowers: pl.DataFrame, format: str, method: int) -> None:
    table = encoded(flowers, format)
    plain = api.run(table, "iris", reuse=True)
    packed = zipped({"data/": b"", f"data/flowers.{format}": table, "__MACOSX/data/._flowers": b"x"}, method)
    job = api.run(packed, "iris", reuse=True)
    assert (job["input"]["format"], job["input"]["sha256"]) == (format, plain["input"]["sha256"])
    assert job["input"]["filename"] == f"data/flowers.{format}"
    assert job["reused_from"] is not None
    assert api.http.get(job["links"]["input"]).content == table


def test_a_table_in_a_zip_is_read_with_the_options_of_a_file(api: Api, flowers: pl.DataFrame) -> None:
    table = german(flowers.rename({"flower": "größe"})[:90]).decode().encode("latin-1")
    packed = gzip.compress(zipped({"Tabelle": table}))
    job = api.run(packed, "iris", decimal=",", encoding="latin-1", filename="Tabelle.zip")
    assert (job["rows"]["ok"], job["input"]["filename"]) == (90, "Tabelle.zip")
    assert "größe" in api.result(job).text
    for verb in ("predict", "validate"):
        url = f"/v1/models/iris/{verb}?decimal=,&encoding=latin-1"
        answer = ok(api.http.post(url, content=zipped({"Tabelle.csv": table})))
        assert answer["errors"] == []
    problem(api.http.post("/v1/upload", content=zipped({"Tabelle.csv": table})), 422, "invalid-input")


NOON = datetime(2026, 1, 1, 12, 30)  # noqa: DTZ001 - cells have no time zone
JPEG = b"\xff\xd8\xff\xe0\x00\x10JFIF"


@pytest.mark.parametrize(
    ("files", "status", "message"),
    [
        ({"a.csv": b"a\n1\n", "b.csv": b"a\n1\n"}, 422, "several tables: 'a.csv', 'b.csv'; send each"),
        ({"a.csv": b"a\n1\n", "b.jpg": JPEG}, 422, "a table, 'a.csv', and images"),
        ({"a.csv": b"a\n1\n", "LICENSE.md": b"x"}, 422, "a table, 'a.csv', and 1 other files"),
        ({"a.csv.gz": b"\x1f\x8b"}, 422, "packed files in it: 'a.csv.gz'"),
        ({"../a.csv": b"a\n1\n"}, 422, "'../a.csv'"),
        ({"a.csv": b"%PDF-1.7"}, 415, "look like a PDF document"),
        ({"a.csv": b"a" * (70 * 2**20)}, 422, "more than 50"),
        ({"word/document.xml": b"<x/>"}, 415, "look like a Word document"),
        ({"mimetype": b"application/vnd.oasis.opendocument.spreadsheet"}, 415, "OpenDocument"),
    ],
)
def test_a_zip_that_is_not_one_table_is_refused_by_name(
    api: Api, files: dict[str, bytes], status: int, message: str
) -> None:
    with api.unchanged():
        code = "invalid-input" if status == 422 else "unsupported-media-type"
        refused = problem(api.http.post("/v1/upload", content=zipped(files)), status, code)
        assert message in refused["detail"]


def test_a_table_that_is_damaged_in_its_zip_or_longer_than_allowed_is_refused(
    tmp_path: Path, flowers: pl.DataFrame
) -> None:
    table = encoded(flowers, "csv")
    damaged = bytearray(zipped({"a.csv": table}, zipfile.ZIP_STORED))
    damaged[100] ^= 1
    with running(tmp_path, worker=False, upload_bytes=20_000) as api, api.unchanged():
        refused = problem(api.http.post("/v1/upload", content=bytes(damaged)), 422, "invalid-input")
        assert "'a.csv' of the zip cannot be unpacked" in refused["detail"]
        long = zipped({"a.csv": table * 10})
        problem(api.http.post("/v1/upload", content=long), 413, "payload-too-large")


def test_a_zip_that_is_damaged_anywhere_is_refused_or_gives_the_same_table(flowers: pl.DataFrame) -> None:
    table = encoded(flowers, "csv")
    whole = zipped({"a.csv": table})
    outcomes: set[bool | str] = set()
    for place in range(0, len(whole), 3):
        source = io.BytesIO(whole[:place] + bytes([whole[place] ^ 0x55]) + whole[place + 1 :])
        try:
            contents = contents_of(source)
            outcomes.add(contents.table is None or b"".join(unpacked(source, contents.table, 2**20)) == table)
        except (InvalidInput, UnsupportedMedia):
            outcomes.add("refused")
    assert outcomes == {True, "refused"}


def test_a_zip_that_was_unpacked_is_not_kept(tmp_path: Path, flowers: pl.DataFrame) -> None:
    with running(tmp_path, worker=False) as api:
        table = encoded(flowers, "csv")
        for body in (zipped({"flowers.csv": table}), workbook(Data=flowers)):
            before = _inputs(api.settings.storage)
            job = api.upload(body)
            (kept,) = _inputs(api.settings.storage) - before
            assert (Path(api.settings.storage) / "inputs" / kept).stat().st_size == job["input"]["bytes"]


@pytest.mark.slow
def test_a_client_that_leaves_while_its_zip_is_unpacked_leaves_nothing(tmp_path: Path, flowers: pl.DataFrame) -> None:
    table = pl.concat([flowers] * 15_000).with_row_index()
    packed = zipped({"flowers.csv": encoded(table, "csv")}, level=1)
    storage = tmp_path / "storage"
    with serving(tmp_path) as url:
        address = urlsplit(url)
        with socket.create_connection((address.hostname, address.port), 60) as connection:
            lines = ("POST /v1/upload HTTP/1.1", "host: localhost", f"content-length: {len(packed)}", "", "")
            connection.sendall("\r\n".join(lines).encode() + packed)
            _wait(lambda: len(_inputs(storage)) == 1 and any(storage.glob("inputs/.partial-*")))
        _wait(lambda: not _inputs(storage))
        assert ok(httpx2.get(f"{url}/v1/jobs"))["jobs"] == []
        assert ok(httpx2.post(f"{url}/v1/upload", content=zipped({"a.csv": b"a\n1\n"})), 201)["input"]["bytes"] == 4


def _inputs(storage: str | Path) -> set[str]:
    """The objects of inputs, without files that were never completed."""
    return {path.name for path in Path(storage).glob("inputs/*") if not path.name.startswith(".partial-")}


def _wait(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def test_a_zip_of_images_stays_one(api: Api) -> None:
    files = {"a.jpg": JPEG, "b.png": b"x", "notes.txt": b"x"}
    job = api.upload(zipped(files))
    assert job["input"]["format"] == "zip"
    assert api.upload(zipped({"photo": JPEG}))["input"]["format"] == "zip"


# --- workbooks -------------------------------------------------------------------------------------------------------


def workbook(**sheets: pl.DataFrame) -> bytes:
    target = io.BytesIO()
    with xlsxwriter.Workbook(target) as book:
        for name, frame in sheets.items():
            frame.write_excel(book, worksheet=name)
    return target.getvalue()


def test_the_first_sheet_of_a_workbook_is_a_table_with_types(api: Api, flowers: pl.DataFrame) -> None:
    days = [date(2026, 1, 1 + number % 28) for number in range(flowers.height)]
    frame = flowers.with_columns(
        day=pl.Series(days),
        at=pl.Series([NOON] * flowers.height),
        mixed=pl.Series(["x" if number < 149 else "7" for number in range(150)]),
        fresh=pl.Series([number % 2 == 0 for number in range(150)]),
    )
    expected = pl.read_parquet(api.result(api.run(encoded(flowers, "parquet"), "iris")).content)
    sent = workbook(Data=frame, Other=pl.DataFrame({"q": [1]}))
    for body in (sent, zipped({"flowers.xlsx": sent}), gzip.compress(sent)):
        job = api.run(body, "iris")
        assert (job["input"]["format"], job["rows"]["ok"]) == ("parquet", 150)
        result = pl.read_parquet(api.result(job).content)
        assert result["prediction"].to_list() == expected["prediction"].to_list()
        assert result["flower"].to_list() == flowers["flower"].to_list()
        assert (result["day"].to_list(), result["mixed"].to_list()) == (days, frame["mixed"].to_list())
        assert result["fresh"].to_list() == frame["fresh"].to_list()
        assert result["at"][0] == NOON
    few = workbook(Data=flowers[:90])
    assert len(ok(api.http.post(PREDICT, content=few))["prediction"]) == 90


def test_a_sheet_is_chosen_by_its_name(api: Api, flowers: pl.DataFrame) -> None:
    sent = workbook(Notes=pl.DataFrame({"q": [1]}), Data=flowers)
    assert api.run(sent, "iris", sheet="Data")["rows"]["ok"] == 150
    with api.unchanged():
        refused = problem(api.http.post("/v1/upload?sheet=data", content=sent), 422, "invalid-input")
        assert "no sheet 'data'; it has 'Notes', 'Data'" in refused["detail"]
        problem(api.http.post("/v1/predict?model=iris", content=sent), 422, "schema-mismatch")


def test_a_cell_of_another_type_far_below_loses_no_value(api: Api, flowers: pl.DataFrame) -> None:
    """By the first thousand rows alone, the column would be one of numbers, and the last cell empty."""
    many = pl.concat([flowers] * 8)
    target = io.BytesIO()
    with xlsxwriter.Workbook(target) as book:
        sheet = book.add_worksheet()
        for column, name in enumerate([*flowers.columns, "note"]):
            sheet.write(0, column, name)
        for row, values in enumerate(many.iter_rows(), 1):
            sheet.write_row(row, 0, [*values, "late" if row == many.height else row])
    result = pl.read_parquet(api.result(api.run(target.getvalue(), "iris")).content)
    assert result["note"].to_list() == [*map(str, range(1, many.height)), "late"]


@pytest.mark.parametrize("others", [[], [1], ["x"], ["x", 1.5], ["True"]])
def test_truth_values_in_a_workbook_are_numbers_whatever_is_beside_them(
    api: Api, flowers: pl.DataFrame, others: list[Any]
) -> None:
    cells, first = [True, False, *others], flowers.row(0, named=True)
    target = io.BytesIO()
    with xlsxwriter.Workbook(target) as book:
        sheet = book.add_worksheet()
        sheet.write_row(0, 0, flowers.columns)
        for row, cell in enumerate(cells, 1):
            sheet.write_row(row, 0, [*(first | {"sepal width (cm)": cell}).values()])
    job = api.run(target.getvalue(), "iris")
    wrong = [row for row, cell in enumerate(cells) if cell == "x"]
    assert job["rows"]["failed"] == len(wrong)
    assert [(error["record"], error["code"]) for error in api.errors(job)] == [(row, "wrong-type") for row in wrong]


def test_a_whole_number_in_a_workbook_that_may_have_lost_digits_is_none_as_in_any_float(api: Api) -> None:
    graph = """<ir_version: 8, opset_import: ["" : 17]>
        g (int64[N] code, int64[N] other) => (int64[N] sum) { sum = Add (code, other) }"""
    api.register("codes", onnx.parser.parse_model(graph).SerializeToString())
    exact = 2**53 - 1
    for far in (2**53, 2**54 + 4, -(2**54), 2**63, 2**70):
        codes = [exact, far, 5, -exact]
        book = workbook(Data=pl.DataFrame({"code": list(map(float, codes)), "other": [0, 1, 2, 3]}))
        job = api.run(book, "codes", format="jsonl")
        assert job["state"] == "completed"
        (error,) = api.errors(job)
        assert (error["record"], error["column"], error["code"]) == (1, "code", "wrong-type")
        results = [orjson.loads(line)["sum"] for line in api.result(job).content.splitlines()]
        assert results == [exact, None, 7, 3 - exact]
    target = io.BytesIO()
    with xlsxwriter.Workbook(target) as book:
        sheet = book.add_worksheet()
        for row, cell in enumerate(["code", 2**54 + 4, "x", str(2**54 + 1), exact, True, 7]):
            sheet.write(row, 0, cell)
    mixed = read_workbook(target.getvalue(), None)["code"].to_list()
    assert mixed == ["1.801439850948199e+16", "x", str(2**54 + 1), str(exact), "true", "7"]
    whole = read_workbook(workbook(Data=pl.DataFrame({"code": [1.0, None, float(exact)], "n": [1] * 3})), None)
    assert whole["code"].to_list() == [1, None, exact]
    assert whole["code"].dtype == pl.Int64()


def test_an_index_in_a_workbook_passes_through_under_the_name_that_pandas_gives_it(
    api: Api, flowers: pl.DataFrame
) -> None:
    target = io.BytesIO()
    with xlsxwriter.Workbook(target) as book:
        sheet = book.add_worksheet()
        sheet.write_row(0, 1, flowers.columns)
        for row, values in enumerate(flowers.iter_rows()):
            sheet.write_row(row + 1, 0, [row, *values])
    result = pl.read_parquet(api.result(api.run(target.getvalue(), "iris")).content)
    assert result["Unnamed: 0"].to_list() == list(range(flowers.height))


def test_a_workbook_whose_first_row_names_no_columns_is_refused(api: Api) -> None:
    for cells, message in ((["a", "a"], "names columns more than once: 'a'"), (["a", "", "b"], "no name for column 2")):
        target = io.BytesIO()
        with xlsxwriter.Workbook(target) as book:
            sheet = book.add_worksheet()
            sheet.write_row(0, 0, cells)
            sheet.write_row(1, 0, [1, 2, 3])
        refused = problem(api.http.post("/v1/upload", content=target.getvalue()), 422, "invalid-input")
        assert message in refused["detail"]


def test_a_server_without_the_extra_names_a_workbook_for_what_it_is(
    monkeypatch: pytest.MonkeyPatch, flowers: pl.DataFrame
) -> None:
    monkeypatch.setattr("batchserve.formats.excel.find_spec", lambda _: None)
    with pytest.raises(UnsupportedMedia, match=r"Excel workbook.*save it as CSV, or install batchserve\[excel\]"):
        read_workbook(workbook(Data=flowers), None)


def test_packed_tables_are_submitted_directly(tmp_path: Path, iris_onnx: Path, flowers: pl.DataFrame) -> None:
    (tmp_path / "a.zip").write_bytes(zipped({"a.csv": encoded(flowers, "csv")}))
    (tmp_path / "a.xlsx").write_bytes(workbook(Notes=pl.DataFrame({"q": [1]}), Data=flowers))
    with running(tmp_path / "site") as api, Direct.open(api.settings) as direct:
        model = direct.register("iris", iris_onnx)
        for name in ("a.zip", "a.xlsx"):
            job = api.finished(direct.submit(tmp_path / name, model, read=ReadOptions(sheet="Data")))
            assert (job["rows"]["ok"], job["input"]["filename"]) == (150, name)
        assert len([key for key in api.stored() if key.startswith("inputs/")]) == 2


def _in_two_calls(api: Api, data: bytes, passthrough: str = "unused", **query: Any) -> dict[str, Any]:
    uploaded = api.upload(data, **query)
    url = f"/v1/predict/{uploaded['id']}?model=iris&passthrough={passthrough}&reuse=false"
    job: dict[str, Any] = ok(api.http.post(url, headers={"prefer": "wait=30"}))
    return job
