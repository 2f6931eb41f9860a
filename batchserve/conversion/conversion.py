"""The result of every conversion: a self-describing graph, and its parity with the original."""

import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx

from batchserve.admission.bundle import MAX_MODEL_BYTES
from batchserve.conversion.estimator import Task
from batchserve.conversion.parity import Parity
from batchserve.domain import Column
from batchserve.errors import ConversionFailed, ParityFailed

MAX_IR = 10
"""Far below the newest that ONNX Runtime loads, for older releases."""


@dataclass(frozen=True)
class Conversion:
    """A converted model: the bytes of the graph, its parity with the original, and its inputs."""

    onnx: bytes
    report: Parity
    columns: tuple[Column, ...]
    """Empty: the inputs have no named columns."""
    task: Task | None
    """None: not known."""

    def save(self, path: Path | str) -> Path:
        """Write the graph; a reader of `path` sees the old or the complete new file."""
        return write(self.onnx, Path(path))


def write(data: bytes, path: Path) -> Path:
    """Write a file atomically: a reader of `path` sees the old or the complete new one."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).chmod(0o644)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return path


def check_parity(report: Parity, hint: str) -> None:
    """Raises ParityFailed, with the report in `extra["parity"]`."""
    if not report.passed:
        raise ParityFailed(f"{report}\n{hint}", parity=report.to_json())


def tidy(graph: onnx.ModelProto) -> onnx.ModelProto:
    """The graph in a file format that older runtimes read, with each operator set listed once."""
    graph.ir_version = min(graph.ir_version, MAX_IR)
    set_opsets(graph, opsets(graph))  # skl2onnx lists some domains twice
    return graph


def opsets(graph: onnx.ModelProto) -> dict[str, int]:
    return {opset.domain: opset.version for opset in graph.opset_import}


def set_opsets(graph: onnx.ModelProto, versions: Mapping[str, int]) -> None:
    del graph.opset_import[:]
    graph.opset_import.extend(onnx.helper.make_opsetid(domain, versions[domain]) for domain in sorted(versions))


def with_facts(graph: onnx.ModelProto, facts: Mapping[str, Any]) -> onnx.ModelProto:
    """The graph with these as JSON texts under `batchserve.*` in its metadata; None is left out."""
    texts = {entry.key: entry.value for entry in graph.metadata_props} | {
        f"batchserve.{name}": json.dumps(value, ensure_ascii=False, allow_nan=False)
        for name, value in sorted(facts.items())
        if value is not None
    }
    onnx.helper.set_model_props(graph, texts)
    return graph


def serialize(graph: onnx.ModelProto) -> bytes:
    """The same bytes for the same graph, in every process. Raises ConversionFailed for more than a server takes."""
    size = graph.ByteSize()
    if size > MAX_MODEL_BYTES:
        raise ConversionFailed(f"The graph has {size:,} bytes, and a server takes at most {MAX_MODEL_BYTES:,}.")
    data: bytes = graph.SerializeToString(deterministic=True)
    return data
