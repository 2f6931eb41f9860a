"""MLServer: the CSV is sent as V2 requests of 1,000 rows, with `mlserver infer`, to a server with an ONNX model. The
conversion and the command are counted; starting the server is not.

usage: python mlserver_infer.py MODEL.onnx INPUT.csv OUTPUT.jsonl
"""

import csv
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

from stopwatch import Stopwatch

ROWS = 1000
RUNTIME = """
import numpy as np
import onnxruntime
from mlserver import MLModel
from mlserver.codecs import NumpyCodec
from mlserver.types import InferenceRequest, InferenceResponse


class Onnx(MLModel):
    async def load(self) -> bool:
        self._session = onnxruntime.InferenceSession(self.settings.parameters.uri)
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        matrix = NumpyCodec.decode_input(payload.inputs[0]).astype(np.float32)
        labels, scores = self._session.run(None, {self._session.get_inputs()[0].name: matrix})
        outputs = [NumpyCodec.encode_output("prediction", labels), NumpyCodec.encode_output("probability", scores)]
        return InferenceResponse(model_name=self.name, outputs=outputs)
"""


def write_requests(source: Path, target: Path) -> None:
    with source.open(newline="") as read, target.open("w") as written:
        rows = csv.reader(read)
        next(rows)
        values: list[float] = []
        count = 0
        for row in rows:
            values += map(float, row[1:])
            count += 1
            if count == ROWS:
                written.write(request(values, count))
                values, count = [], 0
        if count:
            written.write(request(values, count))


def request(values: list[float], count: int) -> str:
    shape = [count, len(values) // count]
    return json.dumps({"inputs": [{"name": "input", "datatype": "FP32", "shape": shape, "data": values}]}) + "\n"


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def wait_until_ready(server: "subprocess.Popen[bytes]", port: int) -> None:
    for _ in range(600):
        if server.poll() is not None:
            raise SystemExit(f"the server ended with {server.returncode}")
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/v2/models/onnx/ready").close()
        except OSError:
            time.sleep(0.1)
        else:
            return
    raise SystemExit("the server did not get ready")


def main(model: Path, source: Path, target: Path) -> str:
    program = str(Path(sys.executable).parent / "mlserver")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "onnx_runtime.py").write_text(RUNTIME)
        http, grpc, metrics = free_port(), free_port(), free_port()
        settings = {"host": "127.0.0.1", "http_port": http, "grpc_port": grpc, "metrics_port": metrics}
        (folder / "settings.json").write_text(json.dumps(settings | {"parallel_workers": 0, "debug": False}))
        described = {"name": "onnx", "implementation": "onnx_runtime.Onnx", "parameters": {"uri": str(model)}}
        (folder / "model-settings.json").write_text(json.dumps(described))
        own = os.environ | {"PYTHONPATH": str(folder)}
        with (
            (folder / "log").open("wb") as log,
            subprocess.Popen([program, "start", str(folder)], stdout=log, stderr=log, env=own) as server,
        ):
            try:
                wait_until_ready(server, http)
                watch = Stopwatch()
                requests = folder / "requests.jsonl"
                write_requests(source, requests)
                command = [program, "infer", "-u", f"127.0.0.1:{http}", "-m", "onnx", "-i", requests, "-o", target]
                subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
                return str(watch)
            finally:
                server.terminate()


if __name__ == "__main__":
    print(main(*map(Path, sys.argv[1:])))
