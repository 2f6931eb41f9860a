"""Large photographs have the probabilities of training code: those of Pillow and torchvision, to 1e-5."""

import io
import json
import zipfile
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import numpy as np
import onnxruntime
import polars as pl
import pytest
from onnx import helper
from PIL import Image
from service import Api, decoded, running
from sklearn.datasets import load_sample_images

from batchserve.conversion.network import PRESETS
from benchmarks.networks import Layers

CLASSES = 8
NEAR = 1e-5
"""How far probabilities may differ: the sums of the network are in another order beside other records."""


def network() -> bytes:
    """Convolutions as those of a small ResNet, on 224 x 224, whose probabilities are far from equal."""
    layers = Layers(224)
    layers.convolve(8, 7, 4)
    layers.pool(3)
    for channels in (16, 32):
        layers.residual(channels, 2)
    layers.add("GlobalAveragePool")
    layers.add("Flatten")
    layers.add("Gemm", layers.weight(CLASSES, 32), transB=1)
    layers.add("Softmax", axis=1)
    model = layers.model("probabilities", [CLASSES])
    labels = [f"c{place}" for place in range(CLASSES)]
    entries = {"image": asdict(PRESETS["imagenet"]), "labels": labels, "task": "classification"}
    helper.set_model_props(model, {f"batchserve.{key}": json.dumps(value) for key, value in entries.items()})
    return bytes(model.SerializeToString())


def photographs() -> dict[str, bytes]:
    """Of six megapixels: landscape and portrait, with grain, gray, progressive, with chroma of every resolution."""
    random = np.random.default_rng(0)
    found: dict[str, bytes] = {}
    kinds: list[tuple[str, tuple[int, int], str, dict[str, Any]]] = [
        ("landscape", (3000, 2000), "RGB", {"quality": 90}),
        ("portrait", (2000, 3000), "RGB", {"quality": 75, "subsampling": "4:4:4"}),
        ("progressive", (3001, 1999), "RGB", {"quality": 95, "progressive": True, "subsampling": "4:2:2"}),
        ("gray", (3000, 2000), "L", {"quality": 85}),
        ("print", (3000, 2000), "CMYK", {"quality": 85}),
    ]
    pictures = [Image.fromarray(picture) for picture in load_sample_images().images]
    for number, (name, size, mode, options) in enumerate(kinds):
        large = np.asarray(pictures[number % len(pictures)].resize(size, Image.Resampling.BICUBIC), dtype=np.float32)
        grained = np.clip(large + random.normal(0, 6, (*large.shape[:2], 1)), 0, 255).astype(np.uint8)
        file = io.BytesIO()
        Image.fromarray(grained).convert(mode).save(file, "JPEG", **options)
        found[f"{name}.jpg"] = file.getvalue()
    return found


@pytest.fixture(scope="module")
def given() -> dict[str, bytes]:
    return photographs()


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    with running(tmp_path_factory.mktemp("photographs")) as api:
        api.register("network", network())
        yield api


def scored(service: Api, given: dict[str, bytes]) -> np.ndarray:
    """[photographs, classes] of a job, in their order."""
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as files:
        for name, data in given.items():
            files.writestr(name, data)
    job = service.run(archive.getvalue(), "network", format="parquet")
    assert job["state"] == "completed", job
    result = decoded(service.result(job).content, "parquet")
    assert result["file"].to_list() == list(given)
    return result.select(pl.selectors.starts_with("probability_")).to_numpy()


def network_on(prepared: list[np.ndarray]) -> np.ndarray:
    session = onnxruntime.InferenceSession(network(), providers=["CPUExecutionProvider"])
    answers: np.ndarray = session.run(None, {"image": np.stack(prepared)})[0]
    return answers


def as_pillow(data: bytes) -> np.ndarray:
    """Resize(256), CenterCrop(224), ToTensor() and Normalize() of torchvision, in the terms of Pillow."""
    image = Image.open(io.BytesIO(data)).convert("RGB")
    width, height = image.size
    short = 256 / min(width, height)
    size = (256, int(256 * height / width)) if width <= height else (int(256 * width / height), 256)
    assert abs(max(size) - max(width, height) * short) < 1
    small = image.resize(size, Image.Resampling.BILINEAR)
    left, top = round((size[0] - 224) / 2), round((size[1] - 224) / 2)
    pixels = np.asarray(small.crop((left, top, left + 224, top + 224)), dtype=np.float32) / 255
    mean, std = np.array([0.485, 0.456, 0.406], np.float32), np.array([0.229, 0.224, 0.225], np.float32)
    prepared: np.ndarray = ((pixels - mean) / std).transpose(2, 0, 1)
    return prepared


@pytest.mark.slow
def test_large_photographs_have_the_probabilities_of_pillows_preprocessing(
    service: Api, given: dict[str, bytes]
) -> None:
    answers = scored(service, given)
    expected = network_on([as_pillow(data) for data in given.values()])
    assert np.abs(answers - expected).max() <= NEAR
    # The network tells the photographs apart: otherwise anything would be near.
    assert (np.ptp(expected, axis=0) > 1000 * NEAR).any()


@pytest.mark.torch
def test_large_photographs_have_the_probabilities_of_torchvisions_preprocessing(
    service: Api, given: dict[str, bytes]
) -> None:
    from batchserve.conversion.img2feat import import_torchvision

    transforms = import_torchvision().transforms
    prepare: Any = transforms.Compose(
        [
            transforms.Resize(256),
            transforms.CenterCrop(224),
            transforms.ToTensor(),
            transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
        ]
    )
    prepared = [prepare(Image.open(io.BytesIO(data)).convert("RGB")).numpy() for data in given.values()]
    assert np.abs(scored(service, given) - network_on(prepared)).max() <= NEAR
