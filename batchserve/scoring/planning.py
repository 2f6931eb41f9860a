"""An input is cut into chunks, and a chunk into halves. Small inputs share a chunk."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice

from batchserve.domain import Chunk, ChunkLimits
from batchserve.errors import InvalidInput
from batchserve.scoring.blank import is_blank
from batchserve.scoring.comparison import Compared, CompareTask, compare_inputs, outline_of
from batchserve.scoring.faults import by_name, of_input
from batchserve.scoring.inputs import Input

WHOLE = ChunkLimits(bytes=2**62, records=2**62)
"""Under which an input is one chunk."""


@dataclass(frozen=True, slots=True)
class PlanTask:
    input: Input
    after: Chunk | None
    """None: from the beginning of the input."""
    limits: ChunkLimits
    most: int
    """Most chunks in one answer, or one more."""
    number: int = 0
    """Number of the input in the job."""
    base: int = 0
    """Records in the inputs before it."""
    further: tuple[Input, ...] = ()
    """The next inputs, of which several may share a chunk with it; more than `MOST_TOGETHER`, or all that follow."""
    sizes: tuple[int, ...] = ()
    """Bytes of the input and of the further ones. (): none shares a chunk."""
    is_last: bool = True
    """Whether the job has no input after these."""
    comparison: CompareTask | None = None
    """Of all inputs of the job, before the first is planned."""
    records: tuple[int | None, ...] = ()
    """Of the input and of the further ones, as far as they are known by a comparison."""


@dataclass(frozen=True)  # without slots: see `Chunk`
class Planned:
    chunks: tuple[Chunk, ...]
    complete: bool
    """Whether all inputs of the task are planned to their ends."""
    share: float
    """Planned share of the first input that is not, 0 to 1; of an only one, also when it is."""
    ended: int
    """Inputs of the task that are planned to their ends."""
    compared: Compared | None = None
    """What the comparison has found about all inputs of the job, if the task has one."""


_MOST_GROWTH = 8
"""How many times as large as its file a table may become."""
MOST_TOGETHER = 64
"""Inputs that share a chunk, at most."""


@by_name
def plan_chunks(task: PlanTask) -> Planned:
    """The next chunks of one or several inputs, after those that are planned already. Raises InvalidInput, and what
    `compare_inputs` raises.

    Where they end depends on nothing but the inputs and the limits, however many chunks or inputs a call plans: so a
    chunk to which the next input, beyond those of the task, may still belong is left to the next call.
    """
    if task.comparison is None:
        return _planned(task)
    compared = compare_inputs(task.comparison)
    known = compared.records[task.number : task.number + 1 + len(task.further)]
    return replace(_planned(replace(task, records=known)), compared=compared)


def _planned(task: PlanTask) -> Planned:
    chunks: list[Chunk] = []
    base, is_open, size = task.base, False, 0
    for place, input in enumerate((task.input, *task.further)):
        after = task.after if place == 0 else None
        left = max(2, task.most - len(chunks))
        alone = _alone(task, place, input) if after is None else None
        if alone is not None:
            own, is_complete, end = [moved(alone, base, task.number + place)], True, 0
        else:
            own, is_complete, end = _of_one(input, after, task.limits, left, base, task.number + place)
        if not is_complete:
            return Planned((*chunks, *own), False, min(1.0, own[-1].stop / max(end, 1)), place)
        base = _end_of(own[-1] if own else after, base)
        if own and not own[0].records and not (base == 0 and task.is_last and place == len(task.further)):
            # Records number chunks: only a job without any has a chunk without one.
            if is_open and _fits(chunks[-1], own[0], size, task.limits):
                chunks[-1] = _joined(chunks[-1], own[0])
            else:
                is_open = False
            continue
        is_whole = bool(task.sizes) and after is None and len(own) == 1
        own_size = task.sizes[place] if task.sizes else 0
        if is_open and is_whole and _fits(chunks[-1], own[0], size + own_size, task.limits):
            chunks[-1], size = _joined(chunks[-1], own[0]), size + own_size
        elif len(chunks) >= task.most:
            return Planned(tuple(chunks), False, 0.0, place)
        else:
            chunks += own
            is_open, size = is_whole, own_size
    ended = 1 + len(task.further)
    if is_open and not task.is_last and chunks[-1].inputs < MOST_TOGETHER:  # it may still grow
        ended -= chunks.pop().inputs
        return Planned(tuple(chunks), False, 0.0, ended)
    return Planned(tuple(chunks), True, 1.0, ended)


def _alone(task: PlanTask, place: int, input: Input) -> Chunk | None:
    """All records of a small input as one chunk, where its outline tells their number: by that and its bytes alone, so
    that it is the same whatever is known."""
    if not task.sizes or task.sizes[place] * _MOST_GROWTH > task.limits.bytes:
        return None
    records = task.records[place] if task.records else None
    if records is None:
        with of_input(input):
            outline = outline_of(input)
        records = None if outline is None else outline.records
    return None if records is None or records > task.limits.records else Chunk(0, records, 0, records)


def _of_one(
    input: Input, after: Chunk | None, limits: ChunkLimits, most: int, base: int, number: int
) -> tuple[list[Chunk], bool, int]:
    """Chunks of one input, whether they end it, and where it ends."""
    format = input.reader
    try:
        with of_input(input), input.reading() as source:
            planned = islice(format.plan(source, moved(after, -base) if after else None, limits), most)
            chunks = [moved(chunk, base, number) for chunk in planned]
            is_complete = len(chunks) < most
            return chunks, is_complete, 0 if is_complete else format.end(source)
    except InvalidInput:
        if not number or not is_blank(input):
            raise
        return [Chunk(base, 0, 0, 0, number)], True, 0


def _end_of(chunk: Chunk | None, base: int) -> int:
    return base if chunk is None else chunk.first_record + chunk.records


def _fits(before: Chunk, own: Chunk, size: int, limits: ChunkLimits) -> bool:
    """Whether a whole input goes into the chunk of the whole inputs before it. Without limits all do, for a model that
    must see all records at once."""
    if limits == WHOLE:
        return True
    is_small = size <= limits.bytes and before.records + own.records <= limits.records
    return is_small and before.inputs < MOST_TOGETHER


def _joined(before: Chunk, own: Chunk) -> Chunk:
    return replace(before, records=before.records + own.records, start=0, stop=0, inputs=before.inputs + 1)


def whole(input: Input, base: int = 0, number: int = 0) -> Chunk:
    """All records of an input as one chunk."""
    try:
        with of_input(input), input.reading() as source:
            return moved(next(input.reader.plan(source, None, WHOLE)), base, number)
    except InvalidInput:
        if not is_blank(input):
            raise
        return Chunk(base, 0, 0, 0, number)


def halve_chunk(task: Sequence[Input], whole_chunk: Chunk, after: Chunk | None, base: int = 0) -> list[Chunk]:
    """A chunk split in two, or the same one where it cannot be split. `task`: its inputs. `after`: the chunk of its
    first input before it. `base`: the records in the inputs before that."""
    if len(task) > 1:
        return _halved_by_inputs(task, whole_chunk)
    limits = ChunkLimits(bytes=2**62, records=(whole_chunk.records + 1) // 2)
    after = moved(after, -base) if after else None
    with of_input(task[0]), task[0].reading() as source:
        first = moved(next(task[0].reader.plan(source, after, limits)), base, whole_chunk.input)
    if not 0 < first.records < whole_chunk.records:
        return [whole_chunk]
    start, records = first.first_record + first.records, whole_chunk.records - first.records
    return [first, Chunk(start, records, first.stop, whole_chunk.stop, whole_chunk.input)]


def _halved_by_inputs(inputs: Sequence[Input], together: Chunk) -> list[Chunk]:
    middle = len(inputs) // 2
    return list(_of_inputs([inputs[:middle], inputs[middle:]], together))


def _of_inputs(halves: Sequence[Sequence[Input]], together: Chunk) -> Iterator[Chunk]:
    """A chunk for each of several sequences of whole inputs."""
    base, number = together.first_record, together.input
    for half in halves:
        chunk = whole(half[0], base, number)
        for further in half[1:]:
            chunk = _joined(chunk, whole(further))
        yield chunk
        base, number = base + chunk.records, number + len(half)


def moved(chunk: Chunk, by: int, number: int | None = None) -> Chunk:
    """The chunk with its records renumbered."""
    if not by and not number:
        return chunk
    return replace(chunk, first_record=chunk.first_record + by, input=chunk.input if number is None else number)
