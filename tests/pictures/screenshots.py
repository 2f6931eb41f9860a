"""Pages of a server with real jobs, light and dark, as small files."""

import io
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import browsers
from commands import Service, clean_environment
from exhibits import TRIED, Exhibits, arranged
from PIL import Image
from sklearn.datasets import load_iris
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from batchserve import Client
from batchserve.conversion import convert

if TYPE_CHECKING:
    from playwright.sync_api import Browser

WIDTH = 1100
HEIGHT, HEIGHTS = 700, {"fit": 1250, "job": 1100, "failed-rows": 420, "system": 640, "try": 600}
COLOURS = 96
MOST_BYTES = 100_000
FLIGHTS = 100_000


def take(folder: Path, images: Path) -> Iterator[Path]:
    """Yields each file when it is written."""
    command = [sys.executable, "-m", "batchserve", "demo", "--rows", str(FLIGHTS), "--json"]
    subprocess.run(command, cwd=folder, env=clean_environment(), stdout=subprocess.DEVNULL, check=True)
    server = Service(folder, "serve", "--port", "0", settings={})
    try:
        url = server.wait_for(r" at (http://\S+) ")[1]
        shown = _shown(url, folder)
        with browsers.running() as browser:
            for name, path in shown.items():
                for dark in (False, True):
                    target = images / f"{name}-{'dark' if dark else 'light'}.png"
                    target.write_bytes(_picture(browser, url + path, (WIDTH, HEIGHTS.get(name, HEIGHT)), dark=dark))
                    yield target
    finally:
        server.end()


def _shown(url: str, folder: Path) -> dict[str, str]:
    """The path of each page by the name of its picture."""
    iris = load_iris(as_frame=True)
    pipeline = make_pipeline(StandardScaler(), LogisticRegression()).fit(iris.data, iris.target_names[iris.target])
    convert(pipeline, iris.data, folder / "iris.onnx")
    iris.data.to_csv(folder / "flowers.csv", index=False)
    exhibits: Exhibits = arranged(url, folder, folder / "iris.onnx", folder / "flowers.csv")
    with Client(url) as client:
        flights = next(client.jobs.list(model="flights"))
    return {
        "home": "/",
        "fit": f"/jobs/{exhibits.uploaded.id}?model=iris@1",
        "jobs": "/jobs",
        "job": f"/jobs/{flights.id}",
        "plots": f"/jobs/{flights.id}/plots",
        "failed-rows": f"/jobs/{exhibits.scored.id}/failed",
        "images": f"/jobs/{exhibits.images.id}/records",
        "models": "/models",
        "model": "/models/iris",
        "try": f"/models/iris/try?version=1&{TRIED}",
        "schedule": f"/schedules/{exhibits.schedule.id}",
        "system": "/system",
        "webhooks": "/webhooks",
        "keys": "/keys",
        "audit": "/system/audit",
        "quotas": "/system/quotas",
    }


def _picture(browser: "Browser", url: str, size: tuple[int, int], *, dark: bool) -> bytes:
    """A PNG with few colours: pages have no more, but for the edges of letters."""
    with browsers.visiting(browser, url, dark=dark, size=size) as page:
        browsers.settle(page)
        page.wait_for_load_state(
            "networkidle" if "/records" in url else "load"
        )  # images are fetched when they are seen
        taken = Image.open(io.BytesIO(page.screenshot()))
    target = io.BytesIO()
    taken.convert("RGB").quantize(COLOURS, dither=Image.Dither.NONE).save(target, "PNG", optimize=True)
    if target.tell() > MOST_BYTES:
        raise SystemExit(f"{url} takes {target.tell():,} bytes as a picture: at most {MOST_BYTES:,} are allowed")
    return target.getvalue()
