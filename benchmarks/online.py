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
from benchmarks.paths import Bench
from benchmarks.results import Gap, Measurement

TITLE = "online predictions"
PREFIX = "online, 1 row, "
"""The beginning of the names of all figures."""
CLIENTS = 8
RUNS = 200
"""Calls in one timing of a model; its figure is the median of REPEATS timings."""
REPEATS = 9
ROUNDS = 3
"""Loads of requests, sent to our server and to the bare route in turn."""
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
        models = {kind: _train(kind, folder) for kind in ESTIMATORS}
        bench.say("one row in ONNX Runtime and in scikit-learn")
        for kind, trained in models.items():
            yield from _alone(kind, trained)
        yield from _over_http(bench, folder, models["logistic regression"].graph, seconds)


def _train(kind: str, folder: Path) -> Trained:
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
        yield Measurement(
            f"{PREFIX}{kind}: one run in ONNX Runtime / scikit-learn {method}",
            *(ours, theirs), "us", None, None, REPEATS, REPEATS,
        )  # fmt: skip


def _microseconds(call: Callable[[], object]) -> float:
    return statistics.median(timeit.repeat(call, number=RUNS, repeat=REPEATS)) / RUNS * 1e6


def _over_http(bench: Bench, folder: Path, graph: Path, seconds: float) -> Iterator[Measurement]:
    flowers = load_iris(as_frame=True).data
    body = json.dumps(flowers.head(1).to_dict("records")).encode()
    ours = request("POST", "/v1/models/iris/predict", body, JSON)
    floor = request("POST", "/predict", body, JSON)
    home = folder / "server"
    home.mkdir()
    with processes.batchserve(home) as server, processes.bare(folder, **{bare.MODEL: str(graph)}) as plain:
        service.register(server.url, "iris", graph)
        run(latencies(server.url, ours, seconds=1.0, clients=CLIENTS))  # both interactive processes are warm then
        for clients in (1, CLIENTS):
            bench.say(f"one row over HTTP, {clients} client{'s' if clients > 1 else ''}")
            answered: list[float] = []
            routed: list[float] = []
            for _ in range(ROUNDS):
                answered += run(latencies(server.url, ours, seconds=seconds / ROUNDS, clients=clients))
                routed += run(latencies(plain.url, floor, seconds=seconds / ROUNDS, clients=clients))
            yield from _compared(clients, answered, routed, seconds)


def _compared(clients: int, ours: list[float], floor: list[float], seconds: float) -> Iterator[Measurement]:
    title = f"{PREFIX}{clients} client{'s' if clients > 1 else ''}:"
    against = "bare Starlette with ONNX Runtime"
    median = statistics.median(ours) * 1000
    if clients == 1:
        yield Measurement(f"{title} median / 0.5 ms", median, 0.5, "ms")
    figures: dict[str, Callable[[list[float]], float]] = {
        "mean": statistics.fmean,
        "median": statistics.median,
        "P95": lambda taken: float(np.percentile(taken, 95)),
        "P99": lambda taken: float(np.percentile(taken, 99)),
    }
    for name, figure in figures.items():
        yield Measurement(f"{title} {name} / {against}", 1000 * figure(ours), 1000 * figure(floor), "ms")
    yield Measurement(f"{title} requests per second / {against}", len(ours) / seconds, len(floor) / seconds, "req/s")
