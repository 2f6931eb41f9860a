"""The limit: the best known pipeline inside one process on this machine, without a service.

One thread reads, two score with ONNX Runtime, one writes; all overlap through short queues. polars reads and
writes, except where another library is faster: duckdb reads big NDJSON, pyarrow writes Parquet.
Started as a script in a separate environment: python limit.py MODEL INPUT OUTPUT prints the seconds from the first
byte read to the last byte synced, and the CPU seconds in them. Imports and the loading of the model are not counted.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from queue import Queue
from threading import Thread
from typing import IO, Any

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

import duckdb
import numpy as np
import onnx
import onnxruntime
import polars as pl
import pyarrow.parquet as pq

BATCH = 65_536
SLICE = 4096
"""Records in one call of the model: a matrix of 4,096 x 20 floats stays in the cache of a core."""
DUCKDB_FROM = 32 * 2**20
"""Bytes of NDJSON from which duckdb is faster than polars."""


def run(model: Path, source: Path, target: Path) -> tuple[float, float]:
    """Seconds from the first byte read to the last byte written and synced, and CPU seconds of all threads."""
    scorer = Scorer(model)
    scored: Queue[Future[pl.DataFrame] | None] = Queue(maxsize=3)
    with ThreadPoolExecutor(2) as pool:

        def read() -> None:
            try:
                for frame in READERS[source.suffix](source, scorer.dtypes):
                    scored.put(pool.submit(scorer.score, frame))
            finally:
                scored.put(None)

        used, started = time.process_time(), time.perf_counter()
        Thread(target=read, daemon=True).start()
        WRITERS[target.suffix](target, _results(scored))
        return time.perf_counter() - started, time.process_time() - used


def _results(scored: "Queue[Future[pl.DataFrame] | None]") -> Iterator[pl.DataFrame]:
    while (future := scored.get()) is not None:
        yield future.result()


class Scorer:
    """A session, shared by the threads, and the columns that it takes."""

    def __init__(self, model: Path) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self._session = onnxruntime.InferenceSession(str(model), options)
        metadata = {entry.key: entry.value for entry in onnx.load(model).metadata_props}
        self._columns: list[dict[str, Any]] = json.loads(metadata["batchserve.columns"])
        self.dtypes = {
            column["name"]: pl.Categorical() if column["dtype"] == "string" else pl.Float32()
            for column in self._columns
        }

    def score(self, frame: pl.DataFrame) -> pl.DataFrame:
        """The columns that the model does not take, followed by its outputs."""
        inputs = self._inputs(frame)
        parts = [
            self._session.run(None, {name: tensor[at : at + SLICE] for name, tensor in inputs.items()})
            for at in range(0, frame.height, SLICE)
        ]
        labels, scores = (np.concatenate(outputs) for outputs in zip(*parts, strict=True))
        result = frame.drop(*self.dtypes).with_columns(prediction=pl.Series(labels))
        return result.with_columns(pl.Series(f"probability_{k}", scores[:, k]) for k in range(scores.shape[1]))

    def _inputs(self, frame: pl.DataFrame) -> dict[str, np.ndarray]:
        names = [entry.name for entry in self._session.get_inputs()]
        if len(names) < len(self._columns):
            return {names[0]: frame.select(*self.dtypes).to_numpy(order="c")}
        return {column["input"]: _column(frame[column["name"]]) for column in self._columns}


def _column(series: pl.Series) -> np.ndarray:
    """An array of shape (n, 1). Strings become Python objects once per distinct value, not once per record."""
    if series.dtype != pl.Categorical:
        return series.to_numpy().reshape(-1, 1)
    encoded = series.to_arrow()
    words: np.ndarray = encoded.dictionary.to_numpy(zero_copy_only=False)
    column: np.ndarray = words[encoded.indices.to_numpy()].reshape(-1, 1)
    return column


def _read_csv(source: Path, dtypes: dict[str, Any]) -> Iterator[pl.DataFrame]:
    return iter(pl.scan_csv(source, schema_overrides=dtypes).collect_batches(chunk_size=BATCH, maintain_order=True))


def _read_parquet(source: Path, _dtypes: dict[str, Any]) -> Iterator[pl.DataFrame]:
    return iter(pl.scan_parquet(source).collect_batches(chunk_size=BATCH, maintain_order=True))


def _read_jsonl(source: Path, dtypes: dict[str, Any]) -> Iterator[pl.DataFrame]:
    if source.stat().st_size < DUCKDB_FROM:
        scan = pl.scan_ndjson(source, schema_overrides=dtypes)
        yield from scan.collect_batches(chunk_size=BATCH, maintain_order=True)
        return
    columns = {"id": "BIGINT"} | {
        name: "VARCHAR" if dtype == pl.Categorical else "FLOAT" for name, dtype in dtypes.items()
    }
    with duckdb.connect() as connection:
        relation = connection.read_json(str(source), format="newline_delimited", columns=columns)
        for batch in relation.to_arrow_reader(BATCH):
            yield pl.DataFrame(batch)


READERS: dict[str, Callable[[Path, dict[str, Any]], Iterator[pl.DataFrame]]] = {
    ".csv": _read_csv,
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
}


def _write_csv(target: Path, frames: Iterator[pl.DataFrame]) -> None:
    with _synced(target) as file:
        for number, frame in enumerate(frames):
            frame.write_csv(file, include_header=number == 0)


def _write_jsonl(target: Path, frames: Iterator[pl.DataFrame]) -> None:
    with _synced(target) as file:
        for frame in frames:
            frame.write_ndjson(file)


def _write_parquet(target: Path, frames: Iterator[pl.DataFrame]) -> None:
    first = next(frames).to_arrow()
    with _synced(target) as file, pq.ParquetWriter(file, first.schema, use_dictionary=["prediction"]) as writer:
        writer.write_table(first)
        for frame in frames:
            writer.write_table(frame.to_arrow())


WRITERS: dict[str, Callable[[Path, Iterator[pl.DataFrame]], None]] = {
    ".csv": _write_csv,
    ".jsonl": _write_jsonl,
    ".parquet": _write_parquet,
}


@contextmanager
def _synced(target: Path) -> Iterator[IO[bytes]]:
    with target.open("wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


if __name__ == "__main__":
    print("{:.4f} {:.2f}".format(*run(*map(Path, sys.argv[1:]))))
