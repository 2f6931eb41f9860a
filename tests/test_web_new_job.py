"""From a dropped file to a job: its fit with models, its first predictions, its options, and its start."""

import io
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import polars as pl
import pytest
from pages import shown, text_of
from PIL import Image
from service import Api, encoded, running

CSV = "sepal length (cm),sepal width (cm),petal length (cm),petal width (cm)\n5.1,3.5,1.4,0.2\n6.7,3.1,4.7,1.5\n"
PEOPLE = "age,city,visits\n31,Bern,4\n,Biel,9\n45,Genf,2\n"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, iris_onnx: Path, people_onnx: bytes) -> Iterator[Api]:
    """A service with the models iris and people, and a worker."""
    with running(tmp_path_factory.mktemp("models")) as api:
        api.register("iris", iris_onnx)
        api.register("people", people_onnx)
        yield api


def dropped(api: Api, content: bytes | str, name: str = "flowers.csv") -> str:
    """The address of the job of a new file."""
    answer = api.http.post("/upload", files={"file": (name, content)}, follow_redirects=False)
    assert answer.status_code == 303, answer.text
    address: str = answer.headers["location"]
    return address


def model_of(text: str, **metadata: str) -> bytes:
    graph = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["": 17]> {text}')
    for name, value in metadata.items():
        entry = graph.metadata_props.add()
        entry.key, entry.value = name.replace("_", "."), value
    return bytes(graph.SerializeToString())


def row(page: str, name: str) -> str:
    """The row of the table of a model's columns."""
    found = re.search(rf'<th scope="row">{re.escape(name)}</th>(.*?)</tr>', page)
    assert found is not None, page
    return found[1]


# --- what a file is --------------------------------------------------------------------------------------------------


def test_a_file_shows_its_type_its_size_and_its_first_rows_where_there_is_no_model(own_api: Api) -> None:
    page = shown(own_api, dropped(own_api, CSV))
    assert "<dd>csv <small>text/csv</small></dd>" in page
    assert f"<dd>{len(CSV)} bytes</dd>" in page
    assert '<th scope="col">petal width (cm)</th>' in page
    assert "<td>6.7</td><td>3.1</td>" in page
    assert "No model is registered yet" in page
    assert ">Start</button>" not in page


def test_a_file_that_cannot_be_read_says_so(models: Api) -> None:
    page = shown(models, dropped(models, b'{"a": 1}\n{"a": \n', "broken.jsonl"), model="people@1")
    assert 'class="problem" role="alert"' in page
    assert ">Start</button>" not in page


def test_arrays_show_their_types_and_shapes(models: Api) -> None:
    file = io.BytesIO()
    np.savez(file, input=np.ones((3, 4), np.float32))
    page = shown(models, dropped(models, file.getvalue(), "flowers.npz"))
    assert "<b>input</b> float32 [3, 4]" in page
    assert "The input fits iris@1." in page


def test_a_script_learns_where_the_job_is_instead_of_reading_its_page(models: Api) -> None:
    files = {"file": ("flowers.csv", CSV)}
    answer = models.http.post("/upload?model=iris", files=files, headers={"hx-request": "true"})
    assert answer.status_code == 204
    assert re.fullmatch(r"/jobs/[0-9a-f-]{36}\?model=iris", answer.headers["hx-redirect"])
    assert "The input fits iris@1." in shown(models, answer.headers["hx-redirect"].partition("?")[0], model="iris")


def test_a_file_for_a_model_is_compared_with_it(models: Api) -> None:
    form = re.search(r'action="(/upload[^"]*)"', models.http.get("/?model=people@1").text)
    assert form is not None
    answer = models.http.post(form[1].replace("&amp;", "&"), files={"file": ("flowers.csv", CSV)})
    assert "it lacks &#39;age&#39;" in answer.text


def test_a_folder_of_files_and_the_empty_field_beside_it_are_one_input(models: Api) -> None:
    files = [
        ("file", ("", b"")),
        ("file", ("photos/a.png", b"\x89PNG\r\n\x1a\n")),
        ("file", ("photos/b.png", b"\x89PNG\r\n\x1a\n")),
    ]
    page = text_of(models.http.post("/upload", files=files).text)
    assert "<td>photos/a.png</td>" in page
    assert "<td>photos/b.png</td>" in page
    nothing = models.http.post("/upload", files={"file": ("", b"")})
    assert nothing.status_code == 422
    assert "needs one file or more" in nothing.text


# --- the fit ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("content", "name"), [(CSV, "iris@1"), (PEOPLE, "people@1")])
def test_the_only_model_that_fits_is_chosen(models: Api, content: str, name: str) -> None:
    page = shown(models, dropped(models, content))
    assert f'<option value="{name}" selected>{name} - fits</option>' in page
    assert page.count("does not fit") == 1
    assert f"The input fits {name}." in page


def test_nothing_is_chosen_where_several_models_fit_as_well(own_api: Api, iris_onnx: Path) -> None:
    own_api.register("first", iris_onnx)
    own_api.register("second", iris_onnx)
    page = shown(own_api, dropped(own_api, CSV))
    assert '<option value="">Choose a model</option>' in page
    assert page.count(" - fits") == 2
    assert "First predictions" not in page


def test_missing_and_extra_columns_and_those_of_the_wrong_type_are_shown_at_once(models: Api) -> None:
    page = shown(models, dropped(models, "age,town,visits\nold,Bern,3\nolder,Biel,4\n"), model="people")
    assert "wrong type" in row(page, "age")
    assert "expected float" in row(page, "age")
    assert "missing" in row(page, "city")
    assert "found" in row(page, "visits")
    assert "The model does not take: town." in page
    assert "First predictions" not in page
    assert ">Start</button>" not in page


def test_a_column_of_another_name_fills_one_that_is_missing_once_it_is_chosen(models: Api) -> None:
    address = dropped(models, PEOPLE.replace("city", "town"))
    assert "<option>town</option>" in row(shown(models, address, model="people"), "city")
    page = shown(models, address, **{"model": "people", "column.city": "town"})
    assert "The input fits people@1." in page
    assert "<option selected>town</option>" in row(page, "city")


def test_a_model_that_is_not_there_is_told_on_the_page(models: Api) -> None:
    page = shown(models, dropped(models, CSV), model="iris@7")
    assert "no model &#39;iris@7&#39;; iris has version 1" in page
    assert "iris@1 - fits" in page


def test_a_change_of_the_model_gives_the_form_alone_and_its_address(models: Api) -> None:
    address = dropped(models, CSV)
    answer = models.http.get(f"{address}/fit", params={"model": "people@1", "key": ""})
    assert answer.status_code == 200
    assert "<html" not in answer.text
    assert "it lacks" in answer.text
    assert answer.headers["hx-replace-url"] == f"{address}?model=people%401"


def test_a_page_of_a_job_that_was_started_elsewhere_leads_to_the_job(models: Api) -> None:
    address = dropped(models, CSV)
    models.http.post(f"{address}/predict", data={"model": "iris@1"})
    answer = models.http.get(f"{address}/fit", headers={"hx-request": "true"})
    assert (answer.status_code, answer.headers["hx-redirect"]) == (204, address)


def test_an_input_whose_bytes_are_lost_is_told_on_its_page(own_api: Api, iris_onnx: Path) -> None:
    own_api.register("iris", iris_onnx)
    address = dropped(own_api, CSV + "1,2,3,4\n" * 50_000)
    for path in (Path(own_api.settings.storage) / "inputs").rglob("*"):
        if path.is_file():
            path.unlink()
    assert "the stored input cannot be read: No such file or directory" in shown(own_api, address)


def test_markup_in_names_and_values_is_text(models: Api) -> None:
    page = shown(models, dropped(models, "<b>,age\n<script>alert(1)</script>,3\n"), model="people")
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "<script>alert" not in page
    assert "<b>" not in page


# --- the dry run -----------------------------------------------------------------------------------------------------


def test_the_first_ten_predictions_are_those_of_the_job(models: Api, flowers: pl.DataFrame) -> None:
    address = dropped(models, encoded(flowers, "parquet"), "flowers.parquet")
    page = shown(models, address)
    assert page.count("<td>setosa</td>") == 10
    job = models.run(encoded(flowers[:1], "csv"), "iris")
    first = models.result(job).text.splitlines()[1].split(",")
    assert f"<td>{float(first[2]):.6g}</td>" in page
    assert "<dt>Records</dt><dd>150</dd>" in page
    assert "<dt>Time in the model</dt><dd>less than 0.1 s</dd>" in page


@pytest.mark.parametrize("format", ["csv", "jsonl", "json", "parquet", "arrow"])
def test_the_estimates_are_near_what_the_job_gives(models: Api, flowers: pl.DataFrame, format: str) -> None:
    numbers = np.random.default_rng(1).normal(5, 1, (15_000, 4)).round(2)
    many = pl.DataFrame(numbers, flowers.columns[1:]).with_row_index("flower")
    content = encoded(many, format)
    page = shown(models, dropped(models, content, f"flowers.{format}"))
    records = re.search(r"<dt>Records</dt><dd>about ([\d,]+)</dd>", page)
    size = re.search(r"<dt>Result</dt><dd>about ([\d.]+) (kB|MB)</dd>", page)
    assert records is not None, page
    assert size is not None, page
    assert int(records[1].replace(",", "")) == pytest.approx(15_000, rel=0.1)
    result = models.result(models.run(content, "iris"))
    estimate = float(size[1]) * {"kB": 1e3, "MB": 1e6}[size[2]]
    assert estimate == pytest.approx(len(result.content), rel=0.3 if format == "parquet" else 0.1)


def test_records_that_cannot_be_scored_are_shown_with_the_reason(models: Api) -> None:
    page = shown(models, dropped(models, PEOPLE + "50,Bern,many\n"))
    assert "visits: expected float32, got &#39;many&#39;" in page
    assert "Of the first 4 records, 1 cannot be scored." in page
    assert ">Start</button>" in page


def test_images_are_shown_by_name_and_scored(own_api: Api) -> None:
    own_api.register(
        "hues",
        model_of(
            "g (float[N, 3, 4, 4] image) => (float[N, 3] hue) {"
            "hue = ReduceMean <axes = [2, 3], keepdims = 0> (image) }",
            batchserve_image='{"resize": "stretch", "size": [4, 4]}',
        ),
    )
    file = io.BytesIO()
    Image.fromarray(np.full((9, 7, 3), (10, 20, 30), np.uint8)).save(file, "PNG")
    files = [("file", ("one.png", file.getvalue())), ("file", ("folder/two.png", b"\x89PNG\r\n\x1a\n but no image"))]
    answer = own_api.http.post("/upload", files=files, follow_redirects=False)
    page = shown(own_api, answer.headers["location"])
    assert "<dd>zip <small>application/zip</small></dd>" in page
    assert "<td>folder/two.png</td>" in page
    assert "<td>10</td><td>20</td><td>30</td>" in page
    assert "Of the first 2 records, 1 cannot be scored." in page


def test_a_value_that_all_records_share_has_a_field(own_api: Api) -> None:
    own_api.register("scaled", model_of("g (float[N] x, float factor) => (float[N] y) { y = Mul(x, factor) }"))
    address = dropped(own_api, "x\n1.5\n2\n")
    assert 'name="input.factor" type="text" value=""' in shown(own_api, address)
    page = shown(own_api, address, **{"input.factor": "4"})
    assert "<td>6</td>" in page
    assert "<td>8</td>" in page


# --- the start -------------------------------------------------------------------------------------------------------


def test_start_queues_the_job_with_the_options_of_the_form(models: Api) -> None:
    address = dropped(models, "flower," + CSV.replace("\n5.1", "\n1,5.1").replace("\n6.7", "\n2,6.7"))
    fields = {
        "model": "iris@1", "format": "jsonl", "passthrough": "none", "key": "flower", "top_k": "1",
        "on_row_error": "fail", "max_errors": "",
    }  # fmt: skip
    answer = models.http.post(f"{address}/predict", data=fields, follow_redirects=False)
    assert (answer.status_code, answer.headers["location"]) == (303, address)
    job = models.finished(address.removeprefix("/jobs/"))
    assert job["state"] == "completed"
    assert job["options"]["on_row_error"] == "fail"
    assert [sorted(pl.read_ndjson(io.BytesIO(models.result(job).content)).columns)] == [
        ["flower", "label_1", "prediction", "probability_1"]
    ]


def test_the_options_of_the_form_are_those_of_the_api_by_default(models: Api) -> None:
    address = dropped(models, CSV)
    page = models.http.get(address).text
    fields = dict(re.findall(r'<input id="\w+" name="(\w+)"[^>]*? value="([^"]*)"', page))
    fields |= {"model": "iris@1", "format": "csv", "on_row_error": "continue"}
    models.http.post(f"{address}/predict", data=fields)
    job = models.finished(address.removeprefix("/jobs/"))
    plain = models.run(CSV, "iris")
    assert job["options"] == plain["options"]


def test_a_job_starts_with_the_columns_that_were_chosen(models: Api) -> None:
    address = dropped(models, PEOPLE.replace("city", "town"))
    models.http.post(f"{address}/predict", data={"model": "people@1", "column.city": "town"})
    assert models.finished(address.removeprefix("/jobs/"))["rows"]["ok"] == 3


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"model": "people@1"}, "it lacks &#39;age&#39;, &#39;city&#39;"),
        ({"model": "iris@1", "top_k": "9"}, "the model has 3 classes, got 9"),
        ({"model": "iris@1", "max_errors": "-1"}, "max_errors"),
        ({"model": "iris@1", "key": "flower"}, "no column &#39;flower&#39;"),
        ({"model": "gone@1"}, "no model &#39;gone@1&#39;"),
        ({}, "model: must be given"),
    ],
)
def test_what_cannot_be_started_is_told_with_the_form(models: Api, fields: dict[str, str], told: str) -> None:
    address = dropped(models, CSV)
    answer = models.http.post(f"{address}/predict", data=fields)
    assert 400 <= answer.status_code < 500
    assert "was not started" in answer.text
    assert told in answer.text
    assert '<select id="model" name="model">' in answer.text
    assert models.job(address.removeprefix("/jobs/"))["state"] == "uploaded"
