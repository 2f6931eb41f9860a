"""img2feat's pipeline as one graph: image -> features of a convolutional network -> standardize -> estimator."""

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from batchserve.conversion.conversion import Conversion
from batchserve.conversion.files import load
from batchserve.conversion.fuse import BATCH, fuse, prepare
from batchserve.conversion.network import PRESETS
from batchserve.conversion.sample import Array, listed, sentence
from batchserve.conversion.torch import MADE_UP, evaluating, make_call, quietly, trace
from batchserve.domain import InputTensor
from batchserve.errors import ConversionFailed

if TYPE_CHECKING:
    import torch

INSTALL = "Install it with: pip install 'batchserve[img2feat]'"
INPUT = "image"
_OPERATORS = ("nms", "qnms")


def export_img2feat(
    cnn: Any,
    classifier: Any,
    mean: Array | None = None,
    scale: Array | None = None,
    labels: Sequence[object] | None = None,
    output: Path | str | None = None,
    *,
    images: Sequence[Array] | None = None,
    tolerance: float = 1e-4,
) -> Conversion:
    """Export a network of img2feat and the estimator that was fitted on its features as one graph that takes images.

    `cnn`: an `img2feat.CNN`, or any torch module from images [N, 3, height, width], prepared as img2feat does, to
    features [N, d] or [N, d, 1, 1]; a module gets images of 224 x 224. `classifier`: a fitted scikit-learn classifier,
    regressor or pipeline; it gets (features - mean) / scale. `mean`, `scale`: [d] each, of a StandardScaler; None where
    nothing is standardized, or the pipeline does it. `labels`: names for the classes, in the order of
    `classifier.classes_`; the answers are these names then. `images`: a sample to prove the graph on, as img2feat takes
    them: uint8 [height, width, 3] in BGR, of any sizes. Without it, parity is measured on noise.

    Raises ConversionFailed, and ParityFailed as `convert` does: the graph must answer `images` as img2feat and
    scikit-learn together do. With `output` the graph is written there, after it passed.
    """
    require_img2feat()
    network, (width, height) = _network(cnn)
    preprocessing = replace(PRESETS["img2feat"], size=(height, width))
    notes: list[str] = []
    if images is None:
        noise = np.random.default_rng(0).integers(0, 256, (MADE_UP, height, width, 3), dtype=np.uint8)
        images, notes = list(noise), ["No images were given: the graph was verified on noise."]
    if len(images) == 0:
        raise ConversionFailed("The sample has no images. Pass some like those of the training; 100 are enough.")
    colours = [_rgb(index, image) for index, image in enumerate(images)]
    tensor = InputTensor(INPUT, "float32", (None, 3, height, width), image=preprocessing)
    with quietly(), evaluating(network):
        graph = trace(make_call(network, prepare(colours[:2], tensor), [INPUT]), ["features"], {})
        if cnn is network:
            blocks = [prepare(colours[start : start + BATCH], tensor) for start in range(0, len(colours), BATCH)]
            features = np.concatenate([_features(network, block) for block in blocks])
        else:
            features = np.asarray(cnn(list(images)))
    conversion = fuse(
        graph,
        _standardized(classifier, mean, scale, features.shape[1]),
        colours,
        features,
        image=preprocessing,
        labels=labels,
        tolerance=tolerance,
        packages=["torch"],
        notes=notes,
    )
    if output is not None:
        conversion.save(output)
    return conversion


def convert_img2feat(
    path: Path,
    network: str,
    output: Path | None = None,
    *,
    weights: Path | None = None,
    labels: Sequence[object] | None = None,
    sample: Path | None = None,
    tolerance: float = 1e-4,
) -> Conversion:
    """`export_img2feat` of a pickled estimator, which is trusted, on the features of `load_cnn(network, weights)`.

    `sample`: a folder with images, at any depth.
    """
    require_img2feat()
    estimator = load(path).model
    images = _read_images(sample) if sample is not None else None
    cnn = load_cnn(network, weights=weights)
    return export_img2feat(cnn, estimator, labels=labels, output=output, images=images, tolerance=tolerance)


def _read_images(folder: Path) -> list[Array]:
    """The images that OpenCV reads from a folder, at any depth."""
    import cv2

    files = sorted(path for path in folder.rglob("*") if path.is_file())
    images = [image for path in files if (image := cv2.imread(str(path))) is not None]
    if not images:
        raise ConversionFailed(f"The sample {folder} is not a folder with images.")
    return images


def _rgb(index: int, image: Array) -> Array:
    """An image of OpenCV, in BGR."""
    if np.ndim(image) != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise ConversionFailed(
            f"Image {index} is {np.asarray(image).dtype} {list(np.shape(image))}, not uint8 [height, width, 3]."
        )
    return image[:, :, ::-1]


def _network(cnn: Any) -> "tuple[torch.nn.Module, tuple[int, int]]":
    """The module, and the width and height of its images."""
    import torch

    if isinstance(cnn, torch.nn.Module):
        return cnn, (224, 224)
    network = getattr(cnn, "_CNN__network", None)  # a private attribute of img2feat
    if not isinstance(network, torch.nn.Module):
        raise ConversionFailed(f"{type(cnn).__name__} is neither an img2feat.CNN nor a torch.nn.Module.")
    width, height = cnn.img_size
    return network, (width, height)


def _features(network: "torch.nn.Module", tensor: Array) -> Array:
    """[n, d]"""
    import torch

    device = next((parameter.device for parameter in network.parameters()), torch.device("cpu"))
    found: Array = network(torch.from_numpy(tensor).to(device)).flatten(1).cpu().numpy()
    return found


def _standardized(classifier: Any, mean: Array | None, scale: Array | None, width: int) -> Any:
    """The estimator after a StandardScaler with these parameters."""
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    if mean is None and scale is None:
        return classifier
    for name, values in (("mean", mean), ("scale", scale)):
        if values is not None and np.shape(values) != (width,):
            raise ConversionFailed(
                f"{name} has shape {list(np.shape(values))}, and the network gives {width} features."
            )
    scaler = StandardScaler(with_mean=mean is not None, with_std=scale is not None)
    scaler.mean_ = None if mean is None else np.asarray(mean)
    scaler.scale_ = None if scale is None else np.asarray(scale)
    scaler.n_features_in_, scaler.n_samples_seen_ = width, 1
    return make_pipeline(scaler, classifier)


# --- img2feat and torchvision ----------------------------------------------------------------------------------------


def require_img2feat() -> None:
    for package in ("torch", "cv2", "sklearn", "skl2onnx"):
        if find_spec(package) is None:
            raise ConversionFailed(f"The export needs {package}. {INSTALL}")


def load_cnn(name: str, *, weights: Path | None = None, size: tuple[int, int] = (224, 224)) -> Any:
    """`img2feat.CNN(name)`, with the weights that torchvision downloads or has in its cache.

    `weights`: a file of weights for torchvision's network instead, where they cannot be downloaded. `size`: width and
    height of the images that the network gets.

    Raises ConversionFailed when there is no such network, or its weights are unavailable.
    """
    require_img2feat()
    import_torchvision()
    from img2feat import CNN

    names = CNN.available_networks()
    if name.lower() not in names:
        raise ConversionFailed(f"img2feat has no network {name!r}: {listed(sorted(names))}.")
    with _weights_of(name.lower(), weights), quietly():
        try:
            return CNN(name, img_size=size)
        except Exception as error:  # errors of network, files, pickles or img2feat itself
            raise ConversionFailed(
                f"img2feat could not build {name!r}: {sentence(error)} If its weights cannot be downloaded from here, "
                "pass a file of them."
            ) from error


def import_torchvision() -> Any:
    """torchvision, even with a torch that its compiled operators do not match, such as a CPU-only one.

    Such a torchvision fails to import, although its networks do not need the operators: declaring their names makes the
    import succeed.
    """
    import torch

    try:
        import torchvision
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
        _DECLARED.append(torch.library.Library("torchvision", "DEF"))
        for operator in _OPERATORS:
            _DECLARED[0].define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        import torchvision
    return torchvision


_DECLARED: list[Any] = []
"""Keeps the declarations alive."""


@contextmanager
def _weights_of(name: str, weights: Path | None) -> Iterator[None]:
    """Places the file in the torch.hub cache as the download of this network."""
    if weights is None:
        yield
        return
    import torch
    from torchvision.models import get_model_weights

    url = get_model_weights(_TORCHVISION.get(name, name))["IMAGENET1K_V1"].url
    cache = torch.hub.get_dir()
    with tempfile.TemporaryDirectory() as folder:
        checkpoints = Path(folder) / "checkpoints"
        checkpoints.mkdir()
        (checkpoints / url.rpartition("/")[2]).symlink_to(weights.resolve())
        torch.hub.set_dir(folder)
        try:
            yield
        finally:
            torch.hub.set_dir(cache)


_TORCHVISION = {"mobilenet": "mobilenet_v2"}
"""torchvision's names of img2feat's networks, where they differ."""
