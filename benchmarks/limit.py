"""The limit: the best in-process pipeline known on this machine, with no service around it.

One thread reads with polars, two score with ONNX Runtime, one writes with polars; all overlap through short queues.
Started as a script, so that a run pays for its imports as a user would: python limit.py MODEL INPUT OUTPUT.
"""

import os
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from queue import Queue
from threading import Thread
from typing import Any

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

import numpy as np
import onnx
import onnxruntime
import polars as pl

BATCH = 65_536
SLICE = 4096


def run(model: Path, source: Path, target: Path) -> float:
    """Seconds from the first byte read to the last byte written and synced."""
    session = _session(model)
    wanted = list(session.get_inputs())
    columns = _columns(model) or [entry.name for entry in wanted]
    started = time.perf_counter()
    scored: Queue[Future[pl.DataFrame] | None] = Queue(maxsize=4)
    with ThreadPoolExecutor(2) as pool:
        writer = Thread(target=_write, args=(target, scored))
        writer.start()
        for frame in _batches(source, columns):
            scored.put(pool.submit(_score, session, columns, frame))
        scored.put(None)
        writer.join()
    return time.perf_counter() - started


def _session(model: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return onnxruntime.InferenceSession(str(model), options)


def _columns(model: Path) -> list[str]:
    import json

    metadata = {entry.key: entry.value for entry in onnx.load(model).metadata_props}
    return [entry["name"] for entry in json.loads(metadata.get("batchserve.columns", "[]"))]


def _batches(source: Path, columns: list[str]) -> Iterator[pl.DataFrame]:
    scan: Callable[..., pl.LazyFrame] = {
        ".csv": lambda path: pl.scan_csv(path, schema_overrides=dict.fromkeys(columns, pl.Float32)),
        ".jsonl": pl.scan_ndjson,
        ".parquet": pl.scan_parquet,
    }[source.suffix]
    return iter(scan(source).collect_batches(chunk_size=BATCH, maintain_order=True))


def _score(session: onnxruntime.InferenceSession, columns: list[str], frame: pl.DataFrame) -> pl.DataFrame:
    matrix = np.empty((frame.height, len(columns)), np.float32)
    for index, name in enumerate(columns):
        matrix[:, index] = frame[name].to_numpy()
    name = session.get_inputs()[0].name
    slices = [session.run(None, {name: matrix[at : at + SLICE]}) for at in range(0, frame.height, SLICE)]
    label = np.concatenate([outputs[0] for outputs in slices])
    rest = frame.drop(columns).with_columns(prediction=pl.Series(label))
    if len(slices[0]) == 1:
        return rest
    scores = np.concatenate([outputs[1] for outputs in slices])
    return rest.with_columns(pl.Series(f"probability_{k}", scores[:, k]) for k in range(scores.shape[1]))


def _write(target: Path, scored: "Queue[Future[pl.DataFrame] | None]") -> None:
    with target.open("wb") as file:
        first = True
        while (future := scored.get()) is not None:
            frame = future.result()
            if target.suffix == ".csv":
                frame.write_csv(file, include_header=first)
            elif target.suffix == ".jsonl":
                frame.write_ndjson(file)
            else:
                raise SystemExit(f"no writer for {target.suffix}")
            first = False
        file.flush()
        os.fsync(file.fileno())


if __name__ == "__main__":
    arguments: list[Any] = [Path(argument) for argument in sys.argv[1:]]
    print(f"{run(*arguments):.3f}")
