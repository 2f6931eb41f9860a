"""Scores the same data embedded and on the cluster of docker-compose.yml, where every part is killed in the middle, and
compares the digests of the results. Exit status 0: they are equal."""

import argparse
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from commands import Service
from rich.console import Console

from batchserve.cli.demo import Files, load_flights, train_and_convert
from batchserve.client import Client, Job
from benchmarks import data
from cluster.compose import clean
from cluster.services import Cluster, running

OPTIONS: dict[str, Any] = {"reuse": False, "format": "parquet"}


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
        (folder / "cluster").mkdir()
        with running(folder / "cluster") as cluster:
            found = {title: scored(cluster.url, file, title) for title, file in inputs.items()}
            disturbed = scored_under_kills(cluster, inputs["numbers"])
    for title, (digest, seconds) in expected.items():
        say(f"{title}: embedded {seconds:.1f} s, cluster {found[title][1]:.1f} s, {found[title][1] / seconds:.2f} x")
        say(f"  {digest}\n  {found[title][0]}")
    say(f"numbers, with kills: {disturbed[1]:.1f} s\n  {disturbed[0]}")
    equal = all(found[title][0] == digest for title, (digest, _) in expected.items())
    return 0 if equal and disturbed[0] == expected["numbers"][0] else 1


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
    service = Service(folder, "serve", "--port", "0", settings=clean())
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


def scored_under_kills(cluster: Cluster, file: Path) -> tuple[str, float]:
    kills: dict[str, Callable[[], None]] = {
        "kill -9 of a scoring process": lambda: kill_scoring_process(cluster),
        "kill -9 of a worker": lambda: restarted(cluster, "worker 1"),
        "a crash of PostgreSQL": cluster.restart_database,
        "kill -9 of the object store": cluster.restart_objects,
        "kill -9 of the API": lambda: restarted(cluster, "api"),
        "kill -9 of the other worker": lambda: restarted(cluster, "worker 2"),
    }

    def disturb(job: Job) -> None:
        for title, kill in kills.items():
            progress = await_progress(job)
            say(f"  at {progress:.0%}: {title}")
            kill()

    return scored(cluster.url, file, "numbers", disturb)


def kill_scoring_process(cluster: Cluster) -> None:
    if not (cluster.kill_scoring_process("worker 1") or cluster.kill_scoring_process("worker 2")):
        say("  there was none")


def restarted(cluster: Cluster, name: str) -> None:
    cluster.kill(name)
    cluster.start_missing()
    cluster.wait_until_ready()


def await_progress(job: Job) -> float:
    """The progress of a job when it has gone on by a little, or has ended."""
    before = None
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        job.refresh()
        progress = float(job.data["progress"])
        if before is not None and (progress > before + 0.02 or job.data["state"] not in ("queued", "running")):
            return progress
        before = progress if before is None else before
        time.sleep(0.1)
    raise AssertionError(f"the job does not go on: {job.data}")


def say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
