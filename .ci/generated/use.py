"""What a user of a generated Python client does: `use.py URL KEY iris.onnx iris.csv`."""

import sys
from http import HTTPStatus
from io import BytesIO
from pathlib import Path

from batchserve_api import AuthenticatedClient
from batchserve_api.api.download import download
from batchserve_api.api.jobs import get_job, list_jobs
from batchserve_api.api.models import list_models, predict_online, register_model
from batchserve_api.api.predict import predict, predict_uploaded
from batchserve_api.api.upload import upload
from batchserve_api.models import (
    JobBody,
    JobList,
    JobState,
    ModelBody,
    ModelList,
    OnlineBody,
    Problem,
    QueuedBody,
    SortKey,
)
from batchserve_api.types import File


def main(url: str, key: str, model: Path, table: Path) -> None:
    client = AuthenticatedClient(base_url=url, token=key)
    registered = register_model.sync("python", client=client, body=File(payload=BytesIO(model.read_bytes())))
    assert isinstance(registered, ModelBody), registered
    found = list_models.sync(client=client, q="python")
    assert isinstance(found, ModelList), found
    assert [one.name for one in found.models] == ["python"]

    job = upload.sync(client=client, body=File(payload=BytesIO(table.read_bytes())), filename=table.name)
    assert isinstance(job, JobBody), job
    assert job.state is JobState.UPLOADED
    job = predict.sync(job.id, client=client, model="python")
    while isinstance(job, JobBody) and job.state in (JobState.QUEUED, JobState.RUNNING):
        job = get_job.sync(job.id, client=client, wait=30.0)
    assert isinstance(job, JobBody), job
    assert (job.state, job.rows.ok) == (JobState.COMPLETED, 150)

    result = download.sync_detailed(job.id, client=client)
    assert result.status_code == HTTPStatus.OK
    assert len(result.content.splitlines()) == 151

    page = list_jobs.sync(client=client, state=[JobState.COMPLETED, JobState.FAILED], sort=SortKey.FINISHED, total=True)
    assert isinstance(page, JobList), page
    assert job.id in [one.id for one in page.jobs]
    assert page.total == len(page.jobs)
    queued = predict_uploaded.sync(client=client, model="python")
    assert isinstance(queued, QueuedBody), queued
    assert queued.jobs == []

    online = predict_online.sync("python", client=client, body=File(payload=BytesIO(table.read_bytes())))
    assert isinstance(online, OnlineBody), online
    assert len(online.prediction) == 150

    missing = get_job.sync("none", client=client)
    assert isinstance(missing, Problem), missing
    assert (missing.code, missing.status) == ("job-not-found", 404)
    wrong = list_jobs.sync(client=client, since="soon")
    assert isinstance(wrong, Problem), wrong
    assert wrong.code == "invalid-options"
    sys.stdout.write("Python: uploaded, predicted, polled, downloaded and listed\n")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]), Path(sys.argv[4]))
