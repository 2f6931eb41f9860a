"""Conversion of trained models to equivalent ONNX graphs: scikit-learn, PyTorch, img2feat.

Runs where the pickle is trusted: on the machine of the model's author, never on the server. The graph carries the
metadata that a server needs, as JSON texts in its `metadata_props` under `batchserve.*`: `columns`, `image`, `labels`,
`targets`, `task`, `sample`, `parity`, `versions` and `training_digest`.
"""

import itertools
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx

from batchserve.conversion.check import check
from batchserve.conversion.conversion import Conversion, check_parity, serialize
from batchserve.conversion.estimator import (
    Reference,
    ask,
    boosters,
    choose_columns,
    class_labels,
    finds_neighbours,
    has_trees,
    known_differences,
    last_step,
    neighbours_tie,
)
from batchserve.conversion.export import GraphInput, answer_truth, convertible, layouts, to_onnx, widened
from batchserve.conversion.files import Loaded, load
from batchserve.conversion.img2feat import convert_img2feat, export_img2feat
from batchserve.conversion.links import chain
from batchserve.conversion.mlflow import name_columns, sample_of
from batchserve.conversion.network import annotate
from batchserve.conversion.parity import Parity
from batchserve.conversion.sample import INSTALL, Array, Rounds, Table, listed
from batchserve.conversion.torch import convert_torch, export_torch
from batchserve.conversion.values import Unequal, with_domains
from batchserve.errors import BatchserveError, ConversionFailed, ParityFailed

if TYPE_CHECKING:
    import pandas
    import polars

__all__ = [
    "Conversion",
    "annotate",
    "chain",
    "convert",
    "convert_img2feat",
    "convert_torch",
    "export_img2feat",
    "export_torch",
]

MAX_OPSET = 22
_FLOAT32 = "Graphs compute in float32: fit the model on float32 data, or pass a larger tolerance if you accept this."
_OTHER = (
    "Most records differ, which rounding does not explain: the converter of a step computes something else. Replace "
    "that step, or register a converter before you call convert (skl2onnx.update_registered_converter; on the command "
    "line --converters MODULE)."
)
_ROUNDED = (
    "Most records differ. Trees split by what the steps before them compute: where the graph rounds that to float32, "
    "or the converter of a step computes something else, records go another way. Fit the model on float32 data, "
    "replace that step, or register a converter before you call convert (skl2onnx.update_registered_converter; on the "
    "command line --converters MODULE)."
)
_LABELS = (
    "The numbers agree and the labels do not: the converter of the last step chooses the label otherwise. Replace that "
    "step, or register a converter before you call convert (skl2onnx.update_registered_converter; on the command line "
    "--converters MODULE)."
)
_TIES = (
    "Neighbours at the same distance are chosen in an order that only the fitted model knows. Fit it on numbers with "
    "more digits, or with another metric, so that fewer distances are equal."
)
_WIDELY = 0.1
"""Mean of the differences over their maximum, from which on most records differ; rounding at splits moves few."""
SAMPLE_RECORDS = 8


def convert(
    model: object,
    sample: "pandas.DataFrame | polars.DataFrame | Array | Sequence[str] | Path | None" = None,
    output: Path | str | None = None,
    *,
    tolerance: float = 1e-4,
    targets: Sequence[str] | None = None,
    embed_sample: bool = True,
    target_opset: int | None = None,
    unequal: Unequal = "refuse",
) -> Conversion:
    """Convert a fitted estimator to ONNX, and verify on `sample` that both give the same outputs.

    `model`: the estimator, a Booster of LightGBM or XGBoost, or the results of statsmodels; or the path of a pickle
    (joblib or pickle), a skops file, a file of LightGBM, XGBoost or CatBoost, or a folder of MLflow, which is loaded
    here: trust it.
    `sample`: records as the estimator takes them, a thousand or so; a path is read as CSV, Parquet or NDJSON. Columns
    that the model does not use are ignored. A folder of MLflow with an input example needs none.
    `targets`: names for the outputs of a model with several of them.
    `embed_sample`: let up to eight records travel with the graph, for examples and probe runs.

    Raises ConversionFailed when there is no converter or the sample does not fit, and ParityFailed (the report is in
    `extra["parity"]`) when more than 0.1 % of the labels differ, or one record in a hundred by more than `tolerance`,
    relative to max(1, |expected|). So it does, naming the case, when a value that the sample does not have (an unknown
    category, an empty text, a number out of its range) is answered otherwise; with `unequal="row-error"` the server
    refuses such values instead. With `output` the verified graph is written there.
    """
    _require_packages()
    from batchserve.conversion.adoption import adopt  # both need scikit-learn
    from batchserve.conversion.others import adopt_other

    with warnings.catch_warnings():
        # Estimators and converters warn about their own internals; the parity run shows what matters.
        warnings.simplefilter("ignore")
        loaded = load(Path(model)) if isinstance(model, Path | str) else Loaded(model, "")
        if isinstance(loaded.model, onnx.ModelProto):
            return name_columns(loaded, output)
        model = getattr(loaded.model, "best_estimator_", loaded.model)  # a search predicts with its best estimator
        frame, named = sample_of(loaded, sample)
        model = adopt_other(adopt(model, frame))
        table = choose_columns(model, frame, named)
        reference = ask(model, table)
        facts = _facts(model, reference, targets) | {"training_digest": loaded.digest or None}
        facts["sample"] = reference.table.records(SAMPLE_RECORDS) if embed_sample else None

        def finish(conversion: Conversion) -> Conversion:
            columns = _column_facts(conversion) if reference.table.named else None
            return with_domains(model, conversion, facts | {"columns": columns}, reference, tolerance, unequal)

        conversion = _first_that_passes(
            convertible(model, table),
            reference,
            tolerance=tolerance,
            target_opset=target_opset or MAX_OPSET,
            notes=[*loaded.notes, *known_differences(model)],
            finish=finish,
        )
    if output is not None:
        conversion.save(output)
    return conversion


def _require_packages() -> None:
    for package in ("sklearn", "skl2onnx", "pandas"):
        if find_spec(package) is None:
            raise ConversionFailed(f"The conversion needs {package}. {INSTALL}")


def _first_that_passes(
    model: Any,
    reference: Reference,
    *,
    tolerance: float,
    target_opset: int,
    notes: Sequence[str],
    finish: Callable[[Conversion], Conversion],
) -> Conversion:
    """Convert with each layout until one answers like the estimator, also beyond the sample (`finish`): each record of
    the sample, or else as many as parity wants.

    Where none does, trees are written anew, which is slower to score and exact; and where that does not help, what
    comes before them takes and computes float64.
    """
    reports: list[Parity] = []
    failures: list[BatchserveError] = []
    nearly: Conversion | None = None
    for way, layout in _ways(model, reference.table):
        try:
            graph = to_onnx(way, layout, target_opset)
            if reference.labels is not None and reference.labels.dtype == bool:
                graph = answer_truth(graph)
            report, columns = check(graph, layout, reference, tolerance, notes)
        except ConversionFailed as failure:
            failures.append(failure)
            continue
        if not report.passed:
            reports.append(report)
            continue
        if nearly is not None and not report.is_exact:
            continue
        try:
            finished = finish(Conversion(serialize(graph), report, columns, reference.task))
        except (ParityFailed, ConversionFailed) as failure:
            failures.insert(0, failure)
            continue
        if report.is_exact:
            return finished
        nearly = finished
    if nearly is not None:
        return nearly
    if reports and not any(isinstance(failure, ParityFailed) for failure in failures):
        check_parity(reports[0], _cause(reports[0], model, reference, tolerance))
    raise failures[0]


def _cause(report: Parity, model: Any, reference: Reference, tolerance: float) -> str:
    """Why a graph disagrees, as far as the differences tell, and what to do."""
    if neighbours_tie(model, reference.table):
        return _TIES
    if report.differences and all(difference.max_relative <= tolerance for difference in report.differences):
        return _LABELS
    widely = any(
        difference.mean_relative > max(10 * tolerance, _WIDELY * difference.max_relative)
        for difference in report.differences
    )
    if widely:
        return _ROUNDED if has_trees(model) else _OTHER
    return _FLOAT32


def _ways(model: Any, table: Table) -> Iterator[tuple[Any, tuple[GraphInput, ...]]]:
    """What to convert, and with which inputs, the best first.

    Where trees split by what is computed before them, float64 comes first, as the estimator computes that: the sample
    is most often the training data, whose numbers all lie apart from the splits, and would show nothing.
    """
    from batchserve.conversion.converters.within import scales_before_trees, with_double, with_exact_trees

    ways = [way for way in (model, with_exact_trees(model)) if way is not None]
    plain = ((way, layout) for way in ways for layout in layouts(way, table))

    def in_double(*rounding: Rounds) -> Iterator[tuple[Any, tuple[GraphInput, ...]]]:
        for way, rounds in itertools.product(ways, rounding):
            if (wide := with_double(way, rounds=rounds)) is not None:
                yield from ((wide, widened(layout, rounds)) for layout in layouts(way, table))

    always = in_double(lambda _: False, lambda _: True)
    if finds_neighbours(last_step(model)):
        return itertools.chain(always, plain)
    first = in_double(table.in_float32) if scales_before_trees(model) else iter(())
    return itertools.chain(first, plain, always)


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
        "method": reference.method or None,
        "labels": class_labels(model, count) if reference.task == "classification" else None,
        "targets": list(targets) if targets is not None else None,
        "versions": versions,
    }


def _column_facts(conversion: Conversion) -> list[dict[str, Any]]:
    graph = onnx.load_from_string(conversion.onnx).graph
    inputs = [tensor.name for tensor in graph.input]
    if len(inputs) == 1:
        inputs *= len(conversion.columns)
    return [
        {"name": column.name, "dtype": column.dtype, "input": name, "nullable": column.nullable}
        for column, name in zip(conversion.columns, inputs, strict=True)
    ]
