"""BentoML: the CSV is sent to a task endpoint, its status is polled, the scored rows return as JSON and become CSV.
Starting the server is not counted.

usage: python bentoml_task.py MODEL.onnx INPUT.csv OUTPUT.csv
"""

import csv
import http.client
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from stopwatch import Stopwatch

SERVICE = """
from pathlib import Path

import bentoml
import numpy as np
import onnxruntime
import polars as pl


@bentoml.service(traffic={"timeout": 600})
class Scorer:
    def __init__(self) -> None:
        self._session = onnxruntime.InferenceSession(MODEL)

    @bentoml.task
    def score(self, table: Path) -> np.ndarray:
        frame = pl.read_csv(table)
        matrix = frame.drop("id").to_numpy().astype(np.float32)
        labels, scores = self._session.run(None, {self._session.get_inputs()[0].name: matrix})
        return np.column_stack([frame["id"].to_numpy(), labels, scores.astype(np.float64)])
"""


def main(model: Path, source: Path, target: Path) -> str:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "service.py").write_text(f"MODEL = {str(model)!r}\n{SERVICE}")
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        own = os.environ | {"BENTOML_DO_NOT_TRACK": "True", "BENTOML_HOME": name}
        program = str(Path(sys.executable).parent / "bentoml")
        command = [program, "serve", "service:Scorer", "--host", "127.0.0.1", "--port", str(port)]
        with (
            (folder / "log").open("wb") as log,
            subprocess.Popen(command, cwd=folder, stdout=log, stderr=log, env=own) as server,
        ):
            try:
                wait_until_ready(server, port)
                watch = Stopwatch()
                task = call(port, "POST", "/score/submit", *form(source))["task_id"]
                while call(port, "GET", f"/score/status?task_id={task}")["status"] in ("in_progress", "pending"):
                    time.sleep(0.05)
                rows = call(port, "GET", f"/score/get?task_id={task}")
                with target.open("w", newline="") as file:
                    csv.writer(file).writerows(rows)
                return str(watch)
            finally:
                server.terminate()


def wait_until_ready(server: "subprocess.Popen[bytes]", port: int) -> None:
    for _ in range(600):
        if server.poll() is not None:
            raise SystemExit(f"the server ended with {server.returncode}")
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
        try:
            connection.request("GET", "/readyz")
            if connection.getresponse().status == 200:
                return
        except OSError:
            pass
        finally:
            connection.close()
        time.sleep(0.1)
    raise SystemExit("the server did not get ready")


def form(source: Path) -> tuple[bytes, str]:
    boundary = "a-boundary-that-is-in-no-table"
    head = f'--{boundary}\r\nContent-Disposition: form-data; name="table"; filename="table.csv"\r\n\r\n'
    return (
        head.encode() + source.read_bytes() + f"\r\n--{boundary}--\r\n".encode(),
        f"multipart/form-data; boundary={boundary}",
    )


def call(port: int, method: str, path: str, body: bytes | None = None, kind: str = "application/json") -> Any:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600, blocksize=2**20)
    try:
        connection.request(method, path, body, {"content-type": kind})
        response = connection.getresponse()
        answer = response.read()
        if response.status >= 400:
            raise SystemExit(f"{method} {path}: {response.status} {answer[:500]!r}")
        return json.loads(answer)
    finally:
        connection.close()


if __name__ == "__main__":
    print(main(*map(Path, sys.argv[1:])))
