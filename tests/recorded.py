"""Jobs whose results are recorded byte for byte: their inputs, and the digests of their results.

The model computes in numbers that every processor holds exactly, so the bytes depend on this code and the pinned
libraries alone. After a change of results that is meant, or of a library that writes them, record them anew:

    PYTHONPATH=tests .venv/bin/python -m recorded
"""

import hashlib
import json
import tempfile
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import numpy as np
import polars as pl
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper
from service import Api, encoded, running

DIGESTS = Path(__file__).with_name("recorded.json")
TABLES = ("csv", "jsonl", "json", "parquet", "arrow", "arrows")
ARRAYS = ("npy", "npz")
RECORDS = 1000
CHUNK_RECORDS = 128
"""Small enough that each result is assembled from eight parts."""


def table_model() -> bytes:
    """score = a / 4 + n, and the city unchanged."""
    return _model(
        [
            helper.make_node("Mul", ["a", "quarter"], ["part"]),
            helper.make_node("Cast", ["n"], ["whole"], to=TensorProto.FLOAT),
            helper.make_node("Add", ["part", "whole"], ["score"]),
            helper.make_node("Identity", ["city"], ["place"]),
        ],
        {"a": TensorProto.FLOAT, "n": TensorProto.INT64, "city": TensorProto.STRING},
        {"score": TensorProto.FLOAT, "place": TensorProto.STRING},
    )


def array_model() -> bytes:
    """score = input / 4, of one value for each record."""
    nodes = [helper.make_node("Mul", ["input", "quarter"], ["score"])]
    return _model(nodes, {"input": TensorProto.FLOAT}, {"score": TensorProto.FLOAT})


def _model(nodes: list[NodeProto], inputs: dict[str, int], outputs: dict[str, int]) -> bytes:
    graph = helper.make_graph(
        nodes,
        "exact",
        [helper.make_tensor_value_info(name, kind, [None, 1]) for name, kind in inputs.items()],
        [helper.make_tensor_value_info(name, kind, [None, 1]) for name, kind in outputs.items()],
        [numpy_helper.from_array(np.asarray(np.float32(0.25)), "quarter")],
    )
    model: ModelProto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return model.SerializeToString()


def table(format: str) -> bytes:
    """Records with every kind of value that a result can contain, some of which cannot be scored."""
    cities = ["Bern", "Zürich", 'the "old" town', "left, right", "two\nlines", "= 1 + 1", "東京", " spaces "]
    frame = pl.DataFrame(
        {
            "id": range(RECORDS),
            "a": ["lost" if i % 97 == 5 else str((i % 50) - 12.5) for i in range(RECORDS)],
            "n": [i * 37 % 1000 - 500 for i in range(RECORDS)],
            "city": [cities[i % len(cities)] for i in range(RECORDS)],
            "note": [None if i % 7 == 3 else f"note {i}" for i in range(RECORDS)],
            "flag": [None if i % 11 == 1 else i % 2 == 0 for i in range(RECORDS)],
            "share": [None if i % 13 == 1 else i / 8 for i in range(RECORDS)],
        }
    )
    return encoded(frame, format)


def array(format: str) -> bytes:
    return encoded(pl.DataFrame({"input": [i / 2 for i in range(RECORDS)]}), format)


def digests(api: Api) -> Iterator[tuple[str, str]]:
    """The name and the SHA-256 of each result and errors list."""
    api.register("exact-table", table_model())
    api.register("exact-array", array_model())
    for given, wanted in product(TABLES, TABLES):
        job = api.run(table(given), "exact-table", format=wanted, passthrough="all", key="id")
        yield f"{given} to {wanted}", _digest(api.result(job).content)
        if wanted == given:
            yield f"errors of {given}", _digest(api.http.get(job["links"]["errors"]).content)
    for given, wanted in product(ARRAYS, (*ARRAYS, *TABLES)):
        job = api.run(array(given), "exact-array", format=wanted)
        yield f"{given} to {wanted}", _digest(api.result(job).content)


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def record() -> None:
    with tempfile.TemporaryDirectory() as folder, running(Path(folder), chunk_records=CHUNK_RECORDS) as api:
        DIGESTS.write_text(json.dumps(dict(digests(api)), indent=1) + "\n")


if __name__ == "__main__":
    record()
