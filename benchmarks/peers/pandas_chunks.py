"""The usual script if memory is short: pandas with 100,000 rows at a time.

usage: python pandas_chunks.py MODEL.joblib INPUT OUTPUT
"""

import sys
from collections.abc import Iterator
from pathlib import Path

import joblib
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from pandas_joblib import scored
from stopwatch import Stopwatch

ROWS = 100_000


def chunks(source: Path) -> Iterator[pd.DataFrame]:
    if source.suffix == ".csv":
        yield from pd.read_csv(source, chunksize=ROWS)
    elif source.suffix == ".jsonl":
        yield from pd.read_json(source, lines=True, chunksize=ROWS)
    else:
        yield from (batch.to_pandas() for batch in pq.ParquetFile(source).iter_batches(ROWS))


def write(target: Path, frames: Iterator[pd.DataFrame]) -> None:
    if target.suffix == ".parquet":
        first = pa.Table.from_pandas(next(frames), preserve_index=False)
        with pq.ParquetWriter(target, first.schema) as writer:
            writer.write_table(first)
            for frame in frames:
                writer.write_table(pa.Table.from_pandas(frame, preserve_index=False))
        return
    with target.open("w") as file:
        for number, frame in enumerate(frames):
            if target.suffix == ".csv":
                frame.to_csv(file, index=False, header=number == 0)
            else:
                frame.to_json(file, orient="records", lines=True)


if __name__ == "__main__":
    model = joblib.load(sys.argv[1])
    watch = Stopwatch()
    write(Path(sys.argv[3]), (scored(model, frame) for frame in chunks(Path(sys.argv[2]))))
    print(watch)
