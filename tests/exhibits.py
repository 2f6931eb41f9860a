"""A server with something to show on every page: models, and jobs in every state."""

import io
import json
import zipfile
from contextlib import suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import ClassVar
from urllib.parse import urlencode

import onnx
from onnx import parser
from PIL import Image, ImageDraw

from batchserve import Client
from batchserve.client import Job, JobFailed, Schedule

HEADER = "sepal length (cm),sepal width (cm),petal length (cm),petal width (cm)\n"
FLOWER, TALL, EMPTY = "5.1,3.5,1.4,0.2\n", "5.1,tall,1.4,0.2\n", "5.1,,1.4,0.2\n"
TRIED = urlencode({f"column.{name}": "3.5" for name in HEADER.strip().split(",")})
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
    images: Job
    """Of images, one of which is none."""
    schedule: Schedule

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
        "a job of images": ("/jobs/{images}", 200),
        "records": ("/jobs/{images}/records", 200),
        "records that failed": ("/jobs/{scored}/failed", 200),
        "plots": ("/jobs/{flawless}/plots", 200),
        "a deletion": ("/jobs/{scored}/delete", 200),
        "schedules": ("/schedules", 200),
        "a schedule": ("/schedules/{schedule}", 200),
        "models": ("/models", 200),
        "a model": ("/models/iris", 200),
        "a version": ("/models/iris?version=1", 200),
        "a model of images": ("/models/colours", 200),
        "a model to try": ("/models/iris/try", 200),
        "an answer": ("/models/iris/try?version=1&" + TRIED, 200),
        "an image to try": ("/models/colours/try", 200),
        "audit": ("/system/audit", 200),
        "quotas": ("/system/quotas", 200),
        "system": ("/system", 200),
        "keys": ("/keys", 200),
        "webhooks": ("/webhooks", 200),
        "a webhook": ("/webhooks/jobs", 200),
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
        client.models.add(renamed(iris), name="iris")
        client.models.add(colours(), name="colours")
        scored = client.submit(faulty, "iris@1", metadata={"plant": "north"}).wait(timeout=60)
        flawless = client.submit(flowers, "iris@1", passthrough="all", format="parquet").wait(timeout=60)
        failed = client.submit(worse, "iris@1", on_row_error="fail")
        cancelled = client.submit(flowers, "iris@1", run_after=FAR, reuse=False).cancel()
        queued = client.submit(flowers, "iris@1", run_after=FAR, reuse=False)
        uploaded, unfit = client.upload(flowers), client.upload(wine)
        images = client.submit(pictures(folder), "colours").wait(timeout=60)
        options = {"model": "colours", "metadata": {"night": "{date-1d}"}}
        schedule = client.schedules.create(
            "nightly", "30 2 29 2 *", options, action="uploaded", time_zone="Europe/Zurich"
        )
        schedule.run()  # it fails: nothing that was uploaded fits
        with suppress(JobFailed):
            failed.wait(timeout=60)
    return Exhibits(scored, flawless, failed, cancelled, queued, uploaded, unfit, images, schedule)


def renamed(iris: Path) -> bytes:
    """The same model with other names of its classes, for a version that differs."""
    model = onnx.load_model(iris)
    for entry in model.metadata_props:
        entry.value = entry.value.replace("setosa", "Iris setosa")
    model.doc_string = "2"
    return bytes(model.SerializeToString())


def colours() -> bytes:
    """A model of the colour of an image: the shares of red, green and blue."""
    graph = parser.parse_model(
        '<ir_version: 8, opset_import: ["" : 17]> g (float[N,3,16,16] image) => (float[N,3] probabilities) '
        "{ means = ReduceMean<axes=[2,3], keepdims=0>(image) probabilities = Softmax<axis=1>(means) }"
    )
    about = {
        "batchserve.image": json.dumps({"resize": "stretch", "size": [16, 16], "scale": 0.02}),
        "batchserve.labels": json.dumps(["red", "green", "blue"]),
    }
    for key, value in about.items():
        entry = graph.metadata_props.add()
        entry.key, entry.value = key, value
    return bytes(graph.SerializeToString())


def pictures(folder: Path) -> Path:
    """An archive of discs, and a text among them."""
    path = folder / "discs.zip"
    with zipfile.ZipFile(path, "w") as members:
        for number, colour in enumerate(("#b3403a", "#3f8f5a", "#3867a8", "#c98a3c", "#7a4fa0", "#2f9a9a")):
            image, content = Image.new("RGB", (160, 120), "#20262b"), io.BytesIO()
            ImageDraw.Draw(image).ellipse((30, 10, 130, 110), fill=colour)
            image.save(content, "PNG")
            members.writestr(f"discs/{number}.png", content.getvalue())
        members.writestr("notes.txt", b"no image")
    return path
