"""The simulation of clusters, and the program that measures what it needs."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.scaling.simulation import Cluster, Costs, simulate

ROOT = Path(__file__).resolve().parent.parent
FREE = Costs(
    driver=0.0, commit=1e-9, commits=1e9, claim=0.0, plan=0.0, read=0.0, score=1.0, write=0.0, assemble=0.0, bytes=0
)
"""A chunk of a second that costs nothing but its scoring."""


def seconds(costs: Costs, cluster: Cluster, chunks: int = 400) -> float:
    return simulate(chunks, costs, cluster).seconds


def test_scoring_is_shared_by_all_processes_of_all_hosts() -> None:
    assert seconds(FREE, Cluster(1, 1)) == pytest.approx(400.0)
    assert seconds(FREE, Cluster(1, 2)) == pytest.approx(200.0)
    assert seconds(FREE, Cluster(10, 2)) == pytest.approx(20.0)
    assert simulate(400, FREE, Cluster(10, 2)).bottleneck == "scoring"


def test_a_driver_does_one_thing_at_a_time_and_a_second_one_takes_half_of_the_jobs() -> None:
    costs = replace(FREE, driver=1.0)
    outcome = simulate(400, costs, Cluster(100, 1))
    assert outcome.seconds == pytest.approx(401.0)
    assert outcome.bottleneck == "driver"
    assert seconds(costs, Cluster(100, 1, jobs=2)) == pytest.approx(401.0)
    assert seconds(costs, Cluster(100, 1, jobs=2, drivers=2)) == pytest.approx(201.0)


def test_the_database_is_shared_by_all_drivers() -> None:
    costs = replace(FREE, commit=1.0, commits=2.0)
    assert seconds(costs, Cluster(100, 1, jobs=4, drivers=4)) == pytest.approx(200.0, rel=0.05)
    assert simulate(400, costs, Cluster(100, 1, jobs=4, drivers=4)).bottleneck == "database"
    assert seconds(costs, Cluster(100, 1)) == pytest.approx(400.0, rel=0.05)  # it waits for each of its commits


def test_a_storage_moves_the_bytes_of_one_chunk_after_the_other() -> None:
    costs = replace(FREE, read=1.0, write=1.0, bytes=2_000_000)
    assert seconds(costs, Cluster(100, 1)) == pytest.approx(12.0)
    slow = simulate(400, costs, Cluster(100, 1, bandwidth=2_000_000.0))
    assert slow.seconds == pytest.approx(400.0, rel=0.05)
    assert slow.bottleneck == "storage"


def test_a_job_is_planned_and_assembled_by_one_process() -> None:
    planned = simulate(400, replace(FREE, plan=1.0), Cluster(100, 1))
    assert planned.seconds == pytest.approx(400.0, rel=0.05)
    assert planned.bottleneck == "planning"
    assembled = replace(FREE, assemble=1.0)
    assert seconds(assembled, Cluster(100, 1)) == pytest.approx(404.0)
    assert seconds(assembled, Cluster(100, 1, jobs=4)) == pytest.approx(104.0)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_program_prints_costs_limits_the_check_of_the_simulation_and_simulated_clusters(tmp_path: Path) -> None:
    sizes = {"rows": 120_000, "chunks": 10, "calls": 50, "repeats": 1, "processes": 1, "simulated-rows": 10**7}
    options = [word for name, value in sizes.items() for word in (f"--{name}", str(value))]
    command = [sys.executable, "-m", "benchmarks.scaling", *options, "--hosts", "3", "--folder", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for heading in (
        "### Milliseconds of a chunk",
        "### A call that does nothing",
        "### What saturates first",
        "### Simulated and measured",
        "### 10,000,000 rows on 3 hosts",
        "### A second driver for 8 jobs",
    ):
        assert heading in done.stdout
    assert "| SQLite, folder | " in done.stdout
