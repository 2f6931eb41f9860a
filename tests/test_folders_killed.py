"""Runs over many files whose processes are killed: the next run, or the same one, continues where it was."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pandas as pd
import polars as pl
import pytest
from commands import FAST, Service, clean_environment
from waiting import until

from batchserve.client import Client
from batchserve.client.ledger import LEDGER

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]

FILES, ROWS = 40, 3000


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory, iris: pd.DataFrame) -> Path:
    """Files of thousands of flowers, no two of them equal."""
    folder = tmp_path_factory.mktemp("inputs")
    for number in range(FILES):
        frame = iris.sample(ROWS, replace=True, random_state=number).reset_index(drop=True)
        frame.insert(0, "flower", range(number * ROWS, (number + 1) * ROWS))
        frame.to_csv(folder / f"{number:02d}.csv", index=False)
    return folder


@contextmanager
def served(folder: Path, iris_onnx: Path, port: int = 0) -> Iterator[Service]:
    # On a busy machine leases of a second lapse, which is none of the faults that are tested here.
    settings = FAST | {"BATCHSERVE_CRASHES": "1000000"}
    service = Service(folder, "serve", "--port", str(port), settings=settings)
    try:
        service.url = service.wait_for(r" at (http://\S+) ")[1]
        with Client(service.url, max_retries=5) as client:
            client.models.add(iris_onnx, name="iris")
        yield service
    finally:
        service.end()


@contextmanager
def predicting(folder: Path, inputs: Path, url: str) -> Iterator["subprocess.Popen[str]"]:
    command = [sys.executable, "-m", "batchserve", "predict", str(inputs), "-m", "iris", "-o", "out", "--json"]
    environment = clean_environment() | {"BATCHSERVE_URL": url}
    with subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def written(folder: Path) -> int:
    """Lines of the log so far."""
    log = folder / "out" / LEDGER
    return log.read_bytes().count(b"\n") if log.exists() else 0


def has_come_to(process: "subprocess.Popen[str]", folder: Path, lines: int) -> bool:
    """Whether the log is so long, or the run has ended."""
    return written(folder) >= lines or process.poll() is not None


def check(folder: Path, url: str, told: dict[str, object]) -> None:
    """Each file has one whole result, in the order of its records, and one job."""
    assert isinstance(told["files"], list)
    assert len(told["files"]) == FILES
    for number in range(FILES):
        frame = pl.read_csv(folder / "out" / f"{number:02d}.predictions.csv")
        assert frame["flower"].to_list() == list(range(number * ROWS, (number + 1) * ROWS))
        assert frame["prediction"].null_count() == 0
    with Client(url) as client:
        jobs = list(client.jobs.list())
    assert len(jobs) == FILES
    assert {job.state for job in jobs} == {"completed"}


@pytest.mark.parametrize("seed", range(3))
def test_a_run_that_is_killed_at_any_time_is_continued_and_no_file_is_sent_twice(
    tmp_path: Path, iris_onnx: Path, inputs: Path, seed: int
) -> None:
    chance = random.Random(seed)
    with served(tmp_path, iris_onnx) as service:
        for _ in range(5):
            more = written(tmp_path) + chance.randrange(1, 30)
            with predicting(tmp_path, inputs, service.url) as process:
                until(partial(has_come_to, process, tmp_path, more))
                process.kill()
            if seed == 2:  # some files are half written
                for path in (tmp_path / "out").glob("*.predictions.csv"):
                    os.truncate(path, path.stat().st_size // 2)
        with predicting(tmp_path, inputs, service.url) as process:
            stdout, stderr = process.communicate(timeout=90)
        assert process.returncode == 0, stderr
        check(tmp_path, service.url, json.loads(stdout))


def test_a_run_continues_when_its_server_is_killed_and_started_again(
    tmp_path: Path, iris_onnx: Path, inputs: Path
) -> None:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        port = listening.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    with served(tmp_path, iris_onnx, port) as first, predicting(tmp_path, inputs, url) as process:
        until(lambda: written(tmp_path) >= FILES)
        first.end(signal.SIGKILL)
        with served(tmp_path, iris_onnx, port):
            stdout, stderr = process.communicate(timeout=120)
            assert process.returncode == 0, stderr
            check(tmp_path, url, json.loads(stdout))


def test_two_hundred_small_files_are_scored_by_one_command(tmp_path: Path, iris_onnx: Path, iris: pd.DataFrame) -> None:
    for number in range(200):
        path = tmp_path / "in" / f"{number % 10}" / f"{number:03d}.csv"
        path.parent.mkdir(parents=True, exist_ok=True)
        iris.iloc[number % 50 : number % 50 + 5].assign(flower=number).to_csv(path, index=False)
    with served(tmp_path, iris_onnx) as service, predicting(tmp_path, tmp_path / "in", service.url) as process:
        stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 0, stderr
    assert {file["state"] for file in json.loads(stdout)["files"]} == {"completed"}
    for number in range(200):
        frame = pl.read_csv(tmp_path / "out" / f"{number % 10}" / f"{number:03d}.predictions.csv")
        assert frame["flower"].to_list() == [number] * 5
