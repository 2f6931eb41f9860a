"""The hosts of a Ray cluster instead of this one: batchserve with both engines, and Ray Data on the same cluster."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from operator import truediv
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks import data, processes, servers, service
from benchmarks.environments import Unavailable, last_line
from benchmarks.paths import MILLION, PEER_TIMEOUT, SCRIPTS, WARMING, Bench, check_equal, size
from benchmarks.results import Gap, Measurement, Runs

TITLE = "Ray"
PATH = f"{TITLE}, Parquet -> LR -> Parquet"
MODEL = "logistic"
PEER = "Ray Data on the same cluster"
HOSTS = 2
"""Each with one scoring process, and an actor of Ray Data."""
START = 60.0


def measure(bench: Bench, *, rows: int = MILLION) -> Iterator[Measurement | Gap]:
    bench.say(f"{PATH}, {size(rows)}")
    try:
        with ExitStack() as opened:
            yield from _compared(bench, opened, rows)
    except Unavailable as error:
        yield Gap(f"{PATH}, {size(rows)}", str(error))


def _compared(bench: Bench, opened: ExitStack, rows: int) -> Iterator[Measurement | Gap]:
    cluster = opened.enter_context(servers.ray_cluster())
    home = Path(opened.enter_context(TemporaryDirectory(dir=bench.folder)))
    engine = {"BATCHSERVE_ENGINE": cluster.address, "BATCHSERVE_RAY_RESERVED": '{"CPU": 0.1}'} | cluster.environment
    sites = (_site(bench, home / "ray", cluster.command, engine), _site(bench, home / "local", (), {}))
    urls = [opened.enter_context(site) for site in sites]
    source = data.table(bench.folder, "numbers", ".parquet", rows)
    ours, local, theirs = Runs(), Runs(), Runs()
    failed = ""
    for number in range(bench.our_repeats(rows)):
        for url, runs in zip(urls, (ours, local), strict=True):
            os.sync()
            result = home / f"result-{urls.index(url)}.parquet"
            runs.add(service.three_calls(url, MODEL, source, result, "parquet").predict)
        if number == 0:
            check_equal(home / "result-1.parquet", home / "result-0.parquet")
        try:
            theirs.add(_peer(bench, cluster, source, home / "peer"))
        except Unavailable as error:
            failed = str(error)
    name = f"{PATH}, {size(rows)}"
    yield Measurement.of(f"{name}: queued -> completed / local engine", ours, local, "s")
    if theirs.values:
        speed, their_speed = (runs.each(partial(truediv, rows)) for runs in (ours, theirs))
        yield Measurement.of(f"{name}: speed / {PEER}", speed, their_speed, "rows/s")
    else:
        yield Gap(f"{name}: speed / {PEER}", failed)


def _peer(bench: Bench, cluster: servers.RayCluster, source: Path, target: Path) -> float:
    """The seconds of its pipeline. Raises Unavailable, also where Ray Data is not installed."""
    graph = data.model(bench.folder, MODEL).graph
    os.sync()
    taken = processes.timed_script(
        Path(sys.executable), SCRIPTS / "ray_data.py", graph, source, target, HOSTS, timeout=PEER_TIMEOUT,
        before=cluster.command, variables=cluster.environment | {"RAY_ADDRESS": cluster.address.removeprefix("ray://")},
    )  # fmt: skip
    return taken.seconds


@contextmanager
def _site(bench: Bench, home: Path, before: Sequence[str], variables: Mapping[str, str]) -> Iterator[str]:
    """A server and a worker, each in a process of its own, on PostgreSQL; yields the address when it has been warmed
    up."""
    home.mkdir()
    with servers.database() as address, ExitStack() as opened:
        own = {"BATCHSERVE_DATABASE": address, "BATCHSERVE_STORAGE": str(home / "storage")}
        own |= {"BATCHSERVE_PROCESSES": str(HOSTS)}
        command = [sys.executable, "-m", "batchserve", "serve", "--port", "0", "--no-worker"]
        url = opened.enter_context(processes.started(command, home, **own)).url
        opened.enter_context(_worker(home, before, own | dict(variables)))
        service.register(url, MODEL, data.model(bench.folder, MODEL).graph)
        for _ in range(4):
            rows = data.table(bench.folder, "numbers", ".parquet", 4 * WARMING)
            service.three_calls(url, MODEL, rows, home / "warm", "parquet")
        yield url


@contextmanager
def _worker(home: Path, before: Sequence[str], variables: Mapping[str, str]) -> Iterator[None]:
    """When it has all its processes, those of other hosts too. Raises Unavailable."""
    log = home / "worker.log"
    joined = HOSTS if "BATCHSERVE_ENGINE" in variables else 0
    command = [*before, sys.executable, "-m", "batchserve", "worker"]
    own = processes.environment() | dict(variables) | {"BATCHSERVE_LOG_FORMAT": "json"}
    with log.open("wb") as output, subprocess.Popen(command, cwd=home, stdout=output, stderr=output, env=own) as worker:
        try:
            until = time.monotonic() + START
            while (said := log.read_text()).count('"host_join"') < joined or '"worker_start"' not in said:
                if worker.poll() is not None or time.monotonic() > until:
                    raise Unavailable(f"the worker did not start: {last_line(said)}")
                time.sleep(0.05)
            yield
        finally:
            worker.terminate()
            try:
                worker.wait(processes.STOP_TIMEOUT)
            except subprocess.TimeoutExpired:
                worker.kill()
