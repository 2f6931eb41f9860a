"""Ray Data: read_csv, map_batches with an actor that holds the ONNX session, write_csv. Starting Ray is not counted.

usage: python ray_data.py MODEL.onnx INPUT.csv OUTPUT
"""

import logging
import os
import shutil
import sys

os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_DATA_DISABLE_PROGRESS_BARS": "1"}

import numpy as np
import onnxruntime
import pyarrow as pa
import ray
from stopwatch import Stopwatch


class Scorer:
    def __init__(self, model: str) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self._session = onnxruntime.InferenceSession(model, options)

    def __call__(self, table: pa.Table) -> pa.Table:
        features = [column.to_numpy().astype(np.float32) for column in table.drop(["id"]).columns]
        labels, scores = self._session.run(None, {self._session.get_inputs()[0].name: np.stack(features, axis=1)})
        result = {"id": table["id"], "prediction": labels}
        return pa.table(result | {f"probability_{k}": scores[:, k] for k in range(scores.shape[1])})


if __name__ == "__main__":
    model, source, target = sys.argv[1:]
    shutil.rmtree(target, ignore_errors=True)
    cores = os.cpu_count() or 2
    ray.init(
        num_cpus=cores + 1, include_dashboard=False, logging_level=logging.ERROR, log_to_driver=False,
        _node_ip_address="127.0.0.1",
    )  # fmt: skip
    ray.data.DataContext.get_current().enable_progress_bars = False
    watch = Stopwatch()
    rows = ray.data.read_csv(source)
    scored = rows.map_batches(
        Scorer,
        fn_constructor_args=(model,),
        batch_format="pyarrow",
        batch_size=65_536,
        compute=ray.data.ActorPoolStrategy(size=1),
    )
    scored.write_csv(target)
    taken = str(watch)
    ray.shutdown()
    print(taken)
