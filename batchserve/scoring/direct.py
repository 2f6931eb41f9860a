"""Small inputs are checked, and scored at once, while their clients wait for the answer to a predict."""

from collections.abc import Sequence
from dataclasses import dataclass

from batchserve.domain import ChunkLimits, ModelVersion, Options
from batchserve.errors import BatchserveError
from batchserve.scoring.checks import check_input
from batchserve.scoring.inputs import Input
from batchserve.scoring.planning import PlanTask
from batchserve.scoring.small import Small, SmallTask, score_small

FIRST_ATTEMPT = 1


@dataclass(frozen=True, slots=True)
class DirectTask:
    """What jobs that are scored together share."""

    model: ModelVersion
    options: Options
    limits: ChunkLimits
    inline_bytes: int
    """See `SmallTask`. A larger result is not made here."""


@dataclass(frozen=True, slots=True)
class DirectItem:
    input: Input
    job_id: str


def score_directly(task: DirectTask, items: Sequence[DirectItem]) -> list[Small | BatchserveError | None]:
    """For each input its result, the error for which its predict is to be refused, or None: then the job is to be
    queued, since it takes more than one chunk, ends otherwise than completed, or has a result that is not small."""
    return [_scored(task, item) for item in items]


def _scored(task: DirectTask, item: DirectItem) -> Small | BatchserveError | None:
    try:
        check_input(item.input, task.model, task.options)
    except BatchserveError as refused:
        return refused
    plan = PlanTask(item.input, None, task.limits, most=2)
    small = SmallTask(plan, item.job_id, FIRST_ATTEMPT, task.model, task.options, task.inline_bytes, is_stored=False)
    try:
        done = score_small(small)
    except Exception:  # noqa: BLE001 - the worker meets it again, and ends the job with it
        return None
    return done if isinstance(done, Small) else None
