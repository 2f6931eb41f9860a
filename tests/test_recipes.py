"""docs/recipes.md: other programs start batchserve and read its results. deploy/systemd is in test_deploy.py."""

import ast
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import polars as pl
import pytest
from commands import clean_environment

from batchserve.client import Client

RECIPES = (Path(__file__).resolve().parent.parent / "docs" / "recipes.md").read_text()


ADDRESS = re.compile(r"http://127.0.0.1:8000/v1/download/[0-9a-f-]{36}")
COUNTS = [("setosa", 50), ("versicolor", 48), ("virginica", 52)]


def fences(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", RECIPES, re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def job(server: str, iris_onnx: Path, iris: pd.DataFrame, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The ID of a job with a result in Parquet."""
    path = tmp_path_factory.mktemp("recipes") / "iris.csv"
    iris.to_csv(path, index=False)
    with Client(server) as client:
        client.models.add(iris_onnx, name="iris")
        return client.submit(path, "iris", format="parquet").wait().id


def test_the_line_of_cron_scores_what_is_new(server: str, tmp_path: Path, iris_onnx: Path, iris: pd.DataFrame) -> None:
    with Client(server) as client:
        client.models.add(iris_onnx, name="iris")
    line = next(line for line in fences("crontab")[0].splitlines() if line[0].isdecimal())
    command = line.split(maxsplit=5)[5].replace("/srv/night", str(tmp_path))
    command = command.replace("/opt/batchserve/bin/batchserve", f"{sys.executable} -m batchserve")
    environment = clean_environment() | {"BATCHSERVE_URL": server}
    (tmp_path / "in").mkdir()
    for night, state in enumerate((["completed"], ["unchanged", "completed"])):
        iris.head(10 + night).to_csv(tmp_path / "in" / f"{night}.csv", index=False)
        done = subprocess.run(["sh", "-c", command], env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert [line.split("\t")[1] for line in (tmp_path / "last.tsv").read_text().splitlines()] == state
        assert len(pl.read_csv(tmp_path / "out" / f"{night}.predictions.csv")) == 10 + night


def test_polars_reads_a_result_from_its_address(server: str, job: str) -> None:
    code = next(text for text in fences("python") if "scan_parquet" in text)
    names: dict[str, Any] = {}
    exec(ADDRESS.sub(f"{server}/v1/download/{job}", code), names)  # noqa: S102 - it is of the page
    assert names["setosa"].height == 50


def printed(code: str, server: str) -> str:
    """What a program prints. DuckDB runs in processes of its own: it reports objects that outlive it."""
    command, environment = [sys.executable, "-c", code], clean_environment() | {"BATCHSERVE_URL": server}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_duckdb_reads_a_result_that_the_client_has_fetched(server: str, job: str) -> None:
    code = next(text for text in fences("python") if "duckdb" in text)
    code = re.sub(r"[0-9a-f]{8}-[0-9a-f-]{27}", job, code) + "print(counts)"
    assert ast.literal_eval(printed(code, server)) == COUNTS


def test_duckdb_reads_a_result_from_its_address(server: str, job: str) -> None:
    (code,) = fences("sql")
    loads = "import duckdb\ntry:\n    duckdb.sql('LOAD httpfs')\nexcept duckdb.Error as error:\n    print(error)"
    if missing := printed(loads, server):
        pytest.skip(f"DuckDB has no httpfs here: {missing.splitlines()[0]}")
    query = ADDRESS.sub(f"{server}/v1/download/{job}", code.partition("\nSELECT ")[2])
    run = f"import duckdb\nduckdb.sql('LOAD httpfs')\nprint(duckdb.sql({'SELECT ' + query!r}).fetchall())"
    assert ast.literal_eval(printed(run, server)) == COUNTS
