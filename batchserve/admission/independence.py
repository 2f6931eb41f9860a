"""Proves that the records of a run do not influence each other, so that an input may be cut between them."""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
from onnx import ModelProto

from batchserve.admission import graph
from batchserve.admission.probe_inputs import Feed
from batchserve.admission.variations import RECORDS, different_records
from batchserve.domain import Column, InputTensor
from batchserve.errors import OutOfMemory, ScoringFailed
from batchserve.inference.kernels import Arrays, Session

__all__ = ["ALONE", "QUANTISED", "close", "influences", "mixes_records", "share_fixed", "without_half"]

ALONE = {"float16": 2e-2, "float32": 5e-3, "float64": 1e-4}
"""How far the values of a record may be apart, relative to the largest one, between runs of different sizes: sums are
added in another order then. ONNX Runtime was seen to move probabilities of a network by 6e-4."""
AMONG_OTHERS = {"float16": 1e-3, "float32": 1e-5, "float64": 1e-5}
"""The same between runs of one size, with the record in its place and others beside it: the same sums are added."""
QUANTISED = 0.02
"""Both, of a graph that quantises by the range of a batch: that is noise, not a mixture of records."""


def influences(model: ModelProto) -> float:
    """The tolerance that a graph gets at least."""
    return QUANTISED if any(node.op_type.startswith("DynamicQuantize") for node in graph.nodes(model)) else 0.0


def mixes_records(
    session: Session, feed: Feed, inputs: tuple[InputTensor, ...], least: float, batch: int | None = None
) -> bool:
    """Whether records have other answers together than alone (`batch`: the only number that the graph takes), in
    another order, beside other records, or in arrays of another size. The records of the feed are all different. Raises
    ScoringFailed and OutOfMemory."""
    if _mixes(session, feed, least, batch):
        return True
    smaller = without_half(feed, inputs)
    try:
        return smaller is not None and _mixes(session, smaller, least, batch)
    except OutOfMemory:
        raise
    except ScoringFailed:  # the graph takes arrays of no other size, or not of this one
        return False


def share_fixed(
    session: Session, feed: Feed, inputs: tuple[InputTensor, ...], least: float
) -> tuple[tuple[InputTensor, ...], Feed, list[str]] | None:
    """The inputs and the feed, with what has a fixed first axis beside free ones shared by all records, such as the
    state of a recurrent network; and what to say of it.

    None: there is no such input, or the graph takes only as many records as it has, or those do not influence each
    other. Then each record may have one of its own.
    """
    fixed = [tensor for tensor in inputs if tensor.per_record and tensor.shape[0] is not None]
    if not fixed or not any(tensor.per_record and tensor.shape[0] is None for tensor in inputs):
        return None
    names = {tensor.name for tensor in fixed}
    given = {tensor.name: feed.arrays[tensor.name][: tensor.shape[0]] for tensor in fixed}
    arrays = {name: array for name, array in feed.arrays.items() if name not in names}
    shared = Feed(arrays, feed.shared | given)
    different = different_records(session, shared)
    own = tuple(
        replace(tensor, per_record=False, columns=(Column(tensor.name, tensor.dtype),))
        if tensor.name in names
        else tensor
        for tensor in inputs
    )
    try:
        if not mixes_records(session, different, own, least):
            return None
    except OutOfMemory:
        raise
    except ScoringFailed:
        return None
    return own, shared, [f"Input {name!r} has one value for all records." for name in sorted(names)]


def close(left: np.ndarray, right: np.ndarray, tolerances: dict[str, float], least: float = 0.0) -> bool:
    if left.dtype.kind != "f":
        return bool(np.array_equal(left, right))
    tolerance = max(least, tolerances[left.dtype.name])
    finite = np.abs(left[np.isfinite(left)])
    scale = float(finite.max()) if finite.size else 1.0
    return bool(np.allclose(left, right, rtol=tolerance, atol=tolerance * scale, equal_nan=True))


def _mixes(session: Session, feed: Feed, least: float, batch: int | None) -> bool:
    places = np.resize(np.arange(feed.examples()), batch or RECORDS)
    together = session.run(feed.take(places))
    rows = len(places)
    backwards = session.run(feed.take(places[::-1]))
    if not all(
        array.shape == together[name].shape and close(together[name], array[::-1], ALONE, least)
        for name, array in _compared(backwards)
    ):
        return True
    for place in sorted({0, rows // 2, rows - 1}):
        uniform = session.run(feed.take(np.full(rows, places[place])))
        if not all(
            array.shape == together[name].shape
            and close(_row(together[name], place), _row(array, place), AMONG_OTHERS, least)
            for name, array in _compared(uniform)
        ):
            return True
    return batch is None and any(_differs_alone(session, feed, together, places, place, least) for place in range(rows))


def _differs_alone(
    session: Session, feed: Feed, together: Arrays, places: np.ndarray, place: int, least: float
) -> bool:
    alone = session.run(feed.take(places[place : place + 1]))
    if any(array.shape != (1, *together[name].shape[1:]) for name, array in alone.items()):
        return True
    return not all(close(_row(together[name], place), array, ALONE, least) for name, array in _compared(alone))


def _row(array: np.ndarray, place: int) -> np.ndarray:
    return array[place : place + 1]


def _compared(outputs: Arrays) -> Iterator[tuple[str, np.ndarray]]:
    """The numbers that decide; labels beside them may flip where two numbers are nearly equal."""
    floats = [(name, array) for name, array in outputs.items() if array.dtype.kind == "f"]
    yield from floats or outputs.items()


def without_half(feed: Feed, inputs: tuple[InputTensor, ...]) -> Feed | None:
    """The records cut to half of each size that the graph leaves open; None where it leaves none."""
    cut = {}
    for tensor in inputs:
        array = feed.arrays.get(tensor.name)
        if array is None or tensor.image is not None:
            continue
        keep = tuple(
            slice((size + 1) // 2) if declared is None else slice(None)
            for declared, size in zip(tensor.shape[1:], array.shape[1:], strict=False)
        )
        cut[tensor.name] = array[(slice(None), *keep)]
    arrays = {**feed.arrays, **cut}
    same = all(array.shape == feed.arrays[name].shape for name, array in arrays.items())
    return None if same else Feed(arrays, feed.shared)
