"""Scores the same data embedded and on the cluster of docker-compose.yml, where every part is killed in the middle, and
compares the digests of the results. Exit status 0: they are equal."""

import argparse
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from commands import Service
from namespaces import NoNamespaces
from ray_hosts import NoCluster
from rich.console import Console

from batchserve.cli.demo import Files, load_flights, train_and_convert
from batchserve.client import Client, Job
from benchmarks import data
from cluster.compose import clean
from cluster.ray_services import HEAD, NODES, RayCluster, on_ray
from cluster.services import Cluster, running

OPTIONS: dict[str, Any] = {"reuse": False, "format": "parquet"}
EQUAL = {"BATCHSERVE_CHUNK_SECONDS": "3600"}
"""So that the chunks, and with them the bytes of a Parquet, do not follow from the speed of a model, which each service
measures for itself when it is registered."""
DISTURBED = "numbers, with kills"
Scores = dict[str, tuple[str, float]]
"""The digest of each result, and the seconds that it took."""
Kills = dict[str, Callable[[], None]]
"""What each does, by its title."""


def main() -> int:
    parser = argparse.ArgumentParser(prog="cluster", description=__doc__)
    parser.add_argument("--rows", type=int, default=10_000_000, help="of the large job")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # the services end with this process
    with tempfile.TemporaryDirectory(prefix="batchserve-cluster-") as name:
        folder = Path(name)
        inputs = made(folder, arguments.rows)
        with embedded(folder / "embedded") as url:
            expected = {title: scored(url, file, title) for title, file in inputs.items()}
        found = {}
        (folder / "cluster").mkdir()
        with running(folder / "cluster", 2, **EQUAL) as cluster:
            found["cluster"] = scored_twice(cluster, inputs, kills_of(cluster))
        (folder / "ray").mkdir()
        try:
            with on_ray(folder / "ray", 1, **EQUAL) as cluster_on_ray:
                found["Ray"] = scored_twice(cluster_on_ray, inputs, kills_on_ray(cluster_on_ray))
        except (NoCluster, NoNamespaces) as error:
            say(f"Without Ray: {error}")
            if os.environ.get("CI") == "true" and not isinstance(error, NoNamespaces):
                raise
    equal = {name: told(name, scores, expected) for name, scores in found.items()}
    return 0 if all(equal.values()) else 1


def told(name: str, found: Scores, expected: Scores) -> bool:
    """Prints what was found. Whether the digests are those of the embedded run."""
    for title, (digest, seconds) in expected.items():
        say(f"{title}: embedded {seconds:.1f} s, {name} {found[title][1]:.1f} s, {found[title][1] / seconds:.2f} x")
        say(f"  {digest}\n  {found[title][0]}")
    digest, seconds = found[DISTURBED]
    say(f"{DISTURBED}, {name}: {seconds:.1f} s\n  {digest}")
    return digest == expected["numbers"][0] and all(found[title][0] == expected[title][0] for title in expected)


def made(folder: Path, rows: int) -> dict[str, Path]:
    """The inputs: all flights of the demo, and numbers. Their models are beside them."""
    files = Files(folder)
    load_flights(None).to_csv(files.data, index=False)
    train_and_convert(Console(), files)
    data.model(folder, "logistic")
    say(f"Making {rows:,} rows of numbers ...")
    return {"flights": files.data, "numbers": data.table(folder, "numbers", ".parquet", rows)}


@contextmanager
def embedded(folder: Path) -> Iterator[str]:
    folder.mkdir()
    service = Service(folder, "serve", "--port", "0", settings=clean() | EQUAL)
    try:
        yield service.wait_for(r"http://127\.0\.0\.1:\d+")[0]
    finally:
        service.end(signal.SIGTERM)


def scored(url: str, file: Path, model: str, act: Callable[[Job], None] = lambda _: None) -> tuple[str, float]:
    """The digest of the result, and the seconds from the upload to its end. `act` is called meanwhile."""
    with Client(url) as client:
        graph = Files(file.parent).model if model == "flights" else file.parent / "logistic.onnx"
        client.models.add(graph, name=model)
        began = time.perf_counter()
        job = client.submit(file, model, **OPTIONS)
        act(job)
        job.wait(timeout=900)
        took = time.perf_counter() - began
        say(f"{model}: {job.rows['ok']:,} rows in {took:.1f} s, attempt {job.data['attempt']}")
        return job.data["result"]["sha256"], took


def scored_twice(cluster: Cluster, inputs: dict[str, Path], kills: Kills) -> Scores:
    """All inputs in peace, and the numbers again with these kills."""
    found = {title: scored(cluster.url, file, title) for title, file in inputs.items()}

    def disturb(job: Job) -> None:
        for title, kill in kills.items():
            progress = await_progress(job, cluster.start_missing)
            if not is_underway(job):
                say(f"  the job has ended before: {title}")
                return
            say(f"  at {progress:.0%}: {title}")
            kill()
        while is_underway(job):
            await_progress(job, cluster.start_missing)

    return found | {DISTURBED: scored(cluster.url, inputs["numbers"], "numbers", disturb)}


def kills_of(cluster: Cluster) -> Kills:
    return {
        "kill -9 of a scoring process": lambda: kill_scoring_process(cluster, "worker 1", "worker 2"),
        "kill -9 of a worker": lambda: restarted(cluster, "worker 1"),
        "a crash of PostgreSQL": cluster.restart_database,
        "kill -9 of the object store": cluster.restart_objects,
        "kill -9 of the API": lambda: restarted(cluster, "api"),
        "kill -9 of the other worker": lambda: restarted(cluster, "worker 2"),
    }


def kills_on_ray(cluster: RayCluster) -> Kills:
    first, second = NODES
    return {
        "kill -9 of a scoring process": lambda: kill_scoring_process(cluster, first, second),
        "kill -9 of the actor of a node": lambda: missed(cluster.kill_process(first, "ray::ScoringHost")),
        "a crash of PostgreSQL": cluster.restart_database,
        "kill -9 of the object store": cluster.restart_objects,
        "kill -9 of the driver": lambda: missed(cluster.kill_process("ray-driver 1", "batchserve worker")),
        "kill -9 of a raylet": lambda: missed(cluster.kill_process(second, "raylet/raylet")),
        "the loss of the head": lambda: cluster.kill(HEAD),
        "the loss of a node": lambda: cluster.kill(first),
    }


def kill_scoring_process(cluster: Cluster, *hosts: str) -> None:
    missed(any(cluster.kill_scoring_process(host) for host in hosts))


def missed(is_killed: bool) -> None:
    if not is_killed:
        say("  there was none")


def restarted(cluster: Cluster, name: str) -> None:
    cluster.kill(name)
    cluster.start_missing()
    cluster.wait_until_ready()


def await_progress(job: Job, meanwhile: Callable[[], None]) -> float:
    """The progress of a job when it has gone on by a little, or has ended."""
    before = None
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        meanwhile()
        job.refresh()
        progress = float(job.data["progress"])
        if before is not None and (progress > before + 0.02 or not is_underway(job)):
            return progress
        before = progress if before is None else before
        time.sleep(0.1)
    raise AssertionError(f"the job does not go on: {job.data}")


def is_underway(job: Job) -> bool:
    return job.data["state"] in ("queued", "running")


def say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
