"""A server with something to show on every page: models, and jobs in every state."""

from contextlib import suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import ClassVar

from batchserve import Client
from batchserve.client import Job, JobFailed

HEADER = "sepal length (cm),sepal width (cm),petal length (cm),petal width (cm)\n"
FLOWER, TALL, EMPTY = "5.1,3.5,1.4,0.2\n", "5.1,tall,1.4,0.2\n", "5.1,,1.4,0.2\n"
FAR = "2999-01-01T00:00:00Z"


@dataclass(frozen=True, slots=True)
class Exhibits:
    """Its jobs."""

    scored: Job
    """Completed, with failed rows."""
    flawless: Job
    failed: Job
    cancelled: Job
    queued: Job
    uploaded: Job
    unfit: Job
    """Uploaded, and of another shape than any model takes."""

    PATHS: ClassVar = {
        "new job": ("/", 200),
        "jobs": ("/jobs", 200),
        "jobs that failed": ("/jobs?q=state:failed", 200),
        "no jobs": ("/jobs?q=nothing-has-this-name", 200),
        "a search that is not understood": ("/jobs?q=state:done", 422),
        "a job with failed rows": ("/jobs/{scored}", 200),
        "a job without failed rows": ("/jobs/{flawless}", 200),
        "a failed job": ("/jobs/{failed}", 200),
        "a cancelled job": ("/jobs/{cancelled}", 200),
        "a queued job": ("/jobs/{queued}", 200),
        "an uploaded file": ("/jobs/{uploaded}", 200),
        "a file that fits no model": ("/jobs/{unfit}", 200),
        "system": ("/system", 200),
        "keys": ("/keys", 200),
        "no such job": ("/jobs/none", 404),
    }
    """The path of every kind of page, with the names of these jobs for their IDs, and its status."""

    def page(self, name: str) -> tuple[str, int]:
        path, status = self.PATHS[name]
        return path.format(**{field.name: getattr(self, field.name).id for field in fields(self)}), status


def arranged(url: str, folder: Path, iris: Path, flowers: Path) -> Exhibits:
    """`iris`: a model of flowers, and `flowers` a table of some."""
    faulty, wine, worse = folder / "measured-by-hand.csv", folder / "wine.csv", folder / "unreadable.csv"
    faulty.write_text(HEADER + FLOWER * 40 + TALL + FLOWER * 30 + EMPTY + TALL + FLOWER * 20)
    worse.write_text(HEADER + FLOWER + TALL + FLOWER)
    wine.write_text("alcohol,colour\n13.2,red\n12.1,white\n")
    with Client(url) as client:
        client.models.add(iris, name="iris")
        scored = client.submit(faulty, "iris", metadata={"plant": "north"}).wait(timeout=60)
        flawless = client.submit(flowers, "iris", passthrough="all", format="parquet").wait(timeout=60)
        failed = client.submit(worse, "iris", on_row_error="fail")
        cancelled = client.submit(flowers, "iris", run_after=FAR, reuse=False).cancel()
        queued = client.submit(flowers, "iris", run_after=FAR, reuse=False)
        uploaded, unfit = client.upload(flowers), client.upload(wine)
        with suppress(JobFailed):
            failed.wait(timeout=60)
    return Exhibits(scored, flawless, failed, cancelled, queued, uploaded, unfit)
