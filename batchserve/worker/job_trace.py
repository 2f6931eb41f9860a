"""The spans of an attempt at a job and of its calls. There are none while traces are off."""

from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from batchserve import tracing
from batchserve.errors import BatchserveError
from batchserve.metrics import Stage
from batchserve.scoring.assembly import assemble_result
from batchserve.scoring.chunks import ChunkTask, score_chunk
from batchserve.scoring.comparison import compare_inputs
from batchserve.scoring.planning import halve_chunk, plan_chunks
from batchserve.scoring.small import score_small
from batchserve.scoring.tables import read_query
from batchserve.worker.active_job import ActiveJob

__all__ = ["STAGES", "Back", "JobTrace"]

Back = Callable[[Future[Any]], None]
"""What handles the outcome of a call."""

STAGES: dict[Callable[..., Any], Stage] = {
    read_query: "read",
    plan_chunks: "plan",
    compare_inputs: "plan",
    halve_chunk: "plan",
    score_chunk: "score",
    score_small: "small",
    assemble_result: "assemble",
}
"""What the metrics call the functions that run on the engine."""
_SPANS: dict[Stage, str] = {
    "read": "read",
    "plan": "plan",
    "score": "chunk",
    "small": "plan, chunk and assemble",
    "assemble": "assemble",
}


class JobTrace:
    def __init__(self, job: ActiveJob) -> None:
        """The attempt begins now. Its span is in the trace of the request that queued the job, and linked to it and to
        the upload."""
        self._job, asked_by = job, job.asked_by
        self.error: BatchserveError | None = None
        """Why the attempt fails."""
        self._span = tracing.begin(
            "job", "consumer", parent=asked_by.traceparent, links=(job.upload_traceparent, asked_by.traceparent),
            batchserve__job_id=job.id, batchserve__attempt=job.attempt, batchserve__model=job.model.reference,
            batchserve__request_id=asked_by.request_id,
        )  # fmt: skip

    def staged(self, back: Back, function: Callable[..., Any], task: object) -> Back:
        """`back`, which is called when a call on the engine has ended, and then ends the span of the call as well. That
        begins now, and includes a wait for a process."""
        if self._span is None:
            return back
        chunk = task.chunk if isinstance(task, ChunkTask) else None
        span = tracing.begin(
            _SPANS[STAGES[function]], parent=self._span.traceparent, batchserve__job_id=self._job.id,
            batchserve__first_record=chunk.first_record if chunk else None,
            batchserve__records=chunk.records if chunk else None,
        )  # fmt: skip

        def ended(future: Future[Any]) -> None:
            if span is not None:
                span.end(error=_fault_of(future), batchserve__outcome="cancelled" if future.cancelled() else None)
            back(future)

        return ended

    def end(self, outcome: str) -> None:
        """`outcome`: that of the attempt, as in its row, or `lost` or `abandoned` where it has none."""
        if self._span is not None:
            self._span.end(
                error=f"{self.error.code}: {self.error.detail}" if self.error else None,
                batchserve__outcome=outcome, batchserve__rows=self._job.rows_done,
                batchserve__rows_failed=self._job.rows_failed,
            )  # fmt: skip
            self._span = None


def _fault_of(future: Future[Any]) -> str | None:
    error = None if future.cancelled() else future.exception()
    if error is None:
        return None
    return error.code if isinstance(error, BatchserveError) else type(error).__name__
