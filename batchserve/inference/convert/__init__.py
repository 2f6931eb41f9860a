"""From a fitted scikit-learn estimator to an ONNX graph that answers like it.

Runs where the pickle is trusted: on the machine of whoever trained the model, never on the server. The graph carries
what a server needs to know beside it, as JSON texts in its `metadata_props` under `batchserve.*`: `columns`, `labels`,
`targets`, `task`, `sample`, `parity`, `versions` and `training_digest`.
"""

import json
import os
import sys
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx

from batchserve.domain import Column
from batchserve.errors import ConversionFailed, ParityFailed
from batchserve.inference.convert.check import check
from batchserve.inference.convert.estimator import (
    Reference,
    Task,
    ask,
    boosters,
    choose_columns,
    known_differences,
    load,
)
from batchserve.inference.convert.export import convertible, layouts, serialize, to_onnx
from batchserve.inference.convert.sample import INSTALL, Array, as_frame, listed
from batchserve.inference.parity import Parity

if TYPE_CHECKING:
    import pandas
    import polars

__all__ = ["Conversion", "convert"]

MAX_OPSET = 22
SAMPLE_RECORDS = 8


@dataclass(frozen=True)
class Conversion:
    """A converted model: the bytes of the graph, how well it agrees with the estimator, and what it takes."""

    onnx: bytes
    report: Parity
    columns: tuple[Column, ...]
    task: Task

    def save(self, path: Path | str) -> Path:
        """Write the graph; a reader of `path` sees the old file or the whole new one, never a part."""
        path = Path(path)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(self.onnx)
                file.flush()
                os.fsync(file.fileno())
            Path(temporary).chmod(0o644)
            Path(temporary).replace(path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
        return path


def convert(
    model: object,
    sample: "pandas.DataFrame | polars.DataFrame | Array | Sequence[str] | Path",
    output: Path | str | None = None,
    *,
    tolerance: float = 1e-4,
    targets: Sequence[str] | None = None,
    embed_sample: bool = True,
    target_opset: int | None = None,
) -> Conversion:
    """Convert a fitted estimator to ONNX, and prove on `sample` that both give the same answers.

    `model`: the estimator, or the path of its pickle (joblib or pickle), which is loaded here: trust it.
    `sample`: records as the estimator takes them, a thousand or so; a path is read as CSV, Parquet or NDJSON. Columns
    that the model does not use are ignored.
    `targets`: names for the outputs of a model with several of them.
    `embed_sample`: let up to eight records travel with the graph, for examples and probe runs.

    Raises ConversionFailed when there is no converter or the sample does not fit, and ParityFailed (the report is in
    `extra["parity"]`) when more than 0.1 % of the labels differ, or one record in a hundred by more than `tolerance`,
    relative to max(1, |expected|). With `output` the graph is written there, after it passed.
    """
    for package in ("sklearn", "skl2onnx", "pandas"):
        if find_spec(package) is None:
            raise ConversionFailed(f"The conversion needs {package}. {INSTALL}")
    with warnings.catch_warnings():
        # Estimators and converters warn about their own internals; what matters shows in the parity run.
        warnings.simplefilter("ignore")
        digest: str | None = None
        notes: list[str] = []
        if isinstance(model, Path | str):
            model, digest, notes = load(Path(model))
        model = getattr(model, "best_estimator_", model)  # a search answers by its best estimator
        table = choose_columns(model, *as_frame(sample))
        reference = ask(model, table)
        conversion = _first_that_passes(
            convertible(model),
            reference,
            tolerance=tolerance,
            target_opset=target_opset or MAX_OPSET,
            notes=[*notes, *known_differences(model)],
        )
    report = conversion.report
    if not report.passed:
        raise ParityFailed(
            f"{report}\nGraphs compute in float32: fit the model on float32 data, or pass a larger tolerance if you "
            "accept this.",
            parity=report.to_json(),
        )
    facts = _facts(model, reference, targets) | {
        "columns": _column_facts(conversion) if reference.table.named else None,
        "sample": reference.table.records(SAMPLE_RECORDS) if embed_sample else None,
        "parity": report.to_json(),
        "training_digest": digest,
    }
    conversion = replace(conversion, onnx=_with_metadata(conversion.onnx, facts))
    if output is not None:
        conversion.save(output)
    return conversion


def _first_that_passes(
    model: Any, reference: Reference, *, tolerance: float, target_opset: int, notes: Sequence[str]
) -> Conversion:
    """Convert with each layout until one answers like the estimator; else the first that at least runs."""
    conversions: list[Conversion] = []
    failures: list[ConversionFailed] = []
    for layout in layouts(model, reference.table):
        try:
            graph = to_onnx(model, layout, target_opset)
            report, columns = check(graph, layout, reference, tolerance, notes)
        except ConversionFailed as failure:
            failures.append(failure)
            continue
        conversions.append(Conversion(serialize(graph), report, columns, reference.task))
        if report.passed:
            return conversions[-1]
    if conversions:
        return conversions[0]
    raise failures[0]


# --- metadata --------------------------------------------------------------------------------------------------------


def _facts(model: object, reference: Reference, targets: Sequence[str] | None) -> dict[str, Any]:
    shape = reference.labels.shape if reference.labels is not None else reference.numbers[0].shape
    count = shape[1] if len(shape) > 1 else 1
    if targets is not None and len(targets) != count:
        raise ConversionFailed(
            f"The model has {count} targets, and {len(targets)} names were given: {listed(targets)}."
        )
    versions = {name: version(name) for name in ("onnx", "scikit-learn", "skl2onnx")}
    # A booster's distribution has several names: xgboost, xgboost-cpu.
    versions |= {name: sys.modules[name].__version__ for name in sorted(boosters(model))}
    return {
        "task": reference.task,
        "labels": _labels(model, count) if reference.task == "classification" else None,
        "targets": list(targets) if targets is not None else None,
        "versions": versions,
    }


def _labels(model: object, count: int) -> list[Any] | None:
    """The classes in the order of the probabilities; a list for each target where there are several."""
    classes = getattr(model, "classes_", None)
    if classes is None:
        return None
    if isinstance(classes, list):
        return [_json_labels(target) for target in classes]
    # The classes of a multi-label model are its targets; each target is no (0) or yes (1).
    return _json_labels(np.asarray(classes)) if count == 1 else [[0, 1]] * count


def _json_labels(classes: Array) -> list[str | int]:
    """Integers and texts; the graph gives False and True as 0 and 1, and 1.0 as 1."""
    return [int(label) for label in classes] if classes.dtype.kind in "biuf" else [str(label) for label in classes]


def _column_facts(conversion: Conversion) -> list[dict[str, Any]]:
    graph = onnx.load_from_string(conversion.onnx).graph
    inputs = [tensor.name for tensor in graph.input]
    if len(inputs) == 1:
        inputs *= len(conversion.columns)
    return [
        {"name": column.name, "dtype": column.dtype, "input": name, "nullable": column.nullable}
        for column, name in zip(conversion.columns, inputs, strict=True)
    ]


def _with_metadata(data: bytes, facts: dict[str, Any]) -> bytes:
    graph = onnx.load_from_string(data)
    texts = {
        f"batchserve.{name}": json.dumps(value, ensure_ascii=False, allow_nan=False)
        for name, value in sorted(facts.items())
        if value is not None
    }
    onnx.helper.set_model_props(graph, texts)
    return serialize(graph)
