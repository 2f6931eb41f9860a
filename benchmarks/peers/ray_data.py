"""Ray Data: a file is read, scored by map_batches with actors that hold the ONNX session, and written. Starting Ray is
not counted. With RAY_ADDRESS it uses that cluster, whose hosts share this machine's files, and the second run counts.

usage: python ray_data.py MODEL.onnx INPUT OUTPUT [ACTORS]
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
import ray.data
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


def run(model: str, source: str, target: str, actors: int) -> None:
    shutil.rmtree(target, ignore_errors=True)
    is_parquet = source.endswith(".parquet")
    rows = ray.data.read_parquet(source) if is_parquet else ray.data.read_csv(source)
    scored = rows.map_batches(
        Scorer,
        fn_constructor_args=(model,),
        batch_format="pyarrow",
        batch_size=65_536,
        compute=ray.data.ActorPoolStrategy(size=actors),
    )
    scored.write_parquet(target) if is_parquet else scored.write_csv(target)


if __name__ == "__main__":
    model, source, target, *actors = sys.argv[1:]
    pipeline = model, source, target, int(actors[0]) if actors else 1
    quiet = {"logging_level": logging.ERROR, "log_to_driver": False}
    if "RAY_ADDRESS" in os.environ:
        ray.init(address=os.environ["RAY_ADDRESS"], **quiet)
    else:
        cores = os.cpu_count() or 2
        ray.init(num_cpus=cores + 1, include_dashboard=False, _node_ip_address="127.0.0.1", **quiet)
    ray.data.DataContext.get_current().enable_progress_bars = False
    if "RAY_ADDRESS" in os.environ:
        run(*pipeline)  # the workers of the cluster have imported all then
    watch = Stopwatch()
    run(*pipeline)
    taken = str(watch)
    ray.shutdown()
    print(taken)
