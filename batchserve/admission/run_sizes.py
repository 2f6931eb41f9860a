"""Measures how many records a run must have for the answer of a record not to depend on the number of others."""

from dataclasses import replace
from time import perf_counter

import numpy as np
from onnx import ModelProto

from batchserve.admission import graph
from batchserve.admission.probe_inputs import PROBE_BYTES, Feed
from batchserve.admission.tuning import BATCHES, identical
from batchserve.domain import Signature
from batchserve.errors import OutOfMemory, ScoringFailed
from batchserve.inference.kernels import Arrays, Session
from batchserve.inference.run import VARIES

__all__ = ["with_multiple"]

MULTIPLES = (1, 2, 4, 8, 16)
FACTORS = (1, 2, 3, 5, 7)
RECORDS = 64
"""In the run that the others are compared with."""
PIECES = 16
"""Of so many records each, that are compared with a full batch."""
SECONDS = 0.5
LINEAR = frozenset({"LinearClassifier", "LinearRegressor", "SVMRegressor"})
"""For one record these multiply a matrix by a vector, and add in another order: ONNX Runtime 1.32 gives 377 of 512
probabilities of a logistic regression other last bits then, up to 4.8e-7. From two records on none differs."""


def with_multiple(signature: Signature, model: ModelProto, session: Session, feed: Feed) -> Signature:
    """The signature with the smallest multiple of records whose answers are those of a large run, to the last bit, and
    with the largest batch, up to its own, of which that is true.

    Where no multiple is enough, a note says so. `session`: with the threads and the kernel that score.
    """
    if signature.mode != "rows" or signature.batch == 1:
        return signature
    signature = replace(signature, batch=_equal_batch(session, feed, signature.batch))
    floor = 2 if any(node.op_type in LINEAR for node in graph.nodes(model)) else 1
    try:
        multiple = _multiple(session, feed, signature.records_per_second or 1.0)
    except (ScoringFailed, OutOfMemory):  # of the varied records; the operators still tell
        multiple = floor
    if multiple is None or signature.batch % multiple:
        return replace(signature, multiple=floor, notes=(*signature.notes, VARIES))
    return replace(signature, multiple=max(floor, multiple))


def _equal_batch(session: Session, feed: Feed, batch: int) -> int:
    """The largest batch in whose runs the records have the answers that they have in small ones."""
    smaller = sorted((size for size in BATCHES if RECORDS < size < batch), reverse=True)
    for size in (batch, *smaller):
        try:
            if size <= RECORDS or _is_as_in_pieces(session, feed, size):
                return size
        except (ScoringFailed, OutOfMemory):  # of the varied records
            return batch
    return min(RECORDS, batch)


def _is_as_in_pieces(session: Session, feed: Feed, batch: int) -> bool:
    """Whether some pieces of a full batch have the answers that they have alone. Large products of matrices are
    computed otherwise: ONNX Runtime 1.32 gives 43 % of the records of a logistic regression on four columns other last
    bits in a run of 16,384 than in one of 4,096."""
    inputs = feed.varied(batch)
    together = session.run(inputs)
    starts = np.linspace(0, batch - RECORDS, PIECES).astype(int)
    return all(_is_part(session, feed, inputs, together, slice(start, start + RECORDS)) for start in starts)


def _multiple(session: Session, feed: Feed, rate: float) -> int | None:
    """None: in runs of 16 records there are other answers, too. Compared as far as time and memory reach; 1 where these
    are too short for four records, since then a second one would cost more than a last digit is worth."""
    deadline = perf_counter() + SECONDS
    count = min(RECORDS, PROBE_BYTES // feed.bytes_per_record(), int(rate * SECONDS / len(FACTORS)))
    if count < 4:
        return 1
    inputs = feed.varied(count)
    together = session.run(inputs)
    for multiple in MULTIPLES:
        sizes = [multiple * factor for factor in FACTORS if multiple * factor < count]
        if perf_counter() > deadline or all(_equal(session, feed, inputs, together, size) for size in sizes):
            return multiple
    return None


def _equal(session: Session, feed: Feed, inputs: Arrays, together: Arrays, size: int) -> bool:
    """Whether the records have the same answers in runs of this size, also where they stand in another place: sums over
    a row may depend on its alignment in memory."""
    count = len(next(iter(together.values())))
    for start in sorted({*range(0, count - size + 1, size), *range(1, count - size + 1, size)}):
        if not _is_part(session, feed, inputs, together, slice(start, start + size)):
            return False
    return True


def _is_part(session: Session, feed: Feed, inputs: Arrays, together: Arrays, part: slice) -> bool:
    """Whether the records of a part have the answers alone that they have together."""
    outputs = session.run({name: array[part] if name in feed.arrays else array for name, array in inputs.items()})
    return identical(outputs, {name: array[part] for name, array in together.items()})
