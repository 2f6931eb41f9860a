"""Routes that do the minimum, with which status polls and online predictions are compared."""

import os
from functools import cache

import numpy as np
import onnxruntime
import orjson
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

MODEL = "BENCHMARK_MODEL"
"""The environment variable with the path of the graph that /predict runs."""


async def status(_request: Request) -> JSONResponse:
    return JSONResponse({"id": "01a1f7d8-3678-70be-97ac-ec0093b12b30", "state": "running", "progress": 0.5})


async def predict(request: Request) -> Response:
    """Passes the values of each record to ONNX Runtime in this process, without checks, names or isolation."""
    records = orjson.loads(await request.body())
    matrix = np.array([list(record.values()) for record in records], np.float32)
    labels, probabilities = _session().run(None, {"input": matrix})
    answers = [
        {**record, "prediction": label, "probabilities": row}
        for record, label, row in zip(records, labels.tolist(), probabilities, strict=True)
    ]
    body = orjson.dumps({"prediction": answers}, option=orjson.OPT_SERIALIZE_NUMPY)
    return Response(body, media_type="application/json")


@cache
def _session() -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(os.environ[MODEL], options)


app = Starlette(routes=[Route("/status", status), Route("/predict", predict, methods=["POST"])])
