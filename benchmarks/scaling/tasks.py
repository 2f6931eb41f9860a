"""Steps of a scoring process, timed one by one. Called on the engine, with all its processes busy."""

import time
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise

from batchserve.domain import ScoredChunk
from batchserve.formats import get_format
from batchserve.inference.answers import score
from batchserve.inference.matching import match_input, with_names
from batchserve.scoring.assembly import AssembleTask, assemble_result
from batchserve.scoring.chunks import ChunkTask, Rows, store_rows
from batchserve.scoring.inputs import header_of
from batchserve.scoring.planning import Planned, PlanTask, moved, plan_chunks
from batchserve.scoring.results import result_of
from batchserve.scoring.sessions import keep_only, session_for
from batchserve.storage import errors_part_key, part_key

__all__ = ["Timed", "assembled", "nothing", "planned", "scored"]


@dataclass(frozen=True, slots=True)
class Timed:
    """Seconds of the steps of one chunk."""

    read: float
    score: float
    write: float
    chunk: ScoredChunk


def nothing() -> None:
    """A call that costs its dispatch alone."""


def scored(task: ChunkTask) -> Timed:
    """The steps of `score_chunk`, which times none of them."""
    marks = [time.perf_counter()]
    named = replace(task.input, dialect=with_names(task.input.dialect, task.model, task.options))
    match = match_input(header_of(named), task.model, task.options)
    with named.open() as source:
        reading, passed = match.read(named.reader, source, moved(task.chunk, -task.base))
    marks.append(time.perf_counter())
    session = session_for(task.input.storage, task.model)
    answers = score(session, match, reading, task.chunk.records, partial(keep_only, session))
    format = get_format(task.options.format, task.input.dialect)
    content = format.write(result_of(format, answers, passed, match))
    marks.append(time.perf_counter())
    rows, first = Rows(content, b"", int(answers.failed.sum()), {}), task.chunk.first_record
    part = part_key(task.job_id, first, task.attempt)
    sha256 = store_rows(task.input.storage, rows, part, errors_part_key(task.job_id, first, task.attempt))
    marks.append(time.perf_counter())
    read, scoring, write = (end - begin for begin, end in pairwise(marks))
    return Timed(read, scoring, write, rows.scored(task.chunk, sha256))


def planned(task: PlanTask) -> tuple[float, Planned]:
    began = time.perf_counter()
    found = plan_chunks(task)
    return time.perf_counter() - began, found


def assembled(task: AssembleTask) -> float:
    began = time.perf_counter()
    assemble_result(task)
    return time.perf_counter() - began
