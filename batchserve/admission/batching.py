"""How many records a graph takes in a run, and whether the input may be cut between them."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from onnx import ModelProto

from batchserve.admission import graph
from batchserve.admission.independence import ALONE, close, influences, mixes_records
from batchserve.admission.probe_inputs import Feed, run_within_memory
from batchserve.admission.record_axes import has_named_records
from batchserve.admission.tuning import BATCHES
from batchserve.admission.variations import different_records, is_rowwise
from batchserve.domain import InputTensor
from batchserve.errors import ModelRefused, OutOfMemory, ScoringFailed
from batchserve.inference.kernels import Arrays, Session

__all__ = ["PARTED", "Batching", "Mode", "find_batching", "gives_parts", "proved_mode", "run_many"]

FIXED_BATCHES = (4, 8, 16, 32, 64)
"""Guesses for the only number of records that a graph accepts."""

PARTED = 8
"""So many records are run one at a time, to see outputs of several lengths."""

DEPENDS = "The result of a record depends on the other records, so the input is scored in one run."
UNPROVED = (
    "No two different records could be made, to prove that they do not influence each other, so the input is scored in "
    "one run. Add batchserve.sample with three of them."
)

DRAWS = frozenset(
    {"Bernoulli", "Dropout", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike"}
)
"""Operators that may draw random numbers."""

Mode = Literal["rows", "fixed", "whole"]


@dataclass(frozen=True, slots=True)
class Batching:
    """The mode in which a graph seems to take records, and the outputs of runs of 1, 2 and 3 of them, or of the only
    number that it takes."""

    mode: Mode
    batch: int
    runs: dict[int, Arrays]
    shortage: OutOfMemory | None = None
    """Why records are taken one at a time."""

    @property
    def one_at_a_time(self) -> bool:
        """Whether each run is about a single record: then all that it gives belongs to it."""
        return self.mode == "fixed" and self.batch == 1


def find_batching(session: Session, feed: Feed, inputs: tuple[InputTensor, ...], most: int = 3) -> Batching:
    """`most`: 1, to take one record at a time where the graph takes any number. Raises ModelRefused where inputs
    contradict each other, ScoringFailed where no run succeeds, and OutOfMemory."""
    declared = {tensor.shape[0] for tensor in inputs if tensor.per_record and tensor.shape[0] is not None}
    if len(declared) > 1:
        raise ModelRefused(f"the inputs need different numbers of records: {sorted(declared)}")
    if declared:
        batch = declared.pop()
        return Batching("fixed", batch, {batch: session.run(feed.first(batch))})
    runs: dict[int, Arrays] = {}
    failure: ScoringFailed | None = None
    for count in range(1, most + 1):
        try:
            runs[count] = session.run(feed.first(count))
        except OutOfMemory as error:
            if 1 not in runs:
                raise
            return Batching("fixed", 1, {1: runs[1]}, error)
        except ScoringFailed as error:
            failure = error
    if len(runs) == 3:
        return Batching("rows", BATCHES[0], runs)
    if runs:
        batch = min(runs)
        return Batching("fixed", batch, {batch: runs[batch]})
    return _guessed(session, feed, failure)


def _guessed(session: Session, feed: Feed, failure: ScoringFailed | None) -> Batching:
    """The only number of records that a graph takes, which its shapes do not say."""
    for batch in FIXED_BATCHES:
        try:
            return Batching("fixed", batch, {batch: session.run(feed.first(batch))})
        except ScoringFailed as error:
            failure = failure or error
    raise failure or ScoringFailed("no run succeeds")


def proved_mode(
    session: Session,
    model: ModelProto,
    feed: Feed,
    inputs: tuple[InputTensor, ...],
    batching: Batching,
) -> tuple[Mode, list[str]]:
    """The mode in which the input is cut only between records that do not influence each other, and what to say of it.
    Raises ModelRefused where it would have to be cut elsewhere."""
    only = batching.batch if batching.mode == "fixed" else None
    _require_equal_runs(session, model, feed, only or 1)
    if batching.one_at_a_time:
        return "fixed", []
    different = different_records(session, feed, only or 1)
    if mixes_records(session, different, inputs, influences(model), only):
        if only is None:
            return "whole", [DEPENDS]
        raise ModelRefused(
            f"the graph takes exactly {only} records in a run, and the result of one depends on the others: "
            "export it with a free number of records, or for one record"
        )
    # Three, unless the model takes no third one: it may know two categories.
    if different.examples() > 1 or is_rowwise(model) or has_named_records(model):
        return batching.mode, []
    if only is None:
        return "whole", [UNPROVED]
    raise ModelRefused(
        f"the graph takes exactly {only} records in a run, and not enough different ones could be made to prove that "
        "they do not influence each other: add batchserve.sample with three of them, or export it for one record"
    )


def _require_equal_runs(session: Session, model: ModelProto, feed: Feed, records: int) -> None:
    """Raises ModelRefused for a graph that draws random numbers: no answer of it could be given twice."""
    drawing = sorted({node.op_type for node in graph.nodes(model)} & DRAWS)
    if not drawing:
        return
    same = feed.take(np.resize(np.arange(feed.examples()), records))
    first, second = session.run(same), session.run(same)
    if not all(array.shape == first[name].shape and close(first[name], array, ALONE) for name, array in second.items()):
        raise ModelRefused(
            "two runs of the same records give different answers: the graph draws random numbers "
            f"({', '.join(drawing)}). Export it in evaluation mode (in PyTorch model.eval()), where dropout is off"
        )


def gives_parts(session: Session, model: ModelProto, feed: Feed, batching: Batching) -> bool:
    """Whether the rows of an output are those of each record in turn, more of one than of another, as of a detector
    that lists what it found in all images: one record at a time, all rows are its own. Raises ScoringFailed."""
    varying = graph.makers(model, graph.VARYING)
    aligned = all(array.ndim and len(array) == count for count, run in batching.runs.items() for array in run.values())
    if batching.mode != "rows" or (aligned and not any(output.name in varying for output in model.graph.output)):
        return False
    records, outputs = run_within_memory(session, feed, max(3, min(PARTED, feed.examples())), least=3)
    runs = [session.run(feed.take(np.array([record]))) for record in range(records)]
    differ = False
    for name, together in outputs.items():
        lengths = [len(run[name]) if run[name].ndim else 0 for run in runs]
        if not together.ndim or sum(lengths) != len(together):
            return False
        differ = differ or len(set(lengths)) > 1
    return differ


def run_many(session: Session, feed: Feed, mode: Mode, batch: int) -> Arrays:
    """Outputs for all examples, as far as mode and memory allow it; else for one run."""
    if mode == "fixed":
        return session.run(feed.first(batch))
    return run_within_memory(session, feed, max(3, feed.examples()), least=3)[1]
