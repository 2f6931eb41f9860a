"""The page of a job, as a browser without scripts, or htmx, asks for it."""

import base64
import html
import io
import json
import os
import re
import subprocess
import sys
import time
import uuid
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pandas as pd
import polars as pl
import pytest
from commands import clean_environment
from onnx import parser
from pages import HTMX, part_of, shown
from PIL import Image
from service import Api, decoded, encoded, ok, running
from sklearn.ensemble import IsolationForest
from sklearn.tree import DecisionTreeClassifier

import batchserve
from batchserve import keys, registry
from batchserve.access import Scope
from batchserve.conversion import convert
from batchserve.domain import Options, StoredInput
from batchserve.storage import input_key
from batchserve.submission import Queueing, Submission, create

COLUMNS = "sepal length (cm),sepal width (cm),petal length (cm),petal width (cm)"


def cells(page: str) -> list[list[str]]:
    """The texts of the rows of the first table, without markup."""
    table = page[page.index("<tbody>") : page.index("</tbody>")]
    rows = re.findall(r"<tr>(.*?)</tr>", table, re.DOTALL)
    return [
        [html.unescape(re.sub(r"<[^>]+>", "", cell)).strip() for cell in re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row)]
        for row in rows
    ]


@pytest.fixture(scope="module")
def scored(api: Api, flowers: pl.DataFrame) -> dict[str, Any]:
    """A completed job of 150 flowers in two chunks."""
    return api.run(encoded(flowers, "csv"), "iris", filename="flowers.csv")


# --- the page --------------------------------------------------------------------------------------------------------


def test_the_page_has_states_attempts_downloads_and_the_manifest(api: Api, scored: dict[str, Any]) -> None:
    page = shown(api, f"/jobs/{scored['id']}")
    assert "<h1>flowers.csv</h1>" in page
    for part in ("Uploaded <time", "Queued <time", "Attempt 1 <time", "Completed <time", "iris@1", "150 of 150"):
        assert part in page, part
    for format in ("csv", "jsonl", "json", "parquet", "arrow", "arrows"):
        assert f"Result as {format}<" in page, format
    assert "Result as npz" not in page
    assert scored["input"]["sha256"] in page
    assert scored["result"]["sha256"] in page
    assert "sse-connect" not in page


def test_no_markup_runs_a_script_or_has_a_style_of_its_own(api: Api, scored: dict[str, Any]) -> None:
    for path in ("", "/records", "/failed", "/plots", "/delete"):
        page = shown(api, f"/jobs/{scored['id']}{path}")
        assert not re.search(r"<script(?! src)|<style|\sstyle=|\son\w+=", page), path


@pytest.mark.parametrize("path", ["", "/records", "/failed", "/plots", "/status", "/live", "/delete", "/result",
                                  "/errors.csv", "/input", "/manifest.json", "/image/0"])  # fmt: skip
def test_a_job_that_does_not_exist_is_not_found(api: Api, path: str) -> None:
    assert "no job &#39;gone&#39;" in shown(api, f"/jobs/gone{path}", 404)


def test_a_part_is_alone_for_a_script_and_a_page_for_a_browser(api: Api, scored: dict[str, Any]) -> None:
    for part in ("records", "failed", "plots"):
        assert "<main" not in part_of(api, f"/jobs/{scored['id']}/{part}")
        assert f'<div id="{part}">' in shown(api, f"/jobs/{scored['id']}/{part}")


# --- records ---------------------------------------------------------------------------------------------------------


def test_records_of_input_and_result_are_side_by_side(api: Api, scored: dict[str, Any], flowers: pl.DataFrame) -> None:
    rows = cells(shown(api, f"/jobs/{scored['id']}/records"))
    result = pl.read_csv(api.result(scored).content, infer_schema=False)
    assert len(rows) == 20
    for number, (record, *values) in enumerate(rows):
        assert record == str(number)
        assert values[:5] == [str(value) for value in flowers.row(number)]
        assert values[5:] == list(result.row(number)[1:])


@pytest.mark.parametrize("format", ["csv", "jsonl", "json", "parquet", "arrow", "arrows"])
def test_pages_go_on_by_number_in_every_format_of_tables(api: Api, flowers: pl.DataFrame, format: str) -> None:
    job = api.run(encoded(flowers, format), "iris", format=format)
    predictions = pl.read_csv(api.result(job, format="csv").content)["prediction"].to_list()
    for first in (0, 95, 100, 137):
        page = part_of(api, f"/jobs/{job['id']}/records?record={first}")
        rows = cells(page)
        assert [row[0] for row in rows] == [str(number) for number in range(first, min(first + 20, 150))]
        assert [float(row[2]) for row in rows] == flowers["sepal length (cm)"].to_list()[first : first + 20]
        assert [row[6] for row in rows] == predictions[first : first + 20]
        assert (">Next<" in page) == (first + 20 < 150)
        assert (">Previous<" in page) == (first > 0)


def test_beyond_the_last_record_there_is_none(api: Api, scored: dict[str, Any]) -> None:
    assert "There is no record 150." in shown(api, f"/jobs/{scored['id']}/records?record=150")


@pytest.mark.parametrize("record", ["-1", "x", "1e3", "9" * 5000, "٣"])
def test_a_record_that_is_no_number_is_refused(api: Api, scored: dict[str, Any], record: str) -> None:
    for path in (f"?record={record}", f"/records?record={record}", f"/image/{record}"):
        assert "record: expected a number" in shown(api, f"/jobs/{scored['id']}{path}", 400)


def test_the_address_of_the_page_names_the_first_record(api: Api, scored: dict[str, Any]) -> None:
    answer = api.http.get(f"/jobs/{scored['id']}/records?record=40", headers=HTMX)
    assert answer.headers["hx-replace-url"] == f"/jobs/{scored['id']}?record=40"
    assert f"/jobs/{scored['id']}/records?record=40" in shown(api, f"/jobs/{scored['id']}?record=40")


def test_records_of_an_upload_are_shown_before_it_is_scored(api: Api, flowers: pl.DataFrame) -> None:
    job = api.upload(encoded(flowers, "csv"))
    rows = cells(shown(api, f"/jobs/{job['id']}/records?record=30"))
    assert rows[0] == ["30", *(str(value) for value in flowers.row(30))]


def test_long_values_and_many_columns_are_cut(api: Api) -> None:
    header = ",".join(f"c{index}" for index in range(70))
    values = ",".join(["x" * 1000, *map(str, range(69))])
    job = api.upload(f"{header}\n{values}\n")
    page = shown(api, f"/jobs/{job['id']}/records")
    assert len(cells(page)[0]) == 51
    assert "20 more columns of the input are not shown." in page
    assert "x" * 199 + "…" in page
    assert "x" * 200 not in page


def test_markup_in_a_value_is_text(api: Api) -> None:
    job = api.upload("name\n<script>alert(1)</script>\n", filename="<b>.csv")
    page = shown(api, f"/jobs/{job['id']}/records")
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "<b>.csv" not in page


def test_arrays_are_shown_with_a_column_for_each_of_a_few_values(api: Api, flowers: pl.DataFrame) -> None:
    measures = flowers.drop("flower")
    job = api.run(encoded(measures, "npz"), "iris", columns="input", format="npz")
    assert job["state"] == "completed", job["error"]
    page = shown(api, f"/jobs/{job['id']}/records?record=7")
    assert "input[0]" in page
    rows = cells(page)
    assert rows[0][0] == "7"
    assert float(rows[0][1]) == pytest.approx(measures.row(7)[0])


def test_records_of_several_inputs_count_over_all_of_them(
    tmp_path: Path, iris_onnx: Path, flowers: pl.DataFrame
) -> None:
    with running(tmp_path, chunk_records=30) as api:
        api.register("iris", iris_onnx)
        runtime = api.http.app.state.service.runtime  # type: ignore[attr-defined]
        stored = []
        for number, frame in enumerate((flowers[:70], flowers[70:])):
            key = input_key(str(uuid.uuid4()))
            with runtime.storage.create(key) as writer:
                writer.write(encoded(frame, "csv"))
                written = writer.commit()
            stored.append(StoredInput(key, "csv", bytes=written.bytes, filename=f"part-{number}.csv"))
        with runtime.database.write() as connection:
            model = registry.resolve(connection, "iris")
            new = Submission("default", str(uuid.uuid4()), tuple(stored), model, Options("csv"), Queueing())
            create(connection, new, runtime.database.moment(connection).wall)
        job = api.finished(new.job_id)
        assert job["rows"] == {"total": 150, "ok": 150, "failed": 0}
        predictions = pl.read_csv(api.result(job).content)["prediction"].to_list()
        for first, count in ((0, 20), (60, 10), (70, 20), (95, 20), (140, 10)):
            rows = cells(shown(api, f"/jobs/{job['id']}/records?record={first}"))
            assert [row[1] for row in rows] == [str(flower) for flower in range(first, first + count)]
            assert [row[6] for row in rows] == predictions[first : first + count]


def test_an_input_without_records_says_so(api: Api) -> None:
    job = api.run(f"{COLUMNS}\n", "iris")
    assert job["state"] == "completed"
    assert "There are no records." in shown(api, f"/jobs/{job['id']}/records")
    page = shown(api, f"/jobs/{job['id']}")
    assert "Plots" not in page
    assert "There is nothing to plot." in shown(api, f"/jobs/{job['id']}/plots")


def test_an_input_that_cannot_be_read_is_told(api: Api) -> None:
    job = api.upload(b"PAR1 and no more")
    page = part_of(api, f"/jobs/{job['id']}/records")
    assert 'role="alert"' in page


# --- failed records --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def failing(api: Api) -> dict[str, Any]:
    """A job with three reasons of failure."""
    rows = ["5.1,3.5,1.4,0.2"] * 300
    for record in range(10, 40, 2):
        rows[record] = "long,3.5,1.4,0.2"
    rows[250], rows[251] = ",3.5,1.4,0.2", "5.1,3.5,1.4,wide"
    return api.run("\n".join([COLUMNS, *rows, ""]), "iris", filename="gaps.csv")


def test_failed_records_are_grouped_by_reason_with_their_values(api: Api, failing: dict[str, Any]) -> None:
    page = shown(api, f"/jobs/{failing['id']}/failed")
    found = re.findall(r"<h3>(\d+) with <code>([\w-]+)</code> in ([^<]*)</h3>", page)
    assert found[0] == ("15", "wrong-type", "sepal length (cm)")
    assert {(count, column) for count, _, column in found[1:]} == {
        ("1", "sepal length (cm)"),
        ("1", "petal width (cm)"),
    }
    assert [(row[0], row[1]) for row in cells(page)] == [("10", "long"), ("12", "long"), ("14", "long")]
    assert "<code>wide</code>" in page


def test_failed_records_of_arrays_have_a_reason_and_no_value(api: Api, flowers: pl.DataFrame) -> None:
    matrix = flowers.drop("flower").to_numpy().astype(np.float32)
    matrix[3, 1] = np.nan
    body = io.BytesIO()
    np.save(body, matrix)
    job = api.run(body.getvalue(), "iris", format="csv")
    assert job["rows"]["failed"] == 1, job
    page = shown(api, f"/jobs/{job['id']}/failed")
    assert cells(page)[0][0] == "3"
    assert ">Value<" not in page
    assert cells(shown(api, f"/jobs/{job['id']}/records"))[3][2] == "nan"


def test_only_the_failed_records_are_scored_again(api: Api, failing: dict[str, Any]) -> None:
    page = shown(api, f"/jobs/{failing['id']}")
    assert "Score only these 17 again" in page
    answer = api.http.post(f"/jobs/{failing['id']}/retry", data={"rows": "failed"}, follow_redirects=False)
    assert answer.status_code == 303
    new = answer.headers["location"].removeprefix("/jobs/")
    assert new != failing["id"]
    again = api.finished(new)
    assert (again["state"], again["rows"]["failed"]) == ("completed", 17)
    assert "wrong-type" in shown(api, f"/jobs/{new}/failed")


def test_the_failed_records_are_downloaded_as_a_table_or_lines(api: Api, failing: dict[str, Any]) -> None:
    table = api.http.get(f"/jobs/{failing['id']}/errors.csv")
    assert len(table.text.splitlines()) == 18
    lines = api.http.get(f"/jobs/{failing['id']}/errors.jsonl")
    assert lines.content == api.http.get(f"/v1/download/{failing['id']}/errors").content


def test_a_job_that_failed_says_why_and_is_tried_again(api: Api) -> None:
    job = api.run(f"{COLUMNS}\n5.1,3.5,1.4,0.2\nlong,3.5,1.4,0.2\n", "iris", on_row_error="fail")
    assert job["state"] == "failed"
    page = shown(api, f"/jobs/{job['id']}")
    assert job["error"]["message"] in html.unescape(page)
    assert "Retry the unfinished rows" in page
    assert "long" in shown(api, f"/jobs/{job['id']}/records")
    answer = api.http.post(f"/jobs/{job['id']}/retry", data={"rows": "unfinished"}, follow_redirects=False)
    assert answer.headers["location"] == f"/jobs/{job['id']}"
    assert api.finished(job["id"])["attempt"] == job["attempt"] + 1


@pytest.mark.parametrize("rows", ["", "all"])
def test_a_retry_of_other_rows_is_refused(api: Api, failing: dict[str, Any], rows: str) -> None:
    answer = api.http.post(f"/jobs/{failing['id']}/retry", data={"rows": rows})
    assert answer.status_code == 400
    assert "rows: expected unfinished or failed" in answer.text


# --- plots -----------------------------------------------------------------------------------------------------------


def test_classes_and_the_probability_of_the_predicted_one_are_plotted(api: Api, scored: dict[str, Any]) -> None:
    page = shown(api, f"/jobs/{scored['id']}/plots")
    result = pl.read_csv(api.result(scored).content)
    for name, count in result["prediction"].value_counts().iter_rows():
        assert f"<title>{name}: {count} (" in page, name
    assert "All 150 records." in page
    assert "Distribution: probability" in page
    probability = result.select(pl.max_horizontal("^probability_.*$")).to_series().to_numpy()
    assert f"Mean {np.mean(probability):.4g}." in page
    bins = [int(count) for count in re.findall(r"<title>[\d.]+ to [\d.]+: (\d+)</title>", page)]
    assert bins == np.histogram(probability, 24, (0.0, 1.0))[0].tolist()
    assert "Speed of the model" in page


@pytest.mark.parametrize("format", ["csv", "jsonl", "parquet", "npy", "npz"])
def test_the_numbers_of_a_regression_are_plotted(api: Api, flowers: pl.DataFrame, format: str) -> None:
    job = api.run(encoded(flowers.drop("flower"), "csv"), "petals", format=format, passthrough="none")
    assert job["state"] == "completed", job
    page = shown(api, f"/jobs/{job['id']}/plots")
    assert "Distribution: prediction" in page
    assert sum(int(count) for count in re.findall(r"<title>[^<]* to [^<]*: (\d+)</title>", page)) == 150


def test_ranked_classes_are_plotted_by_the_first(api: Api, flowers: pl.DataFrame) -> None:
    job = api.run(encoded(flowers, "csv"), "iris", top_k=2)
    page = shown(api, f"/jobs/{job['id']}/plots")
    assert "Classes: label_1" in page
    assert "Distribution: probability_1" in page


@pytest.fixture(scope="module")
def kinds(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    """A service with a model of 70 classes, one of two targets, one of outliers, and a network without a label."""
    numbers = pd.DataFrame(np.random.default_rng(0).normal(size=(280, 3)).astype(np.float32), columns=list("abc"))
    targets = pd.DataFrame({"u": np.where(numbers.a > 0, "x", "y"), "v": np.where(numbers.b > 0, "p", "q")})
    models = {
        "many": DecisionTreeClassifier(random_state=0).fit(numbers, np.arange(280) % 70),
        "several": DecisionTreeClassifier(max_depth=2, random_state=0).fit(numbers, targets),
        "outliers": IsolationForest(n_estimators=5, random_state=0).fit(numbers),
    }
    network = parser.parse_model(
        '<ir_version: 8, opset_import: ["" : 17]> g (float[N,3] x) => (float[N,3] y) { y = Softmax(x) }'
    )
    with running(tmp_path_factory.mktemp("kinds")) as api:
        for name, model in models.items():
            api.register(name, convert(model, numbers).onnx)
        api.register("network", network.SerializeToString())
        yield api


@pytest.mark.parametrize("format", ["csv", "jsonl", "parquet", "npz"])
@pytest.mark.parametrize(
    ("model", "titles"),
    [
        ("many", ["Classes: prediction", "Distribution: probability"]),
        ("several", ["Classes: prediction_1", "Classes: prediction_2",
                     "Distribution: probability of 1", "Distribution: probability of 2"]),
        ("outliers", ["Classes: prediction", "Distribution: score"]),
        ("network", ["Classes: most probable class", "Distribution: probability"]),
    ],
)  # fmt: skip
def test_results_of_every_kind_are_plotted(kinds: Api, model: str, titles: list[str], format: str) -> None:
    numbers = pl.DataFrame(np.random.default_rng(1).normal(size=(90, 3)).astype(np.float32), schema=list("abc"))
    job = kinds.run(encoded(numbers, "csv"), model, format=format, passthrough="none")
    assert job["state"] == "completed", job
    page = shown(kinds, f"/jobs/{job['id']}/plots")
    assert re.findall(r"<h3>(.*?)</h3>", page) == titles
    assert "All 90 records." in page
    bins = [int(count) for count in re.findall(r"<title>[^<]* to [^<]*: (\d+)</title>", page)]
    assert sum(bins) == 90 * sum(title.startswith("Distribution") for title in titles)


def test_rows_that_failed_have_no_class(api: Api, failing: dict[str, Any]) -> None:
    page = shown(api, f"/jobs/{failing['id']}/plots")
    assert "17 records have no class." in page


def test_times_that_python_does_not_know_are_shown(api: Api, flowers: pl.DataFrame) -> None:
    far = flowers.with_columns(at=pl.lit(4_000_000, pl.Int32()).cast(pl.Date()))
    job = api.run(encoded(far, "parquet"), "iris")
    assert job["state"] == "completed", job
    assert "12921-" in shown(api, f"/jobs/{job['id']}/records")


def test_arrays_say_that_failed_rows_look_like_others(kinds: Api) -> None:
    job = kinds.run("a,b,c\n1,2,3\n1,x,3\n", "outliers", format="npz", passthrough="none")
    assert job["rows"]["failed"] == 1, job
    page = shown(kinds, f"/jobs/{job['id']}/plots")
    assert "Failed records, 1 in the job, count as 0 or empty: arrays have no missing labels." in page


def test_a_large_result_is_sampled_evenly(tmp_path: Path, petals_onnx: bytes) -> None:
    rows = 240_000
    values = pl.DataFrame({name: np.repeat([1.0, 6.0], rows // 2) for name in COLUMNS.split(",")[:3]})
    with running(tmp_path) as api:
        api.register("petals", petals_onnx)
        job = api.run(encoded(values, "parquet"), "petals", format="csv")
        page = shown(api, f"/jobs/{job['id']}/plots")
    told = re.search(r"A sample of ([\d,]+) of 240,000 records", page)
    assert told is not None
    read = int(told[1].replace(",", ""))
    assert 60_000 <= read <= 140_000
    bins = re.findall(r"<title>[^<]* to [^<]*: (\d+)</title>", page.replace(",", ""))
    counts = [int(count) for count in bins if count != "0"]
    assert len(counts) == 2
    assert sum(counts) == read
    assert abs(counts[0] - counts[1]) <= 0.4 * read


# --- images ----------------------------------------------------------------------------------------------------------

PICTURES = [Image.new("RGB", (300 + 10 * number, 150), (40 * number, 90, 200)) for number in range(4)]


def saved(image: Image.Image, kind: str = "png") -> bytes:
    target = io.BytesIO()
    image.save(target, kind)
    return target.getvalue()


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    """A service with a model of the mean colour of an image."""
    graph = parser.parse_model(
        '<ir_version: 8, opset_import: ["" : 17]> g (float[N,3,16,16] x) => (float[N,3] means) '
        "{ means = ReduceMean<axes=[2,3], keepdims=0>(x) }"
    )
    entry = graph.metadata_props.add()
    entry.key, entry.value = "batchserve.image", json.dumps({"resize": "stretch", "size": [16, 16]})
    with running(tmp_path_factory.mktemp("pictures"), chunk_records=2) as api:
        api.register("means", graph.SerializeToString())
        yield api


@pytest.fixture(scope="module")
def archive(pictures: Api) -> dict[str, Any]:
    """A job of four images, and a file that is none."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as members:
        for number, picture in enumerate(PICTURES):
            members.writestr(f"photos/{number}.png", saved(picture))
        members.writestr("notes.txt", b"hello")
    return pictures.run(content.getvalue(), "means", filename="photos.zip")


def colour(image: Image.Image) -> tuple[int, ...]:
    middle = image.getpixel((image.width // 2, image.height // 2))
    assert isinstance(middle, tuple)
    return tuple(round(channel) for channel in middle)


def test_images_of_an_archive_are_small_ones_with_their_answers(pictures: Api, archive: dict[str, Any]) -> None:
    page = shown(pictures, f"/jobs/{archive['id']}/records")
    rows = cells(page)
    assert [row[1] for row in rows] == [f"photos/{number}.png" for number in range(4)] + ["notes.txt"]
    assert float(rows[2][3]) == pytest.approx(80, abs=1)
    for number, picture in enumerate(PICTURES):
        assert f'src="/jobs/{archive["id"]}/image/{number}"' in page
        answer = pictures.http.get(f"/jobs/{archive['id']}/image/{number}")
        assert (answer.status_code, answer.headers["content-type"]) == (200, "image/jpeg")
        small = Image.open(io.BytesIO(answer.content))
        assert max(small.size) == 128
        assert small.width / small.height == pytest.approx(picture.width / picture.height, rel=0.02)
        assert np.abs(np.subtract(colour(small), colour(picture))).max() <= 4


@pytest.mark.parametrize(
    ("record", "told"), [(4, "expected a JPEG, PNG, WebP or GIF image"), (5, "there is no record 5")]
)
def test_an_image_that_is_none_is_told(pictures: Api, archive: dict[str, Any], record: int, told: str) -> None:
    assert told in shown(pictures, f"/jobs/{archive['id']}/image/{record}", 422)


def test_a_failed_image_is_named_by_its_file(pictures: Api, archive: dict[str, Any]) -> None:
    page = shown(pictures, f"/jobs/{archive['id']}/failed")
    assert cells(page)[0][:2] == ["4", "notes.txt"]


def test_images_in_tables_and_arrays_are_shown_as_well(pictures: Api) -> None:
    texts = [base64.b64encode(saved(picture)).decode() for picture in PICTURES]
    csv = pl.DataFrame({"id": range(4), "photo": texts}).write_csv().encode()
    parquet = encoded(pl.DataFrame({"id": range(4), "photo": [saved(picture) for picture in PICTURES]}), "parquet")
    pixels = io.BytesIO()
    np.save(pixels, np.stack([np.asarray(picture.resize((40, 20))) for picture in PICTURES]))
    for body, columns in ((csv, '{"image": "photo"}'), (parquet, '{"image": "photo"}'), (pixels.getvalue(), None)):
        job = pictures.run(body, "means", format="csv", **({"columns": columns} if columns else {}))
        assert job["state"] == "completed", job
        page = shown(pictures, f"/jobs/{job['id']}/records")
        assert page.count('class="thumbnail"') == 4
        answer = pictures.http.get(f"/jobs/{job['id']}/image/3")
        assert np.abs(np.subtract(colour(Image.open(io.BytesIO(answer.content))), (120, 90, 200))).max() <= 4


def test_a_job_without_images_has_none_to_show(api: Api, scored: dict[str, Any]) -> None:
    assert "the records of this input have no images" in shown(api, f"/jobs/{scored['id']}/image/0", 422)


# --- files -----------------------------------------------------------------------------------------------------------


def test_every_listed_file_is_downloaded(api: Api, scored: dict[str, Any], flowers: pl.DataFrame) -> None:
    page = shown(api, f"/jobs/{scored['id']}")
    formats = re.findall(r"/result\?format=(\w+)", page)
    assert len(formats) == 6
    for format in formats:
        answer = api.http.get(f"/jobs/{scored['id']}/result?format={format}")
        assert answer.headers["content-disposition"] == f'attachment; filename="flowers.predictions.{format}"'
        assert answer.content == api.result(scored, format=format).content
        assert decoded(answer.content, format).height == 150
    assert api.http.get(f"/jobs/{scored['id']}/input").content == encoded(flowers, "csv")


def test_a_result_that_is_not_there_is_a_page_that_says_so(api: Api, flowers: pl.DataFrame) -> None:
    job = api.upload(encoded(flowers, "csv"))
    assert "there is no result" in shown(api, f"/jobs/{job['id']}/result", 404)
    assert "Result as" not in shown(api, f"/jobs/{job['id']}")


def test_the_manifest_has_digests_versions_and_options(api: Api, scored: dict[str, Any]) -> None:
    answer = api.http.get(f"/jobs/{scored['id']}/manifest.json")
    told = answer.json()
    model = ok(api.http.get("/v1/models/iris"))
    assert told["inputs"] == [
        {
            "filename": "flowers.csv",
            "format": "csv",
            "bytes": scored["input"]["bytes"],
            "sha256": scored["input"]["sha256"],
        }
    ]
    assert told["model"] == {"name": "iris", "version": 1, "sha256": model["digest"]}
    assert told["result"] == scored["result"]
    assert told["options"] == scored["options"]
    assert told["batchserve"] == batchserve.__version__
    assert answer.headers["content-disposition"] == 'attachment; filename="flowers.manifest.json"'


# --- what changes it -------------------------------------------------------------------------------------------------


def test_a_queued_job_is_cancelled_retried_and_deleted(idle_api: Api, flowers: pl.DataFrame) -> None:
    api = idle_api
    job = api.http.post("/v1/predict?model=iris&priority=-1", content=encoded(flowers, "csv")).json()
    page = shown(api, f"/jobs/{job['id']}")
    assert "<progress" in page
    assert f'sse-connect="/jobs/{job["id"]}/live?state=queued"' in page
    assert "Cancel" in shown(api, f"/jobs/{job['id']}/status")
    api.http.post(f"/jobs/{job['id']}/cancel")
    assert api.job(job["id"])["state"] == "cancelled"
    api.http.post(f"/jobs/{job['id']}/retry", data={"rows": "unfinished"})
    assert api.job(job["id"])["state"] == "queued"
    assert "This cannot be undone." in shown(api, f"/jobs/{job['id']}/delete")
    assert api.job(job["id"])["state"] == "queued"
    answer = api.http.post(f"/jobs/{job['id']}/delete", follow_redirects=False)
    assert (answer.status_code, answer.headers["location"]) == (303, "/jobs")
    assert api.http.get(f"/v1/jobs/{job['id']}").status_code == 404


def test_the_page_follows_a_job_until_it_is_in_another_state(api: Api, scored: dict[str, Any]) -> None:
    other = api.http.get(f"/jobs/{scored['id']}/live?state=running")
    assert other.headers["content-type"].startswith("text/event-stream")
    assert other.text == "event: state\ndata:\n\n"
    assert api.http.get(f"/jobs/{scored['id']}/live?state=completed").text == "event: progress\ndata:\n\n"


def test_a_running_job_tells_its_progress_and_then_its_end(tmp_path: Path, iris_onnx: Path) -> None:
    body = "\n".join([COLUMNS, *["5.1,3.5,1.4,0.2"] * 40_000, ""])
    with running(tmp_path, chunk_records=2000) as api:
        api.register("iris", iris_onnx)
        job = api.http.post("/v1/predict?model=iris&filename=many.csv", content=body).json()
        assert job["state"] == "queued"
        told = api.http.get(f"/jobs/{job['id']}/live?state=queued").text.split("\n\n")
        assert told[-2:] == ["event: state\ndata:", ""]
        running_page = shown(api, f"/jobs/{job['id']}")
        assert "many.csv" in running_page
        told = api.http.get(f"/jobs/{job['id']}/live?state=running").text.split("\n\n")
        assert told[-2:] == ["event: state\ndata:", ""]
        assert api.job(job["id"])["state"] == "completed"
        page = shown(api, f"/jobs/{job['id']}")
        assert "Completed <time" in page
        assert "sse-connect" not in page
        assert [row[0] for row in cells(shown(api, f"/jobs/{job['id']}/records?record=39980"))][-1] == "39,999"
        assert "<polyline" in shown(api, f"/jobs/{job['id']}/plots")


def test_an_expired_job_shows_what_remains(tmp_path: Path, iris_onnx: Path) -> None:
    with running(tmp_path, keep_results=0.5, sweep_age=0.2) as api:
        api.register("iris", iris_onnx)
        job = api.run(f"{COLUMNS}\n5.1,3.5,1.4,0.2\n", "iris", filename="old.csv")
        deadline = time.monotonic() + 20
        while api.job(job["id"])["state"] != "expired":
            assert time.monotonic() < deadline
            time.sleep(0.05)
        page = shown(api, f"/jobs/{job['id']}")
        assert "old.csv" in page
        assert "Expired <time" in page
        assert "Downloads" not in page
        assert "Records" not in page
        assert "There are no records." in shown(api, f"/jobs/{job['id']}/records")
        assert "There is nothing to plot." in shown(api, f"/jobs/{job['id']}/plots")
        assert "removed" in shown(api, f"/jobs/{job['id']}/image/0", 410)
        assert "removed" in shown(api, f"/jobs/{job['id']}/input", 410)


# --- the same from a program -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["flowers.csv", "-my 'new' \"$HOME\" {1} flowers;.csv"])
def test_the_commands_of_a_job_give_its_result(
    server: str, tmp_path: Path, iris_onnx: Path, flowers: pl.DataFrame, name: str
) -> None:
    body = flowers.write_csv(separator=";").encode()
    (tmp_path / name).write_bytes(body)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    with httpx2.Client(base_url=server, timeout=30) as http:
        assert http.put("/v1/models/copied", content=iris_onnx.read_bytes()).is_success
        options: dict[str, str | int] = {"model": "copied", "filename": name, "format": "jsonl", "top_k": 2}
        options |= {"passthrough": "flower", "key": "flower", "metadata": '{"for": "it\'s a \\"test\\""}'}
        answer = http.post("/v1/predict", content=body, params=options, headers={"prefer": "wait=30"})
        job = answer.json()
        assert job["state"] == "completed", job
        expected = http.get(job["links"]["result"]).content
        page = http.get(f"/jobs/{job['id']}").text
    texts = dict(re.findall(r'aria-label="(curl|Command line|Python)">(.*?)</pre>', page, re.DOTALL))
    commands = {
        "curl": ["bash", "-euc", html.unescape(texts["curl"])],
        "Command line": ["bash", "-euc", html.unescape(texts["Command line"])],
        "Python": [sys.executable, "-c", html.unescape(texts["Python"])],
    }
    for known, command in commands.items():
        target = tmp_path / f"{Path(name).stem}.predictions.jsonl"
        target.unlink(missing_ok=True)
        environment = clean_environment() | {"PATH": path}
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, (known, command, done.stderr)
        assert target.read_bytes() == expected, known


# --- keys ------------------------------------------------------------------------------------------------------------


def test_with_keys_the_page_and_its_files_are_for_their_tenant_alone(tmp_path: Path, iris_onnx: Path) -> None:
    with running(tmp_path) as api:
        api.register("iris", iris_onnx)
        own, other = with_key(api, tenant="acme"), with_key(api, tenant="umbrella")
        answer = api.http.post(
            "/v1/predict?model=iris&filename=secret.csv", content=f"{COLUMNS}\n5.1,3.5,1.4,0.2\n",
            headers={"authorization": f"Bearer {own}", "prefer": "wait=30"},
        )  # fmt: skip
        job = answer.json()
        assert job["state"] == "completed"
        paths = ["", "/records", "/failed", "/plots", "/status", "/live", "/result", "/errors.csv", "/errors.jsonl",
                 "/input", "/manifest.json", "/image/0", "/delete"]  # fmt: skip
        for path in paths:
            answer = api.http.get(f"/jobs/{job['id']}{path}", follow_redirects=False)
            assert answer.headers["location"].startswith("/sign-in"), path
        api.http.post("/sign-in", data={"key": other})
        for path in paths:
            shown(api, f"/jobs/{job['id']}{path}", 404)
        api.http.post("/sign-in", data={"key": own})
        page = shown(api, f"/jobs/{job['id']}")
        assert "Authorization: Bearer $BATCHSERVE_API_KEY" in html.unescape(page)
        assert own not in page
        assert "setosa" in api.http.get(f"/jobs/{job['id']}/result").text
        assert "5.1" in shown(api, f"/jobs/{job['id']}/records")
        assert api.http.post(f"/jobs/{job['id']}/delete").status_code == 403
        token = re.search(r"delete\?token=(\w+)", shown(api, f"/jobs/{job['id']}/delete"))
        assert token is not None
        assert api.http.post(f"/jobs/{job['id']}/delete?token={token[1]}", follow_redirects=False).status_code == 303
        shown(api, f"/jobs/{job['id']}", 404)


def with_key(api: Api, tenant: str) -> str:
    database = api.http.app.state.service.runtime.database  # type: ignore[attr-defined]
    with database.write() as connection:
        _, text = keys.create(connection, tenant, Scope.USER, tenant, 1.0)
    return text
