"""Jobs over inputs that are read where they are, and results that are written elsewhere."""

import ctypes
import io
import json
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import httpx2
import numpy as np
import onnx
import orjson
import polars as pl
import pytest
from selection import quick_first
from service import Api, encoded, ok, problem, running
from waiting import until

from batchserve.client import Client
from batchserve.domain import AttemptTarget, Dialect, Target
from batchserve.errors import InputChanged, InputNotFound, InvalidInput, InvalidLocation, LocationRefused, TargetExists
from batchserve.scoring.blank import is_blank
from batchserve.scoring.inputs import Input
from batchserve.scoring.leftovers import remove_leftovers
from batchserve.scoring.planning import WHOLE
from batchserve.scoring.targets import write_object
from batchserve.storage import locations, patterns
from batchserve.storage.locations import find

T = TypeVar("T")
COLUMNS = ["sepal length (cm)", "sepal width (cm)", "petal length (cm)", "petal width (cm)"]


def flowers(rows: int, seed: int = 0) -> pl.DataFrame:
    values = np.random.default_rng(seed).uniform(0.1, 7.0, (rows, 4)).round(2)
    return pl.DataFrame(values, schema=COLUMNS).with_columns(
        plant=pl.Series([f"{seed}-{n}" for n in range(rows)], dtype=pl.String())
    )


def everywhere(folder: Path) -> dict[str, Any]:
    """The settings of a service whose jobs may read and write everywhere in a folder."""
    prefixes = {"*": [f"file://{folder}/"]}
    return {"input_prefixes": prefixes, "output_prefixes": prefixes}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory, iris_onnx: Path) -> Iterator[tuple[Api, Path]]:
    """A service, and a folder below which its jobs may read and write everywhere."""
    home = tmp_path_factory.mktemp("home")
    with running(tmp_path_factory.mktemp("store"), **everywhere(home)) as api:
        api.register("iris", iris_onnx)
        yield api, home


@pytest.fixture
def api(site: tuple[Api, Path]) -> Api:
    return site[0]


@pytest.fixture
def lake(site: tuple[Api, Path]) -> Path:
    return a_lake(Path(tempfile.mkdtemp(dir=site[1])))


def a_lake(folder: Path) -> Path:
    (folder / "in").mkdir(parents=True)
    (folder / "out").mkdir()
    return folder


@pytest.fixture(scope="module")
def strict_lake(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a file, links and a pipe where they are not expected."""
    lake = a_lake(tmp_path_factory.mktemp("strict") / "lake")
    (lake / "out" / "x.csv").write_bytes(encoded(flowers(1), "csv"))
    (lake / "in" / "a.parquet").write_bytes(encoded(flowers(1), "parquet"))
    (lake / "in" / "folder").mkdir()
    (lake / "in" / "link.csv").symlink_to(lake / "out" / "x.csv")
    (lake / "in" / "away").symlink_to(lake / "out")
    os.mkfifo(lake / "in" / "pipe")
    return lake


@pytest.fixture(scope="module")
def strict(tmp_path_factory: pytest.TempPathFactory, strict_lake: Path, iris_onnx: Path) -> Iterator[Api]:
    """A service whose jobs may read in one folder and write in another."""
    allowed: dict[str, Any] = {
        "input_prefixes": {"default": [f"file://{strict_lake}/in/"]},
        "output_prefixes": {"*": [f"file://{strict_lake}/out/"]},
    }
    with running(tmp_path_factory.mktemp("store"), **allowed) as api:
        api.register("iris", iris_onnx)
        yield api


def fill(lake: Path, counts: dict[str, int], format: str = "parquet") -> pl.DataFrame:
    """Files with so many rows each, and all rows in the order of the names."""
    frames = {name: flowers(count, seed) for seed, (name, count) in enumerate(sorted(counts.items()))}
    for name, frame in frames.items():
        (lake / "in" / name).write_bytes(encoded(frame, format))
    return pl.concat(frames.values())


def refused(answer: httpx2.Response, status: int, code: str) -> str:
    return str(problem(answer, status, code)["detail"])


def names(folder: Path) -> list[str]:
    return [file.name for file in folder.iterdir()]


def asked(lake: Path, pattern: str = "*", **more: Any) -> dict[str, Any]:
    return {"input": {"urls": [f"file://{lake}/in/{pattern}"]}, "model": "iris", **more}


def submitted(api: Api, request: dict[str, Any]) -> dict[str, Any]:
    answer = api.http.post("/v1/jobs", json=request)
    assert answer.status_code in (200, 202), answer.text
    return api.finished(answer.json()["id"])


def completed(api: Api, request: dict[str, Any]) -> dict[str, Any]:
    job = submitted(api, request)
    assert job["state"] == "completed", job["error"]
    return job


def rows_of(content: bytes, format: str) -> list[dict[str, Any]]:
    readers = {"parquet": pl.read_parquet, "csv": pl.read_csv, "jsonl": pl.read_ndjson, "arrow": pl.read_ipc}
    return readers[format](io.BytesIO(content)).to_dicts()  # type: ignore[operator, no-any-return]


# --- many inputs, one job ---


@pytest.mark.parametrize("format", ["parquet", "csv", "jsonl", "arrow"])
def test_a_job_over_many_files_has_the_rows_of_one_over_their_concatenation(api: Api, lake: Path, format: str) -> None:
    every = fill(lake, {f"{day:02}.{format}": 40 + day for day in range(1, 8)}, format)
    job = completed(api, asked(lake, f"*.{format}"))
    whole = api.run(encoded(every, format), "iris")
    assert job["input"]["files"] == 7
    assert job["rows"] == whole["rows"] == {"total": every.height, "ok": every.height, "failed": 0}
    assert rows_of(api.result(job).content, format) == rows_of(api.result(whole).content, format)


def test_small_files_share_chunks_and_large_ones_are_cut(tmp_path: Path, lake: Path, iris_onnx: Path) -> None:
    counts = {"a": 3, "b": 250, "c": 1, "d": 60, "e": 39, "f": 2, "g": 100, "h": 1}
    every = fill(lake, {f"{name}.parquet": count for name, count in counts.items()})
    allowed: dict[str, Any] = {"input_prefixes": {"*": [f"file://{lake}/"]}, "chunk_records": 50}
    with running(tmp_path / "store", **allowed) as api:
        api.register("iris", iris_onnx)
        job = completed(api, asked(lake))
        assert pl.read_parquet(io.BytesIO(api.result(job).content))["plant"].to_list() == every["plant"].to_list()
        assert job["chunks"]["total"] == 8  # of 100 records at most: a, three of b, c to e, f, g, h


def test_files_are_read_in_the_order_of_the_request_then_of_their_names_and_each_once(api: Api, lake: Path) -> None:
    fill(lake, {"a.csv": 1, "b.csv": 1, "c.csv": 1}, "csv")
    base = f"file://{lake}/in"
    request = {"input": {"urls": [f"{base}/c.csv", f"{base}/*.csv"]}, "model": "iris", "passthrough": "all"}
    plants = [row["plant"] for row in rows_of(api.result(completed(api, request)).content, "csv")]
    assert plants == ["2-0", "0-0", "1-0"]


def test_the_name_of_the_input_is_a_column_on_request(api: Api, lake: Path) -> None:
    fill(lake, {"a b.parquet": 2, "c.parquet": 1})
    job = completed(api, asked(lake, input_file=True))
    files = [row["input_file"] for row in rows_of(api.result(job).content, "parquet")]
    assert files == [f"file://{lake}/in/a%20b.parquet"] * 2 + [f"file://{lake}/in/c.parquet"]


def test_the_name_of_a_single_input_is_a_column_as_well(api: Api, lake: Path) -> None:
    fill(lake, {"a.csv": 2}, "csv")
    job = completed(api, asked(lake, input_file=True))
    assert [row["input_file"] for row in rows_of(api.result(job).content, "csv")] == [f"file://{lake}/in/a.csv"] * 2


def test_inputs_without_records_add_none(api: Api, lake: Path) -> None:
    every = fill(lake, {"a.parquet": 0, "b.parquet": 3, "c.parquet": 0, "d.parquet": 2, "e.parquet": 0})
    job = completed(api, asked(lake))
    assert pl.read_parquet(io.BytesIO(api.result(job).content))["plant"].to_list() == every["plant"].to_list()
    assert api.http.get(f"/v1/jobs/{job['id']}/inputs").json()["inputs"][0]["bytes"] > 0


@pytest.mark.parametrize("rest", [b"", b"{", b"[]"])
def test_only_what_is_blank_to_its_end_has_no_records(tmp_path: Path, rest: bytes) -> None:
    file = tmp_path / "a.json"
    file.write_bytes(b"\n" * 70_000 + rest)
    (found,) = find(f"file://{file}", [f"file://{tmp_path}/"], 1)
    input = Input("", found.url, "json", Dialect(), version=found.version)
    assert is_blank(input) is (rest != b"{")


@pytest.mark.parametrize(
    ("format", "blank"), [("jsonl", b""), ("jsonl", b"\n"), ("json", b"[]\n"), ("json", b""), ("csv", b"")]
)
def test_files_without_anything_add_no_records(api: Api, lake: Path, format: str, blank: bytes) -> None:
    every = fill(lake, {f"{name}.{format}": 3 for name in "ac"}, format)
    for name in "bd":
        (lake / "in" / f"{name}.{format}").write_bytes(blank)
    job = completed(api, asked(lake, format="parquet"))
    assert pl.read_parquet(io.BytesIO(api.result(job).content))["plant"].to_list() == every["plant"].to_list()
    completed(api, asked(lake, output={"url": f"file://{lake}/out/{{stem}}.parquet"}))
    heights = {name: pl.read_parquet(lake / "out" / f"{name}.parquet").height for name in "abcd"}
    assert heights == {"a": 3, "b": 0, "c": 3, "d": 0}


def test_a_header_and_files_without_anything_give_an_empty_result(api: Api, lake: Path) -> None:
    fill(lake, {"a.csv": 0}, "csv")
    (lake / "in" / "b.csv").write_bytes(b"")
    job = completed(api, asked(lake, input_file=True))
    assert job["rows"]["total"] == 0
    assert api.result(job).content.startswith(b"plant,input_file,prediction")
    completed(api, asked(lake, output={"url": f"file://{lake}/out/{{stem}}.csv"}))
    assert (lake / "out" / "a.csv").read_bytes() == (lake / "out" / "b.csv").read_bytes()


def test_only_inputs_without_records_give_an_empty_result(api: Api, lake: Path) -> None:
    fill(lake, {"a.parquet": 0, "b.parquet": 0})
    job = completed(api, asked(lake))
    assert job["rows"]["total"] == 0
    assert "prediction" in pl.read_parquet(io.BytesIO(api.result(job).content)).columns


def test_failed_records_are_named_with_their_input_and_their_place_in_it(api: Api, lake: Path) -> None:
    good, bad = ",".join(COLUMNS) + "\n1,1,1,1\n", ",".join(COLUMNS) + "\n1,1,1,1\n1,wide,1,1\n"
    for name, text in (("a.csv", good), ("b.csv", bad), ("c.csv", bad)):
        (lake / "in" / name).write_text(text)
    job = completed(api, asked(lake))
    found = [(entry["record"], entry["input_file"], entry["input_record"]) for entry in api.errors(job)]
    assert found == [(2, f"file://{lake}/in/b.csv", 1), (4, f"file://{lake}/in/c.csv", 1)]
    shown = api.http.get(f"/jobs/{job['id']}/failed").text
    assert "wide" in shown


def test_the_columns_of_a_file_may_be_in_another_order(api: Api, lake: Path) -> None:
    (lake / "in" / "a.parquet").write_bytes(encoded(flowers(3, 1), "parquet"))
    turned = flowers(3, 2).select(["plant", *reversed(COLUMNS)])
    (lake / "in" / "b.parquet").write_bytes(encoded(turned, "parquet"))
    job = completed(api, asked(lake, passthrough="all"))
    result = pl.read_parquet(io.BytesIO(api.result(job).content))
    assert result.columns[:5] == [*COLUMNS, "plant"]
    assert result["plant"].to_list() == ["1-0", "1-1", "1-2", "2-0", "2-1", "2-2"]
    assert result[COLUMNS[0]].to_list()[3:] == turned[COLUMNS[0]].to_list()


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (flowers(2).drop(COLUMNS[1]), "does not fit"),
        (flowers(2).drop("plant"), "lacks 'plant'"),
        (flowers(2).with_columns(more=1), "has 'more', too"),
        (flowers(2).with_columns(plant=pl.Series([1, 2])), "has Int64 in 'plant' instead of String"),
    ],
)
def test_an_input_with_unlike_columns_is_named_before_anything_is_scored(
    api: Api, lake: Path, other: pl.DataFrame, said: str
) -> None:
    fill(lake, {"a.parquet": 3, "b.parquet": 3})
    (lake / "in" / "c.parquet").write_bytes(encoded(other, "parquet"))
    job = submitted(api, asked(lake))
    assert (job["state"], job["error"]["code"], job["rows"]["ok"]) == ("failed", "unlike-inputs", 0)
    assert f"{lake}/in/c.parquet" in job["error"]["message"]
    assert said in job["error"]["message"]
    assert [entry["input"] for entry in job["error"]["errors"]] == [f"file://{lake}/in/c.parquet"]


def test_a_column_without_any_value_has_any_type(api: Api, lake: Path) -> None:
    (lake / "in" / "a.parquet").write_bytes(encoded(flowers(2), "parquet"))
    empty = flowers(2).with_columns(plant=pl.Series([None, None], dtype=pl.Null()))
    (lake / "in" / "b.parquet").write_bytes(encoded(empty, "parquet"))
    job = completed(api, asked(lake))
    assert pl.read_parquet(io.BytesIO(api.result(job).content))["plant"].to_list() == ["0-0", "0-1", None, None]


@pytest.mark.parametrize("format", ["parquet", "jsonl"])
def test_a_column_has_the_type_of_its_first_value_in_any_input(api: Api, lake: Path, format: str) -> None:
    for number in range(66):  # in several chunks
        note = pl.Series([number] * 2 if number == 65 else [None, None], dtype=pl.Int64())
        frame = flowers(2).with_columns(note=note if number == 65 or format != "parquet" else note.cast(pl.Null()))
        (lake / "in" / f"{number:02}.{format}").write_bytes(encoded(frame, format))
    request = asked(lake, passthrough=["note"], format="parquet", input_file=True)
    result = pl.read_parquet(io.BytesIO(api.result(completed(api, request)).content))
    assert result["note"].to_list() == [None] * 130 + [65, 65]
    output = {"url": f"file://{lake}/out/run/", "partition_by": "prediction"}
    completed(api, asked(lake, passthrough=["note"], format="parquet", output=output))
    found = {str(pl.read_parquet_schema(file)) for file in (lake / "out" / "run").rglob("*.parquet")}
    assert len(found) == 1


def test_a_retry_gives_a_column_the_type_that_it_had(api: Api, lake: Path) -> None:
    for number in range(66):
        frame = flowers(1).with_columns(pl.lit(None if number < 65 else 7).alias("note"))
        row = frame.with_columns(pl.lit("wide").alias(COLUMNS[0])) if number == 1 else frame
        (lake / "in" / f"{number:02}.jsonl").write_bytes(encoded(row, "jsonl"))
    job = completed(api, asked(lake, passthrough=["note"], format="parquet"))
    again = ok(api.http.post(f"/v1/jobs/{job['id']}/retry", json={"rows": "failed"}), 202)
    job = api.finished(again["id"])
    assert (job["state"], job["rows"]["failed"]) == ("completed", 1)
    assert pl.read_parquet(io.BytesIO(api.result(job).content))["note"].to_list() == [None] * 65 + [7]


@pytest.mark.parametrize("format", ["parquet", "arrow"])
def test_inputs_behind_one_without_values_are_compared_with_each_other(api: Api, lake: Path, format: str) -> None:
    notes = [pl.Series([None], dtype=pl.Null()), pl.Series([2**60 + 1]), pl.Series([0.5])]
    for name, note in zip("abc", notes, strict=True):
        (lake / "in" / name).write_bytes(encoded(flowers(1).with_columns(note=note), format))
    job = submitted(api, asked(lake, passthrough=["note"]))
    assert (job["state"], job["error"]["code"], job["rows"]["ok"]) == ("failed", "unlike-inputs", 0)
    said = f"in/c has Float64 in 'note' instead of Int64, which file://{lake}/in/b has"
    assert said in job["error"]["message"]


@pytest.mark.parametrize(
    "values",
    [
        ["90071992547409931", "90071992547409933", "12.0", "null"],
        ["7", "true", "null"],
        ["5", "null"],
        ["null", "5", "0.5"],
        ["7", '"x"'],
        ["18446744073709551615", "3", "null"],
        ["18446744073709551615", "-3"],
        ["[1,2]", "7", '{"a":1.5}'],
        ["null", "true"],
    ],
)
@pytest.mark.parametrize("format", ["jsonl", "json"])
def test_values_of_json_pass_from_several_files_as_from_one(
    api: Api, lake: Path, values: list[str], format: str
) -> None:
    flower = orjson.dumps(dict.fromkeys(COLUMNS, 1.5)).decode()[:-1]
    rows = [f'{flower},"note":{value}}}' for value in values]
    for number, row in enumerate(rows):
        (lake / "in" / f"{number}.{format}").write_text(f"[{row}]" if format == "json" else row + "\n")
    content = api.result(completed(api, asked(lake, passthrough=["note"]))).content
    whole = f"[{','.join(rows)}]" if format == "json" else "".join(row + "\n" for row in rows)
    assert content == api.result(api.run(whole.encode(), "iris", passthrough="note")).content


def test_a_value_of_json_behind_the_first_ones_that_would_change_is_named(api: Api, lake: Path) -> None:
    flower = dict.fromkeys(COLUMNS, 1.5)
    notes = {"a": [0.5], "b": [*range(100), 2**53 + 1]}
    for name, values in notes.items():
        lines = b"".join(orjson.dumps({**flower, "note": value}) + b"\n" for value in values)
        (lake / "in" / f"{name}.jsonl").write_bytes(lines)
    job = submitted(api, asked(lake, passthrough=["note"]))
    assert (job["state"], job["error"]["code"]) == ("failed", "unlike-inputs")
    assert "in/b.jsonl is unlike the other inputs: has Int64 in 'note' instead of Float64" in job["error"]["message"]


def test_a_file_that_cannot_be_read_is_named(api: Api, lake: Path) -> None:
    fill(lake, {"a.parquet": 3})
    (lake / "in" / "b.parquet").write_bytes(b"PAR1 and no more")
    job = submitted(api, asked(lake))
    assert job["state"] == "failed"
    assert f"{lake}/in/b.parquet" in job["error"]["message"]


@pytest.mark.parametrize(("format", "rows"), [("parquet", 3), ("parquet", 2000), ("jsonl", 2000), ("json", 2000)])
def test_a_file_that_is_damaged_behind_its_beginning_is_named(api: Api, lake: Path, format: str, rows: int) -> None:
    fill(lake, {f"{name}.{format}": rows for name in "abc"}, format)
    file = lake / "in" / f"b.{format}"
    content = file.read_bytes()
    place = 10 if rows < 100 else len(content) // 2
    file.write_bytes(content[:place] + b"\xff" * 40 + content[place + 40 :])
    if format == "json":
        file.write_bytes(content[:place])
    job = submitted(api, asked(lake))
    if format == "jsonl":  # a fault of one record
        assert {entry["input_file"] for entry in api.errors(job)} == {f"file://{file}"}
    else:
        assert (job["state"], job["error"]["code"]) == ("failed", "invalid-input")
        assert f"file://{file}: " in job["error"]["message"]


def test_files_of_two_formats_are_refused_naming_both(api: Api, lake: Path) -> None:
    fill(lake, {"a.parquet": 3})
    fill(lake, {"b.csv": 3}, "csv")
    answer = api.http.post("/v1/jobs", json=asked(lake))
    assert "a.parquet is parquet" in refused(answer, 422, "invalid-input")
    assert "b.csv is csv" in answer.json()["detail"]


def test_the_records_of_every_input_are_shown_on_the_page_of_the_job(api: Api, lake: Path) -> None:
    every = fill(lake, {f"{number:02}.parquet": 7 for number in range(5)})
    job = completed(api, asked(lake))
    for record in (0, 8, 34):
        shown = api.http.get(f"/jobs/{job['id']}/records", params={"record": record}).text
        assert every["plant"][record] in shown


def test_inputs_are_listed_page_by_page(api: Api, lake: Path) -> None:
    fill(lake, {f"{number}.csv": 1 for number in range(5)}, "csv")
    job = completed(api, asked(lake))
    path, found, after = f"/v1/jobs/{job['id']}/inputs", [], None
    while True:
        page = ok(api.http.get(path, params={"limit": 2, **({} if after is None else {"after": after})}))
        found += [entry["filename"] for entry in page["inputs"]]
        if (after := page["next"]) is None:
            break
    assert found == [f"{number}.csv" for number in range(5)]


def test_an_equal_job_over_unchanged_files_is_reused_and_one_over_changed_files_is_not(api: Api, lake: Path) -> None:
    fill(lake, {"a.csv": 2, "b.csv": 2}, "csv")
    first = completed(api, asked(lake))
    again = completed(api, asked(lake))
    (lake / "in" / "b.csv").write_bytes(encoded(flowers(3, 9), "csv"))
    changed = completed(api, asked(lake))
    assert again["reused_from"] == first["id"]
    assert (changed["reused_from"], changed["rows"]["total"]) == (None, 5)


def test_the_client_submits_addresses(
    start_server: Callable[..., AbstractContextManager[str]], tmp_path: Path, lake: Path, iris_onnx: Path
) -> None:
    fill(lake, {"a.csv": 2, "b.csv": 2}, "csv")
    allowed = json.dumps({"default": [f"file://{lake}/"]})
    environment = {"BATCHSERVE_INPUT_PREFIXES": allowed, "BATCHSERVE_OUTPUT_PREFIXES": allowed}
    (tmp_path / "server").mkdir()
    with start_server(tmp_path / "server", **environment) as url, Client(url) as client:
        client.models.add(iris_onnx, name="iris")
        job = client.submit_urls(f"file://{lake}/in/*.csv", "iris", input_file=True, delimiter=",")
        assert job.wait(30).result().to_polars()["input_file"].n_unique() == 2
        client.submit_urls(f"file://{lake}/in/*.csv", "iris", output=f"file://{lake}/out/{{stem}}.csv").wait(30)
        command = [sys.executable, "-m", "batchserve", "jobs", "create", f"file://{lake}/in/*.csv", "-m", "iris"]
        target = f"file://{lake}/out/all.csv"
        done = subprocess.run(
            [*command, "-o", target, "--json"], check=True, capture_output=True, text=True,
            env=os.environ | {"BATCHSERVE_URL": url},
        )  # fmt: skip
        assert json.loads(done.stdout)["rows"]["ok"] == 4
        assert target in done.stderr.replace("\n", "")
        twice = [
            subprocess.run(
                [*command, "--no-wait", "--idempotency-key", "night-7"], check=True, capture_output=True, text=True,
                env=os.environ | {"BATCHSERVE_URL": url},
            ).stdout
            for _ in range(2)
        ]  # fmt: skip
        assert twice[0] == twice[1]
    assert sorted(names(lake / "out")) == ["a.csv", "all.csv", "b.csv"]


# --- what may be read ---


@pytest.mark.parametrize(
    ("url", "status", "code"),
    [
        ("file:///etc/passwd", 403, "location-refused"),
        ("file://{lake}/out/x.csv", 403, "location-refused"),
        ("file://{lake}/in/../out/x.csv", 422, "invalid-location"),
        ("file://{lake}/in/%2e%2e/out/x.csv", 422, "invalid-location"),
        ("file://{lake}/in/..%2Fout/x.csv", 422, "invalid-location"),
        ("file://{lake}/in/a%00.csv", 422, "invalid-location"),
        ("file://{lake}/in/" + 256 * "a", 422, "invalid-location"),
        ("file://{lake}/in/" + 256 * "a" + "/*.csv", 422, "invalid-location"),
        ("file://{lake}/i*/a.csv", 403, "location-refused"),
        ("file://{lake}/inside/a.csv", 403, "location-refused"),
        ("file://localhost{lake}/in/a.csv", 422, "invalid-location"),
        ("s3://bucket/in/a.csv", 403, "location-refused"),
        ("https://example.org/a.csv", 422, "invalid-location"),
        ("{lake}/in/a.csv", 422, "invalid-location"),
        ("file://{lake}/in/missing.csv", 404, "input-not-found"),
        ("file://{lake}/in/*.arrow", 404, "input-not-found"),
        ("file://{lake}/in/folder", 422, "invalid-location"),
        ("file://{lake}/in/link.csv", 403, "location-refused"),
        ("file://{lake}/in/*.csv", 403, "location-refused"),
        ("file://{lake}/in/away/a.csv", 403, "location-refused"),
        ("file://{lake}/in/pipe", 403, "location-refused"),
    ],
)
def test_an_address_outside_of_the_prefixes_or_by_a_link_is_refused(
    strict: Api, strict_lake: Path, url: str, status: int, code: str
) -> None:
    request = {"input": {"urls": [url.format(lake=strict_lake)]}, "model": "iris"}
    with strict.unchanged():
        problem(strict.http.post("/v1/jobs", json=request), status, code)


def without_privileges(function: Callable[[], T]) -> T:
    """What a function gives in a thread to which file modes apply, also where the tests are run by root."""
    given: list[T] = []

    def run() -> None:
        version, nothing = 0x20080522, 0
        libc = ctypes.CDLL(None, use_errno=True)
        header, data = (ctypes.c_uint32 * 2)(version, nothing), (ctypes.c_uint32 * 6)()
        assert libc.capset(header, data) == 0, os.strerror(ctypes.get_errno())
        given.append(function())

    with ThreadPoolExecutor(1) as thread:
        thread.submit(run).result()
    return given[0]


@pytest.mark.skipif(sys.platform != "linux", reason="privileges of a thread")
def test_what_the_service_may_not_read_is_refused_by_name(lake: Path) -> None:
    file, folder, root = lake / "in" / "a.csv", lake / "in" / "x", f"file://{lake}/in/"
    file.write_text("a\n")
    folder.mkdir()
    (found,) = find(f"{root}a.csv", [root], 1)
    file.chmod(0)
    with pytest.raises(LocationRefused, match=r"in/a\.csv cannot be read: Permission denied"):
        without_privileges(lambda: locations.open_at(found.url, found.version))
    folder.chmod(0)
    for look in (
        lambda: find(f"{root}**/*.csv", [root], 9),
        lambda: find(f"{root}x/a.csv", [root], 9),
        lambda: locations.any_within(f"{root}x/", root),
        lambda: locations.exists(f"{root}x/a.csv", root),
    ):
        with pytest.raises(LocationRefused, match=r"in/x.* cannot be read: Permission denied"):
            without_privileges(look)


def test_nothing_is_allowed_by_default(tmp_path: Path, lake: Path, iris_onnx: Path) -> None:
    fill(lake, {"a.csv": 1}, "csv")
    with running(tmp_path / "store") as api:
        api.register("iris", iris_onnx)
        answer = api.http.post("/v1/jobs", json=asked(lake))
        assert "an administrator allows some by a setting" in refused(answer, 403, "location-refused")


@pytest.mark.parametrize(
    "prefix", ["/data/in", "file://data/in/", "file:///data/*/", "file:///data/../etc/", "s3:///x/"]
)
def test_a_prefix_of_another_form_stops_the_start(tmp_path: Path, prefix: str) -> None:
    with pytest.raises(ValueError, match="is not a prefix"), running(tmp_path, input_prefixes={"*": [prefix]}):
        pass


def test_prefixes_are_those_of_the_tenant(tmp_path: Path, lake: Path) -> None:
    with running(tmp_path / "store", input_prefixes={"a": [f"file://{lake}/in/"], "*": ["file:///all/"]}) as api:
        assert api.settings.inputs_of("a") == (f"file://{lake}/in/", "file:///all/")
        assert api.settings.inputs_of("b") == ("file:///all/",)


def test_patterns_match_as_in_a_shell(lake: Path) -> None:
    names = ["a.csv", "b.csv", ".hidden.csv", "x/c.csv", "x/y/d.csv", "x/[1].csv", "x/é.csv"]
    for name in names:
        (lake / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (lake / "in" / name).write_text("a\n")
    allowed = [f"file://{lake}/in/"]

    def matches(pattern: str) -> list[str]:
        found = find(f"file://{lake}/in/{pattern}", allowed, 100)
        return [one.url.removeprefix(allowed[0]) for one in found]

    assert matches("*.csv") == ["a.csv", "b.csv"]
    assert matches("[b-z].csv") == ["b.csv"]
    assert matches("**/*.csv") == ["a.csv", "b.csv", "x/%5B1%5D.csv", "x/c.csv", "x/%C3%A9.csv", "x/y/d.csv"]
    assert matches("x/**") == ["x/%5B1%5D.csv", "x/c.csv", "x/%C3%A9.csv", "x/y/d.csv"]
    assert matches("x/%5B1%5D.csv") == ["x/%5B1%5D.csv"]
    assert matches("*/?.csv") == ["x/c.csv", "x/%C3%A9.csv"]
    assert matches(".hid*.csv") == [".hidden.csv"]
    with pytest.raises(InvalidLocation, match="at most 1 inputs"):
        find(f"file://{lake}/in/*.csv", allowed, 1)
    with pytest.raises(LocationRefused):
        find(f"file://{lake}/*/a.csv", allowed, 1)


@pytest.mark.timeout(30)
def test_a_pattern_with_many_double_stars_takes_no_longer_than_its_folders(lake: Path) -> None:
    deep = lake.joinpath("in", *["x"] * 30)
    deep.mkdir(parents=True)
    (deep / "a.csv").write_text("a\n")
    names = [*["x"] * 30, "a.csv"]
    for repeated in ("**/", "**/x/", "**/*/"):
        pattern = 14 * repeated
        (found,) = find(f"file://{lake}/in/{pattern}a.csv", [f"file://{lake}/in/"], 100)
        assert found.url == f"file://{deep}/a.csv"
        with pytest.raises(InputNotFound):
            find(f"file://{lake}/in/{pattern}b.csv", [f"file://{lake}/in/"], 100)
        parts = patterns.plain(f"{pattern}a.csv".split("/"))
        assert patterns.all_match(names, parts)
        assert not patterns.all_match([*names, "b"], parts)


@pytest.mark.parametrize(
    ("pattern", "key", "is_match"),
    [
        ("**", "a", True), ("**", "x/y/a", True), ("**", "x/.y/a", False), ("**", ".a", False), ("x/**", "x", False),
        ("**/a", "a", True), ("**/a", "x/a", True), ("**/x/**/a", "x/a", True), ("**/x/**/a", "y/x/z/a", True),
        ("**/x/**/a", "y/a", False), ("*/a", "x/a", True), ("*/a", "x/y/a", False), ("x", "x", True),
        ("**/**/a", "x/y/a", True), ("x/**/**", "x/a", True), ("**/.a", "x/.a", True), ("x", "x/y", False),
    ],
)  # fmt: skip
def test_keys_match_patterns_as_files_do(lake: Path, pattern: str, key: str, is_match: bool) -> None:
    file = lake / "in" / key
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("a\n")
    assert patterns.all_match(key.split("/"), patterns.plain(pattern.split("/"))) == is_match
    try:
        found = [one.url for one in find(f"file://{lake}/in/{pattern}", [f"file://{lake}/in/"], 9)]
    except (InputNotFound, InvalidLocation):  # a folder of that name
        found = []
    assert found == ([f"file://{file}"] if is_match else [])


# --- one state of each input ---


@pytest.mark.parametrize("change", quick_first(["as long", "removed", "longer", "replaced", "link"], 2))
def test_a_file_that_changes_after_its_job_is_queued_fails_it_by_name(
    tmp_path: Path, lake: Path, iris_onnx: Path, change: str
) -> None:
    fill(lake, {"a.csv": 5, "b.csv": 5}, "csv")
    file = lake / "in" / "b.csv"
    with running(tmp_path / "store", worker=False, input_prefixes={"*": [f"file://{lake}/in/"]}) as api:
        api.register("iris", iris_onnx)
        job = ok(api.http.post("/v1/jobs", json=asked(lake)), 202)
    content = file.read_bytes()
    if change == "longer":
        file.write_bytes(content + content[content.index(b"\n") + 1 :])
    elif change == "as long":
        file.write_bytes(content.replace(b"1-0", b"1-9"))
    elif change == "removed":
        file.unlink()
    elif change == "replaced":
        (lake / "in" / "new").write_bytes(content)
        (lake / "in" / "new").rename(file)
    else:
        file.rename(lake / "out" / "b.csv")
        file.symlink_to(lake / "out" / "b.csv")
    with running(tmp_path / "store", input_prefixes={"*": [f"file://{lake}/in/"]}) as api:
        ended = api.finished(job["id"])
    assert (ended["state"], ended["error"]["code"]) == ("failed", "input-changed")
    assert f"{lake}/in/b.csv" in ended["error"]["message"]


def test_a_file_that_is_cut_off_while_it_is_read_is_no_damaged_one(lake: Path) -> None:
    file = lake / "in" / "a.npy"
    np.save(file, np.ones((1000, 4), np.float32))
    (found,) = find(f"file://{file}", [f"file://{lake}/in/"], 1)
    own = Input(str(lake), found.url, "npy", Dialect(), version=found.version)

    def cut_off(source: BinaryIO) -> BinaryIO:
        os.truncate(file, 1000)
        return source

    with pytest.raises(InputChanged), own.reading() as source:
        list(own.reader.plan(cut_off(source), None, WHOLE))
    (found,) = find(f"file://{file}", [f"file://{lake}/in/"], 1)
    own = replace(own, version=found.version)
    with pytest.raises(InvalidInput), own.reading() as source:
        list(own.reader.plan(source, None, WHOLE))


def test_a_file_that_changes_while_it_is_read_is_noticed(lake: Path) -> None:
    fill(lake, {"a.csv": 5}, "csv")
    (found,) = find(f"file://{lake}/in/a.csv", [f"file://{lake}/in/"], 1)
    with locations.open_at(found.url, found.version) as source:
        source.read(3)
        (lake / "in" / "a.csv").write_bytes(b"other")
    with pytest.raises(Exception, match="was changed or removed"):
        locations.require_unchanged(found.url, found.version)


def test_a_folder_in_whose_place_a_link_is_put_is_left_even_where_the_link_leads_back_to_the_file(lake: Path) -> None:
    folder = lake / "in" / "a"
    folder.mkdir()
    (folder / "x.csv").write_text("a\n")
    (found,) = find(f"file://{folder}/x.csv", [f"file://{lake}/in/"], 1)
    folder.rename(lake / "out" / "a")
    folder.symlink_to(lake / "out" / "a")
    with pytest.raises(InputChanged):
        locations.open_at(found.url, found.version)
    with pytest.raises(InputChanged):
        locations.require_unchanged(found.url, found.version)


def test_a_link_that_takes_the_place_of_a_folder_just_when_it_was_looked_at_is_not_followed(
    lake: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The files of others outside are neither found nor replaced."""
    folder, look = lake / "in" / "a", os.lstat
    folder.mkdir()
    (lake / "out" / "x.csv").write_text("secret")

    def exchanging(path: Any, **more: Any) -> os.stat_result:
        status = look(path, **more)
        if str(path) == str(folder) and folder.is_dir() and not folder.is_symlink():
            folder.rename(lake / "in" / "b")
            folder.symlink_to(lake / "out")
        return status

    monkeypatch.setattr(os, "lstat", exchanging)
    with pytest.raises((InputNotFound, LocationRefused)):
        find(f"file://{folder}/*.csv", [f"file://{lake}/in/"], 1)
    with (
        suppress(OSError),
        locations.create_at(f"file://{folder}/x.csv", f"file://{lake}/in/", replaces=True) as writer,
    ):
        writer.write(b"public")
        writer.commit()
    assert names(lake / "out") == ["x.csv"]
    assert (lake / "out" / "x.csv").read_text() == "secret"


def test_the_prefix_that_allows_an_address_may_contain_links(lake: Path) -> None:
    (lake / "in" / "x.csv").write_text("a\n")
    (lake / "data").symlink_to(lake / "in")
    root = f"file://{lake}/data/"
    (found,) = find(f"{root}*.csv", [root], 1)
    with locations.open_at(found.url, found.version) as source:
        assert source.read() == b"a\n"
    locations.require_unchanged(found.url, found.version)
    with locations.create_at(f"{root}deep/y.csv", root, replaces=True) as writer:
        writer.write(b"b")
        writer.commit()
    assert (lake / "in" / "deep" / "y.csv").read_text() == "b"


# --- results elsewhere ---


def test_what_a_killed_attempt_has_left_is_removed_by_the_next(lake: Path) -> None:
    root, job = f"file://{lake}/out/", "01a22fb2-cd0b-7681-a280-1372dbac2cb8"
    folders = [lake / "out", lake / "out" / "deep", lake / "out" / "land=CH"]
    gone, kept = [f".partial-{job}-1-0f", f".partial-{job}-2-0f"], [f".partial-{job}-3-0f", ".partial-x-1-0f", "a.csv"]
    for folder in folders:
        folder.mkdir(exist_ok=True)
        for name in [*gone, *kept]:
            (folder / name).write_text("x")
    target = AttemptTarget(f"{root}{{stem}}", root, job_id=job, attempt=2)
    remove_leftovers(target, [f"{root}a.csv", f"{root}deep/b.csv", f"{root}missing/b.csv"])
    assert [sorted(set(gone) & set(names(folder))) for folder in folders] == [[], [], gone]
    remove_leftovers(replace(target, url=root, partition_by="land"), [])
    assert [sorted(name for name in names(folder) if "." in name) for folder in folders] == 3 * [sorted(kept)]


def test_a_job_removes_what_a_killed_attempt_at_it_has_left(tmp_path: Path, lake: Path, iris_onnx: Path) -> None:
    fill(lake, {"a.csv": 3}, "csv")
    allowed = everywhere(lake)
    with running(tmp_path / "store", worker=False, **allowed) as api:
        api.register("iris", iris_onnx)
        job = ok(api.http.post("/v1/jobs", json=asked(lake, output={"url": f"file://{lake}/out/{{stem}}.csv"})), 202)
    (lake / "out" / f".partial-{job['id']}-1-0f").write_text("cut off")
    with running(tmp_path / "store", **allowed) as api:
        assert api.finished(job["id"])["state"] == "completed"
    assert names(lake / "out") == ["a.csv"]


def test_a_result_that_is_being_written_is_named_after_its_job_and_attempt(lake: Path) -> None:
    url, root = f"file://{lake}/out/x.csv", f"file://{lake}/out/"
    seen: list[str] = []

    def observed() -> Iterator[bytes]:
        seen.extend(names(lake / "out"))
        yield b"x"

    write_object(AttemptTarget(url, root, job_id="job", attempt=3), url, observed())
    assert re.fullmatch(r"\.partial-job-3-[0-9a-f]+", seen[0])
    assert names(lake / "out") == ["x.csv"]


def test_a_merged_result_is_written_to_an_address(api: Api, lake: Path) -> None:
    every = fill(lake, {"a.parquet": 3, "b.parquet": 4})
    job = completed(api, asked(lake, output={"url": f"file://{lake}/out/all.parquet"}))
    assert pl.read_parquet(lake / "out" / "all.parquet")["plant"].to_list() == every["plant"].to_list()
    assert (job["output"]["url"], job["output"]["files"]) == (f"file://{lake}/out/all.parquet", 1)
    assert names(lake / "out") == ["all.parquet"]
    assert "all.parquet" in refused(api.http.get(job["links"]["result"]), 409, "elsewhere")
    assert "a.parquet" in refused(api.http.get(job["links"]["input"]), 409, "elsewhere")


@pytest.mark.parametrize("format", ["parquet", "csv"])
def test_each_input_has_a_result_of_its_own_with_the_bytes_of_a_job_of_its_own(
    api: Api, lake: Path, format: str
) -> None:
    fill(lake, {f"a.{format}": 3, f"b.{format}": 40, f"c.{format}": 0}, format)
    completed(api, asked(lake, output={"url": f"file://{lake}/out/{{date}}/{{stem}}.{format}"}))
    (day,) = (lake / "out").iterdir()
    assert sorted(file.name for file in day.iterdir()) == [f"{name}.{format}" for name in "abc"]
    for name in "ab":
        alone = api.run((lake / "in" / f"{name}.{format}").read_bytes(), "iris")
        assert (day / f"{name}.{format}").read_bytes() == api.result(alone).content
    empty = (day / f"c.{format}").read_bytes()
    columns = pl.read_parquet(io.BytesIO(empty)).columns if format == "parquet" else empty.decode().strip().split(",")
    assert "prediction" in columns


def test_a_result_that_exists_is_not_replaced_unless_that_is_asked_for(api: Api, lake: Path) -> None:
    fill(lake, {"a.csv": 3}, "csv")
    target = lake / "out" / "a.csv"
    target.write_text("precious")
    output = {"url": f"file://{lake}/out/{{stem}}.csv"}
    assert "a.csv" in refused(api.http.post("/v1/jobs", json=asked(lake, output=output)), 409, "target-exists")
    assert target.read_text() == "precious"
    completed(api, asked(lake, output={**output, "overwrite": True}))
    assert "prediction" in target.read_text()


def test_a_result_is_named_by_every_byte_of_the_name_of_its_input(api: Api, lake: Path) -> None:
    """Also by one that is no text, or never shown; and a name that is shown alike is another one."""
    known = [b"caf\xe9", b"caf\xe8", "cafe\u0301".encode(), "caf\u00e9".encode(), b"a\nb", b"a b%20[*]"]
    for name in known:
        with open(os.fsencode(lake / "in") + b"/" + name + b".csv", "wb") as file:  # noqa: PTH123 - bytes
            file.write(encoded(flowers(1), "csv"))
    completed(api, asked(lake, output={"url": f"file://{lake}/out/{{stem}}.csv"}))
    assert {os.fsencode(name) for name in names(lake / "out")} == {name + b".csv" for name in known}


def test_no_result_takes_the_place_of_an_input(api: Api, lake: Path) -> None:
    fill(lake, {"a.csv": 3, "b.csv": 2}, "csv")
    (lake / "data").symlink_to(lake / "in")
    before = (lake / "in" / "a.csv").read_bytes()
    for url in (f"file://{lake}/in/{{stem}}.csv", f"file://{lake}/in/%61.csv"):
        output = {"url": url, "overwrite": True}
        detail = refused(api.http.post("/v1/jobs", json=asked(lake, output=output)), 422, "invalid-location")
        assert ".csv is an input of the job" in detail
    assert (lake / "in" / "a.csv").read_bytes() == before
    reached = locations.as_reached(
        [f"file://{lake}/data/a.csv", f"file://{lake}/in/%61.csv", f"file://{lake}/in/b.csv"]
    )
    assert reached[0] == reached[1] != reached[2]


def test_a_result_that_appears_before_the_end_of_the_job_is_not_replaced(
    tmp_path: Path, lake: Path, iris_onnx: Path
) -> None:
    fill(lake, {"a.csv": 3}, "csv")
    allowed = everywhere(lake)
    with running(tmp_path / "store", worker=False, **allowed) as api:
        api.register("iris", iris_onnx)
        job = ok(api.http.post("/v1/jobs", json=asked(lake, output={"url": f"file://{lake}/out/x.csv"})), 202)
    (lake / "out" / "x.csv").write_text("precious")
    with running(tmp_path / "store", **allowed) as api:
        ended = api.finished(job["id"])
    assert (ended["state"], ended["error"]["code"]) == ("failed", "target-exists")
    assert (lake / "out" / "x.csv").read_text() == "precious"


def test_of_two_results_for_one_address_that_are_written_at_once_one_is_refused(lake: Path) -> None:
    url, root = f"file://{lake}/out/x.csv", f"file://{lake}/out/"

    def interrupted() -> Iterator[bytes]:
        yield b"mine"
        write_object(Target(url, root), url, [b"theirs"])

    with pytest.raises(TargetExists, match=r"x\.csv exists"):
        write_object(Target(url, root), url, interrupted())
    assert (lake / "out" / "x.csv").read_text() == "theirs"
    assert names(lake / "out") == ["x.csv"]


def test_a_link_that_appears_while_a_result_is_written_is_refused_by_the_name_of_the_result(lake: Path) -> None:
    url, root = f"file://{lake}/out/x.csv", f"file://{lake}/out/"

    def interrupted() -> Iterator[bytes]:
        yield b"mine"
        (lake / "out" / "x.csv").symlink_to(lake / "in")

    with pytest.raises(LocationRefused, match=r"x\.csv cannot be written"):
        write_object(Target(url, root), url, interrupted())
    assert names(lake / "out") == ["x.csv"]


def test_of_two_attempts_that_write_the_same_bytes_at_once_both_succeed(lake: Path) -> None:
    url, root = f"file://{lake}/out/x.csv", f"file://{lake}/out/"

    def interrupted() -> Iterator[bytes]:
        yield b"mine"
        write_object(Target(url, root), url, [b"mine"])

    assert write_object(Target(url, root), url, interrupted()).bytes == 4
    assert names(lake / "out") == ["x.csv"]


@pytest.mark.parametrize(
    ("url", "status", "code"),
    [
        ("file://{lake}/in/x.csv", 403, "location-refused"),
        ("file://{lake}/out/../in/x.csv", 422, "invalid-location"),
        ("file://{lake}/out/{name}.csv", 422, "invalid-location"),
        ("file://{lake}/out/*.csv", 422, "invalid-location"),
        ("file://{lake}/out/" + 256 * "a" + ".csv", 422, "invalid-location"),
        ("file://{lake}/out/x.parquet", 422, "invalid-location"),
    ],
)
def test_a_target_of_another_form_or_outside_of_the_prefixes_is_refused(
    strict: Api, strict_lake: Path, url: str, status: int, code: str
) -> None:
    request = asked(strict_lake, "a.parquet", format="csv", output={"url": url.replace("{lake}", str(strict_lake))})
    problem(strict.http.post("/v1/jobs", json=request), status, code)
    assert names(strict_lake / "out") == ["x.csv"]


def test_two_inputs_of_one_name_are_refused_before_anything_is_scored(api: Api, lake: Path) -> None:
    (lake / "in" / "x").mkdir()
    fill(lake, {"a.csv": 3, "x/a.csv": 3}, "csv")
    request = asked(lake, "**/*.csv", output={"url": f"file://{lake}/out/{{stem}}.csv"})
    detail = refused(api.http.post("/v1/jobs", json=request), 422, "invalid-location")
    assert "in/a.csv" in detail
    assert "in/x/a.csv" in detail


def test_inputs_with_results_of_their_own_may_pass_other_columns_through(api: Api, lake: Path) -> None:
    for name in ("a", "b"):
        columns = flowers(3).with_columns(pl.lit(name).alias(f"only_{name}"))
        (lake / "in" / f"{name}.csv").write_bytes(columns.write_csv().encode())
    completed(api, asked(lake, output={"url": f"file://{lake}/out/{{stem}}.csv"}))
    packed = api.result(completed(api, asked(lake, output={"archive": True}))).content
    for name, other in (("a", "b"), ("b", "a")):
        content = (lake / "out" / f"{name}.csv").read_bytes()
        rows = rows_of(content, "csv")
        assert [row[f"only_{name}"] for row in rows] == [name] * 3
        assert f"only_{other}" not in rows[0]
        with zipfile.ZipFile(io.BytesIO(packed)) as archive:
            assert archive.read(f"{name}.csv") == content


@pytest.mark.parametrize("format", ["csv", "parquet"])
def test_an_input_without_records_has_a_result_with_its_own_columns(api: Api, lake: Path, format: str) -> None:
    shapes = {"a": flowers(3).with_columns(more=1), "b": flowers(0).select(["plant", *COLUMNS]).with_columns(own=2)}
    for name, frame in shapes.items():
        (lake / "in" / f"{name}.{format}").write_bytes(encoded(frame, format))
    completed(api, asked(lake, passthrough="all", output={"url": f"file://{lake}/out/{{stem}}.{format}"}))
    alone = api.run(encoded(shapes["b"], format), "iris", passthrough="all")
    assert (lake / "out" / f"b.{format}").read_bytes() == api.result(alone).content


def test_the_address_of_a_result_says_its_format(api: Api, lake: Path) -> None:
    fill(lake, {"a.csv": 3, "b.csv": 4}, "csv")
    completed(api, asked(lake, output={"url": f"file://{lake}/out/all.parquet"}))
    assert pl.read_parquet(lake / "out" / "all.parquet").height == 7
    completed(api, asked(lake, output={"url": f"file://{lake}/out/{{stem}}.jsonl"}))
    assert pl.read_ndjson(lake / "out" / "b.jsonl").height == 4
    completed(api, asked(lake, output={"url": f"file://{lake}/out/rows/", "partition_by": "prediction"}))
    assert pl.read_parquet(lake / "out" / "rows" / "**" / "*.parquet", hive_partitioning=True).height == 7
    completed(api, asked(lake, output={"url": f"file://{lake}/out/{{stem}}.scores"}))
    assert (lake / "out" / "a.scores").read_bytes().count(b"\n") == 4
    completed(api, asked(lake, output={"url": f"file://{lake}/out/all.pq"}))
    assert pl.read_parquet(lake / "out" / "all.pq").height == 7
    completed(api, asked(lake, output={"url": f"file://{lake}/out/all.feather"}))
    assert pl.read_ipc(lake / "out" / "all.feather").height == 7
    named = asked(lake, format="csv", output={"url": f"file://{lake}/out/more.parquet"})
    assert "looks like parquet" in refused(api.http.post("/v1/jobs", json=named), 422, "invalid-location")


@pytest.mark.parametrize("name", ["{stem}.csv.gz", "all.xlsx", "all.ZIP", "all.json.zst", "all.png", "all%2Egz"])
def test_an_address_that_says_what_no_result_is_is_refused(api: Api, lake: Path, name: str) -> None:
    fill(lake, {"a.csv": 3}, "csv")
    output = {"url": f"file://{lake}/out/{name}"}
    for more in ({}, {"format": "csv"}):
        detail = refused(api.http.post("/v1/jobs", json=asked(lake, output=output, **more)), 422, "invalid-location")
        assert "give its address one of the suffixes .csv, " in detail
    assert names(lake / "out") == []


def test_an_input_with_a_column_input_file_keeps_one_of_the_two(api: Api, lake: Path) -> None:
    columns = flowers(2).with_columns(pl.lit("mine").alias("input_file"))
    (lake / "in" / "a.csv").write_bytes(columns.write_csv().encode())
    answer = api.http.post("/v1/jobs", json=asked(lake, input_file=True))
    detail = refused(answer, 422, "schema-mismatch")
    assert "in/a.csv: the input has a column 'input_file', which input_file adds" in detail
    job = completed(api, asked(lake, input_file=True, passthrough="none"))
    assert rows_of(api.result(job).content, "csv")[0]["input_file"] == f"file://{lake}/in/a.csv"


def test_arrays_have_the_address_of_their_input_and_cannot_bring_their_own(
    api: Api, lake: Path, iris_onnx: Path
) -> None:
    [tensor] = [one.name for one in onnx.load(iris_onnx).graph.input]
    given: dict[str, Any] = {tensor: np.ones((3, 4), np.float32)}
    for name, rows in (("a", 2), ("long-b", 1)):
        np.savez(lake / "in" / f"{name}.npz", **{name: values[:rows] for name, values in given.items()})
    job = completed(api, asked(lake, input_file=True, format="npz"))
    with np.load(io.BytesIO(api.result(job).content)) as result:
        found = [f"file://{lake}/in/{name}.npz" for name in ("a", "a", "long-b")]
        assert result["input_file"].tolist() == found
    np.savez(lake / "in" / "a.npz", **given, input_file=np.zeros(3))
    answer = api.http.post(
        "/v1/jobs", json=asked(lake, "a.npz", input_file=True, format="npz", passthrough="input_file")
    )
    assert "in/a.npz: the input has an array 'input_file'" in refused(answer, 422, "schema-mismatch")


def test_a_file_that_was_changed_is_not_opened(tmp_path: Path) -> None:
    """Whatever its path names again when it has been read."""
    file = tmp_path / "a.csv"
    file.write_bytes(b"x\n1\n")
    [found] = find(f"file://{file}", [f"file://{tmp_path}/"], 9)
    file.write_bytes(b"x\n22\n")
    with pytest.raises(InputChanged, match="was changed or removed"):
        locations.open_at(found.url, found.version)


def test_deleting_and_expiring_a_job_leaves_what_its_owner_has(api: Api, lake: Path) -> None:
    fill(lake, {"a.csv": 3, "b.csv": 3}, "csv")
    job = completed(api, asked(lake, output={"url": f"file://{lake}/out/{{stem}}.csv"}))
    assert api.http.delete(f"/v1/jobs/{job['id']}").status_code == 204
    until(lambda: not [key for key in api.stored() if job["id"] in key])
    assert sorted(names(lake / "in")) == sorted(names(lake / "out")) == ["a.csv", "b.csv"]


def test_a_repeated_request_with_a_key_gives_the_same_job(api: Api, lake: Path) -> None:
    fill(lake, {"a.csv": 3}, "csv")
    headers = {"idempotency-key": "tonight"}
    first = ok(api.http.post("/v1/jobs", json=asked(lake), headers=headers), 202)
    (lake / "in" / "b.csv").write_bytes(encoded(flowers(2), "csv"))
    again = ok(api.http.post("/v1/jobs", json=asked(lake), headers=headers), 202)
    assert again["id"] == first["id"]
    problem(api.http.post("/v1/jobs", json=asked(lake, "a.csv"), headers=headers), 422, "idempotency-mismatch")


def test_what_is_missing_or_misspelt_in_the_request_is_named(api: Api, lake: Path) -> None:
    for body, where in [
        ({"model": "iris"}, "input"),
        ({"input": {"urls": []}, "model": "iris"}, "input.urls"),
        ({"input": {"urls": ["file:///x"], "url": 1}, "model": "iris"}, "input.url"),
        (asked(lake, colums=["a"]), "colums"),
    ]:
        answer = api.http.post("/v1/jobs", json=body)
        problem(answer, 422, "invalid-options")
        assert where in orjson.dumps(answer.json()).decode()


def test_a_result_in_parquet_is_partitioned_by_a_column(api: Api, lake: Path) -> None:
    every = fill(lake, {"a.parquet": 30, "b.parquet": 20}).with_columns(
        plant=pl.Series([["x", "y/z", "é 1", None][number % 4] for number in range(50)])
    )
    for name, part in (("a", every[:30]), ("b", every[30:])):
        (lake / "in" / f"{name}.parquet").write_bytes(encoded(part, "parquet"))
    output = {"url": f"file://{lake}/out/run/", "partition_by": "plant"}
    completed(api, asked(lake, output=output))
    assert (lake / "out" / "run" / "plant=x").is_dir()
    read = pl.read_parquet(lake / "out" / "run" / "**" / "*.parquet", hive_partitioning=True)
    counts = dict(read.group_by("plant").len().iter_rows())
    assert counts == dict(every.group_by("plant").len().iter_rows())
    assert "prediction" in read.columns
    detail = refused(api.http.post("/v1/jobs", json=asked(lake, output=output)), 409, "target-exists")
    assert "name an empty folder" in detail


@pytest.mark.parametrize(
    ("values", "folders"),
    [
        (pl.Series(["x", "", None, "__HIVE_DEFAULT_PARTITION__"] * 2), ["__HIVE_DEFAULT_PARTITION__", "x"]),
        (
            pl.Series([10**9, 10**9 + 1, None] * 2, dtype=pl.Datetime("ns")),
            [
                "1970-01-01%2000%3A00%3A01",
                "1970-01-01%2000%3A00%3A01.000000001",
                "__HIVE_DEFAULT_PARTITION__",
            ],
        ),
        (
            pl.Series([1000, 1001, 2], dtype=pl.Duration("ns")),
            ["0%3A00%3A00.000001", "1001%20ns", "2%20ns"],
        ),
    ],
)
def test_values_that_share_a_folder_keep_all_their_records(
    api: Api, lake: Path, values: pl.Series, folders: list[str]
) -> None:
    every = flowers(len(values)).with_columns(kind=values)
    (lake / "in" / "a.parquet").write_bytes(encoded(every, "parquet"))
    completed(api, asked(lake, output={"url": f"file://{lake}/out/run/", "partition_by": "kind"}))
    assert sorted(names(lake / "out" / "run")) == [f"kind={folder}" for folder in folders]
    read = pl.read_parquet(lake / "out" / "run" / "**" / "*.parquet", hive_partitioning=False)
    assert sorted(read["plant"]) == sorted(every["plant"])


def test_a_column_to_partition_by_that_the_result_lacks_is_named(api: Api, lake: Path) -> None:
    fill(lake, {"a.parquet": 3})
    job = submitted(api, asked(lake, output={"url": f"file://{lake}/out/run/", "partition_by": "state"}))
    assert (job["state"], job["error"]["code"]) == ("failed", "invalid-options")
    assert "'state'" in job["error"]["message"]


@pytest.mark.parametrize(
    ("values", "code", "said"),
    [
        ([f"v{number}" for number in range(10_001)], "invalid-options", "'kind' has more than 10000 values"),
        (["a", "é" * 100], "location-refused", "a name of 605 bytes; at most 255 are possible"),
    ],
)
def test_nothing_is_written_where_a_value_cannot_name_a_folder(
    api: Api, lake: Path, values: list[str], code: str, said: str
) -> None:
    for number in range(65):  # in two chunks
        kinds = pl.Series(values if number == 64 else ["first"])
        frame = flowers(len(kinds)).with_columns(kind=kinds)
        (lake / "in" / f"{number:02}.parquet").write_bytes(encoded(frame, "parquet"))
    job = submitted(api, asked(lake, output={"url": f"file://{lake}/out/run/", "partition_by": "kind"}))
    assert (job["state"], job["error"]["code"]) == ("failed", code)
    assert said in job["error"]["message"]
    assert names(lake / "out") == []


@pytest.mark.parametrize("values", [[[1], [2]], [{"a": 1}, {"a": 2}], [b"a", b"b"]])
def test_a_column_to_partition_by_whose_values_name_no_folders_is_refused(
    api: Api, lake: Path, values: list[Any]
) -> None:
    column = pl.Series(values)
    (lake / "in" / "b.parquet").write_bytes(encoded(flowers(2).with_columns(kind=column), "parquet"))
    output = {"url": f"file://{lake}/out/run/", "partition_by": "kind"}
    detail = refused(api.http.post("/v1/jobs", json=asked(lake, output=output)), 422, "invalid-options")
    assert f"'kind' is {column.dtype}" in detail
    empty = flowers(2).with_columns(pl.lit(None).alias("kind"))
    (lake / "in" / "a.parquet").write_bytes(encoded(empty, "parquet"))
    job = submitted(api, asked(lake, output=output))
    assert (job["state"], job["error"]["code"], job["rows"]["ok"]) == ("failed", "invalid-options", 0)
    assert f"'kind' is {column.dtype}" in job["error"]["message"]


def test_an_archive_has_a_result_for_each_input_with_the_bytes_of_a_job_of_its_own(api: Api, lake: Path) -> None:
    fill(lake, {"a.csv": 3, "b b.csv": 40, "c.csv": 0}, "csv")
    job = completed(api, asked(lake, output={"archive": True}))
    answer = api.result(job)
    assert answer.headers["content-type"] == "application/zip"
    with zipfile.ZipFile(io.BytesIO(answer.content)) as archive:
        assert archive.testzip() is None
        assert archive.namelist() == ["a.csv", "b b.csv", "c.csv"]
        for name in ("a.csv", "b b.csv"):
            alone = api.run((lake / "in" / name).read_bytes(), "iris")
            assert archive.read(name) == api.result(alone).content
        assert b"prediction" in archive.read("c.csv")
    problem(api.http.get(job["links"]["result"], params={"format": "parquet"}), 422, "invalid-options")


@pytest.mark.parametrize("output", [{}, {"url": "file:///x", "archive": True}, {"archive": True, "overwrite": True}])
def test_an_output_has_either_an_address_or_an_archive(api: Api, lake: Path, output: dict[str, Any]) -> None:
    fill(lake, {"a.csv": 3}, "csv")
    problem(api.http.post("/v1/jobs", json=asked(lake, output=output)), 422, "invalid-options")
