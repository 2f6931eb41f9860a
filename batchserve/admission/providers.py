"""Whether a model answers on another execution provider as on the processor."""

from dataclasses import replace

import numpy as np

from batchserve.admission.probe_inputs import EXAMPLES, Feed, run_within_memory
from batchserve.domain import Signature
from batchserve.errors import ModelRefused
from batchserve.inference.distances import distances
from batchserve.inference.kernels import Arrays, Session
from batchserve.inference.session import open_session

__all__ = ["with_parity"]

TOLERANCE, OF_FLOAT16 = 1e-3, 2e-2
"""Of numbers, relative to max(1, |expected|): sums are added in another order, and functions are approximated."""


def with_parity(signature: Signature, session: Session, content: bytes, feed: Feed) -> Signature:
    """The signature with a note on the largest difference between its provider and the processor, on the records of the
    feed. Raises ModelRefused where that is not tolerable."""
    if signature.provider == "cpu":
        return signature
    processor = open_session(content)
    records = signature.batch if signature.mode == "fixed" else run_within_memory(processor, feed, EXAMPLES)[0]
    inputs = feed.first(records)
    difference = _difference(processor.run(inputs), session.run(inputs))
    processor.close()
    note = (
        f"Runs on {signature.provider}; its numbers differ from those of the processor by at most {difference:.1e}, "
        "relative to the larger of them and 1."
    )
    return replace(signature, notes=(*signature.notes, note))


def _difference(expected: Arrays, got: Arrays) -> float:
    """The largest of all numbers. Raises ModelRefused for one that is not tolerable, or another label."""
    largest = 0.0
    for name, array in expected.items():
        other = got[name]
        if array.shape != other.shape or array.dtype != other.dtype:
            raise ModelRefused(
                f"its output {name!r} is {other.dtype} {other.shape}, and on the processor {array.shape}"
            )
        if array.dtype.kind != "f":
            if (array != other).any():
                raise ModelRefused(f"its output {name!r} has other values than on the processor")
            continue
        most = float(distances(array, other)[1].max(initial=0.0))
        if most > (OF_FLOAT16 if array.dtype == np.float16 else TOLERANCE):
            raise ModelRefused(f"its output {name!r} differs by {most:.1e} from that of the processor")
        largest = max(largest, most)
    return largest
