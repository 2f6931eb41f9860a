"""An input is cut into chunks, and a chunk into halves."""

from dataclasses import dataclass, replace
from itertools import islice

from batchserve.domain import Chunk, ChunkLimits
from batchserve.scoring.faults import by_name
from batchserve.scoring.inputs import Input


@dataclass(frozen=True, slots=True)
class PlanTask:
    input: Input
    after: Chunk | None
    """None: from the beginning of the input."""
    limits: ChunkLimits
    most: int
    """Most chunks in one answer."""
    number: int = 0
    """Number of the input in the job."""
    base: int = 0
    """Records in the inputs before it."""


@dataclass(frozen=True)  # without slots: see `Chunk`
class Planned:
    chunks: tuple[Chunk, ...]
    complete: bool
    share: float
    """Planned share of the input, 0 to 1."""


@by_name
def plan_chunks(task: PlanTask) -> Planned:
    """The next chunks of an input, after those that are planned already. Raises InvalidInput."""
    after = moved(task.after, -task.base) if task.after else None
    format = task.input.reader
    with task.input.open() as source:
        planned = islice(format.plan(source, after, task.limits), task.most)
        chunks = tuple(moved(chunk, task.base, task.number) for chunk in planned)
        complete = len(chunks) < task.most
        share = 1.0 if complete else min(1.0, chunks[-1].stop / max(format.end(source), 1))
    return Planned(chunks, complete, share)


def halve_chunk(task: Input, whole: Chunk, after: Chunk | None, base: int = 0) -> list[Chunk]:
    """A chunk split in two, or the same one where it cannot be split. `after`: the chunk of its input before it.
    `base`: the records in the inputs before that."""
    limits = ChunkLimits(bytes=2**62, records=(whole.records + 1) // 2)
    after = moved(after, -base) if after else None
    with task.open() as source:
        first = moved(next(task.reader.plan(source, after, limits)), base, whole.input)
    if not 0 < first.records < whole.records:
        return [whole]
    return [
        first,
        Chunk(first.first_record + first.records, whole.records - first.records, first.stop, whole.stop, whole.input),
    ]


def moved(chunk: Chunk, by: int, number: int | None = None) -> Chunk:
    """The chunk with its records renumbered."""
    if not by and not number:
        return chunk
    return replace(chunk, first_record=chunk.first_record + by, input=chunk.input if number is None else number)
