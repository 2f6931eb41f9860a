"""Models that users hand in, as the body of a request. What is no graph yet is converted here, where it was trained."""

import os
from pathlib import Path
from typing import Any

from batchserve.client.data import UNKNOWN, bytes_content, content_of
from batchserve.client.extras import require_service
from batchserve.client.transport import Content
from batchserve.errors import InvalidInput

_PICKLES = {".joblib", ".pickle", ".pkl"}


def content_of_model(model: object, sample: Any = None) -> Content:
    """The body that carries a model: a path or the bytes of an ONNX file or a zip bundle, a ModelProto, what `convert`
    gives, or what it takes: a fitted estimator or the path of its file, together with its sample, or an MLflow folder.

    Raises InvalidInput for an estimator without a sample, ConversionFailed and ParityFailed as `convert` does.
    """
    path = Path(model) if isinstance(model, str | os.PathLike) else None
    if path is not None and sample is None and not path.is_dir() and path.suffix.lower() not in _PICKLES:
        return content_of(path)
    if isinstance(model, bytes | bytearray | memoryview):
        return bytes_content(bytes(model), UNKNOWN)
    if hasattr(model, "SerializeToString"):
        return bytes_content(model.SerializeToString(), UNKNOWN)
    if isinstance(graph := getattr(model, "onnx", None), bytes):
        return bytes_content(graph, UNKNOWN)
    if sample is None and (path is None or not path.is_dir()):  # a folder may have records of its own
        what = "model of this file" if path is not None else type(model).__name__
        raise InvalidInput(
            f"a {what} is converted to ONNX first, which needs records as it was trained on: "
            "models.add(model, X, name=...)"
        )
    require_service("the conversion of a model")
    from batchserve.conversion import convert

    return bytes_content(convert(model if path is None else path, sample).onnx, UNKNOWN)
