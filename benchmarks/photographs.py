"""Large JPEG photographs scored by ResNet-18: the seconds of a job beside those of decoding and of the network alone,
and of both in one program, and what the choice `draft` gains and moves. All of them use all cores, so that a job takes
as long as the slower one only where the other one is nothing beside it.

    python -m benchmarks.photographs [count]

The photographs are the two of scikit-learn at 3000 x 2000, each cut and grained otherwise.
"""

import io
import json
import os
import statistics
import sys
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import onnx
import polars as pl
from PIL import Image
from sklearn.datasets import load_sample_images

from benchmarks import processes, service
from benchmarks.images import LIMIT, LIMIT_TIMEOUT
from benchmarks.networks import IMAGENET, resnet18
from examples import cifar10

COUNT = 256
"""Two batches of every process of the reference, on two cores."""
SIZE = (3000, 2000)
REPEATS = 3
EXACT, DRAFT = "exact", "draft"


def main() -> None:
    count = int(sys.argv[1]) if len(sys.argv) > 1 else COUNT
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for figures in measured(folder, archive(folder / "photographs.zip", count), count):
            print(json.dumps(figures), flush=True)


def measured(folder: Path, source: Path, count: int) -> list[dict[str, object]]:
    """Medians of the seconds; all programs take turns."""
    models = {kind: graph(folder / f"{kind}.onnx", draft=kind == DRAFT) for kind in (EXACT, DRAFT)}
    limits = ("decode", "network", "both")
    taken: dict[str, list[float]] = {kind: [] for kind in (EXACT, DRAFT, *limits)}
    home = folder / "server"
    home.mkdir()
    with processes.batchserve(home) as server:
        for kind, model in models.items():
            service.register(server.url, kind, model)
            service.three_calls(server.url, kind, source, folder / "warm", "jsonl")
        for _ in range(REPEATS):
            for what in limits:
                python, target = Path(sys.executable), folder / what
                os.sync()
                ran = processes.timed_script(python, LIMIT, models[EXACT], source, target, what, timeout=LIMIT_TIMEOUT)
                taken[what].append(ran.seconds)
            for kind in models:
                os.sync()
                steps = service.three_calls(server.url, kind, source, folder / f"{kind}.jsonl", "jsonl")
                taken[kind].append(steps.predict)
    seconds_of = {what: statistics.median(values) for what, values in taken.items()}
    slower = max(seconds_of["decode"], seconds_of["network"])
    moved = difference(folder / f"{EXACT}.jsonl", folder / f"{DRAFT}.jsonl")
    return [
        {"photographs": count, "megapixels": SIZE[0] * SIZE[1] / 1e6},
        {what: round(value, 2) for what, value in seconds_of.items()},
        {
            "exact / slower of decoding and network": round(seconds_of[EXACT] / slower, 3),
            "exact / both in one program": round(seconds_of[EXACT] / seconds_of["both"], 3),
        },
        {"draft: times as fast": round(seconds_of[EXACT] / seconds_of[DRAFT], 2), "moves a probability by": moved},
    ]


def archive(path: Path, count: int) -> Path:
    """A zip of JPEG files of quality 90."""
    random = np.random.default_rng(0)
    pictures = [Image.fromarray(picture) for picture in load_sample_images().images]
    grain = random.normal(0, 6, (SIZE[1] + 256, SIZE[0] + 256, 3)).astype(np.float32)
    with zipfile.ZipFile(path, "w") as opened:
        for number in range(count):
            opened.writestr(f"{number:05}.jpg", photograph(pictures[number % len(pictures)], grain, random))
    return path


def photograph(picture: Image.Image, grain: np.ndarray, random: np.random.Generator) -> bytes:
    """A cut of the picture, of its proportions, with grain as a sensor has it."""
    share = random.uniform(0.5, 1.0)
    width, height = picture.width * share, picture.height * share
    left, top = random.uniform(0, picture.width - width), random.uniform(0, picture.height - height)
    box = (left, top, left + width, top + height)
    enlarged = np.asarray(picture.resize(SIZE, Image.Resampling.BICUBIC, box), dtype=np.float32)
    down, right = random.integers(0, 256, 2)
    grained = enlarged + grain[down : down + SIZE[1], right : right + SIZE[0]]
    file = io.BytesIO()
    Image.fromarray(np.clip(grained, 0, 255).astype(np.uint8)).save(file, "JPEG", quality=90)
    return file.getvalue()


def graph(path: Path, *, draft: bool) -> Path:
    """ResNet-18 of ten classes."""
    model = onnx.load_model_from_string(resnet18(cifar10.CLASSES))
    for entry in model.metadata_props:
        if entry.key == "batchserve.image":
            entry.value = json.dumps(IMAGENET | {"draft": draft})
    path.write_bytes(model.SerializeToString())
    return path


def difference(exact: Path, draft: Path) -> float:
    """The largest between two probabilities of one class."""
    one, other = (pl.read_ndjson(path).select(pl.selectors.starts_with("probability_")) for path in (exact, draft))
    return round(float(np.abs(one.to_numpy() - other.to_numpy()).max()), 5)


if __name__ == "__main__":
    main()
