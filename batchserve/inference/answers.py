"""From the records of one chunk or request to what the model answers for each."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain

import numpy as np

from batchserve.allowance import allowance
from batchserve.domain import OutputTensor, RowError, Signature
from batchserve.formats.protocol import Reading, Tensors
from batchserve.inference.images import Images
from batchserve.inference.inputs import build_inputs
from batchserve.inference.kernels import Session
from batchserve.inference.matching import Match
from batchserve.inference.run import run


@dataclass(frozen=True, slots=True)
class Scored:
    """Outputs of the graph for every record; the `failed` ones hold no answer and have an entry in `errors`."""

    outputs: Tensors
    failed: np.ndarray
    errors: list[RowError]
    model_seconds: float
    """Time in the model, without decoding and preparing its inputs."""


def score(session: Session, match: Match, reading: Reading, records: int, make_room: Callable[[], bool]) -> Scored:
    """What the model answers for each record. The first cause of each failed one is among the errors. `make_room`: see
    `run`."""
    pixels = allowance().image_pixels
    inputs, failed, missing = build_inputs(match.signature, match.binding, reading.records, pixels, reading.matrices)
    # A passed-through value that does not fit is reported, but fails no record.
    unread = [error for error in reading.errors if error.column is None or error.column in match.binding.used]
    for error in unread:
        failed[error.record] = True
    if not failed.all():
        match.require_shared(inputs)
    images = [array for array in inputs.values() if isinstance(array, Images)]
    if match.signature.mode == "whole":  # which images decode must be known before the run
        for error in chain.from_iterable(array.check() for array in images):
            failed[error.record] = True
    ran = run(session, match.signature, {**inputs, **match.shared}, records, make_room, failed)
    undecoded = [error for array in images for error in array.errors]
    for error in (*undecoded, *ran.errors):
        failed[error.record] = True
    unanswered = list(without_answer(match.signature, ran.outputs, failed))
    for error in unanswered:
        failed[error.record] = True
    # The first error of a record counts: an unreadable value is also missing, and a missing one may crash.
    errors, told = list(reading.errors), {error.record for error in unread}
    for consequence in (missing, undecoded, ran.errors, unanswered):
        errors += [error for error in consequence if error.record not in told]
        told |= {error.record for error in consequence}
    return Scored(ran.outputs, failed, in_order(errors), ran.seconds)


def without_answer(signature: Signature, outputs: Tensors, failed: np.ndarray) -> Iterator[RowError]:
    """Records whose probabilities are no numbers, as an infinite input makes them: their label would be made up. And
    those with an infinite number where the original gives finite ones: float32 overflowed."""
    for output in signature.outputs:
        array = outputs[output.name]
        lost = _lost(output, array)
        if lost is None:
            continue
        for record in np.flatnonzero(lost & ~failed).tolist():
            message = f"{output.name} of this record is not a number: is one of its values infinite or too large?"
            yield RowError(record, "not-a-number", message)


def _lost(output: OutputTensor, array: np.ndarray) -> np.ndarray | None:
    """Which records have no number; None: surely all have one."""
    axes = tuple(range(1, array.ndim))
    if array.dtype.kind != "f":
        return None
    if output.role == "probabilities":
        return np.isnan(array).any(axis=axes) if np.isnan(array.min(initial=0)) else None
    if not output.finite:
        return None
    with np.errstate(over="ignore", invalid="ignore"):
        surely = np.isfinite(array.sum())
    return None if surely else np.asarray(~np.isfinite(array).all(axis=axes))


def in_order(errors: Iterable[RowError]) -> list[RowError]:
    """By record; those of one record as they came."""
    return sorted(errors, key=lambda error: error.record)
