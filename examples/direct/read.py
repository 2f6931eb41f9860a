"""`read.py JOB FILE`: waits for a job and copies its result, straight from database and storage."""

import shutil
import sys
import time
from pathlib import Path

from batchserve.direct import Direct

job_id, target = sys.argv[1], Path(sys.argv[2])

with Direct.open() as direct:
    while not (job := direct.job(job_id)).state.finished:
        time.sleep(0.1)
    with direct.result(job_id) as result, target.open("wb") as file:
        shutil.copyfileobj(result, file)
print(f"Process 3, the reader: job is {job.state}, {job.rows_ok} rows; {target} has {target.stat().st_size:,} bytes")
