"""docs/recipes.md: Airflow, Dagster and Prefect score the files of a date. Each runs in an environment of its own."""

import os
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pandas as pd
import polars as pl
import pytest
from commands import FAST, Service, clean_environment
from environments import client_wheel, install, new_environment
from waiting import until

from batchserve import Client

pytestmark = [pytest.mark.orchestrators, pytest.mark.timeout(900)]  # installing them takes a minute or two

PAGE = (Path(__file__).resolve().parent.parent / "docs" / "recipes.md").read_text()
PINS = Path(__file__).resolve().parent / "orchestrators"
DAY = "2026-11-29"
SOON = {"timedelta(minutes=10)": "timedelta(seconds=1)", "delay=600": "delay=1", "_seconds=600": "_seconds=1"}
"""Pauses between two tries."""

Run = Callable[[str], subprocess.Popen[str]]
Recipe = tuple[str, dict[str, str]]
"""The command that runs it for a day, `$1`, in the folder where it was written; and what its environment has."""


def written(section: str, lake: Path, *files: Path) -> None:
    """Writes the programs of a section of the page into files."""
    text = PAGE.partition(f"### {section}\n")[2].partition("\n## ")[0].partition("\n### ")[0]
    programs = re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    for file, program in zip(files, programs, strict=True):
        file.parent.mkdir(parents=True, exist_ok=True)
        for long, short in SOON.items():
            program = program.replace(long, short)
        file.write_text(program.replace("/srv/night", str(lake)))


def airflow(folder: Path, lake: Path) -> Recipe:
    written("Airflow", lake, folder / "plugins" / "batchserve_airflow.py", folder / "dags" / "night.py")
    own = {"AIRFLOW_HOME": str(folder), "AIRFLOW__CORE__LOAD_EXAMPLES": "False"}
    return 'airflow db migrate && airflow dags test night "$1"', own


def dagster(folder: Path, lake: Path) -> Recipe:
    written("Dagster", lake, folder / "night.py")
    (folder / "dagster.yaml").write_text("telemetry: {enabled: false}\n")
    return 'dagster asset materialize -f night.py --select scores --partition "$1"', {"DAGSTER_HOME": str(folder)}


def prefect(folder: Path, lake: Path) -> Recipe:
    written("Prefect", lake, folder / "night.py")
    own = {"PREFECT_HOME": str(folder), "PREFECT_SERVER_ANALYTICS_ENABLED": "false"}
    return "python -c \"import datetime, night; night.night(datetime.date.fromisoformat('$1'))\"", own


RECIPES = {"airflow": airflow, "dagster": dagster, "prefect": prefect}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return client_wheel(tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module", params=[pytest.param(name, marks=pytest.mark.xdist_group(name)) for name in RECIPES])
def programs(request: pytest.FixtureRequest, wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the programs of one of them, which is named after it."""
    python = new_environment(tmp_path_factory.mktemp("environment") / request.param)
    install(python, "-r", PINS / f"{request.param}.txt", wheel)
    return python.parent


@pytest.fixture
def lake(tmp_path: Path, iris: pd.DataFrame) -> Path:
    """In place of /srv/night."""
    for name, rows in ((f"{DAY}-a.csv", 100), (f"{DAY}-b.csv", 50), ("2026-11-30.csv", 7)):
        path = tmp_path / "lake" / "in" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        iris.head(rows).to_csv(path, index=False)
    return tmp_path / "lake"


@pytest.fixture
def settings(lake: Path) -> dict[str, str]:
    prefix = f'{{"default": ["{lake.as_uri()}/"]}}'
    return {**FAST, "BATCHSERVE_INPUT_PREFIXES": prefix, "BATCHSERVE_OUTPUT_PREFIXES": prefix}


@pytest.fixture
def server(tmp_path: Path, settings: dict[str, str], iris_onnx: Path) -> Iterator[str]:
    """One without a worker."""
    service = Service(tmp_path, "serve", "--no-worker", "--port", "0", settings=settings)
    try:
        url = service.wait_for(r" at (http://\S+) ")[1]
        with Client(url) as client:
            client.models.add(iris_onnx, name="iris")
        yield url
    finally:
        service.end()


@pytest.fixture
def worker(tmp_path: Path, settings: dict[str, str]) -> Iterator[Callable[[], None]]:
    """Starts one."""
    started: list[Service] = []
    yield lambda: started.append(Service(tmp_path, "worker", settings=settings))
    for service in started:
        service.end()


@pytest.fixture
def run(programs: Path, server: str, lake: Path, tmp_path: Path) -> Run:
    """Starts the recipe for a day."""
    folder = tmp_path / "recipe"
    folder.mkdir()
    command, own = RECIPES[programs.parent.name](folder, lake)
    path = f"{programs}{os.pathsep}{os.environ['PATH']}"
    environment = clean_environment() | {"BATCHSERVE_URL": server, "DO_NOT_TRACK": "1", "PATH": path} | own

    def start(day: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            ["bash", "-c", command, "recipe", day],
            cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip

    return start


def scored(lake: Path) -> dict[str, int]:
    """Results by name, with their numbers of rows."""
    return {path.name: pl.read_parquet(path)["prediction"].len() for path in (lake / "out").glob("*")}


def test_the_files_of_a_date_are_scored(run: Run, worker: Callable[[], None], server: str, lake: Path) -> None:
    worker()
    with run(DAY) as ran:
        told = ran.communicate(timeout=300)[0]
    assert ran.returncode == 0, told
    assert scored(lake) == {f"{DAY}.parquet": 150}
    with Client(server) as client:
        (job,) = client.jobs.list()
    assert job.id in told


def test_a_further_try_continues_with_the_job_of_the_first(
    run: Run, worker: Callable[[], None], server: str, lake: Path
) -> None:
    with Client(server) as client, run(DAY) as ran:
        until(lambda: client.jobs.count() == 1 or ran.poll() is not None)
        (job,) = client.jobs.list()
        job.cancel()
        until(lambda: job.refresh().state == "queued" or ran.poll() is not None)
        worker()
        told = ran.communicate(timeout=300)[0]
        assert ran.returncode == 0, told
        assert [found.id for found in client.jobs.list()] == [job.id]
    assert scored(lake) == {f"{DAY}.parquet": 150}


def test_a_date_without_files_fails_and_is_named(run: Run, lake: Path) -> None:
    with run("2026-11-02") as ran:
        told = ran.communicate(timeout=300)[0]
    assert ran.returncode != 0, told
    assert f"{lake.as_uri()}/in/2026-11-02*.csv" in told
    assert scored(lake) == {}
