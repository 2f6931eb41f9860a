"""The page of a job, as a browser without scripts, or htmx, asks for it."""

import html
import re
from typing import Any

import numpy as np
import pandas as pd
import polars as pl
import pytest
from service import Api, encoded

HTMX = {"hx-request": "true"}
COLUMNS = "sepal length (cm),sepal width (cm),petal length (cm),petal width (cm)"


def shown(api: Api, path: str, status: int = 200, *, part: bool = False) -> str:
    """`part`: as htmx asks for it."""
    answer = api.http.get(path, headers=HTMX if part else {})
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    return answer.text


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
        assert "<main" not in shown(api, f"/jobs/{scored['id']}/{part}", part=True)
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
        page = shown(api, f"/jobs/{job['id']}/records?record={first}", part=True)
        rows = cells(page)
        assert [row[0] for row in rows] == [str(number) for number in range(first, min(first + 20, 150))]
        assert [float(row[2]) for row in rows] == flowers["sepal length (cm)"].to_list()[first : first + 20]
        assert [row[6] for row in rows] == predictions[first : first + 20]
        assert (">Next<" in page) == (first + 20 < 150)
        assert (">Previous<" in page) == (first > 0)


def test_beyond_the_last_record_there_is_none(api: Api, scored: dict[str, Any]) -> None:
    assert "There is no record 150." in shown(api, f"/jobs/{scored['id']}/records?record=150")


@pytest.mark.parametrize("record", ["-1", "x", "1e3", "9" * 30, "٣"])
def test_a_record_that_is_no_number_is_refused(api: Api, scored: dict[str, Any], record: str) -> None:
    for path in ("", "/records"):
        assert "record: expected a number" in shown(api, f"/jobs/{scored['id']}{path}?record={record}", 400)


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


def test_an_input_without_records_says_so(api: Api) -> None:
    job = api.run(f"{COLUMNS}\n", "iris")
    assert job["state"] == "completed"
    assert "There are no records." in shown(api, f"/jobs/{job['id']}/records")
    page = shown(api, f"/jobs/{job['id']}")
    assert "Plots" not in page
    assert "There is nothing to plot." in shown(api, f"/jobs/{job['id']}/plots")


def test_an_input_that_cannot_be_read_is_told(api: Api) -> None:
    job = api.upload(b"PAR1 and no more")
    page = shown(api, f"/jobs/{job['id']}/records", part=True)
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


def test_rows_that_failed_have_no_class(api: Api, failing: dict[str, Any]) -> None:
    page = shown(api, f"/jobs/{failing['id']}/plots")
    assert "17 records have no class." in page


def test_a_large_result_is_sampled_evenly(api: Api) -> None:
    rows = 240_000
    values = pd.DataFrame({name: np.full(rows, 1.0) for name in COLUMNS.split(",")[:3]})
    values.iloc[rows // 2 :] = 6.0
    body = encoded(pl.from_pandas(values), "parquet")
    job = api.http.post("/v1/predict?model=petals&format=parquet", content=body).json()
    job = api.finished(job["id"])
    page = shown(api, f"/jobs/{job['id']}/plots")
    told = re.search(r"A sample of ([\d,]+) of 240,000 records", page)
    assert told is not None
    read = int(told[1].replace(",", ""))
    assert 60_000 <= read <= 140_000
    bins = re.findall(r"<title>[^<]* to [^<]*: (\d+)</title>", page.replace(",", ""))
    counts = [int(count) for count in bins if count != "0"]
    assert len(counts) == 2
    assert abs(counts[0] - counts[1]) <= 0.4 * read
