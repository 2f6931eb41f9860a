"""Small inputs are checked, and scored at once, while their clients wait for the answer to a predict."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from batchserve.domain import ChunkLimits, ModelVersion, Options
from batchserve.errors import BatchserveError
from batchserve.inference.run import RunResult, run
from batchserve.scoring.checks import check_input
from batchserve.scoring.chunks import Rows
from batchserve.scoring.inputs import Input
from batchserve.scoring.plain import Plain
from batchserve.scoring.plain_csv import read_plain
from batchserve.scoring.plain_json import read_json
from batchserve.scoring.planning import Planned, PlanTask
from batchserve.scoring.sessions import keep_only, session_for
from batchserve.scoring.small import Small, SmallTask, ended, score_small

FIRST_ATTEMPT = 1


@dataclass(frozen=True, slots=True)
class DirectTask:
    """What jobs that are scored together share."""

    model: ModelVersion
    options: Options
    limits: ChunkLimits
    inline_bytes: int
    """See `SmallTask`. A larger result is not made here."""


@dataclass(frozen=True)  # without slots: see `Chunk`
class DirectItem:
    input: Input
    job_id: str


def score_directly(task: DirectTask, items: Sequence[DirectItem]) -> list[Small | BatchserveError | None]:
    """For each input its result, the error for which its predict is to be refused, or None: then the job is to be
    queued, since it takes more than one chunk, ends otherwise than completed, or has a result that is not small.

    Inputs that are plain in all respects are scored in one run, the others one after the other: the results are the
    same."""
    together = _scored_together(task, items)
    return [small or _scored(task, item) for small, item in zip(together, items, strict=True)]


def _scored(task: DirectTask, item: DirectItem) -> Small | BatchserveError | None:
    try:
        check_input(item.input, task.model, task.options)
    except BatchserveError as refused:
        return refused
    try:
        done = score_small(_small_task(task, item))
    except MemoryError:
        raise  # the process is replaced
    except Exception:  # noqa: BLE001 - the worker meets it again, and ends the job with it
        return None
    return done if isinstance(done, Small) else None


def _small_task(task: DirectTask, item: DirectItem) -> SmallTask:
    plan = PlanTask(item.input, None, task.limits, most=2)
    return SmallTask(plan, item.job_id, FIRST_ATTEMPT, task.model, task.options, task.inline_bytes, is_stored=False)


def _scored_together(task: DirectTask, items: Sequence[DirectItem]) -> list[Small | None]:
    """The results of plain inputs. None: of the others, and of those with a record that fails."""
    read = [_read(task, item.input) for item in items]
    plain = [one for one in read if one is not None]
    if not plain:
        return [None] * len(items)
    try:
        ran = _run(items[0].input.storage, task.model, plain)
    except Exception:  # noqa: BLE001 - each input meets it again by itself
        return [None] * len(items)
    done: list[Small | None] = []
    stop = 0
    for item, one in zip(items, read, strict=True):
        start, stop = stop, stop + (one.chunk.records if one else 0)
        done.append(_written(_small_task(task, item), one, ran, slice(start, stop)) if one else None)
    return done


def _read(task: DirectTask, source: Input) -> Plain | None:
    """The records of an input of one chunk; None: they are not plain."""
    plain: Plain | None = None
    if source.content is not None and source.format == "csv":
        plain = read_plain(source.content, source.dialect, task.model, task.options)
    elif source.content is not None and source.format in ("jsonl", "json"):
        plain = read_json(source.content, source.format, task.model, task.options)
    if plain is None or plain.chunk.records > task.limits.records:
        return None
    return plain if plain.chunk.stop - plain.chunk.start <= task.limits.bytes else None


def _run(storage: str, model: ModelVersion, inputs: Sequence[Plain]) -> RunResult:
    """All records of the inputs in one run."""
    first = inputs[0]
    joined = {name: np.concatenate([one.inputs[name] for one in inputs]) for name in first.inputs}
    session = session_for(storage, model)
    records = sum(one.chunk.records for one in inputs)
    return run(session, first.signature, {**joined, **first.shared}, records, partial(keep_only, session))


def _written(task: SmallTask, plain: Plain, ran: RunResult, own: slice) -> Small | None:
    """`own`: the records of this input in the run."""
    if any(own.start <= error.record < own.stop for error in ran.errors):
        return None
    content = plain.write({name: array[own] for name, array in ran.outputs.items()})
    if content is None:
        return None
    share = plain.chunk.records / sum(len(array) for array in list(ran.outputs.values())[:1])
    facts = {"notes": task.model.signature.scored_on, "model_seconds": ran.seconds * share}
    done = ended(task, Planned((plain.chunk,), complete=True, share=1.0, ended=1), Rows(content, b"", 0, facts))
    return done if isinstance(done, Small) else None
