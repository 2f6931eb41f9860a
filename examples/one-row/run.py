"""How long one row takes: in process with the three usual formats of a model, and over HTTP."""

import subprocess
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from statistics import mean, median, quantiles
from typing import Any

import httpx2
import joblib
import numpy as np
import onnxruntime
from sklearn.datasets import load_iris
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LogisticRegression

import batchserve
from batchserve import Client

Answer = Callable[[np.ndarray], np.ndarray]
"""From rows, float32 [n, 4], to probabilities [n, 3]."""

COLD = {
    ".joblib": "import joblib; joblib.load(file).predict_proba(rows)",
    ".onnx": "import onnxruntime; onnxruntime.InferenceSession(file).run(None, {'input': rows})",
    ".pt": "import torch; torch.jit.load(file)(torch.tensor(rows))",
}
"""The code that scores the first row in a new process, by the suffix of the file."""


def open_pickle(path: Path) -> Answer:
    model = joblib.load(path)
    return lambda rows: np.asarray(model.predict_proba(rows))


def open_onnx(path: Path) -> Answer:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options)
    return lambda rows: np.asarray(session.run(["probabilities"], {"input": rows})[0])


def open_torchscript(path: Path) -> Answer:
    import torch

    module = torch.jit.load(str(path))

    def answer(rows: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return np.asarray(module(torch.from_numpy(rows)))

    return answer


OPEN = {".joblib": open_pickle, ".onnx": open_onnx, ".pt": open_torchscript}


def save_torchscript(model: LogisticRegression, path: Path) -> None:
    """The same arithmetic as a PyTorch module."""
    import torch

    linear = torch.nn.Linear(4, 3)
    with torch.no_grad():
        linear.weight.copy_(torch.from_numpy(model.coef_))
        linear.bias.copy_(torch.from_numpy(model.intercept_))
    module = torch.nn.Sequential(linear, torch.nn.Softmax(dim=1)).eval()
    torch.jit.trace(module, torch.zeros(1, 4)).save(str(path))


def seconds(call: Callable[[], Any], repeats: int = 500) -> list[float]:
    """The seconds of each call, after five calls to warm up."""
    taken = []
    for _ in range(repeats + 5):
        started = time.perf_counter()
        call()
        taken.append(time.perf_counter() - started)
    return taken[5:]


def cold_seconds(path: Path, rows: np.ndarray) -> float:
    """The seconds from the first import to the first answer in a new process."""
    code = f"file, rows = {str(path)!r}, {rows.tolist()}; {COLD[path.suffix]}"
    timed = f"import time; started = time.perf_counter(); {code}; print(time.perf_counter() - started)"
    return float(subprocess.run([sys.executable, "-c", timed], check=True, capture_output=True).stdout)


# 1. Two models, each in every format that it can be saved in.
iris = load_iris(as_frame=True)
flowers = iris.data.to_numpy(np.float32, copy=True)
models = {
    "regression": LogisticRegression(max_iter=1000).fit(flowers, iris.target),
    "forest": RandomForestClassifier(10, random_state=0).fit(flowers, iris.target),
}
for name, model in models.items():
    joblib.dump(model, f"{name}.joblib")
    batchserve.convert(model, iris.data, f"{name}.onnx")
if find_spec("torch"):  # PyTorch has no equivalent of a forest
    save_torchscript(models["regression"], Path("regression.pt"))


# 2. The formats compared: the same probabilities, in different times.
def compare(path: Path) -> float:
    """Prints a line about one file; returns the seconds of one row."""
    answer = OPEN[path.suffix](path)
    assert np.abs(answer(flowers) - models[path.stem].predict_proba(flowers)).max() < 1e-5
    many = np.resize(flowers, (10_000, 4))
    load = median(seconds(lambda: OPEN[path.suffix](path), repeats=20))
    one_row = median(seconds(lambda: answer(flowers[:1])))
    all_rows = median(seconds(lambda: answer(many), repeats=20))
    print(
        f"{path.name:18} {path.stat().st_size / 1e3:7.1f} kB {1e3 * load:7.2f} ms "
        f"{cold_seconds(path, flowers[:1]):10.2f} s {1e6 * one_row:8.1f} us {1e3 * all_rows:9.2f} ms"
    )
    return one_row


print(f"{'file':18} {'size':>10} {'load':>10} {'new process':>12} {'one row':>11} {'10,000 rows':>12}")
files = [Path(f"{name}{suffix}") for name in models for suffix in OPEN]
one_row = {path.name: compare(path) for path in files if path.exists()}
assert one_row["regression.onnx"] < one_row["regression.joblib"]
assert one_row["forest.onnx"] < one_row["forest.joblib"]


# 3. One row over HTTP: one connection, one request after the other.
def measure(http: httpx2.Client, name: str) -> None:
    """Prints a line about one model, measured with 500 requests."""
    alone: list[float] = []

    def call() -> None:
        answer = http.post(f"/v1/models/{name}/predict", json=[record]).raise_for_status()
        alone.append(answer.json()["inference_ms"])

    taken = [1e3 * each for each in seconds(call)]
    percentiles = quantiles(taken, n=100)
    figures = (mean(taken), median(taken), percentiles[94], percentiles[98])
    print(f"{name:18} {' '.join(f'{figure:7.2f} ms' for figure in figures)} {median(alone):14.3f} ms")


print(f"\n{'over HTTP':18} {'mean':>10} {'median':>10} {'P95':>10} {'P99':>10} {'the model alone':>17}")
record = iris.data.iloc[0].to_dict()
with Client() as client, httpx2.Client(base_url=client.url) as http:
    for name in models:
        client.models.add(f"{name}.onnx", name=name)
        measure(http, name)

        # 4. One code path: a job gives the same row the same answer.
        [now] = client.models.predict(name, [record])
        [later] = client.predict([record], model=name, passthrough="all")
        assert now == later
