"""The script that both manuals suggest: polars for the whole file, one call of ONNX Runtime with its defaults.

usage: python polars_onnxruntime.py MODEL.onnx INPUT OUTPUT
"""

import sys
from pathlib import Path

import numpy as np
import onnxruntime
import polars as pl
from stopwatch import Stopwatch

READ = {".csv": pl.read_csv, ".jsonl": pl.read_ndjson, ".parquet": pl.read_parquet}


def inputs_of(session: onnxruntime.InferenceSession, frame: pl.DataFrame) -> dict[str, np.ndarray]:
    wanted = [entry.name for entry in session.get_inputs()]
    if len(wanted) == 1:
        return {wanted[0]: frame.drop("id").to_numpy().astype(np.float32)}
    return {
        name: np.array(frame[name], object if frame[name].dtype == pl.String else np.float32).reshape(-1, 1)
        for name in wanted
    }


def main(model: str, source: Path, target: Path) -> None:
    session = onnxruntime.InferenceSession(model)
    frame = READ[source.suffix](source)
    labels, scores = session.run(None, inputs_of(session, frame))
    result = frame.select("id").with_columns(prediction=labels)
    result = result.with_columns(pl.Series(f"probability_{k}", scores[:, k]) for k in range(scores.shape[1]))
    if target.suffix == ".csv":
        result.write_csv(target)
    elif target.suffix == ".jsonl":
        result.write_ndjson(target)
    else:
        result.write_parquet(target)


if __name__ == "__main__":
    watch = Stopwatch()
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
    print(watch)
