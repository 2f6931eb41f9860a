"""Runs a graph on the sample and compares its outputs with the estimator's."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import onnx

from batchserve.conversion.estimator import Reference
from batchserve.conversion.export import GraphInput
from batchserve.conversion.parity import Answers, Parity, compare, flips
from batchserve.conversion.sample import Array, listed
from batchserve.domain import Column
from batchserve.errors import ConversionFailed, ScoringFailed
from batchserve.inference.distances import distances
from batchserve.inference.kernels import Arrays
from batchserve.inference.session import open_session

BATCH = 8192


def check(
    graph: onnx.ModelProto, layout: Sequence[GraphInput], reference: Reference, tolerance: float, notes: Sequence[str]
) -> tuple[Parity, tuple[Column, ...]]:
    """The report, and the columns that the graph takes: nullable where both agree on a missing text."""

    def feed(rows: slice) -> Arrays:
        table = reference.table.take(rows)
        return {tensor.name: item.feed(table) for tensor, item in zip(graph.graph.input, layout, strict=True)}

    theirs, ours, more = answers(graph, feed, reference)

    texts = [column for item in layout if item.dtype == "string" for column in item.columns]
    lacking = reference.table.without(texts)
    nullable = {column for column in texts if reference.table.without([column]).any()}
    keep = np.ones(len(reference.rows), dtype=bool)
    if lacking.any() and not _agree(theirs.take(lacking), ours.take(lacking), tolerance):
        if lacking.all():
            raise ConversionFailed("Every record of the sample lacks a text, and ONNX has no missing text.")
        keep, nullable = ~lacking, set()
        more.append(
            f"{lacking.sum()} of {len(lacking)} records lack a text in {listed(texts)}. ONNX has no missing text and "
            "the model does not take the empty one for it: left out here, and row errors on the server."
        )
    report = compare(
        theirs.take(keep),
        ours.take(keep),
        rows=reference.rows[keep],
        methods=dict.fromkeys(ours.numbers, reference.method),
        tolerance=tolerance,
        notes=[*notes, *reference.notes, *more],
    )
    columns = tuple(Column(c, item.dtype, c in nullable) for item in layout for c in item.columns)
    return report, columns


def _agree(expected: Answers, got: Answers, tolerance: float) -> bool:
    near = all((distances(expected.numbers[name], got.numbers[name])[1] <= tolerance).all() for name in got.numbers)
    return near and not flips(expected, got).any()


def answers(
    graph: onnx.ModelProto, feed: Callable[[slice], Arrays], reference: Reference, batch: int = BATCH
) -> tuple[Answers, Answers, list[str]]:
    """Outputs of the estimator and the graph for the same records, and notes on what cannot be compared.

    `feed`: the inputs of the graph for a range of the reference's records, at most `batch` of them.
    """
    labels, numbers = _run(graph, feed, reference, batch)
    names, expected, got, notes = align(reference, numbers)
    if labels is None and not names:
        raise ConversionFailed(f"No output of the graph can be compared with the estimator. {' '.join(notes)}")
    theirs = Answers(reference.labels, dict(zip(names, expected, strict=True)))
    return theirs, Answers(labels, dict(zip(names, got, strict=True))), notes


def _run(
    graph: onnx.ModelProto, feed: Callable[[slice], Arrays], reference: Reference, batch: int
) -> tuple[Array | None, dict[str, Array]]:
    """Labels [n] or [n, targets], and each numeric output as [n, k]."""
    try:
        session = open_session(graph.SerializeToString())
        outputs: dict[str, list[Array]] = {}
        for start in range(0, len(reference.rows), batch):
            rows = slice(start, min(start + batch, len(reference.rows)))
            for name, value in session.run(feed(rows)).items():
                for key, block in _by_record(name, value, rows.stop - rows.start).items():
                    outputs.setdefault(key, []).append(block)
    except ScoringFailed as error:
        raise ConversionFailed(f"ONNX Runtime does not run the converted graph: {error}") from error
    return _labels_apart({name: np.concatenate(values) for name, values in outputs.items()}, reference)


def numbers_by_record(
    outputs: Mapping[str, Array], reference: Reference, n: int
) -> tuple[Array | None, dict[str, Array]]:
    """The outputs of one run over n records: labels, and each numeric output as [n, k]."""
    blocks = {key: block for name, value in outputs.items() for key, block in _by_record(name, value, n).items()}
    return _labels_apart(blocks, reference)


def _labels_apart(blocks: dict[str, Array], reference: Reference) -> tuple[Array | None, dict[str, Array]]:
    if reference.labels is None:
        return None, blocks
    name = next(iter(blocks))
    labels = blocks.pop(name)
    if labels.size != reference.labels.size:
        raise ConversionFailed(
            f"The graph gives {labels.shape[1]} labels for a record in {name!r}, and the estimator "
            f"{reference.labels.size // len(reference.rows)}: the converter does not fit this estimator."
        )
    return labels.reshape(reference.labels.shape), blocks


def _by_record(name: str, value: Array, n: int) -> dict[str, Array]:
    """An output with the records first: [targets, n, k] is cut into one output for each target."""
    if value.ndim == 3 and value.shape[1] == n:
        return {f"{name}_{i}": target for i, target in enumerate(value)}
    if len(value) != n and value.size % n:
        raise ConversionFailed(
            f"The graph gives {len(value)} rows in {name!r} for {n} records: a step of the model is converted "
            "otherwise than it works."
        )
    return {name: value.reshape(n, -1)}


def align(reference: Reference, numbers: dict[str, Array]) -> tuple[list[str], list[Array], list[Array], list[str]]:
    """Pair the graph's numeric outputs with the estimator's: names, expected, got, and notes on unpaired outputs."""
    names: list[str] = []
    expected: list[Array] = []
    got: list[Array] = []
    notes: list[str] = []
    if len(numbers) != len(reference.numbers):
        reason = f"the graph has {len(numbers)} numeric outputs, the estimator {len(reference.numbers)}"
        return names, expected, got, [f"Only labels were compared: {reason}."]
    for (name, ours), theirs in zip(numbers.items(), reference.numbers, strict=True):
        width = theirs.shape[1]
        if width == 1 and ours.shape[1] == 2:
            ours = ours[:, 1:]  # scores of both classes against one of the second
        elif len(numbers) > 1 and ours.shape[1] > width:
            ours = ours[:, :width]  # forests pad to the target with the most classes
        if ours.shape[1] != width:
            notes.append(f"{name} was not compared: it has {ours.shape[1]} columns, {reference.method} {width}.")
            continue
        names.append(name)
        expected.append(theirs)
        got.append(ours)
    return names, expected, got, notes
