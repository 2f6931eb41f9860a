"""`read.py JOB FILE`: waits for a job and copies its result, straight from database and storage."""

import shutil
import sys
import time
from pathlib import Path

from batchserve.jobs import queries
from batchserve.runtime import open_database
from batchserve.settings import Settings
from batchserve.storage import open_storage

job_id, target = sys.argv[1], Path(sys.argv[2])
settings = Settings()

with open_database(settings) as database:
    while True:
        with database.read() as connection:
            job = queries.get(connection, job_id)
        if job.state.finished:
            break
        time.sleep(0.1)

assert job.result_key is not None, f"the job ended as {job.state}: {job.error}"
with open_storage(settings.storage).open(job.result_key) as result, target.open("wb") as file:
    shutil.copyfileobj(result, file)
print(f"Process 3, the reader: job is {job.state}, {job.rows_ok} rows; {target} has {job.result_bytes:,} bytes")
