"""Without the API: this process stores an input and inserts its job, a worker scores it, `read.py` reads the result.

All three use the storage and the database of the settings, BATCHSERVE_STORAGE and BATCHSERVE_DATABASE.
"""

import subprocess
import sys
from pathlib import Path

import numpy as np
import polars as pl
from sklearn.datasets import load_diabetes
from sklearn.linear_model import Ridge

import batchserve
from batchserve.direct import Direct
from batchserve.domain import Options

# 1. A model, and a table with one column more than it takes.
diabetes = load_diabetes(as_frame=True)
estimator = Ridge(alpha=0.01).fit(diabetes.data, diabetes.target)
diabetes.data.assign(patient=[f"p{number:03}" for number in range(442)]).to_csv("patients.csv", index=False)

# 2. Bytes into storage, rows into the database.
with Direct.open() as direct:
    model = direct.register("diabetes", batchserve.convert(estimator, diabetes.data).onnx)
    job_id = direct.submit(Path("patients.csv"), model, Options("parquet", key="patient"))
print(f"Process 1, the client: queued job {job_id} for {model.reference}; no server runs")

# 3. A worker scores it. Any number of workers can share a database.
with (
    Path("worker.log").open("wb") as log,
    subprocess.Popen([sys.executable, "-m", "batchserve", "worker"], stderr=log) as worker,
):
    print("Process 2, batchserve worker: started")

    # 4. Another process reads the result; it is given only the ID.
    try:
        reader = Path(__file__).with_name("read.py")
        subprocess.run([sys.executable, reader, job_id, "predictions.parquet"], check=True, timeout=120)
    finally:
        worker.terminate()

# 5. The predictions equal those of scikit-learn, row by row.
scored = pl.read_parquet("predictions.parquet")
print(scored.head(3))
difference = np.abs(scored["prediction"].to_numpy() / estimator.predict(diabetes.data) - 1).max()
print(f"{len(scored)} rows; predictions differ from scikit-learn's by at most {difference:.0e} of their value")
assert scored["patient"].to_list() == [f"p{number:03}" for number in range(442)]
assert difference < 1e-5
assert worker.returncode == 0
