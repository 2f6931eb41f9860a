"""No API in between: this process stores an input and inserts its job, a worker scores it, `read.py` reads the result.

All three know the same storage and database, which BATCHSERVE_STORAGE and BATCHSERVE_DATABASE name.
"""

import hashlib
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import polars as pl
import uuid_utils
from sklearn.datasets import load_diabetes
from sklearn.linear_model import Ridge

import batchserve
from batchserve import registry
from batchserve.admission import admit
from batchserve.db.connect import Database
from batchserve.domain import Dialect, ModelVersion, Options
from batchserve.jobs import requests
from batchserve.jobs.requests import NewInput
from batchserve.runtime import open_database
from batchserve.settings import Settings
from batchserve.storage import Storage, input_key, model_key, open_storage


def register(storage: Storage, database: Database, name: str, graph: bytes) -> ModelVersion:
    """Admits a model, stores what is to be run, then adds its row: a row never lacks its bytes."""
    admitted = admit(graph)
    digest = hashlib.sha256(graph).hexdigest()
    with storage.create(model_key(digest)) as writer:
        writer.write(admitted.model)
        stored = writer.commit()
    with database.write() as connection:
        model = registry.add(connection, name, digest, len(graph), admitted.signature, admitted.metadata, time.time())
        registry.set_artifact(connection, digest, stored.sha256)
    return model


def submit(storage: Storage, database: Database, model: ModelVersion, table: Path, options: Options) -> str:
    """Stores a CSV file, then creates and queues its job in one transaction; gives the ID of the job."""
    job_id = str(uuid_utils.uuid7())
    with storage.create(input_key(job_id)) as writer:
        writer.write(table.read_bytes())
        stored = writer.commit()
    new = NewInput(job_id, input_key(job_id), stored.bytes, stored.sha256, "csv", Dialect(","), table.name)
    request = hashlib.sha256(job_id.encode()).hexdigest()  # like no other, so that no earlier result is its answer
    with database.write() as connection:
        requests.create(connection, new, model, time.time())
        requests.enqueue_if_uploaded(
            connection, job_id, model, options, request, metadata={}, priority=0, run_after=None, now=time.time()
        )
    return job_id


# 1. A model, and a table with one column more than it takes.
diabetes = load_diabetes(as_frame=True)
estimator = Ridge(alpha=0.01).fit(diabetes.data, diabetes.target)
diabetes.data.assign(patient=[f"p{number:03}" for number in range(442)]).to_csv("patients.csv", index=False)

# 2. Bytes into storage, rows into the database.
settings = Settings()
storage = open_storage(settings.storage)
with open_database(settings) as database:
    model = register(storage, database, "diabetes", batchserve.convert(estimator, diabetes.data).onnx)
    job_id = submit(storage, database, model, Path("patients.csv"), Options(format="parquet", key="patient"))
print(f"Process 1, the client: queued job {job_id} for {model.reference}; no server runs")

# 3. Somebody scores: one worker here, as many as you like on a database that they all reach.
with (
    Path("worker.log").open("wb") as log,
    subprocess.Popen([sys.executable, "-m", "batchserve", "worker"], stderr=log) as worker,
):
    print("Process 2, batchserve worker: started")

    # 4. Somebody else reads, and is told nothing but the ID.
    try:
        reader = Path(__file__).with_name("read.py")
        subprocess.run([sys.executable, reader, job_id, "predictions.parquet"], check=True, timeout=120)
    finally:
        worker.terminate()

# 5. The answers are those of scikit-learn, row for row.
scored = pl.read_parquet("predictions.parquet")
print(scored.head(3))
difference = np.abs(scored["prediction"].to_numpy() / estimator.predict(diabetes.data) - 1).max()
print(f"{len(scored)} rows; predictions differ from scikit-learn's by at most {difference:.0e} of their value")
assert scored["patient"].to_list() == [f"p{number:03}" for number in range(442)]
assert difference < 1e-5
assert worker.returncode == 0
