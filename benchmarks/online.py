"""Online predictions of one row: the time of the model inside ONNX Runtime, and the latency over HTTP."""

import json
import statistics
import timeit
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnxruntime
from sklearn.datasets import load_iris
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LogisticRegression

from batchserve.conversion import convert
from benchmarks import bare, processes, service
from benchmarks.http import latencies, request, run
from benchmarks.load import ROUNDS, milliseconds, per_second
from benchmarks.paths import Bench
from benchmarks.results import Gap, Measurement, Runs

TITLE = "online predictions"
PREFIX = "online, 1 row, "
"""The beginning of the names of all figures."""
CLIENTS = 8
RUNS = 200
"""Calls in one timing of a model; its figure is the median of REPEATS timings."""
REPEATS = 9
REQUESTS = 4000
"""Online predictions in a second that CLIENTS clients should get."""
ESTIMATORS: dict[str, Callable[[], Any]] = {
    "logistic regression": lambda: LogisticRegression(max_iter=300),
    "10-tree forest": lambda: RandomForestClassifier(10, random_state=0),
}
JSON = {"content-type": "application/json"}


@dataclass(frozen=True, slots=True)
class Trained:
    estimator: Any
    row: np.ndarray
    """Float32 [1, 4]: one flower."""
    graph: Path


def measure(bench: Bench, *, seconds: float) -> Iterator[Measurement | Gap]:
    """`seconds`: of each load of requests."""
    with TemporaryDirectory(dir=bench.folder) as name:
        folder = Path(name)
        models = {kind: train(kind, folder) for kind in ESTIMATORS}
        bench.say("one row in ONNX Runtime and in scikit-learn")
        for kind, trained in models.items():
            yield from _alone(kind, trained)
        yield from _over_http(bench, folder, models["logistic regression"].graph, seconds)


def train(kind: str, folder: Path) -> Trained:
    """One of ESTIMATORS, fitted to the flowers of iris, and its graph in `folder`."""
    flowers = load_iris(as_frame=True)
    graph = folder / f"{kind.replace(' ', '-')}.onnx"
    convert(ESTIMATORS[kind]().fit(flowers.data, flowers.target_names[flowers.target]), flowers.data, graph)
    # Without column names, as a script would call it: scikit-learn takes 40 microseconds more to compare them.
    values = flowers.data.to_numpy()
    return Trained(ESTIMATORS[kind]().fit(values, flowers.target), values[:1].astype(np.float32), graph)


def _alone(kind: str, trained: Trained) -> Iterator[Measurement]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(trained.graph, options)
    ours = _microseconds(lambda: session.run(None, {"input": trained.row}))
    for method in ("predict", "predict_proba"):
        theirs = _microseconds(partial(getattr(trained.estimator, method), trained.row))
        yield Measurement.of(f"{PREFIX}{kind}: one run in ONNX Runtime / scikit-learn {method}", ours, theirs, "us")


def _microseconds(call: Callable[[], object]) -> Runs:
    """Of one call, in each timing."""
    return Runs([seconds / RUNS * 1e6 for seconds in timeit.repeat(call, number=RUNS, repeat=REPEATS)])


def flower() -> bytes:
    """The JSON record of one flower."""
    return json.dumps(load_iris(as_frame=True).data.head(1).to_dict("records")).encode()


def _over_http(bench: Bench, folder: Path, graph: Path, seconds: float) -> Iterator[Measurement]:
    body = flower()
    ours = request("POST", "/v1/models/iris/predict", body, JSON)
    floor = request("POST", "/predict", body, JSON)
    home = folder / "server"
    home.mkdir()
    with processes.batchserve(home) as server, processes.bare(folder, **{bare.MODEL: str(graph)}) as plain:
        service.register(server.url, "iris", graph)
        run(latencies(server.url, ours, seconds=1.0, clients=CLIENTS))  # both interactive processes are warm then
        for clients in (1, CLIENTS):
            bench.say(f"one row over HTTP, {clients} client{'s' if clients > 1 else ''}")
            answered: list[list[float]] = []
            routed: list[list[float]] = []
            for _ in range(ROUNDS):
                answered.append(run(latencies(server.url, ours, seconds=seconds / ROUNDS, clients=clients)))
                routed.append(run(latencies(plain.url, floor, seconds=seconds / ROUNDS, clients=clients)))
            yield from _compared(clients, answered, routed)


def _compared(clients: int, ours: list[list[float]], floor: list[list[float]]) -> Iterator[Measurement]:
    """From the seconds of every call in each round."""
    title = f"{PREFIX}{clients} client{'s' if clients > 1 else ''}:"
    against = "bare Starlette with ONNX Runtime"
    if clients == 1:
        yield Measurement.of(f"{title} median / 0.5 ms", milliseconds(ours, 50), 0.5, "ms")
    mean, bare_mean = (Runs([1000 * statistics.fmean(taken) for taken in rounds]) for rounds in (ours, floor))
    yield Measurement.of(f"{title} mean / {against}", mean, bare_mean, "ms")
    for name, percent in {"median": 50, "P95": 95, "P99": 99}.items():
        yield Measurement.of(
            f"{title} {name} / {against}", milliseconds(ours, percent), milliseconds(floor, percent), "ms"
        )
    rate, bare_rate = (Runs([per_second(taken, clients) for taken in rounds]) for rounds in (ours, floor))
    if clients == CLIENTS:
        yield Measurement.of(f"{title} requests per second / 4,000", rate, REQUESTS, "req/s")
    yield Measurement.of(f"{title} requests per second / {against}", rate, bare_rate, "req/s")
